"""What one wake of a board costs that sleeps in between: `Agent.run_once` under MicroPython's unix port.

Counted where it passes: TPM commands at a tap, what goes over the network at a relay, what is written to the flash in
the block device. Packets are those with data, each TLS record for itself, of at most MSS bytes. Counts and bytes are a
board's as well; times are this machine's, whose TPM is a program, and leave out what is waited for on purpose: the
random time before a connection, and that in which nothing more comes from the hub.
"""

from __future__ import annotations

import json
import socket
import statistics
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dps_bench.report import Report
from support.board.compiled import Image, build, der, micropython
from support.cloud.emulator import EmulatorProcess
from support.cloud.ntp import NtpServer
from support.tpm.swtpm import Swtpm
from support.tpm.tap import TpmTap

if TYPE_CHECKING:
    from types import TracebackType

DEVICE = "press-07"
MSS = 1460  # bytes of data in a packet of a network with an MTU of 1500
MESSAGES = 10  # of the wake that sends more than one
_PATIENCE_S = 120.0
_HEAP_KB = 1024


class Counted:
    """A relay to a port of this machine that counts what passes: bytes, packets and connections; use it with `with`."""

    def __init__(self, port: int) -> None:
        self.connections = 0
        self.bytes = [0, 0]  # sent, received
        self.packets = [0, 0]
        self._to = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._threads: list[threading.Thread] = []

    @property
    def address(self) -> str:
        """Where it listens, host:port."""
        return f"127.0.0.1:{self._listening.getsockname()[1]}"

    def forget(self) -> None:
        """Begins to count anew."""
        self.connections, self.bytes, self.packets = 0, [0, 0], [0, 0]

    def settle(self) -> None:
        """Waits until all connections have ended."""
        for thread in self._threads[1:]:
            thread.join(_PATIENCE_S)
        del self._threads[1:]

    def _start(self, work: Any, *arguments: Any) -> None:
        # They end with their connection, the first one with the relay.
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _serve(self) -> None:
        while True:
            try:
                device, _ = self._listening.accept()
            except OSError:
                return
            self.connections += 1
            self._start(self._relay, device)

    def _relay(self, device: socket.socket) -> None:
        with device, socket.create_connection(("127.0.0.1", self._to), _PATIENCE_S) as cloud:
            back = threading.Thread(target=self._pass_on, args=(cloud, device, 1), daemon=True)
            back.start()
            self._pass_on(device, cloud, 0)
            back.join()

    def _pass_on(self, source: socket.socket, target: socket.socket, way: int) -> None:
        """Until one side has ended; looks at the head of each TLS record (RFC 8446, 5.1) for its size."""
        source.settimeout(_PATIENCE_S)
        head, left = b"", 0
        try:
            while piece := source.recv(65536):
                target.sendall(piece)
                self.bytes[way] += len(piece)
                while piece:
                    if not left:
                        missing = 5 - len(head)
                        head, piece = head + piece[:missing], piece[missing:]
                        if len(head) == 5:
                            left, head = int.from_bytes(head[3:5], "big"), b""
                            self.packets[way] += -(-(5 + left) // MSS)
                    else:
                        taken = min(left, len(piece))
                        left, piece = left - taken, piece[taken:]
        except OSError:
            pass
        finally:
            for one, how in ((target, socket.SHUT_WR), (source, socket.SHUT_RD)):
                try:
                    one.shutdown(how)
                except OSError:
                    continue

    def __enter__(self) -> Counted:
        self._start(self._serve)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._threads[0].join(_PATIENCE_S)


class Board:
    """A board at its desk, with everything counted."""

    def __init__(self, stack: ExitStack, image: Image | None) -> None:
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dps-bench-")))
        self._tap = stack.enter_context(TpmTap(stack.enter_context(Swtpm(self.folder / "tpm")).port))
        cloud = stack.enter_context(EmulatorProcess("--enroll-any", "--retry-after", "0"))
        self._relays = {
            name: stack.enter_context(Counted(port)) for name, port in (("dps", cloud.port), ("hub", cloud.hub_port))
        }
        ntp = stack.enter_context(NtpServer())
        self._image = image or build(self.folder / "image")
        roots = self.folder / "roots.der"
        roots.write_bytes(der(cloud.ca_file))
        document = {
            "id_scope": "0ne00000000",
            "registration_id": DEVICE,
            "connect_to": self._relays["dps"].address,
            "ca_file": str(roots),
            "state_dir": "/flash/dps-agent",
            "tpm": {"tcti": self._tap.tcti},
            "hub": {"connect_to": self._relays["hub"].address},
            "board": {"ntp_server": ntp.address, "built_at_s": int(time.time()) - 86400},
        }
        (self.folder / "config.json").write_text(json.dumps(document))

    def wake(self, *payloads: str) -> dict[str, float]:
        """One wake in which these messages are sent."""
        self._tap.forget()
        for relay in self._relays.values():
            relay.forget()
        paths = str(self.folder / "config.json"), str(self.folder / "flash.img")
        (said,) = micropython(
            self._image, "board_program", *paths, "once", *payloads, heap_kb=_HEAP_KB, timeout_s=_PATIENCE_S
        )
        for relay in self._relays.values():
            relay.settle()
        relays = self._relays.values()
        return {
            "tpmCommands": len(self._tap.exchanges),
            "connections": sum(relay.connections for relay in relays),
            "sentBytes": sum(relay.bytes[0] for relay in relays),
            "receivedBytes": sum(relay.bytes[1] for relay in relays),
            "sentPackets": sum(relay.packets[0] for relay in relays),
            "receivedPackets": sum(relay.packets[1] for relay in relays),
            "commits": len(said["commits"]),
            "flashErases": said["flash"][0],
            "flashPrograms": said["flash"][1],
            "awakeMs": said["awakeMs"],
        }


def measured(count: int, image: Image | None = None) -> Report:
    """The first wake of a board, which registers, and the median of `count` later ones."""
    report = Report("wake", f"median of {count}, the first wake once; unix port of MicroPython, software TPM")
    with ExitStack() as stack:
        board = Board(stack, image)
        report.row("first, registers", board.wake("1"))
        for name, payloads in {
            "later": ["1"],
            f"later, {MESSAGES} messages": ["1"] * MESSAGES,
        }.items():
            wakes = [board.wake(*payloads) for _ in range(count)]
            report.row(name, {key: statistics.median(wake[key] for wake in wakes) for key in wakes[0]})
    return report
