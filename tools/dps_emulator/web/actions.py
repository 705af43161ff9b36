"""What the forms of the page ask for; each returns where to go next and a sentence, or raises Refused."""

import base64
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

from dps_emulator.breakages import PALETTE
from dps_emulator.enrollments import EnrollmentError, enrollment_from_json, read_enrollments, registration_key
from dps_emulator.json_text import parse_json
from dps_emulator.web.pages import Desk
from dps_text import whole_number
from dps_text.enrolments import ListError

Form = Mapping[str, str]
Command = Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]
DEVICE_COMMANDS = ("disconnect", "enable", "disable", "withdraw")
METHOD_S = 30.0
MAX_TIMES = 10**9  # of a fault, as in a script


class Refused(Exception):
    """What a form asks for can't be done; the text says why."""


class Actions:
    """Acts on a desk; `command` is that of `Control`."""

    def __init__(self, desk: Desk, command: Command) -> None:
        self._desk = desk
        self._command = command

    async def device(self, hub: str, device_id: str, verb: str, form: Form) -> str:
        """Does something with a device."""
        at = {"device": device_id, "hub": hub}
        if verb in DEVICE_COMMANDS:
            await self._ask(verb, **at)
            return f"{verb}: done"
        if verb == "desired":
            await self._ask("twin", **at, desired=_json(form.get("desired", ""), "the desired properties"))
            return "the desired properties were merged"
        if verb == "send":
            sent = await self._ask("send-c2d", **at, payload=base64.b64encode(form.get("text", "").encode()).decode())
            return f"queued as {sent['messageId']}"
        if verb == "invoke":
            text = form.get("payload", "").strip()
            payload = {"payload": _json(text, "the payload")} if text else {}
            said = await self._ask("invoke", **at, method=form.get("method", ""), timeoutS=METHOD_S, **payload)
            return f"the device answered {said['status']}: {json.dumps(said['payload'], ensure_ascii=False)}"
        raise Refused(f"there is no '{verb}'")

    async def enrollment(self, verb: str, form: Form) -> str:
        """Enables, disables, deletes or imports."""
        service = self._desk.service
        if verb == "import":
            try:
                listed = read_enrollments(form.get("list", ""))
            except ListError as error:
                raise Refused(str(error)) from None
            self._desk.store.enroll(listed.enrollments)
            passed_over = f"; {len(listed.others)} of other kinds passed over" if listed.others else ""
            odd = "".join(f"; {line}" for line in map(str, listed.odd[:5]))
            said = f"{len(listed.enrollments)} enrolled{passed_over}{odd}"
            if not listed.enrollments:
                raise Refused(said)
            return said
        name = form.get("registration_id", "")
        records = service.groups if form.get("group") else service.enrollments
        enrolled = records.get(registration_key(name))
        if enrolled is None:
            raise Refused(f"nobody is enrolled as '{name}'")
        if verb == "delete":
            del records[registration_key(name)]
        elif verb in ("enable", "disable"):
            service.enroll(replace(enrolled, enabled=verb == "enable"))
        else:
            raise Refused(f"there is no '{verb}'")
        return f"{verb}d: {name}"

    async def knock(self, form: Form) -> str:
        """Enrols a device that asked without being enrolled."""
        knock = self._desk.exchanges.knocks.get(form.get("registration_id", "").lower())
        if knock is None:
            raise Refused("that device is enrolled by now, or asked too long ago")
        attestation = {"type": "tpm", "tpm": {"endorsementKey": knock.endorsement_key}}
        try:
            enrollment = enrollment_from_json({"registrationId": knock.registration_id, "attestation": attestation})
        except EnrollmentError as error:
            raise Refused(str(error)) from None
        self._desk.service.enroll(enrollment)
        del self._desk.exchanges.knocks[knock.registration_id.lower()]
        return f"enrolled: {knock.registration_id}; it is served when it asks again"

    async def faults(self, form: Form) -> str:
        """Puts something of the palette, or a script, in force."""
        name = form.get("name", "")
        times = form.get("times", "").strip()
        if times and not whole_number(times, 1, MAX_TIMES):
            raise Refused(f"times: expected a number from 1 to {MAX_TIMES}; came '{times[:20]}'")
        if name == "nothing":
            script: Any = []
        elif name == "script":
            script = _json(form.get("script", ""), "the script")
        else:
            found = [breakage for breakage in PALETTE if breakage.name == name]
            if not found:
                raise Refused(f"nothing of the palette is called '{name[:40]}'")
            script = [{**entry, **({"times": int(times)} if times else {})} for entry in found[0].entries]
        entries = (await self._ask("faults", script=script))["entries"]
        return f"{entries} fault {'entry' if entries == 1 else 'entries'} in force"

    async def _ask(self, command: str, **request: Any) -> dict[str, Any]:
        answer = await self._command({"command": command, **request})
        if "error" in answer:
            raise Refused(str(answer["error"]["message"]))
        result: dict[str, Any] = answer["result"]
        return result


def _json(text: str, what: str) -> Any:
    try:
        return parse_json(text.encode())
    except ValueError as error:
        raise Refused(f"{what}: no JSON ({error})") from None
