"""A wire tap between a TPM's user and swtpm: records every command, and plays faults on demand.

It stands where a chip on the TPM's bus would stand: what `seen` finds here, a passive attacker finds too.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import struct
import threading
import tty
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from support.tpm.swtpm import free_port_pair, read_frame

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    _PassOn = Callable[[socket.socket, socket.socket], None]

COMMANDS = {  # TPM 2.0 Library Part 2, table 12
    0x120: "EvictControl",
    0x121: "HierarchyControl",
    0x126: "Clear",
    0x129: "HierarchyChangeAuth",
    0x131: "CreatePrimary",
    0x13E: "SequenceComplete",
    0x144: "Startup",
    0x145: "Shutdown",
    0x147: "ActivateCredential",
    0x14E: "NV_Read",
    0x151: "PolicySecret",
    0x153: "Create",
    0x155: "HMAC",
    0x156: "Import",
    0x157: "Load",
    0x15B: "HMAC_Start",
    0x15C: "SequenceUpdate",
    0x15D: "Sign",
    0x165: "FlushContext",
    0x169: "NV_ReadPublic",
    0x173: "ReadPublic",
    0x176: "StartAuthSession",
    0x178: "ECC_Parameters",
    0x17A: "GetCapability",
    0x17B: "GetRandom",
    0x17D: "Hash",
    0x186: "HashSequenceStart",
}

_LISTEN = "127.0.0.1"
_TPM_S = 200.0  # longer than any command of ours may take


class Exchange(NamedTuple):
    """One command as it passed; `response` is empty where the connection was dropped instead."""

    code: int
    name: str
    command: bytes
    response: bytes

    @property
    def return_code(self) -> int:
        """The response's code; -1 where there was none."""
        return int(struct.unpack(">I", self.response[6:10])[0]) if self.response else -1


@dataclass
class _Fault:
    """What happens to the command after `skip` matching ones; `code` None: any command matches."""

    code: int | None
    skip: int
    times: int
    return_code: int = 0
    alter: bool = False
    place: int = 0
    drop: bool = False
    after_execution: bool = False
    delay_s: float = 0.0
    seen: int = field(default=0)

    def strikes(self, code: int) -> bool:
        if self.code is not None and self.code != code:
            return False
        self.seen += 1
        return self.skip < self.seen <= self.skip + self.times


class TpmTap:
    """A proxy for the swtpm on `tpm_port`: data on `port`, control on `port + 1`; one client at a time, as swtpm."""

    def __init__(self, tpm_port: int) -> None:
        self.exchanges: list[Exchange] = []
        self.on_command: Callable[[str], object] = lambda name: None  # called before a command reaches the TPM
        self.redirect: Callable[[bytes], bytes] = lambda command: command  # what the TPM gets instead of a command
        self.change: Callable[[bytes, bytes], bytes] = lambda command, response: response  # what the client gets
        self._tpm_port = tpm_port
        self._faults: list[_Fault] = []
        self.hanging = threading.Event()  # a command that `hang` or `delay` named has come
        self._letting_go = threading.Event()
        self._closing = threading.Event()
        while True:
            self.port = free_port_pair()
            try:
                self._data = socket.create_server((_LISTEN, self.port))
            except OSError:
                continue
            try:
                self._control = socket.create_server((_LISTEN, self.port + 1))
            except OSError:
                self._data.close()
                continue
            break
        self._threads = [
            threading.Thread(target=self._serve, args=(self._data, tpm_port, self._pass_commands), daemon=True),
            threading.Thread(target=self._serve, args=(self._control, tpm_port + 1, self._pass_bytes), daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def tcti(self) -> str:
        """The TCTI string that goes through this tap."""
        return f"swtpm:host={_LISTEN},port={self.port}"

    @property
    def names(self) -> list[str]:
        """The names of the commands that passed, in order."""
        return [exchange.name for exchange in self.exchanges]

    def forget(self) -> None:
        """Forgets what passed and every fault that was planned."""
        self.exchanges.clear()
        self._faults.clear()

    def refuse(self, return_code: int, *, command: str | None = None, skip: int = 0, times: int = 1) -> None:
        """Answers `return_code` instead of asking the TPM: `times` commands, after `skip` that pass.

        `command` is a name of COMMANDS; None counts every command from now on.
        """
        self._faults.append(_Fault(_code(command), skip, times, return_code=return_code))

    def drop(self, *, command: str | None = None, skip: int = 0, after_execution: bool = False) -> None:
        """Cuts the client's connection at a command, before the TPM sees it or after the TPM has done it."""
        self._faults.append(_Fault(_code(command), skip, 1, drop=True, after_execution=after_execution))

    def delay(self, delay_s: float, *, command: str | None = None, skip: int = 0, times: int = 1) -> None:
        """Makes the TPM slow: `delay_s` seconds before a command reaches it."""
        self._faults.append(_Fault(_code(command), skip, times, delay_s=delay_s))

    def hang(self, *, command: str | None = None) -> None:
        """Never passes a command on; it stays open until the client goes or the tap ends."""
        self._letting_go.clear()
        self._faults.append(_Fault(_code(command), 0, 1, delay_s=math.inf))

    def let_go(self) -> None:
        """Ends the connection of a command that hangs."""
        self._letting_go.set()

    def alter(self, *, command: str | None = None, skip: int = 0, times: int = 1, place: int = 20) -> None:
        """Flips one bit of what the TPM answered, as an active attacker on the bus would.

        It is in byte `place`, counted from the end where negative, and in the last one of a shorter answer.
        """
        self._faults.append(_Fault(_code(command), skip, times, alter=True, place=place))

    def seen(self, secret: bytes) -> bool:
        """Whether `secret` passed in clear in any command or response."""
        return any(secret in exchange.command or secret in exchange.response for exchange in self.exchanges)

    def close(self) -> None:
        """Ends the tap; an open connection through it is cut."""
        self._closing.set()
        for thread in self._threads:
            thread.join()
        self._data.close()
        self._control.close()

    def __enter__(self) -> TpmTap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _serve(self, listener: socket.socket, tpm_port: int, pass_on: _PassOn) -> None:
        while not self._closing.is_set():
            if not select.select([listener], [], [], 0.05)[0]:
                continue
            client = listener.accept()[0]
            # A TPM that is switched off looks like one to the client: its connection just ends.
            with client, contextlib.suppress(OSError, EOFError):
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with socket.create_connection((_LISTEN, tpm_port), _TPM_S) as tpm:
                    tpm.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    pass_on(client, tpm)

    def _pass_commands(self, client: socket.socket, tpm: socket.socket) -> None:
        while not self._closing.is_set():
            readable = select.select([client, tpm], [], [], 0.05)[0]
            if tpm in readable:
                return  # between commands only the end of the TPM makes it readable
            if client not in readable:
                continue
            command = read_frame(client)
            code = struct.unpack(">I", command[6:10])[0]
            name = COMMANDS.get(code, f"0x{code:x}")
            self.on_command(name)
            struck = [fault for fault in self._faults if fault.strikes(code)]
            response = self._response(command, struck, tpm)
            self.exchanges.append(Exchange(code, name, command, response))
            if not response:
                return
            client.sendall(response)

    def _response(self, command: bytes, struck: list[_Fault], tpm: socket.socket) -> bytes:
        """What the client gets; empty: its connection is to be cut."""
        for fault in struck:
            if fault.delay_s:
                self.hanging.set()
                if fault.delay_s == math.inf:
                    while not self._closing.is_set() and not self._letting_go.wait(0.05):
                        pass
                    return b""
                if self._closing.wait(fault.delay_s):
                    return b""
            if fault.drop and not fault.after_execution:
                return b""
            if fault.return_code:
                return struct.pack(">HII", 0x8001, 10, fault.return_code)
        tpm.sendall(self.redirect(command))
        try:
            response = self.change(command, read_frame(tpm))
        except (OSError, EOFError):
            return b""  # the TPM was cut off in the middle of the command
        for fault in struck:
            if fault.alter:
                place = min(fault.place, len(response) - 1) % len(response)
                response = response[:place] + bytes([response[place] ^ 0x10]) + response[place + 1 :]
        return b"" if any(fault.drop for fault in struck) else response

    def _pass_bytes(self, client: socket.socket, tpm: socket.socket) -> None:
        while not self._closing.is_set():
            for source in select.select([client, tpm], [], [], 0.05)[0]:
                content = source.recv(4096)
                if not content:
                    return
                (tpm if source is client else client).sendall(content)


class DeviceNode:
    """A pseudo-terminal that answers like /dev/tpmrm0: a command written whole, then its response to read."""

    def __init__(self, tpm_port: int, loses: Callable[[bytes], bool] = lambda command: False) -> None:
        """`loses(command)` is asked when the TPM has done it; with True its answer is not passed on, and it ends."""
        self._loses = loses
        self._master, slave = os.openpty()
        tty.setraw(slave)
        self._slave = slave
        self.path = os.ttyname(slave)
        self._tpm = socket.create_connection((_LISTEN, tpm_port), _TPM_S)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        command = b""
        while True:
            try:
                command += os.read(self._master, 4096)
            except OSError:  # the last descriptor of the other side was closed
                return
            if len(command) >= 10 and len(command) == int.from_bytes(command[2:6], "big"):
                self._tpm.sendall(command)
                response = read_frame(self._tpm)
                if self._loses(command):
                    os.close(self._slave)
                    os.close(self._master)
                    return
                os.write(self._master, response)
                command = b""

    def end(self) -> None:
        """Ends the connection to the TPM, which takes one client at a time."""
        self._tpm.close()

    def close(self) -> None:
        """Takes the node away; nobody may have it open any more."""
        os.close(self._slave)
        self._thread.join(10)  # where a test has failed, its client may still have the node open
        os.close(self._master)
        self._tpm.close()


class UnreliableNode:
    """A `DeviceNode` at a fixed path, as /dev/tpm0, whose driver may lose an answer: the TPM has done the command."""

    def __init__(self, tpm_port: int, path: Path) -> None:
        self.path = str(path)
        self.failed = False  # the planned loss has come
        self._closed = False
        self._tpm_port = tpm_port
        self._code: int | None = None
        self._meanwhile: Callable[[], None] = lambda: None
        self._node = self._made()

    def fail_at(self, command: str, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Loses the answer to the next command of this name; `meanwhile` is called before the next one is taken."""
        self.failed = False
        self._code = _code(command)
        self._meanwhile = meanwhile

    def close(self) -> None:
        """Takes the node away; idempotent."""
        if not self._closed:
            self._closed = True
            self._node.close()

    def __enter__(self) -> UnreliableNode:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _made(self) -> DeviceNode:
        node = DeviceNode(self._tpm_port, self._loses)
        link = Path(f"{self.path}.new")
        link.symlink_to(node.path)
        link.replace(self.path)
        return node

    def _loses(self, command: bytes) -> bool:
        if self._code is None or int.from_bytes(command[6:10], "big") != self._code:
            return False
        self._code = None
        self._node.end()
        self._meanwhile()
        self._node = self._made()
        self.failed = True
        return True


def _code(command: str | None) -> int | None:
    if command is None:
        return None
    return next(code for code, name in COMMANDS.items() if name == command)
