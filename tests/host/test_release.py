"""What `tools/release` refuses, compares and signs; the release as a whole is built by a trial of its own."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import shutil
import subprocess
import tarfile
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from dps_package import audit, release, site
from dps_package.artefacts import NOTES, SUMS, notes_of, packed
from dps_package.deb import pins
from dps_package.distributions import CHECKOUT, BuildFailed
from dps_package.repository import PUBLIC_KEY, VARIABLE, build_repository, key_from_environment, sign_sums
from dps_package.sbom import check_sbom, write_sbom
from dps_package.site import add_to_site, build_site
from support.release_key import release_key

CHANGELOG = (
    "# Changelog\n\n## [Unreleased]\n\n- c\n\n## [0.2.0] - 2026-12-01\n\n- b\n\n## [0.1.0] - 2026-11-30\n\n- a\n"
)


def test_the_notes_are_the_section_of_the_version_which_has_a_date() -> None:
    assert notes_of(CHANGELOG, "0.2.0") == "- b\n" and notes_of(CHANGELOG, "0.1.0") == "- a\n"
    with pytest.raises(BuildFailed, match=r"expected a section \[0\.3\.0\]"):
        notes_of(CHANGELOG, "0.3.0")
    with pytest.raises(BuildFailed, match="expected a date"):
        notes_of(CHANGELOG, "Unreleased")
    assert notes_of((CHECKOUT / "CHANGELOG.md").read_text(), release.__version__)


def test_files_that_differ_or_are_missing_are_named(tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    for folder, texts in ((first, {"a": "1", "b": "1", "c": "1"}), (second, {"a": "1", "b": "2", "d": "1"})):
        folder.mkdir()
        for name, text in texts.items():
            (folder / name).write_text(text)
    assert release.different(first, second) == ["b", "c", "d"]


def test_an_archive_says_nothing_of_who_made_it_when(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1790000000")
    made = packed({"b/c": b"2", "a": b"1"}, "top")
    assert made == packed({"a": b"1", "b/c": b"2"}, "top")
    with tarfile.open(fileobj=io.BytesIO(made)) as archive:
        found = [(member.name, member.mtime, member.uid, member.uname, member.mode) for member in archive]
    assert found == [("top/a", 1790000000, 0, "", 0o644), ("top/b/c", 1790000000, 0, "", 0o644)]


def test_a_bill_of_materials_names_what_is_bundled_and_is_one(tmp_path: Path) -> None:
    artefact = tmp_path / "x.tar.gz"
    artefact.write_bytes(packed({"paho_mqtt-2.1.0.dist-info/METADATA": b"Name: paho-mqtt\nVersion: 2.1.0\n"}, "x"))
    found: Any = json.loads(write_sbom(artefact, "0.1.0", ["python3", "python3"]).read_text())
    assert [each["bom-ref"] for each in found["components"]] == ["pkg:pypi/paho-mqtt@2.1.0", "required/python3"]
    assert found["metadata"]["component"]["version"] == "0.1.0"
    with pytest.raises(BuildFailed, match="expected a CycloneDX"):
        check_sbom(json.dumps({**found, "components": [{"name": "no type"}]}))


def test_the_documents_are_a_site_without_a_link_that_leads_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_site(tmp_path / "site", "0.1.0")
    page = (tmp_path / "site/docs/factories.html").read_text()
    assert "<pre" in page and "```" not in page
    original = site._copy

    def broken(page: str, source: Path) -> None:
        original(page, source)
        with (source / page).open("a") as file:
            file.write("\n[x](nowhere.md)\n")

    monkeypatch.setattr(site, "_copy", broken)
    with pytest.raises(BuildFailed, match=r"nowhere\.md"):
        build_site(tmp_path / "again", "0.1.0")


def test_each_version_has_its_documents_and_the_newest_is_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(out: Path, version: str, one_of_many: bool) -> Path:
        assert one_of_many
        out.mkdir(parents=True)
        (out / "README.html").write_text(version)
        return out

    monkeypatch.setattr(site, "build_site", build)
    build(tmp_path / "site/of-others", "none", True)
    assert 'url=0.9.0rc1/README.html"' in add_to_site(tmp_path / "site", "0.9.0rc1").read_text()
    for version in ("0.9.0", "0.10.0", "0.9.0", "0.10.0rc1", "0.11.0rc1"):
        index = add_to_site(tmp_path / "site", version)
    listed = json.loads((tmp_path / "site/versions.json").read_text())
    assert [each["version"] for each in listed] == ["0.11.0rc1", "0.10.0", "0.10.0rc1", "0.9.0", "0.9.0rc1"]
    assert [each["aliases"] for each in listed] == [[], ["latest"], [], [], []]
    assert 'url=0.10.0/README.html"' in index.read_text()
    assert {path.name for path in (tmp_path / "site").iterdir()} == {"index.html", "versions.json", "of-others"} | {
        each["version"] for each in listed
    }


# --- the repository, as apt of this machine sees it, with folders of its own


STRICT = ("-o", "APT::Update::Error-Mode=any")


def package(folder: Path, version: str) -> Path:
    """A Debian package that only says which version it is."""
    tree = folder / f"tree-{version}"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        f"Package: dps-agent-light\nVersion: {version}\nArchitecture: all\nMaintainer: x <x@y.z>\nDescription: x\n"
    )
    path = folder / f"dps-agent-light_{version}_all.deb"
    subprocess.run(["dpkg-deb", "--build", tree, path], check=True, capture_output=True)
    return path


@pytest.fixture(scope="module")
def keys() -> list[str]:
    """Two secret keys, of nobody."""
    return [release_key(name) for name in ("one", "other")]


class Apt:
    """apt with folders of its own, and one repository."""

    def __init__(self, folder: Path, repository: Path, key: Path) -> None:
        self.folder = folder
        for name in ("lists/partial", "archives/partial", "etc", "parts"):
            (folder / name).mkdir(parents=True)
        (folder / "status").touch()
        (folder / "sources.list").write_text(f"deb [signed-by={key}] file:{repository} ./\n")
        self._options = [
            f"Dir::Etc::SourceList={folder}/sources.list",
            f"Dir::Etc::SourceParts={folder}/parts",
            f"Dir::State={folder}",
            f"Dir::State::status={folder}/status",
            f"Dir::Cache={folder}",
            "APT::Sandbox::User=root",
            "Acquire::Languages=none",
        ]

    def run(self, program: str, *words: str) -> tuple[int, str]:
        options = [word for option in self._options for word in ("-o", option)]
        done = subprocess.run(
            [program, *options, *words], cwd=self.folder, capture_output=True, text=True, check=False, timeout=120
        )
        return done.returncode, done.stdout + done.stderr


def test_apt_takes_what_is_signed_and_nothing_else(tmp_path: Path, keys: list[str]) -> None:
    repository = tmp_path / "repository"
    first, second = package(tmp_path, "0.1.0-1"), package(tmp_path, "0.2.0-1")
    build_repository(repository, [first], keys[0])
    build_repository(repository, [second], keys[0])
    apt = Apt(tmp_path / "apt", repository, repository / PUBLIC_KEY)
    status, said = apt.run("apt-get", "update")
    assert status == 0 and "W:" not in said, said
    for version in ("0.1.0-1", "0.2.0-1"):
        status, said = apt.run("apt-get", "download", f"dps-agent-light={version}")
        assert status == 0, said
        assert (tmp_path / "apt" / f"dps-agent-light_{version}_all.deb").read_bytes()

    with (repository / second.name).open("r+b") as file:
        file.seek(-1, io.SEEK_END)
        file.write(b"!")
    (tmp_path / "apt" / second.name).unlink()
    status, said = apt.run("apt-get", "download", "dps-agent-light=0.2.0-1")
    assert status != 0 and "Hash Sum mismatch" in said, said
    with pytest.raises(BuildFailed, match="another package of this version"):
        build_repository(repository, [second], keys[0])

    (repository / "Packages").write_bytes((repository / "Packages").read_bytes() + b"\n")
    key = repository / PUBLIC_KEY
    status, said = Apt(tmp_path / "altered", repository, key).run("apt-get", "update", *STRICT)
    assert status != 0 and "Hash Sum mismatch" in said, said
    (repository / second.name).unlink()
    known = tmp_path / "known.asc"
    known.write_bytes(key.read_bytes())
    build_repository(repository, [second], keys[1])
    status, said = Apt(tmp_path / "other", repository, known).run("apt-get", "update", *STRICT)
    assert status != 0 and "NO_PUBKEY" in said, said


def test_the_sums_are_signed_by_the_same_key_and_an_altered_file_of_them_is_noticed(
    tmp_path: Path, keys: list[str]
) -> None:
    sums = tmp_path / SUMS
    sums.write_text("00  x\n")
    public = next(path for path in build_repository(tmp_path / "apt", [], keys[0]) if path.name == PUBLIC_KEY)
    signature = sign_sums(sums, keys[0])
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    gpg = ["gpg", "--homedir", str(home), "--batch"]
    subprocess.run([*gpg, "--import", public], check=True, capture_output=True)

    def verified() -> int:
        return subprocess.run([*gpg, "--verify", signature, sums], check=False, capture_output=True).returncode

    assert verified() == 0
    sums.write_text("01  x\n")
    assert verified() == 1
    subprocess.run(["gpgconf", "--homedir", home, "--kill", "all"], check=True)


def test_what_the_sums_do_not_vouch_for_is_neither_signed_nor_published(
    tmp_path: Path, keys: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, built, repository = tmp_path / "dist", tmp_path / "built", tmp_path / "repository"
    built.mkdir()
    made = package(built, "0.1.0-1")
    shutil.rmtree(built / "tree-0.1.0-1")
    (built / SUMS).write_text(f"{hashlib.sha256(made.read_bytes()).hexdigest()}  {made.name}\n")
    signature = out / f"{SUMS}.asc"
    out.mkdir()
    signature.write_text("of earlier sums")
    assert {path.name for path in release.hand_over(built, out)} == {made.name, SUMS}
    assert not signature.exists()

    def signed() -> tuple[int, str]:
        monkeypatch.setenv(VARIABLE, keys[0])
        monkeypatch.setattr("sys.argv", ["tools/release", "--apt", str(repository), "--out", str(out)])
        return release.main(), capsys.readouterr().err

    there = (out / made.name).read_bytes()
    (out / made.name).write_bytes(there + b"!")
    status, said = signed()
    assert status == 1 and f"{made.name} is another file" in said
    (out / made.name).unlink()
    foreign = package(tmp_path, "0.0.9-1")
    shutil.copyfile(foreign, out / foreign.name)
    status, said = signed()
    assert status == 1 and f"{foreign.name} is not in it, {made.name} is missing" in said
    assert not repository.exists() and not signature.exists()
    (out / foreign.name).unlink()
    (out / made.name).write_bytes(there)
    assert signed() == (0, "")
    assert signature.exists() and (repository / made.name).read_bytes() == there


@pytest.mark.parametrize("words", [["--audit"], ["--apt", "x"]], ids=lambda words: words[0])
def test_what_asks_others_for_faults_gets_no_key(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DPS_PACKAGE_PYTHON", "/usr/bin/python3")  # so that it stays in this process
    monkeypatch.syspath_prepend(str(CHECKOUT / "tools"))
    monkeypatch.setenv(VARIABLE, "of nobody")
    monkeypatch.setattr("sys.argv", ["tools/release", *words])
    loader = SourceFileLoader("tools_release", str(CHECKOUT / "tools/release"))
    program = importlib.util.module_from_spec(importlib.util.spec_from_loader("tools_release", loader))  # type: ignore[arg-type]
    loader.exec_module(program)
    prepared: list[object] = []
    monkeypatch.setattr(program, "require_packages", lambda _: prepared.append(os.environ.get(VARIABLE)))
    monkeypatch.setattr(program, "environment", lambda *_: Path("/nowhere"))

    class Started(Exception):
        """Instead of the program."""

    started: list[str | None] = []

    def start(_path: str, _words: list[str], environ: dict[str, str]) -> None:
        started.append(environ.get(VARIABLE))
        raise Started

    monkeypatch.setattr(os, "execve", start)
    with pytest.raises(Started):
        program.main()
    assert prepared == [None]
    assert started == [None if words == ["--audit"] else "of nobody"]


def test_what_is_added_from_an_older_commit_reaches_devices_and_an_old_copy_does_not(
    tmp_path: Path, keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, old = tmp_path / "repository", tmp_path / "old"
    apt = Apt(tmp_path / "apt", repository, repository / PUBLIC_KEY)

    def versions() -> list[str]:
        status, said = apt.run("apt-get", "update")
        assert status == 0 and "W:" not in said, said
        return [line.split()[0] for line in apt.run("apt-cache", "policy", "dps-agent-light")[1].splitlines()[4::2]]

    for version, epoch_s in (("0.1.0-1", 1790000000), ("0.2.0-1", 1790000001), ("0.1.1-1", 1780000000)):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", str(epoch_s))
        build_repository(repository, [package(tmp_path, version)], keys[0])
        assert version in versions()
        if not old.exists():
            shutil.copytree(repository, old)
    shutil.rmtree(repository)
    shutil.copytree(old, repository)
    assert versions() == ["0.2.0-1", "0.1.1-1", "0.1.0-1"], "what it has seen it keeps to"


def test_a_repository_changes_only_when_all_of_it_could_be_made(tmp_path: Path, keys: list[str]) -> None:
    first, second, third = (package(tmp_path, f"0.{minor}.0-1") for minor in (1, 2, 3))
    repository = tmp_path / "repository"
    build_repository(repository, [first], keys[0])

    def content() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in repository.iterdir()}

    before = content()
    with pytest.raises(BuildFailed, match="gpg does not take the key"):
        build_repository(repository, [first, second], "-----BEGIN PGP PRIVATE KEY BLOCK-----\n")
    third.write_bytes(b"no package")
    with pytest.raises(BuildFailed):
        build_repository(repository, [second, third], keys[0])
    assert content() == before
    build_repository(repository, [repository / first.name, second], keys[0])
    assert {*content()} == {*before, second.name}
    assert content()["Packages"].count(b"Package: dps-agent-light\n") == 2


def test_the_workflow_calls_the_tool_as_it_is_and_the_key_reaches_one_step_alone() -> None:
    workflow = yaml.safe_load((CHECKOUT / ".github/workflows/release.yml").read_text())
    steps = {step["name"]: step for step in workflow["jobs"]["release"]["steps"] if "name" in step}
    commands = [line for step in steps.values() for line in step["run"].splitlines() if line.startswith("tools/")]
    build, sign = "tools/release --out dist", "tools/release --apt repository --out dist"
    assert commands == ["tools/test", "tools/fuzz --seconds 60", "tools/release --audit", build, sign]
    assert "gives each target a minute" in " ".join((CHECKOUT / "SECURITY.md").read_text().split())
    assert "--privileged" in workflow["jobs"]["release"]["container"]["options"], "the tests mount"
    keyed = [name for name, step in steps.items() if VARIABLE in step.get("env", {})]
    assert keyed == ["sign the repository"]
    assert "release-notes.md" in steps["draft"]["run"] and NOTES == "release-notes.md"


def test_a_key_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "-----BEGIN PGP PRIVATE KEY BLOCK-----\n")
    assert key_from_environment() and VARIABLE not in os.environ, "what is started from now on has it not"
    monkeypatch.setenv(VARIABLE, "secret words")
    with pytest.raises(BuildFailed, match="came another text") as refused:
        key_from_environment()
    assert "secret words" not in str(refused.value)
    with pytest.raises(BuildFailed, match="gpg does not take the key"):
        build_repository(tmp_path, [], "-----BEGIN PGP PRIVATE KEY BLOCK-----\n")


# --- what comes along: whether it is the newest, and known faults


def test_a_pin_is_fresh_until_the_project_may_use_something_newer() -> None:
    offered = ["3.0", "2.3.1", "2.2.0", "2.4rc1"]
    assert audit.freshness("x", "2.3.1", offered, Requirement("x>=2,<3")) == ("x 2.3.1: the newest", audit.ALL_WELL)
    for pinned, allowed, newest in (("2.2.0", Requirement("x<3"), "2.3.1"), ("2.3.1", None, "3.0")):
        finding = audit.freshness("x", pinned, offered, allowed)
        assert finding.status == audit.AT_FAULT and f"{newest} is there" in finding.text
    assert audit.freshness("x", "1", ["4"], Requirement("x<3")).status == audit.NOT_ASKED


def test_a_package_that_nobody_was_asked_about_is_not_without_faults() -> None:
    fault = {"id": "CVE-1", "fix_versions": ["2"]}
    document = {
        "dependencies": [
            {"name": "a", "version": "1", "vulns": []},
            {"name": "b", "version": "1", "vulns": [fault]},
            {"name": "c", "skip_reason": "not found"},
        ]
    }
    found = audit.faults(document, dict.fromkeys("abcd", "1"))
    assert [each.status for each in found] == [audit.ALL_WELL, audit.AT_FAULT, audit.NOT_ASKED, audit.NOT_ASKED]
    assert "CVE-1 (mended in 2)" in found[1].text and "not found" in found[2].text
    assert audit.bounds().keys() <= pins().keys()
