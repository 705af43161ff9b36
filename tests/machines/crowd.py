"""Ten workers of pytest with fifty tests each, every test with a cloud of its own: no port clashes, nothing is left."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORKERS, TESTS = 10, 50
DEADLINE_S = 3000
CONFTEST = """
import os, threading
import pytest


def open_files():
    return len([name for name in os.listdir("/proc/self/fd") if "socket:" in link(f"/proc/self/fd/{name}")])


def link(path):
    try:
        return os.readlink(path)
    except OSError:
        return ""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item, nextitem):
    threads, sockets = threading.active_count(), open_files()
    found = yield
    if item.config.stash.get(SECOND, False):  # what the first one leaves are modules and the worker's own
        assert (threading.active_count(), open_files()) == (threads, sockets), item.name
    item.config.stash[SECOND] = True
    return found


SECOND = pytest.StashKey()
"""
TEST = """
import http.client, ssl
import pytest


@pytest.fixture
def context(dps):
    return ssl.create_default_context(cafile=str(dps.ca_file))


@pytest.mark.parametrize("number", range({count}))
def test_of_a_cloud_of_its_own(number, dps, hub, tpm, context, request):
    connection = http.client.HTTPSConnection(dps.connect_to, context=context, timeout=120)
    connection.request("GET", f"/{{number}}")
    assert connection.getresponse().status == 404
    connection.close()
    assert len(dps.requests) == 1 and len(hub.events()) == 0
    hub.add_device(f"press-{{number}}")
    if number % 10 == 0:
        device = request.getfixturevalue("device")
        device.send({{"number": number}})
        assert len(hub.telemetry()) == 1 and hub.telemetry(device).wait_for({{"number": number}})
"""


def main() -> int:
    """Exit status 0: all passed, and neither a process nor a folder is left."""
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="crowd-") as name:
        folder, temporary = Path(name), Path(name) / "t"
        temporary.mkdir()
        (folder / "pytest.ini").write_text("[pytest]\ndps_emulator_tpm = simulator\n")
        (folder / "conftest.py").write_text(CONFTEST)
        (folder / "test_crowd.py").write_text(TEST.format(count=WORKERS * TESTS))
        options = ["-p", "dps_emulator.testing", "-p", "no:cacheprovider", "-q", "-n", str(WORKERS)]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options],
            cwd=folder,
            env={**os.environ, "TMPDIR": str(temporary)},
            timeout=DEADLINE_S,
            check=False,
        )
        left = sorted(path.name for path in temporary.iterdir() if path.name.startswith("dps-"))
        running = [path.parent.name for path in Path("/proc").glob("[0-9]*/cmdline") if _names(path, name)]
    if done.returncode or left or running:
        print(f"pytest ended with {done.returncode}; left: folders {left}, processes {running}")
        return 1
    print(f"{WORKERS} workers, {WORKERS * TESTS} tests in {time.monotonic() - began_s:.0f} s; nothing is left")
    return 0


def _names(command_line: Path, text: str) -> bool:
    try:
        return text.encode() in command_line.read_bytes()
    except OSError:  # it has ended
        return False


if __name__ == "__main__":
    sys.exit(main())
