"""The socket in the state folder through which commands come; only its owner can use it.

A request is one JSON object on a line, so is the answer; `control` says which there are. Whoever asks loads nothing of
what serves.
"""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SOCKET_NAME = "control.sock"
ANSWER_DEADLINE_S = 10.0

Request = dict[str, Any]
Result = dict[str, Any]


class ControlError(Exception):
    """A command that failed; `code` is one of the hub's error codes, 0: no emulator answered."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class NotServed(ControlError):
    """No emulator serves the state folder."""


def control_socket(state_dir: Path) -> socket.socket:
    """Binds the socket in `state_dir`, where requests wait from now on; raises OSError."""
    path = state_dir / SOCKET_NAME
    path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(listening.fileno(), 0o600)  # of the name that bind() makes: others may be able to enter the folder
        with _reachable(path) as address:
            listening.bind(address)
        listening.listen()
    except OSError:
        listening.close()
        raise
    return listening


def call(state_dir: Path, request: Request, deadline_s: float = ANSWER_DEADLINE_S) -> Result:
    """Sends one request to the emulator that serves `state_dir`; raises ControlError."""
    path = state_dir / SOCKET_NAME
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.settimeout(deadline_s)
            with _reachable(path) as address:
                client.connect(address)
            client.sendall(json.dumps(request).encode() + b"\n")
            with client.makefile("rb") as lines:
                answer = json.loads(lines.readline())
    except (FileNotFoundError, ConnectionRefusedError):
        raise NotServed(f"no emulator serves {state_dir}: start 'dps-emulator serve --state-dir' with it") from None
    except PermissionError:
        owner, ours = state_dir.stat().st_uid, os.geteuid()
        raise ControlError(
            f"{state_dir} belongs to user {owner}, this is user {ours}: only its owner may command it"
        ) from None
    except (OSError, ValueError) as error:
        raise ControlError(f"the emulator that serves {state_dir} did not answer: {error}") from None
    return unwrap(answer)


def unwrap(answer: dict[str, Any]) -> Result:
    """An answer's result; raises ControlError with its error."""
    if "error" in answer:
        raise ControlError(answer["error"]["message"], answer["error"]["code"])
    result: Result = answer["result"]
    return result


@contextlib.contextmanager
def _reachable(path: Path) -> Iterator[str]:
    """An address for a socket at `path`, which may be longer than the 107 bytes that an address has."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)
