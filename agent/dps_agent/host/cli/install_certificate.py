"""`dps-agent install-certificate`: puts the device's certificate where the agent has it, once all in it was checked."""

from __future__ import annotations

from dps_agent.host.cli.verb import Outcome, Verb, configuration_of, table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from dps_agent.host.cli.verb import Arguments, Declared


def add_arguments(parser: Declared) -> None:
    """The file that came of the request."""
    parser.add_argument(
        "file",
        metavar="FILE",
        help="the certificate and those of the CAs above it, PEM, as whoever issued it sent them",
    )


def run(arguments: Arguments) -> Outcome:
    """Checks key, name, life and chain; the running service shows it from its next connection on."""
    configuration = configuration_of(arguments, need_id_scope=False)
    from dps_agent.host.device_certificates import require_cryptography

    require_cryptography()
    from dps_agent.host.certificate_requests import install

    found = install(configuration, arguments.file)
    rows = [
        ("  subject", found.subject),
        ("  issued by", found.issuer),
        ("  until", found.not_after),
        ("  SHA-256", found.sha256),
        ("  CAs behind it", str(found.authorities)),
    ]
    title = f"the certificate is in {configuration.certificate_file}: it is shown from the next connection on"
    document = {
        "certificateFile": configuration.certificate_file,
        "subject": found.subject,
        "issuer": found.issuer,
        "notAfter": found.not_after,
        "sha256": found.sha256,
        "authorities": found.authorities,
    }
    return Outcome([title, *table(rows)], document)


VERB = Verb("install-certificate", "check an issued certificate, and make it the device's", add_arguments, run)
