"""One device in this process: swtpm behind a tap, the service in a thread, and the library's own call."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from dps_agent.host import Provisioned, load, provision
from dps_emulator.service import Settings
from dps_hal.contracts import IDENTITY
from dps_hal.host.files import FileStore
from support.cloud.emulator import EmulatorInThread
from support.tpm.swtpm import Swtpm
from support.tpm.tap import TpmTap

if TYPE_CHECKING:
    from types import TracebackType


class Device:
    """A device whose TPM is used through `backend`; use it with `with`."""

    def __init__(self, folder: Path, backend: str, no_da: bool = True, rotates: bool = False) -> None:
        self._stack = ExitStack()
        self.swtpm = self._stack.enter_context(Swtpm(folder / "tpm"))
        self.tap = self._stack.enter_context(TpmTap(self.swtpm.port))
        service = Settings(enroll_any=True, retry_after_s=0, no_da=no_da, hub_key="rotate" if rotates else "stable")
        self.emulator = self._stack.enter_context(EmulatorInThread(service))
        self.state_dir = folder / "state"
        self.settings = folder / "config.toml"
        self.settings.write_text(
            f'id_scope = "0ne00000000"\nregistration_id = "press-07"\nendpoint = "{self.emulator.url}"\n'
            f'ca_file = "{self.emulator.ca_file}"\nstate_dir = "{self.state_dir}"\n'
            f'[tpm]\nbackend = "{backend}"\ntcti = "{self.tap.tcti}"\n'
        )

    def provision(self, force: bool = True, timeout_s: float | None = None) -> Provisioned:
        """One registration; with `force` also where the stored assignment holds."""
        return provision(load(self.settings), force=force, timeout_s=timeout_s)

    def stored(self) -> bytes:
        """The record as it is in the state folder."""
        record = FileStore(str(self.state_dir)).load(IDENTITY)
        assert record is not None, "nothing is stored"
        return record.payload

    def __enter__(self) -> Device:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
