"""Asks the service that runs with the same state folder to do what only one process may do."""

from __future__ import annotations

import contextlib
import errno
import os
import sys

from dps_agent.host.cli.verb import UsageError
from dps_agent.host.config import ROOT_SUFFIX, Configuration
from dps_hal.errors import AskOperator, RetryLater

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

ANSWER_LIMIT = 1 << 20  # bytes of one answer
ANSWER_LIMIT_S = 20.0  # for what takes a service no more than a TPM's answer
UNSEEN = "the service that runs has settings of its own; change its files and reload it, or stop it first"
_FINDS_THE_SERVICE = ("state_dir", "runtime_dir")


def ask_service(configuration: Configuration, path: str, timeout_s: float | None = None) -> dict[str, Any] | None:
    """POSTs to the socket of the service that runs and returns its answer; None where none runs, or has no socket.

    Raises what the service answered as an error; RetryLater `agent.out_of_time` where it does not within `timeout_s`,
    which stderr is told, None for a time in which one that is well answers, else `agent.not_running`; AskOperator
    `agent.denied` where this user may not use the socket; UsageError for settings on the command line, which the
    running agent does not see.
    """
    path_of_socket = _socket_of_service(configuration)
    if path_of_socket is None:
        return None
    if unseen := unseen_settings(configuration):
        raise UsageError(f"--set {unseen[0]}: {UNSEEN}")
    limit_s = ANSWER_LIMIT_S if timeout_s is None else timeout_s
    if timeout_s is not None:
        with contextlib.suppress(OSError):
            print(f"dps-agent: asks the service that runs, for {limit_s:g} s at most", file=sys.stderr, flush=True)
    late = "agent.not_running" if timeout_s is None else "agent.out_of_time"
    try:
        answer = _answered(path_of_socket, f"POST {path}", limit_s, late)
    except RetryLater as error:
        if error.code == "agent.out_of_time":
            error.message += _why_late(configuration)
        raise
    return None if answer is None else _checked(answer)


def _why_late(configuration: Configuration) -> str:
    """Where the service stands, as it says of itself, behind what is said of an answer that has not come."""
    from dps_agent.host.local.statefile import read_live

    live = read_live(configuration) or {}
    return f"; it is {live.get('state')}: {live.get('reason')}" if live.get("state") else ""


def ask_metrics(configuration: Configuration) -> str | None:
    """The text of GET /metrics; None where no service runs, or it has no socket. Raises as `ask_service` does."""
    path = _socket_of_service(configuration)
    answer = None if path is None else _answered(path, "GET /metrics", ANSWER_LIMIT_S, "agent.not_running")
    if answer is None:
        return None
    head, _, body = answer.partition(b"\r\n\r\n")
    if head.split(b" ")[1:2] != [b"200"]:
        _checked(answer)
    return body.decode(errors="replace")


def _socket_of_service(configuration: Configuration) -> str | None:
    from dps_agent.host.local.statefile import read_live

    live = read_live(configuration)
    path = live.get("socket") if live is not None else None
    return path if path and isinstance(path, str) else None


def _answered(path: str, request: str, limit_s: float, late: str) -> bytes | None:
    """The whole answer to a request at the socket; None where the service has just ended.

    `late` is the code of the error where none comes in time.
    """
    try:
        return _exchange(path, request, limit_s)
    except TimeoutError:
        raise RetryLater(late, f"the service did not answer within {limit_s:g} s") from None
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            text = f"the service runs, and its socket {path} is not open to user {os.geteuid()}"
            raise AskOperator("agent.denied", text) from None
        if error.errno in (errno.ENOENT, errno.ECONNREFUSED):
            return None
        if error.errno == errno.EAGAIN:
            raise RetryLater("agent.busy", "too many programs wait at the service's socket") from None
        raise RetryLater("agent.not_running", f"{path}: {error.strerror}") from None


def unseen_settings(configuration: Configuration) -> list[str]:
    """The keys of --set that a service which runs already cannot know; not those that say which service is meant."""
    return [
        key
        for key, origin in configuration.origins.items()
        if origin.startswith("--set ") and key not in _FINDS_THE_SERVICE
    ]


def _exchange(path: str, request: str, timeout_s: float) -> bytes:
    """The whole answer to one request without a body, where it may at the socket that is not the clients' group's."""
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect(path + ROOT_SUFFIX)
        except (FileNotFoundError, ConnectionRefusedError, PermissionError):
            connection.connect(path)
        with contextlib.suppress(BrokenPipeError):  # it has answered already: that it is busy
            connection.sendall(f"{request} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        with contextlib.suppress(ConnectionResetError):  # the same, when it did not read the request
            while len(answer) <= ANSWER_LIMIT and (part := connection.recv(65536)):
                answer += part
    return answer


def _checked(answer: bytes) -> dict[str, Any]:
    from dps_hal.platform import from_json

    head, _, body = answer.partition(b"\r\n\r\n")
    try:
        status = int(head.split(b" ")[1])
        document: dict[str, Any] = from_json(body)
        if status == 200:
            return document
        error = document["error"]
        kind = AskOperator if status in (400, 403, 404, 409) else RetryLater
        raise kind(error["code"], error["message"], error["retryAfterS"], error["requestId"])
    except (IndexError, KeyError, ValueError, TypeError):
        raise RetryLater("agent.not_running", "the service ended before it answered") from None
