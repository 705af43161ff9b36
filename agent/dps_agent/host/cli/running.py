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
    from dps_agent.host.local.statefile import read_live

    live = read_live(configuration)
    if live is None or not live.get("socket") or not isinstance(live["socket"], str):
        return None
    if unseen := unseen_settings(configuration):
        raise UsageError(f"--set {unseen[0]}: {UNSEEN}")
    limit_s = ANSWER_LIMIT_S if timeout_s is None else timeout_s
    if timeout_s is not None:
        with contextlib.suppress(OSError):
            print(f"dps-agent: asks the service that runs, for {limit_s:g} s at most", file=sys.stderr, flush=True)
    try:
        answer = _post(live["socket"], path, limit_s)
    except TimeoutError:
        code = "agent.not_running" if timeout_s is None else "agent.out_of_time"
        raise RetryLater(code, f"the service did not answer within {limit_s:g} s") from None
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            text = f"the service runs, and its socket {live['socket']} is not open to user {os.geteuid()}"
            raise AskOperator("agent.denied", text) from None
        if error.errno in (errno.ENOENT, errno.ECONNREFUSED):
            return None  # it has just ended
        if error.errno == errno.EAGAIN:
            raise RetryLater("agent.busy", "too many programs wait at the service's socket") from None
        raise RetryLater("agent.not_running", f"{live['socket']}: {error.strerror}") from None
    return _checked(answer)


def unseen_settings(configuration: Configuration) -> list[str]:
    """The keys of --set that a service which runs already cannot know; not those that say which service is meant."""
    return [
        key
        for key, origin in configuration.origins.items()
        if origin.startswith("--set ") and key not in _FINDS_THE_SERVICE
    ]


def _post(path: str, target: str, timeout_s: float) -> bytes:
    """The whole answer to one request, at the socket that root does not share with the clients' group where it may."""
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect(path + ROOT_SUFFIX)
        except (FileNotFoundError, ConnectionRefusedError, PermissionError):
            connection.connect(path)
        with contextlib.suppress(BrokenPipeError):  # it has answered already: that it is busy
            connection.sendall(f"POST {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
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
