"""`dps-agent reset`: forgets the assignment; the TPM's own keys stay."""

from __future__ import annotations

import contextlib
import os
import sys

from dps_agent.host.cli.running import ask_service
from dps_agent.host.cli.verb import Outcome, UsageError, Verb, configuration_of
from dps_hal.contracts import CERTIFICATE, IDENTITY, Store
from dps_hal.errors import AskOperator, DpsError, IdentityStale

TYPE_CHECKING = False
if TYPE_CHECKING:
    from dps_agent.host.cli.verb import Arguments, Declared
    from dps_agent.host.config import Configuration
    from dps_hal.host.files import LockedStore


def add_arguments(parser: Declared) -> None:
    """The answer to the question before erasing."""
    parser.add_argument("--yes", action="store_true", help="do not ask; required where nobody can be asked")


def run(arguments: Arguments) -> Outcome:
    """Erases both records; needs no network, and the TPM only where the hub key is kept in it as well."""
    from dps_agent.host.local.statefile import read_live
    from dps_hal.host.state_dir import open_store

    configuration = configuration_of(arguments, need_id_scope=False)
    store = open_store(configuration.state_dir)
    try:
        found = {record: text for record in configuration.forgotten if (text := _description(store, record))}
    except AskOperator as error:
        if error.code != "store.denied" or read_live(configuration) is None:
            raise
        # Whoever made the folder his own would take the device's identity away from the service.
        what = error.message.partition(";")[0]
        raise AskOperator("agent.denied", f"{what}; it is the running service's") from None
    if found and not arguments.yes:
        _ask(found, configuration.state_dir, arguments.json)
    lines = [f"erased {text}" for text in found.values()] or ["nothing was stored"]
    document = {"erased": list(found), "stateDir": configuration.state_dir, "backend": configuration.backend}
    if ask_service(configuration, "/command/reset") is not None:
        return Outcome([*lines, "the service that runs registers the device again"], document)
    there_is_one = os.path.lexists(configuration.state_dir)  # the lock of none would make it
    with store.exclusive() if there_is_one else contextlib.nullcontext():
        warnings = _withdraw_key(configuration, store)
        if os.path.lexists(configuration.issued_key_path):
            from dps_agent.host.issued_keys import remove_key

            warnings += remove_key(configuration)  # first: what was cut behind it is another registration
        for record in configuration.forgotten:  # also where nothing is found: a half-erased record ends here
            store.erase(record)
    lines += [f"warning: {warning}" for warning in warnings]
    document["warnings"] = warnings
    return Outcome([*lines, f"state folder: {configuration.state_dir}"], document)


def _withdraw_key(configuration: Configuration, store: LockedStore) -> list[str]:
    """Removes the hub key from where other programs find it; returns what stands in the way, as warnings.

    It goes first: without the record nobody would know whose key that is.
    """
    from dps_agent.host import kept_key

    handle = configuration.tpm.persist_at
    try:
        stored = store.load(IDENTITY)
    except DpsError:
        stored = None  # another version's, or unreadable, and what it says of the TPM is unknown
    if stored is None or not (handle or kept_key.noted(stored.payload)[0]):
        return []

    from dps_agent.host.parts import offline_runner, open_tpm

    try:
        tpm = open_tpm(configuration)
        offline_runner(configuration, tpm).run(kept_key.withdraw(tpm, handle))
    except DpsError as error:
        return [f"the hub key stays in the TPM: {error.message}"]
    return []


def _description(store: Store, record: str) -> str:
    """What a record holds, in words; "" where it is empty."""
    from dps_agent.assignment import decode

    try:
        stored = store.load(record)
        if stored is None:
            return ""
        if record == CERTIFICATE:
            return "the certificate that DPS issued"
        if record != IDENTITY:
            return "the count of failed attempts"
        assignment, _, _ = decode(stored.payload)
    except IdentityStale:
        return "an assignment that is damaged"
    except DpsError as error:
        if error.code == "store.io":
            return f"the record '{record}', which cannot be read"
        if error.code != "store.unknown_version":
            raise
        return f"the record '{record}' of another version of dps-agent"
    return f"the assignment of device '{assignment.device_id}' to hub '{assignment.assigned_hub}'"


def _ask(found: dict[str, str], state_dir: str, as_json: bool) -> None:
    """Returns after a yes; UsageError where nobody can be asked, AskOperator after anything else."""
    if as_json or not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError("reset erases the stored assignment: confirm with --yes")
    sys.stderr.write(f"This erases {' and '.join(found.values())}, stored in {state_dir}. Continue? [y/N] ")
    sys.stderr.flush()
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise AskOperator("agent.declined", "nothing was erased")


VERB = Verb("reset", "forget the assignment", add_arguments, run)
