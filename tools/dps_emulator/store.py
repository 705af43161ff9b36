"""What survives a restart: one SQLite database in the state folder; without a folder the same in memory.

The contract, which service and hubs know: `enrollments` and `registrations` are mappings by registration id, `groups`
is one of enrolment groups by their ids, `devices` has one for each hub by device id (all in lower case),
`registrations.at` finds who has a place in a hub, `messages` is what arrived from devices, and what happens within
`transaction` happens whole or not at all. What a call has written survives the end of the process at any later point; a
power cut may lose the last half minute, and damages nothing.

Records are JSON in the same form as the service API has them. Several processes may have a folder's database open, so
that `enroll-import` and `move` reach a server that is running; each access reads it again.
"""

import contextlib
import functools
import json
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from dps_emulator.enrollments import Enrollment, enrollment_from_json, registration_key
from dps_emulator.hub_devices import FILE_LIMIT_BYTES, MESSAGES_KEPT, HubDevice, Telemetry
from dps_emulator.registrations import Registration, Registrations, StateError

DATABASE = "state.db"
VERSION = 2  # of the tables, SQLite's user_version
PAGE = 500  # records that a walk over all of them reads at once
_READ_KEPT = 128  # enrolments; each step of a registration asks for the same one
_BUSY_S = 10.0  # how long another process may hold the database
_TABLES = """
CREATE TABLE enrollments (key TEXT PRIMARY KEY, record TEXT NOT NULL);
CREATE TABLE registrations (key TEXT PRIMARY KEY, hub TEXT, device TEXT, record TEXT NOT NULL);
CREATE INDEX places ON registrations (hub, device);
CREATE TABLE devices (hub TEXT, key TEXT, record TEXT NOT NULL, PRIMARY KEY (hub, key));
CREATE TABLE messages (number INTEGER PRIMARY KEY AUTOINCREMENT, device TEXT NOT NULL, record BLOB NOT NULL);
"""
_GROUPS = "CREATE TABLE enrollment_groups (key TEXT PRIMARY KEY, record TEXT NOT NULL)"  # since version 2

Record = TypeVar("Record")


class Store:
    """Everything that the emulator remembers. May be used by several threads, one of them at a time."""

    def __init__(self, path: Path | None = None, messages_limit_bytes: int = FILE_LIMIT_BYTES) -> None:
        """Opens the database at `path`, made where there is none (0600); None: in memory. Raises StateError."""
        self.path = path
        self._lock = threading.RLock()
        if path is not None:
            with contextlib.suppress(FileExistsError), _named(path):
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))  # its companions get its mode
        with self._failures():
            self._connection = sqlite3.connect(
                ":memory:" if path is None else path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False
            )
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")  # written at once, on the disk a little later
            self._connection.execute("PRAGMA wal_autocheckpoint = 4000")
        self._make_tables()
        of_enrollments = Enrollment.to_json, enrollment_from_json
        self.enrollments = Records(self, "enrollments", *of_enrollments, kept=_READ_KEPT)
        self.groups = Records(self, "enrollment_groups", *of_enrollments, kept=_READ_KEPT)
        self.registrations = StoredRegistrations(self, "registrations", Registration.to_json, Registration.from_json)
        self.messages = Messages(self, messages_limit_bytes)

    def enroll(self, enrollments: Iterable[Enrollment]) -> int:
        """Adds or replaces enrolments and groups; how many were replaced. Raises StateError."""
        keyed = [(registration_key(each.registration_id), each) for each in enrollments]
        replaced = 0
        with self.transaction():
            for records, is_group in ((self.enrollments, False), (self.groups, True)):
                some = [(key, enrollment) for key, enrollment in keyed if enrollment.is_group == is_group]
                replaced += len(some) - records.put(some, replace=False)
                records.put(some)
        return replaced

    def devices(self, hub: str) -> "Records[HubDevice]":
        """The devices of one hub; keys are lower-case device ids."""
        return Records(self, "devices", HubDevice.to_json, HubDevice.from_json, hub.lower())

    def close(self) -> None:
        """Ends the use of the database; idempotent."""
        with self._lock, self._failures():
            self._connection.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All that is written within becomes true at its end, or nothing of it; one within another is part of it."""
        with self._lock:
            if self._connection.in_transaction:
                yield
                return
            self.rows("BEGIN IMMEDIATE")
            try:
                yield
                self.rows("COMMIT")
            except BaseException:
                with contextlib.suppress(StateError):
                    if self._connection.in_transaction:
                        self.rows("ROLLBACK")
                raise

    def sync(self) -> None:
        """Returns when all that was written is on the disk."""
        self.rows("PRAGMA wal_checkpoint(TRUNCATE)")

    def check(self) -> None:
        """Reads the whole database; raises StateError where it is damaged."""
        (said,) = self.rows("PRAGMA quick_check(1)")
        if said != ("ok",):
            raise StateError(f"{self.path} can't be read back ({said[0]}): restore or delete it")

    def damaged(self) -> Iterator[str]:
        """A sentence for each record that is no JSON."""
        for table in ("enrollments", "enrollment_groups", "registrations", "devices"):
            for (key,) in self.rows(f"SELECT key FROM {table} WHERE NOT json_valid(record)"):
                yield f"{self.named(table, key)} can't be read back (no JSON): repair or delete it"

    def named(self, table: str, key: str) -> str:
        """What a sentence calls a record."""
        return f"{self.path or 'the memory'}: the record of '{key}' in {table}"

    def rows(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """Runs one statement; what it selects. Raises StateError."""
        with self._lock, self._failures():
            return self._connection.execute(statement, values).fetchall()

    def write_all(self, statement: str, values: Iterable[tuple[object, ...]]) -> int:
        """Runs one statement for each of `values`; how many rows it wrote. Raises StateError."""
        with self._lock, self._failures():
            return self._connection.executemany(statement, values).rowcount

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:  # a full disk, a folder without permission, another process
            raise StateError(f"{self.path or 'the memory'}: {error}") from None
        except (sqlite3.Error, OverflowError) as error:
            raise StateError(f"{self.path} can't be read back ({error}): restore or delete it") from None

    def _make_tables(self) -> None:
        with self.transaction():
            ((version,),) = self.rows("PRAGMA user_version")
            if version == VERSION:
                return
            if version > VERSION:
                raise StateError(f"{self.path} is of version {version}, this emulator knows version {VERSION}")
            for statement in () if version else _TABLES.strip().split("\n"):
                self.rows(statement)
            self.rows(_GROUPS)
            self.rows(f"PRAGMA user_version = {VERSION}")


class Records(MutableMapping[str, Record], Generic[Record]):
    """One table as a mapping, or of the table of devices what belongs to one hub."""

    def __init__(
        self,
        store: Store,
        table: str,
        to_json: Callable[[Record], dict[str, Any]],
        from_json: Callable[[Any], Record],
        hub: str | None = None,
        kept: int = 0,
    ) -> None:
        """`kept` of the records that were read last are not read again as long as their text is the same.

        They have to be values that nobody changes.
        """
        self._store = store
        self._table = table
        self._to_json = to_json
        # What cannot change may be handed out again where the same text is found.
        self._from_text = functools.lru_cache(kept)(lambda text: from_json(json.loads(text)))
        self._of_hub = () if hub is None else (hub,)
        self._where = f"FROM {table} WHERE " + ("" if hub is None else "hub = ? AND ")

    def __getitem__(self, key: str) -> Record:
        found = self._store.rows(f"SELECT record {self._where} key = ?", *self._of_hub, key)
        if not found:
            raise KeyError(key)
        return self.read(key, found[0][0])

    def __contains__(self, key: object) -> bool:
        return bool(self._store.rows(f"SELECT 1 {self._where} key = ?", *self._of_hub, key))

    def __setitem__(self, key: str, record: Record) -> None:
        self.put([(key, record)])

    def __delitem__(self, key: str) -> None:
        if not self._store.rows(f"DELETE {self._where} key = ? RETURNING 1", *self._of_hub, key):
            raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return (key for (key,) in self._store.rows(f"SELECT key {self._where} key > '' ORDER BY key", *self._of_hub))

    def __len__(self) -> int:
        ((count,),) = self._store.rows(f"SELECT count(*) {self._where} key > ''", *self._of_hub)
        return int(count)

    def put(self, records: Iterable[tuple[str, Record]], *, replace: bool = True) -> int:
        """Writes records; how many were written: without `replace` those that are there stay."""
        rows = [self._row(key, record) for key, record in records]
        if not rows:
            return 0
        marks = ", ".join("?" * len(rows[0]))
        verb = "REPLACE" if replace else "IGNORE"
        return self._store.write_all(f"INSERT OR {verb} INTO {self._table} VALUES ({marks})", rows)

    def page(self, after: str = "") -> list[tuple[str, Record | StateError]]:
        """The next records behind the key `after`, at most PAGE; in place of a damaged one what is wrong with it."""
        found = self._store.rows(
            f"SELECT key, record {self._where} key > ? ORDER BY key LIMIT {PAGE}", *self._of_hub, after
        )
        records: list[tuple[str, Record | StateError]] = []
        for key, record in found:
            try:
                records.append((key, self.read(key, record)))
            except StateError as error:
                records.append((key, error))
        return records

    def read(self, key: str, record: str) -> Record:
        """A record as it is stored; raises StateError where it is damaged."""
        try:
            return self._from_text(record)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            named = self._store.named(self._table, key)
            raise StateError(f"{named} can't be read back ({error}): repair or delete it") from None

    def _row(self, key: str, record: Record) -> tuple[object, ...]:
        return *self._of_hub, key, json.dumps(self._to_json(record))


class StoredRegistrations(Records[Registration], Registrations):
    """The registrations, with the hub keys."""

    def at(self, hub: str, device_id: str) -> Registration | None:
        """See Registrations."""
        found = self._store.rows(
            "SELECT key, record FROM registrations WHERE hub = ? AND device = ? ORDER BY rowid DESC LIMIT 1",
            hub.lower(),
            device_id.lower(),
        )
        return self.read(*found[0]) if found else None

    def devices_at(self, hub: str) -> set[str]:
        """See Registrations."""
        return {device for (device,) in self._store.rows("SELECT device FROM registrations WHERE hub = ?", hub.lower())}

    def _row(self, key: str, record: Registration) -> tuple[object, ...]:
        assigned = record.assignment
        place = (assigned.hub.lower(), assigned.device_id.lower()) if assigned else (None, None)
        return key, *place, json.dumps(record.to_json())


class Kept(NamedTuple):
    """A message and its number, which grows and is never used again."""

    number: int
    message: Telemetry


class KeptPage(NamedTuple):
    """Messages, the oldest first; `last` is the number of the last one that was looked at, damaged ones included."""

    kept: list[Kept]
    last: int


class Messages:
    """Telemetry, the newest MESSAGES_KEPT and no more than `limit_bytes`; a record that is damaged is passed over."""

    def __init__(self, store: Store, limit_bytes: int) -> None:
        self._store = store
        self._limit_bytes = limit_bytes
        self.arrived: list[Callable[[], None]] = []  # called after messages were kept
        self.told: list[Callable[[Telemetry], None]] = []  # called with each message that was kept
        self._gathered: list[Telemetry] | None = None
        ((self._count, self._bytes),) = store.rows("SELECT count(*), coalesce(sum(length(record)), 0) FROM messages")

    def append(self, message: Telemetry) -> None:
        """Keeps one more, within `gathered` with the others; then the hub may acknowledge it. Raises StateError."""
        if self._gathered is None:
            self._keep([message])
        else:
            self._gathered.append(message)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """What is appended within is kept at once at its end, or by `keep`; raises StateError."""
        if self._gathered is not None:
            yield
            return
        self._gathered = []
        try:
            yield
        finally:
            try:
                self.keep()
            finally:
                self._gathered = None

    def keep(self) -> None:
        """Keeps what has been gathered so far: all of it, or with StateError nothing."""
        if self._gathered:
            messages, self._gathered = self._gathered, []
            self._keep(messages)

    def _keep(self, messages: list[Telemetry]) -> None:
        self.put([(each.device_id.lower(), json.dumps(each.to_json()).encode()) for each in messages])
        for message in messages:
            for tell in self.told:
                tell(message)
        for call in list(self.arrived):
            call()

    def put(self, lines: list[tuple[str, bytes]]) -> None:
        """Keeps messages as they are stored, with the lower-case ids of their devices: all of them or none."""
        count, size = self._count + len(lines), self._bytes + sum(len(line) for _, line in lines)
        is_full = size > self._limit_bytes or count > MESSAGES_KEPT + MESSAGES_KEPT // 10
        with self._store.transaction() if is_full or len(lines) > 1 else contextlib.nullcontext():
            self._store.write_all("INSERT INTO messages (device, record) VALUES (?, ?)", lines)
            if is_full:
                count, size = self._trim(count, size)
        self._count, self._bytes = count, size  # not before the end: a full disk may show itself at the commit

    def has(self, line: tuple[str, bytes]) -> bool:
        """Whether a message is kept, as it is stored, with the lower-case id of its device."""
        return bool(self._store.rows("SELECT 1 FROM messages WHERE device = ? AND record = ? LIMIT 1", *line))

    def after(self, number: int = 0, device_id: str | None = None, limit: int = MESSAGES_KEPT) -> list[Kept]:
        """The newest of those behind `number`, at most `limit`, oldest first."""
        return _readable(reversed(self._behind(number, device_id, "DESC", limit)))

    def page(self, number: int, device_id: str | None, limit: int) -> KeptPage:
        """The first of those behind `number`, at most `limit`."""
        found = self._behind(number, device_id, "ASC", limit)
        return KeptPage(_readable(found), found[-1][0] if found else number)

    def _behind(self, number: int, device_id: str | None, order: str, limit: int) -> list[tuple[int, bytes]]:
        of_device = "" if device_id is None else "AND device = ?"
        values = () if device_id is None else (device_id.lower(),)
        return self._store.rows(
            f"SELECT number, record FROM messages WHERE number > ? {of_device} ORDER BY number {order} LIMIT ?",
            number,
            *values,
            min(limit, MESSAGES_KEPT),
        )

    def last_number(self) -> int:
        """That of the newest message, also of one that is no longer kept; 0: there was none."""
        found = self._store.rows("SELECT seq FROM sqlite_sequence WHERE name = 'messages'")
        return int(found[0][0]) if found else 0

    def clear(self, device_id: str | None = None, up_to: int | None = None) -> int:
        """Forgets all messages, those of one device, or those up to a number; how many there were."""
        of_device = "" if device_id is None else "AND device = ?"
        values = () if device_id is None else (device_id.lower(),)
        gone = self._store.rows(
            f"DELETE FROM messages WHERE number <= ? {of_device} RETURNING length(record)",
            self.last_number() if up_to is None else up_to,
            *values,
        )
        self._count -= len(gone)
        self._bytes -= sum(size for (size,) in gone)
        return len(gone)

    def _trim(self, count: int, left: int) -> tuple[int, int]:
        """Forgets the oldest of `count` messages with `left` bytes; how many messages and bytes stay.

        Down to what is kept, and a tenth below the limit in bytes; one message always stays.
        """
        last_gone = 0
        for number, size in self._store.rows("SELECT number, length(record) FROM messages ORDER BY number"):
            if (left <= self._limit_bytes * 9 // 10 and count <= MESSAGES_KEPT) or count == 1:
                break
            left, count, last_gone = left - size, count - 1, number
        self._store.rows("DELETE FROM messages WHERE number <= ?", last_gone)
        return count, left


def _readable(rows: Iterable[tuple[int, bytes]]) -> list[Kept]:
    kept = []
    for number, line in rows:
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
            kept.append(Kept(number, Telemetry.from_json(json.loads(line))))
    return kept


def damage_at_first_sight(state_dir: Path) -> str | None:
    """What is wrong with a folder's database, of which the beginning is read; None: nothing, or there is none."""
    path = state_dir / DATABASE
    if not path.exists():
        return None
    # By SQLite: a process that opens and closes the file beside it loses all its locks (POSIX), also those of a Store.
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True)) as connection:
            connection.execute("PRAGMA schema_version").fetchall()
    except sqlite3.OperationalError as error:
        return f"{path}: {error}"
    except sqlite3.Error as error:
        return f"{path} can't be read back ({error}): restore or delete it"
    return None


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turns a failure of the system into StateError that names the path; a file that is there stays what it is."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        raise StateError(f"{path}: {error.strerror}") from None
