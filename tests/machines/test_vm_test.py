"""`tools/vm-test`: what of it can be tried without the machine that it boots."""

import contextlib
import io
import itertools
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fresh_machine import NotReady
from machines.vm import image
from machines.vm import tpm as tpm_power
from machines.vm.__main__ import dependencies, parser, run_trials, table, wanted_trials
from machines.vm.image import Image, apt_sources, cpio, make_image
from machines.vm.machine import Machine, VmError, qemu_command
from machines.vm.tpm import TpmPower
from machines.vm.trials import REQUIRED, TRIALS, Bench, Skipped, Trial, plan

CHECKOUT = Path(__file__).parents[2]
TOOL = str(CHECKOUT / "tools/vm-test")
SOURCES = f"{CHECKOUT}/tools:{CHECKOUT}/tests"
CMD_INIT, CMD_SET_DATAFD = 2, 16  # swtpm_ioctls(3)
GET_RANDOM = bytes.fromhex("8001 0000000c 0000017b 0008")  # TPM 2.0 Library Part 3
STARTUP_CLEAR = bytes.fromhex("8001 0000000c 00000144 0000")
NOT_STARTED = 0x100  # TPM_RC_INITIALIZE
IMAGE = Image(Path("/g/disk.raw"), Path("/g/vmlinuz"), Path("/g/initrd"), "bookworm", False)


# The cuts.


@pytest.mark.parametrize("cuts", [10, 40])
def test_the_cuts_come_in_every_part_of_a_registration_and_most_at_its_end(cuts: int) -> None:
    planned = plan(cuts, [1.0, 3.0, 4.5], 6.0, seed=7)
    counts = [sum(after == part for after, _ in planned) for part in range(4)]
    assert len(planned) == cuts and min(counts) > 0
    assert counts[3] == max(counts) >= 2 * min(counts[:3]) - 1, f"seed=7: {counts}"


def test_no_cut_comes_long_after_the_next_step_is_over() -> None:
    spans = (1.0, 2.0, 1.5, 1.5)
    for after, delay_s in plan(200, [1.0, 3.0, 4.5], 6.0, seed=8):
        assert 0 <= delay_s <= 1.1 * spans[after], f"after={after} delay={delay_s} seed=8"


def test_the_same_seed_makes_the_same_cuts() -> None:
    assert plan(20, [1.0], 2.0, seed=3) == plan(20, [1.0], 2.0, seed=3) != plan(20, [1.0], 2.0, seed=4)


# The machine.


def test_qemu_never_uses_kvm() -> None:
    words = qemu_command(Path("/w"), IMAGE, "tpm-tis")
    assert words[words.index("-accel") + 1] == "tcg" and words.count("-accel") == 1
    assert not [word for word in words if "kvm" in word or "accel=" in word or word == "-enable-kvm"]


@pytest.mark.parametrize("model", ["tpm-tis", "tpm-crb"])
def test_the_tpm_is_a_device_with_the_interface_that_was_asked_for(model: str) -> None:
    assert f"{model},tpmdev=tpm0" in qemu_command(Path("/w"), IMAGE, model)


def test_the_state_is_on_a_disk_of_its_own() -> None:
    words = qemu_command(Path("/w"), IMAGE, "tpm-tis")
    drives = [word for before, word in itertools.pairwise(words) if before == "-drive"]
    assert [drive.partition(",")[0] for drive in drives] == [
        "file=/w/root.qcow2",
        "file=/w/state.raw",
        "file=/w/package.raw",
    ]


class Tpm:
    """QEMU's side of a TPM: its control channel and the commands' channel."""

    def __init__(self, power: TpmPower) -> None:
        self._control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._control.settimeout(120)
        self._control.connect(str(power.address))
        self._commands, theirs = socket.socketpair()
        self._commands.settimeout(120)
        with theirs:
            socket.send_fds(self._control, [struct.pack(">I", CMD_SET_DATAFD)], [theirs.fileno()])
        assert self._control.recv(4) == bytes(4)

    def control(self, command: int, *pieces: bytes) -> bytes:
        """swtpm's answer to one command of its control channel, which comes in these pieces."""
        self._control.sendall(struct.pack(">I", command) + pieces[0])
        for piece in pieces[1:]:
            time.sleep(0.05)
            self._control.sendall(piece)
        return self._control.recv(4)

    def result(self, command: bytes) -> int:
        """The return code of a TPM command."""
        self._commands.sendall(command)
        code: int = struct.unpack(">I", self._commands.recv(4096)[6:10])[0]
        return code

    def close(self) -> None:
        """Ends both channels."""
        self._control.close()
        self._commands.close()


def test_a_tpm_is_never_restored_and_waits_for_its_start(tmp_path: Path) -> None:
    power = TpmPower(tmp_path / "tpm", tmp_path / "tpm.sock")
    try:
        with contextlib.closing(Tpm(power)) as tpm:
            # A blob that swtpm would refuse: passed on, it would be an error and not TPM_SUCCESS.
            head = struct.pack(">III", 0, 1, 9)
            assert tpm.control(tpm_power.CMD_SET_STATEBLOB, head + b"rubbish!!") == bytes(4)
            assert tpm.control(tpm_power.CMD_SET_STATEBLOB, head[:5], head[5:], b"rub", b"bish!!") == bytes(4)
            assert tpm.control(CMD_INIT, struct.pack(">I", 0)) == bytes(4)
            assert tpm.result(GET_RANDOM) == NOT_STARTED
            assert tpm.result(STARTUP_CLEAR) == 0
            assert tpm.result(GET_RANDOM) == 0
    finally:
        power.cut()


def test_a_stalled_tpm_answers_when_it_goes_on(tmp_path: Path) -> None:
    power = TpmPower(tmp_path / "tpm", tmp_path / "tpm.sock")
    try:
        with contextlib.closing(Tpm(power)) as tpm:
            assert tpm.control(CMD_INIT, struct.pack(">I", 0)) == bytes(4)
            assert tpm.result(STARTUP_CLEAR) == 0
            power.stall()
            timer = threading.Timer(1.0, power.resume)
            timer.start()
            started_s = time.monotonic()
            assert tpm.result(GET_RANDOM) == 0
            assert time.monotonic() - started_s > 0.9, "it answered while it stalled"
            timer.join()
    finally:
        power.cut()


def test_a_tpm_ends_with_the_program_that_started_it(tmp_path: Path) -> None:
    program = (
        "import os, sys; from pathlib import Path; from machines.vm.tpm import TpmPower\n"
        "power = TpmPower(Path(sys.argv[1]) / 'tpm', Path(sys.argv[1]) / 'tpm.sock')\n"
        "print(power._process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    words = [sys.executable, "-c", program, str(tmp_path)]
    environ = {**os.environ, "PYTHONPATH": SOURCES}
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=60, env=environ)
    until_s = time.monotonic() + 120
    while is_alive(int(done.stdout)):
        assert time.monotonic() < until_s, f"swtpm {done.stdout.strip()} lives on"
        time.sleep(0.05)


def is_alive(process: int) -> bool:
    """Whether it runs; one that ended and that nobody has asked about does not."""
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_cut_tpm_is_gone_and_begins_anew_with_what_it_had_stored(tmp_path: Path) -> None:
    for _ in range(2):
        power = TpmPower(tmp_path / "tpm", tmp_path / "tpm.sock")
        with contextlib.closing(Tpm(power)) as tpm:
            assert tpm.control(CMD_INIT, struct.pack(">I", 0)) == bytes(4)
            assert tpm.result(STARTUP_CLEAR) == 0, "it did not begin anew"
            power.cut()
            with pytest.raises((OSError, struct.error)):
                tpm.result(GET_RANDOM)
    assert list((tmp_path / "tpm").iterdir())


# The image.


def test_the_initial_files_are_an_archive_with_every_name_and_content() -> None:
    content = b"".join(cpio(["bin", "dev"], [("init", 0o755, b"#!x"), ("bin/sh", 0o755, b"12345")]))
    found: dict[str, tuple[int, bytes]] = {}
    at = 0
    while at < len(content):
        assert content[at : at + 6] == b"070701" and at % 4 == 0
        fields = [int(content[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        name = content[at + 110 : at + 110 + fields[11] - 1].decode()
        start = -(-(at + 110 + fields[11]) // 4) * 4
        found[name] = (fields[1], content[start : start + fields[6]])
        at = -(-(start + fields[6]) // 4) * 4
    assert found == {
        "bin": (0o040755, b""),
        "dev": (0o040755, b""),
        "init": (0o100755, b"#!x"),
        "bin/sh": (0o100755, b"12345"),
        "TRAILER!!!": (0, b""),
    }


def fake_run(output: str) -> Any:
    """A stand-in for `machines.vm.image.run`."""

    def run(words: Sequence[str], text: str = "", may_fail: bool = False) -> str:
        return output

    return run


def test_only_debians_own_archives_of_this_release_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = (
        "http://a.example/debian/ bookworm main\nhttp://a.example/debian/ bookworm-updates main\n"
        "http://b.example/security/ bookworm-security main\nhttp://a.example/debian/ bookworm contrib\n"
        "http://c.example/apt/ nodistro main\nhttp://a.example/debian/ trixie main\n"
    )
    monkeypatch.setattr(image, "run", fake_run(listed))
    assert apt_sources("bookworm") == [
        "http://a.example/debian/ bookworm main",
        "http://a.example/debian/ bookworm-updates main",
        "http://b.example/security/ bookworm-security main",
    ]


def test_a_machine_without_sources_is_told_which_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "run", fake_run(""))
    with pytest.raises(NotReady, match="no archive of bookworm"):
        apt_sources("bookworm")


def test_another_kind_of_machine_is_told_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(NotReady, match="aarch64"):
        image.suite_of_this_machine()


def test_an_image_is_built_once_for_the_same_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[list[str]] = []

    def build(scratch: Path, suite: str, packages: list[str]) -> None:
        (scratch / "result").mkdir()
        built.append(packages)

    monkeypatch.setattr(image, "_build", build)
    monkeypatch.setattr(image, "suite_of_this_machine", lambda: "bookworm")
    first = make_image(tmp_path, ["libc6", "python3"])
    again = make_image(tmp_path, ["python3", "libc6"])
    other = make_image(tmp_path, ["python3"])
    assert (first.was_built, again.was_built, other.was_built) == (True, False, True)
    assert first.disk == again.disk != other.disk and len(built) == 2
    assert not first.disk.parent.exists(), "the former image takes up room for ever"


def test_a_package_names_what_the_guest_must_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "a.deb"
    package.touch()
    depends = "python3 (>= 3.11~), python3 (<< 3.12~), libtss2-mu0 (>= 3.1.0) | libtss2-mu-4.0.1-0t64, tpm-udev\n"
    monkeypatch.setattr("machines.vm.__main__.run", fake_run(depends))
    assert sorted(set(dependencies(package))) == ["libtss2-mu0", "python3", "tpm-udev"]
    with pytest.raises(NotReady, match="no package"):
        dependencies(tmp_path / "b.deb")


# The trials.


class DeadMachine(Machine):
    """A machine that was never switched on."""

    def __init__(self) -> None:
        pass

    def evidence(self) -> str:
        return "    the console's last line"


def tried(
    monkeypatch: pytest.MonkeyPatch, outcomes: dict[str, Exception | None], allowed: set[str] | None = None
) -> tuple[int, dict[str, Any], str]:
    """Exit status, document and output of trials that end so."""

    def trial(name: str, error: Exception | None) -> Trial:
        def run(bench: Bench) -> str:
            if error is not None:
                raise error
            return f"{name} is well"

        return Trial(name, run)

    monkeypatch.setattr("machines.vm.__main__.TRIALS", [trial(name, error) for name, error in outcomes.items()])
    bench = Bench.__new__(Bench)
    bench.machine = DeadMachine()
    document: dict[str, Any] = {"code": "ok", "trials": [], "seed": 5, "seconds": 1.0}
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        status = run_trials(bench, list(outcomes), allowed or set(), document)
    return status, document, output.getvalue() + "\n".join(table(document))


def test_a_failure_is_status_1_shows_its_evidence_and_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    status, document, output = tried(monkeypatch, {"kill": VmError("no hub"), "stop": None})
    assert status == 1 and document["code"] == "failed"
    assert [trial["verdict"] for trial in document["trials"]] == ["FAILED", "passed"]
    assert "the console's last line" in output and "no hub" in output and "--seed 5" in output


def test_nothing_goes_on_where_the_device_was_never_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    status, document, _ = tried(monkeypatch, {"install": VmError("dpkg"), "kill": None})
    assert status == 1 and [trial["name"] for trial in document["trials"]] == ["install"]


def test_what_is_skipped_is_status_2_unless_that_was_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes: dict[str, Exception | None] = {"network-bad": Skipped("no netem"), "stop": None}
    assert tried(monkeypatch, outcomes)[0] == 2
    assert tried(monkeypatch, outcomes, {"other"})[0] == 2
    status, document, _ = tried(monkeypatch, outcomes, {"network-bad"})
    assert status == 0 and document["trials"][0]["verdict"] == "skipped" and document["code"] == "ok"


def test_a_failure_outweighs_a_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes: dict[str, Exception | None] = {"a": Skipped("no"), "b": VmError("bad"), "c": Skipped("no")}
    assert tried(monkeypatch, outcomes)[0] == 1


def test_one_trial_brings_what_it_needs() -> None:
    assert wanted_trials(["kill"]) == [*REQUIRED, "kill"]
    assert wanted_trials(["cold-boot"]) == [*REQUIRED, "prepare-cuts", "cold-boot"]
    assert wanted_trials(None) == [trial.name for trial in TRIALS]


# The command.


def tool(*words: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "machines.vm", *words],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": SOURCES, **environ},
    )


def test_the_command_line_says_what_it_expects() -> None:
    for words in (["--cuts", "0"], ["--cuts", "many"], ["--only", "nonsense"], ["--tpm", "tpm-spi"]):
        done = tool(*words)
        assert done.returncode == 2 and "Traceback" not in done.stderr, f"{words}: {done.stderr}"
        assert words[0] in done.stderr


def test_all_trials_are_listed() -> None:
    assert tool("--list").stdout.split() == [trial.name for trial in TRIALS]


def test_forty_cuts_are_the_default() -> None:
    options: Namespace = parser().parse_args([])
    assert options.cuts == 40 and options.tpm == "tpm-tis"


def test_a_machine_that_cannot_is_status_2_and_one_document_unless_that_was_allowed(tmp_path: Path) -> None:
    for environ, status, code in (({}, 2, "notReady"), ({"ALLOW_SKIP": "ext4,vm"}, 0, "skipped")):
        done = tool("--json", "--package", str(tmp_path / "absent.deb"), **environ)
        assert done.returncode == status, done.stderr
        document = json.loads(done.stdout)
        assert document["code"] == code and document["error"]["message"] and document["trials"] == []
