"""Whatever a client sends ends that client alone: nothing escapes, and the emulator serves the next one."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import ssl
import stat
import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dps_emulator import hub
from dps_emulator.control_socket import ControlError
from dps_emulator.enrollments import Enrollment
from dps_emulator.service import Settings
from dps_emulator.state import open_store
from dps_emulator.store import DATABASE
from emulator.device_side import Client, Device, register_path
from support.cloud.emulator import DeviceCredentials, EmulatorInThread, EmulatorProcess

TPM = Device.of_the_vectors()
PATCH = "$iothub/twin/PATCH/properties/reported/?$rid=1"
PATIENCE_S = 60


def packet(head: int, body: bytes) -> bytes:
    size, length = len(body), bytearray()
    while size or not length:
        length.append(size & 127 | (128 if size > 127 else 0))
        size >>= 7
    return bytes([head]) + length + body


def text(content: str | bytes) -> bytes:
    raw = content.encode() if isinstance(content, str) else content
    return struct.pack(">H", len(raw)) + raw


def connect_packet(device: DeviceCredentials, **how: str) -> bytes:
    fields = [how.get("client_id", device.device_id), how.get("user_name", device.user_name)]
    fields.append(how.get("token", device.token()))
    return packet(0x10, b"\0\4MQTT\4\xc2" + struct.pack(">H", 600) + b"".join(map(text, fields)))


def publish_packet(topic: str | bytes, payload: bytes, qos: int = 0) -> bytes:
    return packet(0x30 | qos << 1, text(topic) + (b"\0\1" if qos else b"") + payload)


def subscribe_packet(*filters: tuple[str, int]) -> bytes:
    return packet(0x82, b"\0\7" + b"".join(text(name) + bytes([qos]) for name, qos in filters))


class Raw:
    """A TLS connection to the hubs, byte by byte."""

    def __init__(self, emulator: EmulatorInThread | EmulatorProcess) -> None:
        context = ssl.create_default_context(cafile=str(emulator.ca_file))
        plain = socket.create_connection(("127.0.0.1", emulator.hub_port), PATIENCE_S)
        self.tls = context.wrap_socket(plain, server_hostname="emulator.azure-devices.net")

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.tls.close()

    def ask(self, *packets: bytes) -> bytes:
        """What comes until a PINGREQ behind these is answered, or the end."""
        try:
            self.tls.sendall(b"".join(packets) + b"\xc0\0")
            came = b""
            while not came.endswith(b"\xd0\0"):
                piece = self.tls.recv(65536)
                if not piece:
                    break
                came += piece
            return came
        except (ConnectionError, ssl.SSLError):
            return b""


@pytest.fixture(scope="module")
def emulator() -> Iterator[EmulatorInThread]:
    enrollments = [Enrollment(TPM.registration_id, TPM.ek_public)]
    with EmulatorInThread(Settings(retry_after_s=0), enrollments) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_escapes(emulator: EmulatorInThread, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """asyncio and uvicorn log what nobody caught."""
    caplog.set_level(logging.ERROR)
    emulator.notices.clear()
    yield
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []
    assert [notice for notice in emulator.notices if "defect" in notice] == []


@pytest.fixture
def device(emulator: EmulatorInThread, request: pytest.FixtureRequest) -> DeviceCredentials:
    return emulator.add_device(f"d{abs(hash(request.node.nodeid)):x}")


def serves(emulator: EmulatorInThread, device: DeviceCredentials) -> bool:
    with Raw(emulator) as raw:
        return raw.ask(connect_packet(device)) == b"\x20\2\0\0\xd0\0"


POISON = [
    b'{"a":' + b"[" * 600 + b"]" * 600 + b"}",
    b"[" * 200_000,
    b'{"a":"\\ud800"}',
    b'{"\\udfff":1}',
    b'{"a":1e999}',
    b'{"a":-Infinity}',
    b'{"a":NaN}',
    b'{"a":' + b"9" * 10_000 + b"}",
    b"\xff\xfe",
    b"null",
    b"",
    b'{"$x":1}',
    b'{"":1}',
    b'{"a":{"b":{"c":{"d":{"e":{"f":{"g":{"h":{"i":{"j":{"k":{"l":1}}}}}}}}}}}}',
    b'{"a":"%s"}' % (b"x" * 4097),
    b'{"a":4503599627370496}',
    b'{"a\\u0085":1}',
]


@pytest.mark.parametrize("patch", POISON, ids=range(len(POISON)))
def test_a_poisoned_patch_is_refused_and_the_twin_stays(
    patch: bytes, emulator: EmulatorInThread, device: DeviceCredentials
) -> None:
    with Raw(emulator) as raw:
        answers = subscribe_packet(("$iothub/twin/res/#", 0))
        said = raw.ask(
            connect_packet(device), answers, publish_packet(PATCH, b'{"good":1}'), publish_packet(PATCH, patch)
        )
        assert b"res/204/" in said and b"res/400/" in said, said
    assert emulator.twin(device.device_id)["reported"] == {"good": 1, "$version": 2}
    assert serves(emulator, device)


def test_a_twin_that_could_not_be_stored_is_not_changed_in_memory_either(tmp_path: Path) -> None:
    with EmulatorInThread(state_dir=tmp_path / "state") as emulator:
        device = emulator.add_device("press-07")
        known = emulator._server.hubs.all()[0].device("press-07")
        emulator.store.rows("PRAGMA query_only = ON")
        for doing in ({"desired": {"a": 1}}, {"desired": {"b": 1}}):
            with pytest.raises(ControlError, match=r"state\.db: attempt to write a readonly database"):
                emulator.hub_command("twin", device="press-07", **doing)
        for command in ("disable", "rotate-key"):
            with pytest.raises(ControlError):
                emulator.hub_command(command, device="press-07")
        with pytest.raises(ControlError):
            emulator.send_c2d("press-07", b"x")
        assert (known.twin.desired, known.enabled, known.queue, known.own_key) == ({}, True, [], device.key)
        emulator.store.rows("PRAGMA query_only = OFF")
        assert emulator._server.hubs.all()[0].device("press-07") is known and serves(emulator, device)


def test_messages_that_could_not_be_kept_are_not_acknowledged_also_before_a_goodbye(
    emulator: EmulatorInThread, device: DeviceCredentials
) -> None:
    events = f"devices/{device.device_id}/messages/events/"
    three = b"".join(publish_packet(events, b"%d" % number, 1) for number in range(3))
    statements: list[str] = []
    for goodbye in (b"", b"\xe0\0"):
        with Raw(emulator) as raw:
            raw.ask(connect_packet(device))
            emulator.store.rows("PRAGMA query_only = ON")
            assert raw.ask(three + goodbye) == b""
            emulator.store.rows("PRAGMA query_only = OFF")
    assert emulator.telemetry(device.device_id) == []
    assert any("attempt to write a readonly database" in notice for notice in emulator.notices)
    with Raw(emulator) as raw:
        raw.ask(connect_packet(device))
        emulator.store._connection.set_trace_callback(statements.append)
        assert raw.ask(three) == b"\x40\2\0\1" * 3 + b"\xd0\0"
        emulator.store._connection.set_trace_callback(None)
    assert [said["payload"] for said in emulator.telemetry(device.device_id)] == ["0", "1", "2"]
    assert statements.count("COMMIT") == 1, statements


def test_messages_are_not_acknowledged_either_where_keeping_them_is_defective(
    emulator: EmulatorInThread, device: DeviceCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(_: object) -> None:
        raise ZeroDivisionError("planted")

    with Raw(emulator) as raw:
        raw.ask(connect_packet(device))
        monkeypatch.setattr(emulator.store.messages, "put", planted)
        assert raw.ask(publish_packet(f"devices/{device.device_id}/messages/events/", b"x", 1)) == b""
    assert ["planted" in notice for notice in emulator.notices] == [True]
    emulator.notices.clear()


def test_a_client_that_acknowledges_nothing_is_ended_alone(
    emulator: EmulatorInThread, device: DeviceCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "MAX_IN_FLIGHT", 20)
    other = emulator.add_device(f"{device.device_id}-b")
    with Raw(emulator) as raw:
        asks = [publish_packet("$iothub/twin/GET/?$rid=1", b"")] * 30
        said = raw.ask(connect_packet(device), subscribe_packet(("$iothub/twin/res/#", 1)), *asks)
        assert said.count(b"res/200/") <= 20 and not said.endswith(b"\xd0\0"), said
    assert serves(emulator, other) and serves(emulator, device)


def test_a_request_id_too_long_to_be_answered_ends_its_client_alone(
    emulator: EmulatorInThread, device: DeviceCredentials
) -> None:
    with Raw(emulator) as raw:
        topic = "$iothub/twin/GET/?$rid=" + "x" * (0xFFFF - 23)
        raw.ask(connect_packet(device), subscribe_packet(("$iothub/twin/res/#", 0)), publish_packet(topic, b""))
    assert serves(emulator, device)


def test_a_client_that_does_not_read_fills_no_memory(emulator: EmulatorInThread, device: DeviceCredentials) -> None:
    emulator.set_desired(device.device_id, {str(number): "x" * 4000 for number in range(8)})
    with Raw(emulator) as raw:
        raw.ask(connect_packet(device), subscribe_packet(("$iothub/twin/res/#", 0)))
        raw.tls.settimeout(2)
        with pytest.raises(TimeoutError):  # the hub reads no more; kernel and TLS hold some MiB
            for _ in range(3000):
                raw.tls.sendall(publish_packet("$iothub/twin/GET/?$rid=" + "x" * 30_000, b""))
    assert serves(emulator, device)


def test_a_refusal_does_not_tell_whether_there_is_such_a_device(
    emulator: EmulatorInThread, device: DeviceCredentials
) -> None:
    forged = device._replace(key=b"another's")
    nobody = forged._replace(device_id="nobody")
    said = []
    for claimed in (forged, nobody):
        with Raw(emulator) as raw:
            said.append(raw.ask(connect_packet(claimed)))
    assert said == [b"\x20\2\0\5"] * 2


def test_nothing_is_looked_up_for_a_token_that_names_another_device(
    emulator: EmulatorInThread, device: DeviceCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_up: list[str] = []
    kept = emulator._server.hubs.all()[0]
    monkeypatch.setattr(kept, "find", looked_up.append)
    for token in ("", "nonsense", device._replace(device_id="other").token()):
        with Raw(emulator) as raw:
            assert raw.ask(connect_packet(device, token=token)) == b"\x20\2\0\5"
    assert looked_up == []


def test_one_damaged_record_of_each_kind_is_named_and_the_others_work(tmp_path: Path) -> None:
    state = tmp_path / "state"
    with EmulatorProcess(state_dir=state) as emulator:
        well = emulator.add_device("well")
        emulator.add_device("ill")
        assert emulator.stop() == 0
    torn = '{"deviceId": "ill"' + "[" * 100_000
    with closing(open_store(state)) as store:
        store.rows("INSERT INTO enrollments VALUES ('ill', ?)", torn)
        store.rows("INSERT INTO registrations VALUES ('ill', ?, 'ill', ?)", well.hub, torn)
        store.rows("UPDATE devices SET record = ? WHERE key = 'ill'", torn)
    with EmulatorProcess("--enroll-any", state_dir=state) as emulator:
        for table in ("enrollments", "registrations", "devices"):
            named = f"{state / DATABASE}: the record of 'ill' in {table} can't be read back"
            assert f"warning: {named}" in emulator.stderr
        with Raw(emulator) as raw:
            assert raw.ask(connect_packet(well)) == b"\x20\2\0\0\xd0\0"
        with Raw(emulator) as raw:
            assert raw.ask(connect_packet(well._replace(device_id="ill"))) == b"\x20\2\0\3"
        assert [line.code for line in emulator.await_hub_log("refused", 1, "ill")] == [3]
        assert [found["deviceId"] for found in emulator.hub_command("devices")["devices"]] == ["well"]
        for command in ("twin", "disable", "send-c2d"):
            with pytest.raises(ControlError, match="the record of 'ill' in devices can't be read back"):
                emulator.hub_command(command, device="ill", payload="", hub="emulator.azure-devices.net")
        with Client(emulator.port, emulator.ca_file) as client:
            assert client.call("PUT", register_path(TPM.registration_id), {"tpm": TPM.attestation()})[0] == 401
        assert "Traceback" not in emulator.stderr and "defect" not in emulator.stderr


def test_the_control_socket_is_its_owners_alone_wherever_it_stands(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir(mode=0o755)
    state.chmod(0o755)
    with EmulatorInThread(state_dir=state):
        modes = {path.name: stat.S_IMODE(path.lstat().st_mode) for path in state.rglob("*")}
    assert modes.pop("control.sock") == 0o600 and stat.S_IMODE(state.stat().st_mode) == 0o755
    assert all(mode in (0o600, 0o700) for mode in modes.values()), modes


def test_what_a_client_chose_does_not_fill_the_log(emulator: EmulatorInThread, device: DeviceCredentials) -> None:
    with Raw(emulator) as raw:
        raw.ask(connect_packet(device), subscribe_packet(("x" * 60_000, 0)))
    with Client(emulator.port, emulator.ca_file) as client:
        client.call("PUT", f"/0ne00000000/registrations/{'x' * 20_000}/register?api-version=1", {})
    assert max(len(line.text()) for line in [*emulator.hub_log, *emulator.log]) < 2000


# --- fuzz

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)
PAYLOADS = st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()) | st.sampled_from(POISON)
PLACES = ("devices/{}/messages/events/", "$iothub/twin/GET/?", "$iothub/twin/PATCH/properties/reported/?",
          "$iothub/methods/res/200/?", "$iothub/methods/res/-9/?$rid=", "")  # fmt: skip
TOPICS = st.tuples(st.sampled_from(PLACES), st.text(max_size=40) | st.sampled_from(["$rid=1", "$rid", "a=%ff&b"]))
FUZZ = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def packets(device_id: str) -> st.SearchStrategy[bytes]:
    topics = TOPICS.map(lambda parts: (parts[0].format(device_id) + parts[1]).encode())
    topics |= st.binary(max_size=40)
    return st.one_of(
        st.builds(publish_packet, topics, PAYLOADS, st.integers(0, 3)),
        st.builds(packet, st.integers(0, 255), st.binary(max_size=60)),
        st.builds(lambda name, qos: subscribe_packet((name, qos)), st.text(max_size=30), st.integers(0, 255)),
        st.binary(max_size=60),
    )


@FUZZ
@given(data=st.data())
def test_no_bytes_behind_connect_reach_anybody_else(
    emulator: EmulatorInThread, device: DeviceCredentials, data: st.DataObject
) -> None:
    sent = data.draw(st.lists(packets(device.device_id), max_size=6))
    every = subscribe_packet(("$iothub/twin/res/#", 1), ("$iothub/methods/POST/#", 1))
    with Raw(emulator) as raw:
        raw.ask(connect_packet(device), every)
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            raw.tls.sendall(b"".join(sent))
    assert serves(emulator, device)


@FUZZ
@given(
    client_id=st.text(max_size=30),
    user_name=st.text(max_size=60),
    token=st.text(max_size=60),
    first=st.binary(max_size=80),
)
def test_no_first_packet_reaches_anybody_else(
    emulator: EmulatorInThread, device: DeviceCredentials, client_id: str, user_name: str, token: str, first: bytes
) -> None:
    tokens = (token, f"SharedAccessSignature sr={token}&sig={token}&se=1", f"SharedAccessSignature {token}")
    for how in ({"client_id": client_id}, {"user_name": user_name}, *({"token": each} for each in tokens)):
        with Raw(emulator) as raw:
            said = raw.ask(connect_packet(device, **how))
            assert said[:3] in (b"", b"\x20\2\0"), said
    for content in (first, b"GET " + first + b"\r\n\r\n", packet(0x10, first)):
        with Raw(emulator) as raw, contextlib.suppress(ConnectionError, ssl.SSLError):
            raw.tls.sendall(content)
    assert serves(emulator, device)


@FUZZ
@given(
    method=st.sampled_from(["PUT", "POST", "GET", "DELETE"]),
    path=st.binary(max_size=60) | st.just(register_path(TPM.registration_id).encode()),
    name=st.sampled_from([b"Authorization", b"Content-Type", b"Host", b"X"]),
    value=st.binary(max_size=60),
    body=PAYLOADS,
)
def test_no_request_reaches_anybody_else(
    emulator: EmulatorInThread, method: str, path: bytes, name: bytes, value: bytes, body: bytes
) -> None:
    context = ssl.create_default_context(cafile=str(emulator.ca_file))
    plain = socket.create_connection(("127.0.0.1", emulator.port), PATIENCE_S)
    with context.wrap_socket(plain, server_hostname="localhost") as tls:
        length = b"Content-Length: %d\r\nConnection: close\r\n" % len(body)
        request = b"%s /%s HTTP/1.1\r\n%s%s: %s\r\n\r\n" % (method.encode(), path.lstrip(b"/"), length, name, value)
        try:
            tls.sendall(request + body)
            said = b""
            while piece := tls.recv(65536):
                said += piece
        except (ConnectionError, ssl.SSLError):
            said = b""
        assert b"HTTP/1.1 500" not in said, said
    with Client(emulator.port, emulator.ca_file) as client:
        assert client.call("PUT", register_path(TPM.registration_id), {"tpm": TPM.attestation()})[0] == 401
