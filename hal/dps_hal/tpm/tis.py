"""A TPM on a bus, driven by its FIFO registers, on CPython and MicroPython; `spi` and `i2c` have the buses.

Registers, states and time limits: TCG PC Client Platform TPM Profile for TPM 2.0 (PTP), the FIFO interface.
"""

from dps_hal.errors import RetryLater
from dps_hal.platform import ms_since, pause_us, ticks_ms

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Final, Protocol

    from dps_hal.contracts import WhileWaiting

    class Bus(Protocol):
        """A TPM's registers, by their PTP offsets in locality 0; OSError where the TPM does not take part."""

        name: str
        frame_bytes: int  # what one transfer carries at most

        def start(self) -> None:
            """Learns what the TPM can do; its access register alone may be read before."""
            ...

        def read_into(self, register: int, into: "bytearray | memoryview") -> None:
            """1 to `frame_bytes` bytes."""
            ...

        def write(self, register: int, content: "bytes | memoryview") -> None:
            """1 to `frame_bytes` bytes."""
            ...

        def agrees(self, content: "bytes | bytearray") -> bool:
            """Whether the TPM's checksum of what went through the FIFO is that of `content`; True where it has none."""
            ...


ACCESS: "Final" = 0x000  # PTP, table 19, with the next four
_STATUS: "Final" = 0x018
_FIFO: "Final" = 0x024
DID_VID: "Final" = 0xF00
RID: "Final" = 0xF04

_ACCESS_VALID: "Final" = 0x80  # TPM_ACCESS_x: tpmRegValidSts, activeLocality, requestUse, and bits that read 0
_ACCESS_ACTIVE: "Final" = 0x20
_ACCESS_REQUEST: "Final" = 0x02
_ACCESS_ZERO: "Final" = 0x48

_VALID: "Final" = 0x80  # TPM_STS_x: stsValid, commandReady, tpmGo, dataAvail, Expect, responseRetry, read as 0
_READY: "Final" = 0x40
_GO: "Final" = 0x20
_AVAILABLE: "Final" = 0x10
_EXPECT: "Final" = 0x08
_RETRY: "Final" = 0x02
_STATUS_ZERO: "Final" = 0x23

_TIMEOUT_A_MS: "Final" = 750  # PTP, interface timeouts
_TIMEOUT_C_MS: "Final" = 200
# PTP gives a transfer TIMEOUT_C and D, 200 and 30 ms; parts exceed them, and patience costs something only where all
# is lost. TIMEOUT_B, 2 s to become ready, is not for a TPM that is in a command which it cannot abort.
_FIFO_MS: "Final" = _TIMEOUT_A_MS
_HEARD_MS: "Final" = 500
_FIRST_PAUSE_US: "Final" = 50
_LONGEST_PAUSE_US: "Final" = 10_000
_TRIES: "Final" = 3  # for a command that the TPM has not begun, or a response that it offers again
_MAX_RESPONSE_BYTES: "Final" = 4096
# Of RST#: parts need microseconds and start within 30 ms, as PTP has it, some of them in twice that.
_RESET_US: "Final" = 2000
_START_UP_US: "Final" = 60_000


def _longer(pause: int) -> int:
    """Does nothing for `pause` microseconds; returns the next pause."""
    pause_us(pause)
    return min(2 * pause, _LONGEST_PAUSE_US)


class TisTransport:
    """A `Transport` over either bus; the first command takes the TPM's locality 0, `close` gives it back.

    Nobody else may use the bus while a command is under way. `reset` is the pin of the TPM's RST#, where it is wired:
    a TPM that left a command without its response is reset before the next one.
    """

    def __init__(self, bus: "Bus", reset: "Callable[[int], object] | None" = None) -> None:
        self.identity = (0, 0, 0)  # vendor, device, revision of the TPM, from when it first answered
        self._bus = bus
        self._reset = reset
        self._answered = True
        self._word = bytearray(4)
        self._while_waiting: WhileWaiting | None = None
        self._started_ms = self._heard_ms = self._limit_ms = 0
        self._opened = False

    def send(self, command: bytes, limit_s: float, while_waiting: "WhileWaiting | None") -> bytes:
        """As `Transport.send`; RetryLater `tpm.absent`, `tpm.busy`: no TPM on the bus, or another locality has it."""
        self._while_waiting = while_waiting
        self._started_ms = self._heard_ms = ticks_ms()
        self._limit_ms = int(limit_s * 1000)
        answered, self._answered = self._answered, False
        if not self._opened:
            if not answered and self._reset is not None:
                self._reset(0)
                pause_us(_RESET_US)
                self._reset(1)
                pause_us(_START_UP_US)
            self._open()
        self._give(command)
        self._write(_STATUS, _GO)
        self._wait(_VALID | _AVAILABLE, _VALID | _AVAILABLE, self._limit_ms, "answer")
        response = self._take()
        self._write(_STATUS, _READY)  # the TPM may forget the response
        self._answered = True
        return response

    def close(self) -> None:
        """As `Transport.close`: what the TPM is still at, it shall not finish."""
        if self._opened:
            self._opened = False
            try:
                self._write(_STATUS, _READY)
                self._write(ACCESS, _ACCESS_ACTIVE)
            except OSError:
                pass  # it is gone; the next command finds out

    # --- start-up

    def _open(self) -> None:
        """Finds the TPM, takes locality 0, and ends what an earlier user left under way."""
        try:
            access = self._access(_ACCESS_VALID)
            if not access:
                raise OSError(f"its access register reads 0x{self._word[0]:02x}")
            self._bus.start()
            self._identify()
        except OSError as error:
            raise RetryLater("tpm.absent", f"no TPM answers on the {self._bus.name} bus, check the wiring: {error}")
        if not access & _ACCESS_ACTIVE:
            self._write(ACCESS, _ACCESS_REQUEST)
            if not self._access(_ACCESS_ACTIVE):
                self._answered = True  # it does not hang: a reset would take it from its other user
                raise RetryLater("tpm.busy", "another user of the TPM did not give up its locality")
        self._opened = True

    def _access(self, wanted: int) -> int:
        """The access register once it has the bit `wanted`; 0 where it has not after TIMEOUT_A."""
        started_ms = ticks_ms()
        pause = _FIRST_PAUSE_US
        while True:
            self._bus.read_into(ACCESS, memoryview(self._word)[:1])
            access = self._word[0]
            if access & (wanted | _ACCESS_ZERO) == wanted:
                return access
            if ms_since(started_ms) > _TIMEOUT_A_MS:
                return 0
            pause = _longer(pause)

    def _identify(self) -> None:
        numbers = []
        for register, count in ((DID_VID, 4), (DID_VID, 4), (RID, 1)):
            number = bytearray(count)
            self._bus.read_into(register, number)
            numbers.append(int.from_bytes(number, "little"))
        vendor = numbers[0] & 0xFFFF
        if numbers[0] != numbers[1] or vendor in (0, 0xFFFF):
            raise OSError(f"expected a vendor twice; came 0x{numbers[0]:08x} and 0x{numbers[1]:08x}")
        self.identity = (vendor, numbers[0] >> 16, numbers[2])

    # --- a command and its response

    def _give(self, command: bytes) -> None:
        """Writes a command, again where it did not arrive: until tpmGo the TPM does nothing with it."""
        for left in range(_TRIES - 1, -1, -1):
            try:
                self._make_ready()
                self._write_fifo(command)
                if self._bus.agrees(command):
                    return
                raise OSError("the TPM's checksum of the command is not ours")
            except OSError as error:
                if not left:
                    raise error

    def _make_ready(self) -> None:
        """Brings the TPM from any state to the one in which it takes a command.

        The first commandReady ends an execution or a response, a further one makes an idle TPM ready. A TPM that was
        in a command which cannot be aborted, as making a key, gets the time of this one.
        """
        started_ms = asked_ms = ticks_ms()
        pause = _FIRST_PAUSE_US
        while not self._status() & _READY:
            if pause == _FIRST_PAUSE_US or ms_since(asked_ms) > _TIMEOUT_C_MS:
                asked_ms = ticks_ms()
                self._write(_STATUS, _READY)
            self._check_time(started_ms, self._limit_ms, "become ready")
            pause = _longer(pause)

    def _write_fifo(self, command: bytes) -> None:
        """Expect is set until the last byte and clear behind it; otherwise the TPM did not read our size."""
        content = memoryview(command)
        last = len(command) - 1
        at = 0
        while at <= last:
            end = min(at + self._burst(), last if at < last else last + 1)
            self._bus.write(_FIFO, content[at:end])
            at = end
            if at >= last:
                expect = _EXPECT if at == last else 0
                self._wait(_VALID | _EXPECT, _VALID | expect, _FIFO_MS, "take the whole command")

    def _take(self) -> bytes:
        """Reads the response, again where it did not arrive well: the TPM keeps it until commandReady."""
        left = _TRIES
        while True:
            left -= 1
            try:
                head = bytearray(10)
                self._read_fifo(memoryview(head))
                size = int.from_bytes(head[2:6], "big")
                if not 10 <= size <= _MAX_RESPONSE_BYTES:
                    raise OSError(f"the TPM states a response of {size} bytes")
                response = bytearray(size)
                response[:10] = head
                self._read_fifo(memoryview(response)[10:])
                self._wait(_VALID | _AVAILABLE, _VALID, _FIFO_MS, "end its response")
                if self._bus.agrees(response):
                    return bytes(response)
                raise OSError("the TPM's checksum of its response is not ours")
            except OSError as error:
                if not left:
                    raise error
            self._write(_STATUS, _RETRY)

    def _read_fifo(self, into: memoryview) -> None:
        at = 0
        while at < len(into):
            self._wait(_VALID | _AVAILABLE, _VALID | _AVAILABLE, _FIFO_MS, "go on with its response")
            end = min(at + self._burst(), len(into))
            self._bus.read_into(_FIFO, into[at:end])
            at = end

    # --- registers

    def _burst(self) -> int:
        """How many bytes the TPM takes or gives at once, at most those of one frame."""
        started_ms = ticks_ms()
        pause = _FIRST_PAUSE_US
        while True:
            self._status()
            burst = self._word[1] | self._word[2] << 8
            if burst:
                return min(burst, self._bus.frame_bytes)
            self._check_time(started_ms, _FIFO_MS, "make room")
            pause = _longer(pause)

    def _wait(self, mask: int, wanted: int, limit_ms: int, what: str) -> None:
        """Until the status is `wanted` under `mask`."""
        started_ms = ticks_ms()
        pause = _FIRST_PAUSE_US
        while self._status() & mask != wanted:
            self._check_time(started_ms, limit_ms, what)
            pause = _longer(pause)

    def _check_time(self, started_ms: int, limit_ms: int, what: str) -> None:
        """OSError after a step's time, RetryLater `tpm.timeout` after the command's."""
        if not self._time_left_ms():
            raise RetryLater("tpm.timeout", f"the TPM did not {what} within {self._limit_ms / 1000:.0f} s")
        if ms_since(started_ms) > limit_ms:
            raise OSError(f"the TPM did not {what} within {limit_ms} ms")

    def _time_left_ms(self) -> int:
        return max(0, self._limit_ms - ms_since(self._started_ms))

    def _status(self) -> int:
        """The status byte; burst count and the rest are then in `_word`. It reads 0xff where the locality was lost."""
        if self._while_waiting is not None and ms_since(self._heard_ms) >= _HEARD_MS:
            self._heard_ms = ticks_ms()
            self._while_waiting()
        for _ in range(_TRIES):
            self._bus.read_into(_STATUS, self._word)
            if not self._word[0] & _STATUS_ZERO:
                return self._word[0]
        raise OSError(f"the TPM's status reads 0x{self._word[0]:02x}: its locality was lost, or the bus is disturbed")

    def _write(self, register: int, value: int) -> None:
        self._bus.write(register, bytes([value]))
