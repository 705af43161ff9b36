"""What the agent is measured against on one machine: a software TPM, the emulator, and roots as a system has them."""

from __future__ import annotations

import json
import os
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dps_bench.costs import CommandFailed, clean_environ, run
from fresh_machine import CHECKOUT
from support.cloud.emulator import EmulatorProcess
from support.tpm.swtpm import Swtpm
from support.tpm.tap import TpmTap

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from support.cloud.emulator import DeviceCredentials

AGENT = str(Path(sys.executable).parent / "dps-agent")
REGISTRATION_ID = "press-07"
PAYLOAD_SIZE = 200  # bytes of each message

# Counts what the program that follows asks the kernel to put on the disk. As bytes in a file: the program may leave in
# whichever way it likes.
SYNC_COUNTER = """
import os, sys
counted = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
def counting(call):
    def counted_call(*arguments):
        os.write(counted, b'.')
        return call(*arguments)
    return counted_call
for name in ('fsync', 'fdatasync', 'sync'):
    setattr(os, name, counting(getattr(os, name)))
del sys.argv[1]
from dps_agent.host.cli import main
sys.exit(main())
"""


class Tapped(NamedTuple):
    """What one command of the agent asked others for."""

    requests: int  # those that DPS got
    commands: int  # those that the TPM got
    tpm_ms: float


class Desk:
    """A TPM, a cloud and a folder; use it with `with`."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self.folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="dps-bench-")))
        self.tpm = self._stack.enter_context(Swtpm(self.folder / "tpm"))
        self.service = self._stack.enter_context(EmulatorProcess("--enroll-any", "--retry-after", "0"))
        self.system_roots = self._system_roots()

    def settings(self, name: str, back_end: str, tcti: str = "", ca_file: bool = True) -> Path:
        """A settings file of that name, with a state folder of its own."""
        ca = f'ca_file = "{self.service.ca_file}"\n' if ca_file else ""
        path = self.folder / f"{name}.toml"
        path.write_text(
            f'id_scope = "0ne00000000"\nregistration_id = "{REGISTRATION_ID}"\nendpoint = "{self.service.url}"\n'
            f'{ca}state_dir = "{self.folder / name}"\nruntime_dir = "{self.folder / name}-run"\n'
            f'[hub]\nconnect_to = "{self.service.hub_connect_to}"\n{ca}'
            f'[tpm]\nbackend = "{back_end}"\ntcti = "{tcti or self.tpm.tcti}"\n'
        )
        return path

    def environ(self, ca_file: bool) -> dict[str, str]:
        """What is to be in the environment of an agent with `ca_file` or without."""
        return {} if ca_file else self.system_roots

    def tapped(self, words: Sequence[str], settings: Path) -> Tapped:
        """One command of the agent whose TPM is behind a tap."""
        requests = len(self.service.log)
        began_s = took_s = 0.0

        def begins(_name: str) -> None:
            nonlocal began_s
            began_s = time.monotonic()

        def ends(_command: bytes, response: bytes) -> bytes:
            nonlocal took_s
            took_s += time.monotonic() - began_s
            return response

        with TpmTap(self.tpm.port) as tap:
            tap.on_command, tap.change = begins, ends
            tapped = settings.with_suffix(".tapped.toml")
            tapped.write_text(settings.read_text().replace(self.tpm.tcti, tap.tcti))
            run([AGENT, *words, "--config", str(tapped)])
            return Tapped(len(self.service.log) - requests, len(tap.exchanges), took_s * 1000)

    def syncs(self, words: Sequence[str], settings: Path) -> int:
        """How often one command waits for the disk."""
        counted = self.folder / "syncs"
        counted.unlink(missing_ok=True)
        run([sys.executable, "-c", SYNC_COUNTER, str(counted), *words, "--config", str(settings)])
        return counted.stat().st_size if counted.exists() else 0

    def order(self, device: DeviceCredentials) -> str:
        """What `clients.py` is told."""
        return json.dumps(
            {
                "host": "127.0.0.1",
                "port": self.service.hub_port,
                "caFile": str(self.service.ca_file),
                "hub": device.hub,
                "deviceId": device.device_id,
                "userName": device.user_name,
                "password": device.token(),
                "connectionString": device.connection_string,
                "topic": f"devices/{device.device_id}/messages/events/",
                "size": PAYLOAD_SIZE,
            }
        )

    def azure_node(self, folder: Path) -> list[str]:
        """A command that registers with Microsoft's client for Node, in `folder`, and a TPM of its own."""
        tpm = self._stack.enter_context(Swtpm(self.folder / "tpm-of-node"))
        order = {
            "registrationId": "press-08",
            "tpmPort": tpm.port,
            "port": self.service.port,
            "caFile": str(self.service.ca_file),
        }
        script = str(Path(__file__).with_name("node_provision.js"))
        return [shutil.which("node") or "node", script, str(folder), json.dumps(order)]

    def start_client(self, python: Path, client: str, what: str) -> subprocess.Popen[str]:
        """Another client as a process that has connected; it is ended with the desk."""
        return self._start(python, client, what, self.order(self.service.add_device(f"{client}-{what}")))

    def start_library(self, socket: str, connections: int) -> subprocess.Popen[str]:
        """The same with the library for programs, through a service."""
        order = {"socket": socket, "connections": connections, "size": PAYLOAD_SIZE}
        return self._start(Path(sys.executable), "library", "telemetry", json.dumps(order))

    def _start(self, python: Path, client: str, what: str, order: str) -> subprocess.Popen[str]:
        script = str(Path(__file__).with_name("clients.py"))
        program = [str(python), "-I", script, client, what, order]
        process = subprocess.Popen(
            program, env=clean_environ(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._stack.callback(_end, process)
        assert process.stdout is not None
        if process.stdout.readline() != "connected\n":
            raise CommandFailed(f"{client} did not connect")
        return process

    def _system_roots(self) -> dict[str, str]:
        """An environment in which the system's roots are as they are here, and the emulator's is one of them."""
        usual = ssl.get_default_verify_paths()
        openssl = shutil.which("openssl")
        folder = self.folder / "roots"
        folder.mkdir()
        if openssl and os.path.isdir(usual.openssl_capath) and os.listdir(usual.openssl_capath):
            for entry in os.scandir(usual.openssl_capath):
                (folder / entry.name).symlink_to(entry.path)
            words = [openssl, "x509", "-noout", "-hash", "-in", str(self.service.ca_file)]
            name = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
            (folder / f"{name}.0").unlink(missing_ok=True)  # a link into the system's folder
            shutil.copy(self.service.ca_file, folder / f"{name}.0")
            return {"SSL_CERT_DIR": str(folder)}
        bundle = folder / "bundle.pem"
        bundle.write_bytes(Path(usual.openssl_cafile).read_bytes() + self.service.ca_file.read_bytes())
        return {"SSL_CERT_FILE": str(bundle)}

    def __enter__(self) -> Desk:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def compiled() -> None:
    """What is installed is compiled: compiling at the start would be the peak."""
    subprocess.run(
        [sys.executable, "-m", "compileall", "-q", str(CHECKOUT / "agent"), str(CHECKOUT / "hal")], check=True
    )


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()
