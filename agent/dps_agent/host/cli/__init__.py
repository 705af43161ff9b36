"""The command `dps-agent`: text or one JSON document on stdout, progress and errors on stderr, fixed exit statuses.

TPM, TLS and MQTT are imported by the verbs that use them, when they run: `--help` and `status` stay small.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import os
import sys

from dps_agent.host.cli.plain_words import read_plain
from dps_agent.host.cli.verb import (
    Arguments,
    Outcome,
    UsageError,
    discard,
    error_document,
    exit_word,
    remedy_of,
    verb_in,
)
from dps_agent.host.config import SYSTEM_STATE_DIR
from dps_agent.host.printed import printable
from dps_hal.errors import EXIT_GROUPS, AskOperator, DpsError, RetryLater

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

SCHEMA = "dps-agent/1"
GARBAGE_LIMIT = 20_000  # objects; what a verb loads is no garbage, and to look through it takes a part of its time
COLOURED = ("check",)  # verbs whose lines begin with a result
COLOURS = {"ok": 32, "warning": 33, "failed": 31}  # ECMA-48, Select Graphic Rendition


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line, `sys.argv` by default, and returns its exit status.

    As a program, by `sys.argv`, it ends the process itself wherever it can; see `_leave`.
    """
    status = _run(arguments)
    try:
        sys.stderr.flush()
    except OSError:
        discard(sys.stderr)
    if arguments is None:
        _leave(status)
    return status


def _leave(status: int) -> None:
    """Ends the process as it stands: all is written and given back, and to take the interpreter apart takes long.

    Also where a worker still hangs in the TPM or on a disk, for which the interpreter's own end would wait. Returns
    where another thread is owed its end, or the output cannot be written, of which the interpreter tells by its status.
    """
    worker = sys.modules.get("dps_agent.host.worker")
    if worker is not None and worker.worker_hangs():
        os._exit(status)  # everything was written and flushed
    threading = sys.modules.get("threading")
    if threading is not None and any(
        not thread.daemon for thread in threading.enumerate() if thread is not threading.current_thread()
    ):
        return
    atexit._run_exitfuncs()
    try:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except (OSError, ValueError):
        return
    os._exit(status)


def _run(arguments: Sequence[str] | None) -> int:
    words = sys.argv[1:] if arguments is None else list(arguments)
    if "--version" in words and not verb_in(words):
        words[words.index("--version")] = "version"  # most programs call it `--version`
    elif words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started us; the next file opened must not take its place
            # What is printed must not seem to have gone anywhere: no file for reading takes it.
            setattr(sys, name, open(os.devnull, "r" if name == "stdout" else "r+"))  # noqa: SIM115
    as_json = "--json" in words
    verb = ""
    try:
        parsed = _parsed(words)
        verb = parsed.verb
        if arguments is None and verb != "run":
            gc.set_threshold(GARBAGE_LIMIT)
        outcome: Outcome = parsed.run(parsed)
    except SystemExit as stop:  # argparse has shown the help
        return _write("", int(stop.code or 0))
    except DpsError as error:
        return _fail(error, verb, as_json)
    except KeyboardInterrupt:
        return _fail(RetryLater("agent.interrupted", "interrupted by the keyboard"), verb, as_json)
    except Exception as error:
        from dps_agent.host.worker import bug

        return _fail(bug(error), verb, as_json)
    if as_json:
        text = _document(outcome.code, verb, outcome.document)
    else:
        lines = [printable(line) for line in outcome.lines]
        if verb in COLOURED and _shows_colours():
            lines = [_coloured(line) for line in lines]
        text = "".join(f"{line}\n" for line in lines)
    return _write(text, EXIT_GROUPS.index(outcome.code))


def _parsed(words: Sequence[str]) -> Arguments:
    """What `words` say; UsageError where that is nothing."""
    said = read_plain(words)
    if said is None:
        from dps_agent.host.cli.parser import read

        said = read(words)
    return said


def _document(code: str, verb: str, content: Mapping[str, Any]) -> str:
    from dps_hal.platform import to_json

    head: dict[str, Any] = {"schema": SCHEMA, "code": code}
    if verb:
        head["verb"] = verb
    return to_json({**head, **content}) + "\n"


def _fail(error: DpsError, verb: str, as_json: bool) -> int:
    """Reports an error in the format asked for; text goes to stderr."""
    error = _of_the_service(error, verb)
    code = exit_word(error)
    if as_json:
        return _write(_document(code, verb, {"error": error_document(error)}), EXIT_GROUPS.index(code))
    remedy = remedy_of(error)
    lines = [f"dps-agent: {error.message}", f"  {remedy}  [{error.code}]" if remedy else f"  [{error.code}]"]
    if error.retry_after_s is not None:
        next_try = "the service would try again" if verb == "provision" else "a new try makes sense"
        lines.append(f"  {next_try} in {error.retry_after_s} s")
    if error.request_id:
        lines.append(f"  DPS's request id: {error.request_id}")
    if isinstance(error, UsageError) and error.usage:
        lines.insert(0, error.usage.rstrip())
    with contextlib.suppress(OSError):
        sys.stderr.write("".join(f"{printable(line)}\n" for line in lines))
    return _write("", EXIT_GROUPS.index(code))


def _of_the_service(error: DpsError, verb: str) -> DpsError:
    """The same error with other advice where it is the service's own folder that is closed to this user.

    Whoever made that folder his own would take the device's identity away from the service.
    """
    if error.code != "store.denied" or SYSTEM_STATE_DIR not in error.message or os.geteuid() == 0:
        return error
    what = error.message.partition(";")[0]
    return AskOperator("agent.denied", f"{what}; it is the service's: run it as root: sudo dps-agent {verb}")


def _shows_colours() -> bool:
    """Whether somebody sees colours and wants them: see https://no-color.org."""
    wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"
    return wanted and sys.stdout.isatty()


def _coloured(line: str) -> str:
    """The line with its result in green, yellow or red, where it begins with one."""
    result = line.partition(" ")[0]
    colour = COLOURS.get(result.rstrip(":,"))
    return f"\x1b[{colour}m{result}\x1b[0m{line[len(result) :]}" if colour else line


def _write(text: str, status: int) -> int:
    """Writes the whole output at once and returns `status`; 1 where nobody could read it."""
    if not text:
        return status
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # a path need not fit the terminal's encoding
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            with contextlib.suppress(OSError):
                sys.stderr.write(f"dps-agent: the output could not be written: {error.strerror or 'it is closed'}\n")
        discard(sys.stdout)
        return 1
    return status
