"""What is known, as HTML: it can be read without JavaScript, and each form works without it."""

import base64
import contextlib
import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import islice
from typing import Any
from urllib.parse import quote

from dps_emulator.breakages import PALETTE
from dps_emulator.enrollments import Enrollment
from dps_emulator.faults import Fault, FaultScript
from dps_emulator.hub import Hub, HubError, HubLine, Hubs
from dps_emulator.hub_devices import HubDevice, Telemetry
from dps_emulator.registrations import StateError, utc_text
from dps_emulator.service import DpsService
from dps_emulator.store import Store
from dps_emulator.web.exchanges import Exchange, Exchanges, masked
from dps_emulator.web.markup import Html, fill, join

ROWS = 100  # of each table
LINES_KEPT = 2000  # of the hubs' log
PLOTTED = 200  # messages
SEARCHED = 1000  # messages; the page is made anew again and again, while devices wait
CURVES = 4
WIDTH, HEIGHT, MARGIN = 720, 180, 8  # of a plot
NAVIGATION = (
    ("/", "Devices"),
    ("/registrations", "Registrations"),
    ("/enrollments", "Enrolments"),
    ("/faults", "Faults"),
    ("/connect", "Connect"),
)


@dataclass(frozen=True)
class Desk:
    """Everything that the page shows."""

    service: DpsService
    store: Store
    hubs: Hubs
    faults: Callable[[], FaultScript]
    addresses: Mapping[str, str]
    ca_pem: str
    exchanges: Exchanges = field(default_factory=Exchanges)
    lines: deque[HubLine] = field(default_factory=lambda: deque(maxlen=LINES_KEPT))


class NotHere(Exception):
    """There is nothing at this path; the text says what was looked for."""


def frame(title: str, path: str, body: Html, said: str = "", failed: bool = False) -> Html:
    """A whole page; `said` is the outcome of what was asked for last."""
    links = join(
        fill('<a href="{}"{}>{}</a>', to, Html(' aria-current="page"') if to == path else "", name)
        for to, name in NAVIGATION
    )
    notice = fill('<p class="{}" role="status">{}</p>', "bad notice" if failed else "notice", said) if said else ""
    return fill(
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title} · dps-emulator</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,"><link rel="stylesheet" href="/page.css">'
        '<script src="/page.js" defer></script></head>'
        '<body><a class="jump" href="#content">to the content</a><header><strong>dps-emulator</strong>'
        '<nav aria-label="views">{links}</nav><span id="live" title="whether this page follows by itself"></span>'
        '</header><main id="content"><h1>{title}</h1>{notice}{body}</main></body></html>',
        title=title,
        links=links,
        notice=notice,
        body=body,
    )


def live(name: str, body: Html) -> Html:
    """A part that follows what happens, where the browser runs scripts."""
    return fill('<div id="{}" data-live>{}</div>', name, body)


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], nothing: str, name: str = "") -> Html:
    """A table, or a sentence where it has no rows; with a name it scrolls by itself."""
    body = join(fill("<tr>{}</tr>", join(fill("<td>{}</td>", cell) for cell in row)) for row in rows)
    if not body:
        return fill('<p class="none">{}</p>', nothing)
    head = join(fill('<th scope="col">{}</th>', text) for text in heads)
    scrolls = fill(' tall" tabindex="0" role="region" aria-label="{}', name) if name else ""
    return fill(
        '<div class="wide{}"><table><thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>', scrolls, head, body
    )


def button(action: str, text: str, kind: str = "", **values: str) -> Html:
    """A form that is one button."""
    hidden = join(fill('<input type="hidden" name="{}" value="{}">', name, value) for name, value in values.items())
    return fill(
        '<form method="post" action="{}" class="one">{}<button class="{}">{}</button></form>',
        action,
        hidden,
        kind,
        text,
    )


# --- devices


def devices(desk: Desk) -> Html:
    """All devices of all hubs, those that are connected first, and who knocks."""
    rows = []
    for hub in desk.hubs.all():
        for device in known_devices(desk, hub):
            link = hub.links.get(device.device_id.lower())
            rows.append((link is None, device.device_id.lower(), hub, device))
    rows.sort(key=lambda row: row[:2])
    listed = (
        (
            dot(hub, device),
            fill('<a href="{}">{}</a>', address_of(hub, device), device.device_id),
            hub.name,
            _last_message(desk, hub, device),
            len(device.queue) or "",
        )
        for _, _, hub, device in rows[:ROWS]
    )
    more = fill("<p>{} more are not shown.</p>", len(rows) - ROWS) if len(rows) > ROWS else Html()
    nothing = "No device has been assigned to a hub yet."
    body = fill(
        "{}{}<h2>Lately at the hubs</h2>{}",
        table(("", "device", "hub", "last message", "waiting for it"), listed, nothing),
        more,
        events(islice(reversed(desk.lines), 20)),
    )
    return fill("{}{}", knocking(desk), live("devices", body))


def known_devices(desk: Desk, hub: Hub) -> list[HubDevice]:
    """The devices of a hub that can be read, with those that have been assigned and never connected."""
    found: dict[str, HubDevice] = {}
    after = ""
    while (page := hub.page(after)) and len(found) < ROWS * 10:
        after = page[-1][0]
        found.update({key: device for key, device in page if isinstance(device, HubDevice)})
    for key in sorted(desk.store.registrations.devices_at(hub.name))[: ROWS * 10]:
        with contextlib.suppress(StateError):
            device = found.get(key) or hub.find(key)
            if device:
                found[key] = device
    return list(found.values())


def dot(hub: Hub, device: HubDevice) -> Html:
    """Whether a device is connected."""
    if device.device_id.lower() in hub.links:
        return Html('<span class="dot on"></span> connected')
    if not device.enabled:
        return Html('<span class="dot bad"></span> disabled')
    return Html('<span class="dot"></span> away')


def address_of(hub: Hub, device: HubDevice) -> str:
    """The path of a device's own page."""
    return f"/devices/{quote(hub.name, safe='')}/{quote(device.device_id, safe='')}"


def _last_message(desk: Desk, hub: Hub, device: HubDevice) -> Html:
    last = [kept.message for kept in desk.store.messages.after(0, device.device_id, 1)]
    if not last or last[0].hub != hub.name:
        return Html()
    return fill("{} <code>{}</code>", clock_time(last[0].time), payload_of(last[0])[:80])


def knocking(desk: Desk) -> Html:
    """Devices that asked and are not enrolled."""
    knocks = list(desk.exchanges.knocks.values())[::-1]
    if not knocks:
        return live("knocks", Html())
    items = join(
        fill(
            "<li><strong>{}</strong> asked at {} and is not enrolled (EK SHA-256 <code>{}</code>). {}</li>",
            knock.registration_id,
            clock_time(utc_text(knock.at_s)),
            short_digest(knock.endorsement_key),
            button("/knocks", "Enrol it", registration_id=knock.registration_id),
        )
        for knock in knocks
    )
    return live("knocks", fill('<ul class="knocks">{}</ul>', items))


def device(desk: Desk, hub_name: str, device_id: str, wanted: str = "") -> tuple[str, Html]:
    """Title and page of one device; `wanted` filters its messages. Raises NotHere."""
    try:
        hub = desk.hubs.find(device_id, hub_name)
        found = hub.device(device_id)
    except HubError as error:
        raise NotHere(str(error)) from None
    at = address_of(hub, found)
    twin = found.twin.document()
    newest = desk.store.messages.after(0, device_id, SEARCHED)
    messages = [kept.message for kept in newest if kept.message.hub == hub.name]
    shown = [message for message in messages if not wanted or wanted.lower() in line_of(message).lower()]
    return found.device_id, join(
        (
            live("state", fill("<p>{} at {}{}</p>", dot(hub, found), hub.name, model_of(found))),
            fill(
                '<div class="row">{}{}{}</div>',
                button(f"{at}/disconnect", "Disconnect"),
                button(f"{at}/disable", "Disable", "bad") if found.enabled else button(f"{at}/enable", "Enable"),
                button(f"{at}/withdraw", "Withdraw", "bad"),
            ),
            Html("<h2>Telemetry</h2>"),
            fill(
                '<form method="get" action="{}" class="row"><label>only those with <input name="only" value="{}"'
                ' size="24"></label><button>Filter</button></form>',
                at,
                wanted,
            ),
            live("telemetry", fill("{}{}", plot(shown[-PLOTTED:]), telemetry(shown, len(messages)))),
            Html('<div class="two"><section><h2>Twin: desired</h2>'),
            fill(
                '<form method="post" action="{}/desired"><textarea name="desired" rows="10" aria-label="changes of the'
                ' desired properties" spellcheck="false">{}</textarea><button>Merge</button> null deletes a property'
                "</form>",
                at,
                as_json({name: value for name, value in twin["desired"].items() if name != "$version"}),
            ),
            live("desired", fill("<p>version {}</p>", twin["desired"]["$version"])),
            Html("</section><section><h2>Twin: reported</h2>"),
            live("reported", fill("<pre>{}</pre>", as_json(twin["reported"]))),
            Html('</section></div><div class="two"><section><h2>Direct method</h2>'),
            fill(
                '<form method="post" action="{}/invoke"><label>name <input name="method" value="ping" required></label>'
                '<label>payload, JSON or nothing <textarea name="payload" rows="3" spellcheck="false"></textarea>'
                "</label><button>Call</button></form>",
                at,
            ),
            Html("</section><section><h2>Message to the device</h2>"),
            fill(
                '<form method="post" action="{}/send"><label>text <textarea name="text" rows="3" required></textarea>'
                "</label><button>Send</button></form>",
                at,
            ),
            live("queue", queue(found)),
            Html("</section></div><h2>Connection</h2>"),
            live(
                "log",
                events(
                    islice((line for line in reversed(desk.lines) if line.device_id == found.device_id), ROWS),
                    "connection log",
                ),
            ),
        )
    )


def model_of(found: HubDevice) -> Html:
    """The Plug and Play model that a device has named."""
    return fill(", model <code>{}</code>", found.model_id) if found.model_id else Html()


def telemetry(messages: Sequence[Telemetry], kept: int) -> Html:
    """The newest messages, first the last one."""
    rows = (
        (
            clock_time(message.time),
            fill("<code>{}</code>", payload_of(message)[:2000]),
            " ".join(f"{name}={value}" for name, value in message.properties.items()),
            f"{message.qos}{' dup' if message.dup else ''}",
        )
        for message in reversed(messages[-ROWS:])
    )
    count = fill("<p>{} of {} messages fit.</p>", len(messages), kept) if len(messages) != kept else Html()
    return fill(
        "{}{}", count, table(("time", "payload", "properties", "QoS"), rows, "No message has come.", "telemetry")
    )


def plot(messages: Sequence[Telemetry]) -> Html:
    """The numeric fields of JSON payloads, each drawn between its least and its greatest value."""
    series: dict[str, list[tuple[int, float]]] = {}
    for at, message in enumerate(messages):
        for name, value in numbers_of(message).items():
            series.setdefault(name, []).append((at, value))
    curves = [(name, points) for name, points in sorted(series.items()) if len(points) > 1][:CURVES]
    if not curves:
        return Html()
    step = (WIDTH - 2 * MARGIN) / max(len(messages) - 1, 1)
    drawn, legend = [], []
    for number, (name, points) in enumerate(curves, 1):
        low, high = min(value for _, value in points), max(value for _, value in points)
        scale = (HEIGHT - 2 * MARGIN) / ((high - low) or 1)
        places = " ".join(
            f"{MARGIN + at * step:.1f},{HEIGHT - MARGIN - (value - low) * scale:.1f}" for at, value in points
        )
        drawn.append(fill('<polyline class="curve{}" points="{}"/>', number, places))
        legend.append(
            fill('<li class="curve{}">{}: {:g} to {:g}, last {:g}</li>', number, name, low, high, points[-1][1])
        )
    title = f"the last {len(messages)} messages: {', '.join(name for name, _ in curves)}"
    return fill(
        '<figure><svg viewBox="0 0 {} {}" role="img" aria-label="{}" preserveAspectRatio="none">{}</svg>'
        "<figcaption><ul>{}</ul></figcaption></figure>",
        WIDTH,
        HEIGHT,
        title,
        join(drawn),
        join(legend),
    )


def numbers_of(message: Telemetry) -> dict[str, float]:
    """The numeric fields of a payload that is a JSON object, those in objects within it by `outer.inner`."""
    try:
        content = json.loads(message.payload)
    except (ValueError, RecursionError):
        return {}
    found: dict[str, float] = {}

    def gather(value: Any, name: str) -> None:
        if isinstance(value, dict) and name.count(".") < 3:
            for inner, below in value.items():
                gather(below, f"{name}.{inner}" if name else inner)
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300:
            found[name or "value"] = float(value)

    gather(content, "")
    return found


def queue(found: HubDevice) -> Html:
    """Messages that wait for the device."""
    rows = ((message.message_id[:8], f"{len(message.payload)} bytes", message.deliveries) for message in found.queue)
    return table(("message", "size", "deliveries"), rows, "No message waits for the device.")


def events(lines: Iterable[HubLine], name: str = "") -> Html:
    """Lines of the hubs' log."""
    rows = ((clock_time(line.time), line.device_id, line.event, line.code or "", line.detail) for line in lines)
    return table(("time", "device", "event", "code", ""), rows, "Nothing has happened yet.", name)


# --- registrations


def registrations(desk: Desk) -> Html:
    """What devices asked of DPS, each registration as a strip."""
    strips = [fill("<li>{}</li>", strip(exchanges)) for exchanges in desk.exchanges.strips()]
    nothing = Html('<p class="none">Nobody has asked DPS for anything yet.</p>')
    body = fill('<ul class="strips">{}</ul>', join(strips)) if strips else nothing
    return fill("{}{}", knocking(desk), live("strips", body))


def strip(exchanges: Sequence[Exchange]) -> Html:
    """One registration: its exchanges in their order, with the time between them; each opens."""
    first, last = exchanges[0], exchanges[-1]
    cells, before = [], first
    for exchange in exchanges:
        gap = f"+{(exchange.at_s - before.at_s) * 1000:.0f} ms" if exchange is not first else first.time[11:]
        before = exchange
        cells.append(
            fill(
                '<li class="{}"><details id="x{}"><summary><span class="gap">{}</span> '
                '<span class="what"><b>{}</b> {}{}</span></summary>'
                "<dl><dt>request id</dt><dd><code>{}</code></dd></dl><h3>{} asked</h3><pre>{}</pre>"
                "<h3>answered {}</h3><pre>{}</pre></details></li>",
                colour_of(exchange),
                exchange.number,
                gap,
                exchange.status,
                exchange.title,
                fill(' <span class="fault">fault {}</span>', exchange.fault) if exchange.fault else "",
                exchange.request_id,
                exchange.registration_id or "somebody",
                exchange.request,
                exchange.status,
                exchange.answer,
            )
        )
    return fill(
        '<h2>{} <small>{}, {:.1f} s, {} requests</small></h2><ol class="strip">{}</ol>',
        first.registration_id or "without an id",
        last.title,
        last.at_s - first.at_s,
        len(exchanges),
        join(cells),
    )


def colour_of(exchange: Exchange) -> str:
    """A class for what an exchange came to."""
    if exchange.title in ("challenge", "assigning", "register"):
        return "going"
    return "good" if exchange.status < 300 and exchange.state in ("assigned", "") else "bad"


# --- enrolments


def enrollments(desk: Desk) -> Html:
    """Who is enrolled, what can be done about it, and how more are enrolled."""
    rows = []
    kinds = (desk.store.enrollments, desk.store.groups)
    for records, key in ((each, key) for each in kinds for key in islice(each, ROWS * 10)):
        try:
            enrollment = records[key]
        except (KeyError, StateError):
            continue
        name, record = enrollment.registration_id, masked(enrollment.to_json(with_keys=False))
        chosen = {"registration_id": name, **({"group": "yes"} if enrollment.is_group else {})}
        switch = ("disable", "Disable") if enrollment.enabled else ("enable", "Enable")
        state = ("on", "enabled") if enrollment.enabled else ("bad", "disabled")
        registered = "group" if enrollment.is_group else "yes" if key in desk.store.registrations else "no"
        buttons = (
            button(f"/enrollments/{switch[0]}", switch[1], **chosen),
            button("/enrollments/delete", "Delete", "bad", **chosen),
        )
        rows.append(
            (
                fill('<span class="dot {}"></span> {}', *state),
                fill(
                    '<details id="e{}"><summary>{}</summary><pre>{}</pre></details>',
                    digest(f"{enrollment.is_group} {key}"),
                    name,
                    as_json(record),
                ),
                trusted(enrollment),
                ", ".join(enrollment.hubs),
                registered,
                fill('<div class="row">{}</div>', join(buttons)),
            )
        )
    heads = ("state", "registration id", "what it trusts", "hubs", "has registered", "")
    return join(
        (
            knocking(desk),
            live("enrolled", table(heads, rows, "Nobody is enrolled.")),
            Html(
                '<h2>Enrol more</h2><form method="post" action="/enrollments/import" id="import">'
                "<label>a list as CSV (registrationId,endorsementKey) or JSON; drop a file here"
                '<textarea name="list" rows="8" required spellcheck="false"></textarea></label>'
                "<button>Enrol</button></form>"
            ),
        )
    )


def trusted(enrollment: Enrollment) -> Html:
    """What an enrolment knows its device by, in short."""
    if enrollment.endorsement_key:
        digest_of_key = hashlib.sha256(enrollment.endorsement_key).hexdigest()[:16]
        return fill("EK <code>{}</code>", digest_of_key)
    attestation = enrollment.to_json(with_keys=False)["attestation"]
    return fill("{}", "symmetric key" if attestation["type"] == "symmetricKey" else attestation["type"])


# --- faults and connections


def faults(desk: Desk) -> Html:
    """What is in force, and what could be."""
    in_force = desk.faults().faults
    listed = join(fill("<li><code>{}</code></li>", described(fault)) for fault in in_force)
    ended = button("/faults", "All is well again", name="nothing") if in_force else Html()
    now = fill("<ol>{}</ol>", listed) if in_force else Html('<p class="none">Nothing is broken.</p>')
    tiles = join(
        fill(
            '<li><form method="post" action="/faults"><input type="hidden" name="name" value="{}">'
            '<b>{}</b> {} <span class="row"><label>at most <input name="times" inputmode="numeric" pattern="[0-9]*"'
            ' size="4"> times</label><button>Break</button></span></form></li>',
            breakage.name,
            breakage.at,
            breakage.title,
        )
        for breakage in PALETTE
    )
    return join(
        (
            live("force", fill("<h2>In force</h2>{}{}", now, ended)),
            fill('<h2>Palette</h2><p>Each takes the place of what is in force.</p><ul class="tiles">{}</ul>', tiles),
            Html(
                '<h2>A script</h2><form method="post" action="/faults"><input type="hidden" name="name" value="script">'
                '<label>entries of a fault script, a JSON list <textarea name="script" rows="5" spellcheck="false">'
                '[{"operation": "telemetry", "drop": "after", "times": 1}]</textarea></label>'
                "<button>Break</button></form>"
            ),
        )
    )


def described(fault: Fault) -> str:
    """An entry by what is not as in every other."""
    plain = Fault()
    parts = (
        f"{each.name}={getattr(fault, each.name)!r}"
        for each in fields(fault)
        if getattr(fault, each.name) != getattr(plain, each.name)
    )
    return " ".join(parts)


def connect(desk: Desk) -> Html:
    """What clients need to reach this emulator."""
    dps, hubs, scope = desk.addresses["dps"], desk.addresses["hubs"], desk.service.settings.id_scope
    hub_host = hubs.partition("://")[2]
    texts = (
        (
            "config.toml of the agent, with its simulator for a TPM",
            f'id_scope = "{scope}"\nendpoint = "{dps}"\nca_file = "ca.pem"\nstate_dir = "device"\n'
            f'runtime_dir = "run"\n\n[tpm]\nbackend = "simulator"\ntcti = "tpm"\n\n[hub]\n'
            f'connect_to = "{hub_host}"\nca_file = "ca.pem"\n',
        ),
        (
            "curl",
            f"curl --cacert ca.pem -X PUT '{dps}/{scope}/registrations/press-07/register?api-version=2021-10-01' \\\n"
            "    -H 'Content-Type: application/json' -d '{\"registrationId\": \"press-07\"}'\n",
        ),
        (
            "azure-iot-device, for a device that dps-emulator device-add has made",
            "# It dials port 8883 alone: start the emulator with --hub-port 8883.\n"
            "from azure.iot.device import IoTHubDeviceClient\n\n"
            "client = IoTHubDeviceClient.create_from_connection_string(\n"
            '    connection_string, gateway_hostname="localhost", server_verification_cert=open("ca.pem").read()\n)\n',
        ),
        ("ca.pem, the CA's certificate", desk.ca_pem),
    )
    boxes = join(
        fill(
            '<h2>{}</h2><div class="copy"><button type="button" data-copy="c{}" hidden>Copy</button>'
            '<pre id="c{}" tabindex="0">{}</pre></div>',
            title,
            number,
            number,
            text,
        )
        for number, (title, text) in enumerate(texts)
    )
    heads = fill("<p>DPS at <code>{}</code>, hubs at <code>{}</code>, ID scope <code>{}</code>.</p>", dps, hubs, scope)
    return fill("{}{}", heads, boxes)


# --- small things


def line_of(message: Telemetry) -> str:
    """What a filter looks at."""
    return f"{message.time} {payload_of(message)} {dict(message.properties)}"


def payload_of(message: Telemetry) -> str:
    """The payload as text, or in base64."""
    try:
        return message.payload.decode()
    except UnicodeDecodeError:
        return f"base64 {base64.b64encode(message.payload).decode()}"


def clock_time(time: str) -> Html:
    """A moment by its time of day; the whole of it on a look."""
    return fill('<time datetime="{}" title="{}">{}</time>', time, time, time[11:23])


def as_json(value: Any) -> str:
    """JSON for people."""
    return json.dumps(value, indent=2, ensure_ascii=False)


def short_digest(encoded: str) -> str:
    """The first half of the SHA-256 of a key in base64, as `enrollments` prints it."""
    return hashlib.sha256(base64.b64decode(encoded)).hexdigest()[:16]


def digest(text: str) -> str:
    """A name for an element."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]
