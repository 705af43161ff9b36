"""`dps-agent import-key`: has the TPM seal the key in `device_key_file`, which then lies nowhere else."""

from __future__ import annotations

from dps_agent.host.cli.verb import Outcome, Verb, configuration_of, no_arguments, table
from dps_agent.host.config import backend_shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from dps_agent.host.cli.verb import Arguments


def run(arguments: Arguments) -> Outcome:
    """Imports the key under the storage root key, tries it, and replaces the file by what this TPM alone can use."""
    from dps_agent.host.sealing import seal_key_file

    configuration = configuration_of(arguments, need_id_scope=False)
    done = seal_key_file(configuration)
    path = configuration.device_key_file
    title = (
        f"the key in {path} is sealed by this TPM" if done else f"the key in {path} was sealed before, nothing was done"
    )
    rows = [("  registration id", configuration.registration_id.lower()), ("  TPM", backend_shown(configuration))]
    return Outcome([title, *table(rows)], {"sealed": True, "alreadySealed": not done, "deviceKeyFile": path})


VERB = Verb("import-key", "have the TPM seal the device's key, and shred its file", no_arguments, run)
