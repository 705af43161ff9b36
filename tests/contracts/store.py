"""What every Store does; each rule takes `reopen`, which returns a new store over the same, at first empty, medium."""

from dps_hal.contracts import IDENTITY, PROGRESS
from dps_hal.errors import AskOperator, Broken, DpsError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from dps_hal.store.slots import SlotStore

    Reopen = Callable[[], SlotStore]


def payload_of(store: "SlotStore", record: str = IDENTITY) -> "bytes | None":
    found = store.load(record)
    return None if found is None else found.payload


def error_of(action: "Callable[[], object]") -> "DpsError | None":
    try:
        action()
    except DpsError as error:
        return error
    return None


def a_record_that_never_was_is_none(reopen: "Reopen") -> None:
    assert reopen().load(IDENTITY) is None
    assert reopen().load(PROGRESS) is None


def a_commit_is_there_at_once_and_after_a_restart(reopen: "Reopen") -> None:
    store = reopen()
    store.commit(IDENTITY, b"hub A")
    assert payload_of(store) == b"hub A"
    assert payload_of(reopen()) == b"hub A"


def a_later_commit_replaces_the_earlier_one(reopen: "Reopen") -> None:
    store = reopen()
    for number in range(9):
        store.commit(IDENTITY, b"hub %d" % number)
        assert payload_of(reopen()) == b"hub %d" % number


def a_commit_by_a_process_that_never_loaded_keeps_the_order(reopen: "Reopen") -> None:
    for number in range(5):
        reopen().commit(IDENTITY, b"hub %d" % number)
        assert payload_of(reopen()) == b"hub %d" % number


def two_stores_over_one_medium_see_each_others_commits(reopen: "Reopen") -> None:
    first, second = reopen(), reopen()
    for number in range(4):
        first.commit(IDENTITY, b"first %d" % number)
        assert payload_of(second) == b"first %d" % number
        second.commit(IDENTITY, b"second %d" % number)
        assert payload_of(first) == b"second %d" % number


def each_commit_counts_one_generation(reopen: "Reopen") -> None:
    store = reopen()
    generations = []
    for _ in range(4):
        store.commit(IDENTITY, b"hub A")
        found = store.load(IDENTITY)
        assert found is not None
        generations.append(found.generation)
    assert generations == list(range(generations[0], generations[0] + 4)), generations


def nothing_is_rolled_back_without_damage(reopen: "Reopen") -> None:
    store = reopen()
    for number in range(3):
        store.commit(IDENTITY, b"hub %d" % number)
        found = reopen().load(IDENTITY)
        assert found is not None and found.rolled_back is False
    store.erase(IDENTITY)
    store.commit(IDENTITY, b"hub B")
    found = store.load(IDENTITY)
    assert found is not None and found.rolled_back is False


def records_do_not_touch_each_other(reopen: "Reopen") -> None:
    store = reopen()
    store.commit(IDENTITY, b"hub A")
    store.commit(PROGRESS, b"attempt 1")
    store.commit(PROGRESS, b"attempt 2")
    store.commit(PROGRESS, b"attempt 3")
    assert payload_of(store, IDENTITY) == b"hub A"
    store.erase(PROGRESS)
    assert payload_of(store, IDENTITY) == b"hub A"
    assert payload_of(store, PROGRESS) is None


def every_byte_value_comes_back(reopen: "Reopen") -> None:
    store = reopen()
    for payload in (bytes(range(256)), bytes(256), b"\xff" * 256, b"DPSr" * 64):
        store.commit(IDENTITY, payload)
        assert payload_of(reopen()) == payload, payload


def an_empty_payload_is_not_none(reopen: "Reopen") -> None:
    store = reopen()
    store.commit(IDENTITY, b"")
    assert payload_of(reopen()) == b""


def the_largest_payload_fits_and_one_byte_more_is_refused(reopen: "Reopen") -> None:
    store = reopen()
    largest = bytes([i * 7 & 0xFF for i in range(store.max_payload)])
    store.commit(IDENTITY, largest)
    error = error_of(lambda: store.commit(IDENTITY, largest + b"x"))
    assert isinstance(error, AskOperator) and error.code == "store.too_large", error
    assert str(store.max_payload) in error.message and str(store.max_payload + 1) in error.message
    assert payload_of(reopen()) == largest


def an_erased_record_is_none_and_stays_none(reopen: "Reopen") -> None:
    for commits in range(4):
        store = reopen()
        for number in range(commits):
            store.commit(IDENTITY, b"hub %d" % number)
        store.erase(IDENTITY)
        assert store.load(IDENTITY) is None, f"commits={commits}"
        assert reopen().load(IDENTITY) is None, f"commits={commits}"
        store.erase(IDENTITY)
        assert reopen().load(IDENTITY) is None, f"commits={commits}"


def a_commit_after_an_erase_is_the_record(reopen: "Reopen") -> None:
    store = reopen()
    for number in range(3):
        store.commit(IDENTITY, b"hub %d" % number)
        store.erase(IDENTITY)
        store.commit(IDENTITY, b"new hub %d" % number)
        assert payload_of(reopen()) == b"new hub %d" % number


def forgetting_the_older_copy_keeps_the_record(reopen: "Reopen") -> None:
    store = reopen()
    store.forget_older(IDENTITY)
    assert store.load(IDENTITY) is None
    for number in range(3):
        store.commit(IDENTITY, b"hub %d" % number)
        store.forget_older(IDENTITY)
        assert payload_of(reopen()) == b"hub %d" % number


def a_record_name_that_does_not_exist_is_our_bug(reopen: "Reopen") -> None:
    error = error_of(lambda: reopen().load("secrets"))
    assert isinstance(error, Broken) and "secrets" in error.message, error
    error = error_of(lambda: reopen().commit("secrets", b""))
    assert isinstance(error, Broken) and "secrets" in error.message, error


RULES = (
    a_record_that_never_was_is_none,
    a_commit_is_there_at_once_and_after_a_restart,
    a_later_commit_replaces_the_earlier_one,
    a_commit_by_a_process_that_never_loaded_keeps_the_order,
    two_stores_over_one_medium_see_each_others_commits,
    each_commit_counts_one_generation,
    nothing_is_rolled_back_without_damage,
    records_do_not_touch_each_other,
    every_byte_value_comes_back,
    an_empty_payload_is_not_none,
    the_largest_payload_fits_and_one_byte_more_is_refused,
    an_erased_record_is_none_and_stays_none,
    a_commit_after_an_erase_is_the_record,
    forgetting_the_older_copy_keeps_the_record,
    a_record_name_that_does_not_exist_is_our_bug,
)
