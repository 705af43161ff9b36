"""For programs on the device: telemetry, the twin, direct methods and messages, through the service dps-agent.

    from dps_agent.client import Client

    with Client() as client:
        client.send({"temperature": 21.5}, {"line": "3"})

docs/programs.md has the rest. This package needs the standard library alone and loads nothing of the service; asyncio
and SQLite are loaded with what needs them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dps_agent.client.blocking import Client
from dps_agent.client.errors import AgentError, MaybeDone, NotDone, Refused, SpoolFailed, Unreachable
from dps_agent.client.values import Desired, Message, MethodAnswer, MethodCall, Twin, acknowledged

if TYPE_CHECKING:
    from dps_agent.client.spool import Spool
    from dps_agent.client.tasks import AsyncClient

__all__ = [
    "AgentError",
    "AsyncClient",
    "Client",
    "Desired",
    "MaybeDone",
    "Message",
    "MethodAnswer",
    "MethodCall",
    "NotDone",
    "Refused",
    "Spool",
    "SpoolFailed",
    "Twin",
    "Unreachable",
    "acknowledged",
]


def __getattr__(name: str) -> Any:
    if name == "AsyncClient":
        from dps_agent.client.tasks import AsyncClient

        return AsyncClient
    if name == "Spool":
        from dps_agent.client.spool import Spool

        return Spool
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
