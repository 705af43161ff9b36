"""Ends all that a tool started and what that started in turn, however the tool itself ends.

A process that is killed tells its children nothing, and one in a session of its own, or whose parent has gone, is in
nobody's reach. So the work is done by a child; the kernel tells it when this process goes and, since either adopts
orphans (prctl(2), PR_SET_CHILD_SUBREAPER), each finds whatever the other has left. What a shell had started before it
became the tool (`sleep 60 & exec tools/test`) is the tool's child as well, and stays.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Set
from pathlib import Path
from types import FrameType
from typing import NoReturn

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ORDERLY_END_S = 40  # for `work` to end what it has begun
KILLED_S = 20  # in which a killed process goes; one in the kernel may take long


def supervised(work: Callable[[], int]) -> int:
    """What `work` returned; by then nothing is left of what it started, nor is soon after SIGKILL of this process.

    SIGINT, SIGTERM and SIGHUP raise SystemExit(128 + number) in `work`, once, so that it can end things in order.
    """
    ours = os.getpid()
    others = _children()
    _adopt_orphans()
    sys.stdout.flush()
    sys.stderr.flush()
    worker = os.fork()
    if worker == 0:
        _be_the_worker(work, ours)
    for number in _heard():
        signal.signal(number, lambda number, _: os.kill(worker, number))
    _, status = os.waitpid(worker, 0)
    for number in ENDS:
        signal.signal(number, signal.SIG_IGN)
    end_descendants(others)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def end_descendants(others: Set[int] = frozenset()) -> None:
    """Kills every process below this one, but its children `others` and what is below them."""
    until_s = time.monotonic() + KILLED_S
    while (found := _descendants(others)) and time.monotonic() < until_s:
        for process in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):  # a grandchild, until this process adopts it
                os.waitpid(process, os.WNOHANG)
        time.sleep(0.02)


def _be_the_worker(work: Callable[[], int], supervisor: int) -> NoReturn:
    status = 1
    try:
        for number in _heard():
            signal.signal(number, _stop)
        _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        _adopt_orphans()
        if os.getppid() == supervisor:  # otherwise it went before the kernel would have told
            status = work()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for number in ENDS:
            signal.signal(number, signal.SIG_IGN)
        end_descendants()
        with contextlib.suppress(OSError, ValueError):  # whoever read it may have gone
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _heard() -> list[signal.Signals]:
    """All of ENDS, but a hang-up that nohup(1) wants ignored."""
    return [number for number in ENDS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]


def _stop(number: int, _frame: FrameType | None) -> NoReturn:
    for other in ENDS:
        signal.signal(other, signal.SIG_IGN)
    status = 128 + number

    def give_up() -> None:
        end_descendants()
        os._exit(status)

    patience = threading.Timer(ORDERLY_END_S, give_up)
    patience.daemon = True
    patience.start()
    sys.exit(status)


def _children() -> set[int]:
    ours = os.getpid()
    return {process for process, parent in _parents().items() if parent == ours}


def _descendants(others: Set[int]) -> list[int]:
    parents = _parents()
    found = {os.getpid()}
    # This process does not wait for `others`, so their ids are nobody else's while it lives.
    while more := {process for process, parent in parents.items() if parent in found} - found - others:
        found |= more
    return sorted(found - {os.getpid()})


def _parents() -> dict[int, int]:
    """The parent of each process."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
    return parents


def _adopt_orphans() -> None:
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
