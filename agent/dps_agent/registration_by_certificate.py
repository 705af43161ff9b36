"""A registration by a certificate: the connection shows it, so nothing of it is in the requests.

DPS knows the certificate itself (an individual enrolment), or a CA above it (a group), and sends no key: the device
shows the same certificate to its hub. Source: Azure DPS, "X.509 certificate attestation".
"""

from dps_agent.attestation import Registering

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any

    from dps_agent.attestation import Opening
    from dps_agent.effects import Effect
    from dps_agent.settings import Settings


class ByCertificate(Registering):
    """See `dps_agent.attestation.Registering`."""

    def opening(self, settings: "Settings", registration_id: str) -> "Generator[Effect, Any, Opening]":
        """Nothing is said that the connection has not shown."""
        yield from ()
        return None, None, b"", b""
