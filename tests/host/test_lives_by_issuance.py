"""Power cuts anywhere in the life of a device whose certificate DPS issues; see `support.issuing`."""

from dps_agent.issued import chains_in
from dps_hal.contracts import CERTIFICATE
from support.issuing import BY_ISSUANCE, LIVES, IssuedWorld
from support.lives import Sweep, new_store, sweep


def test_a_cut_anywhere_leaves_an_identity_with_its_certificate() -> None:
    found = Sweep(tears="few", way=BY_ISSUANCE).run(LIVES[:3] + LIVES[-2:])
    assert not found.lost, found.lost[0]
    assert found.states >= 100, f"only {found.states} states: the sweep does not sweep"


def test_faulty_agents_and_writers_are_caught() -> None:
    for writer in BY_ISSUANCE.writers:
        lost = sweep(writer, at_first=True, way=BY_ISSUANCE)[1]
        assert lost and lost[0].startswith("sweep=lives-by-issuance "), f"{writer} passed the sweep"


def test_the_record_of_certificates_never_has_more_than_two() -> None:
    world = IssuedWorld(new_store)
    counts = []
    for _ in range(4):
        world.lived(force=True)
        stored = world.slot_store.load(CERTIFICATE)
        assert stored is not None
        counts.append(len(chains_in(stored.payload)))
    assert counts == [1, 2, 2, 2]
