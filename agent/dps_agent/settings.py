"""What an operator decides, as the logic sees it."""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NamedTuple

    from dps_agent.fleet import Fleet

    class Settings(NamedTuple):
        """The settings of one device's life; the host reads them from TOML, a board from JSON."""

        id_scope: str
        registration_id: str  # AUTO: derived from the EK
        endpoint: str  # "https://name[:port]", kept in the record
        poll: str  # POLL_LOOKUP or POLL_OPERATION
        payload: "dict[str, Any] | None"  # custom allocation input
        registration_budget_s: int
        first_contact_spread_s: int  # seconds over which it is spread, 5 at least; 0: as `fleet` says
        hub_suffixes: "tuple[str, ...]"
        fleet: "Fleet"
        keep_alive_s: int  # MQTT's, on the connection to the hub
        token_life_s: int  # a hub token's; it is renewed at 80 % of that at the latest; 0: as `fleet` says
        under: int  # a short digest of what a failed registration depends on; 0: none
        model_id: str  # of Plug and Play, empty: none
        features: "tuple[str, ...]"  # what the hub is asked for beside telemetry; AUTO among them: for all
        attestation: str  # one of ATTESTATIONS: how the device shows who it is
        certificate: str  # ISSUED: DPS issues the certificate by which it connects to its hub; empty: none does
        api_version: str  # of DPS
else:
    from dps_hal.named import namedtuple

    Settings = namedtuple(
        "Settings",
        (
            "id_scope",
            "registration_id",
            "endpoint",
            "poll",
            "payload",
            "registration_budget_s",
            "first_contact_spread_s",
            "hub_suffixes",
            "fleet",
            "keep_alive_s",
            "token_life_s",
            "under",
            "model_id",
            "features",
            "attestation",
            "certificate",
            "api_version",
        ),
    )

AUTO = "auto"
KEEP_ALIVE_S = 240  # balancers in front of hubs drop what is silent for four minutes
KEEP_ALIVE_LIMIT_S = 1177  # a hub drops after 1.5 times that, and after 1767 s at the latest; IoT Hub MQTT guide
TPM = "tpm"
SYMMETRIC_KEY = "symmetric-key"
X509 = "x509"
ATTESTATIONS = (TPM, SYMMETRIC_KEY, X509)
ISSUED = "issued"
CERTIFICATES = True  # a device may have some; False on every board, where tools/deploy leaves out what they alone need
API_VERSION = "2021-10-01"
ISSUING_API_VERSION = "2025-07-01-preview"  # the first one in which a registration may ask for a certificate
POLL_LOOKUP = "lookup"
POLL_OPERATION = "operation"


def is_wanted(feature: str, settings: Settings) -> bool:
    """Whether the hub is to be asked for this: "methods", "twin" or "messages"."""
    return feature in settings.features or AUTO in settings.features
