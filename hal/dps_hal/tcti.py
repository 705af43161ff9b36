"""Where a TPM is, in the words of tpm2-tss; for the back end that has none of it."""

from __future__ import annotations

from dps_hal.errors import AskOperator


def parse_tcti(tcti: str) -> tuple[str, int]:
    """A device node's path and 0 for `device:PATH`, host and port of swtpm for `swtpm:host=HOST,port=PORT`.

    Host and port have tpm2-tss's own defaults. AskOperator `config.invalid` for another string.
    """
    kind, _, settings = tcti.partition(":")
    if kind == "device" and settings:
        return settings, 0
    if kind == "swtpm":
        named = {"host": "127.0.0.1", "port": "2321"}
        pairs = [part.partition("=") for part in settings.split(",") if settings]
        named.update({name: value for name, _, value in pairs})
        port = int(named["port"][:6]) if named["port"].isdecimal() and named["port"].isascii() else 0
        if len(named) == 2 and named["host"] and 0 < port < 65536:
            return named["host"], port
    raise AskOperator(
        "config.invalid",
        f"tcti: expected device:/dev/tpmrm0 or swtpm:host=HOST,port=PORT for backend wire; came {tcti!r}",
    )
