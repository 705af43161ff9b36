"""What the hub key signs, or the device's own in its place: seals of assignments, tokens for DPS and for the hub."""

from dps_agent.assignment import encode, has_tokens, seal_message
from dps_agent.effects import Sign, UtcNow
from dps_agent.sas import SasToken, hub_resource, string_to_sign
from dps_agent.utc import date_text
from dps_hal.errors import AskOperator, RetryLater

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator
    from typing import Any

    from dps_agent.assignment import Assignment
    from dps_agent.effects import Effect
    from dps_hal.contracts import Utc


def sealed(assignment: "Assignment", beside: "dict[str, Any] | None" = None) -> "Generator[Effect, Any, bytes]":
    """The payload to store: JSON and seal. The signature also shows that the key loads and signs."""
    text = encode(assignment, beside)
    seal: bytes = yield Sign(assignment.wrapped_key, seal_message(text))
    return text + seal


def signed_token(
    resource: str, expires_at_s: int, wrapped_key: bytes, key_name: str = ""
) -> "Generator[Effect, Any, SasToken]":
    """Has the wrapped key sign, or the device's own where that is empty; `resource` is already percent-encoded."""
    signature: bytes = yield Sign(wrapped_key, string_to_sign(resource, expires_at_s))
    return SasToken(resource, expires_at_s, signature, key_name)


def hub_token(assignment: "Assignment", life_s: int) -> "Generator[Effect, Any, SasToken]":
    """A token for the assigned hub, valid for `life_s` seconds, signed by the hub key.

    RetryLater `clock.not_set` while the clock cannot be believed. AskOperator `agent.no_token`: the device connects by
    its certificate.
    """
    if not has_tokens(assignment):
        raise AskOperator("agent.no_token", "there is no token: this device connects to its hub by its certificate")
    now: Utc = yield UtcNow()
    check_clock(now)
    resource = hub_resource(assignment.assigned_hub, assignment.device_id)
    token: SasToken = yield from signed_token(resource, now.now_s + life_s, assignment.wrapped_key)
    return token


def check_clock(now: "Utc") -> None:
    """RetryLater `clock.not_set` unless `now` can be believed: a token with a wrong expiry is no token."""
    if not now.believable:
        raise RetryLater("clock.not_set", f"the clock is not set ({now.source} says {date_text(now.now_s)})")
