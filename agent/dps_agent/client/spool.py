"""Telemetry on the disk until the hub has it: bounded, in order, at least once.

A message is in the spool once `put` has returned, and leaves it once the hub has acknowledged it, or by the rules that
bound the spool. SQLite does it with a write-ahead log and `synchronous=FULL`: `put` and `forget` return once the disk
has what they wrote, so that neither a kill at any instant nor a power cut loses a message or brings one back into
another place. What was acknowledged just before such an end may be sent again; `$.mid` tells the hub's side.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import stat
import threading
import time
from contextlib import contextmanager, suppress
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from dps_agent.client.errors import NotDone, Refused, SpoolFailed
from dps_agent.client.values import MESSAGE_LIMIT, Request, message_size, with_more_properties

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

OLDEST = "oldest"
NEWEST = "newest"
DROPPED = ("age", "room", "refused", "unanswered")  # why a message went that the hub has not acknowledged
ROW_SIZE = 128  # bytes that count for a message beside its body and its properties
OWN_PROPERTIES = 64  # bytes that the hub counts of `$.mid` and `$.ctime`, at most
_BELIEVABLE_S = 1_700_000_000  # UTC; a clock that says less was never set
_VERSION = 1
_TIMESYNCD_SAYS_SO = "/run/systemd/timesync/synchronized"  # systemd-timesyncd(8); the kernel may say so later
_TIME_ERROR = 5  # what adjtimex(2) returns for a clock that nobody keeps
_TIMEX_SIZE = 512  # bytes; struct timex has 208, `modes` (0: only read) is its first field
_making = threading.Lock()  # until a new file is closed: to close it drops all locks that this process has on it
_log = logging.getLogger("dps_agent.client")
_TABLES = """
CREATE TABLE message (
    number INTEGER PRIMARY KEY AUTOINCREMENT,  -- never given twice
    target TEXT NOT NULL,
    body BLOB NOT NULL,
    size INTEGER NOT NULL,
    boot TEXT NOT NULL,      -- which start of the machine
    since_boot_s REAL NOT NULL,
    utc_s REAL NOT NULL
);
CREATE TABLE about (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
"""

_COLUMNS = "number, target, {}, size, boot, since_boot_s, utc_s FROM message ORDER BY number"
_FIRST = f"SELECT {_COLUMNS.format('body')} LIMIT 1"
_IN_ORDER = f"SELECT {_COLUMNS.format('NULL')}"


class Stored(NamedTuple):
    """One message: its number and what is to be asked for."""

    number: int
    request: Request


class Moment(NamedTuple):
    """Now, by the clock that counts since the machine's start and by the one that is set (0: nobody keeps it)."""

    boot: str
    since_boot_s: float
    utc_s: float


class Spool:
    """Messages in the file at `path`, which one program has open at a time; threads may share it.

    `max_bytes` and `max_messages` bound it; where there is no room `drop_first` says what goes: "oldest" makes room by
    dropping those that wait longest, "newest" refuses what is to be put in (NotDone `agent.spool_full`). What is older
    than `max_age_s` is dropped in any case. All that is dropped is counted in `dropped` and logged. SpoolFailed where
    the disk does not do it.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_bytes: int = 64 * 1024 * 1024,
        max_messages: int = 100_000,
        max_age_s: float = 7 * 86400.0,
        drop_first: str = OLDEST,
    ) -> None:
        if drop_first not in (OLDEST, NEWEST):
            raise Refused("agent.usage", f"drop_first: expected 'oldest' or 'newest'; came {drop_first!r}")
        if min(max_bytes, max_messages, max_age_s) <= 0:
            raise Refused("agent.usage", "max_bytes, max_messages, max_age_s: expected more than 0")
        self._path = os.fspath(path)
        self._max_bytes = max_bytes
        self._max_messages = max_messages
        self._max_age_s = max_age_s
        self._drop_first = drop_first
        self._lock = threading.Lock()
        self._count = self._size = 0  # of what is in the file, which nobody else writes
        with self._failures():
            with _making:
                _make_private(self._path)
            self._base = sqlite3.connect(self._path, timeout=2.0, isolation_level=None, check_same_thread=False)
        try:
            with self._failures():
                self._open()
        except BaseException:
            self._base.close()
            raise

    def put(self, requests: Sequence[Request]) -> None:
        """Stores telemetry, all of it or nothing; it is on the disk when this returns. Refused what no hub takes."""
        if any("%24qos=" in request.target for request in requests):
            raise Refused("agent.usage", "a spool waits for the hub's acknowledgement, which QoS 0 does without")
        largest = max(map(message_size, requests), default=0)
        if largest > MESSAGE_LIMIT - OWN_PROPERTIES:
            room = f"expected at most {MESSAGE_LIMIT - OWN_PROPERTIES} bytes of body and properties in a message"
            raise Refused("agent.too_large", f"{room}; came {largest}")
        sizes = [ROW_SIZE + len(request.target) + len(request.body) for request in requests]
        if sum(sizes) > self._max_bytes or len(sizes) > self._max_messages:
            raise Refused(
                "agent.too_large", f"the spool takes {self._max_bytes} bytes and {self._max_messages} messages"
            )
        now = moment()
        with self._transaction() as base:
            self._make_room(base, len(sizes), sum(sizes), now)
            self._count += len(sizes)
            self._size += sum(sizes)
            base.executemany(
                "INSERT INTO message (target, body, size, boot, since_boot_s, utc_s) VALUES (?, ?, ?, ?, ?, ?)",
                [(request.target, request.body, size, *now) for request, size in zip(requests, sizes, strict=True)],
            )

    def first(self) -> Stored | None:
        """The oldest message, None where there is none; what is too old is dropped."""
        now = moment()
        with self._lock, self._failures():
            row = self._base.execute(_FIRST).fetchone()
        while row is not None and _age_s(row, now) > self._max_age_s:
            with self._transaction() as base:
                self._drop(base, [row[0]], "age")
                row = base.execute(_FIRST).fetchone()
        if row is None:
            return None
        number, target, body = row[:3]
        made_s = _made_s(row, now)
        more = {"$.mid": f"{self._name}-{number}", **({"$.ctime": _iso(made_s)} if made_s is not None else {})}
        return Stored(number, Request("POST", with_more_properties(target, more), body))

    def forget(self, number: int, reason: str = "", why: str = "") -> None:
        """The hub has this message, or it is dropped for a `reason` out of DROPPED; the log has `why`."""
        with self._transaction() as base:
            if reason:
                self._drop(base, [number], reason, why)
            else:
                self._delete(base, number)

    @property
    def dropped(self) -> dict[str, int]:
        """How many messages went for which of DROPPED, since the file was made."""
        with self._lock, self._failures():
            rows = dict(self._base.execute("SELECT name, value FROM about").fetchall())
        return {reason: rows.get(reason, 0) for reason in DROPPED}

    def __len__(self) -> int:
        return self._count

    def close(self) -> None:
        """Idempotent."""
        with self._lock:
            self._base.close()

    def _open(self) -> None:
        base = self._base
        # One program has the file for itself: no other one reads or sends from it, and no memory is shared by a file.
        base.execute("PRAGMA locking_mode = EXCLUSIVE")
        if base.execute("PRAGMA user_version").fetchone()[0] not in (0, _VERSION):
            raise SpoolFailed("agent.file", f"a newer version made the spool {self._path}: it is left as it is")
        base.execute("PRAGMA journal_mode = WAL")
        base.execute("PRAGMA synchronous = FULL")
        base.execute("PRAGMA journal_size_limit = 4194304")
        with self._transaction():
            if base.execute("PRAGMA user_version").fetchone()[0] == 0:
                for statement in _TABLES.split(";\n"):
                    base.execute(statement)
                base.execute("INSERT INTO about VALUES ('name', ?)", (os.urandom(6).hex(),))
                base.execute(f"PRAGMA user_version = {_VERSION}")
        self._name: str = base.execute("SELECT value FROM about WHERE name = 'name'").fetchone()[0]
        self._count, self._size = base.execute("SELECT count(*), coalesce(sum(size), 0) FROM message").fetchone()

    def _make_room(self, base: sqlite3.Connection, count: int, size: int, now: Moment) -> None:
        count += self._count - self._max_messages
        size += self._size - self._max_bytes
        going: dict[str, list[int]] = {"age": [], "room": []}
        rows = base.execute(_IN_ORDER) if count > 0 or size > 0 else ()
        for row in rows:
            if count <= 0 and size <= 0:
                break
            reason = "age" if _age_s(row, now) > self._max_age_s else "room"
            if reason == "room" and self._drop_first == NEWEST:
                raise NotDone("agent.spool_full", "the spool is full, and the oldest messages are kept")
            going[reason].append(row[0])
            count -= 1
            size -= row[3]
        for reason, numbers in going.items():
            self._drop(base, numbers, reason)

    def _drop(self, base: sqlite3.Connection, numbers: list[int], reason: str, why: str = "") -> None:
        if not numbers:
            return
        for number in numbers:
            self._delete(base, number)
        counted = "INSERT INTO about VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = value + excluded.value"
        base.execute(counted, (reason, len(numbers)))
        _log.warning(
            "the spool dropped %d messages that the hub has not acknowledged (%s)", len(numbers), why or reason
        )

    def _delete(self, base: sqlite3.Connection, number: int) -> None:
        """One message less, unless it went already."""
        for (size,) in base.execute("DELETE FROM message WHERE number = ? RETURNING size", (number,)).fetchall():
            self._count -= 1
            self._size -= size

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._failures():
            before = self._count, self._size
            self._base.execute("BEGIN IMMEDIATE")
            try:
                yield self._base
                self._base.execute("COMMIT")
            except BaseException:
                self._count, self._size = before
                if self._base.in_transaction:
                    self._base.execute("ROLLBACK")
                raise

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SpoolFailed("agent.file", f"the spool {self._path}: {error.strerror}") from error
        except sqlite3.OperationalError as error:
            more = "another program has it open" if "locked" in str(error) else str(error)
            raise SpoolFailed("agent.file", f"the spool {self._path}: {more}") from error
        except sqlite3.Error as error:
            text = f"the spool {self._path} cannot be used; move it away to begin with a new one: {error}"
            raise SpoolFailed("agent.file", text) from error


def moment() -> Moment:
    """Now."""
    utc_s = time.time() if is_synchronised() else 0.0
    return Moment(_boot(), time.clock_gettime(time.CLOCK_BOOTTIME), utc_s)


def is_synchronised() -> bool:
    """Whether something, such as NTP, keeps the system's clock; needs no privilege.

    A machine without a battery begins with a time that it remembers, of its image or its last end: that looks like one.
    """
    if os.path.exists(_TIMESYNCD_SAYS_SO):
        return True
    import ctypes

    answer: int = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(_TIMEX_SIZE))
    return answer not in (_TIME_ERROR, -1)


@cache
def _boot() -> str:
    with open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()


def _age_s(row: Sequence[Any], now: Moment) -> float:
    """How long a message has waited; where no clock can say at least as long as the machine runs."""
    boot, since_boot_s = row[4:6]
    if boot == now.boot:
        return now.since_boot_s - float(since_boot_s)
    made_s = _made_s(row, now)
    return now.since_boot_s if made_s is None else now.utc_s - made_s


def _made_s(row: Sequence[Any], now: Moment) -> float | None:
    """When it was put in, UTC: within one start of the machine by the clock that nobody sets, else as it was noted."""
    boot, since_boot_s, utc_s = row[4:7]
    if boot == now.boot:
        utc_s = now.utc_s - (now.since_boot_s - since_boot_s)
    return utc_s if utc_s >= _BELIEVABLE_S and now.utc_s >= _BELIEVABLE_S else None


def _iso(utc_s: float) -> str:
    """As `$.ctime` wants it, with milliseconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(utc_s)) + f".{int(utc_s * 1000) % 1000:03d}Z"


def _make_private(path: str) -> None:
    """Makes the file, for its owner alone, where there is none; what SQLite puts beside it gets the same mode."""
    # One that is there is looked at by its name: to close it would drop the locks that this process has on it.
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    mode = os.lstat(path).st_mode
    if not stat.S_ISREG(mode):
        raise OSError(0, "expected a file")
    if stat.S_IMODE(mode) != 0o600:
        os.chmod(path, 0o600)
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
