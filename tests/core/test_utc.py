"""Which time is believed: who may propose, what confirms, and that no forgery outlasts itself."""

from binascii import unhexlify

from dps_agent.der import certificates, not_after_s
from dps_agent.utc import (
    AGREEMENT_S,
    LONGEST_STEP_S,
    BelievedTime,
    date_text,
    http_date_s,
    utc_s,
)

DAY = 86400
BUILT = 1_793_491_200  # 2026-11-01
ROOTS_END = 2_147_000_000
TODAY = BUILT + 30 * DAY


def believed(last_believed_s: int = 0) -> BelievedTime:
    return BelievedTime(BUILT, last_believed_s, ROOTS_END, 100)


def raises_value_error(call, *arguments) -> bool:  # type: ignore[no-untyped-def]
    try:
        call(*arguments)
    except ValueError:
        return True
    return False


def test_without_any_word_the_floor_runs_on_and_is_not_believable() -> None:
    assert believed().utc(160) == (BUILT + 60, False, "floor")
    assert believed(TODAY).utc(100) == (TODAY, False, "floor")
    assert believed(BUILT - DAY).floor_s == BUILT


def test_a_moment_is_said_as_its_day() -> None:
    days = ((1, 1, 1), (1969, 12, 31), (1970, 1, 1), (2000, 2, 29), (2026, 11, 1), (2028, 12, 31), (2400, 3, 1))
    for year, month, day in days:
        text = f"{year:04d}-{month:02d}-{day:02d}"
        assert date_text(utc_s(year, month, day, 0, 0, 0)) == text == date_text(utc_s(year, month, day, 23, 59, 59))
    for step in range(5490):  # 150 years; their seconds are too many for a `range` of a board
        now_s = step * (10 * DAY + 1)
        year, month, day = (int(part) for part in date_text(now_s).split("-"))
        assert utc_s(year, month, day, 0, 0, 0) == now_s // DAY * DAY, now_s
    assert raises_value_error(date_text, -utc_s(4000, 1, 1, 0, 0, 0))


def test_a_proposal_alone_is_not_believed() -> None:
    time = believed()
    assert time.propose(TODAY, 100, "ntp")
    assert time.for_handshake_s(110) == TODAY + 10
    assert time.utc(110) == (TODAY + 10, False, "ntp")
    assert time.floor_s == BUILT


def test_a_verified_handshake_confirms_the_proposal_and_raises_the_floor() -> None:
    time = believed()
    time.propose(TODAY, 100, "ntp")
    assert time.verified(TODAY + 10, 110)
    assert time.utc(200) == (TODAY + 100, True, "ntp")
    assert time.floor_s == TODAY + 10
    assert not time.propose(TODAY - AGREEMENT_S + 9, 200, "ntp"), "below the floor"


def test_a_peer_without_date_confirms_no_proposal_and_raises_no_floor() -> None:
    for forged in (TODAY, TODAY + 180 * DAY):
        time = believed()
        time.propose(forged, 100, "ntp")
        assert time.needs_date(110) and time.verified(None, 110)
        assert time.utc(110) == (forged + 10, False, "ntp") and time.floor_s == BUILT, forged
        assert not time.verified(TODAY + 40 * DAY, 120) and time.verified(TODAY + 40 * DAY, 120)
        assert time.utc(120) == (TODAY + 40 * DAY, True, "date")


def test_a_peer_without_date_confirms_what_was_believed_before() -> None:
    time = believed(TODAY)
    assert not time.needs_date(110) and time.verified(None, 110)
    assert time.utc(110) == (TODAY + 10, True, "floor") and time.floor_s == TODAY + 10
    for step_s in (AGREEMENT_S, -AGREEMENT_S):
        time.propose(TODAY + 100 + max(step_s, 0), 200 - min(step_s, 0), "ntp")
        assert not time.needs_date(200 - min(step_s, 0)) and time.verified(None, 200 - min(step_s, 0))
        assert time.utc(200) == (TODAY + 100, True, "floor"), "many small steps would be a large one"


def test_without_a_date_a_new_time_does_not_replace_the_one_that_is_believed() -> None:
    time = believed()
    time.propose(TODAY, 100, "ntp")
    time.verified(TODAY, 100)
    time.propose(TODAY + 180 * DAY, 200, "ntp")
    assert time.needs_date(200) and time.verified(None, 200)
    assert time.utc(200) == (TODAY + 100, True, "ntp") and time.floor_s == TODAY
    assert time.refused() and time.for_handshake_s(200) == TODAY + 100


def test_times_outside_the_bounds_are_not_even_tried() -> None:
    time = believed(TODAY)
    for now_s in (0, BUILT, TODAY - AGREEMENT_S - 1, ROOTS_END + 1, 2**33):
        assert not time.propose(now_s, 100, "ntp"), now_s
    assert time.for_handshake_s(100) == TODAY
    assert time.propose(TODAY, 100, "ntp") and time.propose(ROOTS_END, 100, "ntp")


def test_a_start_right_after_another_may_find_the_time_a_little_behind_what_that_one_believed() -> None:
    for behind_s in (1, AGREEMENT_S):
        time = believed(TODAY)
        assert time.propose(TODAY - behind_s, 100, "ntp") and time.verified(TODAY - behind_s, 100)
        assert time.utc(100) == (TODAY - behind_s, True, "ntp") and time.floor_s == TODAY, behind_s


def test_a_refused_proposal_is_dropped_and_the_one_before_is_tried() -> None:
    time = believed()
    time.propose(TODAY + 3000 * DAY, 100, "ntp")
    assert time.refused() and time.for_handshake_s(100) == BUILT
    assert not time.refused(), "nothing else is left to try"
    time.propose(TODAY, 100, "ntp")
    time.verified(TODAY, 100)
    time.propose(TODAY + 3000 * DAY, 100, "ntp")
    assert time.utc(100) == (TODAY, True, "ntp"), "what was believed is believed until something better is confirmed"
    assert time.refused() and time.for_handshake_s(100) == TODAY and time.utc(100).believable


def test_the_date_of_a_verified_peer_proposes_and_takes_a_handshake_of_its_own() -> None:
    time = believed()
    assert not time.verified(TODAY, 100), "the floor is 30 days from the Date"
    assert time.utc(100) == (TODAY, False, "date") and time.floor_s == BUILT
    assert time.verified(TODAY, 101)
    assert time.utc(101) == (TODAY + 1, True, "date")


def test_a_time_forged_inside_the_certificates_life_is_corrected_by_the_peers_date() -> None:
    for forged in (TODAY + 90 * DAY, TODAY - 20 * DAY):
        time = believed()
        time.propose(forged, 100, "ntp")
        assert not time.verified(TODAY, 100)
        assert time.floor_s == BUILT, "the forged time has raised nothing"
        assert time.verified(TODAY, 100) and time.utc(100) == (TODAY, True, "date")


def test_a_date_vouches_for_the_time_for_an_hour_and_a_certificate_not_at_all() -> None:
    time = believed()
    assert time.propose(TODAY, 0, "ntp") and time.verified(None, 0) and not time.is_dated(0)
    assert time.verified(TODAY + 1, 1) and time.is_dated(1) and time.is_dated(3600)
    assert not time.is_dated(3601)
    assert time.verified(None, 4000) and not time.is_dated(4000)
    assert time.verified(TODAY + 4000, 4000) and time.is_dated(4000)


def test_a_date_out_of_bounds_proposes_nothing() -> None:
    time = believed(TODAY)
    time.propose(TODAY + 90 * DAY, 100, "ntp")
    assert not time.verified(BUILT, 100), "NTP and peer disagree: neither is taken"
    assert time.for_handshake_s(100) == TODAY
    assert time.verified(BUILT, 100), "the floor itself is all there is"
    assert time.utc(100) == (TODAY, True, "floor")


def test_small_differences_are_no_contradiction() -> None:
    for off_s, agrees in ((0, True), (AGREEMENT_S, True), (-AGREEMENT_S, True), (AGREEMENT_S + 1, False)):
        time = believed()
        time.propose(TODAY, 100, "ntp")
        assert time.verified(TODAY + off_s, 100) == agrees, off_s


def test_the_floor_rises_by_400_days_at_once_and_the_time_is_believed_all_the_same() -> None:
    time = believed()
    late = BUILT + 900 * DAY
    time.propose(late, 100, "ntp")
    assert time.verified(late, 100) and time.utc(100) == (late, True, "ntp")
    assert time.floor_s == BUILT + LONGEST_STEP_S
    time.propose(late, 100, "ntp")
    assert time.verified(late, 100) and time.floor_s == BUILT + LONGEST_STEP_S, "once for each start"


def test_a_stored_time_behind_the_roots_end_is_no_floor() -> None:
    assert believed(ROOTS_END + 1).floor_s == BUILT


def test_a_clock_that_drifts_from_its_peer_is_corrected_with_a_handshake() -> None:
    time = believed()
    time.propose(TODAY, 100, "ntp")
    time.verified(TODAY, 100)
    assert time.verified(TODAY + 1000, 1100)
    assert not time.verified(TODAY + 2000 + AGREEMENT_S + 1, 2100)
    assert time.utc(2100).believable, "meanwhile the old one serves"
    assert time.verified(TODAY + 2000 + AGREEMENT_S + 1, 2100)
    assert time.utc(2100).now_s == TODAY + 2000 + AGREEMENT_S + 1


def test_calendar_dates_become_seconds() -> None:
    for moment, seconds in (
        ((1970, 1, 1, 0, 0, 0), 0),
        ((2000, 2, 29, 23, 59, 59), 951868799),
        ((2026, 11, 1, 0, 0, 0), BUILT),
        ((2038, 1, 19, 3, 14, 8), 2**31),
        ((2100, 3, 1, 0, 0, 0), 4107542400),
    ):
        assert utc_s(*moment) == seconds, moment
    for moment in ((2100, 2, 29, 0, 0, 0), (2026, 13, 1, 0, 0, 0), (2026, 0, 1, 0, 0, 0), (2026, 1, 1, 24, 0, 0)):
        assert raises_value_error(utc_s, *moment), moment


def test_a_date_header_is_read_in_its_one_form() -> None:
    assert http_date_s("Sun, 06 Nov 1994 08:49:37 GMT") == 784111777
    for text in (
        None,
        "",
        "Sunday, 06-Nov-94 08:49:37 GMT",
        "Sun Nov  6 08:49:37 1994",
        "Sun, 06 Nov 1994 08:49:37 CET",
        "Sun, 32 Nov 1994 08:49:37 GMT",
        "Sun, 06 Nov 1994 08:49 GMT",
        "Sun, +6 Nov 1994 08:49:37 GMT",
        "Sun, 06 Nov 1994 08:49:37:11 GMT",
    ):
        assert http_date_s(text) is None, text


def certificate(not_after: bytes, version: bytes = unhexlify("a003020102")) -> bytes:
    """The fields of a certificate up to its validity; nothing behind that is looked at."""
    validity = unhexlify("170d") + b"000101000000Z" + not_after
    body = version + unhexlify("020101") + unhexlify("3000") + unhexlify("3000")
    body += b"\x30" + bytes([len(validity)]) + validity
    inner = b"\x30\x81" + bytes([len(body)]) + body
    return b"\x30\x82\x00" + bytes([len(inner)]) + inner


def test_the_end_of_a_certificate_is_read_in_both_forms() -> None:
    assert not_after_s(certificate(unhexlify("170d") + b"380119031408Z")) == 2**31
    assert not_after_s(certificate(unhexlify("170d") + b"380119031408Z", version=b"")) == 2**31
    assert not_after_s(certificate(unhexlify("170d") + b"991231235959Z")) == 946684799
    assert not_after_s(certificate(unhexlify("180f") + b"21000301000000Z")) == 4107542400


def test_what_is_no_certificate_is_refused_by_name() -> None:
    good = certificate(unhexlify("170d") + b"380119031408Z")
    for broken in (
        b"",
        b"\x30",
        unhexlify("30023000"),
        good[:-1],
        good[:30],
        certificate(unhexlify("170d") + b"380119031408+"),
        certificate(unhexlify("130d") + b"380119031408Z"),
    ):
        assert raises_value_error(not_after_s, broken), broken


def test_certificates_lie_one_behind_the_other() -> None:
    one = certificate(unhexlify("170d") + b"380119031408Z")
    two = certificate(unhexlify("180f") + b"21000301000000Z")
    assert certificates(one + two) == [one, two]
    assert certificates(b"") == []
    for broken in (one + b"\x00", one + two[:-1], b"-----BEGIN CERTIFICATE-----\n"):
        assert raises_value_error(certificates, broken), broken
