"""The line `next`: every state that waits says what shortens its wait, and an error what to do about it."""

import pytest

from dps_agent.host.next_step import next_step
from dps_agent.lifecycle import BOOT, CONNECTED, CONNECTING, HALTED, PROVISIONED, PROVISIONING, WAITING
from dps_hal.host.codes import REMEDIES


@pytest.mark.parametrize("state", [HALTED, WAITING, PROVISIONING, PROVISIONED])
@pytest.mark.parametrize("code", ["", "network.dns", "dps.not_enrolled"])
def test_every_wait_has_something_that_shortens_it_behind_the_remedy(state: str, code: str) -> None:
    shown = next_step(state, code, True, False)
    assert shown.startswith(REMEDIES.get(code, "")) and "'" in shown.removeprefix(REMEDIES.get(code, "")), shown


@pytest.mark.parametrize("state", [BOOT, CONNECTING, CONNECTED, PROVISIONING])
def test_where_nothing_is_waited_for_there_is_nothing_to_do(state: str) -> None:
    assert next_step(state, "", False, False) == ""


def test_a_wait_that_dps_asked_for_is_nobodys_to_shorten() -> None:
    assert next_step(WAITING, "", True, True) == "DPS asked for this wait, and nobody can shorten it"
    assert "reload" in next_step(HALTED, "", True, True), "DPS's wish keeps nobody from asking for what is refused"
