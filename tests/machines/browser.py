"""The emulator's page in Debian's Chromium, by Playwright: what is clicked, what is seen, and a picture of each view.

    python -m machines.browser FOLDER      pictures go to FOLDER

Nobody downloads a browser for it. Exit status 0: every claim holds.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from playwright.sync_api import Error, expect, sync_playwright

from dps_emulator.embedded import EmulatorInThread
from dps_emulator.fixtures import DEVICE_ID, Cloud, Device, Tpm

if TYPE_CHECKING:
    from collections.abc import Iterator

CHROMIUM = "/usr/bin/chromium"
WITHIN_MS = 60_000
WIDTHS = {"wide": 1280, "narrow": 390}
HUB = "emulator.azure-devices.net"
DEVICE = f"/devices/{HUB}/{DEVICE_ID}"
VIEWS = {
    "devices": "/",
    "registrations": "/registrations",
    "enrolments": "/enrollments",
    "faults": "/faults",
    "connect": "/connect",
    "device": DEVICE,
}


def main() -> int:
    """Runs every claim in one browser."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    began_s = time.monotonic()
    with desk() as (cloud, device), sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            page = chromium.new_page(viewport={"width": WIDTHS["wide"], "height": 900})
            page.set_default_timeout(WITHIN_MS)
            complaints: list[str] = []
            page.on("pageerror", lambda error: complaints.append(str(error)))
            page.on("console", lambda line: complaints.append(line.text) if line.type == "error" else None)
            claims(page, cloud, device)
            assert not complaints, complaints
            pictures = take_pictures(chromium, cloud.emulator, folder)
            strangers(chromium, cloud.emulator)
            without_scripts(chromium, cloud.emulator)
        finally:
            chromium.close()
    print(f"the page does what it shows; {pictures} pictures in {folder}; {time.monotonic() - began_s:.0f} s")
    return 0


@contextlib.contextmanager
def desk() -> Iterator[tuple[Cloud, Device]]:
    """An emulator with its page and a device that is not enrolled yet."""
    with tempfile.TemporaryDirectory(prefix="dps-") as name:
        cloud = Cloud({"retry_after_s": 0, "assign_after_s": 0.2}, web_port=0)
        (Path(name) / "device").mkdir()
        tpm = Tpm(Path(name) / "tpm", None)
        with cloud.emulator, Device(Path(name) / "device", cloud, tpm, "") as device:
            yield cloud, device


def at(emulator: EmulatorInThread, path: str) -> str:
    """The address of a view."""
    return str(emulator.addresses["web"]).partition("/?")[0] + path


def said(page: Any) -> Any:
    """What the page says of what was done last."""
    return page.get_by_role("status")


def claims(page: Any, cloud: Cloud, device: Device) -> None:
    """One device's life, seen and commanded on the page alone."""
    emulator = cloud.emulator
    page.goto(emulator.addresses["web"])
    expect(page).to_have_url(at(emulator, "/"))
    expect(page.locator("#live")).to_have_text("● live", timeout=WITHIN_MS)
    claim("an address with a token opens the page, which then has none in its own")

    with contextlib.suppress(AssertionError):
        device.command("provision", exit_status=0)
    page.get_by_role("button", name="Enrol it").click(timeout=WITHIN_MS)
    expect(said(page)).to_contain_text(f"enrolled: {DEVICE_ID}")
    claim("a device that knocks shows up by itself, and is enrolled by a click")

    device.start()
    device.await_connected()
    page.get_by_role("link", name="Registrations").click()
    strip = page.locator(".strip").first
    expect(strip).to_contain_text("assigned", timeout=WITHIN_MS)
    assert [text.split()[-1] for text in strip.locator(".what").all_inner_texts()][-1] == "assigned"
    challenge = strip.locator("li", has_text="challenge")
    challenge.locator("summary").focus()
    page.keyboard.press("Enter")
    expect(challenge.locator("pre").last).to_contain_text('"authenticationKey": "••••')
    claim("a registration is a strip; the keyboard opens its parts; the key is masked")

    page.get_by_role("link", name="Devices").click()
    page.get_by_role("link", name=DEVICE_ID).click()
    expect(page.locator("#state")).to_contain_text("connected")
    for number in range(30):
        device.send({"temperature": 20 + number % 7, "pressure": {"bar": 100 - number}}, {"line": "3"})
    device.send("<b>not markup</b>")
    expect(page.locator("#telemetry")).to_contain_text("<b>not markup</b>", timeout=WITHIN_MS)
    expect(page.locator("polyline")).to_have_count(2)
    claim("telemetry comes by itself, is drawn, and is text")
    page.get_by_label("only those with").fill('bar": 71')
    page.get_by_role("button", name="Filter").click()
    expect(page.locator("#telemetry tbody tr")).to_have_count(1)
    claim("a filter leaves those that fit")

    page.goto(at(emulator, DEVICE))
    page.get_by_label("changes of the desired properties").fill('{"interval": 30}')
    page.get_by_role("button", name="Merge").click()
    expect(said(page)).to_contain_text("merged")
    assert emulator.twin(DEVICE_ID)["desired"]["interval"] == 30
    page.get_by_label("changes of the desired properties").fill("{")
    page.get_by_role("button", name="Merge").click()
    expect(said(page)).to_contain_text("no JSON")
    page.get_by_role("button", name="Call").click()
    expect(said(page)).to_contain_text("the device answered 200")
    page.get_by_label("text").fill("open")
    page.get_by_role("button", name="Send").click()
    expect(said(page)).to_contain_text("queued as")
    claim("twin, method and message go to the device, and what is wrong is said")

    page.get_by_role("button", name="Disable").click()
    expect(page.locator("#state")).to_contain_text("disabled", timeout=WITHIN_MS)
    page.get_by_role("button", name="Enable").click()
    expect(said(page)).to_contain_text("enable: done")
    device.end()
    device.start()
    expect(page.locator("#state")).to_contain_text("connected", timeout=WITHIN_MS)
    claim("a device that was disabled and enabled comes back, and its dot with it")

    page.get_by_role("link", name="Faults").click()
    tile = page.locator(".tiles li", has_text="keeps telemetry")
    tile.locator("input[name=times]").fill("1")
    tile.get_by_role("button", name="Break").click()
    expect(page.locator("#force")).to_contain_text("times=1")
    device.send({"temperature": 1})
    page.get_by_role("button", name="All is well again").click()
    expect(page.locator("#force")).to_contain_text("Nothing is broken")
    claim("a fault of the palette is in force until it is ended")

    page.get_by_role("link", name="Enrolments").click()
    page.locator("#import").evaluate(
        """(form, text) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([text], "list.csv"));
            form.dispatchEvent(new DragEvent("drop", {bubbles: true, cancelable: true, dataTransfer: transfer}));
        }""",
        f"registrationId,endorsementKey\npress-08,{device.command('enroll')['endorsementKey']}\n",
    )
    expect(page.locator("#import textarea")).to_have_value(re.compile("press-08"))
    page.get_by_role("button", name="Enrol", exact=True).click()
    expect(said(page)).to_contain_text("1 enrolled")
    page.locator("tr", has_text="press-08").get_by_role("button", name="Delete").click()
    expect(said(page)).to_contain_text("deleted: press-08")
    claim("a list that is dropped is enrolled, and what is in it deleted again")

    page.get_by_role("link", name="Connect").click()
    expect(page.locator("#c0")).to_contain_text(emulator.addresses["dps"])
    expect(page.get_by_role("button", name="Copy").first).to_be_visible()
    claim("the settings for clients are there to be copied")


def take_pictures(chromium: Any, emulator: EmulatorInThread, folder: Path) -> int:
    """Each view, wide and narrow, light and dark; nothing of it is wider than the window."""
    taken = 0
    for scheme in ("light", "dark"):
        for size, width in WIDTHS.items():
            context = chromium.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
            page = context.new_page()
            page.goto(emulator.addresses["web"])
            for name, path in VIEWS.items():
                page.goto(at(emulator, path))
                expect(page.locator("#live")).to_have_text("● live", timeout=WITHIN_MS)
                page.screenshot(path=str(folder / f"{name}-{scheme}-{size}.png"), full_page=True)
                taken += 1
                wide = page.evaluate("document.documentElement.scrollWidth")
                assert wide <= width, f"{name} is {wide} wide in a window of {width}"
            context.close()
    return taken


def strangers(chromium: Any, emulator: EmulatorInThread) -> None:
    """A page of somebody else's, in a browser that has the cookie: it can neither frame, nor post, nor read."""
    context = chromium.new_context()
    own = context.new_page()
    own.goto(emulator.addresses["web"])
    page = context.new_page()
    target = at(emulator, "/faults")
    form = f'<form method="post" action="{target}"><input name="name" value="dps-unavailable"><button>x</button></form>'
    page.route("http://stranger.example/", lambda route: route.fulfill(body=form, content_type="text/html"))
    page.goto("http://stranger.example/")
    page.get_by_role("button").click()
    page.wait_for_url(target)
    expect(page.locator("body")).to_contain_text("open the address", timeout=WITHIN_MS)
    own.goto(target)
    expect(own.locator("#force")).to_contain_text("Nothing is broken")
    claim("a form of another page is refused")
    framing = f'<iframe src="{at(emulator, "/")}"></iframe>'
    page.route("http://frame.example/", lambda route: route.fulfill(body=framing, content_type="text/html"))
    page.goto("http://frame.example/")
    inner = page.frames[-1]
    with contextlib.suppress(Error):
        assert "Devices" not in inner.content()
    page.goto("http://stranger.example/")
    read = page.evaluate("(url) => fetch(url).then((answer) => answer.status, () => 'refused')", target)
    assert read == "refused", read
    claim("another page can neither frame nor read it")
    context.close()


def without_scripts(chromium: Any, emulator: EmulatorInThread) -> None:
    """Everything can be read, and forms work."""
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(emulator.addresses["web"])
    page.get_by_role("link", name=DEVICE_ID).click()
    expect(page.locator("#telemetry")).to_contain_text("not markup")
    page.get_by_label("text").fill("without scripts")
    page.get_by_role("button", name="Send").click()
    expect(said(page)).to_contain_text("queued as")
    claim("without scripts it can be read and used")
    context.close()


def claim(text: str) -> None:
    """Prints what holds."""
    print(f"  ✓ {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
