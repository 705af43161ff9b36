"""Where a TPM is, in the words of tpm2-tss or near them; for the back end that has none of it."""

from __future__ import annotations

from dps_hal.errors import AskOperator

SPI_HZ = 10_000_000  # every TPM takes it: PTP, the SPI binding
_HIGHEST_SPI_HZ = 100_000_000


def parse_tcti(tcti: str) -> tuple[str, str, int]:
    """The kind of a TCTI string, a place, and a number.

    `device:PATH`: the path of a device node, 0. `swtpm:host=HOST,port=PORT`: host and port of swtpm, which have
    tpm2-tss's own defaults. `spi:PATH` or `spi:PATH?hz=NUMBER`: the path of a spidev and the bus's clock. AskOperator
    `config.invalid` for another string.
    """
    kind, _, settings = tcti.partition(":")
    if kind == "device" and settings:
        return kind, settings, 0
    if kind == "spi":
        path, _, clock = settings.partition("?")
        frequency_hz = _whole(clock.removeprefix("hz=")) if clock.startswith("hz=") else 0 if clock else SPI_HZ
        if path and 0 < frequency_hz <= _HIGHEST_SPI_HZ:
            return kind, path, frequency_hz
    if kind == "swtpm":
        named = {"host": "127.0.0.1", "port": "2321"}
        pairs = [part.partition("=") for part in settings.split(",") if settings]
        named.update({name: value for name, _, value in pairs})
        port = _whole(named["port"])
        if len(named) == 2 and named["host"] and 0 < port < 65536:
            return kind, named["host"], port
    raise AskOperator(
        "config.invalid",
        "tcti: expected device:/dev/tpmrm0, swtpm:host=HOST,port=PORT or spi:/dev/spidev0.0?hz=10000000"
        f" for backend wire; came {tcti!r}",
    )


def is_ours_alone(tcti: str) -> bool:
    """Whether a TCTI says that no other program uses its TPM: it is on a bus without a driver, or inside this process.

    Behind the socket of a simulator other programs may have left what they still need.
    """
    kind = tcti.partition(":")[0]
    return kind in ("libtpms", "spi") or kind.startswith(("spi-", "i2c-"))


def _whole(text: str) -> int:
    """A number of at most nine digits, 0 for anything else."""
    return int(text) if text.isdecimal() and text.isascii() and len(text) <= 9 else 0
