"""DPS over MQTT: a device's connection, packets in and out; what is asked and answered is the same as over HTTPS.

Source: "Communicate with DPS using the MQTT protocol". It is told apart from a hub by the user name alone:
`{idScope}/registrations/{registrationId}/api-version=…`, without a question mark. A published trace shows that a device
whose credentials are wrong connects all the same, and is told so by the answer to its request: so it is here.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from urllib.parse import quote

from dps_emulator import mqtt, topics
from dps_emulator.enrollments import is_registration_id
from dps_emulator.hub import Wire
from dps_emulator.service import METHODS, Request, Response

ANSWERS = "$dps/registrations/res/#"
_USER_NAME = re.compile(r"(?P<id_scope>[^/?]+)/registrations/(?P<registration_id>[^/?]+)/(?P<query>[^/?]*)")
_REGISTER = re.compile(r"\$dps/registrations/PUT/iotdps-register/\?(?P<query>.*)")
_POLL = re.compile(r"\$dps/registrations/GET/iotdps-get-operationstatus/\?(?P<query>.*)")


@dataclass(frozen=True)
class Asked:
    """One request, and the publication that it came by."""

    request: Request
    request_id: str  # the client's `$rid`
    packet: mqtt.Publish


class DpsLink:
    """One device's connection to DPS, from its CONNACK to its end; it keeps nothing for another one."""

    def __init__(
        self,
        wire: Wire,
        connect: mqtt.Connect,
        note: Callable[[str, str], None],
        server_name: str = "",
        client_chain: tuple[bytes, ...] = (),
    ) -> None:
        """Lets the device in; `note(event, detail)` writes the log. Ask `is_dps` first."""
        named = _USER_NAME.fullmatch(connect.user_name or "")
        assert named is not None, "a CONNECT to DPS"
        self._wire = wire
        self._note = note
        self._client_chain = client_chain
        self._qos: int | None = None  # of the answers; None: not subscribed
        self._packet_id = 0
        self._query = named["query"]
        self._path = f"/{quote(named['id_scope'], safe='')}/registrations/{quote(named['registration_id'], safe='')}"
        password = (connect.password or b"").decode(errors="replace")
        host = {"host": server_name} if server_name else {}
        self._headers = {**host, "content-type": "application/json"} | ({"authorization": password} if password else {})
        self.is_open = named["registration_id"] == connect.client_id and is_registration_id(connect.client_id)
        if not self.is_open:
            self._refuse("the client id is not the user name's, or no registration id")
            return
        note("dps-connected", f"sni={server_name or '-'} keep-alive={connect.keep_alive_s}")
        wire.send(mqtt.connack(mqtt.ACCEPTED))

    def received(self, packet: mqtt.Packet) -> Asked | None:
        """Acts on one packet; what it asks of DPS, for `answered`."""
        match packet:
            case mqtt.Publish():
                return self._published(packet)
            case mqtt.Subscribe():
                known = [topic_filter == ANSWERS for topic_filter, _ in packet.filters]
                granted = [
                    min(qos, 1) if is_known else mqtt.REFUSED_SUBSCRIPTION
                    for is_known, (_, qos) in zip(known, packet.filters, strict=True)
                ]
                for is_known, qos in zip(known, granted, strict=True):
                    self._qos = qos if is_known else self._qos
                self._wire.send(mqtt.suback(packet.packet_id, granted))
            case mqtt.Unsubscribe():
                if ANSWERS in packet.filters:
                    self._qos = None
                self._wire.send(mqtt.unsuback(packet.packet_id))
            case mqtt.PingRequest():
                self._wire.send(mqtt.ping_response())
            case mqtt.Disconnect():
                self.drop("the device said goodbye")
            case mqtt.Connect():
                self.drop("a second CONNECT")
        return None

    def answered(self, asked: Asked, response: Response) -> None:
        """Sends the answer, to whoever has subscribed to it."""
        if self._qos is None or not self.is_open:
            return
        headers = {name.lower(): value for name, value in response.headers}
        after = f"&retry-after={headers['retry-after']}" if "retry-after" in headers else ""
        topic = f"$dps/registrations/res/{response.status}/?$rid={asked.request_id}{after}"
        self._packet_id = self._packet_id % 0xFFFF + 1
        packet_id = self._packet_id if self._qos else 0
        self._wire.send(mqtt.publish(mqtt.Publish(topic, response.body, self._qos, packet_id=packet_id)))

    def drop(self, reason: str) -> None:
        """Ends the connection from this side; idempotent."""
        if self.is_open:
            self.ended(reason)
            self._wire.drop()

    def ended(self, reason: str) -> None:
        """The connection is over; idempotent."""
        if self.is_open:
            self.is_open = False
            self._note("dps-closed", reason)

    def _published(self, packet: mqtt.Publish) -> Asked | None:
        register, poll = _REGISTER.fullmatch(packet.topic), _POLL.fullmatch(packet.topic)
        named = register or poll
        values = topics.parse_properties(named["query"]) if named else {}
        request_id, operation_id = values.get("$rid") or "", values.get("operationId") or ""
        if packet.qos == 2 or not request_id or (poll and not operation_id):
            self.drop("a PUBLISH that DPS does not have: of QoS 2, to another topic, or without $rid or operationId")
            return None
        if packet.qos:
            self._wire.send(mqtt.puback(packet.packet_id))
        if register:
            request = Request(METHODS["register"], f"{self._path}/register", body=packet.payload)
        else:  # what a client sends with it, a space or JSON, has no meaning
            request = Request(METHODS["operation"], f"{self._path}/operations/{quote(operation_id, safe='')}")
        asked = replace(
            request, query=self._query, headers=self._headers, takes_tpm=False, client_chain=self._client_chain
        )
        return Asked(asked, request_id, packet)

    def _refuse(self, reason: str) -> None:
        self._note("refused", reason)
        self._wire.send(mqtt.connack(mqtt.NOT_AUTHORIZED))
        self._wire.drop()


def is_dps(connect: mqtt.Connect) -> bool:
    """Whether this is for DPS, not for a hub."""
    return connect.level == mqtt.LEVEL and _USER_NAME.fullmatch(connect.user_name or "") is not None
