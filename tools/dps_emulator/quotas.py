"""How much a service takes: requests by the minute or from a bucket, and connections one after the other.

Values only: whoever asks brings the time, in seconds of any clock. One that is set back takes nothing from a quota.
A gate wants a clock that does not run backwards. Runs on MicroPython too.
"""

MINUTE = "minute"
BUCKET = "bucket"


class Quota:
    """`per_minute` requests a minute.

    By "minute" what is left of a minute is lost; minutes begin where the clock's do. By "bucket" the right to a request
    comes continuously, and at most `burst` of them wait.
    """

    def __init__(self, per_minute: float, by: str = MINUTE, burst: "float | None" = None) -> None:
        self.per_minute = per_minute
        self.by = by
        self.burst = max(per_minute / 60 if burst is None else burst, 1.0)
        self._left = per_minute if by == MINUTE else self.burst
        self._at_s: float | None = None  # the time at which that was so

    def take(self, now_s: float) -> bool:
        """Whether one more request is granted."""
        at_s = now_s if self._at_s is None else self._at_s
        if self.by == BUCKET:
            self._left = min(self.burst, self._left + max(now_s - at_s, 0) * self.per_minute / 60)
        elif now_s // 60 != at_s // 60:
            self._left = self.per_minute + self._left % 1  # where there are 1.5 a minute, every other one has two
        self._at_s = now_s
        if self._left < 1:
            return False
        self._left -= 1
        return True

    def wait_s(self, now_s: float) -> float:
        """How long whoever was refused just now has to wait at least."""
        if self.by == BUCKET:
            return (1 - self._left) * 60 / self.per_minute
        return 60 - now_s % 60


class Gate:
    """`per_s` connections a second; those beyond wait for up to `queue_s`, then they are turned away.

    What was not used of the last `burst_s` seconds may be used at once.
    """

    def __init__(self, per_s: float, queue_s: float = 0.0, burst_s: float = 1.0) -> None:
        self.per_s = per_s
        self.queue_s = queue_s
        self.burst_s = burst_s
        self._next_s = 0.0  # when the next one may come in

    def wait_s(self, now_s: float) -> "float | None":
        """How long one more has to wait before it is let in; None: it is turned away."""
        due_s = max(self._next_s, now_s - max(self.burst_s, 1 / self.per_s)) + 1 / self.per_s
        if due_s - now_s > self.queue_s:
            return None
        self._next_s = due_s
        return max(due_s - now_s, 0.0)
