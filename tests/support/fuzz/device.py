"""What the agent on Linux and on boards reads of networks, of the TPM and of files."""

from __future__ import annotations

import json
import os
import tempfile
import tomllib
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa

from dps_agent import assignment, progress, session
from dps_agent.client.errors import AgentError
from dps_agent.client.values import error_in, event_of
from dps_agent.der import certificates, not_after_s
from dps_agent.effects import Failed, Random, Reply, Uptime
from dps_agent.host.config import ConfigurationError, load
from dps_agent.host.device_certificates import certificates_in
from dps_agent.host.local.heads import REQUEST_HEADERS, read_head
from dps_agent.host.network.proxy import Proxy, ProxyRule, schemes_of
from dps_agent.host.network.websocket import Frames
from dps_agent.host.plain_toml import read_plain
from dps_agent.http1 import Reader
from dps_agent.hub_effects import Arrived, Publish, Tell
from dps_agent.issued import chain_for, chains_in, joined, name_of
from dps_agent.lifecycle import Lifecycle
from dps_agent.registration import read_register, refusal_of
from dps_agent.renewal import ACCEPTED, ANSWERS, ASKED, IDLE, Renewal
from dps_agent.session import Session
from dps_agent.utc import http_date_s
from dps_board.keys import read_values
from dps_board.mqtt import HubConnection
from dps_board.ntp import read_answer
from dps_board.tls import Trust
from dps_hal.contracts import IDENTITY
from dps_hal.errors import AskOperator, DpsError, IdentityStale
from dps_hal.host.signing_key import TEMPLATE, KeyFile, from_pem, to_pem
from dps_hal.platform import from_json, to_base64, to_json
from dps_hal.store.slots import VALID, decode_slot
from dps_hal.tpm import keys
from dps_hal.tpm.activation import join_activation, split_activation
from dps_hal.tpm.commands import OWNER, Key
from dps_hal.tpm.ek_certificate import certified_key
from dps_hal.tpm.errors import RefusedError
from dps_hal.tpm.wire import WireCommands
from support.fuzz.target import DEEP, Target, accepts, halves
from support.issuing import ISSUING, ROOT, IssuingTpm, certificate, request
from support.vectors import load as vectors
from support.vectors import unbase64, unhex
from support.world import DEVICE, World, settings

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from dps_hal.contracts import WhileWaiting

BODY_LIMIT = 4096
MARK = b"\1\2\3\4\5\6\7\x08"
EK = unbase64(vectors("published")["registration_id"][0]["endorsement_key"])


def _outcome(reading: Generator[Any, Any, Any], pieces: list[bytes]) -> Any:
    """What becomes of a reading that gets these pieces, then an end."""
    try:
        next(reading)
        for piece in [*pieces, b""]:
            reading.send(piece)
    except StopIteration as read:
        return read.value
    except Failed as failed:
        return failed.reason
    return "waits"


def _either_way(make: Callable[[], Generator[Any, Any, Any]], content: bytes) -> bool:
    """Whether something is read; whole or byte by byte, it is the same."""
    whole = _outcome(make(), [content] if content else [])
    bytewise = _outcome(make(), [bytes([byte]) for byte in content])
    assert whole == bytewise, f"{whole!r} and byte by byte {bytewise!r}"
    return not isinstance(whole, str)


def _http_answer(content: bytes) -> bool:
    def reading() -> Generator[Any, Any, Any]:
        (status, headers, body, date_s), _ = yield from Reader(BODY_LIMIT, end_counts=True).answer()
        assert len(body) <= BODY_LIMIT
        return status, headers, bytes(body), date_s

    return _either_way(reading, content)


def _http_request(content: bytes) -> bool:
    return _either_way(lambda: read_head(Reader(0, REQUEST_HEADERS)), content)


def _json(content: bytes) -> bool:
    try:
        value = from_json(content)
    except ValueError:
        return False
    try:
        again = to_json(value)
    except (ValueError, OverflowError):  # a half of a surrogate pair, a number of 40 digits
        return False
    assert from_json(again) == value
    return True


def _dps_answer(content: bytes) -> bool:
    head, body = halves(content)
    words = head.split(b" ")
    status = int(words[0]) if words[0][:3].isdigit() and len(words[0]) == 3 else 200
    reply = Reply(status, {"retry-after": words[-1].decode("latin-1")}, body, None)
    error = refusal_of(reply)
    assert error.message.isprintable() and error.code.startswith("dps.")
    return accepts(DpsError, lambda: read_register(reply))


def _record(content: bytes) -> bool:
    progress.decode_fleet(content)
    progress.decode_progress(content)
    try:
        found, text, seal = assignment.decode(content)
    except IdentityStale:
        return False
    assert text + seal == content
    assignment.difference(found, settings())
    accepts(IdentityStale, lambda: keys.unwrap(found.wrapped_key))
    return True


def _slot(content: bytes) -> bool:
    slot = decode_slot(content, 0xFF)
    assert slot.payload is None or slot.payload in content
    return slot.state == VALID


class _Answering:
    """A TPM whose responses are drawn; the size in each is made right where the first byte says so."""

    def __init__(self, content: bytes) -> None:
        self._framed, self._left = bool(content[:1] < b"\x80"), content[1:]

    def send(self, command: bytes, limit_s: float, while_waiting: WhileWaiting | None) -> bytes:
        size, self._left = int.from_bytes(self._left[:2]) & 0x3FF, self._left[2:]
        response, self._left = self._left[:size], self._left[size:]
        if self._framed and len(response) >= 10:
            response = response[:2] + len(response).to_bytes(4) + response[6:]
        return response

    def close(self) -> None: ...


def _tpm_commands(wire: WireCommands) -> list[Callable[[], object]]:
    key = Key(0x81000001, EK, keys.object_name(EK))
    return [
        lambda: wire.read_public(0x81010001),
        lambda: wire.create_primary(OWNER, keys.srk_template(), None, b""),
        lambda: wire.handles(0x81000000),
        lambda: wire.properties(0x100, 0x112),
        lambda: wire.nv_read_public(0x01C00002),
        lambda: wire.nv_read(key, 16, 0, True, None, b""),
        lambda: wire.hmac(key, b"x", wire.start_session(key)),
        wire.start_policy,
        wire.shutdown,
    ]


def _tpm_answer(content: bytes) -> bool:
    wire = WireCommands(_Answering(content[1:]), None)
    wire.begin(0.009)  # no command is sent again within so little
    commands = _tpm_commands(wire)
    return accepts((RefusedError, DpsError), commands[content[0] % len(commands) if content else 0])


def _tpm_seed(command: int, *responses: bytes) -> bytes:
    framed = b"".join((len(response) & 0x3FF).to_bytes(2) + response for response in responses)
    return bytes([command, 0]) + framed


def _tpm_seeds() -> list[bytes]:
    good = b"\x80\x01" + bytes(8)
    name = keys.sized(keys.object_name(EK))
    created = EK + keys.sized(b"") + keys.sized(bytes(32)) + bytes(8) + name
    with_password = b"\x80\x02" + bytes(8) + b"\x80\0\0\1" + len(created).to_bytes(4) + created + b"\0\0\1\0\0"
    session_started = good + b"\2\0\0\0" + keys.sized(bytes(16))
    return [
        _tpm_seed(0, good + EK + name + keys.sized(bytes(34))),
        _tpm_seed(1, with_password),
        _tpm_seed(2, good + b"\0\0\0\0\1\0\0\0\1\x81\0\0\1"),
        _tpm_seed(3, good + b"\0\0\0\0\6\0\0\0\1\0\0\1\5SWTP"),
        _tpm_seed(4, good + keys.sized(bytes(14)) + keys.sized(bytes(34))),
        _tpm_seed(5, b"\x80\x02" + bytes(8) + b"\0\0\0\4\0\2ab\0\0\1\0\0"),
        _tpm_seed(6, session_started, b"\x80\x02" + bytes(8) + b"\0\0\0\x22" + keys.sized(bytes(32)) + bytes(60)),
        _tpm_seed(7, session_started),
        _tpm_seed(8, good, b"\x80\x01\0\0\0\x0a\0\0\x09\x22"),
    ]


def _activation(content: bytes) -> bool:
    try:
        found = split_activation(content)
    except ValueError:
        return False
    assert join_activation(found) == content
    accepts((ValueError, AskOperator), lambda: keys.check_id_key_public(found.id_key_public))
    return True


def _public_area(content: bytes) -> bool:
    taken = [
        accepts(AskOperator, lambda: keys.check_ek_public(content)),
        accepts(AskOperator, lambda: keys.check_srk_public(content)),
        accepts((ValueError, AskOperator), lambda: keys.check_id_key_public(content)),
        accepts(IdentityStale, lambda: keys.unwrap(content)),
    ]
    accepts(AskOperator, lambda: keys.makers_template(content, b""))
    accepts(AskOperator, lambda: keys.makers_template(b"", content))
    return any(taken)


def _certificate(content: bytes) -> bool:
    accepts(ValueError, lambda: not_after_s(content))
    accepts(ValueError, lambda: certificates(content))
    try:
        modulus, exponent = certified_key(content)
    except ValueError:
        modulus, exponent = b"", 0
    try:
        other: Any = x509.load_der_x509_certificate(content).public_key()
    except Exception:  # it reads far more of it, and has many ways to say no
        return bool(modulus)
    if isinstance(other, rsa.RSAPublicKey):
        numbers = other.public_numbers()
        assert (int.from_bytes(modulus), exponent) == (numbers.n, numbers.e)
    return bool(modulus)


def _settings_file(content: bytes) -> bool:
    try:
        text = content.decode()
    except UnicodeDecodeError:
        text = ""
    plain = read_plain(text)
    assert plain is None or plain == tomllib.loads(text)
    with tempfile.NamedTemporaryFile(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as file:
        file.write(content)
        file.flush()
        return accepts(ConfigurationError, lambda: load(file.name, environ={}, need_id_scope=False))


def _board_settings(content: bytes) -> bool:
    return accepts(AskOperator, lambda: read_values(content, "config.json"))


def _websocket(content: bytes) -> bool:
    def unpacked(pieces: list[bytes]) -> Any:
        frames, out = Frames(), b""
        try:
            for piece in pieces:
                out += frames.unpack(piece)
        except Failed as failed:
            return failed.reason
        return out, frames.ping

    whole, bytewise = unpacked([content]), unpacked([bytes([byte]) for byte in content])
    assert whole == bytewise
    return not isinstance(whole, str) and bool(whole[0])


def _proxy(content: bytes) -> bool:
    head, rest = halves(content)
    names = schemes_of(rest.decode("latin-1"))
    assert len(names) == len(set(names)) and all(name.isprintable() for name in names)
    url = head.decode("utf-8", "surrogateescape")
    rule = ProxyRule("env", {"https_proxy": "http://p:1", "no_proxy": rest.decode("latin-1")})
    for host in ("hub.azure-devices.net", "10.1.2.3", "fe80::1"):
        rule.proxy_for(host, 443)
    return accepts(AskOperator, lambda: repr(Proxy(url, "test")))


def _hub_packets(content: bytes) -> bool:
    """The board's reader of MQTT; the one on Linux is paho's."""
    hub = HubConnection(Trust([]))

    def read(piece_size: int) -> Any:
        hub._connack, hub._events = None, []
        hub._packets = hub._read_packets()
        hub._want(next(hub._packets))
        at = 0
        try:
            while at < len(content):
                piece = content[at : at + min(piece_size, hub._wanted - hub._at)]
                at += len(piece)
                hub._take(piece)
        except Failed as failed:
            return failed.reason
        return hub._connack, list(hub._events)

    whole, bytewise = read(1024), read(1)
    assert whole == bytewise
    return not isinstance(whole, str) and whole[0] is not None


def _identity() -> Any:
    world = World()
    world.run(Lifecycle(settings()).live(True, False))
    return assignment.decode(world.store[IDENTITY])[0]


_ASSIGNMENT = _identity()
_TOPICS = {
    "c": f"devices/{DEVICE}/messages/devicebound/",
    "m": "$iothub/methods/POST/",
    "r": "$iothub/twin/res/",
    "d": "$iothub/twin/PATCH/properties/desired/",
}


def _hub_message(content: bytes) -> bool:
    """Topics and payloads of a hub that was connected to; each line of the input is one or the other."""
    device = Session(settings(), _ASSIGNMENT, {"agentVersion": "1"}, dict, 0, {})
    device.twin.grant(0.0)
    did = 0
    lines = content.split(b"\n")
    for at in range(0, len(lines) - 1, 2):
        topic = lines[at].decode("utf-8", "replace")
        message = Arrived(_TOPICS.get(topic[:1], "") + topic[1:], lines[at + 1], at)
        for generator in (device.twin.ask(float(at)), device._take_message(message)):
            answer: Any = None
            try:
                while True:
                    effect = generator.send(answer)
                    did += isinstance(effect, Tell | Publish)
                    if isinstance(effect, Publish):
                        assert "+" not in effect.topic and "#" not in effect.topic
                    answer = 1.0 if isinstance(effect, Uptime) else 0.5 if isinstance(effect, Random) else 1
            except StopIteration:
                pass
    session.decode_properties(content.decode("utf-8", "replace"))
    return did > len(lines) // 2


def _date(content: bytes) -> bool:
    return http_date_s(content.decode("latin-1")) is not None


def _time_answer(content: bytes) -> bool:
    return read_answer(content, MARK) is not None


def _event_line(content: bytes) -> bool:
    """What a program reads of the agent's socket."""
    try:
        found = event_of(content)
    except AgentError:
        return False
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        document = None
    assert isinstance(error_in(document, 500), AgentError)
    return found is not None


def _issued(content: bytes) -> bool:
    """A list of certificates, as DPS and hubs send it; where it is taken, so is the record that keeps it."""
    world = World()
    world.tpm = IssuingTpm()
    try:
        chain = world.run(chain_for(from_json(content), request(DEVICE)))
    except ValueError:
        return False
    assert chains_in(joined([chain])) == [chain]
    return True


_SHOWN = certificate(DEVICE, "line 4") + ISSUING
_HOLDER = _ASSIGNMENT._replace(wrapped_key=b"", chain=name_of(_SHOWN))
_FIRST_REQUEST = Renewal(_HOLDER, _SHOWN).request_id


def _renewed(content: bytes) -> bool:
    """What a hub says to a request, behind the beginning of its topic; whether a certificate is stored for it."""
    topic, body = halves(content)
    renewal = Renewal(_HOLDER, _SHOWN)
    renewal.state = ASKED
    world = World()
    world.tpm = IssuingTpm()
    assert world.run(renewal.take(Arrived(ANSWERS + topic.decode("utf-8", "replace"), body, 1)))
    assert renewal.state in (IDLE, ASKED, ACCEPTED) and len(renewal.reason) < 1000
    return renewal.assignment is not _HOLDER


def _issued_record(content: bytes) -> bool:
    return accepts(ValueError, lambda: chains_in(content))


def _record_seeds() -> list[bytes]:
    slots = [unhex(row["content"]) for row in vectors("records")["slots"]]
    return [payload for slot in slots if (payload := decode_slot(slot, 0xFF).payload)]


def _certificate_seeds() -> list[bytes]:
    made = unbase64(vectors("certificates")["endorsement_key"])
    return [made, made + b"\xff" * 40]


def _signing_key(content: bytes) -> bool:
    """The file of a key for TLS; what is taken is written as what is taken again."""
    try:
        key = from_pem(content)
    except ValueError:
        return False
    assert from_pem(to_pem(key)) == key
    return True


def _signing_key_seed() -> bytes:
    numbers = keys.sized(b"\x01" * 32)
    public = keys.sized(TEMPLATE[2:-4] + numbers + numbers)
    return to_pem(KeyFile(0x81000001, public, keys.sized(b"\x02" * 90)))


def _answers() -> list[bytes]:
    """Bodies of DPS."""
    final = vectors("status_lookup")["maximum_response"]
    challenge = b'{"message":"m","keyName":"registration","trackingId":"t","authenticationKey":"AAA="}'
    under_way = b'{"operationId":"4.00","status":"assigning"}'
    refused = b'{"errorCode":429001,"trackingId":"t","message":"m","timestampUtc":"2026-11-30T00:00:00Z"}'
    whole = {"operationId": "5.1", "status": "assigned", "registrationState": final}
    bodies = [(b"401", challenge), (b"202 3", under_way), (b"429 7", refused), (b"200", json.dumps(whole).encode())]
    return [head + b"\n" + body for head, body in [*bodies, (b"200", DEEP)]]


_HTTP = b"HTTP/1.1 200 OK\r\nDate: Fri, 15 Jan 2027 08:00:00 GMT\r\n"
TARGETS = (
    Target(
        "http-answer",
        "answers of DPS and of proxies (dps_agent.http1)",
        _http_answer,
        lambda: [
            _HTTP + b"Content-Length: 5\r\n\r\nhello",
            _HTTP + b"Transfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n0\r\nTrailer: 1\r\n\r\n",
            b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 429 No\nRetry-After: 3\nContent-Length: 2\n\n{}",
            b"HTTP/1.0 200 OK\r\nConnection: Keep-Alive\r\n\r\nto the end",
            b"HTTP/1.1 204 No Content\r\n\r\n",
        ],
    ),
    Target(
        "http-request",
        "heads of programs' requests (dps_agent.host.local.heads)",
        _http_request,
        lambda: [
            b"GET /status?a=b HTTP/1.1\r\nHost: x\r\n\r\n",
            b"POST /telemetry?a=%20 HTTP/1.1\r\nContent-Length: 2\r\nContent-Type: a/b; c=d\r\n"
            b"Expect: 100-continue\r\nConnection: close\r\n\r\n{}",
        ],
    ),
    Target(
        "issued",
        "certificates that DPS and hubs issue (dps_agent.issued)",
        _issued,
        lambda: [
            json.dumps([to_base64(each) for each in (certificate(DEVICE, "line 4"), ISSUING, ROOT)]).encode(),
            b'[null,"AAAA"]',
            DEEP,
        ],
    ),
    Target(
        "renewal",
        "answers of hubs to who asks for another certificate (dps_agent.renewal)",
        _renewed,
        lambda: (
            [
                f"200/?$rid={_FIRST_REQUEST}\n".encode() + json.dumps({"certificates": listed}).encode()
                for listed in [
                    [
                        to_base64(each)
                        for each in (certificate(DEVICE, "line 4", dates=("270115", "270306")), ISSUING, ROOT)
                    ]
                ]
            ]
            + [
                f"{status}/?$rid={_FIRST_REQUEST}\n".encode() + body
                for status, body in (
                    ("202", b'{"operationExpires":"2027-01-15T12:52:20.565000000Z"}'),
                    ("409", b'{"errorCode":409004}'),
                    ("429", b'{"errorCode":429002,"retryAfter":60}'),
                    ("\xb2", DEEP),
                )
            ]
        ),
    ),
    Target(
        "issued-record",
        "the record of issued certificates (dps_agent.issued)",
        _issued_record,
        lambda: [unhex(row["payload"]) for row in vectors("records")["slots"] if row["record"] == "certificate"],
    ),
    Target(
        "json",
        "JSON of anybody (dps_hal.platform)",
        _json,
        lambda: [
            b'{"a":[1,-2.5e3,true,null,"\\u00e9\\ud83d\\ude00"],"b":{}}',
            b"[[[[]]]]",
            b'"\\ud800"',
            b"1e400",
            DEEP,
        ],
    ),
    Target("dps-answer", "bodies of DPS (dps_agent.messages, .registration)", _dps_answer, _answers),
    Target(
        "record",
        "stored records (dps_agent.assignment, .progress)",
        _record,
        _record_seeds,
    ),
    Target(
        "slot",
        "the copies of records (dps_hal.store.slots)",
        _slot,
        lambda: [unhex(row["content"]) for row in vectors("records")["slots"]],
    ),
    Target("tpm-answer", "responses of a TPM (dps_hal.tpm.wire)", _tpm_answer, _tpm_seeds),
    Target(
        "activation",
        "the key that DPS sends (dps_hal.tpm.activation)",
        _activation,
        lambda: (
            [unbase64(row["blob"]) for row in vectors("published")["activation"]]
            + [unbase64(vectors("activation")["blob_base64"])]
        ),
    ),
    Target(
        "public-area",
        "public areas and wrapped keys (dps_hal.tpm.keys)",
        _public_area,
        lambda: [EK, keys.srk_public(EK[-256:]), _ASSIGNMENT.wrapped_key, keys.ek_template("tcg-l1")[2:]],
    ),
    Target(
        "signing-key",
        "files of keys for TLS in the TPM (dps_hal.host.signing_key)",
        _signing_key,
        lambda: [_signing_key_seed()],
    ),
    Target(
        "own-certificate",
        "the device's certificate in PEM (dps_agent.host.device_certificates)",
        lambda content: accepts(ValueError, lambda: certificates_in(content)),
        lambda: [b"-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n" * 2],
    ),
    Target("certificate", "certificates in DER (dps_hal.der, dps_agent.der)", _certificate, _certificate_seeds),
    Target(
        "settings",
        "config.toml (dps_agent.host.config)",
        _settings_file,
        lambda: [
            b'id_scope = "0ne00000000"  # a comment\n[tpm]\nbackend = "wire"\n[hub]\nkeep_alive_s = 240\n',
            b"[retry]\nbudget_s = 0x10\n[hub]\nhub_suffixes = ['.azure-devices.net']\n",
            b'payload = {a = 1, b = [1.5, 2027-01-15T08:00:00Z]}\nid_scope = """\n0ne"""\n',
        ],
    ),
    Target(
        "board-settings",
        "config.json of a board (dps_board.keys)",
        _board_settings,
        lambda: [
            b'{"id_scope":"0ne00000000","hub":{"hub_suffixes":[".azure-devices.net"]},"board":{"led_pin":"LED"}}',
            b'\xef\xbb\xbf{"id_scope":"x","payload":{"a":1}}',
            DEEP,
        ],
    ),
    Target(
        "websocket",
        "frames of a hub on port 443 (dps_agent.host.network.websocket)",
        _websocket,
        lambda: [
            b"\x82\x05hello",
            b"\x89\x01x\x02\x7e\x00\x02ab\x80\x7f" + bytes(7) + b"\x01c",
            b"\x8a\x00\x88\x02\3\xe8",
        ],
    ),
    Target(
        "proxy",
        "addresses and answers of proxies (dps_agent.host.network.proxy)",
        _proxy,
        lambda: [
            b'http://user:p%40ss@proxy.example:3128\nNegotiate, Basic realm="a, b", Digest nonce=x',
            b"http://[fe80::1%25eth0]:80\n.azure-devices.net:443 10.0.0.0/8 *",
        ],
    ),
    Target(
        "hub-packets",
        "MQTT of a hub (dps_board.mqtt)",
        _hub_packets,
        lambda: [
            b"\x20\x02\x00\x00\x90\x03\x00\x01\x00\x32\x0a\x00\x03a/b\x00\x07xyz\xd0\x00\x40\x02\x00\x01",
            b"\x20\x02\x01\x00\x30\x05\x00\x01ahi",
        ],
    ),
    Target(
        "hub-message",
        "topics and payloads of a hub (dps_agent.session, .twin)",
        _hub_message,
        lambda: [
            b"c%24.mid=1&a=b&c\nhello\nmping/?$rid=1\n{}\nmmine/?$rid=2\n[1]",
            b'r200/?$rid=1\n{"desired":{"$version":1,"dpsAgent":{"fleet":{"devices":9}}},"reported":{}}\n'
            b'd?$version=2\n{"a":1,"$version":2}\nr204/?$rid=2&$version=3\n',
            b"mmine/?$rid=4\n" + DEEP + b"\nd?$version=3\n" + DEEP,
            b"mreprovision/?$rid=3\n{}\nmstatus/?$rid=a-b\nnull",
        ],
    ),
    Target("date", "Date of an answer (dps_agent.utc)", _date, lambda: [b"Fri, 15 Jan 2027 08:00:00 GMT"]),
    Target(
        "time-answer",
        "answers of a time server (dps_board.ntp)",
        _time_answer,
        lambda: [b"\x24\1" + bytes(22) + MARK + bytes(8) + (3900000000).to_bytes(4) + bytes(4)],
    ),
    Target(
        "event-line",
        "what programs read of the agent (dps_agent.client)",
        _event_line,
        lambda: [
            b'{"event":"message","id":"1","payloadBase64":"AAA=","properties":{"a":"b"}}',
            b'{"event":"method","id":"2","name":"x","payload":{"a":[1]}}',
            b'{"event":"desired","version":3,"whole":{"a":1},"changed":{}}',
            b'{"error":{"code":"hub.lost","message":"m","retryAfterS":3}}',
            '{"event":"message","id":"1","payloadBase64":"AA\u00e9="}'.encode(),
            DEEP,
        ],
    ),
)
