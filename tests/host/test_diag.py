"""`dps-agent diag`: one private archive with all that a report needs, and no secret in any of it."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import stat
import subprocess
import sys
import tarfile
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest

from dps_agent.host import diag
from dps_agent.host.cli import main
from dps_emulator.enrollments import Enrollment
from dps_emulator.service import Settings
from dps_hal.contracts import IDENTITY
from dps_hal.host.files import FileStore
from dps_hal.host.simulator import SimulatedTpm
from support.cloud.emulator import HUB, EmulatorInThread
from support.programs.running_agent import PROGRAM, RunningAgent, _environ
from support.tpm import swtpm
from support.tpm.states import copy_state
from support.tpm.swtpm import Swtpm

OWNER_PASSWORD = 'own"er/hunter2é'
ENDORSEMENT_PASSWORD = "endorse-hunter3"
PROXY_PASSWORD = "p%40ss-hunter4"
PAYLOAD = "payload-hunter5"
MEMBERS = {
    *("version.json", "settings.json", "check.json", "status.json", "tpm.json"),
    *("system.txt", "journal.txt", "state-folder.txt"),
}


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[RunningAgent]:
    """A device that has its hub and gave a payload for it."""
    folder = copy_state("press-07", tmp_path / "tpm")
    enrollment = Enrollment("press-07", SimulatedTpm(folder).endorsement_key())
    with EmulatorInThread(Settings(retry_after_s=0), [enrollment]) as emulator:
        tpm = f'backend = "simulator"\ntcti = "{folder}"\n'
        with RunningAgent(tmp_path, emulator, tpm) as found:
            found.settings.write_text(f'payload = {{line = "{PAYLOAD}"}}\n' + found.text)
            yield found


def unpacked(packed: bytes) -> tuple[str, dict[str, str]]:
    """The folder in an archive and the text of each member; no member may be anything but a private file."""
    texts = {}
    with tarfile.open(fileobj=io.BytesIO(packed), mode="r:gz") as file:
        folders = {member.name.partition("/")[0] for member in file.getmembers()}
        for member in file.getmembers():
            assert member.isfile() and member.mode == 0o600
            content = file.extractfile(member)
            assert content is not None
            texts[member.name.partition("/")[2]] = content.read().decode()
    (folder,) = folders
    return folder, texts


def run(agent: RunningAgent, *words: str, **environ: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*PROGRAM, "--config", str(agent.settings), "diag", *words],
        cwd=agent.folder,
        env=_environ(environ),
        capture_output=True,
        timeout=120,
        check=False,
    )


def test_the_archive_is_private_named_by_time_and_device_and_holds_what_a_report_needs(agent: RunningAgent) -> None:
    agent.command("provision")
    ended = run(agent)
    assert (ended.returncode, ended.stderr) == (0, b"")
    (path,) = agent.folder.glob("dps-agent-diag-*.tar.gz")
    assert ended.stdout.decode().splitlines()[0] == path.name
    assert path.name.endswith("Z-press-07.tar.gz")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    folder, texts = unpacked(path.read_bytes())
    assert (folder, set(texts)) == (path.name.removesuffix(".tar.gz"), MEMBERS)
    documents = {name: json.loads(text) for name, text in texts.items() if name.endswith(".json")}
    assert documents["check.json"]["code"] == "ok"
    assert {found["id"] for found in documents["check.json"]["checks"]} >= {"tpm-ek", "record", "dps-answers"}
    assert documents["status.json"]["assignment"]["assignedHub"] == HUB
    assert documents["settings.json"]["settings"]["id_scope"]["origin"] == str(agent.settings)
    assert documents["tpm.json"]["maker"] == "SIMU"
    assert documents["version.json"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "identity.0: whole, version 1, generation 1, " in texts["state-folder.txt"]
    assert "PRETTY_NAME=" in texts["system.txt"]
    assert texts["journal.txt"].strip()


def test_no_planted_secret_is_in_any_member(tmp_path: Path, agent: RunningAgent) -> None:
    """Secrets where they belong, and others in the wrong places: a journal that quotes a token and a password."""
    passwords = {"owner": OWNER_PASSWORD, "endorsement": ENDORSEMENT_PASSWORD}
    agent.command("provision")
    stored = FileStore(str(agent.state_dir)).load(IDENTITY)
    assert stored is not None
    record = json.loads(stored.payload[:-32])
    token = agent.command("token")["token"]
    signature = urllib.parse.parse_qs(token.partition(" ")[2])["sig"][0]
    (tmp_path / "bin").mkdir()
    journalctl = tmp_path / "bin" / "journalctl"
    quotes = "\n".join(
        [token, OWNER_PASSWORD, ENDORSEMENT_PASSWORD, PROXY_PASSWORD, "via http://you:env-hunter6@proxy"]
    )
    journalctl.write_text(f"#!/bin/sh\ncat <<'END'\nthe journal begins\n{quotes}\nEND\n")
    journalctl.chmod(0o755)
    with Swtpm(tmp_path / "swtpm") as machine:
        machine.set_hierarchy_auth(swtpm.OWNER, OWNER_PASSWORD.encode())
        machine.set_hierarchy_auth(swtpm.ENDORSEMENT, ENDORSEMENT_PASSWORD.encode())
        flags = ["--set", "tpm.backend=wire", "--set", f"tpm.tcti={machine.tcti}", "--output", "-", "--offline"]
        flags += ["--set", f"network.proxy=http://me:{PROXY_PASSWORD}@{HUB}:3128"]
        for name, password in passwords.items():
            path = tmp_path / name
            path.touch(0o600)
            path.write_text(password)
            flags += ["--set", f"tpm.{name}_auth_file={path}"]
        search = f"{journalctl.parent}:{os.environ['PATH']}"
        ended = run(agent, *flags, https_proxy="http://you:env-hunter6@proxy:1", PATH=search)
    assert (ended.returncode, ended.stderr) == (0, b"")
    _, texts = unpacked(ended.stdout)
    assert json.loads(texts["tpm.json"])["owner_has_password"] is True  # they were of use
    assert "the journal begins" in texts["journal.txt"]
    everything = "\n".join(texts.values())
    secrets = [
        *passwords.values(),
        *(json.dumps(password)[1:-1] for password in passwords.values()),
        *(password.encode().hex() for password in passwords.values()),
        *(base64.b64encode(password.encode()).decode() for password in passwords.values()),
        *(PROXY_PASSWORD, urllib.parse.unquote(PROXY_PASSWORD), "env-hunter6", PAYLOAD, "hunter"),
        *(token, signature, urllib.parse.quote(signature, safe=""), record["wrappedKey"]),
    ]
    assert [secret for secret in secrets if secret in everything] == []


def test_what_quotes_a_secret_loses_it() -> None:
    """Texts that the agent did not write itself, such as a journal."""
    secrets = diag.Secrets([OWNER_PASSWORD, "abc", "p%40ss-hunter4"])
    quoted = {
        f"wrong password {OWNER_PASSWORD} for owner": "wrong password *** for owner",
        f'{{"a": {json.dumps(OWNER_PASSWORD)}}}': '{"a": "***"}',
        "SharedAccessSignature sr=h%2Fdevices%2Fd&sig=c2VjcmV0&se=1 was sent": "SharedAccessSignature *** was sent",
        "GET /?sr=x&sig=c2VjcmV0%3D&se=1": "GET /?sr=x&sig=***&se=1",
        '"authenticationKey":"ADQAIE","x":1': '"authenticationKey":"***","x":1',
        "HostName=h;DeviceId=d;SharedAccessKey=c2VjcmV0=": "HostName=h;DeviceId=d;SharedAccessKey=***",
        "Proxy-Authorization: Basic bWU6eA==\nnext": "Authorization: ***\nnext",
        "via http://me:any@thing@proxy:3128/": "via http://***@proxy:3128/",
        "p@ss-hunter4": "***",
        "via http://me:it's@proxy:3128/": "via http://***@proxy:3128/",
        "via http://me:one/two@proxy:3128/": "via http://***@proxy:3128/",
        '{"proxy":"http://me:a\\"b c/d@proxy:3128","mail":"x@y"}': '{"proxy":"http://***@proxy:3128","mail":"x@y"}',
        "via 'http://me:with a space@proxy:3128' to a@b": "via 'http://***@proxy:3128' to a@b",
        'password = "with a space", x': 'password = "***", x',
        "'password': 'with a space', 'x': 1": "'password': '***', 'x': 1",
        json.dumps({"line": 'the password = "with a space" and {"password": "another one"}'}): json.dumps(
            {"line": 'the password = "***" and {"password": "***"}'}
        ),
        "https://h/a and b@c": "https://h/a and b@c",
        "abc is too short to be told from a word": "abc is too short to be told from a word",
    }
    assert {text: secrets.removed_from(text) for text in quoted} == quoted
    assert "hunter" not in repr(secrets)


@pytest.mark.parametrize("password", ["it's hunter7", "a//b/hunter7", 'a"b hunter7', "hunter7 and more"])
def test_a_known_password_goes_whole_whatever_stands_around_it(password: str) -> None:
    secrets = diag.secrets_of(None, {"DPS_AGENT_NETWORK_PROXY": f"http://me:{password}@proxy:3128"})
    texts = [f"password={password} was sent", f"tried me:{password} there", f"{password!r} {json.dumps(password)}"]
    for text in texts:
        cleaned = secrets.removed_from(text)
        assert not [word for word in re.split("[^a-z0-9]+", password) if len(word) > 3 and word in cleaned], cleaned


def test_a_link_in_dev_that_leads_nowhere_is_a_line(tmp_path: Path) -> None:
    (tmp_path / "tpm0").symlink_to("nowhere")
    assert diag._node(str(tmp_path / "tpm0")) == f"{tmp_path}/tpm0: No such file or directory"
    assert "/dev/null crw-rw-rw- root" in diag._node("/dev/null")


def test_a_payload_that_the_settings_refuse_is_not_quoted(agent: RunningAgent) -> None:
    agent.settings.write_text(f'payload = "{PAYLOAD}"\npoll = "never"\n' + agent.text)
    ended = run(agent, "--output", "-", "--offline")
    assert ended.returncode == 0
    folder, texts = unpacked(ended.stdout)
    assert folder.endswith("-unknown")
    assert not {"tpm.json", "state-folder.txt"} & set(texts)
    document = json.loads(texts["check.json"])
    assert (document["code"], document["error"]["problems"][1][:5]) == ("config", "poll:")
    assert PAYLOAD not in "".join(texts.values())


def test_a_device_without_its_tpm_is_reported_all_the_more(agent: RunningAgent) -> None:
    words = ("--set", "tpm.backend=wire", "--set", "tpm.tcti=device:/nonexistent/tpmrm0")
    ended = run(agent, *words, "--output", "-", "--offline", "--set", "registration_id=auto")
    assert ended.returncode == 0
    folder, texts = unpacked(ended.stdout)
    assert folder.endswith("-unknown")
    assert "[tpm.absent]" in json.loads(texts["tpm.json"])["error"]
    assert json.loads(texts["check.json"])["error"]["code"] == "tpm.absent"


def test_a_file_that_exists_is_not_replaced(agent: RunningAgent) -> None:
    (agent.folder / "report").write_text("mine")
    ended = run(agent, "--output", "report", "--offline", "--json")
    assert (ended.returncode, json.loads(ended.stdout)["error"]["code"]) == (1, "agent.file")
    assert "name a new file" in json.loads(ended.stdout)["error"]["message"]
    assert (agent.folder / "report").read_text() == "mine"


def test_json_and_an_archive_on_stdout_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diag", "--output", "-", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "agent.usage"


def test_a_program_that_hangs_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diag, "COMMAND_LIMIT_S", 0.2)
    assert diag._output(("sleep", "30")) == "sleep: nothing within 0.2 s\n"
    assert diag._output((str(tmp_path / "none"),)) == f"{tmp_path}/none: No such file or directory\n"


def test_a_full_disk_is_a_sentence(tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        code = "import sys; from dps_agent.host.cli import main; sys.exit(main())"
        ended = subprocess.run(
            [sys.executable, "-c", code, "--set", f"state_dir={tmp_path}", "diag", "--offline", "--output", "-"],
            env=_environ({"HOME": os.environ.get("HOME", "/")}),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    assert ended.returncode == 1
    assert ended.stderr.startswith("dps-agent: the archive cannot be written to stdout: No space left on device\n")
