"""One activation and one signature by WireTpm, as a board does it, with what they take of the heap.

    micropython -X heapsize=112k tests/support/tpm/wire_activation.py PORT BLOB_FILE          (in the checkout)

Prints bytes of heap in use and, last, the signature of 900 zero bytes in hexadecimal.
"""

import binascii
import gc
import sys


def heap_bytes() -> int:
    """Bytes in use."""
    gc.collect()
    return gc.mem_alloc()  # type: ignore[attr-defined,no-any-return]


def main(port: int, blob_file: str) -> None:
    """Imports the key in the blob and signs."""
    sys.path[:0] = ["hal"]
    # What the compiler leaves is freed as it comes: else it is counted, and where it lies decides what still fits.
    gc.threshold(4096)  # type: ignore[attr-defined]
    before = heap_bytes()
    from dps_hal.tpm.tcp import SwtpmTransport
    from dps_hal.tpm.wire import WireTpm

    print(f"modules: {heap_bytes() - before}")
    tpm = WireTpm(SwtpmTransport("127.0.0.1", port))
    with open(blob_file, "rb") as file:
        wrapped_key = tpm.import_key(file.read())
    signature = tpm.sign(wrapped_key, bytes(900))
    print(f"with a session: {heap_bytes() - before}")
    tpm.release()
    print(binascii.hexlify(signature).decode())


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
