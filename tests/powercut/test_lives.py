"""Power cuts anywhere in a life, on both runtimes; `tools/powercut --sweep lives` tears after every byte as well."""

from support.lives import LIVES, WRITERS, Sweep, registrations_wear


def assert_clean(sweep: Sweep, at_least: int) -> None:
    assert not sweep.lost, sweep.lost[0]
    assert sweep.states >= at_least, f"only {sweep.states} states: the sweep does not sweep"
    print(f"{sweep.states} states, 0 lost")


def test_a_device_whose_power_is_cut_anywhere_in_its_life_is_usable_after_the_next_boot() -> None:
    assert_clean(Sweep(tears="32").run(), 800)


def test_a_second_cut_in_the_recovery_from_the_first_loses_nothing() -> None:
    assert_clean(Sweep(depth=2, tears="few").run(LIVES[:2]), 300)


def test_the_sweep_catches_every_faulty_writer() -> None:
    for writer in WRITERS:
        if writer:
            assert Sweep(writer, tears="few", at_first=True).run().lost, f"{writer} passed the sweep"


def test_the_name_of_a_lost_state_reproduces_it() -> None:
    lost = Sweep("single-slot", tears="few", at_first=True).run().lost[0]
    again = Sweep("single-slot", tears="few", only=lost.split(":")[0]).run()
    assert again.states == 1 and again.lost == [lost], again.lost


def test_a_registration_costs_each_slot_at_most_one_erase() -> None:
    most, _ = registrations_wear(10)
    assert most <= 10, most
