"""A direct method, from the call to the device's answer or the end of its time."""

import asyncio

from dps_emulator.hub import METHOD_TIMEOUT, Hub, HubError, MethodAnswer


async def invoked(hub: Hub, device_id: str, method: str, payload: bytes, timeout_s: float, now: float) -> MethodAnswer:
    """What the device has said to it; raises HubError, also where it says nothing within `timeout_s`."""
    answer: asyncio.Future[MethodAnswer | HubError] = asyncio.get_running_loop().create_future()

    def answered(said: MethodAnswer | HubError) -> None:
        if not answer.done():
            answer.set_result(said)

    give_up = hub.invoke(device_id, method, payload, answered, now)
    try:
        async with asyncio.timeout(timeout_s):
            said = await answer
    except TimeoutError:
        raise HubError(METHOD_TIMEOUT, f"'{device_id}' did not answer within {timeout_s:g} s") from None
    finally:
        give_up()
    if isinstance(said, HubError):
        raise said
    return said
