"""`dps-agent diag`: one archive for a report, secrets removed."""

from __future__ import annotations

import contextlib
import os
import sys
import time

from dps_agent.host.cli import check, config, status, version
from dps_agent.host.cli.verb import (
    Arguments,
    Outcome,
    UsageError,
    Verb,
    configuration_of,
    discard,
    error_document,
    exit_word,
)
from dps_hal.errors import AskOperator, DpsError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from dps_agent.host.cli.verb import Declared


def add_arguments(parser: Declared) -> None:
    """Where it goes, and whether the network may be used."""
    parser.add_argument(
        "--output",
        metavar="FILE",
        default=None,
        help="write this new file, - for stdout (default: dps-agent-diag-TIME-DEVICE.tar.gz here)",
    )
    parser.add_argument("--offline", action="store_true", help="leave the network alone")


def run(arguments: Arguments) -> Outcome:
    """Collects what can be collected: the worse a device is, the more its report is needed."""
    from dps_agent.host import diag
    from dps_agent.host.private_file import write_private
    from dps_hal.platform import to_json

    if arguments.output == "-" and (arguments.json or sys.stdout.isatty()):
        raise UsageError("--output -: expected a stdout for the archive alone; came a terminal, or --json as well")
    try:
        configuration = configuration_of(arguments, need_id_scope=False)
    except DpsError:
        configuration = None  # what ails the settings is in check.json
    device, checked = check.examine(_arguments(arguments, only=[]))
    documents = {
        "version.json": _document(lambda: version.VERB.run(arguments)),
        "settings.json": _document(lambda: config.VERB.run(_arguments(arguments, action="show"))),
        "check.json": {"code": checked.code, **checked.document},
        "status.json": _document(lambda: status.VERB.run(_arguments(arguments, remote=False))),
    }
    texts = {"system.txt": diag.system(), "journal.txt": diag.journal()}
    registration_id = "unknown"
    if configuration is not None:
        documents["tpm.json"] = diag.tpm_document(device)
        texts["state-folder.txt"] = diag.state_folder(configuration.state_dir)
        with contextlib.suppress(DpsError):  # tpm.json says why
            registration_id = device.registration_id.replace(":", "_")
    name = f"dps-agent-diag-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{registration_id}"
    members = {name: to_json(diag.without_payload(content)) + "\n" for name, content in documents.items()} | texts
    packed = diag.archive(name, members, diag.secrets_of(configuration, os.environ))
    if arguments.output == "-":
        try:
            sys.stdout.buffer.write(packed)
            sys.stdout.buffer.flush()
        except OSError as error:
            discard(sys.stdout)
            raise AskOperator("agent.file", f"the archive cannot be written to stdout: {error.strerror}") from None
        return Outcome([], {})
    path = arguments.output or f"{name}.tar.gz"
    write_private(path, packed)
    lines = [path, f"holds {', '.join(members)}; passwords, tokens, keys and payloads were removed"]
    lines.append("read it before you send it: it names this device, its hub, its files and users")
    return Outcome(lines, {"file": path, "members": list(members)})


def _arguments(arguments: Arguments, **own: Any) -> Arguments:
    """What another verb is given."""
    return Arguments(**{**vars(arguments), **own})


def _document(run: Callable[[], Outcome]) -> dict[str, Any]:
    """The document of another verb, as its --json has it."""
    try:
        outcome = run()
    except DpsError as error:
        return {"code": exit_word(error), "error": error_document(error)}
    return {"code": outcome.code, **outcome.document}


VERB = Verb("diag", "write one archive for a report, secrets removed", add_arguments, run)
