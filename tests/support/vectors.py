"""The test vectors of tests/vectors: JSON objects, loaded on both runtimes."""

import binascii

from dps_hal.platform import from_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_FOLDER = __file__.replace("\\", "/").rsplit("/", 2)[0] + "/vectors/"  # no os.path on MicroPython


def load(name: str) -> "dict[str, Any]":
    """The vectors of `tests/vectors/{name}.json`."""
    with open(_FOLDER + name + ".json", "rb") as file:
        return from_json(file.read())  # type: ignore[no-any-return]


def unhex(text: str) -> bytes:
    """The bytes that the hexadecimal `text` stands for."""
    return binascii.unhexlify(text)


def unbase64(text: str) -> bytes:
    """The bytes that the base64 `text` stands for."""
    return binascii.a2b_base64(text)
