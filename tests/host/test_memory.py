"""What the C library keeps of the memory that nobody uses."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

AGENT = Path(__file__).parents[2] / "agent"
PROGRAM = """
import sys, threading
from dps_agent.host import memory
for word in sys.argv[1:]:
    getattr(memory, word)()
made = []
def allocate():  # from the C library's own heap, beyond what Python keeps itself
    made.append(bytearray(100_000))
threads = [threading.Thread(target=allocate) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
with open("/proc/self/maps") as maps:  # an arena reserves HEAP_MAX_SIZE, 64 MiB, and uses the first part
    sizes = [[int(end, 16) for end in line.split()[0].split("-")] + [line.split()[1]] for line in maps]
print(sum(access == "---p" and 60 << 20 < end - start < 64 << 20 for start, end, access in sizes))
"""


def arenas(*words: str) -> int:
    """How many arenas of threads there are in a program that has called these functions of `memory`."""
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words],
        env={"PYTHONPATH": f"{AGENT}:{AGENT.parent / 'hal'}", "PYTHONMALLOC": "malloc"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return int(ended.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_threads_that_share_one_arena_have_none_of_their_own() -> None:
    assert arenas() > 0
    assert arenas("share_one_arena", "give_back") == 0
