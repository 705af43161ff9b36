"""What a shared test claims about errors, on both runtimes (pytest.raises exists on one)."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from dps_hal.errors import DpsError


def assert_refused(
    call: "Callable[[], object]", error_class: "type[DpsError]", code: str, reproduce: str = ""
) -> "DpsError":
    """Asserts that `call` raises exactly `error_class` with `code` and returns the error.

    `reproduce` opens the message of a failure: the one line with what it takes to see it again.
    """
    wanted = f"{reproduce}: wanted {error_class.__name__} {code}, "
    try:
        answer = call()
    except Exception as error:
        came = f"{type(error).__name__} {getattr(error, 'code', '')}: {error}"
        assert type(error) is error_class and getattr(error, "code", "") == code, wanted + "got " + came
        return error
    raise AssertionError(wanted + f"got the answer {answer!r}")


def flipped(content: bytes, bit: int) -> bytes:
    """`content` with one bit changed; bit 0 is the highest of the first byte."""
    changed = bytearray(content)
    changed[bit // 8] ^= 0x80 >> (bit % 8)
    return bytes(changed)
