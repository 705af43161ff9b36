"""The service API of one DPS as enrolling needs it: whose it is, who asks, and three requests.

Source: DPS service API 2021-10-01, and for enrolments with a credential policy 2025-07-01-preview; tokens as in
`dps_agent.sas`, of a shared access policy with the right to write enrolments.
"""

import base64
import hmac
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote

from dps_agent.effects import NoReply, Reply
from dps_agent.host.network.https import DpsConnection
from dps_agent.sas import SasToken, percent_encode, string_to_sign
from dps_hal.errors import AskOperator
from dps_hal.platform import from_json

BULK_LIMIT = 10  # enrolments in one request
CREATE = "create"
UPDATE_IF_MATCH = "updateIfMatchETag"
TIMEOUT_S = 60.0
TOKEN_LIFE_S = 600  # a request takes at most a tenth of it; the rest is for clocks that differ
API_VERSION = "2021-10-01"
POLICY = "credentialPolicyName"  # of an enrolment: whose CA issues certificates for the device
ISSUING_API_VERSION = "2025-07-01-preview"  # the first that has it
_FIELDS = ("HostName", "SharedAccessKeyName", "SharedAccessKey")


class Credentials(NamedTuple):
    """A service and one of its shared access policies."""

    host: str  # name, or name:port
    policy: str
    key: bytes

    def __repr__(self) -> str:
        return f"Credentials({self.host!r}, {self.policy!r})"

    def token(self, now_s: float) -> SasToken:
        """A token for the service, from `now_s` (Unix seconds) on."""
        resource, expires_at_s = percent_encode(self.host.partition(":")[0]), int(now_s) + TOKEN_LIFE_S
        signature = hmac.digest(self.key, string_to_sign(resource, expires_at_s), "sha256")
        return SasToken(resource, expires_at_s, signature, self.policy)


def credentials_of(text: str, where: str) -> Credentials:
    """Reads a connection string, as Azure's portal shows it; AskOperator `config.invalid`, which never quotes it."""
    fields = {name: value for name, _, value in (part.partition("=") for part in text.strip().split(";"))}
    missing = [name for name in _FIELDS if not fields.get(name)]
    wanted = "HostName=…;SharedAccessKeyName=…;SharedAccessKey=…"
    if missing:
        raise AskOperator("config.invalid", f"{where}: expected {wanted}; {', '.join(missing)} is missing")
    try:
        key = base64.b64decode(fields["SharedAccessKey"], validate=True)
    except ValueError:  # no base64, or no ASCII
        raise AskOperator("config.invalid", f"{where}: SharedAccessKey is no base64") from None
    return Credentials(fields["HostName"], fields["SharedAccessKeyName"], key)


class Service:
    """One connection to the service; for one thread, but for `abort`."""

    def __init__(self, credentials: Credentials, ca_file: str, proxy: str) -> None:
        self._credentials = credentials
        endpoint = f"https://{credentials.host}"
        self._connection = DpsConnection(endpoint, "", ca_file, TIMEOUT_S, "dps-enroll", proxy)

    def bulk(self, mode: str, records: Sequence[Mapping[str, Any]]) -> Reply | NoReply:
        """Up to `BULK_LIMIT` enrolments at once, each of which succeeds or fails for itself."""
        has_policy = any(POLICY in record for record in records)
        return self._send("POST", "/enrollments", {"enrollments": list(records), "mode": mode}, has_policy)

    def enrollment(self, registration_id: str, with_policy: bool) -> Reply | NoReply:
        """What the service has under a registration id."""
        return self._send("GET", f"/enrollments/{quote(registration_id, safe='')}", None, with_policy)

    def abort(self) -> None:
        """Ends a request that is under way in another thread."""
        self._connection.abort()

    def close(self) -> None:
        """Ends the connection."""
        self._connection.close()

    def _send(self, method: str, path: str, body: object, has_policy: bool) -> Reply | NoReply:
        """One request, by the version of the API that it takes: without a policy none is asked of a preview."""
        encoded = b"" if body is None else json.dumps(body).encode()
        path = f"{path}?api-version={ISSUING_API_VERSION if has_policy else API_VERSION}"
        return self._connection.request(method, path, encoded, self._credentials.token(time.time()))


def refusals_of(reply: Reply) -> dict[str, tuple[int, str]]:
    """Registration id in lower case -> code and words, of each enrolment of a bulk that failed.

    ValueError where the answer is not one to a bulk.
    """
    document = from_json(reply.body)
    if not isinstance(document, dict) or not isinstance(document.get("isSuccessful"), bool):
        raise ValueError("expected isSuccessful and errors")
    refusals = {}
    for error in document.get("errors") or ():
        code, words = int(error["errorCode"]), str(error.get("errorStatus", ""))
        refusals[str(error["registrationId"]).lower()] = code, words
    if document["isSuccessful"] == bool(refusals):
        raise ValueError(f"isSuccessful is {document['isSuccessful']}, and {len(refusals)} errors are listed")
    return refusals
