"""Which tests tell what of the code is run: that makes all that runs in this process three times as slow."""

import pytest

# They run the same lines thousands of times; other tests run them once.
LONG = (
    "tests/core/test_fleet.py::",
    "tests/core/test_fleet_size.py::",
    "tests/core/test_lifecycle_hub.py::test_a_crash_loop_",
    "tests/core/test_lifecycle_hub.py::test_no_device_registers_again_after_its_network_had_no_names_for_a_while",
    "tests/core/test_thirty_days.py::",
    "tests/core/test_twin.py::test_over_a_hundred_reconnects_",
    "tests/host/test_bus_flips.py::",
    "tests/host/test_esys.py::test_nothing_is_left_in_the_tpm_after_a_failure_at_any_command",
    "tests/host/test_files.py::test_each_failing_call_is_reported_and_the_old_record_stays_also_after_a_retry_and_a_cut",
    "tests/host/test_files.py::test_no_sync_can_be_left_out",
    "tests/host/test_fuzz_targets.py::test_what_is_altered_is_taken_or_refused",
    "tests/host/test_leaks.py::test_hundreds_of_registrations_leave_nothing_behind",
    "tests/host/test_wire.py::test_a_byte_flipped_in_every_answer_is_refused",
    "tests/powercut/test_lives.py::",
)
# They are about tools, which are not counted, and what tools have made of the agent.
OF_TOOLS = (
    "tests/board/test_board_image.py::",
    "tests/host/test_bundles.py::",
    "tests/host/test_deploy.py::",
    "tests/host/test_fleet_run.py::",
    "tests/host/test_house_rules.py::",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves coverage to the tests that are neither long nor of tools nor Hypothesis's."""
    for item in items:
        if item.nodeid.startswith((*LONG, *OF_TOOLS)) or hasattr(getattr(item, "obj", None), "hypothesis"):
            item.add_marker(pytest.mark.no_cover)
