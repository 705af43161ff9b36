"""TPMs as Linux names them, above all the device nodes /dev/tpmrm0 and /dev/tpm0; CPython only."""

from __future__ import annotations

import errno
import os
import select
import struct

from dps_hal.errors import RetryLater
from dps_hal.host.service_tpm import ServiceTpm
from dps_hal.host.tcti import parse_tcti
from dps_hal.host.tpm_node import is_managed, open_device
from dps_hal.platform import ms_since, ticks_ms
from dps_hal.tpm.commands import NULL, take_field
from dps_hal.tpm.keys import sized
from dps_hal.tpm.tcp import SwtpmTransport
from dps_hal.tpm.wire import WireCommands

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from dps_hal.contracts import WhileWaiting
    from dps_hal.tpm.commands import Key, Transport
    from dps_hal.tpm.sessions import SaltedSession

_HASHCHECK = 0x8024  # TPM_ST, TPM 2.0 Library Part 2, table 19
_MAX_RESPONSE_BYTES = 4096  # TPM_BUFSIZE of the kernel's driver


class DeviceTransport:
    """One open device node; it is opened by the first command.

    Neither `limit_s` nor `while_waiting` holds while the kernel itself works on a command: its poll and its close wait
    for the driver, which has its own limit for each command (drivers/char/tpm/tpm-dev-common.c). Above that there is
    the deadline of whoever calls, from another thread.
    """

    shared = True  # other programs use the TPM behind it meanwhile

    def __init__(self, path: str) -> None:
        self._path = path
        self._node = -1

    @property
    def managed(self) -> bool:
        """Whether the kernel's resource manager is behind it."""
        return is_managed(self._path)

    def send(self, command: bytes, limit_s: float, while_waiting: WhileWaiting | None) -> bytes:
        """As `Transport.send`, but for what the class says. The kernel takes a command whole."""
        if self._node < 0:
            self._node = open_device(self._path, os.O_NONBLOCK)
        started_ms = ticks_ms()
        written = os.write(self._node, command)
        if written != len(command):
            raise OSError(errno.EIO, f"the driver took {written} of {len(command)} bytes")
        poller = select.poll()
        poller.register(self._node, select.POLLIN)
        response = b""
        while len(response) < 10 or len(response) < int.from_bytes(response[2:6], "big"):
            left_ms = int(limit_s * 1000) - ms_since(started_ms)
            if left_ms <= 0:
                raise RetryLater("tpm.timeout", f"{self._path} did not answer within {limit_s:.0f} s")
            if not poller.poll(min(left_ms, 1000)):
                if while_waiting is not None:
                    while_waiting()
                continue
            piece = os.read(self._node, _MAX_RESPONSE_BYTES)
            if not piece:
                raise OSError(errno.EIO, "the driver's answer ended early")
            response += piece
            if len(response) > _MAX_RESPONSE_BYTES:
                break  # no TPM gives such a size; the caller refuses it
        return response

    def close(self) -> None:
        """As `Transport.close`."""
        if self._node >= 0:
            os.close(self._node)
            self._node = -1


class ServiceWireCommands(WireCommands):
    """The `ServiceCommands` as bytes, each as said there."""

    def create(self, srk: Key, template: bytes, session: SaltedSession) -> tuple[bytes, bytes]:
        no_secret = b"\x00\x04\x00\x00\x00\x00"  # neither password nor data
        _, answer = self._with(session, "create", srk, no_secret + template + bytes(6))  # no outside info, no PCRs
        _, split = take_field("create", answer, 0)
        _, end = take_field("create", answer, split)
        return answer[split:end], answer[:split]

    def sign(self, key: Key, digest: bytes, scheme: bytes) -> bytes:
        no_ticket = struct.pack(">HIH", _HASHCHECK, NULL, 0)
        return self.run("sign", (key.handle,), sized(digest) + scheme + no_ticket, password=True)[1]


def transport_for(tcti: str) -> Transport:
    """The transport to the TPM that a string names, as `parse_tcti` says; nothing is opened yet."""
    kind, place, number = parse_tcti(tcti)
    if kind == "spi":
        from dps_hal.host.spidev import SpidevTransport

        return SpidevTransport(place, number)
    return SwtpmTransport(place, number) if kind == "swtpm" else DeviceTransport(place)


def open_wire(tcti: str, *, while_waiting: WhileWaiting | None = None, **settings: Any) -> ServiceTpm:
    """A `TpmService` in plain bytes at the TPM that a string names; the settings are those of `TpmProcedure`."""
    return ServiceTpm(ServiceWireCommands(transport_for(tcti), while_waiting), **settings)
