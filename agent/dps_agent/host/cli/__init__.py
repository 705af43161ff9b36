"""The command `dps-agent`: text or one JSON document on stdout, progress and errors on stderr, fixed exit statuses.

TPM, TLS and MQTT are imported by the verbs that use them, when they run: `--help` and `status` stay small.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import io
import os
import sys
from functools import partial

from dps_agent.host.cli.verb import (
    Outcome,
    Suggesting,
    UsageError,
    Verb,
    did_you_mean,
    discard,
    error_document,
    exit_word,
    remedy_of,
)
from dps_agent.host.config import SYSTEM_FILE, SYSTEM_STATE_DIR
from dps_agent.host.printed import printable
from dps_hal.errors import EXIT_GROUPS, AskOperator, DpsError, RetryLater

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any, NoReturn

SCHEMA = "dps-agent/1"
VERBS = (
    "provision",
    "run",
    "status",
    "wait",
    "enroll",
    "import-key",
    "install-certificate",
    "check",
    "token",
    "reset",
    "config",
    "metrics",
    "diag",
    "version",
)
COLOURED = ("check",)  # verbs whose lines begin with a result
COLOURS = {"ok": 32, "warning": 33, "failed": 31}  # ECMA-48, Select Graphic Rendition
_EXIT_STATUSES = """\
exit status:
  0 ok, 1 failed, 2 usage, 3 retry later, 4 refused by the service, 5 TPM, 6 settings

most used:
  dps-agent enroll       what to enter in the Device Provisioning Service
  dps-agent status       where the device stands
  dps-agent help VERB    what a verb does
"""

# With a width of its own: to ask the terminal, argparse imports shutil and its compressors, at every start.
_HELP_FORMAT = partial(argparse.RawDescriptionHelpFormatter, width=78, max_help_position=20)


class _Parser(Suggesting):
    """An ArgumentParser whose errors are exceptions: `--json` has to report them as well."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_HELP_FORMAT, add_help=False, **options)
        self.color = False  # Python 3.14 colours help by itself
        self.add_argument("-h", "--help", action="help", help="show this help")

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, self.format_usage())


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
    if "--version" in words and not _verb_in(words):
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


def _parsed(words: Sequence[str]) -> argparse.Namespace:
    """What `words` say; UsageError where that is nothing. The parser's memory is free again when the verb runs."""
    parser = command_line(_verb_in(words))
    parsed, unknown = parser.parse_known_args(words, argparse.Namespace(set_after=[]))
    if unknown:
        near = did_you_mean(unknown[0].partition("=")[0], _options_of(parser, parsed.verb))
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
    if parsed.verb is None:  # not left to argparse: it would say this of an option that it does not know, too
        raise UsageError("expected a verb", parser.format_usage())
    return parsed


def _options_of(parser: argparse.ArgumentParser, verb: str | None) -> list[str]:
    """The options of the program and of one verb."""
    known: list[str] = []
    for action in parser._actions:
        known += action.option_strings
        if isinstance(action.choices, dict) and verb in action.choices:
            known += _options_of(action.choices[verb], None)
    return known


def _verb_in(words: Sequence[str]) -> Sequence[str]:
    """The word that is the verb, or would have to be; none where there is none."""
    at = 0
    while words[at : at + 1] and words[at].startswith("-"):
        at += 2 if words[at] in ("--config", "--set") else 1
    return words[at : at + 1]


def command_line(first: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser of a command line that begins with `first`; where that is a verb the others are not loaded."""
    parser = _Parser(
        prog="dps-agent",
        description="Gives this device its Azure IoT Hub: proves its TPM to the Device Provisioning Service.",
        epilog=_EXIT_STATUSES,
    )
    _add_common(parser, "set_before")
    parser.add_argument("--version", action="store_true", help="show what is installed, as the verb does")
    parser.set_defaults(config=None, set_before=[], json=False, verbose=False)
    verbs = parser.add_subparsers(dest="verb", metavar="verb", title="verbs")
    for name in [name for name in VERBS if name in first] or VERBS:
        verb: Verb = __import__(f"{__name__}.{name.replace('-', '_')}", fromlist=["VERB"]).VERB
        own = verbs.add_parser(verb.name, help=verb.help, description=verb.help[0].upper() + verb.help[1:] + ".")
        verb.add_arguments(own)
        _add_common(own, "set_after")
        own.set_defaults(run=verb.run)
    return parser


def _add_common(parser: argparse.ArgumentParser, set_name: str) -> None:
    """The options that stand before or after the verb; without defaults, so that the second does not undo the first."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help=f"read this file instead of {SYSTEM_FILE} and config.d beside that",
    )
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        dest=set_name,
        action="append",
        default=argparse.SUPPRESS,
        help="change one setting, e.g. tpm.backend=wire; may be repeated",
    )
    parser.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON document instead of text"
    )
    parser.add_argument(
        "-v", "--verbose", action="store_true", default=argparse.SUPPRESS, help="show each request, without secrets"
    )


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
