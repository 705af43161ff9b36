"""How the effects that concern the hub are done on Linux; loaded with the first of them.

A verb that never asks for a hub, such as `provision`, has no use for any of this.

There are four ways, and the table at the end says which effect goes which:

1. `told`: at once, on the thread of the runner. A message goes to programs, and nobody waits for them.
2. `soon`: on `dps-worker`, for things that wait for no answer; only a machine in trouble reaches HUB_DEADLINE_S.
3. `dialled`: on `dps-worker`, as long as a connection may take. It ends early by `abort` where somebody stops the
   runner or has asked for something that makes the connection vain.
4. `next_event`: on `dps-worker`, until an event comes or its time is over. Whoever has something for the session posts
   it, which ends the wait; so haste before it means nothing.

`HubConnection` is used by one call at a time on `dps-worker`, and in the end, when none is under way, by the runner's
own thread (`close`). Three of its methods are for other threads at any time: `post` and `take_back` (the socket's, a
signal handler's) and `abort` (the runner's).
"""

from __future__ import annotations

import time

from dps_agent.driver import Reach
from dps_agent.host.clock import CLOCK_NOT_SET, SystemClock, may_judge
from dps_agent.host.worker import DONE, Outcome, Worker, attempt, required
from dps_agent.hub_effects import (
    Acknowledge,
    Connect,
    Disconnect,
    GiveUp,
    NextEvent,
    Publish,
    SendAgain,
    Subscribe,
    Tell,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    from dps_agent.effects import NoReply
    from dps_agent.hub_effects import ConnAck, Event, Message
    from dps_hal.contracts import Clock

    class Hub(Protocol):
        """What the runner needs of `dps_agent.host.network.mqtt.HubConnection`."""

        def connect(self, effect: Connect) -> ConnAck | NoReply: ...
        def is_verified(self, hub: str) -> bool: ...
        def subscribe(self, filters: tuple[tuple[str, int], ...]) -> int | None: ...
        def publish(self, topic: str, payload: bytes, qos: int) -> int | None: ...
        def send_again(self, packet_id: int) -> None: ...
        def give_up(self, packet_id: int) -> None: ...
        def acknowledge(self, packet_id: int) -> None: ...
        def next_event(self, until_s: float) -> Event | None: ...
        def post(self, event: Event) -> bool: ...
        def take_back(self, event: Event) -> bool: ...
        def disconnect(self) -> None: ...
        def abort(self) -> None: ...
        def close(self) -> None: ...


CONNECT_DEADLINE_S = 65.0  # HubConnection itself ends after 60 s
HUB_DEADLINE_S = 10.0  # for a call that waits for no answer
EVENT_GRACE_S = 10.0  # by which a wait for an event may overrun its own end


def hub_ways(
    worker: Worker,
    clock: Clock,
    hub: Hub | None,
    tell: Callable[[Message], bool] | None,
    interrupted: Callable[[], bool],
) -> dict[type, Callable[..., Outcome]]:
    """Effect -> how it is done; without a `hub` there is nobody to reach, and no more than that.

    All are answered by values: what one of them raises comes out, and is not for the logic.
    """

    def told(message: Message) -> Outcome:
        return required(attempt(lambda: tell is not None and tell(message)))

    if hub is None:
        return {Tell: told, Reach: lambda _: DONE}

    def soon(call: Callable[[], Any]) -> Outcome:
        return required(worker.do(call, HUB_DEADLINE_S, "network.timeout"))

    def dialled(call: Callable[[], Any]) -> Outcome:
        if not may_judge(clock):
            return Outcome(CLOCK_NOT_SET, None)
        return worker.do_or_abort(call, CONNECT_DEADLINE_S, hub.abort, "the connection", interrupted)

    def reach(name: str) -> Outcome:
        if dialled(lambda: hub.is_verified(name)).answer is True and isinstance(clock, SystemClock):
            clock.heard(None)
        return DONE

    def next_event(until_uptime_s: float) -> Outcome:
        worker.forget_haste()
        within_s = max(until_uptime_s - clock.uptime_s(), 0.0)
        until_s = time.monotonic() + within_s
        return worker.do_or_abort(
            lambda: hub.next_event(until_s), within_s + EVENT_GRACE_S, hub.abort, "the wait for an event"
        )

    return {
        Reach: reach,
        Connect: lambda *of: dialled(lambda: hub.connect(Connect(*of))),
        Subscribe: lambda filters: soon(lambda: hub.subscribe(filters)),
        Publish: lambda *of: soon(lambda: hub.publish(*of)),
        SendAgain: lambda packet_id: soon(lambda: hub.send_again(packet_id)),
        GiveUp: lambda packet_id: soon(lambda: hub.give_up(packet_id)),
        Acknowledge: lambda packet_id: soon(lambda: hub.acknowledge(packet_id)),
        NextEvent: next_event,
        Disconnect: lambda: soon(hub.disconnect),
        Tell: told,
    }
