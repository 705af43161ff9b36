"""What a service counts and remembers of itself for its metrics, from its start to its end: `dps_agent.host.metrics`.

The service notes it where it happens anyway; nothing here asks TPM, store or network. Times are `time.monotonic`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dps_hal.contracts import IDENTITY

if TYPE_CHECKING:
    from typing import Any

    from dps_agent.host.network.mqtt import HubConnection
    from dps_hal.contracts import TpmCondition


class Counts:
    """Plain numbers; None for what is not known yet."""

    def __init__(self) -> None:
        self.telemetry = {"accepted": 0, "refused": 0, "late": 0}
        self.registrations = {"assigned": 0, "failed": 0}
        self.connections = 0  # that a hub has accepted
        self.rollbacks = 0  # times that an older copy of the assignment served for a damaged newer one
        self.generation: int | None = None  # of the stored assignment
        self.token_expires_at_s: int | None = None  # Unix time
        self.dps_heard_at_s: float | None = None
        self.hub: HubConnection | None = None  # the connection of now knows when it heard the hub last
        self._hub_heard_at_s: float | None = None  # as the one before it knew
        self.tpm: TpmCondition | None = None  # as the TPM said last
        self.tpm_at_s = 0.0

    def note(self, effect: Any, answer: Any, now_s: float) -> None:
        """An effect of the life and its answer, where that says something."""
        kind = type(effect).__name__
        if kind == "Http" and type(answer).__name__ == "Reply":
            self.dps_heard_at_s = now_s
        elif kind == "Connect" and type(answer).__name__ == "ConnAck" and answer.return_code == 0:
            self.connections += 1
            self.token_expires_at_s = getattr(effect.token, "expires_at_s", None)  # else a certificate is shown
        elif kind == "LoadRecord" and effect.record == IDENTITY:
            self.generation = answer.generation if answer is not None else None
            self.rollbacks += answer is not None and answer.rolled_back
        elif kind == "Commit" and effect.record == IDENTITY:
            self.generation = (self.generation or 0) + 1

    @property
    def hub_heard_at_s(self) -> float | None:
        """When a hub was heard last; None for never."""
        heard_at_s = self.hub.heard_at_s if self.hub is not None else None
        return self._hub_heard_at_s if heard_at_s is None else heard_at_s

    def use(self, hub: HubConnection) -> None:
        """From now on this is the connection to hubs."""
        self._hub_heard_at_s, self.hub = self.hub_heard_at_s, hub

    def note_tpm(self, condition: TpmCondition, now_s: float) -> None:
        """What the TPM has said of itself."""
        self.tpm, self.tpm_at_s = condition, now_s
