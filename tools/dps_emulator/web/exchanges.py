"""What was asked of DPS and answered, without secrets, and who asked without being enrolled."""

import base64
import binascii
import json
import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dps_emulator.enrollments import is_registration_id
from dps_emulator.json_text import parse_json
from dps_emulator.registrations import utc_text
from dps_emulator.service import NOT_FOUND, Request, Response, target_of
from dps_emulator.tpm_keys import UnsuitableKeyError, parse_endorsement_key

KEPT = 500  # exchanges
KNOCKS_KEPT = 20
STRIPS = 30  # registrations shown
ONE_REGISTRATION_S = 900.0  # an exchange that comes so long after the one before begins another registration
_LONG = 64  # characters of a text that are shown in full
_SHOWN = 8 * 1024  # characters that are kept of a head, and of a body as indented JSON
_PUBLIC_KEYS = ("endorsementkey", "storagerootkey")  # everything else that is called a key is masked
_ENCODER = json.JSONEncoder(indent=2, ensure_ascii=False)
_SIGNATURE = re.compile(r"sig=[^&\s]+")


@dataclass(frozen=True)
class Exchange:
    """One request and its answer, with nothing in it that is secret."""

    number: int  # from 1
    at_s: float  # Unix seconds
    method: str
    operation: str  # register, operation, lookup, or empty
    registration_id: str
    status: int
    error_code: int
    fault: int  # the fault script's entry, 0: none
    request_id: str
    has_token: bool
    request: str
    answer: str
    state: str  # assigning, assigned, …; empty where the answer has none

    @property
    def title(self) -> str:
        """What it was for, in a word or two."""
        if self.operation == "register" and self.status == 401 and not self.has_token:
            return "challenge"
        if self.operation == "register":
            return "register" if self.status == 202 else "refused"
        return self.state or self.operation or "nothing here"

    @property
    def time(self) -> str:
        """RFC 3339, to the millisecond."""
        return utc_text(self.at_s)[:23]


@dataclass(frozen=True)
class Knock:
    """A device that asked to register and is not enrolled."""

    registration_id: str
    endorsement_key: str  # base64
    at_s: float


class Exchanges:
    """The last ones; `strips` has those of a registration together."""

    def __init__(self) -> None:
        self._kept: deque[Exchange] = deque(maxlen=KEPT)
        self._count = 0
        self.knocks: dict[str, Knock] = {}  # by lower-case registration id, the oldest first

    def add(self, request: Request, response: Response, fault: int, now: float) -> None:
        """Remembers one."""
        target = target_of(request.path)
        self._count += 1
        content = _json_of(request.body)
        self._kept.append(
            Exchange(
                self._count,
                now,
                request.method,
                target.operation,
                target.registration_id,
                response.status,
                response.error_code,
                fault,
                response.request_id,
                "authorization" in request.headers,
                _shown(_request_lines(request), request.body),
                _shown((f"{name}: {value}" for name, value in response.headers), response.body),
                _state_of(_json_of(response.body)),
            )
        )
        key = target.registration_id.lower()
        if target.operation != "register":
            return
        if response.error_code == NOT_FOUND and (knock := _knock(target.registration_id, content, now)):
            self.knocks.pop(key, None)
            self.knocks[key] = knock
            while len(self.knocks) > KNOCKS_KEPT:
                del self.knocks[next(iter(self.knocks))]
        elif response.error_code != NOT_FOUND:
            self.knocks.pop(key, None)

    def strips(self) -> list[list[Exchange]]:
        """The exchanges of each registration, oldest first; the registration that was last heard of comes first."""
        open_strips: dict[str, list[Exchange]] = {}
        strips: list[list[Exchange]] = []
        for exchange in self._kept:
            strip = open_strips.get(exchange.registration_id)
            asks_anew = exchange.operation == "register" and not exchange.has_token
            begins = asks_anew and strip is not None and strip[-1].operation != "register"
            if strip is None or begins or exchange.at_s - strip[-1].at_s > ONE_REGISTRATION_S:
                strip = open_strips[exchange.registration_id] = []
                strips.append(strip)
            strip.append(exchange)
        return sorted(strips, key=lambda strip: -strip[-1].number)[:STRIPS]


def masked(value: Any, name: str = "") -> Any:
    """A JSON value without what is secret in it, and with long texts shortened."""
    if isinstance(value, dict):
        return {inner: masked(content, inner) for inner, content in value.items()}
    if isinstance(value, list):
        return [masked(content, name) for content in value]
    if not isinstance(value, str):
        return value
    lower = name.lower()
    if lower.endswith("key") and lower not in _PUBLIC_KEYS:
        return f"•••• ({len(value)} characters)"
    if "sharedaccess" in value.lower():
        return "••••"
    return value if len(value) <= _LONG else f"{value[:_LONG]}… ({len(value)} characters)"


def _request_lines(request: Request) -> Iterable[str]:
    yield f"{request.method} {request.path}{'?' if request.query else ''}{request.query}"
    for name, value in request.headers.items():
        yield f"{name}: {_SIGNATURE.sub('sig=••••', value) if 'sig=' in value else _header(name, value)}"


def _header(name: str, value: str) -> str:
    return "••••" if name in ("authorization", "cookie", "proxy-authorization") else value


def _shown(lines: Iterable[str], body: bytes) -> str:
    """A head and a body as text; a body that is no JSON might hold anything, so only its size is said."""
    text = _cut(("\n".join(lines),))
    content = _json_of(body)
    if content is not None:
        return f"{text}\n\n{_cut(_ENCODER.iterencode(masked(content)))}"
    return f"{text}\n\n({len(body)} bytes that are no JSON)" if body else text


def _cut(pieces: Iterable[str]) -> str:
    """The pieces as one text, of which no more is made than is kept: indented, JSON may be as long as fifty bodies."""
    text = ""
    for piece in pieces:
        text += piece
        if len(text) > _SHOWN:
            return f"{text[:_SHOWN]}…"
    return text


def _json_of(body: bytes) -> Any:
    try:
        return parse_json(body) if body else None
    except ValueError:
        return None


def _state_of(content: Any) -> str:
    """The registration's status that an answer tells."""
    if not isinstance(content, dict):
        return ""
    inner = content.get("registrationState")
    status = (inner if isinstance(inner, dict) else content).get("status")
    return status if isinstance(status, str) else ""


def _knock(registration_id: str, content: Any, now: float) -> Knock | None:
    tpm = content.get("tpm") if isinstance(content, dict) else None
    encoded = tpm.get("endorsementKey") if isinstance(tpm, dict) else None
    try:
        parse_endorsement_key(base64.b64decode(str(encoded), validate=True))
    except (binascii.Error, UnsuitableKeyError, ValueError):
        return None
    return Knock(registration_id, str(encoded), now) if is_registration_id(registration_id) else None
