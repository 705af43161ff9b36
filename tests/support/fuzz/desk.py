"""What the emulator and the tools read of devices, of programs and of files."""

from __future__ import annotations

import datetime
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from dps_agent.effects import Reply
from dps_emulator import mqtt, topics
from dps_emulator.certificates import CertificateError, is_authority
from dps_emulator.enrollments import read_enrollments
from dps_emulator.faults import FaultScriptError, read_fault_script
from dps_emulator.hub import HubLine
from dps_emulator.issuing import require_request
from dps_emulator.json_text import parse_json
from dps_emulator.server import LogLine
from dps_emulator.tokens import TokenError, parse_token
from dps_emulator.tpm_keys import UnsuitableKeyError, parse_endorsement_key
from dps_emulator.twin import PatchError, Twin, parse_patch
from dps_emulator.websocket import FrameStream, WebSocketError, upgrade
from dps_enroll.certificates import Certificates
from dps_enroll.journal import Done, Journal
from dps_enroll.service import credentials_of, refusals_of
from dps_hal.errors import AskOperator, DpsError
from dps_hal.platform import to_base64
from dps_hal.tpm.keys import check_ek_public
from dps_text.enrolments import ListError, read_enrolments
from support.fuzz.target import DEEP, Target, accepts
from support.vectors import load as vectors
from support.vectors import unbase64

EK_TEXT: str = vectors("published")["registration_id"][0]["endorsement_key"]
_MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
SERVICE = "https://x.invalid"


def _device_packets(content: bytes) -> bool:
    def packets(pieces: list[bytes]) -> tuple[list[Any], str]:
        stream, found = mqtt.PacketStream(), []
        try:
            for piece in pieces:
                for packet in stream.feed(piece):
                    found.append(packet)
        except mqtt.ProtocolError as error:
            return found, str(error)
        return found, ""

    whole, bytewise = packets([content]), packets([bytes([byte]) for byte in content])
    assert whole == bytewise
    for packet in whole[0]:
        if isinstance(packet, mqtt.Publish):
            topics.purpose_of(packet.topic, "press-07")
    return bool(whole[0])


def _device_frames(content: bytes) -> bool:
    upgrade(content)
    stream = FrameStream()
    try:
        carried, _ = stream.feed(content)
    except WebSocketError:
        return False
    return bool(carried)


def _token(content: bytes) -> bool:
    return accepts(TokenError, lambda: parse_token(content.decode("latin-1")))


def _enrolments(content: bytes) -> bool:
    """The reader of lists, and what the emulator and `dps-enroll` make of what is in one."""
    text = content.decode("utf-8", "surrogateescape")
    try:
        found = read_enrolments(text)
    except ListError as error:
        assert "\n" not in str(error)
        return False
    read_enrollments(text)
    for entry in found.entries:
        key = entry.endorsement_key
        assert key and entry.registration_id
    return bool(found.entries)


def _fault_script(content: bytes) -> bool:
    return accepts(FaultScriptError, lambda: read_fault_script(content.decode("latin-1")))


def _sent_json(content: bytes) -> bool:
    try:
        value = parse_json(content)
    except ValueError:
        return False
    assert json.loads(json.dumps(value, allow_nan=False)) == value
    return True


def _patch(content: bytes) -> bool:
    return accepts(PatchError, lambda: Twin().patched("desired", parse_patch(content)))


def _endorsement_key(content: bytes) -> bool:
    taken = accepts(UnsuitableKeyError, lambda: parse_endorsement_key(content))
    assert taken <= accepts(AskOperator, lambda: check_ek_public(content)), "the device would refuse it"
    return taken


def _authority(content: bytes) -> bool:
    return accepts(CertificateError, lambda: is_authority(content))


def _log_line(content: bytes) -> bool:
    text = content.decode("utf-8", "replace")
    return LogLine.parse(text) is not None or HubLine.parse(text) is not None


def _journal(content: bytes) -> bool:
    """A journal that is there already: refused, or gone on with, and what is written is there the next time."""
    with tempfile.TemporaryDirectory(dir=_MEMORY) as folder:
        path = Path(folder) / "journal"
        path.write_bytes(content)
        done = Done("press-07", EK_TEXT, "enrolled", "")
        try:
            with Journal(str(path), SERVICE) as journal:
                known = len(journal)
                journal.add([done])
        except DpsError:
            assert path.read_bytes() == content, "what is another's stays as it is"
            return False
        with Journal(str(path), SERVICE) as journal:
            assert known <= len(journal) <= known + 1 and journal.result(*done[:2], "") == ("enrolled", "")
        return True


def _journal_seed() -> bytes:
    head = json.dumps({"dpsEnrollJournal": 1, "service": SERVICE})
    line = json.dumps({"id": "press-08", "ek": "00", "result": "enrolled", "detail": ""})
    return f"{head}\n{line}\n{line[:20]}".encode()


def _enrolment_answer(content: bytes) -> bool:
    return accepts((ValueError, KeyError, TypeError), lambda: refusals_of(Reply(200, {}, content, None)))


def _connect() -> bytes:
    body = b"\x00\x04MQTT\x04\xc2\x00\xf0\x00\x08press-07\x00\x01u\x00\x01p"
    return bytes((0x10, len(body))) + body


def _certificate_request(content: bytes) -> bool:
    return accepts(CertificateError, lambda: require_request(content, "press-07"))


def _credentials(content: bytes) -> bool:
    return accepts(AskOperator, lambda: credentials_of(content.decode("utf-8", "surrogateescape"), "x"))


def _ek_certificate(content: bytes) -> bool:
    """A file in the folder of endorsement key certificates, of which a verdict is asked, and as the file of roots."""
    with tempfile.TemporaryDirectory(dir=_MEMORY) as name:
        folder, roots = Path(name) / "folder", Path(name) / "roots.pem"
        folder.mkdir()
        (folder / "certificate").write_bytes(content)
        roots.write_text(_ROOT)
        now = datetime.datetime(2026, 11, 30, tzinfo=datetime.UTC)
        found = Certificates(folder, roots, None, now)
        assert len(found) + len(found.unreadable) == 1
        assert found.verdict(unbase64(EK_TEXT)).why, "nobody who is trusted has signed it"
        roots.write_bytes(content)
        accepts(AskOperator, lambda: Certificates(folder, roots, None, now))
        return bool(found)


# Fixed, so that what is found by an alteration of them is found again.
_FIXED = {name: unbase64(text) for name, text in vectors("certificates").items() if name != "made"}
_ROOT = "-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n".format(to_base64(_FIXED["authority"]))


_RECORD = {"registrationId": "press-07", "attestation": {"type": "tpm", "tpm": {"endorsementKey": EK_TEXT}}}
TARGETS = (
    Target(
        "device-packets",
        "MQTT of devices (dps_emulator.mqtt, .topics)",
        _device_packets,
        lambda: [
            _connect() + b"\x82\x06\x00\x01\x00\x01#\x00" + b"\xc0\x00" + b"\xe0\x00",
            b"\x32\x1e\x00\x19$iothub/twin/GET/?$rid=1&b\x00\x02{}" + b"\x40\x02\x00\x07",
            b"\x30\x23\x00\x21devices/press-07/messages/events/",
            b"\xa2\x05\x00\x03\x00\x01a",
        ],
    ),
    Target(
        "device-frames",
        "upgrades and frames of devices (dps_emulator.websocket)",
        _device_frames,
        lambda: [
            b"\x82\x85\1\2\3\4" + bytes(5) + b"\x89\x80\0\0\0\0",
            b"GET /$iothub/websocket HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Protocol: mqtt",
        ],
    ),
    Target(
        "token",
        "tokens of devices (dps_emulator.tokens)",
        _token,
        lambda: [b"SharedAccessSignature sr=a%2Fb&sig=AAAA&se=1893456000&skn=registration"],
    ),
    Target(
        "enrolments",
        "lists of enrolments, CSV and JSON (dps_text.enrolments)",
        _enrolments,
        lambda: [
            DEEP,
            json.dumps([_RECORD, {"registrationId": "b", "attestation": {"type": "x509"}}]).encode(),
            f'registrationId;endorsementKey;deviceId\npress-07;"{EK_TEXT}";"a ""b"""\nshort;row\n'.encode(),
            f"{EK_TEXT[:8]}\nRegistration ID\tEndorsement Key\npress-08\t{EK_TEXT}\n".encode(),
        ],
    ),
    Target(
        "fault-script",
        "scripts of faults (dps_emulator.faults)",
        _fault_script,
        lambda: [
            b'[{"operation":"register","status":503,"headers":{"a":null},"times":2},{"operation":"connect","connack":5}]',
            DEEP,
        ],
    ),
    Target(
        "sent-json",
        "JSON of programs and devices (dps_emulator.json_text)",
        _sent_json,
        lambda: [b'{"a":[1,-2.5e3,true,null,"\\u00e9"]}', b"[" * 40, b'"\\ud800"', b"[NaN]", DEEP],
    ),
    Target(
        "patch",
        "patches of twins (dps_emulator.twin)",
        _patch,
        lambda: [b'{"a":{"b":{"c":null}},"d":[1,2,{"e":"f"}]}', b'{"a.b":1}', b'{"a":12345678901234567890}', DEEP],
    ),
    Target(
        "endorsement-key",
        "endorsement keys that are enrolled (dps_emulator.tpm_keys)",
        _endorsement_key,
        lambda: [unbase64(EK_TEXT)],
    ),
    Target(
        "authority",
        "certificates of CAs that are enrolled (dps_emulator.certificates)",
        _authority,
        lambda: [_FIXED["authority"], _FIXED["authority_of_bits"]],
    ),
    Target(
        "ek-certificate",
        "certificates of endorsement keys (dps_enroll.certificates)",
        _ek_certificate,
        lambda: [_FIXED["endorsement_key"], _FIXED["endorsement_key_of_bits"], _ROOT.encode()],
    ),
    Target(
        "credentials",
        "connection strings of the service (dps_enroll.service)",
        _credentials,
        lambda: [b"HostName=x.invalid;SharedAccessKeyName=a;SharedAccessKey=c2VjcmV0"],
    ),
    Target(
        "certificate-request",
        "requests for certificates (dps_emulator.issuing)",
        _certificate_request,
        lambda: [_FIXED["request"]],
    ),
    Target(
        "log-line",
        "lines of the emulator's logs (dps_emulator.server, .hub)",
        _log_line,
        lambda: [
            b"2026-11-30T00:00:00Z method=PUT operation=register registration_id=a"
            b" status=202 error=- fault=- request_id=1",
            b"2026-11-30T00:00:00Z hub=h device=d event=connect code=0 detail=a%20b",
            b"2026-11-30T00:00:00Z hub=h device=d event=connect code=zero detail=-",
            b"2026-11-30T00:00:00Z method=- operation=- registration_id=- status=x error=- fault=- request_id=1",
            b"",
        ],
    ),
    Target(
        "enrolment-answer",
        "answers of the service to dps-enroll (dps_enroll.service)",
        _enrolment_answer,
        lambda: [
            b'{"isSuccessful":true,"errors":[]}',
            b'{"isSuccessful":false,"errors":[{"registrationId":"A","errorCode":409201,"errorStatus":"there"}]}',
            DEEP,
        ],
    ),
    Target(
        "enrolment-journal",
        "the journal of dps-enroll (dps_enroll.journal)",
        _journal,
        lambda: [b"", _journal_seed(), DEEP + b"\n"],
    ),
)
