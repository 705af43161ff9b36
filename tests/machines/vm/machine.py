"""A virtual machine whose power can be cut: QEMU without hardware help, a TPM, a disk for the state.

`Machine` starts cold or from a snapshot of its memory. The disk of the state and the TPM are never part of a snapshot:
they go on from what the last cut left, as in a device.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from machines.vm.image import STATE_DISK_MOUNT, Image
from machines.vm.image import run as run_here
from machines.vm.tpm import ENDS_WITH_US, TpmPower

MEMORY_MIB = 320
STATE_DISK_BYTES = 32 << 20
QMP_DEADLINE_S = 60
BOOT_DEADLINE_S = 300
WAKE_DEADLINE_S = 60
ANSWER_GRACE_S = 60  # on top of what a command may take in the guest
SNAPSHOT_DEADLINE_S = 120
TAIL_LINES = 40
KERNEL_LINE = (
    "console=ttyS0 quiet panic=-1 net.ifnames=0 mitigations=off systemd.show_status=0"
    # IMA would keep the first TPM for ever, and one that comes back would get another number.
    " initcall_blacklist=init_ima"
)
TPM_MODELS = ("tpm-tis", "tpm-crb")


class VmError(Exception):
    """The machine did not do something in time; the text says what."""


class Answer(NamedTuple):
    """What a command in the guest came to."""

    status: int
    output: str


def qemu_command(folder: Path, image: Image, tpm_model: str) -> list[str]:
    """QEMU's command line for the machine in `folder`."""
    words = [
        # Without hardware help everywhere: what looks like KVM may be another thing, and then nothing boots.
        *("qemu-system-x86_64", "-machine", "q35", "-accel", "tcg", "-smp", "1", "-m", str(MEMORY_MIB)),
        *("-nodefaults", "-nographic", "-no-reboot"),
        *("-kernel", str(image.kernel), "-initrd", str(image.initial_files), "-append", KERNEL_LINE),
        *("-chardev", f"file,id=console,path={folder / 'serial.log'},append=on", "-serial", "chardev:console"),
        *("-chardev", f"socket,id=control,path={folder / 'control.sock'},server=on,wait=off"),
        *("-serial", "chardev:control", "-qmp", f"unix:{folder / 'qmp.sock'},server=on,wait=off"),
        *("-netdev", "user,id=net0", "-device", "virtio-net-pci,netdev=net0,id=cable,romfile="),
        *("-chardev", f"socket,id=tpmc,path={folder / 'tpm.sock'}"),
        *("-tpmdev", "emulator,id=tpm0,chardev=tpmc", "-device", f"{tpm_model},tpmdev=tpm0"),
    ]
    for disk, kind in (("root.qcow2", "qcow2"), ("state.raw", "raw"), ("package.raw", "raw")):
        name = disk.partition(".")[0]
        words += ["-drive", f"file={folder / disk},if=none,id={name},format={kind}"]
        words += ["-device", f"virtio-blk-pci,drive={name}"]
    return words


class Machine:
    """One device: its disks and its TPM in `folder`, and at most one QEMU that runs it."""

    def __init__(self, folder: Path, image: Image, package: Path, tpm_model: str) -> None:
        self.folder = folder
        self.serial = folder / "serial.log"
        self._image = image
        self._tpm_model = tpm_model
        self._qemu: subprocess.Popen[bytes] | None = None
        self._tpm: TpmPower | None = None
        self._qmp: socket.socket | None = None
        self._qmp_lines: Any = None
        self._control: socket.socket | None = None
        self._pending = b""
        self._number = 0
        self._root = folder / "root.qcow2"
        self._snapshot_root = folder / "snapshot-root.qcow2"
        self._memory = folder / "memory.bin"
        self._state_disk = folder / "state.raw"
        self._package = folder / "package.raw"
        self._overlay(image.disk, "raw", self._root)
        self._make_state_disk()
        shutil.copyfile(package, self._package)
        with self._package.open("ab") as file:
            file.truncate(-(-package.stat().st_size // 512) * 512)

    def _overlay(self, backing: Path, kind: str, target: Path) -> None:
        target.unlink(missing_ok=True)
        run_here(["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(backing), "-F", kind, str(target)])

    def _make_state_disk(self) -> None:
        with self._state_disk.open("wb") as file:
            file.truncate(STATE_DISK_BYTES)
        run_here(["mke2fs", "-q", "-t", "ext4", "-m", "0", str(self._state_disk)])

    # Power.

    def boot(self) -> float:
        """Switches the machine on; the seconds until it takes commands."""
        started_s = time.monotonic()
        self._start([])
        self._await_guest(BOOT_DEADLINE_S)
        return time.monotonic() - started_s

    def wake(self) -> None:
        """Switches the machine on at its snapshot; disk and TPM are as they were left."""
        self._overlay(self._snapshot_root, "qcow2", self._root)
        self._start(["-S", "-incoming", f"exec:cat {self._memory}"])
        until_s = time.monotonic() + WAKE_DEADLINE_S
        while self.qmp("query-status")["status"] == "inmigrate":  # earlier 'cont' is forgotten
            if time.monotonic() > until_s:
                raise VmError(f"the snapshot was not restored within {WAKE_DEADLINE_S} s")
            time.sleep(0.05)
        self.qmp("cont")
        self._await_guest(WAKE_DEADLINE_S)

    def cut(self) -> None:
        """The power goes: QEMU and TPM end at once, nothing more is written. Idempotent."""
        for connection in (self._qmp, self._qmp_lines, self._control):
            if connection is not None:
                connection.close()
        self._qmp = self._qmp_lines = self._control = None
        if self._qemu is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._qemu.pid, signal.SIGKILL)
            self._qemu.wait()
            self._qemu = None
        if self._tpm is not None:
            self._tpm.cut()
            self._tpm = None

    def take_snapshot(self) -> None:
        """Keeps the machine as it is now for `wake`, and switches it off."""
        self.qmp("stop")
        self.qmp("migrate", uri=f"exec:cat > {self._memory}")
        until_s = time.monotonic() + SNAPSHOT_DEADLINE_S
        while (status := self.qmp("query-migrate").get("status")) != "completed":
            if status in ("failed", "cancelled") or time.monotonic() > until_s:
                raise VmError(f"the snapshot was not taken: {status}")
            time.sleep(0.05)
        self.cut()
        os.replace(self._root, self._snapshot_root)

    def _start(self, more: list[str]) -> None:
        assert self._qemu is None
        self._tpm = TpmPower(self.folder / "tpm", self.folder / "tpm.sock")
        for name in ("qmp", "control"):
            (self.folder / f"{name}.sock").unlink(missing_ok=True)
        with (self.folder / "qemu.log").open("ab") as log:
            self._qemu = subprocess.Popen(
                [*ENDS_WITH_US, *qemu_command(self.folder, self._image, self._tpm_model), *more],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._qmp = self._connect(self.folder / "qmp.sock")
        self._qmp_lines = self._qmp.makefile("rb")
        self._qmp_line()
        self.qmp("qmp_capabilities")
        self._control = self._connect(self.folder / "control.sock")
        self._pending = b""

    def _connect(self, path: Path) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        until_s = time.monotonic() + QMP_DEADLINE_S
        while connection.connect_ex(str(path)) != 0:
            if time.monotonic() > until_s or (self._qemu is not None and self._qemu.poll() is not None):
                raise VmError(f"QEMU did not start:\n{(self.folder / 'qemu.log').read_text()[-2000:]}")
            time.sleep(0.02)
        connection.settimeout(QMP_DEADLINE_S)
        return connection

    # QEMU's own commands.

    def qmp(self, command: str, **arguments: Any) -> Any:
        """QEMU's answer to a command of its protocol; VmError if it refuses."""
        if self._qmp is None:
            raise VmError("the machine is off")
        self._qmp.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        while True:
            said = self._qmp_line()
            if "error" in said:
                raise VmError(f"QEMU refused {command}: {said['error']['desc']}")
            if "return" in said:
                return said["return"]

    def _qmp_line(self) -> Any:
        try:
            line = self._qmp_lines.readline()
        except OSError as error:
            raise VmError(f"QEMU says nothing: {error}") from None
        if not line:
            raise VmError(f"QEMU has ended:\n{(self.folder / 'qemu.log').read_text()[-2000:]}")
        return json.loads(line)

    def set_link(self, up: bool) -> None:
        """Puts the network cable in or pulls it out."""
        self.qmp("set_link", name="cable", up=up)

    @contextlib.contextmanager
    def tpm_stalled(self) -> Iterator[None]:
        """The TPM answers nothing for so long."""
        assert self._tpm is not None
        self._tpm.stall()
        try:
            yield
        finally:
            self._tpm.resume()

    # The guest.

    def run(self, command: str, deadline_s: float = 60) -> Answer:
        """What a line of shell came to in the guest."""
        return self._ask({"command": command, "deadline_s": deadline_s}, deadline_s + ANSWER_GRACE_S)

    def check(self, command: str, deadline_s: float = 60) -> str:
        """What a line of shell wrote in the guest; VmError if it failed."""
        answer = self.run(command, deadline_s)
        if answer.status != 0:
            raise VmError(f"exit status {answer.status} in the guest from: {command}\n{answer.output.rstrip()}")
        return answer.output

    def post(self, path: str, body: str = "", wait: bool = True) -> Answer:
        """What the agent's socket in the guest answered; without `wait` nothing."""
        return self._ask({"post": path, "body": body, "wait": wait}, 2 * ANSWER_GRACE_S)

    def start_command(self, command: str) -> None:
        """Begins a line of shell in the guest and leaves it alone; VmError if it could not begin."""
        self.check(f"setsid sh -c '{command}' </dev/null >/dev/null 2>&1 &")

    def _await_guest(self, deadline_s: float) -> None:
        until_s = time.monotonic() + deadline_s
        while time.monotonic() < until_s:
            with contextlib.suppress(VmError):
                if self._ask({"command": "true", "deadline_s": 5}, 2).status == 0:
                    return
        raise VmError(f"the guest took no commands within {deadline_s:.0f} s")

    def _ask(self, request: dict[str, Any], deadline_s: float) -> Answer:
        if self._control is None:
            raise VmError("the machine is off")
        self._number += 1
        until_s = time.monotonic() + deadline_s
        # The line end before it closes what an earlier time of power left unfinished.
        self._control.sendall(b"\n" + json.dumps({"id": self._number, **request}).encode() + b"\n")
        while True:
            line, end, rest = self._pending.partition(b"\n")
            if end:
                self._pending = rest
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    said = json.loads(line)
                    if said["id"] == self._number:
                        return Answer(said["status"], said["output"])
                continue
            left_s = until_s - time.monotonic()
            if left_s <= 0 or (self._qemu is not None and self._qemu.poll() is not None):
                raise VmError(f"the guest did not answer within {deadline_s:.0f} s: {str(request)[:200]}")
            self._control.settimeout(min(left_s, 1))
            with contextlib.suppress(TimeoutError):
                content = self._control.recv(65536)
                if not content:
                    raise VmError("QEMU has ended")
                self._pending += content

    def wait_until(self, what: str, condition: Callable[[], bool], deadline_s: float, pause_s: float = 0.5) -> float:
        """Seconds until the condition held; VmError if it did not in time."""
        started_s = time.monotonic()
        while not condition():
            if time.monotonic() - started_s > deadline_s:
                raise VmError(f"not within {deadline_s:.0f} s: {what}")
            time.sleep(pause_s)
        return time.monotonic() - started_s

    def mount_state(self) -> None:
        """Mounts the state's disk as it is now, after a wake: what the snapshot knew of it is forgotten."""
        self.check(f"blockdev --flushbufs /dev/vdb && mount /dev/vdb {STATE_DISK_MOUNT}")

    def evidence(self) -> str:
        """The ends of the serial console and of the agent's journal, for whoever looks for the cause."""
        console = self.serial.read_text(errors="replace").splitlines()[-TAIL_LINES:] if self.serial.exists() else []
        try:
            said = self.run(f"journalctl -q -o short-precise -n {TAIL_LINES} --no-pager; systemctl --failed -q", 60)
            journal = said.output.splitlines()
        except VmError as error:
            journal = [str(error)]
        parts = ["-- serial console", *console, "-- journal", *journal]
        return "\n".join(f"    {line}" for line in parts)
