"""Many messages of telemetry in one request: the lines of its body, sent side by side as far as a user's share goes.

A batch has bytes of its user's share for its whole body, and for one topic, from the beginning; each message takes its
part of them along, and what one more beside it needs: a place, and the bytes of another topic. The first that is
not accepted ends it: what is under way is waited for, and nothing more is sent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    from dps_agent.hub_effects import SendTelemetry


class Messages(NamedTuple):
    """The messages of a body, one a line; all but their payloads is that of `event`."""

    event: SendTelemetry
    body: bytes

    def number(self) -> int:
        """How many there are."""
        return sum(1 for _ in self.payloads())

    def payloads(self) -> Iterator[bytes]:
        """One after the other: a body may have a hundred thousand, and the list of them would be larger than itself."""
        at = 0
        while at < len(self.body):
            end = self.body.find(b"\n", at)
            end = len(self.body) if end < 0 else end
            if line := self.body[at:end].strip():
                yield line
            at = end + 1


class Batch:
    """One such request under way. It is told what becomes of its messages, and says how many the hub has."""

    def __init__(self, messages: Messages, request_id: int, topic_size: int, held: int) -> None:
        self.event = messages.event
        self.request_id = request_id  # under which the program waits
        self.topic_size = topic_size  # bytes
        self.held = held  # bytes of its user's share that no message has taken along yet
        self.of = messages.number()
        self.under_way: dict[int, int] = {}  # request id of a message -> its number in the body
        self.accepted = 0  # so many messages, from the first line on, the hub has
        self.ahead: set[int] = set()  # numbers of those that were accepted before an earlier one was
        self.failures: dict[int, Any] = {}  # number of a message that was not accepted -> the answer to it
        self._payloads = messages.payloads()
        self._next = next(self._payloads, None)
        self._sent = 0

    def waiting(self) -> bytes | None:
        """The next message to send; None where there is none, or nothing more is to be sent."""
        return None if self.failures else self._next

    def send(self, request_id: int) -> None:
        """The next message goes out under this id."""
        self.under_way[request_id] = self._sent
        self._sent += 1
        self.held -= len(self._next or b"")
        self._next = next(self._payloads, None)

    def end(self, request_id: int, failure: Any) -> None:
        """One message was answered for."""
        number = self.under_way.pop(request_id)
        if failure is not None:
            self.failures[number] = failure
            return
        self.ahead.add(number)
        while self.accepted in self.ahead:
            self.ahead.remove(self.accepted)
            self.accepted += 1
