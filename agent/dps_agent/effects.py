"""What the logic may ask for, and the law of asking.

The logic is written as generators: each yields one of the values below and is sent the answer. A runner (Linux
threads, asyncio on a board, virtual time in tests) does the work.

The law:

1. `Http` and everything that concerns the hub is always answered by a value; it never raises into the generator.
2. A failure of the TPM or the store is thrown into the generator as one of the four classes of `dps_hal.errors`.
3. The runner always ends a generator with `close()`. The logic owns no resource, so no `finally` in it ever yields.
4. `Uptime` (monotonic) drives every delay and budget. `UtcNow` serves token expiry, certificate verdicts and the times
   in a record, nothing else.
5. Every yield is bound to a name that is annotated with the answer's type; those answered by None have none.
6. Only `Commit` makes a hub real.
7. `NextEvent` is the only way to hear of what nobody asked for; between two of them nothing is lost, only delayed.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any, NamedTuple, TypeAlias

    from dps_agent.hub_effects import (
        Acknowledge,
        Connect,
        Disconnect,
        GiveUp,
        NextEvent,
        Publish,
        SendAgain,
        Subscribe,
        Tell,
    )
    from dps_agent.sas import SasToken

    class Http(NamedTuple):
        """One request to the DPS endpoint; answered by Reply or NoReply.

        `path` begins with "/", is percent-encoded and carries the query. `body` is JSON, empty for none.
        """

        method: str
        path: str
        body: bytes
        authorization: SasToken | None

    class Reply(NamedTuple):
        """An HTTP answer that arrived whole: header names in lower case, `date_s` the Date header in UTC seconds."""

        status: int
        headers: dict[str, str]
        body: bytes
        date_s: int | None

    class NoReply(NamedTuple):
        """No whole answer came. `reason` is a NO_REPLY_* word, then optionally ": " and the system's own text.

        On Linux the word may be a code such as `tpm.memory` instead: what ails this device, so that it asked nobody.

        `request_sent` is False only if the server cannot have seen the request.
        """

        reason: str
        request_sent: bool

    class ReadEndorsementKey(NamedTuple):
        """Answered by the EK's marshalled TPM2B_PUBLIC, bytes; `name`: of the one in the record, empty for none."""

        name: bytes

    class ReadStorageRootKey(NamedTuple):
        """Answered by the SRK's marshalled TPM2B_PUBLIC, bytes."""

    class ImportKey(NamedTuple):
        """Answered by the wrapped key, bytes, that the activation blob carried."""

        activation: bytes

    class Sign(NamedTuple):
        """Answered by HMAC-SHA256 of `message`, 32 bytes, by the wrapped key; empty: by the device's own.

        That of a certificate makes another signature: ECDSA over P-256 with SHA-256, the two numbers, 64 bytes.
        """

        wrapped_key: bytes
        message: bytes

    class Verify(NamedTuple):
        """Answered by whether `signature` is one of `message` by the device's own key, whose signatures all differ."""

        message: bytes
        signature: bytes

    class ReadRequest(NamedTuple):
        """Answered by a request (PKCS #10, DER) for the certificate that DPS issues, always the same for its name.

        Its key is made where there is none. With an empty name nothing is made: what there is, or empty.
        """

        registration_id: str

    class FindIssuers(NamedTuple):
        """Answered by a tuple: for each of these certificates, DER, the place of its issuer's, which has signed it.

        -1 where that is none of them.
        """

        certificates: "tuple[bytes, ...]"

    class Uptime(NamedTuple):
        """Answered by monotonic seconds, a float."""

    class UtcNow(NamedTuple):
        """Answered by `dps_hal.contracts.Utc`."""

    class ConfirmClock(NamedTuple):
        """Before a token is made, or a certificate shown that is renewed in time; answered by None once all were asked
        for the time who may know it.

        Where nobody vouches for the clock the certificate of `hub` is looked at; where there is no hub, "", or it is
        not reached, DPS is asked.
        """

        hub: str

    class Random(NamedTuple):
        """Answered by a float in [0, 1)."""

    class Sleep(NamedTuple):
        """Answered by None after `delay_s` seconds, or earlier where somebody asks for haste.

        `reason` is what status output shows meanwhile.
        """

        delay_s: float
        reason: str

    class Commit(NamedTuple):
        """Answered by None once `payload` is durably the content of `record`."""

        record: str
        payload: bytes

    class LoadRecord(NamedTuple):
        """Answered by `dps_hal.contracts.StoredRecord` or None."""

        record: str

    class ForgetOlder(NamedTuple):
        """Answered by None once no earlier content of `record` is left in the storage."""

        record: str

    Effect: TypeAlias = (
        Http
        | ReadEndorsementKey
        | ReadStorageRootKey
        | ImportKey
        | Sign
        | Verify
        | ReadRequest
        | FindIssuers
        | Uptime
        | UtcNow
        | Random
        | Sleep
        | Commit
        | LoadRecord
        | ForgetOlder
        | ConfirmClock
        | Connect
        | Subscribe
        | Publish
        | SendAgain
        | GiveUp
        | Acknowledge
        | NextEvent
        | Disconnect
        | Tell
    )
    Exchange: TypeAlias = Generator[Effect, Any, Any]
    Records: TypeAlias = tuple[tuple[str, bytes], ...]  # what is to be committed, in this order: record and payload
else:
    from dps_hal.named import namedtuple

    Http = namedtuple("Http", ("method", "path", "body", "authorization"))
    Reply = namedtuple("Reply", ("status", "headers", "body", "date_s"))
    NoReply = namedtuple("NoReply", ("reason", "request_sent"))
    ReadEndorsementKey = namedtuple("ReadEndorsementKey", ("name",))
    ReadStorageRootKey = namedtuple("ReadStorageRootKey", ())
    ImportKey = namedtuple("ImportKey", ("activation",))
    Sign = namedtuple("Sign", ("wrapped_key", "message"))
    Verify = namedtuple("Verify", ("message", "signature"))
    ReadRequest = namedtuple("ReadRequest", ("registration_id",))
    FindIssuers = namedtuple("FindIssuers", ("certificates",))
    Uptime = namedtuple("Uptime", ())
    UtcNow = namedtuple("UtcNow", ())
    ConfirmClock = namedtuple("ConfirmClock", ("hub",))
    Random = namedtuple("Random", ())
    Sleep = namedtuple("Sleep", ("delay_s", "reason"))
    Commit = namedtuple("Commit", ("record", "payload"))
    LoadRecord = namedtuple("LoadRecord", ("record",))
    ForgetOlder = namedtuple("ForgetOlder", ("record",))

NO_REPLY_DNS = "dns"  # nobody answered what the name stands for
NO_REPLY_CONNECT = "connect"  # refused, unreachable, timed out before a connection stood
NO_REPLY_TLS = "tls"  # the peer's certificate or name was not verified; of the next four no verdict came
NO_REPLY_NOT_TLS = "not_tls"  # what answers speaks something else
NO_REPLY_TLS_VERSION = "tls_version"  # it speaks nothing newer than TLS 1.1
NO_REPLY_TLS_CLIENT = "tls_client_certificate"  # it wants a certificate from the device, or another one
NO_REPLY_TLS_FAILED = "tls_failed"  # no cipher in common, or whatever else
NO_REPLY_TIMEOUT = "timeout"  # the request's total deadline passed
NO_REPLY_CLOSED = "closed"  # the connection ended before the answer was whole (also a body cut off half way)
NO_REPLY_TOO_LARGE = "too_large"  # headers or body over the bound
NO_REPLY_PROTOCOL = "protocol"  # not HTTP, or not MQTT
NO_REPLY_MEMORY = "memory"  # a board's heap had no room for the handshake: no word about peer or clock
NO_REPLY_NOT_FOUND = "not_found"  # there is no such name, or the WebSocket was refused with 404: no such hub
NO_REPLY_PROXY = "proxy"  # the HTTP proxy on the way wants other credentials
NO_REPLY_PROXY_SCHEME = "proxy_scheme"  # it wants them in a way that this agent has not


class Failed(Exception):
    """Why no whole answer came: `reason` is the word of a NoReply, the message the rest. Runners make it one."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason
