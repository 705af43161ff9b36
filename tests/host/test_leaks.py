"""Hundreds of registrations in one process, good ones and failing ones: nothing piles up in TPM or process."""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dps_hal.errors import DpsError
from support.tapped_device import Device
from support.tpm import swtpm
from support.tpm.backends import BACK_ENDS

GOOD = 200
FAILING = 50
# Not HANDLE, 0x18B or 0x1CB: as the answer to FlushContext that says that there is nothing to flush.
RETURN_CODES = (0x101, 0x14A, 0x1C4, 0x1DF, 0x3D5, 0x902, 0x903, 0x910, 0x918, 0x921, 0x98E, 0x9A2)
SETTLED_S = 5.0


@pytest.fixture(params=BACK_ENDS)
def device(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Device]:
    with Device(tmp_path, request.param) as new:
        yield new


def held_by_the_process() -> tuple[int, int]:
    """Open descriptors and threads, once the tap and the emulator have seen the ends of their connections."""
    gc.collect()
    return len(os.listdir("/proc/self/fd")), threading.active_count()


def assert_no_more_than(before: tuple[int, int], reproduce: str) -> None:
    until_s = time.monotonic() + SETTLED_S
    while held_by_the_process() > before and time.monotonic() < until_s:
        time.sleep(0.05)
    after = held_by_the_process()
    assert after[0] <= before[0] and after[1] <= before[1], f"descriptors, threads: {before} -> {after}; {reproduce}"


def test_hundreds_of_registrations_leave_nothing_behind(device: Device) -> None:
    device.provision()
    persistent = device.swtpm.handles(swtpm.PERSISTENT)
    before = held_by_the_process()
    for number in range(GOOD):
        device.provision()
        if number % 20 == 0:
            assert device.swtpm.leftovers() == [], f"registration={number}"
    assert device.swtpm.leftovers() == []
    assert device.swtpm.handles(swtpm.PERSISTENT) == persistent
    assert_no_more_than(before, f"after {GOOD} registrations")


def test_registrations_that_fail_at_any_command_leave_nothing_behind(device: Device) -> None:
    device.provision()
    device.tap.forget()
    device.provision()
    commands = list(device.tap.names)
    persistent = device.swtpm.handles(swtpm.PERSISTENT)
    before = held_by_the_process()
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    failed = 0
    for number in range(FAILING):
        device.tap.forget()
        at = chance.randrange(len(commands))
        kind = chance.choice(["refused", "refused twice", "cut", "altered", "altered twice"])
        place = chance.choice((0, 8, 12, 16, 20, -1))
        return_code = chance.choice(RETURN_CODES)
        if kind == "refused":
            device.tap.refuse(return_code, skip=at)
        elif kind == "refused twice":
            device.tap.refuse(return_code, skip=at, times=2)
        elif kind == "cut":
            device.tap.drop(skip=at)
        else:
            device.tap.alter(skip=at, place=place)
            if kind == "altered twice":
                device.tap.alter(command=commands[at], skip=commands[: at + 1].count(commands[at]), place=place)
        reproduce = f"seed={seed} number={number} {kind} at command {at}, rc={return_code:#x}, {place=}: {commands[at]}"
        try:
            device.provision(timeout_s=20)
        except DpsError as error:
            assert error.code.startswith("tpm."), f"{reproduce}: {error.code} {error.message}"
            failed += 1
        assert device.swtpm.leftovers() == [], reproduce
    assert failed >= 5, f"seed={seed}"
    assert device.swtpm.handles(swtpm.PERSISTENT) == persistent, f"seed={seed}"
    assert_no_more_than(before, f"seed={seed}")
    device.tap.forget()
    device.provision()
