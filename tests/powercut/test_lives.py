"""Power cuts anywhere in a life, on both runtimes; `tools/powercut --sweep lives` tears after every byte as well."""

from dps_hal.platform import MICROPYTHON
from dps_hal.store import slots
from support.lives import (
    BY_CERTIFICATE,
    BY_KEY,
    CUT_TWICE,
    FAILING_LIVES,
    FAILING_RESETS,
    KILL_THEN_CUT,
    KILLED_LIVES,
    LIVES,
    LIVES_BY_KEY,
    LOSE_THEN_CUT,
    WRITERS,
    Life,
    Sweep,
    registrations_wear,
    sweep,
)
from support.share import NUMBER, PARTS, part_of, takes

# CPython cuts all of them in tests/host/test_powercut.py: what is tested here shows in each fourth as well.
FOURTH = 4 if PARTS == 1 and not MICROPYTHON else 1


def taken(number: int) -> bool:
    """Whether this run takes a cut, or a kill, of this number."""
    return takes(number) if FOURTH == 1 else number % FOURTH == NUMBER


def assert_clean(sweep: Sweep, at_least: int) -> None:
    assert not sweep.lost, sweep.lost[0]
    assert sweep.states >= at_least // (PARTS * FOURTH), f"only {sweep.states} states: the sweep does not sweep"
    print(f"{sweep.states} states, 0 lost")


def test_a_device_whose_power_is_cut_anywhere_in_its_life_is_usable_after_the_next_boot() -> None:
    assert_clean(Sweep(tears="32", shared=taken).run(), 800)


def test_a_second_cut_in_the_recovery_from_the_first_loses_nothing() -> None:
    assert_clean(Sweep(plan=CUT_TWICE, tears="few", shared=taken).run(LIVES[:2]), 300)


def test_a_process_that_is_killed_and_a_cut_of_the_next_one_lose_nothing() -> None:
    assert_clean(Sweep(plan=KILL_THEN_CUT, tears="few", shared=taken).run(KILLED_LIVES[:1]), 200)


def test_devices_of_the_other_ways_lose_nothing_either_and_their_faulty_writers_are_caught() -> None:
    for way in (BY_KEY, BY_CERTIFICATE):
        assert_clean(Sweep(tears="few", shared=taken, way=way).run(LIVES_BY_KEY), 150)
        for writer in way.writers:
            lost = sweep(writer, at_first=True, way=way)[1]
            assert lost and lost[0].startswith(f"sweep={way.name} "), f"{writer} passed the sweep {way.name}"


def test_the_sweep_catches_every_faulty_writer() -> None:
    for writer in part_of([writer for writer in WRITERS if writer])[::FOURTH]:
        assert sweep(writer, at_first=True)[1], f"{writer} passed the sweep"


def test_trust_in_what_a_killed_process_left_in_the_cache_is_caught() -> None:
    caught = Sweep("trusts-the-cache", KILL_THEN_CUT, "few", at_first=True).run(KILLED_LIVES[:2]).lost
    assert caught and "kill=" in caught[0], caught


def test_a_copy_that_stays_after_its_sync_failed_is_caught() -> None:
    honest = slots._withdraw
    slots._withdraw = lambda device, slot: None
    try:
        caught = Sweep("believes-its-eyes", tears="few", at_first=True).run(FAILING_LIVES).lost
    finally:
        slots._withdraw = honest
    assert caught and "life=commit-fails-once-at-sync" in caught[0], caught


def test_trust_in_what_could_not_be_written_is_caught() -> None:
    assert_clean(Sweep(tears="few", shared=taken).run(FAILING_RESETS), 100)
    assert_clean(Sweep(plan=LOSE_THEN_CUT, tears="few", shared=taken).run(FAILING_RESETS[3:4]), 500)
    caught = Sweep("believes-its-eyes", tears="few").run(FAILING_RESETS).lost
    assert caught and "life=reset-fails-at-sync-4" in caught[0], caught


def test_a_life_that_is_over_leaves_what_it_stored_last_and_needs_no_registration_more() -> None:
    forgets_at_the_end = Life("forgets", LIVES[1].before, LIVES[4].step)  # a reset where a new identity was promised
    caught = Sweep(tears="few").run((forgets_at_the_end,)).lost
    assert caught and "where hub" in caught[-1], caught


def test_the_name_of_a_lost_state_reproduces_it() -> None:
    for writer in ("single-slot", "leaves-what-failed"):
        lost = sweep(writer, at_first=True)[1][0]
        assert sweep(writer, lost.split(":")[0]) == (1, [lost]), lost


def test_a_registration_costs_each_slot_at_most_one_erase() -> None:
    most, _ = registrations_wear(10)
    assert most <= 10, most
