"""The board that QEMU emulates whole: its flash is a file, its TPM a swtpm on I2C, its network is the host's loopback.

`start` switches it on, `cut_power` off; both as often as one likes, and the flash is what it was. No privileges.
"""

from __future__ import annotations

import os
import re
import select
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dps_deploy.modules import CHECKOUT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

HOST = "10.0.2.2"  # the host's loopback, as QEMU's user network shows it to the board
TPM_ADDRESS = 0x2E
I2C_BUS = 3  # where QEMU puts a device on I2C
FLASH_BYTES = 1 << 20
CHIP_BYTES = 16 << 20
ROM_AT = 8 << 20  # of the chip: a ROMFS, where there is one
ICOUNT = ("-icount", "shift=3,sleep=on")  # 125 million instructions a second, however slow the host is
PICO_W_HEAP = 210_048
STOP_S = 10
SOCKET_S = 60


class BoardError(Exception):
    """The board did not do what was expected; the text has the end of its console."""


class Mps2:
    """One board. `heap_bytes` is its garbage-collected heap."""

    def __init__(self, folder: Path, qemu: Sequence[str], firmware: Path, heap_bytes: int = PICO_W_HEAP) -> None:
        self.folder = folder
        self.console = ""  # all of it, since the first start
        self.heard: Callable[[], None] = lambda: None  # is called when more of it has come, and while nothing does
        self._qemu = list(qemu)
        self._firmware = firmware
        self._heap_bytes = heap_bytes
        self._chip = folder / "chip.img"
        self._monitor = folder / "monitor.socket"
        self._processes: list[subprocess.Popen[bytes]] = []

    def flash(self, image: bytes, rom: bytes = b"") -> None:
        """Puts a file system on the chip, and a ROMFS."""
        with open(self._chip, "wb") as chip:
            chip.write(image)
            chip.seek(ROM_AT)
            chip.write(rom)
            chip.truncate(CHIP_BYTES)

    def start(self, **settings: int) -> None:
        """Switches it on.

        `cut`: the flash step in whose middle the power goes; `fail`: the allocation that fails, the first of `run`;
        none does after a reset; `gone` and `goneFor`: when nothing is on the I2C, in ms since a start; `deaf`: its name
        server never answers; the name of a state of the agent: how fast the clock goes in that; `joined`: it is on the
        Ethernet before its program begins; `repl`: that does not begin, there is the prompt.
        """
        tpm = self.folder / "tpm"
        tpm.mkdir(exist_ok=True)
        control = self.folder / "tpm.socket"
        control.unlink(missing_ok=True)
        swtpm = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={tpm}", "--ctrl", f"type=unixio,path={control}"]
        self._processes.append(subprocess.Popen([*swtpm, "--flags", "startup-clear"]))
        until_s = time.monotonic() + SOCKET_S
        while not control.exists():
            if time.monotonic() > until_s:
                raise BoardError(f"swtpm made no socket within {SOCKET_S} s")
            time.sleep(0.02)
        words = {"heap": self._heap_bytes, "flash": FLASH_BYTES, **settings}
        command = [
            *(*self._qemu, "-accel", "tcg", *ICOUNT),
            *("-machine", "mps2-an385,memory-backend=chip", "-display", "none", "-audio", "none"),
            *("-object", f"memory-backend-file,id=chip,size={CHIP_BYTES},mem-path={self._chip},share=on"),
            *("-monitor", f"unix:{self._monitor},server=on,wait=off", "-serial", "stdio", "-nic", "user"),
            "-semihosting-config",
            "enable=on,target=native," + ",".join(f"arg={name}={number}" for name, number in words.items()),
            *("-chardev", f"socket,id=tpm,path={control}", "-tpmdev", "emulator,id=tpm0,chardev=tpm"),
            *("-device", f"tpm-tis-i2c,tpmdev=tpm0,address={TPM_ADDRESS:#x}", "-kernel", str(self._firmware)),
        ]
        with open(self.folder / "qemu.log", "ab") as log:
            self._processes.append(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, bufsize=0)
            )

    def plug(self, plugged: bool) -> None:
        """The Ethernet's cable, in or out."""
        with socket.socket(socket.AF_UNIX) as monitor:
            monitor.settimeout(SOCKET_S)
            monitor.connect(str(self._monitor))
            _until_prompt(monitor)
            monitor.sendall(b"set_link lan9118.0 %s\n" % (b"on" if plugged else b"off"))
            _until_prompt(monitor)

    def enter(self, keys: bytes) -> None:
        """Somebody types at its console."""
        keyboard = self._processes[-1].stdin
        assert keyboard is not None
        keyboard.write(keys)

    @property
    def is_on(self) -> bool:
        """Whether it still runs; it ends by itself where the power is cut in the middle of a flash step."""
        return bool(self._processes) and self._processes[-1].poll() is None

    def look(self, for_s: float = 0.2) -> str:
        """What the console says, read for a moment; returns all of it."""
        if self._processes:
            output = self._processes[-1].stdout
            assert output is not None
            until_s = time.monotonic() + for_s
            while (left_s := until_s - time.monotonic()) > 0:
                if not select.select([output], [], [], left_s)[0]:
                    break
                piece = os.read(output.fileno(), 65536)
                if not piece:
                    break
                self.console += piece.decode(errors="replace")
                self.heard()
        self.heard()
        return self.console

    def until(self, words: str, within_s: float = 120, count: int = 1) -> None:
        """Waits until the console has `words` so many times. BoardError."""
        until_s = time.monotonic() + within_s
        while len(re.findall(words, self.look())) < count:
            if time.monotonic() > until_s or not self.is_on:
                raise BoardError(f"{words!r} not {count} times within {within_s} s:\n{self.console[-2000:]}")

    def cut_power(self) -> None:
        """Off, in whatever it does."""
        self.look(0.05)
        while self._processes:
            process = self._processes.pop()
            process.kill()
            process.wait(STOP_S)
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()

    def __enter__(self) -> Mps2:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cut_power()


def _until_prompt(monitor: socket.socket) -> None:
    said = b""
    while not said.endswith(b"(qemu) "):
        piece = monitor.recv(4096)
        if not piece:
            raise BoardError(f"QEMU's monitor ended after {said!r}")
        said += piece


def deployed(folder: Path, settings: str, app: Path, *flags: str) -> bytes:
    """The image of a file system with these settings and this program, by `tools/deploy`. BoardError."""
    (folder / "board.toml").write_text(settings)
    words = [sys.executable, str(CHECKOUT / "tools/deploy"), str(folder / "board.toml"), "--app", str(app)]
    words += ["--image", str(folder / "flash.img"), "--image-size", str(FLASH_BYTES), *flags]
    environ: dict[str, Any] = {**os.environ, "DPS_DEPLOY_INSIDE": "1"}
    done = subprocess.run(words, env=environ, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise BoardError(done.stdout + done.stderr)
    return (folder / "flash.img").read_bytes()
