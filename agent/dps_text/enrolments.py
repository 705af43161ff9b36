"""Lists of enrolments as programs and people write them: CSV of a spreadsheet, JSON of a service, both with odd lines.

One reader for `dps-agent enroll --append` and for the emulator's import. It says what stands where; whether a key is
one that a service takes is the emulator's business.
"""

from __future__ import annotations

import contextlib
import csv
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

DELIMITERS = (",", ";", "\t")
_COLUMNS = {  # what a column's name means, by its letters and digits in lower case
    "registrationid": "registrationId",
    "endorsementkey": "endorsementKey",
    "deviceid": "deviceId",
    "iothubhostname": "iotHubHostName",
    "provisioningstatus": "provisioningStatus",
    "attestationtype": "attestationType",
    "backend": "backend",
    "ekcertificatesha256": "ekCertificateSha256",
}
_NEEDED = {"registrationId", "endorsementKey"}
# Where a cell may begin, and with what a spreadsheet may take it for a formula there; guarded or not.
_BEGINS, _FORMULA = r"(^|[,;\t\r\n][ \"]*)", r"[=+\-@\t\r]"
_GUARDABLE, _GUARDED = (re.compile(f"{_BEGINS}{guard}(?='*{_FORMULA})") for guard in ("", "'"))


class ListError(ValueError):
    """A file in which no list of enrolments can be found; the message says where and why."""


class Entry(NamedTuple):
    """One TPM enrolment, in the service API's form: `{"registrationId", "attestation": {"tpm": …}, …}`."""

    line: int  # at which it begins, from 1
    record: dict[str, Any]

    @property
    def registration_id(self) -> str:
        """Of the enrolment."""
        return str(self.record["registrationId"])

    @property
    def endorsement_key(self) -> str:
        """Base64 of the TPM2B_PUBLIC, unless the list is wrong."""
        return str(self.record["attestation"]["tpm"]["endorsementKey"])


class Other(NamedTuple):
    """An enrolment of another kind than TPM, or a group of enrolments."""

    line: int
    registration_id: str
    kind: str  # symmetricKey, x509, …
    record: dict[str, Any]  # in the service API's form, as it came


class Odd(NamedTuple):
    """A line, or an entry that begins there, of which nothing can be made; `why` is half a sentence."""

    line: int
    why: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.why}"


class Named(NamedTuple):
    """A registration id that stands in the file for one device, whatever else is odd about its entry."""

    line: int
    registration_id: str
    endorsement_key: str  # empty: there is none that can be read, or the enrolment is of another kind


class EnrolmentList(NamedTuple):
    """What a file holds; `delimiter` and `columns` are those of the last CSV header, empty for JSON."""

    entries: list[Entry]
    others: list[Other]
    odd: list[Odd]
    named: list[Named]
    delimiter: str = ""
    columns: tuple[str, ...] = ()  # the names of `_COLUMNS`, "" for a column that is not known

    def row(self, cells: dict[str, str]) -> str:
        """A line for the end of this CSV file: each cell in the column of its name, in quotes where it needs them."""
        written = [cells.get(column, "") for column in self.columns]
        return self.delimiter.join(
            '"' + cell.replace('"', '""') + '"' if self.delimiter in cell or '"' in cell else cell for cell in written
        )


def guarded(cell: str) -> str:
    """A cell that no spreadsheet takes for a formula: with an apostrophe wherever one could begin.

    It could where the cell does, and behind what another reader of the list takes for the end of a cell or a line.
    """
    return _GUARDABLE.sub(r"\1'", cell)


def _unguarded(cell: str) -> str:
    return _GUARDED.sub(r"\1", cell)


def read_enrolments(text: str) -> EnrolmentList:
    """Reads JSON (one record or a list) or CSV with a header; ListError.

    CSV: the header names `registrationId` and `endorsementKey`, in any order, case and spelling (`Registration
    ID`), and no meaning twice; cells are separated by comma, semicolon or tab; further columns and repeated headers
    (files put together) are passed over. A row with more cells than the header has is odd, and so is a line on
    which a quote is opened that does not end well; the next line is a row again. The apostrophe of `guarded` is
    taken off. Two entries for one registration id that have two keys are both odd.
    """
    found = _of_json(text) if text.lstrip()[:1] in ("{", "[") else _of_csv(text)
    first: dict[str, Entry] = {}
    contradicted: dict[str, list[int]] = {}
    for entry in found.entries:
        key = entry.registration_id.lower()  # as DPS compares them
        if first.setdefault(key, entry).endorsement_key != entry.endorsement_key:
            contradicted.setdefault(key, [first[key].line]).append(entry.line)
    for entry in found.entries:
        if entry.registration_id.lower() in contradicted:
            lines = ", ".join(str(line) for line in contradicted[entry.registration_id.lower()])
            why = f"'{entry.registration_id}' stands there with two endorsement keys, see lines {lines}"
            found.odd.append(Odd(entry.line, why))
    found.odd.sort()
    found.entries[:] = [entry for entry in found.entries if entry.registration_id.lower() not in contradicted]
    return found


def _of_json(text: str) -> EnrolmentList:
    found = EnrolmentList([], [], [], [])
    for line, record in _json_records(text):
        _sort(found, line, record)
    return found


def _json_records(text: str) -> Iterator[tuple[int, Any]]:
    """Each record with the line at which it begins."""
    decoder = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_each_once)
    at = _behind_blanks(text, 0)
    is_list = text[at] == "["
    at = _behind_blanks(text, at + is_list)
    line, counted = 1, 0  # of the line ends before `counted`: each is counted once, however many records there are
    try:
        more = not is_list or text[at : at + 1] != "]"
        while more:
            begin = at
            record, at = decoder.raw_decode(text, at)
            line, counted = line + text.count("\n", counted, begin), begin
            yield line, record
            at = _behind_blanks(text, at)
            more = is_list and text[at : at + 1] == ","
            at = _behind_blanks(text, at + more)
        if is_list and text[at : at + 1] != "]":
            raise json.JSONDecodeError("expected ',' or ']'", text, at)
        at = _behind_blanks(text, at + is_list)
        if at < len(text):
            raise json.JSONDecodeError("something behind the end", text, at)
    except json.JSONDecodeError as error:
        raise ListError(f"line {error.lineno}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, NaN, endless nesting
        raise ListError(f"line {text.count(chr(10), 0, at) + 1}: not valid JSON: {error}") from None


def _behind_blanks(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\n", "\r"):
        at += 1
    return at


def _sort(found: EnrolmentList, line: int, record: Any) -> None:
    """Puts one record where it belongs."""
    if not isinstance(record, dict):
        found.odd.append(Odd(line, "expected an object, an enrolment"))
        return
    name, attestation = record.get("registrationId"), record.get("attestation")
    if isinstance(record.get("enrollmentGroupId"), str):
        found.others.append(Other(line, record["enrollmentGroupId"], "enrollmentGroup", record))
    elif not isinstance(name, str) or not name:
        found.odd.append(Odd(line, "registrationId is missing, or no text"))
    elif not isinstance(attestation, dict):
        found.named.append(Named(line, name, ""))
        found.odd.append(Odd(line, f"'{name}': attestation is missing"))
    else:
        kinds = [kind for kind, value in attestation.items() if isinstance(value, dict)]
        kind = attestation.get("type") or (kinds[0] if len(kinds) == 1 else "")
        tpm = attestation.get("tpm")
        key = tpm.get("endorsementKey") if kind == "tpm" and isinstance(tpm, dict) else None
        found.named.append(Named(line, name, key.strip() if isinstance(key, str) else ""))
        if kind != "tpm" and isinstance(kind, str) and kind:
            found.others.append(Other(line, name, kind, record))
        elif not isinstance(key, str):
            found.odd.append(Odd(line, f"'{name}': expected attestation.tpm.endorsementKey"))
        elif not key.strip():
            found.odd.append(Odd(line, f"'{name}': its endorsement key is missing"))
        else:
            found.entries.append(Entry(line, record))


def _of_csv(text: str) -> EnrolmentList:
    found = EnrolmentList([], [], [], [])
    lines = text.split("\n")
    delimiter, columns = ",", tuple[str, ...]()
    at = 0
    while at < len(lines):
        line, number = lines[at], at + 1
        header = _header(line, number)
        if header is not None:
            delimiter, columns = header
            at += 1
            continue
        try:
            row, taken = _row(lines, at, delimiter, columns)
        except csv.Error as error:
            found.odd.append(Odd(number, f"not valid CSV: {error}"))
            at += 1
            continue
        at += taken
        if not any(cell.strip() for cell in row) or (not columns and line.lower().startswith("sep=")):
            pass  # an empty line; what Excel writes above a header
        elif not columns:
            needed = " and ".join(sorted(_NEEDED, reverse=True))
            raise ListError(f"line {number}: expected a header that names the columns {needed}; came {line[:80]!r}")
        elif any(cell.strip() for cell in row[len(columns) :]):
            found.odd.append(Odd(number, f"it has {len(row)} cells, its header {len(columns)}"))
        else:
            cells = {name: _unguarded(cell.strip()) for name, cell in zip(columns, row, strict=False) if name}
            wrong = [name for name, cell in cells.items() if '"' in cell or "\r" in cell]
            if wrong:
                found.odd.append(Odd(number, f"a quote or a line end stands in its {wrong[0]}"))
            else:
                _sort(found, number, _record(cells))
    if not columns and text.strip():
        raise ListError("expected JSON, or CSV with the columns registrationId and endorsementKey")
    return found._replace(delimiter=delimiter, columns=columns)


def _row(lines: list[str], at: int, delimiter: str, columns: tuple[str, ...]) -> tuple[list[str], int]:
    """The cells of the row that begins at `lines[at]`, and how many lines it takes; csv.Error.

    A cell in quotes may have line ends in it, in a column that is not known. Where the quotes do not come out so, the
    row is its first line alone, so that no line is taken for a part of another: an open quote makes that line odd.
    """
    if '"' not in lines[at]:
        return next(csv.reader([lines[at]], delimiter=delimiter, skipinitialspace=True), []), 1
    reader = csv.reader(_ended(lines, at), delimiter=delimiter, skipinitialspace=True, strict=True)
    with contextlib.suppress(csv.Error):
        row = next(reader)
        known = "".join(cell for name, cell in zip(columns, row, strict=False) if name)
        if reader.line_num == 1 or ("\n" not in known and len(row) <= len(columns)):
            return row, reader.line_num
    row = next(csv.reader([f"{lines[at]}\n"], delimiter=delimiter, skipinitialspace=True))
    if any("\n" in cell for cell in row):
        raise csv.Error("a quote is opened that does not end well")
    return row, 1


def _ended(lines: list[str], at: int) -> Iterator[str]:
    for number in range(at, len(lines)):
        yield f"{lines[number]}\n"


def _header(line: str, number: int) -> tuple[str, tuple[str, ...]] | None:
    """Delimiter and columns of a line that is a header; None for any other; ListError for a meaning that is twice."""
    for delimiter in DELIMITERS:
        try:
            cells: Sequence[str] = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
        except csv.Error:
            continue
        columns = tuple(_COLUMNS.get("".join(filter(str.isalnum, cell)).lower(), "") for cell in cells)
        if set(columns) >= _NEEDED:
            for name in filter(None, columns):
                if columns.count(name) > 1:
                    twice = " and ".join(
                        repr(cell) for cell, known in zip(cells, columns, strict=True) if known == name
                    )
                    raise ListError(f"line {number}: the columns {twice} are both {name}: name one of them otherwise")
            return delimiter, columns
    return None


def _record(cells: dict[str, str]) -> dict[str, Any]:
    """A row in the service API's form; a cell that is empty is a field that is not there."""
    kind = cells.get("attestationType", "") or "tpm"
    tpm = {"endorsementKey": cells.get("endorsementKey", "")}
    record: dict[str, Any] = {
        "registrationId": cells.get("registrationId", ""),
        "attestation": {"type": kind, "tpm": tpm} if kind.lower() == "tpm" else {"type": kind},
    }
    if kind.lower() == "tpm":
        record["attestation"]["type"] = "tpm"
    for name in ("deviceId", "iotHubHostName", "provisioningStatus"):
        if cells.get(name):
            record[name] = cells[name]
    return record


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} stands twice in one object")
        found[name] = value
    return found
