"""The API's bodies, read and written."""

from dps_agent import messages
from dps_agent.messages import (
    FIELDS,
    DeviceRegistration,
    DeviceRegistrationResult,
    ProvisioningServiceErrorDetails,
    RegistrationOperationStatus,
    TpmAttestation,
    TpmChallenge,
    X509CertificateInfo,
    decode,
    encode,
    fields_of,
)
from dps_hal.errors import RetryLater
from dps_hal.platform import from_base64, from_json, nesting, to_base64, to_json
from support.claims import assert_refused
from support.vectors import load

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def round_trip(message: "Any", value: "Any") -> "Any":
    read = decode(message, to_json(value).encode())
    assert from_json(encode(read)) == value, f"{message.__name__}: {value!r}"
    return read


def test_the_maximum_samples_round_trip() -> None:
    samples = load("status_lookup")
    request = round_trip(DeviceRegistration, samples["maximum_request"])
    assert request.payload == {} and request.registration_id == "qypnuerjeunzogqdezhjgisfr"
    assert request.tpm == TpmAttestation("sbvvzftylrpsetexcmnijtdezppq", "juohyrayid", {})
    result = round_trip(DeviceRegistrationResult, samples["maximum_response"])
    assert (result.assigned_hub, result.device_id, result.error_code) == ("ljexps", "hjvdlwpugzlk", 13)
    assert (result.status, result.substatus) == (messages.UNASSIGNED, messages.INITIAL_ASSIGNMENT)
    assert result.created_date_time_utc == result.last_updated_date_time_utc == "2025-10-01T17:41:56.535Z"
    assert result.error_message == "zpctqazbkbiqjkwosis" and result.etag == "hjtelksspyfzhmet"
    assert result.payload == {} and result.registration_id == "urejrffpkqneou"
    assert result.symmetric_key.enrollment_group_id == "w"
    assert result.tpm.authentication_key == "sofbxakhjrxpiyysjjxkx"
    assert result.x509.enrollment_group_id == "qbw"
    assert result.x509.certificate_info == result.x509.signing_certificate_info
    assert result.x509.certificate_info == X509CertificateInfo(
        "pvpbipnhcahytrcq",
        "2025-10-01T17:41:56.534Z",
        "2025-10-01T17:41:56.534Z",
        "jjvdijgwgpagrjdi",
        "guqltcfgusf",
        "ysryarleygpkejrjlwuxacvcwbxqw",
        "jtsfqnbcmmott",
        20,
        {},
    )


def test_the_minimum_samples_round_trip() -> None:
    samples = load("status_lookup")
    assert samples["minimum_request"] == samples["minimum_response"] == {}
    for message in (DeviceRegistration, DeviceRegistrationResult):
        read = round_trip(message, {})
        assert list(read) == [None] * (len(read) - 1) + [{}], message.__name__


def test_every_message_may_be_empty_and_null_is_absent() -> None:
    for message in FIELDS:
        round_trip(message, {})
        nulls = {name: None for name, _ in fields_of(message)}
        assert encode(decode(message, to_json(nulls).encode())) == b"{}", message.__name__


def test_unknown_fields_and_statuses_stay_readable() -> None:
    value = {"status": "migrating", "generationId": "7", "tpm": {"authenticationKey": "AA==", "more": [1, {"a": 2}]}}
    result = round_trip(DeviceRegistrationResult, value)
    assert result.status == "migrating" and result.unknown == {"generationId": "7"}
    assert result.tpm.unknown == {"more": [1, {"a": 2}]}


def test_a_wrong_type_names_the_field_and_what_came() -> None:
    wrong = {
        messages.STRING: (1, True, 1.5, [], {}),
        messages.INTEGER: ("1", True, 1.5, [], {}, 2**31, -(2**31) - 1),
        messages.STRINGS: ("a", 1, [], {"a": 1}),
    }
    tried = 0
    for message in FIELDS:
        for name, kind in fields_of(message):
            values = wrong.get(kind, ()) if isinstance(kind, str) else ("a", 1, True, [])
            for value in values:
                body = to_json({name: value}).encode()
                error = assert_refused(
                    lambda: decode(message, body), RetryLater, "dps.malformed_answer", f"{message.__name__} {body!r}"
                )
                assert f"{message.__name__}.{name}" in error.message and "expected" in error.message, error.message
                tried += 1
    assert tried > 150


def test_a_wrong_type_inside_names_the_whole_way() -> None:
    body = b'{"registrationState":{"x509":{"certificateInfo":{"version":"3"}}}}'
    error = assert_refused(lambda: decode(RegistrationOperationStatus, body), RetryLater, "dps.malformed_answer")
    assert "RegistrationOperationStatus.registrationState.x509.certificateInfo.version" in error.message


def test_what_is_no_json_object_is_refused() -> None:
    for body in (
        b"",
        b"<html>",
        b"[]",
        b"7",
        b'"x"',
        b"null",
        b"\xff\xfe",
        b"{",
        b'{"a":1}x',
        b'{"status":"x"',
        b'{"payload":{"a":1}',
        b"\x00",
    ):
        assert_refused(
            lambda: decode(DeviceRegistrationResult, body), RetryLater, "dps.malformed_answer", f"body={body!r}"
        )


def test_nesting_is_bounded_before_it_is_parsed() -> None:
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
        deep = b'{"payload":' + opening * 5000 + b"1" + closing * 5000 + b"}"
        error = assert_refused(lambda: decode(DeviceRegistrationResult, deep), RetryLater, "dps.malformed_answer")
        assert "32" in error.message
    assert nesting(b'{"a":"[[[[\\"[[[","b":[{}]}') == 3
    decode(DeviceRegistrationResult, b'{"payload":' + b"[" * 31 + b"]" * 31 + b"}")


def test_a_real_challenge_reads() -> None:
    blob = load("published")["activation"][0]["blob"]
    body = to_json(
        {
            "message": "Authorization required, resend request using supplied key",
            "authenticationKey": blob,
            "unencryptedAuthenticationKey": None,
            "keyName": "registration",
        }
    ).encode()
    challenge = decode(TpmChallenge, body)
    assert challenge.key_name == "registration" and from_base64(challenge.authentication_key)[:2] == b"\x00\x34"


def test_a_real_error_reads() -> None:
    details = decode(
        ProvisioningServiceErrorDetails,
        b'{"errorCode":401002,"trackingId":"8ad0463c-6427-4479-9dfa-3e8bb7003e9b","message":"Invalid certificate.",'
        b'"timestampUtc":"2020-04-10T05:24:22.4718526Z","info":{"a":"b"}}',
    )
    assert details.error_code == 401002 and details.info == {"a": "b"}


def test_base64_is_taken_whole_or_not_at_all() -> None:
    for content in (b"", b"\x00", b"ab", b"abc", bytes(range(256))):
        assert from_base64(to_base64(content)) == content
    for text in ("A", "AA", "AAA", "====", "AA=A", "A===", "AAAA\n", "AA A", "A-_=", "AAAA=", "%%%%", "AAA\u00e9"):
        try:
            value = from_base64(text)
        except ValueError:
            continue
        raise AssertionError(f"text={text!r} gave {value!r}")
