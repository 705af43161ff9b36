"""The page of `serve --web` as a browser's requests see it: who gets in, what it shows, what its forms do."""

from __future__ import annotations

import base64
import json
import re
import socket
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from typing import Any
from urllib.parse import parse_qs, quote, urlencode, urlsplit

import pytest

from dps_emulator.breakages import PALETTE
from dps_emulator.embedded import PATIENCE_S, DeviceCredentials, EmulatorInThread, awaited
from dps_emulator.faults import fault_script
from dps_emulator.hub_devices import Telemetry
from dps_emulator.registrations import StateError
from dps_emulator.service import Request, Response, Settings
from dps_emulator.web import pages
from dps_emulator.web.exchanges import Exchanges, masked
from dps_emulator.web.guard import Guard
from dps_emulator.web.markup import Html, fill
from dps_emulator.web.pages import numbers_of, plot
from emulator.device_side import SCOPE, Client, Device, lookup_path, register_path
from emulator.paho_device import PahoDevice

HUB = "emulator.azure-devices.net"
VIEWS = (
    "/",
    "/registrations",
    "/enrollments",
    "/faults",
    "/connect",
    f"/devices/{HUB}/press-07",
    "/page.css",
    "/page.js",
)


class Answer:
    """One answer of the page."""

    def __init__(self, status: int, headers: dict[str, str], text: str) -> None:
        self.status = status
        self.headers = headers
        self.text = text


class Browser:
    """Sends what a browser sends: its cookie, where it is, and whose page it shows."""

    def __init__(self, address: str) -> None:
        self.origin, _, self.token = address.partition("/?token=")
        self.host = self.origin.removeprefix("http://")
        self.cookie = ""

    def get(self, path: str, **headers: str) -> Answer:
        """A view."""
        return self.ask("GET", path, **headers)

    def post(self, path: str, form: dict[str, str], **headers: str) -> Answer:
        """A form of the page itself."""
        own = {"Origin": self.origin, "Sec-Fetch-Site": "same-origin", **headers}
        return self.ask("POST", path, urlencode(form), **{"Content-Type": "application/x-www-form-urlencoded", **own})

    def ask(self, method: str, path: str, body: str = "", **headers: str) -> Answer:
        """Any request; names of headers may have _ for -; an empty one is not sent."""
        sent = {
            "Host": self.host,
            "Cookie": self.cookie,
            **{name.replace("_", "-"): text for name, text in headers.items()},
        }
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {text}" for name, text in sent.items() if text)]
        request = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", body])
        name, _, port = self.host.partition(":")
        with socket.create_connection((name, int(port)), timeout=60) as connection:
            # In one piece: where a server refuses the head and closes, a body behind it would undo the answer.
            connection.sendall(request.encode())
            answer = HTTPResponse(connection, method=method)
            answer.begin()
            found = {name.lower(): text for name, text in answer.getheaders()}
            return Answer(answer.status, found, answer.read().decode())

    def enter(self) -> None:
        """Opens the printed address; the cookie is kept."""
        answer = self.get(f"/?token={self.token}")
        assert (answer.status, answer.headers["location"]) == (303, "/")
        self.cookie = answer.headers["set-cookie"].partition(";")[0]


@pytest.fixture
def emulator() -> Iterator[EmulatorInThread]:
    with EmulatorInThread(Settings(retry_after_s=0), web_port=0) as found:
        yield found


@pytest.fixture
def press(emulator: EmulatorInThread) -> DeviceCredentials:
    return emulator.add_device("press-07")


@pytest.fixture
def browser(emulator: EmulatorInThread, press: DeviceCredentials) -> Browser:
    found = Browser(emulator.addresses["web"])
    found.enter()
    return found


# Who gets in.


def test_the_address_opens_the_page_and_the_cookie_keeps_it_open(emulator: EmulatorInThread, press: object) -> None:
    browser = Browser(emulator.addresses["web"])
    assert [browser.get(path).status for path in VIEWS] == [403] * len(VIEWS)
    assert browser.get("/?token=guessed").status == 403
    answer = browser.get(f"/?token={browser.token}")
    cookie = answer.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(cookie.split("; "))
    browser.enter()
    assert [browser.get(path).status for path in VIEWS] == [200] * len(VIEWS)
    assert browser.token not in "".join(browser.get(path).text for path in VIEWS)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1.nip.io:{port}", "[::1]:{port}", ""]
)
def test_a_name_that_was_bound_anew_to_this_machine_is_not_served(browser: Browser, host: str) -> None:
    foreign = host.format(port=browser.host.partition(":")[2])
    for path in ("/", f"/?token={browser.token}", "/events"):
        answer = browser.get(path, Host=foreign)
        assert answer.status in (400, 421) and "set-cookie" not in answer.headers, (path, answer.text)
    assert browser.post("/faults", {"name": "dps-slow"}, Host=foreign, Origin=f"http://{foreign}").status in (400, 421)


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example", "Sec_Fetch_Site": "cross-site"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": "http://localhost:1"},
        {"Sec_Fetch_Site": "same-site"},
        {"Sec_Fetch_Site": "none"},
        {"Cookie": ""},
        {"Cookie": "dps_emulator=x"},
    ],
    ids=str,
)
def test_a_form_of_another_page_changes_nothing(
    emulator: EmulatorInThread, browser: Browser, headers: dict[str, str]
) -> None:
    given = {name.replace("_", "-"): text for name, text in headers.items()}
    for path, form in (
        ("/faults", {"name": "dps-unavailable"}),
        (f"/devices/{HUB}/press-07/disable", {}),
        ("/enrollments/import", {"list": "x"}),
        ("/knocks", {"registration_id": "x"}),
    ):
        assert browser.post(path, form, **given).status == 403
    assert browser.post("/faults", {"name": "nothing"}).status == 303
    assert emulator.hub_command("devices")["devices"][0]["enabled"]
    assert "Nothing is broken" in browser.get("/faults").text


def test_nothing_changes_by_looking(emulator: EmulatorInThread, browser: Browser) -> None:
    for path in (
        f"/devices/{HUB}/press-07/disable",
        "/enrollments/import?list=x",
        "/knocks?registration_id=x",
        "/faults?name=dps-unavailable",
    ):
        answer = browser.get(path)
        assert answer.status in (200, 404, 405), path
    assert emulator.hub_command("devices")["devices"][0]["enabled"]
    assert "Nothing is broken" in browser.get("/faults").text


def test_no_page_may_frame_it_and_no_script_of_others_runs_in_it(browser: Browser) -> None:
    for path in (*VIEWS, "/nothing"):
        headers = browser.get(path).headers
        policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
        assert policy["frame-ancestors"] == policy["base-uri"] == policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["form-action"] == policy["connect-src"] == "'self'"
        assert headers["referrer-policy"] == "same-origin"  # "no-referrer" would make the origin of forms null
        assert headers["x-frame-options"] == "DENY" and headers["cache-control"] == "no-store"
    assert browser.get("/", Host="evil.example").headers["x-frame-options"] == "DENY"


def test_a_page_of_the_next_emulator_at_this_port_has_another_token() -> None:
    one, two = Guard(8080), Guard(8080)
    assert one.address != two.address and one.opens(one.address.partition("token=")[2])
    assert not one.opens(two.address.partition("token=")[2]) and not one.opens("") and not one.opens("é")


def test_an_emulator_without_the_option_has_no_page() -> None:
    with EmulatorInThread() as plain:
        assert "web" not in plain.addresses


def test_a_view_that_fails_is_500_and_one_line(
    emulator: EmulatorInThread, browser: Browser, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(desk: object) -> Html:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(pages, "faults", fails)
    answer = browser.get("/faults")
    assert answer.status == 500 and "planted" not in answer.text and "default-src 'none'" in str(answer.headers)
    (notice,) = awaited(lambda: emulator.notices, 1, "notices", PATIENCE_S)
    assert notice.startswith("a defect, please report it: ZeroDivisionError('planted') at test_web.py:")
    assert not caplog.records and browser.get("/").status == 200


def test_a_form_that_is_none_is_refused(browser: Browser) -> None:
    assert browser.post("/faults", {}, **{"Content-Type": "text/plain"}).status == 415
    assert browser.ask("DELETE", "/faults", Origin=browser.origin).status == 405
    assert browser.post("/faults", {str(number): "x" for number in range(200)}).status == 400
    too_much = browser.post("/enrollments/import", {"list": "x" * (5 * 1024 * 1024)})
    assert too_much.status == 413 and too_much.headers["x-frame-options"] == "DENY"


# What it shows.


def test_what_devices_send_is_text_and_never_markup(emulator: EmulatorInThread, browser: Browser) -> None:
    emulator.store.messages.append(
        Telemetry(
            "2026-01-31T10:00:00.0000000Z", HUB, "press-07", b"<script>alert(1)</script>", {'"><b>': "<i>"}, 1, False
        )
    )
    text = browser.get(f"/devices/{HUB}/press-07").text + browser.get("/").text
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text and "<i>" not in text and '"><b>' not in text
    assert "<b>x" not in browser.get(f"/?said={quote('<b>x')}").text
    assert (
        fill("<p>{}{:.1f}</p>", "<&'\"", 1.25) == "<p>&lt;&amp;&#x27;&quot;1.2</p>" and fill("{}", Html("<b>")) == "<b>"
    )


def test_telemetry_is_filtered_and_its_numbers_are_drawn(emulator: EmulatorInThread, browser: Browser) -> None:
    for number in range(5):
        content = json.dumps({"temperature": 20 + number, "on": True, "press": {"bar": -number}}).encode()
        emulator.store.messages.append(
            Telemetry(f"2026-01-31T10:00:0{number}.0000000Z", HUB, "press-07", content, {}, 1, False)
        )
    whole = browser.get(f"/devices/{HUB}/press-07").text
    assert "temperature: 20 to 24, last 24" in whole and "press.bar: -4 to 0, last -4" in whole
    assert len(re.findall("<polyline", whole)) == 2
    some = (
        browser.get(f"/devices/{HUB}/press-07?only=%2223%22").text
        + browser.get(f"/devices/{HUB}/press-07?only=23").text
    )
    assert "0 of 5 messages fit" in some and "1 of 5 messages fit" in some
    assert plot([]) == "" and numbers_of(_message(b"[1e999]")) == {} == numbers_of(_message(b"\xff"))
    assert numbers_of(_message(b"7")) == {"value": 7.0}


def test_the_newest_messages_alone_are_searched(emulator: EmulatorInThread, browser: Browser) -> None:
    lines = [_message(b"old"), *[_message(b"new")] * 1000]
    emulator.store.messages.put([("press-07", json.dumps(each.to_json()).encode()) for each in lines])
    at = f"/devices/{HUB}/press-07?only="
    assert "0 of 1000 messages fit" in browser.get(f"{at}old").text and "old" not in browser.get(at).text


def _message(payload: bytes) -> Telemetry:
    return Telemetry("2026-01-31T10:00:00.0000000Z", HUB, "press-07", payload, {}, 0, False)


def test_a_registration_is_a_strip_with_its_secrets_masked(emulator: EmulatorInThread, browser: Browser) -> None:
    device = Device.of_the_vectors()
    body = {"registrationId": "press-09", "tpm": device.attestation()}
    with Client(emulator.port, emulator.ca_file, 60) as client:
        assert client.call("PUT", register_path("press-09"), body)[0] == 404
    said = browser.get("/registrations").text
    assert "press-09" in said and "is not enrolled" in said and "<b>404</b> refused" in said
    assert browser.post("/knocks", {"registration_id": "PRESS-09"}).headers["location"].startswith("/enrollments?said=")
    assert "press-09" in browser.get("/enrollments").text
    assert "is not enrolled" not in browser.get("/enrollments").text

    with Client(emulator.port, emulator.ca_file, 60) as client:
        _, _, challenge = client.call("PUT", register_path("press-09"), body)
        resource = quote(f"{SCOPE}/registrations/press-09", safe="")
        token = device.activate(challenge["authenticationKey"]).token(resource, int(time.time()) + 3600)
        assert client.call("PUT", register_path("press-09"), body, token)[0] == 202
        _, _, state = client.call("POST", lookup_path("press-09"), body, token)
    key = base64.b64encode(emulator.service.hub_key(HUB, "press-09") or b"").decode()
    signature = token.partition("sig=")[2].partition("&")[0]
    secrets = (challenge["authenticationKey"], state["tpm"]["authenticationKey"], key, signature)
    text = browser.get("/registrations").text
    found = re.findall(r'<span class="what"><b>(\d+)</b> ([a-z ]+)', text)
    assert [(code, title.strip()) for code, title in found][-3:] == [
        ("401", "challenge"),
        ("202", "register"),
        ("200", "assigned"),
    ]
    assert "sig=••••" in text and "sr=0ne00000000" in text
    for secret in secrets:
        assert secret and secret not in text and quote(secret, safe="") not in text


def test_what_is_called_a_key_is_masked_wherever_it_stands() -> None:
    shown = masked(
        {
            "tpm": {"authenticationKey": "c2VjcmV0", "endorsementKey": "A" * 100},
            "unencryptedAuthenticationKey": None,
            "x": [{"primaryKey": "c2VjcmV0"}, {"text": "SharedAccessSignature sr=a&sig=c2VjcmV0"}],
            "derivedKeys": {"SymmetricKey": "c2VjcmV0"},
        }
    )
    assert "c2VjcmV0" not in json.dumps(shown)
    assert shown["tpm"]["endorsementKey"].startswith("AAAA") and "100 characters" in shown["tpm"]["endorsementKey"]


def test_a_body_that_is_no_json_is_not_shown() -> None:
    exchanges = Exchanges()
    request = Request("PUT", "/0ne/registrations/a/register", "", {"authorization": "Bearer c2VjcmV0"}, b"key=c2VjcmV0")
    exchanges.add(request, Response(400, (), b"c2VjcmV0"), 0, 1_000.0)
    (strip,) = exchanges.strips()
    assert "c2VjcmV0" not in strip[0].request + strip[0].answer and "12 bytes that are no JSON" in strip[0].request


def test_of_long_requests_and_lines_only_the_beginning_is_kept(
    emulator: EmulatorInThread, browser: Browser, press: DeviceCredentials
) -> None:
    exchanges = Exchanges()
    body = b"[" * 30 + b"1," * 40_000 + b"1" + b"]" * 30
    headers = {"authorization": "SharedAccessSignature sig=c2VjcmV0", **{f"x-{n}": "x" * 50 for n in range(1000)}}
    exchanges.add(Request("PUT", "/0ne/registrations/a/register", "", headers, body), Response(200, (), body), 0, 1e3)
    ((exchange,),) = exchanges.strips()
    for text in (exchange.request, exchange.answer):
        assert 8_000 < len(text) < 20_000 and text.endswith("…") and "c2VjcmV0" not in text
    with PahoDevice(emulator, press) as device:
        device.connect()
        emulator.hub_command("disconnect", device="press-07", reason="r" * 60_000)
    text = browser.get("/").text
    assert "rrrr" in text and len(text) < 20_000


def test_halves_of_surrogate_pairs_are_shown_and_no_form_takes_what_is_not_json(
    emulator: EmulatorInThread, browser: Browser
) -> None:
    at = f"/devices/{HUB}/press-07"
    for text in ('{"a": "\\ud800"}', '{"a": NaN}'):
        assert "no JSON" in _said(browser.post(f"{at}/desired", {"desired": text}), "refused")
    emulator.set_desired("press-07", {"a": "x\ud800"})
    assert "x?" in browser.get(at).text
    keys = {"attestation": {"symmetricKey": {"primaryKey": "c2VjcmV0c2VjcmV0" * 2}}}
    listed = [{"registrationId": "a", "note": "x\ud800", **keys}, {"registrationId": "\ud800", "attestation": {}}]
    assert "1 enrolled" in _said(browser.post("/enrollments/import", {"list": json.dumps(listed)}))
    assert "x?" in browser.get("/enrollments").text


def test_a_list_is_enrolled_whole_or_not_at_all(
    emulator: EmulatorInThread, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"symmetricKey": {"primaryKey": "c2VjcmV0c2VjcmV0" * 2}}
    listed = [{"registrationId": "a", "attestation": keys}, {"enrollmentGroupId": "b", "attestation": keys}]

    def full(*_: object, **__: object) -> int:
        raise StateError("the disk is full")

    monkeypatch.setattr(emulator.store.groups, "put", full)
    answer = browser.post("/enrollments/import", {"list": json.dumps(listed)})
    assert answer.status == 500 and "the disk is full" in answer.text
    assert not emulator.store.enrollments


def test_what_is_said_of_a_form_is_short(browser: Browser) -> None:
    said = _said(browser.post("/enrollments/delete", {"registration_id": "x" * 100_000}), "refused")
    assert said.startswith("nobody is enrolled") and len(said) <= 500


def test_each_registration_of_a_device_is_a_strip_of_its_own() -> None:
    exchanges = Exchanges()
    steps = ("register", "register!", "lookup", "register", "register!", "lookup")
    for at, step in enumerate(steps):
        path = "/0ne/registrations/a" + ("/register" if step.startswith("register") else "")
        headers = {"authorization": "x"} if step.endswith("!") else {}
        body = b'{"status": "assigned"}' if step == "lookup" else b"{}"
        method = "POST" if step == "lookup" else "PUT"
        exchanges.add(Request(method, path, "", headers), Response(200, (), body), 0, 1_000.0 + at)
    exchanges.add(Request("PUT", "/0ne/registrations/a/register"), Response(401, (), b""), 0, 90_000.0)
    assert [[each.number for each in strip] for strip in exchanges.strips()] == [[7], [4, 5, 6], [1, 2, 3]]


# What its forms do.


def test_a_device_is_commanded(emulator: EmulatorInThread, browser: Browser) -> None:
    at = f"/devices/{HUB}/press-07"
    assert _said(browser.post(f"{at}/desired", {"desired": '{"interval": 30}'})) == "the desired properties were merged"
    assert emulator.twin("press-07")["desired"]["interval"] == 30
    assert "queued as" in _said(browser.post(f"{at}/send", {"text": "open"}))
    assert "4 bytes" in browser.get(at).text
    assert _said(browser.post(f"{at}/disable", {})) == "disable: done"
    assert "disabled" in browser.get(at).text and "disabled" in browser.get("/").text
    assert _said(browser.post(f"{at}/enable", {})) == "enable: done"
    for form, why in (
        ({"desired": "{"}, "no JSON"),
        ({"desired": '{"a.b": 1}'}, "a property's name"),
        ({"desired": "[]"}, "not a JSON object"),
    ):
        assert why in _said(browser.post(f"{at}/desired", form), "refused")
    assert "is not connected" in _said(browser.post(f"{at}/invoke", {"method": "ping"}), "refused")
    assert "there is no" in _said(browser.post(f"{at}/burn", {}), "refused")
    assert "no device" in _said(browser.post(f"/devices/{HUB}/press-99/disable", {}), "refused")
    missing = browser.get(f"/devices/{HUB}/press-99")
    assert missing.status == 404 and "press-99" in missing.text
    assert browser.get("/devices/nowhere.azure-devices.net/press-07").status == 404


def test_enrolments_are_imported_disabled_and_deleted(emulator: EmulatorInThread, browser: Browser) -> None:
    key = Device.of_the_vectors().attestation()["endorsementKey"]
    listed = f"registrationId,endorsementKey\npress-09,{key}\npress-10,AAAA\n"
    assert "1 enrolled" in _said(browser.post("/enrollments/import", {"list": listed}))
    assert "press-09" in browser.get("/enrollments").text
    assert _said(browser.post("/enrollments/disable", {"registration_id": "press-09"})) == "disabled: press-09"
    assert not emulator.service.enrollments["press-09"].enabled
    assert _said(browser.post("/enrollments/enable", {"registration_id": "press-09"})) == "enabled: press-09"
    assert _said(browser.post("/enrollments/delete", {"registration_id": "press-09"})) == "deleted: press-09"
    assert "press-09" not in emulator.service.enrollments
    assert "nobody is enrolled" in _said(
        browser.post("/enrollments/delete", {"registration_id": "press-09"}), "refused"
    )
    assert _said(browser.post("/enrollments/import", {"list": "nonsense"}), "refused")
    group = {"enrollmentGroupId": "presses", "attestation": {"symmetricKey": {"primaryKey": "c2VjcmV0c2VjcmV0" * 2}}}
    assert "1 enrolled" in _said(browser.post("/enrollments/import", {"list": json.dumps([group])}))
    text = browser.get("/enrollments").text
    assert "presses" in text and "symmetric key" in text and "c2VjcmV0" not in text
    chosen = {"registration_id": "presses", "group": "yes"}
    assert _said(browser.post("/enrollments/disable", chosen)) == "disabled: presses"
    assert not emulator.service.groups["presses"].enabled
    assert _said(browser.post("/enrollments/delete", chosen)) == "deleted: presses" and not emulator.service.groups
    assert "by now" in _said(browser.post("/knocks", {"registration_id": "press-09"}), "refused")


@pytest.mark.parametrize("breakage", PALETTE, ids=lambda breakage: breakage.name)
def test_everything_of_the_palette_is_a_fault_script(breakage: Any) -> None:
    script = fault_script([dict(entry) for entry in breakage.entries])
    assert script.faults and {fault.is_hubs for fault in script.faults} == {breakage.at == "hub"}


def test_faults_are_put_in_force_and_ended(browser: Browser) -> None:
    assert _said(browser.post("/faults", {"name": "hub-throttled", "times": "2"})) == "4 fault entries in force"
    assert "times=2" in browser.get("/faults").text
    assert _said(browser.post("/faults", {"name": "script", "script": '[{"status": 500}]'})) == "1 fault entry in force"
    assert "status=500" in browser.get("/faults").text
    for form, why in (
        ({"name": "script", "script": "[{}, 1]"}, "entry 2 is not an object"),
        ({"name": "script", "script": "["}, "no JSON"),
        ({"name": "earthquake"}, "earthquake"),
        ({"name": "dps-slow", "times": "0"}, "from 1"),
        ({"name": "dps-slow", "times": "9" * 5000}, "from 1"),
    ):
        assert why in _said(browser.post("/faults", form), "refused")
    assert "status=500" in browser.get("/faults").text
    assert _said(browser.post("/faults", {"name": "nothing"})) == "0 fault entries in force"


def _said(answer: Answer, outcome: str = "said") -> str:
    """What the next view says of a form."""
    assert answer.status == 303, answer.text
    return parse_qs(urlsplit(answer.headers["location"]).query)[outcome][0]


def test_a_page_that_follows_is_told_of_what_happens(emulator: EmulatorInThread, browser: Browser) -> None:
    connection = HTTPConnection(browser.host, timeout=60)
    connection.request("GET", "/events", headers={"Cookie": browser.cookie})
    answer = connection.getresponse()
    assert (answer.status, answer.getheader("content-type")) == (200, "text/event-stream; charset=utf-8")
    first = [answer.readline() for _ in range(4)]
    assert first[1] == b"event: changed\n"
    emulator.store.messages.append(_message(b"1"))
    assert [answer.readline() for _ in range(3)] == [b"event: changed\n", b"data: {}\n", b"\n"]
    emulator.stop()  # while it is followed
    assert answer.read() in (b"", b"event: changed\ndata: {}\n\n")
    connection.close()
