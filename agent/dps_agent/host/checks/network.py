"""The checks of what lies between the device, DPS and the hub; every wait is bounded, and nothing is registered.

Imported only by a check that uses the network: it brings TLS.
"""

from __future__ import annotations

import os
import ssl
import time
from typing import TYPE_CHECKING, Any

from dps_agent import __version__
from dps_agent.effects import (
    NO_REPLY_CONNECT,
    NO_REPLY_DNS,
    NO_REPLY_TLS,
    Failed,
    NoReply,
    Reply,
)
from dps_agent.host.checks import ways
from dps_agent.host.checks.finding import NOTHING_STORED, OK, SKIPPED, WARNING, Finding, failed
from dps_agent.host.checks.ways import MQTT, WEBSOCKET
from dps_agent.host.clock import is_synchronised
from dps_agent.host.config import NO_ID_SCOPE, proxy_of
from dps_agent.host.network.dial import Dialler
from dps_agent.host.network.https import DpsConnection
from dps_agent.host.network.trust import system_places, tls_context
from dps_agent.host.parts import client_certificate
from dps_agent.host.printed import utc_text
from dps_agent.lifecycle import PROVISIONING
from dps_agent.messages import TpmChallenge, device_registration
from dps_agent.registration import LOOKUP_REFUSALS, no_reply_error, read_register, refusal_of, registration_path
from dps_agent.registration_by_tpm import shown_keys
from dps_agent.sas import DPS_KEY_NAME, DPS_TOKEN_LIFE_S, SasToken, dps_resource, string_to_sign
from dps_agent.settings import SYMMETRIC_KEY, TPM
from dps_agent.signing import signed_token
from dps_agent.utc import AGREEMENT_S
from dps_hal.errors import AskOperator, DpsError, IdentityStale, RetryLater
from dps_hal.platform import hmac_sha256
from dps_text.addresses import address_text

if TYPE_CHECKING:
    from dps_agent.host.checks.device import Device
    from dps_agent.host.checks.ways import Network, Peer

ANSWER_LIMIT_S = 20.0  # for one request to DPS, all in all
_NAMES = {MQTT: "MQTT", WEBSOCKET: "WebSocket"}
_CLOCK_SAYS = ("certificate has expired", "certificate is not yet valid")  # OpenSSL's words for both


def proxy(device: Device) -> Finding:
    network = device.network
    target = network.dps
    found = network.proxies.proxy_for(target.host, target.port)
    setting = device.configuration.network
    if found is None:
        return Finding(
            OK, f"none on the way to {address_text(target.host, target.port)} (network.proxy is {setting.proxy!r})"
        )
    dialler = Dialler(network.proxies, "")
    dialler.begin()
    try:
        dialler.reach(target.host, target.port, time.monotonic() + ways.DIAL_LIMIT_S).close()
    except (Failed, OSError) as error:
        failure = dialler.explain(error, "at the proxy")
        shown = "network.proxy" if setting.proxy != "env" else "https_proxy in the environment"
        shown = "network.proxy_file" if setting.proxy_file else shown
        remedy = (
            "" if failure.reason != NO_REPLY_CONNECT else f"correct {shown}, or the proxy; no_proxy names exceptions"
        )
        return failed(_error(failure, f"no way through the proxy that {shown} names"), remedy)
    return Finding(OK, f"{found} leads to {address_text(target.host, target.port)}")


def dns(device: Device) -> Finding:
    network = device.network
    target = network.dps
    way = network.proxies.proxy_for(target.host, target.port)
    if way is not None:
        return Finding(OK, f"the proxy {way} looks up {target.host}")
    dialler = Dialler(network.proxies, "")
    dialler.begin()
    try:
        found = dialler.addresses(target.host, target.port, time.monotonic() + ways.DIAL_LIMIT_S)
    except Failed as failure:
        raise _error(Failed(NO_REPLY_DNS, str(failure)), "the name of DPS was not looked up") from None
    addresses = sorted({str(entry[4][0]) for entry in found})
    return Finding(OK, f"{target.host} is {', '.join(addresses[:4])}{' …' if len(addresses) > 4 else ''}")


def dps_tls(device: Device) -> Finding:
    network = device.network
    target = network.dps
    try:
        with ways.dialled(network, target) as tls:
            return Finding(OK, f"{tls.version()} with {_chain_shown(tls, target)}")
    except Failed as failure:
        what = f"no TLS connection to DPS at {address_text(target.host, target.port)}"
        raise _error(failure, what, _why_unverified(network, target, failure)) from None


def dps_answers(device: Device) -> Finding:
    """Asks for the registration's status without a token: a read that DPS answers with a challenge for this TPM.

    Where that says nothing of the enrolment, the first step of a registration is asked for without a token, which
    registers nothing. A service that registers just then may have to begin once more, which it does by itself.
    """
    configuration = device.configuration
    if not configuration.id_scope:
        return Finding(SKIPPED, NO_ID_SCOPE)
    if device.live is not None and device.live["state"] == PROVISIONING:
        return Finding(SKIPPED, "the service registers just now, and DPS takes one challenge at a time")
    registration_id = device.registration_id
    token = shown = None
    if configuration.attestation == TPM:
        shown = shown_keys(device.endorsement_key, device.storage_root_key)
    elif configuration.attestation == SYMMETRIC_KEY:
        resource = dps_resource(configuration.id_scope, registration_id)
        expires_at_s = int(time.time()) + DPS_TOKEN_LIFE_S
        token = device.run(signed_token(resource, expires_at_s, b"", DPS_KEY_NAME))
    body = device_registration(registration_id, None, shown)
    connection = DpsConnection(
        configuration.endpoint,
        configuration.connect_to,
        configuration.ca_file,
        ANSWER_LIMIT_S,
        f"dps-agent/{__version__}",
        proxy_of(configuration),
        client_certificate(configuration),
    )
    try:
        version = configuration.settings().api_version
        path = registration_path(configuration.id_scope, registration_id, "", version)
        reply = _asked(device, connection, path, body, token)
        refused = isinstance(reply, Reply) and reply.status in LOOKUP_REFUSALS and not _is_challenge(reply)
        if refused and configuration.attestation == TPM:
            register_path = registration_path(configuration.id_scope, registration_id, "/register", version)
            reply = connection.request("PUT", register_path, body, None)
        elif refused and configuration.attestation == SYMMETRIC_KEY and isinstance(reply, Reply):
            _refuse_group_key(device, connection, reply, body)
    finally:
        if not device.hangs:
            connection.close()
    if isinstance(reply, NoReply):
        raise no_reply_error(reply)
    device.network.reply = reply
    asked = f"registration id {registration_id!r} in ID scope {configuration.id_scope!r}"
    if configuration.attestation != TPM:
        return _takes(reply, asked, "key" if token is not None else "certificate")
    if _is_challenge(reply):
        return Finding(OK, f"DPS knows {asked} with this TPM's endorsement key, and challenges it")
    if reply.status == 200:
        return Finding(OK, f"DPS answers, and asks for no proof of {asked}")
    error = refusal_of(reply)
    if error.code == "dps.not_found":
        text = f"DPS has no enrolment of {asked}, or there is no such ID scope ({error.message})"
        raise AskOperator(error.code, text, None, error.request_id)
    if error.code == "dps.ek_mismatch":
        text = f"the enrolment of {asked} holds another endorsement key than this TPM's ({error.message})"
        raise AskOperator(error.code, text, None, error.request_id)
    raise error


def _asked(
    device: Device, connection: DpsConnection, path: str, body: bytes, token: SasToken | None
) -> Reply | NoReply:
    """What DPS answers; RetryLater `tpm.timeout` where the TPM that has the certificate's key does not."""
    if not connection.trust.asks_tpm:
        return connection.request("POST", path, body, token)
    answer: Reply | NoReply = device.bounded(
        lambda: connection.request("POST", path, body, token), ANSWER_LIMIT_S, connection
    )
    return answer


def _refuse_group_key(device: Device, connection: DpsConnection, refusal: Reply, body: bytes) -> None:
    """AskOperator `dps.group_key` where DPS, which refused the key, takes the one that is derived of it."""
    if refusal.status != 401:
        return
    id_scope, registration_id = device.configuration.id_scope, device.registration_id
    resource = dps_resource(id_scope, registration_id)
    expires_at_s = int(time.time()) + DPS_TOKEN_LIFE_S
    derived_key = device.signature(registration_id.encode())  # what derives it is what signs
    signature = hmac_sha256(derived_key, string_to_sign(resource, expires_at_s))
    token = SasToken(resource, expires_at_s, signature, DPS_KEY_NAME)
    path = registration_path(id_scope, registration_id, "", device.configuration.settings().api_version)
    reply = connection.request("POST", path, body, token)
    if isinstance(reply, Reply) and reply.status in (200, 404):
        text = "the key of this device is that of an enrolment group: DPS takes the one that is derived of it"
        raise AskOperator("dps.group_key", f"{text} for {registration_id!r}")


def _takes(reply: Reply, asked: str, shown: str) -> Finding:
    """What DPS says of a device that has `shown` its "key" or "certificate": it alone may ask for its registration."""
    if reply.status == 200:
        return Finding(OK, f"DPS knows {asked}, and takes this device's {shown}")
    error = refusal_of(reply)
    if reply.status == 401:
        what = "it is enrolled for a TPM" if _is_challenge(reply) else error.message
        text = f"DPS does not take this device's {shown} for {asked}: {what}"
        code = "dps.key_refused" if shown == "key" else "dps.certificate_refused"
        raise AskOperator(code, text, None, error.request_id)
    if reply.status == 404:
        text = f"DPS has no registration of {asked} yet, or no enrolment of it ({error.message})"
        return Finding(WARNING, text, "nothing before the first registration; else check id_scope and the enrolment")
    raise error


def clock_dps(device: Device) -> Finding:
    reply = device.network.reply
    if reply is None or reply.date_s is None:
        return Finding(SKIPPED, "DPS named no time")
    ahead_s = int(time.time()) - reply.date_s
    if abs(ahead_s) <= AGREEMENT_S:
        return Finding(OK, f"the device's clock and DPS's differ by {abs(ahead_s)} s")
    direction = "ahead of" if ahead_s > 0 else "behind"
    text = f"the device's clock is wrong: it is {abs(ahead_s)} s {direction} DPS's, which says {utc_text(reply.date_s)}"
    if is_synchronised():  # then the agent believes it, and signs tokens that the service refuses
        raise RetryLater("clock.not_set", text)
    return Finding(WARNING, f"{text}; the agent goes by DPS's", "set the device's clock, or let NTP set it")


def hub_mqtt(device: Device) -> Finding:
    return _hub(device, MQTT)


def hub_websocket(device: Device) -> Finding:
    return _hub(device, WEBSOCKET)


def _hub(device: Device, transport: str) -> Finding:
    try:
        assignment = device.assignment
    except DpsError as unreadable:
        return Finding(SKIPPED, f"the stored assignment cannot be read: {unreadable.message}")
    if assignment is None:
        return Finding(SKIPPED, f"{NOTHING_STORED}: there is no hub yet")
    network, hub = device.network, device.configuration.hub
    used = network.transports()
    if transport not in used:
        why = f"hub.transport is {hub.transport!r}"
        if hub.connect_to:
            why += f", and hub.connect_to names one port, which is for {_NAMES[used[0]]}"
        return Finding(SKIPPED, why)
    name = assignment.assigned_hub
    peer = network.hub(name, transport)
    shown = f"{name} on port {peer.port}" if peer.host == name else f"{name} at {address_text(peer.host, peer.port)}"
    failure = network.hub_way(name, transport)
    if failure is None:
        return Finding(OK, f"{shown} speaks {'TLS' if transport == MQTT else 'WebSocket'}")
    error = _error(
        failure, f"the hub is not reached: {shown} for {_NAMES[transport]}", _why_unverified(network, peer, failure)
    )
    reached = failure.reason != NO_REPLY_CONNECT
    remedy = "" if reached else f"check the network and the firewall (outgoing TCP {peer.port})"
    other = next((other for other in used if other != transport), None)
    if other is not None and network.hub_way(name, other) is None:
        if transport == WEBSOCKET:
            return Finding(OK, f"{error.message}; it is not needed, for {_NAMES[other]} gets through")
        if not reached:  # only then the agent tries the other way
            return Finding(WARNING, f"{error.message}; the agent uses {_NAMES[other]} instead", remedy)
    return failed(error, remedy)


def _chain_shown(tls: ssl.SSLSocket, peer: Peer) -> str:
    """Whom the certificate is for, who issued it, and the root at the end."""
    chain = _chain(tls, "get_verified_chain")
    if not chain:
        return f"{peer.name}; this Python does not tell the chain"
    *issuers, root = [_name(certificate["subject"]) for certificate in chain[1:]] or [_name(chain[0]["subject"])]
    by = f" issued by {', '.join(issuers)};" if issuers else ""
    roots = f"in {peer.ca_file}" if peer.ca_file else "of the system"
    return f"{peer.name}, certificate until {chain[0]['notAfter']};{by} root {root} ({roots})"


def _why_unverified(network: Network, peer: Peer, failure: Failed) -> str:
    """What helps to understand a failed verification: the clock's time, or the issuer and the roots."""
    if failure.reason != NO_REPLY_TLS:
        return ""
    if any(words in str(failure) for words in _CLOCK_SAYS):
        keeper = "NTP keeps" if is_synchronised() else "nothing such as NTP keeps"
        return f" by the device's clock, which says {utc_text(time.time())} and which {keeper}"
    roots = f"those in {peer.setting} '{peer.ca_file}'" if peer.ca_file else _system_roots()
    return f"{_issuer_shown(network, peer)}; the roots are {roots}"


def _system_roots() -> str:
    """What to call the roots that OpenSSL takes of itself; where there are none, where they would be."""
    paths = ssl.get_default_verify_paths()
    try:
        there = paths.cafile is not None and os.path.getsize(paths.cafile) > 0
        if there or (paths.capath is not None and os.listdir(paths.capath)):
            return "the system's"
    except OSError as error:  # OpenSSL needs to enter the folder, not to list it
        return f"the system's, of which nothing can be said: {error.filename}: {error.strerror}"
    file, _, *folders = system_places()
    return (
        f"the system's, and it has none: neither {file} nor anything in {os.pathsep.join(folders)} is there"
        " (package ca-certificates)"
    )


def _issuer_shown(network: Network, peer: Peer) -> str:
    """Whose certificate the peer shows and who issued it, unverified; "" where that cannot be told."""
    dialler = Dialler(network.proxies, "")
    dialler.begin()
    context = tls_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # to see what is shown; nothing is sent
    try:
        with dialler.reach(peer.host, peer.port, time.monotonic() + ways.DIAL_LIMIT_S) as raw:
            raw.settimeout(ways.DIAL_LIMIT_S)
            with context.wrap_socket(raw, server_hostname=peer.name) as tls:
                shown = _chain(tls, "get_unverified_chain")
    except (OSError, Failed):
        return ""
    if not shown:
        return ""
    return f"; it shows a certificate of {_name(shown[0]['subject'])} issued by {_name(shown[0]['issuer'])}"


def _chain(tls: ssl.SSLSocket, method: str) -> list[dict[str, Any]]:
    """The peer's certificates, leaf first, as SSLSocket.getpeercert has them; empty where this Python cannot tell.

    SSLSocket has these methods from Python 3.13 on, and only with DER; the object below it has them since 3.10.
    """
    get = getattr(getattr(tls, "_sslobj", None), method, None)
    try:
        return [certificate.get_info() for certificate in get() or []] if get is not None else []
    except ValueError:  # a name that is no UTF-8
        return []


def _name(subject: tuple[tuple[tuple[str, str], ...], ...]) -> str:
    """The name in a distinguished name that says most."""
    fields = {name: value for part in subject for name, value in part}
    for name in ("commonName", "organizationalUnitName", "organizationName"):
        if name in fields:
            return f"'{fields[name]}'"
    return "nobody"


def _is_challenge(reply: Reply) -> bool:
    if reply.status != 401:
        return False
    try:
        answer = read_register(reply)
    except (RetryLater, AskOperator, IdentityStale):
        return False
    return isinstance(answer, TpmChallenge) and bool(answer.authentication_key)


def _error(failure: Failed, what: str, more: str = "") -> RetryLater:
    code = "unreachable" if failure.reason == NO_REPLY_CONNECT else failure.reason
    return RetryLater(f"network.{code}", f"{what}: {failure}{more}")
