"""How the effects that concern the hub are done on Linux; loaded with the first of them.

A verb that never asks for a hub, such as `provision`, has no use for any of this.

There are three ways, and the table at the end says which effect goes which:

1. `done`: at once, on the thread of the runner. What is told to programs waits for nobody, and what the hub is sent
   waits in memory until the hub takes it.
2. `next_event`: on the same thread, until an event comes or its time is over. The runner's loop waits for the hub's
   bytes and for all else that may come; whoever has something for the session posts it, so haste before it means
   nothing.
3. `soon` and `dialled`: on `dps-worker`, for what may block: names, handshakes, and the polite end. A connection that
   is made ends early by `abort` where somebody stops the runner or has asked for something that makes it vain.

`HubConnection` is used by one thread at a time: by the runner's, or, while that waits for such a call, by `dps-worker`.
Three of its methods are for anybody at any time: `post` and `take_back` (a signal handler's) and `abort`.
"""

from __future__ import annotations

import time

from dps_agent.driver import Reach
from dps_agent.host.clock import CLOCK_NOT_SET, SystemClock, may_judge
from dps_agent.host.worker import DONE, Outcome, Worker, bug, required
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
from dps_hal.errors import DpsError

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
        def next_event(self, until_s: float, wait: Callable[[float, int, int], int]) -> Event | None: ...
        def post(self, event: Event) -> bool: ...
        def take_back(self, event: Event) -> bool: ...
        def disconnect(self) -> None: ...
        def abort(self) -> None: ...
        def close(self) -> None: ...


CONNECT_DEADLINE_S = 65.0  # HubConnection itself ends after 60 s
HUB_DEADLINE_S = 10.0  # for a call that waits for no answer


def hub_ways(
    worker: Worker,
    clock: Clock,
    hub: Hub | None,
    tell: Callable[[Message], bool] | None,
    interrupted: Callable[[], bool],
    tpm_grace_s: Callable[[], float],
) -> dict[type, Callable[..., Outcome]]:
    """Effect -> how it is done; without a `hub` there is nobody to reach, and no more than that.

    `tpm_grace_s` is as for `Worker.do_or_abort`.

    All are answered by values: what one of them raises comes out, and is not for the logic.
    """

    def done(call: Callable[..., Any]) -> Callable[..., Outcome]:
        def way(*of: Any) -> Outcome:  # for each message a few times: no more calls than it needs
            try:
                return Outcome(call(*of), None)
            except DpsError:
                raise
            except Exception as error:
                raise bug(error) from None

        return way

    told = done(tell or (lambda _message: False))
    if hub is None:
        return {Tell: told, Reach: lambda _: DONE}

    def soon(call: Callable[[], Any]) -> Outcome:
        return required(worker.do(call, HUB_DEADLINE_S, "network.timeout"))

    def dialled(call: Callable[[], Any]) -> Outcome:
        if not may_judge(clock):
            return Outcome(CLOCK_NOT_SET, None)
        return worker.do_or_abort(call, CONNECT_DEADLINE_S, hub.abort, "the connection", interrupted, tpm_grace_s)

    def reach(name: str) -> Outcome:
        if dialled(lambda: hub.is_verified(name)).answer is True and isinstance(clock, SystemClock):
            clock.heard(None)
        return DONE

    def wait(until_s: float, fileno: int, interest: int) -> int:
        if worker.is_stopped():
            hub.abort()
            until_s = 0.0
        return worker.wait(until_s, fileno, interest)

    def next_event(until_uptime_s: float) -> Event | None:
        worker.forget_haste()
        return hub.next_event(time.monotonic() + max(until_uptime_s - clock.uptime_s(), 0.0), wait)

    return {
        Reach: reach,
        Connect: lambda *of: dialled(lambda: hub.connect(Connect(*of))),
        Subscribe: done(hub.subscribe),
        Publish: done(hub.publish),
        SendAgain: done(hub.send_again),
        GiveUp: done(hub.give_up),
        Acknowledge: done(hub.acknowledge),
        NextEvent: done(next_event),
        Disconnect: lambda: soon(hub.disconnect),
        Tell: told,
    }
