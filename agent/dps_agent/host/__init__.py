"""The agent on Linux, as a library.

    from dps_agent.host import hub_token, provision

    device = provision("/etc/dps-agent/config.toml")
    password = hub_token("/etc/dps-agent/config.toml")

Importing this package loads neither a TPM library nor TLS; the functions do. Both take a `Configuration`, the path of
a settings file (then the system's own files are not read), or None for the system's settings; in the latter two cases
the `DPS_AGENT_*` environment counts as well. Both raise the four classes of `dps_hal.errors`.
"""

from __future__ import annotations

from dps_agent.host.config import Configuration, load
from dps_agent.host.provisioned import Provisioned
from dps_hal.errors import AskOperator

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os

__all__ = ["Configuration", "Provisioned", "hub_token", "load", "provision"]

TOKEN_LIFE_S = 3600
TOKEN_LIFE_LIMIT_S = 365 * 86400


def provision(
    config: Configuration | os.PathLike[str] | str | None = None, *, force: bool = False, timeout_s: float | None = None
) -> Provisioned:
    """Registers this device unless its stored assignment holds (`force`: also then) and stores the assignment.

    Blocks for at most `timeout_s` seconds, by default for [retry] registration_budget_s and what a step may overrun.
    RetryLater: not now. AskOperator: refused, or something to correct; `error.code` says what.
    """
    from dps_agent.host.parts import provision_once

    return provision_once(_configuration(config), force=force, timeout_s=timeout_s)


def hub_token(config: Configuration | os.PathLike[str] | str | None = None, *, life_s: int = TOKEN_LIFE_S) -> str:
    """A shared access signature token for the assigned hub, valid for `life_s` seconds, signed in the TPM.

    AskOperator `record.absent` before the first registration; IdentityStale `record.stale` where the stored
    assignment no longer holds.
    """
    if not isinstance(life_s, int) or not 0 < life_s <= TOKEN_LIFE_LIMIT_S:
        raise AskOperator("agent.usage", f"life_s: expected 1 to {TOKEN_LIFE_LIMIT_S} whole seconds; came {life_s}")
    from dps_agent.host.parts import hub_token_once

    _, token = hub_token_once(_configuration(config), life_s)
    return token.header()


def _configuration(config: Configuration | os.PathLike[str] | str | None) -> Configuration:
    return config if isinstance(config, Configuration) else load(config)
