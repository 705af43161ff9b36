"""What the emulated Cortex-M3 runs: the shared tests, the contract of every Tpm, one activation step by step.

The host (`cortex_machine`) calls one function after the other on the board's REPL and reads what they print: one JSON
object a line. A TPM is at the other end of UART 0, another one behind UART 1.
"""

import binascii
import gc
import json
import sys

import cortex_m3  # type: ignore[import-not-found]  # the image's own module, of cortex_m3/cortex_m3.c

from dps_hal.errors import RetryLater
from dps_hal.platform import aes128_cfb, declare_random_source, hmac_sha256, random_bytes, sha256
from dps_hal.tpm.keys import kdfa, oaep_encrypt
from dps_hal.tpm.wire import WireTpm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from dps_hal.contracts import WhileWaiting

SLICE_MS = 500  # of a wait, so that `while_waiting` is called at least once a second
HEADER_BYTES = 10
MAX_RESPONSE_BYTES = 4096
COLLECT_AFTER_BYTES = 32768  # or what lives long lies scattered over the heap, and nothing large fits any more

_state: "dict[str, Any]" = {"drawn": 0}


def foreseeable_bytes(count: int) -> bytes:
    """`count` bytes that are the same after each start: nothing of this image may guard a real key."""
    content = b""
    while len(content) < count:
        _state["drawn"] += 1
        content += sha256(b"for tests only %d" % _state["drawn"])
    return content[:count]


class UartTransport:
    """A TPM that takes raw commands over a UART, as swtpm's data port does."""

    def __init__(self, uart: int) -> None:
        self._uart = uart

    def send(self, command: bytes, limit_s: float, while_waiting: "WhileWaiting | None") -> bytes:
        """As `Transport.send`."""
        limit_ms = int(limit_s * 1000)
        if cortex_m3.write(self._uart, command, limit_ms) != len(command):
            raise RetryLater("tpm.timeout", f"UART {self._uart} took no command within {limit_s} s")
        response = b""
        wanted = HEADER_BYTES
        while len(response) < wanted:
            piece = cortex_m3.read(self._uart, wanted - len(response), min(SLICE_MS, limit_ms))
            response += piece
            if len(response) == HEADER_BYTES:
                wanted = min(int.from_bytes(response[2:6], "big"), MAX_RESPONSE_BYTES)
            elif len(response) < wanted:
                limit_ms -= SLICE_MS
                if limit_ms <= 0:
                    raise RetryLater("tpm.timeout", f"no answer came from UART {self._uart} within {limit_s} s")
                if while_waiting is not None:
                    while_waiting()
        return response

    def close(self) -> None:
        """As `Transport.close`: a UART stays where it is."""


def report(**values: "Any") -> None:
    """One line for the host."""
    print(json.dumps(values))


def measured(step: str, function: "Callable[[], Any]") -> "Any":
    """What `function` returns; reports the ticks it took without those that a TPM took, and the heap it allocated."""
    gc.collect()
    gc.disable()
    heap_before = gc.mem_alloc()  # type: ignore[attr-defined]
    started = cortex_m3.ticks()
    waited = cortex_m3.waited_ticks()
    try:
        value = function()
    finally:
        waited = cortex_m3.waited_ticks() - waited
        ticks = cortex_m3.ticks() - started - waited
        heap = gc.mem_alloc() - heap_before  # type: ignore[attr-defined]
        gc.enable()
    report(step=step, ticks=ticks, waited_ticks=waited, heap_bytes=heap)
    return value


def start() -> None:
    """The first call: says what this image is."""
    declare_random_source(foreseeable_bytes)
    gc.threshold(COLLECT_AFTER_BYTES)  # type: ignore[attr-defined]
    gc.collect()
    version = ".".join([str(part) for part in sys.implementation.version[:3]])
    heap = gc.mem_free() + gc.mem_alloc()  # type: ignore[attr-defined]
    report(
        machine=sys.implementation._machine,
        version=version,
        heap_bytes=heap,
        free_bytes=gc.mem_free(),  # type: ignore[attr-defined]
    )


def show_keys() -> None:
    """Reads the TPM's two keys, as a device's first start does; on a new TPM they are created."""
    tpm = _state["tpm"] = WireTpm(UartTransport(0), exclusive=True)
    ek = measured("endorsement key", tpm.endorsement_key)
    srk = measured("storage root key", tpm.storage_root_key)
    report(ek=binascii.hexlify(ek).decode(), srk=binascii.hexlify(srk).decode())


def activate(activation_hex: str, message_bytes: int) -> None:
    """Imports the key that was made for this TPM, and signs that many zero bytes with it, twice."""
    activation = binascii.unhexlify(activation_hex)
    tpm = _state["tpm"]
    wrapped_key = measured("activation (import_key)", lambda: tpm.import_key(activation))
    signature = measured("signature (Load, HMAC, Flush)", lambda: tpm.sign(wrapped_key, bytes(message_bytes)))
    measured("release", tpm.release)
    cold = measured("first signature after a start", lambda: tpm.sign(wrapped_key, bytes(message_bytes)))
    tpm.release()
    report(signature=binascii.hexlify(signature).decode(), same=cold == signature)


def measure_parts(ek_hex: str) -> None:
    """What an activation is made of, one by one."""
    ek = binascii.unhexlify(ek_hex)
    key = bytes(range(32))
    measured("nothing (the measurement)", lambda: None)
    measured("SHA-256 of 1024 bytes", lambda: sha256(bytes(1024)))
    measured("HMAC-SHA256 of 64 bytes", lambda: hmac_sha256(key, bytes(64)))
    measured("HMAC-SHA256 of 1024 bytes", lambda: hmac_sha256(key, bytes(1024)))
    measured("KDFa to 256 bits", lambda: kdfa(key, b"CFB\x00", key, key, 256))
    measured("AES-128-CFB of 16 bytes", lambda: aes128_cfb(key[:16], bytes(16), decrypt=False))
    measured("AES-128-CFB of 256 bytes", lambda: aes128_cfb(key[:16], bytes(256), decrypt=False))
    measured("salt by RSA-OAEP to the EK", lambda: oaep_encrypt(ek, key, b"SECRET\x00", random_bytes(32)))


def run_contract() -> None:
    """Every claim of the contract of Tpm, each with two TPM objects of its own."""
    from contracts.tpm import CLAIMS

    for claim in CLAIMS:
        tpms = [WireTpm(UartTransport(uart)) for uart in (0, 1)]
        _run("contracts/tpm.py", claim.__name__, lambda: claim(tpms[0], tpms[1]))
        for tpm in tpms:
            tpm.release()


def run_tests(root: str, folder: str, name: str, left_out: "tuple[str, ...]") -> None:
    """The other test functions of the module `name` in `root`/`folder`; what needs more memory is reported as such."""
    path = folder + "/" + name + ".py"
    sys.path.insert(0, root + "/" + folder)
    module = _run(path, "", lambda: __import__(name))
    gc.threshold(COLLECT_AFTER_BYTES)  # type: ignore[attr-defined]  # what the tests import may have set another one
    if module is not None:
        for test in sorted(dir(module)):
            if test.startswith("test_") and test not in left_out and callable(getattr(module, test)):
                _run(path, test, getattr(module, test))


def _run(path: str, test: str, function: "Callable[[], Any]") -> "Any":
    """Calls it and reports how it went; `test` is empty for the import of the file, which is reported if it fails."""
    gc.collect()
    started = cortex_m3.ticks()
    try:
        value = function()
    except MemoryError as error:
        report(file=path, test=test, lacks_memory=str(error))
        return None
    except Exception as error:
        report(file=path, test=test, failure=f"{type(error).__name__}: {error}")
        sys.print_exception(error)  # type: ignore[attr-defined]
        return None
    if test:
        report(file=path, test=test, ticks=cortex_m3.ticks() - started)
    return value
