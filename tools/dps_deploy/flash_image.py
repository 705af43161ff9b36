"""The image of a board's file system, and where boards have it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

BLOCK_BYTES = 4096  # erased at once: RP2 and ESP32, and nearly every SPI flash
PROGRAM_BYTES = 256  # a page; firmware mounts an image whatever it programs at once
DISK_VERSION = 0x00020000  # the oldest, so every firmware writes on in it


class Partition(NamedTuple):
    """Where a firmware has its file system, address in the flash and length in bytes; its heap without PSRAM."""

    address: int
    length: int
    heap_kib: int  # with the memory that TLS has beside it on an ESP32


# From the firmware's sources: ports/rp2/boards/*/mpconfigboard.cmake (the end of the flash), and
# ports/esp32/partitions-4MiB.csv and its fellows (what is left behind the first 2 MiB); C3 and C6: modules with 4 MiB.
# A C3's heap is that of github.com/micropython/micropython/issues/14293, before it joins a Wi-Fi; a C6 has more memory.
BOARDS = {
    "rpi-pico-w": Partition(0x10000000 + 0x200000 - 868352, 868352, 205),
    "rpi-pico2-w": Partition(0x10000000 + 0x400000 - 2621440, 2621440, 456),
    "esp32-4m": Partition(0x200000, 0x200000, 149),
    "esp32-8m": Partition(0x200000, 0x600000, 149),
    "esp32-16m": Partition(0x200000, 0xE00000, 149),
    "esp32-s3-8m": Partition(0x200000, 0x600000, 2048),  # with PSRAM, of which there are 2 MiB at least
    "esp32-s3-16m": Partition(0x200000, 0xE00000, 2048),
    "esp32-c3": Partition(0x200000, 0x200000, 198),
    "esp32-c6": Partition(0x200000, 0x200000, 198),
}


class DoesNotFit(Exception):
    """The files need more room than the image has; the text says so."""


def littlefs_image(files: Mapping[str, bytes], length: int) -> bytes:
    """A littlefs of `length` bytes that holds `files`, by path. DoesNotFit."""
    from littlefs import LittleFS, LittleFSError

    system = LittleFS(
        block_size=BLOCK_BYTES,
        block_count=length // BLOCK_BYTES,
        read_size=PROGRAM_BYTES,
        prog_size=PROGRAM_BYTES,
        cache_size=PROGRAM_BYTES,
        disk_version=DISK_VERSION,
    )
    try:
        for path, content in sorted(files.items()):
            if "/" in path:
                system.makedirs(path.rpartition("/")[0], exist_ok=True)
            with system.open(path, "wb") as file:
                file.write(content)
    except LittleFSError as error:
        if error.code != LittleFSError.Error.LFS_ERR_NOSPC:
            raise
        total = sum(map(len, files.values()))
        raise DoesNotFit(f"{total} bytes of files do not fit into an image of {length} bytes") from None
    return bytes(system.context.buffer)
