"""What can go wrong, named after who must act on it.

Every failure of the product is one of the four classes below and carries a stable dotted code, such as
`tpm.locked_out`, that the log and the JSON output share. The part before the first dot names the area: `tpm`,
`store`, `dps`, `network`, `clock`, `config`, `record`, `agent`. `dps_hal.host.codes` lists every code with its remedy;
it is not imported here because a board has no room for prose.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final


class DpsError(Exception):
    """The base of the four classes; never raised itself.

    `code` is the stable dotted code, `message` says what was expected and what came, `retry_after_s` is the time in
    seconds after which a new try makes sense (None: the caller's own back-off decides), `request_id` is DPS's
    tracking id where an answer carried one.
    """

    def __init__(self, code: str, message: str, retry_after_s: "int | None" = None, request_id: str = "") -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s
        self.request_id = request_id

    def __str__(self) -> str:
        return self.message


class RetryLater(DpsError):
    """It may work later without anybody doing anything: throttled, no network, TPM locked out."""


class AskOperator(DpsError):
    """Somebody must change something: enrolment, settings, permissions, hardware."""


class IdentityStale(DpsError):
    """The identity or the answer no longer fits this TPM: register again, keep the old identity until commit."""


class Broken(DpsError):
    """The program contradicts itself: our bug, to be reported."""


EXIT_GROUPS: "Final" = ("ok", "failed", "usage", "retry", "refused", "tpm", "config")  # index = exit status, for ever


def exit_group(error: DpsError) -> str:
    """The word of `EXIT_GROUPS` under which the command line reports `error`."""
    area = error.code.split(".")[0]
    if area in ("tpm", "config"):
        return area
    if isinstance(error, RetryLater):
        return "retry"
    if isinstance(error, AskOperator) and area == "dps":
        return "refused"
    return "failed"
