"""The one place where a thread waits, without a service."""

import os
import select
import threading
import time

from dps_agent.host.loop import Loop


def test_a_ring_is_heard_after_a_close_whatever_has_the_number_of_what_was_watched() -> None:
    reads, writes = os.pipe()
    loop = Loop()
    loop.wait(time.monotonic(), reads, select.POLLIN)
    loop.close()
    os.close(reads)
    loop.wait(time.monotonic())  # the number that is free now is the alarm's
    assert loop._alarm == reads
    began_s = time.monotonic()
    threading.Timer(0.1, loop.ring).start()
    loop.wait(began_s + 60)
    assert time.monotonic() - began_s < 50
    loop.close()
    os.close(writes)


def test_a_loop_that_was_closed_is_as_a_new_one() -> None:
    reads, writes = os.pipe()
    loop = Loop()
    os.write(writes, b"x")
    for _ in range(2):
        assert loop.wait(time.monotonic() + 60, reads, select.POLLIN) == select.POLLIN
        loop.close()
    loop.close()
    os.close(reads)
    os.close(writes)
