"""`dps-agent reset`: forgets the assignment; the TPM's own keys stay."""

import argparse
import sys

from dps_agent.host.cli.running import ask_service
from dps_agent.host.cli.verb import Outcome, UsageError, Verb, configuration_of
from dps_hal.contracts import IDENTITY, PROGRESS, Store
from dps_hal.errors import AskOperator, DpsError, IdentityStale


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The answer to the question before erasing."""
    parser.add_argument("--yes", action="store_true", help="do not ask; required where nobody can be asked")


def run(arguments: argparse.Namespace) -> Outcome:
    """Erases both records; needs no TPM and no network."""
    from dps_hal.files import open_store

    configuration = configuration_of(arguments, need_id_scope=False)
    store = open_store(configuration.state_dir)
    found = {record: text for record in (IDENTITY, PROGRESS) if (text := _description(store, record))}
    if found and not arguments.yes:
        _ask(found, configuration.state_dir, arguments.json)
    lines = [f"erased {text}" for text in found.values()] or ["nothing was stored"]
    document = {"erased": list(found), "stateDir": configuration.state_dir, "backend": configuration.tpm.backend}
    if ask_service(configuration, "/command/reset", 60) is not None:
        return Outcome([*lines, "the service that runs registers the device again"], document)
    for record in (IDENTITY, PROGRESS):  # also where nothing is found: a half-erased record ends here
        store.erase(record)
    return Outcome([*lines, f"state folder: {configuration.state_dir}"], document)


def _description(store: Store, record: str) -> str:
    """What a record holds, in words; "" where it is empty."""
    from dps_agent.assignment import decode

    try:
        stored = store.load(record)
        if stored is None:
            return ""
        if record != IDENTITY:
            return "the count of failed attempts"
        assignment, _, _ = decode(stored.payload)
    except IdentityStale:
        return "an assignment that is damaged"
    except DpsError as error:
        if error.code != "store.unknown_version":
            raise
        return f"the record '{record}' of another version of dps-agent"
    return f"the assignment of device '{assignment.device_id}' to hub '{assignment.assigned_hub}'"


def _ask(found: dict[str, str], state_dir: str, as_json: bool) -> None:
    """Returns after a yes; UsageError where nobody can be asked, AskOperator after anything else."""
    if as_json or not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError("reset erases the stored assignment: confirm with --yes")
    sys.stderr.write(f"This erases {', '.join(found.values())} in {state_dir}. Continue? [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise AskOperator("agent.interrupted", "nothing was erased")


VERB = Verb("reset", "forget the assignment", add_arguments, run)
