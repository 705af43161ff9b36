"""Where a TPM is, in the words of tpm2-tss or near them; for the back end that has none of it."""

from __future__ import annotations

from dps_hal.errors import AskOperator
from dps_text import whole_number

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
        name, _, number = (clock or f"hz={SPI_HZ}").partition("=")
        frequency_hz = whole_number(number, 1, _HIGHEST_SPI_HZ) if name == "hz" else None
        if path and frequency_hz:
            return kind, path, frequency_hz
    if kind == "swtpm":
        named = {"host": "127.0.0.1", "port": "2321"}
        pairs = [part.partition("=") for part in settings.split(",") if settings]
        named.update({name: value for name, _, value in pairs})
        port = whole_number(named["port"], 1, 65535)
        if len(named) == 2 and named["host"] and port:
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
