"""swtpm, a TPM in software, as a process of its own on free ports, with power cuts.

`swtpm` (libtpms) serves one client at a time on its data port; the port after it takes control commands, as
tpm2-tss's TCTI `swtpm` expects.
"""

import atexit
import contextlib
import shutil
import socket
import struct
import subprocess
from pathlib import Path
from types import TracebackType
from typing import TypeVar

LISTEN = "127.0.0.1"
ANSWER_S = 60.0
_STARTS = 10  # another program may take a port between our look and swtpm's bind
_CTRL_GET_CAPABILITY = struct.pack(">I", 1)  # swtpm_ioctls(3), CMD_GET_CAPABILITY
_Process = TypeVar("_Process", bound="SwtpmProcess")


def free_port_pair() -> int:
    """A port N for which N and N + 1 were both free a moment ago."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind((LISTEN, 0))
            port: int = first.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                second.bind((LISTEN, port + 1))
                return port


def read_exactly(connection: socket.socket, count: int) -> bytes:
    """`count` bytes from `connection`; EOFError when it ends before."""
    content = b""
    while len(content) < count:
        piece = connection.recv(count - len(content))
        if not piece:
            raise EOFError(f"connection ended after {len(content)} of {count} bytes")
        content += piece
    return content


class SwtpmProcess:
    """One swtpm process; its TPM's state is in `state_dir` and outlives it.

    `ends_with_thread`: the process ends with the thread that starts it, even where SIGKILL ends that.
    """

    def __init__(self, state_dir: Path | str, ends_with_thread: bool = False) -> None:
        self.state_dir = Path(state_dir)
        self._prefix = ("setpriv", "--pdeathsig", "KILL") if ends_with_thread and shutil.which("setpriv") else ()
        self.state_dir.mkdir(parents=True, exist_ok=True)
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self.restart()

    @property
    def tcti(self) -> str:
        """The TCTI string of this TPM."""
        return f"swtpm:host={LISTEN},port={self.port}"

    def restart(self) -> None:
        """Powers the TPM on with the state it has, on the same ports where it had some; a running one is cut off."""
        self.kill()
        for _ in range(_STARTS):
            port = self.port or free_port_pair()
            try:
                control = socket.create_server((LISTEN, port + 1))
            except OSError:
                continue
            with control:  # ours until swtpm has it: no other program's answer there is taken for that of this one
                self._process = subprocess.Popen(
                    [
                        *(*self._prefix, "swtpm", "socket", "--tpm2", "--tpmstate", f"dir={self.state_dir}"),
                        *("--server", f"type=tcp,port={port},bindaddr={LISTEN}"),
                        *("--ctrl", f"type=tcp,fd={control.fileno()}"),
                        *("--flags", "not-need-init,startup-clear"),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    pass_fds=(control.fileno(),),
                )
            atexit.register(self.kill)
            if self._ready(port):
                self.port = port
                return
            self.kill()
        raise RuntimeError(f"swtpm did not start {_STARTS} times; run: swtpm socket --tpm2 --tpmstate dir=…")

    @staticmethod
    def _ready(port: int) -> bool:
        """Whether it answers, which it does once it has both ports; without the other one it ends."""
        with (
            contextlib.suppress(OSError, EOFError),
            socket.create_connection((LISTEN, port + 1), ANSWER_S) as control,
        ):
            control.sendall(_CTRL_GET_CAPABILITY)
            read_exactly(control, 4)
            return True
        return False

    def kill(self) -> None:
        """A power cut: SIGKILL, no TPM2_Shutdown; nothing happens where none runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        atexit.unregister(self.kill)

    def __enter__(self: _Process) -> _Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
