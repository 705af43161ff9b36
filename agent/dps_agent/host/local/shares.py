"""How much of a thing one user of the socket may have, and what is kept for whom it trusts.

A member of the clients' group is not trusted: it may use its share and no more, whatever it does and through however
many programs. Root and the service's own user are trusted with commands; the last places of each kind are theirs.
"""

from __future__ import annotations

import os
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from dps_agent.host.journal import INFO

if TYPE_CHECKING:
    from dps_agent.host.journal import Journal

LINE_EVERY_S = 3600.0
USE_EVERY_S = 86400.0  # that a user uses the socket is news once a day, however often his programs are started
LINES_LIMIT = 256  # users and kinds of lines remembered; what is beyond shares one line


class Peer(NamedTuple):
    """Who has connected: process, user and group number, as the kernel knows them."""

    process: int
    user: int
    group: int

    def __str__(self) -> str:
        return f"process {self.process} of user {self.user}"


def is_trusted(user: int) -> bool:
    """Whether commands are for this user: root, and the service's own."""
    return user in (0, os.geteuid())


class Places:
    """Places of one kind: so many `in_all`, `of_one` user who is not trusted, and the last `kept` for trusted ones."""

    def __init__(self, in_all: int, of_one: int, kept: int) -> None:
        self._in_all = in_all
        self._of_one = of_one
        self._kept = kept
        self._taken: dict[int, int] = {}  # places taken, by user

    def has_room(self, user: int, count: int = 1) -> bool:
        """Whether this user may have so many more."""
        free = self._in_all - sum(self._taken.values())
        if count <= free - self._kept and self.of(user) + count <= self._of_one:
            return True  # whoever it is
        if is_trusted(user):
            return count <= free
        others = sum(taken for other, taken in self._taken.items() if not is_trusted(other))
        return self.of(user) + count <= self._of_one and count <= min(free, self._in_all - self._kept - others)

    def take(self, user: int, count: int = 1) -> bool:
        """Takes so many for this user; False, and none is taken, where there is no room."""
        if not self.has_room(user, count):
            return False
        self._taken[user] = self.of(user) + count
        return True

    def give_back(self, user: int, count: int = 1) -> None:
        """This user has so many less."""
        left = self.of(user) - count
        if left:
            self._taken[user] = left
        else:
            self._taken.pop(user, None)

    def of(self, user: int) -> int:
        """How many this user has."""
        return self._taken.get(user, 0)


class Rate:
    """What may happen for `of_one` user so many times within `period_s`, for all not trusted `in_all` times."""

    def __init__(self, in_all: int, of_one: int, period_s: float) -> None:
        self._in_all = in_all
        self._of_one = of_one
        self._period_s = period_s
        self._times: deque[tuple[float, int]] = deque()  # when a line was said, and for which user

    def wait_s(self, user: int, now_s: float) -> float:
        """Counts once more for this user and returns 0; else how long it has to wait, and nothing is counted."""
        while self._times and self._times[0][0] <= now_s - self._period_s:
            self._times.popleft()
        own = [at_s for at_s, whose in self._times if whose == user]
        others = [at_s for at_s, whose in self._times if not is_trusted(whose)]
        bounds = [(own, self._of_one)] if is_trusted(user) else [(own, self._of_one), (others, self._in_all)]
        for times, limit in bounds:
            if len(times) >= limit:
                return times[0] + self._period_s - now_s
        self._times.append((now_s, user))
        return 0.0


class Lines:
    """Lines about users for the journal: one of each kind in a time for a user; what is left out is counted."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._next: dict[tuple[int, str], tuple[float, int]] = {}  # when the next line is due, how many were left out

    def say(
        self,
        user: int,
        kind: str,
        text: str,
        now_s: float,
        level: int = INFO,
        code: str = "",
        every_s: float = LINE_EVERY_S,
    ) -> None:
        """One line in `every_s`, or none; the event is `local`, or `warning` where there is a `code`."""
        key = (user, kind)
        if key not in self._next and len(self._next) >= LINES_LIMIT:
            self._next = {known: due for known, due in self._next.items() if due[0] > now_s}
            if len(self._next) >= LINES_LIMIT:
                key = (-1, "")
        due_s, left_out = self._next.get(key, (now_s, 0))
        if now_s < due_s:
            self._next[key] = (due_s, left_out + 1)
            return
        self._next[key] = (now_s + every_s, 0)
        more = f"; {left_out} more such lines were left out" if left_out else ""
        self._journal.event("warning" if code else "local", text + more, level, code=code)
