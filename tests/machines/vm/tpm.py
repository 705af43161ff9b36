"""The guest's TPM: swtpm, with the power of the machine it is in.

QEMU talks to swtpm through `TpmPower`, which passes everything on but one thing: QEMU restores the TPM's memory with
the guest's. A TPM is not restored. It keeps what it has stored, and after a power cut waits for TPM2_Startup.
A TPM that stalls is made here too: were swtpm itself stopped, all of QEMU would stop with it.
"""

import contextlib
import socket
import struct
import subprocess
import threading
import time
from pathlib import Path

ENDS_WITH_US = ("setpriv", "--pdeathsig", "KILL")  # also where nobody is left to end it
START_DEADLINE_S = 60
CMD_SET_STATEBLOB = 13  # swtpm_ioctls(3): flags, type and length follow the command, then the bytes
BLOB_HEADER_BYTES = 16
MAX_BYTES = 65536
STALL_LIMIT_S = 600


class TpmPower:
    """One time of power for the TPM in `state`; QEMU's end of the control channel is `address`."""

    def __init__(self, state: Path, address: Path) -> None:
        self.address = address
        self._awake = threading.Event()
        self._awake.set()
        state.mkdir(exist_ok=True)
        inner = address.with_suffix(".inner")
        for path in (address, inner):
            path.unlink(missing_ok=True)
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._swtpm = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._channels = [self._listening, self._swtpm]
        self._listening.bind(str(address))
        self._listening.listen(1)
        self._process = subprocess.Popen(
            [
                *ENDS_WITH_US,
                "swtpm",
                "socket",
                "--tpm2",
                "--tpmstate",
                f"dir={state}",
                "--ctrl",
                f"type=unixio,path={inner}",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until_s = time.monotonic() + START_DEADLINE_S
        while self._swtpm.connect_ex(str(inner)) != 0:
            if self._process.poll() is not None or time.monotonic() > until_s:
                self.cut()
                raise RuntimeError("swtpm did not start")
            time.sleep(0.02)
        threading.Thread(target=self._serve, daemon=True).start()

    def stall(self) -> None:
        """The TPM takes no command until `resume`."""
        self._awake.clear()

    def resume(self) -> None:
        """The TPM goes on where it stood."""
        self._awake.set()

    def cut(self) -> None:
        """The power goes, without a word to the TPM; idempotent."""
        self._process.kill()
        self._process.wait()
        self._awake.set()
        for channel in self._channels:
            with contextlib.suppress(OSError):
                channel.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads it
            channel.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            qemu, _ = self._listening.accept()
            self._channels.append(qemu)
            self._pass_on(self._swtpm, qemu)
            self._requests(qemu)

    def _pass_on(self, source: socket.socket, target: socket.socket, when: threading.Event | None = None) -> None:
        """Passes bytes on in a thread of its own, each piece only `when` that is set."""

        def copy() -> None:
            with contextlib.suppress(OSError):
                while content := source.recv(MAX_BYTES):
                    if when is not None:
                        when.wait(STALL_LIMIT_S)
                    target.sendall(content)
            with contextlib.suppress(OSError):
                target.shutdown(socket.SHUT_RDWR)

        threading.Thread(target=copy, daemon=True).start()

    def _requests(self, qemu: socket.socket) -> None:
        """QEMU waits for each answer before it sends the next request."""
        while True:
            content, descriptors, _, _ = socket.recv_fds(qemu, MAX_BYTES, 1)
            if not content:
                return
            if content[:4] == struct.pack(">I", CMD_SET_STATEBLOB):
                while len(content) < BLOB_HEADER_BYTES or len(content) - BLOB_HEADER_BYTES < _blob_bytes(content):
                    piece = qemu.recv(MAX_BYTES)
                    if not piece:
                        return
                    content += piece
                qemu.sendall(bytes(4))  # TPM_SUCCESS
                continue
            if descriptors:  # CMD_SET_DATAFD: the commands' channel
                theirs = socket.socket(fileno=descriptors[0])
                ours, inner = socket.socketpair()
                self._channels += [theirs, ours]
                self._pass_on(theirs, ours, self._awake)
                self._pass_on(ours, theirs)
                with inner:
                    socket.send_fds(self._swtpm, [content], [inner.fileno()])
            else:
                self._swtpm.sendall(content)


def _blob_bytes(request: bytes) -> int:
    size: int = struct.unpack(">I", request[12:BLOB_HEADER_BYTES])[0]
    return size
