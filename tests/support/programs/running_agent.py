"""`dps-agent run` as a program: its settings, its process, its socket, and all that it ever wrote."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING

from dps_emulator.agent_process import PATIENCE_S, PROGRAM, AgentProcess
from dps_emulator.agent_process import environ_of_agent as _environ

if TYPE_CHECKING:
    from support.cloud.emulator import EmulatorInThread, EmulatorProcess

__all__ = ["CHECKOUT", "PATIENCE_S", "PROGRAM", "SOON_S", "RunningAgent", "_environ"]
CHECKOUT = Path(__file__).parents[3]
SOON_S = 30.0  # what ends by itself, and not because something else gave up, is sooner over on any machine


class RunningAgent(AgentProcess):
    """The service of one device at `emulator`; use it with `with`. `tpm` is the content of the table [tpm]."""

    def __init__(self, folder: Path, emulator: EmulatorInThread | EmulatorProcess, tpm: str, more: str = "") -> None:
        self.emulator = emulator
        super().__init__(
            folder,
            f'id_scope = "0ne00000000"\nregistration_id = "press-07"\nendpoint = "{emulator.url}"\n'
            f'ca_file = "{emulator.ca_file}"\n'
            f'[hub]\nconnect_to = "{emulator.hub_connect_to}"\nca_file = "{emulator.ca_file}"\n[tpm]\n{tpm}\n{more}',
        )

    def send(self, number: signal.Signals) -> None:
        """Sends a signal to the service."""
        assert self.process is not None
        self.process.send_signal(number)
