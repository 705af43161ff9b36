"""The one TPM whose keys TLS has in the process of the tests, and processes of their own for what ends one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from debian_micropython import tls_provider
from support.tpm.swtpm import Swtpm
from support.tpm.tap import TpmTap

CHECKOUT = Path(__file__).parents[3]
PROCESS = CHECKOUT / "tests/support/programs/tpm_in_tls.py"


class TpmForTls:
    """A TPM and a tap on it: OpenSSL's provider, once it is loaded, has the same one until the process ends."""

    def __init__(self, folder: Path) -> None:
        self.swtpm = Swtpm(folder)
        self.tap = TpmTap(self.swtpm.port)
        self.modules = str(tls_provider())

    def names(self) -> list[str]:
        """The commands that the TPM got since this was asked last."""
        found = [*self.tap.names]
        self.tap.forget()
        return found

    def flush(self) -> None:
        """Flushes what somebody has left, whom a command that hangs may hold."""
        self.tap.let_go()
        for handle in self.swtpm.leftovers():
            self.swtpm.command(0x165, handle.to_bytes(4, "big"))

    def close(self) -> None:
        self.tap.close()
        self.swtpm.kill()


class OtherProcess:
    """`tpm_in_tls` with the settings of a device whose TPM that is."""

    def __init__(self, tpm: TpmForTls, settings: Path, whom: str, times: int = 1) -> None:
        self._tpm = tpm
        path = f"{CHECKOUT}/agent:{CHECKOUT}/hal"
        words = [sys.executable, str(PROCESS), str(settings), whom, str(times)]
        self.process = subprocess.Popen(
            words, env={**os.environ, "PYTHONPATH": path}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def said(self, time_passes: bool = False) -> list[str]:
        """What it printed until it ended."""
        out, _ = self.process.communicate("\n" if time_passes else None, 120)
        assert self.process.returncode == 0
        return out.splitlines()

    def close(self) -> None:
        """Ends it; a resource manager would flush what it leaves in the TPM."""
        self.process.kill()
        self.process.communicate()
        self._tpm.flush()
