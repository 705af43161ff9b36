"""An issued certificate is renewed over its hub: a device's life in virtual time, and what may go wrong with it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from dps_agent.assignment import decode
from dps_agent.effects import ReadRequest
from dps_agent.hub_effects import Arrived
from dps_agent.issued import chains_in, name_of
from dps_agent.lifecycle import CONNECTED, Lifecycle
from dps_agent.settings import ISSUED
from dps_hal.contracts import CERTIFICATE, IDENTITY
from dps_hal.errors import AskOperator, RetryLater
from support.issuing import DAY_S, OTHER_KEY, IssuingDps, IssuingTpm, RenewingHub
from support.world import DEVICE, HUB, World, error_reply, settings

LIFE_S = 30 * DAY_S
DUE_S = (18 * DAY_S, 20 * DAY_S)  # two thirds, and up to a twentieth of the life earlier
LATER = ("270202", "270306")  # a life that begins as the first one is to be renewed


class Device:
    """A device at its hub, whose certificate was issued when the world began."""

    def __init__(self) -> None:
        self.world = World()
        self.world.tpm = IssuingTpm()
        self.world.dps = self.dps = IssuingDps(self.world.tpm)
        self.hub = RenewingHub(HUB, self.dps.chains)
        self.world.hubs = {HUB: self.hub}
        self.life = Lifecycle(settings(certificate=ISSUED))

    def live(self, until_s: float) -> Device:
        self.world.effects.clear()
        self.world.end_at(until_s)
        self.world.run(self.life.live(False, False, True))
        return self

    def issue_later(self) -> None:
        """From now on DPS issues for the time to come."""
        self.dps.dates = LATER

    @property
    def registrations(self) -> int:
        return self.dps.registrations

    @property
    def shown(self) -> bytes:
        """The chain that the stored identity names."""
        named = decode(self.world.store[IDENTITY])[0].chain
        (chain,) = [chain for chain in chains_in(self.world.store[CERTIFICATE]) if name_of(chain) == named]
        return chain


@pytest.fixture
def device() -> Device:
    return Device()


def test_it_is_renewed_at_two_thirds_of_its_life_and_the_next_connection_shows_it(device: Device) -> None:
    device.live(DUE_S[0])
    assert device.hub.asked == [] and len(device.hub.connections) == 1
    device = Device().live(25 * DAY_S)
    ((when, _, asked),) = device.hub.asked
    assert DUE_S[0] < when < DUE_S[1] and "replace" not in asked
    assert device.registrations == 1 and device.shown == device.dps.chains[-1]
    assert [code for _, code in device.hub.connections] == [0, 0]
    assert device.hub.connections[1][0] - when < 60, "at once"
    assert device.life.state == CONNECTED and device.life.assignment is not None
    assert device.life.assignment.chain == name_of(device.shown), "the life knows it as well"


def test_a_year_of_renewals_is_lived_without_a_registration(device: Device) -> None:
    lives = [("270202", "270306"), ("270220", "270326"), ("270312", "270415")]

    def next_life() -> None:
        device.hub.life = lives.pop(0)

    for day in (10, 30, 50):
        device.world.at(day * DAY_S, next_life)
    device.live(70 * DAY_S)
    assert len(device.hub.asked) == 3 and device.registrations == 1
    assert len({rid for _, rid, _ in device.hub.asked}) == 3 and len(chains_in(device.world.store[CERTIFICATE])) == 2


def test_a_bare_list_is_taken_as_well(device: Device) -> None:
    device.hub.bare = True
    device.live(25 * DAY_S)
    assert device.registrations == 1 and device.shown == device.dps.chains[-1] and len(device.dps.chains) == 2


def test_a_certificate_that_comes_hours_later_is_taken(device: Device) -> None:
    device.hub.issue_after_s = 11 * 3600
    device.live(25 * DAY_S)
    assert len(device.hub.asked) == 1 and device.registrations == 1 and device.shown == device.dps.chains[-1]


def test_after_a_lost_connection_the_same_request_goes_out_under_the_same_id(device: Device) -> None:
    device.hub.issue_after_s = 6 * 3600
    first: list[float] = []

    def lose() -> None:
        first.append(device.world.uptime_s)
        device.hub.drop(device.world.uptime_s)
        device.hub.said = [(202, {})]

    device.world.at(19 * DAY_S, lose)
    device.live(25 * DAY_S)
    assert len(device.hub.asked) == 2 and device.hub.asked[0][1:] == device.hub.asked[1][1:], device.hub.asked
    assert device.registrations == 1 and device.shown in device.dps.chains[1:]


def test_the_next_process_asks_under_the_same_id(device: Device) -> None:
    device.hub.said = [None]
    device.live(DUE_S[0])
    device.life = Lifecycle(settings(certificate=ISSUED))

    def until_asked() -> None:
        if device.hub.asked:
            device.world.over = True
        else:
            device.world.at(device.world.uptime_s + 10, until_asked)

    device.world.at(DUE_S[0] + 1, until_asked)
    device.live(DUE_S[1])
    (asked,) = device.hub.asked
    again = Lifecycle(settings(certificate=ISSUED))
    device.life = again
    device.live(21 * DAY_S)
    assert device.hub.asked[1][1:] == asked[1:] and device.registrations == 1


@pytest.mark.parametrize(
    "said",
    [
        (429, {"errorCode": 429002, "retryAfter": 7200}),
        (500, {"errorCode": 500001}),
        (503, {"errorCode": 503001, "message": "busy\x1b[2J"}),
        None,
        (409, {"errorCode": 409004}),
    ],
)
def test_what_may_be_better_later_is_asked_for_again(device: Device, said: Any) -> None:
    device.hub.said = [said]
    device.live(22 * DAY_S)
    first, second = device.hub.asked
    assert device.registrations == 1 and device.shown == device.dps.chains[-1]
    wait_s = second[0] - first[0]
    if said and said[0] == 429:
        assert wait_s >= 7200
    elif said and said[0] == 409:
        assert wait_s < 5 and second[2]["replace"] == "*" and second[1] == first[1]
    else:
        assert 20 <= wait_s <= 300


def test_an_error_behind_the_202_counts_as_the_answer(device: Device) -> None:
    rid: list[str] = []

    def refuse() -> None:
        rid.append(device.hub.asked[0][1])
        device.hub.events.clear()
        device.hub.held.clear()
        device.hub.answer(device.world.uptime_s, 500, rid[0], {"errorCode": 500001})

    device.hub.issue_after_s = 12 * 3600
    device.world.at(19 * DAY_S, refuse)
    device.live(22 * DAY_S)
    assert len(device.hub.asked) == 2 and device.hub.asked[1][1] != rid[0] and device.registrations == 1


@pytest.mark.parametrize(
    "said",
    [
        (400, {"errorCode": 400037, "info": {"credentialError": "400000"}}),
        (403, {"errorCode": 403010}),
        (404, {"errorCode": 404001}),
        (412, {"errorCode": 412005}),
        (503, {"errorCode": 503102}),
    ],
)
def test_what_will_stay_so_is_answered_by_a_registration_and_that_is_bounded(device: Device, said: Any) -> None:
    device.hub.said = [said]
    device.world.at(DUE_S[0], device.issue_later)
    device.live(DUE_S[1])
    assert device.registrations == 2 and device.shown == device.dps.chains[-1] and len(device.hub.asked) == 1
    device = Device()
    device.hub.said = [said] * 1000
    device.live(25 * DAY_S)
    in_vain = device.registrations - 1
    assert 1 <= in_vain <= 6, in_vain  # DPS issues the same life again, which is as old as the first


def test_a_clock_that_is_weeks_ahead_renews_and_registers_no_more_than_once_a_day(device: Device) -> None:
    device.world.utc_error_s = 25 * DAY_S
    device.hub.life = ("270116", "270215")
    device.live(5 * DAY_S)
    assert 1 <= len(device.hub.asked) <= 30 and device.registrations <= 5, (len(device.hub.asked), device.registrations)


def test_a_hub_that_never_has_room_is_left_for_a_registration_after_some_tries(device: Device) -> None:
    device.hub.said = [(429, {"errorCode": 429002})] * 5
    device.world.at(DUE_S[0], device.issue_later)
    device.live(DUE_S[1] + DAY_S)
    assert len(device.hub.asked) == 5 and device.registrations == 2


@pytest.mark.parametrize("refuses", [True, False], ids=["refuses", "hangs up"])
def test_a_hub_without_the_topics_is_left_for_a_registration(device: Device, refuses: bool) -> None:
    device.hub.lacks = ["credentials"]
    device.hub.refuses = refuses
    device.world.at(DUE_S[0], device.issue_later)
    device.live(DUE_S[1] + DAY_S)
    assert device.registrations == 2 and device.hub.asked == []


def test_a_store_that_fails_is_asked_again_and_nothing_is_lost(device: Device) -> None:
    device.live(DUE_S[0])
    before = device.shown
    device.world.refuse["Commit"] = [RetryLater("store.io", "the disk is away")] * 3
    device.life = Lifecycle(settings(certificate=ISSUED))
    device.live(25 * DAY_S)
    assert device.shown == device.dps.chains[-1] != before and len(device.hub.asked) == 1 and device.registrations == 1


def test_a_certificate_that_ends_no_later_is_refused(device: Device) -> None:
    device.hub.life = ("270115", "270214")
    device.live(19 * DAY_S - 6000)  # 15 minutes after it was asked for
    assert device.shown == device.dps.chains[0] and device.registrations == 1 and len(device.hub.asked) >= 2
    assert "ends no later" in device.life.renewal_trouble


def test_a_refusal_that_stays_costs_no_requests_while_dps_is_busy(device: Device) -> None:
    """The hub refuses for good, and DPS asks to be left alone for a day."""
    device.dps.dates = ("270115", "270122")  # so short a life that DPS asks for more than lies between registrations
    device.hub.said = [(400, {"errorCode": 400037})] * 10_000
    device.live(3.9 * DAY_S)
    device.dps.script = [error_reply(429, 429001, "busy", str(DAY_S))] * 100
    device.life = Lifecycle(settings(certificate=ISSUED))
    device.live(5.9 * DAY_S)
    assert 1 <= len(device.hub.asked) <= 6, len(device.hub.asked)


def test_what_a_hub_says_is_told_in_a_line(device: Device) -> None:
    device.hub.said = [(500, {"errorCode": 10**300, "message": "\x1b" * 10_000})]
    device.live(19 * DAY_S - 7190)
    assert device.life.renewal_trouble.endswith("with 500: 0 " + 200 * "?")


def test_a_device_that_is_switched_on_for_an_hour_a_day_registers_when_nothing_else_helps(device: Device) -> None:
    device.hub.lacks = ["credentials"]
    device.live(DAY_S)
    device.dps.dates = ("270115", "270316")
    for day in range(22, 29):
        device.world.uptime_s = day * DAY_S
        device.life = Lifecycle(settings(certificate=ISSUED))
        device.live(day * DAY_S + 3600)
    assert device.registrations == 2 and device.shown == device.dps.chains[-1]


def test_a_certificate_that_ends_soon_is_not_waited_for(device: Device) -> None:
    """Whether the hub has promised one, or asked for patience."""
    busy = 429, {"errorCode": 429002, "retryAfter": 10**9}
    for said in (busy, (202, {"operationExpires": "2027-03-01T00:00:00Z"})):
        device = Device()
        device.live(DAY_S)
        device.dps.dates = ("270115", "270316")
        device.hub.said = [said]
        device.hub.issue_after_s = 10 * DAY_S
        device.world.uptime_s = 26.6 * DAY_S  # the last tenth begins 1.6 h later
        device.life = Lifecycle(settings(certificate=ISSUED))
        device.live(26.8 * DAY_S)
        assert len(device.hub.asked) == 1 and device.registrations == 2, said
        assert device.shown == device.dps.chains[-1]


@pytest.mark.parametrize(
    ("expires", "wait_s"),
    [
        ("2027-02-03T16:00:00.565000000Z", (8 * 3600, 9 * 3600)),
        ("2027-03-03T16:00:00Z", (12 * 3600, 12.2 * 3600)),
        ("soon", (12 * 3600, 12.2 * 3600)),
        (10**400, (12 * 3600, 12.2 * 3600)),
        ("2000-02-03T16:00:00Z", (90, 700)),
    ],
)
def test_a_promise_counts_until_its_own_end_and_half_a_day_at_most(
    device: Device, expires: object, wait_s: tuple[float, float]
) -> None:
    device.live(DUE_S[0])
    device.world.uptime_s = 19 * DAY_S  # 2027-02-03T08:00
    device.hub.said = [(202, {"operationExpires": expires})]
    device.hub.issue_after_s = 10 * DAY_S
    device.life = Lifecycle(settings(certificate=ISSUED))
    device.live(20 * DAY_S)
    assert wait_s[0] <= device.hub.asked[1][0] - device.hub.asked[0][0] <= wait_s[1], device.hub.asked


def test_a_delay_that_a_hub_asks_for_is_bounded_by_a_day(device: Device) -> None:
    device.hub.said = [(429, {"errorCode": 429002, "retryAfter": 30 * DAY_S})]
    device.live(22 * DAY_S)
    assert DAY_S <= device.hub.asked[1][0] - device.hub.asked[0][0] <= DAY_S + 600


@pytest.mark.parametrize("status", ["\xb2", "9" * 5000, "", "99", "-01", "\u0661\u0662\u0663"])
def test_a_status_that_is_none_is_a_failure(device: Device, status: str) -> None:
    device.hub.said = [(status, {"errorCode": 10**300, "message": 7}), (500, {"errorCode": 10**300, "message": 7})]
    device.live(22 * DAY_S)
    assert device.registrations == 1 and device.shown == device.dps.chains[-1] and len(device.hub.asked) == 3


def test_nothing_to_replace_is_asked_for_without_that_later(device: Device) -> None:
    device.hub.said = [(409, {"errorCode": 409004}), (412, {"errorCode": 412001})]
    device.live(22 * DAY_S)
    assert ["replace" in asked for _, _, asked in device.hub.asked] == [False, True, False]
    assert device.registrations == 1 and device.shown == device.dps.chains[-1]


def test_what_was_accepted_replaces_nothing_when_it_is_asked_for_again(device: Device) -> None:
    device.hub.said = [(409, {"errorCode": 409004}), (202, {}), (202, {})]

    def lose() -> None:
        device.hub.drop(device.world.uptime_s)
        device.hub.held.clear()

    device.hub.issue_after_s = DAY_S
    device.world.at(DUE_S[1], lose)
    device.live(DUE_S[1] + 3600)
    assert ["replace" in asked for _, _, asked in device.hub.asked] == [False, True, False]


def test_a_hub_that_hangs_up_on_the_request_is_asked_ever_later(device: Device) -> None:
    device.hub.lacks = ["credentials/POST"]
    device.live(DUE_S[1] + DAY_S)
    opened = [at for at, _ in device.hub.connections if at > DUE_S[0]]
    waits = [later - earlier for earlier, later in pairwise(opened)]
    assert len(opened) >= 5 and waits[3] > 3 * waits[0] > 180, waits


def test_a_certificate_that_comes_ahead_of_the_subscription_is_taken(device: Device) -> None:
    """A hub delivers what it kept for a session that goes on before it has read another word."""
    device.hub.issue_after_s = 30 * DAY_S

    def come() -> None:
        device.hub.events.clear()
        device.hub.drop(device.world.uptime_s)
        rid, body = device.hub.held.pop()
        device.hub.early = [Arrived(f"$iothub/credentials/res/200/?$rid={rid}", body, 0)]

    device.world.at(19 * DAY_S, come)
    device.live(19 * DAY_S + 3600)
    assert len(device.hub.asked) == 1 and device.shown == device.dps.chains[-1] and len(device.dps.chains) == 2


def test_a_store_that_fails_over_a_reconnect_still_gets_what_came(device: Device) -> None:
    device.live(DUE_S[0])
    device.world.refuse["Commit"] = [RetryLater("store.io", "the disk is away")] * 12
    device.world.at(19 * DAY_S - 6000, lambda: device.hub.drop(device.world.uptime_s))  # it has failed some times
    device.life = Lifecycle(settings(certificate=ISSUED))
    device.live(25 * DAY_S)
    assert device.shown == device.dps.chains[-1] and len(device.dps.chains) == 2
    assert len(device.hub.asked) == 1 and device.registrations == 1


def test_a_key_that_cannot_be_read_for_a_while_costs_no_connection(device: Device) -> None:
    device.live(DUE_S[0])
    device.life = Lifecycle(settings(certificate=ISSUED))
    fault = AskOperator("config.invalid", "issued_key_file: cannot be read")
    device.world.at(18 * DAY_S + 3600, lambda: device.world.refuse.update({ReadRequest.__name__: [fault] * 3}))
    before = len(device.hub.connections)
    device.live(DUE_S[1] + 3600)
    assert [code for _, code in device.hub.connections[before:]] == [0, 0], "the second one shows what was renewed"
    assert device.registrations == 1 and device.shown == device.dps.chains[-1] and len(device.dps.chains) == 2


@pytest.mark.parametrize("unreadable", [False, True])
def test_what_has_come_needs_no_signature_and_is_acknowledged_once_it_could_be_judged(
    device: Device, monkeypatch: pytest.MonkeyPatch, unreadable: bool
) -> None:
    """A TPM that is busy signs no request; and where nobody can say what the key is, the hub brings it again."""
    device.hub.issue_after_s = 30 * DAY_S
    read = device.world.tpm.request
    brought: list[Arrived] = []

    def busy(registration_id: str) -> bytes:
        if registration_id or unreadable:
            raise RetryLater("tpm.memory", "the TPM refused load with 0x902")
        return read(registration_id)

    def come() -> None:
        monkeypatch.setattr(device.world.tpm, "request", busy)
        device.hub.events.clear()
        rid, body = device.hub.held.pop()
        brought.append(Arrived(f"$iothub/credentials/res/200/?$rid={rid}", body, 7))
        device.hub.events.append((device.world.uptime_s, brought[0]))

    def come_again() -> None:
        by_then.extend(acknowledged)
        monkeypatch.setattr(device.world.tpm, "request", read)
        if not acknowledged:
            device.hub.early = brought
            device.hub.drop(device.world.uptime_s)

    acknowledged: list[int] = []
    by_then: list[int] = []
    monkeypatch.setattr(device.hub, "acknowledge", acknowledged.append)
    device.world.at(19 * DAY_S, come)
    device.world.at(19 * DAY_S + 20, come_again)
    device.live(19 * DAY_S + 3600)
    assert by_then == ([] if unreadable else [7]) and acknowledged == [7]
    assert device.registrations == 1 and device.shown == device.dps.chains[1]


def test_a_renewal_that_fails_is_told_until_it_succeeds(device: Device) -> None:
    device.hub.said = [(500, {"errorCode": 500001})] * 3
    device.live(DUE_S[0])
    device.life = Lifecycle(settings(certificate=ISSUED))
    told: list[str] = []

    def look() -> None:
        if not told or told[-1] != device.life.renewal_trouble:
            told.append(device.life.renewal_trouble)
        device.world.at(device.world.uptime_s + 30, look)

    device.world.at(DUE_S[0] + 60, look)
    device.live(DUE_S[1] + 3600)
    assert told == ["", "the hub refused to renew the certificate with 500: 500001 ", ""] and device.registrations == 1


def test_a_clock_that_nobody_believes_renews_nothing(device: Device) -> None:
    device.live(DUE_S[0])
    device.world.believable = False
    device.life = Lifecycle(settings(certificate=ISSUED))
    device.live(22 * DAY_S)
    assert device.hub.asked == []
    device.world.believable = True
    device.life = Lifecycle(settings(certificate=ISSUED))
    device.live(22.1 * DAY_S)
    assert len(device.hub.asked) == 1


@pytest.mark.parametrize(
    ("reason", "day", "registers"),
    [
        ("tls_client_certificate: unknown ca", 1, True),
        ("closed: the connection broke", 1, False),
        ("closed: the connection broke", 29.5, True),
        ("tls_failed: handshake failure", 29.5, True),
        ("connect: refused", 29.5, False),
        ("dns: no answer", 29.5, False),
    ],
)
def test_a_handshake_that_says_so_is_a_refusal(device: Device, reason: str, day: float, registers: bool) -> None:
    device.hub.lacks = ["credentials"]
    device.live(DAY_S)
    device.hub.absent = reason
    device.dps.dates = ("270115", "270316")
    device.world.uptime_s = day * DAY_S
    device.life = Lifecycle(settings(certificate=ISSUED))
    device.live((day + 1) * DAY_S)  # past the end of the certificate, or not
    assert (device.registrations > 1) == registers, device.life.reason
    assert device.registrations < 40, "and no more often than DPS is asked else"


@pytest.mark.parametrize(
    ("said", "code", "registers"),
    [
        ("tpm.tls_provider: OpenSSL's provider tpm2 is missing", "tpm.tls_provider", False),
        ("tpm.certificate_key: the TPM does not take the key", "tpm.certificate_key", True),
        ("closed: the connection broke", "hub.lost", False),
    ],
)
def test_what_the_device_itself_lacks_for_its_hub_keeps_its_code(
    device: Device, said: str, code: str, registers: bool
) -> None:
    """Its remedy goes with the code, and the one of a hub that is out of reach would lead nowhere."""
    device.live(DAY_S)
    seen: set[tuple[str, str]] = set()

    def look() -> None:
        if device.life.error:
            seen.add((device.life.error.code, device.life.reason))
        device.world.at(device.world.uptime_s + 1, look)

    device.hub.absent = said
    device.world.at(DAY_S + 1, look)
    device.life = Lifecycle(settings(certificate=ISSUED))
    device.live(DAY_S + 3600)
    assert {code for code, _ in seen} == {code}, seen
    assert all(said in reason or not reason.startswith("the hub refused") for _, reason in seen), seen
    assert (device.registrations > 1) == registers


def test_a_key_that_is_lost_while_the_device_runs_is_made_anew(device: Device) -> None:
    device.live(DAY_S)

    def lose() -> None:
        device.world.tpm = IssuingTpm(key=OTHER_KEY)
        device.dps.tpm = device.world.tpm
        device.hub.drop(device.world.uptime_s)

    device.world.at(2 * DAY_S, lose)
    device.live(3 * DAY_S)
    assert device.registrations == 2 and device.life.state == CONNECTED and device.shown == device.dps.chains[-1]


def test_a_certificate_that_has_ended_is_replaced_at_the_start(device: Device) -> None:
    device.live(DAY_S)
    device.world.uptime_s = 31 * DAY_S
    device.dps.dates = ("270115", "270316")
    device.life = Lifecycle(settings(certificate=ISSUED))
    device.live(31.1 * DAY_S)
    assert device.registrations == 2 and [code for _, code in device.hub.connections] == [0, 0]


def test_a_certificate_that_the_hub_refuses_is_replaced_by_a_registration(device: Device) -> None:
    device.live(DAY_S)
    device.hub.chains = []
    device.world.at(2 * DAY_S, lambda: device.hub.drop(2 * DAY_S))

    def take_the_next() -> None:
        device.hub.chains = device.dps.chains

    device.world.at(2.1 * DAY_S, take_the_next)
    device.life = Lifecycle(settings(certificate=ISSUED))
    device.live(3 * DAY_S)
    assert device.registrations >= 2 and device.life.state == CONNECTED
    assert decode(device.world.store[IDENTITY])[0].device_id == DEVICE
