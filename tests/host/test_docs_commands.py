"""Every command in the documents is run, or says why not: against the emulator, with swtpm or the simulator as TPM.

One shell runs all blocks of a document in their order, in one folder. Ports and folders of the system are replaced by
free ones; nothing else is changed, and no block is waited for but by its own lines: they can be pasted one by one.
"""

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.documents import CHECKOUT, DOCUMENTS, REASONS, Block, blocks_of, commands_of, name_of
from support.tpm.swtpm import free_port_pair

DEADLINE_S = 180
KINDS = ("run", "file", "output", "shown")

# A device as the package leaves it: settings in /etc, the service running, swtpm for its TPM.
DEVICE = """
    mkdir -p /etc/dps-agent/config.d /run/dps-agent /var/lib/dps-agent tpm
    swtpm socket --tpm2 --tpmstate dir=$PWD/tpm --flags not-need-init,startup-clear --server type=tcp,port=2321 \\
        --ctrl type=tcp,port=2322 --daemon --pid file=$PWD/tpm/swtpm.pid
    printf '%s\\n' 'id_scope = "0ne00000000"' 'endpoint = "https://localhost:8443"' \\
        'ca_file = "/etc/dps-agent/ca.pem"' 'state_dir = "/var/lib/dps-agent"' 'runtime_dir = "/run/dps-agent"' \\
        '[tpm]' 'backend = "wire"' 'tcti = "swtpm:port=2321"' '[hub]' 'connect_to = "localhost:8883"' \\
        'ca_file = "/etc/dps-agent/ca.pem"' >/etc/dps-agent/config.toml
    dps-emulator serve --port 8443 --hub-port 8883 --state-dir cloud --enroll-any --ca-file /etc/dps-agent/ca.pem \\
        >emulator.log 2>&1 &
    dps-emulator wait --state-dir cloud
    dps-agent run >service.log 2>&1 &
    dps-agent wait
"""
PRELUDES = {
    "operators.md": DEVICE,
    "programs.md": DEVICE.replace("'[tpm]'", "'registration_id = \"press-07\"' '[tpm]'")
    + "export DPS_AGENT_API_SOCKET=/run/dps-agent/api.sock\n",
}


class Desk:
    """A folder in which one document's commands are run, and what stands for the machine's ports and folders."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tpm = free_port_pair()
        ports = {"8443": free_port(), "8883": free_port(), "2321": tpm, "2322": tpm + 1}
        self._replaced = {
            **{name: str(port) for name, port in ports.items()},
            **{f"/{name}/dps-agent": f"{folder}/{name}/dps-agent" for name in ("etc", "run", "var/lib")},
        }
        self._programs = folder / ".programs"
        self._programs.mkdir()
        ours = ("agent", "hal", "tools")
        paths = os.pathsep.join(str(CHECKOUT / name) for name in ours)
        settings = f"{folder}/etc/dps-agent/config.toml"  # what /etc/dps-agent/config.toml is to the installed program
        python = shlex.quote(sys.executable)
        self._program("python", f'PYTHONPATH={paths} exec {python} "$@"')
        for name in ("dps-emulator", "dps-enroll"):
            self._program(name, f'exec python -m {name.replace("-", "_")}.cli "$@"')
        self._program(
            "dps-agent",
            f'case "$*" in *--config*) ;; *) test ! -f {settings} || set -- --config {settings} "$@" ;; esac\n'
            'exec python -m dps_agent.host.cli "$@"',
        )
        self._program("pytest", 'exec python -m pytest -p dps_emulator.testing -p no:cacheprovider "$@"')
        self._program("sudo", 'exec "$@"')
        self._program("python3", 'exec python "$@"')
        (folder / "tools").symlink_to(CHECKOUT / "tools")  # the documents' folder is the checkout

    def _program(self, name: str, text: str) -> None:
        path = self._programs / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def here(self, text: str) -> str:
        """`text` with this desk's ports and folders for the machine's."""
        for name, own in self._replaced.items():
            text = re.sub(rf"(?<![\w/.-]){re.escape(name)}(?!\d)", own, text)
        return text

    def there(self, text: str) -> str:
        """The inverse of `here`."""
        for name, own in self._replaced.items():
            text = text.replace(own, name)
        return text

    def run(self, blocks: list[Block], prelude: str = "") -> list[str]:
        """Runs the blocks and returns what each has printed; AssertionError names the first that failed."""
        environ = {name: os.environ[name] for name in ("LANG", "TERM") if name in os.environ}
        environ |= {"HOME": str(self.folder), "PATH": f"{self._programs}:{os.defpath}", "PYTHONUNBUFFERED": "1"}
        script = self.folder / ".script"
        script.write_text("\n".join([_SCRIPT_HEAD, self.here(prelude), *map(self._part, range(len(blocks)), blocks)]))
        process = subprocess.Popen(
            ["bash", "-u", "-o", "pipefail", str(script)],
            cwd=self.folder,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        said = ""
        try:
            said, _ = process.communicate(timeout=DEADLINE_S)
        except subprocess.TimeoutExpired:
            said = f"not done within {DEADLINE_S} s"
        finally:
            self._end(process)
        printed = [self._printed(number) for number in range(len(blocks))]
        if process.returncode:
            at = max((number for number, text in enumerate(printed) if text is not None), default=0)
            reproduce = f"pytest tests/host/test_docs_commands.py -k {name_of(blocks[at].document)}"
            text = printed[at] or ""
            raise AssertionError(f"{blocks[at].place} failed: {said}\n{text}\n{blocks[at].text}\n{reproduce}")
        return [self.there(text or "") for text in printed]

    def _part(self, number: int, block: Block) -> str:
        """The part of the script that does what `block` is for."""
        text = self.here(block.text)
        if block.kind == "file":
            path = self.folder / self.here(block.detail)
            assert path.is_relative_to(self.folder), f"{block.place}: {path} is none of this desk's"
            return f"mkdir -p {shlex.quote(str(path.parent))}\ncat >{shlex.quote(str(path))} <<'=END='\n{text}=END="
        if block.kind != "run":
            return ""
        out = self.folder / f".out{number}"
        if block.language == "python":
            program = self.folder / f".program{number}.py"
            program.write_text(text)
            text = f"python {program}\n"
        return f"BLOCK={block.place}\n{{\n{text}}} >{out} 2>&1 </dev/null"

    def _printed(self, number: int) -> str | None:
        path = self.folder / f".out{number}"
        return path.read_text() if path.exists() else None

    def _end(self, process: "subprocess.Popen[str]") -> None:
        """Ends what the script has started, also what made itself a daemon and left its number."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        for path in self.folder.rglob("*.pid"):
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(path.read_text()), signal.SIGKILL)


_SCRIPT_HEAD = """
BLOCK="the beginning"
trap 'echo "exit status $? in line $LINENO of the script, $BLOCK: $BASH_COMMAND"; exit 1' ERR
trap 'for job in $(jobs -p); do kill $job && wait $job || :; done 2>/dev/null' EXIT
set -E
"""


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def unseen(wanted: str, printed: str) -> str:
    """The first line of `wanted` that is not in `printed` behind the ones before it; "" where all are."""
    rest = iter(printed.splitlines())
    for line in filter(str.strip, wanted.splitlines()):
        pattern = ".*".join(map(re.escape, re.split(r"\s*…\s*", line.rstrip())))
        if not any(re.fullmatch(pattern, found.rstrip()) for found in rest):
            return line
    return ""


@pytest.fixture
def desk() -> Iterator[Desk]:
    with tempfile.TemporaryDirectory(prefix="docs-", ignore_cleanup_errors=True) as folder:
        yield Desk(Path(folder))


def block(text: str, kind: str = "run", language: str = "sh", detail: str = "") -> Block:
    return Block(CHECKOUT / "README.md", 1, language, kind, detail, text)


def test_a_command_that_fails_is_noticed_wherever_it_stands(desk: Desk) -> None:
    with pytest.raises(AssertionError, match=r"(?s)README\.md:1 failed: .*exit status 1 in line"):
        desk.run([block("echo one\nfalse | cat\necho two\n"), block("echo three\n")])


def test_a_service_that_does_not_come_up_is_noticed(desk: Desk) -> None:
    text = next(found.text for found in blocks_of(CHECKOUT / "README.md") if "dps-emulator serve" in found.text)
    text = text.replace("serve", "serve --no-such-option").replace("emulator wait", "emulator wait --timeout 2")
    with pytest.raises(AssertionError, match="failed"):
        desk.run([block(text)])


def test_the_blocks_of_a_document_share_folder_variables_and_files(desk: Desk) -> None:
    made = block("two\n", kind="file", detail="deep/made.txt")
    printed = desk.run([block("one=1\n"), made, block("echo $one; cat deep/made.txt; pwd\n")])
    assert printed[2].splitlines()[:2] == ["1", "two"]


@pytest.mark.parametrize(
    ("wanted", "line"),
    [
        ("a\nc …\n", ""),
        ("…b\n", ""),
        ("c d\na\n", "a"),
        ("a\nx …\n", "x …"),
    ],
)
def test_output_is_found_in_its_order_with_gaps_only_where_the_document_has_them(wanted: str, line: str) -> None:
    assert unseen(wanted, "a\nb\nc d\n") == line


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_block_is_run_or_says_why_not(document: Path) -> None:
    before: Block | None = None
    for found in blocks_of(document):
        if found.language == "mermaid":
            continue
        where = f"{found.place}: ```{found.language} {found.kind}"
        assert found.kind in KINDS, f"{where}: expected one of {', '.join(KINDS)} behind the language"
        assert (found.kind in ("file", "shown")) == bool(found.detail), f"{where}: expected NAME or REASON behind ="
        if found.kind == "shown":
            assert found.detail in REASONS, f"{where}: expected one of {', '.join(REASONS)}"
            is_command = found.language in ("sh", "python")
            assert is_command == (found.detail != "excerpt"), f"{where}: commands are run, or say why not"
        if found.kind == "run":
            assert found.language in ("sh", "python"), f"{where}: only sh and python are run"
        if found.kind == "output":
            assert before is not None and before.kind == "run", f"{where}: output stands behind what prints it"
        before = found


def _documents_that_run() -> list[Path]:
    return [path for path in DOCUMENTS if any(found.kind == "run" for found in blocks_of(path))]


@pytest.mark.parametrize("document", _documents_that_run(), ids=name_of)
def test_every_command_of_a_document_works_and_prints_what_it_shows(document: Path, desk: Desk) -> None:
    for program in ("curl", "jq", "swtpm"):
        assert shutil.which(program, path=os.defpath), f"{program} is missing: apt-get install {program}"
    blocks = blocks_of(document)
    printed = desk.run(blocks, PRELUDES.get(document.name, ""))
    for at, found in enumerate(blocks):
        if found.kind == "output":
            line = unseen(found.text, printed[at - 1])
            assert not line, f"{found.place}: {line!r} is not in what was printed:\n{printed[at - 1]}"


# The jobs for continuous integration.

CI = CHECKOUT / "docs" / "ci.md"


def recipe() -> list[str]:
    """The lines of the device test that is run above."""
    return next(found for found in blocks_of(CI) if found.detail == "device-test.sh").text.splitlines()


def jobs() -> dict[str, Any]:
    """The YAML files in the document by name, parsed."""
    found = {found.detail: yaml.safe_load(found.text) for found in blocks_of(CI) if found.language == "yaml"}
    assert list(found) == [".github/workflows/device.yml", ".gitlab-ci.yml"]
    return found


def test_the_job_of_github_runs_the_device_test_and_what_it_needs() -> None:
    workflow = jobs()[".github/workflows/device.yml"]
    assert set(workflow) == {"name", True, "jobs"}  # YAML 1.1 reads "on" as true, GitHub as text
    job = workflow["jobs"]["device"]
    ran = {step["name"]: step["run"].splitlines() for step in job["steps"] if "run" in step}
    assert ran["prepare"][:-1] == install_lines()[:-1]
    assert ran["prepare"][-1] == 'echo "$PWD/venv/bin" >>"$GITHUB_PATH"'  # what "export PATH" is between two steps
    assert ran["test"] == ["bash device-test.sh"]
    assert [step for step in job["steps"] if step.get("if") == "failure()"]


def test_the_job_of_gitlab_runs_the_device_test_and_what_it_needs() -> None:
    job = jobs()[".gitlab-ci.yml"]["device"]
    assert job["script"] == [*(line.removeprefix("sudo ") for line in install_lines()), "bash device-test.sh"]
    assert job["artifacts"] == {"when": "on_failure", "paths": ["bench/*.log"]}


def install_lines() -> list[str]:
    """What the document tells to install, which both jobs do as it stands there."""
    return commands_of(next(found for found in blocks_of(CI) if (found.kind, found.detail) == ("shown", "root")))


def test_the_device_test_of_the_document_is_strict_and_cleans_up() -> None:
    lines = recipe()
    assert lines[0] == "set -euo pipefail"
    assert lines[1].startswith("trap ")
    assert lines[1].endswith(" EXIT")
