"""What a program is told when something was not done: an error class for each thing that it can do about it."""

from __future__ import annotations


class AgentError(Exception):
    """Base of all: `code` (docs/codes.md), `message`, and `retry_after_s`, None where nobody has named a time.

    `accepted`: of many messages the hub has so many, the first ones.
    """

    def __init__(self, code: str, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(code, message, retry_after_s)
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s
        self.accepted = 0

    def __str__(self) -> str:
        return f"{self.message} ({self.code})"


class NotDone(AgentError):
    """It was not done. It may be later: ask again, after `retry_after_s` where it is named."""


class Unreachable(NotDone):
    """It was not done: no service answers at the socket."""


class MaybeDone(AgentError):
    """Nobody knows whether it was done. Ask again where twice is better than never."""


class Refused(AgentError):
    """It was not done and will not be as it was asked for: asking again is no use."""


class SpoolFailed(AgentError):
    """The spool on the disk cannot be read or written; what was to be put into it is not in it."""
