"""What `tools/package` builds has what it must have, and nothing else. Its life is `tools/package --test`."""

import gzip
import hashlib
import itertools
import os
import re
import stat
import subprocess
import tarfile
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from dps_agent.host.cli.verb import VERBS
from dps_agent.host.cli.version import PACKAGES
from dps_agent.host.config import environment_name
from dps_agent.host.settings_table import KEYS
from dps_hal.errors import EXIT_GROUPS
from dps_hal.host.codes import REMEDIES
from dps_package.deb import pins
from dps_package.distributions import BuildFailed, check_content, debian_version
from machines.packages import foreign
from support.built_packages import CHECKOUT, build, unpacked

SERVICE = CHECKOUT / "agent/service"
EPOCH_S = "1700000000"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Everything that is built, by wheel, sdist, full, light."""
    files = build(tmp_path_factory.mktemp("dist"), SOURCE_DATE_EPOCH=EPOCH_S)
    kinds = {"-any.whl": "wheel", ".tar.gz": "sdist", "_all.deb": "light"}
    return {next((kind for end, kind in kinds.items() if path.name.endswith(end)), "full"): path for path in files}


@pytest.fixture(scope="module")
def full(built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpacked(built["full"], tmp_path_factory.mktemp("full") / "root")


@pytest.fixture(scope="module")
def light(built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpacked(built["light"], tmp_path_factory.mktemp("light") / "root")


def control(root: Path) -> dict[str, str]:
    return dict(HeaderParser().parsestr((root / "DEBIAN/control").read_text()))


def names(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_the_wheel_has_agent_hal_and_emulator_and_no_tests(built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built["wheel"]) as wheel:
        found = set(wheel.namelist())
        (entry_points,) = (wheel.read(name).decode() for name in found if name.endswith("entry_points.txt"))
        (metadata,) = (wheel.read(name).decode() for name in found if name.endswith(".dist-info/METADATA"))
    tops = {name.partition("/")[0] for name in found if ".dist-info" not in name}
    assert tops == {"dps_agent", "dps_text", "dps_hal", "dps_emulator", "dps_enroll"}
    assert {
        "dps_agent/py.typed",
        "dps_hal/py.typed",
        "dps_agent/client/__init__.py",
        "dps_agent/host/cli/__init__.py",
    } <= found
    assert any(name.endswith("/LICENSE") for name in found)
    assert {line.partition(" ")[0] for line in entry_points.splitlines() if "=" in line} == {
        "dps-agent",
        "dps-emulator",
        "dps-enroll",
        "dps_emulator.testing",
    }
    needs = HeaderParser().parsestr(metadata).get_all("Requires-Dist") or []
    assert {re.split(r"[<>=!]", need)[0] for need in needs if "extra ==" not in need} == {"paho-mqtt", "ujson"}


def test_what_comes_along_is_pinned_to_files_that_the_wheel_may_be_installed_with() -> None:
    pinned = pins()
    metadata = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(line) for line in metadata["dependencies"] + metadata["optional-dependencies"]["tpm"]]
    assert {requirement.name for requirement in wanted} <= pinned.keys() < set(PACKAGES)
    assert set(PACKAGES) == {*pinned, "dps-agent"}, "`dps-agent version` names all that comes along"
    for name, pin in pinned.items():
        first, *digests = pin.strip().replace("\\\n", "").split()
        assert re.fullmatch(rf"{name}==[\w.]+", first), pin
        assert digests and all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", digest) for digest in digests), pin
        for requirement in wanted:
            assert requirement.name != name or requirement.specifier.contains(first.partition("==")[2]), pin


def test_a_wheel_with_tests_in_it_is_refused(tmp_path: Path, built: dict[str, Path]) -> None:
    spoiled = tmp_path / built["wheel"].name
    spoiled.write_bytes(built["wheel"].read_bytes())
    check_content(spoiled)
    with zipfile.ZipFile(spoiled, "a") as wheel:
        wheel.writestr("tests/test_something.py", "")
    with pytest.raises(BuildFailed, match=r"too much.*tests/test_something"):
        check_content(spoiled)


def test_the_sdist_has_what_a_wheel_is_built_from_and_no_caches(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as sdist:
        found = {member.name.partition("/")[2] for member in sdist if member.isfile()}
    assert {"pyproject.toml", "LICENSE", "README.md", "agent/service/dps-agent.service", "tools/package"} <= found
    assert not [name for name in found if "__pycache__" in name or name.startswith((".cache", ".git/", "dist/"))]


@pytest.mark.parametrize("variant", ["full", "light"])
def test_a_debian_package_has_everything_an_operator_meets(variant: str, request: pytest.FixtureRequest) -> None:
    root: Path = request.getfixturevalue(variant)
    package = control(root)["Package"]
    wanted = {
        "etc/dps-agent/config.toml": SERVICE / "config.toml",
        "usr/lib/systemd/system/dps-agent.service": SERVICE / "dps-agent.service",
        "usr/lib/systemd/catalog/dps-agent.catalog": SERVICE / "dps-agent.catalog",
        "usr/lib/sysusers.d/dps-agent.conf": SERVICE / "dps-agent.sysusers",
    }
    for name, source in wanted.items():
        assert (root / name).read_bytes() == source.read_bytes(), name
    documents = {f"usr/share/doc/{package}/{name}" for name in ("copyright", "changelog.gz", "changelog.Debian.gz")}
    assert documents | {"usr/bin/dps-agent", "usr/share/man/man8/dps-agent.8.gz"} <= names(root)
    tops = {path.name for path in (root / "usr/lib/dps-agent").iterdir()}
    assert {"dps_agent", "dps_text", "dps_hal", "paho"} <= tops and not {"dps_emulator", "dps_enroll"} & tops
    assert not [name for name in names(root) if name.endswith((".pyc", ".whl")) or "/tests/" in name]


@pytest.mark.parametrize("variant", ["full", "light"])
def test_every_file_is_readable_by_all_and_writable_by_root_alone(variant: str, built: dict[str, Path]) -> None:
    listing = subprocess.run(["dpkg-deb", "-c", built[variant]], capture_output=True, text=True, check=True, timeout=60)
    for line in listing.stdout.splitlines():
        mode, owner = line.split()[:2]
        assert owner == "root/root" and mode in ("drwxr-xr-x", "-rw-r--r--", "-rwxr-xr-x", "lrwxrwxrwx"), line
        if mode[0] == "l":
            assert re.search(r"/dist-packages/(\w+) -> \.\./\.\./dps-agent/\1$", line), line
            continue
        assert ("x" in mode) == (mode[0] == "d" or line.endswith("/usr/bin/dps-agent")), line


def test_the_full_package_names_the_python_and_the_libraries_that_it_was_built_with(full: Path) -> None:
    fields = control(full)
    needs = [need.strip() for need in fields["Depends"].split(",")]
    packages = {re.split(r"[ (:]", need)[0] for need in needs}
    version = subprocess.run(
        [
            "/usr/bin/python3",
            "-c",
            "import sys; print('%d.%d %d.%d' % (*sys.version_info[:2], 3, sys.version_info[1] + 1))",
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout.split()
    assert {f"python3 (>= {version[0]}~)", f"python3 (<< {version[1]}~)"} <= set(needs)
    assert {"libc6", "tpm-udev", "systemd", "ca-certificates"} <= packages
    for library in ("libtss2-esys", "libtss2-tctildr", "libtss2-tcti-device"):
        assert any(package.startswith(library) for package in packages), (library, packages)
    assert fields["Architecture"] != "all" and "dps-agent-light" in fields["Conflicts"]
    assert {"tpm2_pytss", "cryptography", "paho", "cffi"} <= {
        path.name for path in (full / "usr/lib/dps-agent").iterdir()
    }


def test_the_light_package_is_pure_python_without_tpm2_tss(light: Path) -> None:
    fields = control(light)
    assert fields["Architecture"] == "all" and fields["Conflicts"] == "dps-agent"
    assert "tss" not in fields["Depends"] and "cryptography" not in fields["Depends"]
    assert not [name for name in names(light) if ".so" in name]
    assert {path.name for path in (light / "usr/lib/dps-agent").iterdir() if "dist-info" not in path.name} == {
        *("dps_agent", "dps_text", "dps_hal", "paho"),
    }
    defaults = light / "usr/lib/dps-agent/dps_agent/host/defaults.toml"
    assert 'backend = "wire"' in defaults.read_text()  # below every setting of the operator's
    assert not list((light / "etc/dps-agent/config.d").iterdir())


@pytest.mark.parametrize("variant", ["full", "light"])
def test_any_program_of_the_system_may_import_the_client_and_nothing_that_comes_with_it(
    variant: str, request: pytest.FixtureRequest
) -> None:
    library = request.getfixturevalue(variant) / "usr/lib/python3/dist-packages"
    assert {path.name for path in library.iterdir()} == {"dps_agent", "dps_hal"}
    program = (
        f"import sys; sys.path.append({str(library)!r})\n"
        "from dps_agent.client import AsyncClient, Client, Spool\n"
        "print(Client.__module__)\nimport paho"
    )
    words = ["/usr/bin/python3", "-I", "-S", "-B", "-c", program]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout == "dps_agent.client.blocking\n" and "No module named 'paho'" in done.stderr, done.stderr


@pytest.mark.parametrize("variant", ["full", "light"])
def test_settings_are_conffiles_and_all_else_has_its_sum(variant: str, request: pytest.FixtureRequest) -> None:
    root: Path = request.getfixturevalue(variant)
    conffiles = {name.strip("/\n") for name in (root / "DEBIAN/conffiles").read_text().splitlines()}
    sums = dict(reversed(line.split("  ")) for line in (root / "DEBIAN/md5sums").read_text().splitlines())
    assert conffiles == {name for name in names(root) if name.startswith("etc/")}
    assert set(sums) | conffiles == {name for name in names(root) if not name.startswith("DEBIAN/")}
    for name, wanted in sums.items():
        assert hashlib.md5((root / name).read_bytes(), usedforsecurity=False).hexdigest() == wanted, name


@pytest.mark.parametrize("script", ["postinst", "prerm", "postrm"])
def test_a_maintainer_script_is_one_that_a_posix_shell_reads(script: str, full: Path, light: Path) -> None:
    for root in (full, light):
        path = root / "DEBIAN" / script
        assert path.stat().st_mode & stat.S_IXUSR
        assert "@" not in path.read_text().replace("$@", ""), "a place that nothing was put into"
        subprocess.run(["sh", "-n", path], check=True, timeout=60)


class Installation:
    """A maintainer script of the light package on a file system of its own, with stubs for what it calls."""

    def __init__(self, package: Path, folder: Path) -> None:
        self.package = package
        self.root = folder / "root"
        self.calls = folder / "calls"
        self._stubs = folder / "bin"
        self._stubs.mkdir()
        for name in ("run/systemd/system", "var/lib", "etc/dps-agent/config.d", "usr/bin", "usr/lib/dps-agent"):
            (self.root / name).mkdir(parents=True)
        for name in ("systemd-sysusers", "py3compile", "deb-systemd-invoke", "deb-systemd-helper", "dps-agent"):
            self.stub(name, "")
        self.stub("systemctl", "case $* in *is-enabled*) exit 1;; esac")

    def stub(self, name: str, text: str) -> None:
        """A program that notes how it was called and does this."""
        path = self._stubs / name
        path.write_text(f'#!/bin/sh\nPATH=/usr/bin:/bin\necho "{name} $*" >>{self.calls}\n{text}\n')
        path.chmod(0o755)

    def run(self, script: str, *words: str) -> str:
        """What the script says; AssertionError where it fails."""
        text = re.sub(r"(?<![\w/.@*])/(?=(var|run|etc|usr)/)", f"{self.root}/", (self.package / script).read_text())
        text = text.replace(f"#!{self.root}", "#!")
        done = subprocess.run(
            ["sh", "-c", text, script, *words],
            env={"PATH": f"{self._stubs}:/usr/bin:/bin", "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, f"{script} {words}: {done.stdout}{done.stderr}"
        return done.stdout.replace(str(self.root), "")

    def called(self, name: str) -> list[str]:
        """How a stub was called."""
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        return [line.partition(" ")[2] for line in lines if line.startswith(f"{name} ")]


NO_SCOPE = """echo '{"error": {"code": "config.missing"}}'"""


@pytest.fixture
def installation(light: Path, tmp_path: Path) -> Installation:
    return Installation(light / "DEBIAN", tmp_path)


def test_a_first_installation_without_an_id_scope_starts_nothing_and_says_so(installation: Installation) -> None:
    installation.stub("dps-agent", NO_SCOPE)
    assert "it needs an ID scope" in installation.run("postinst", "configure", "")
    assert not installation.called("deb-systemd-invoke")
    assert installation.called("deb-systemd-helper") == ["update-state dps-agent.service"]


def test_a_first_installation_with_an_id_scope_starts_the_service(installation: Installation) -> None:
    assert installation.run("postinst", "configure", "") == ""
    assert installation.called("deb-systemd-invoke") == ["start dps-agent.service"]


def test_an_upgrade_restarts_a_service_whose_id_scope_only_its_unit_knows(installation: Installation) -> None:
    installation.stub("dps-agent", NO_SCOPE)
    assert installation.run("postinst", "configure", "0.1-1") == ""
    assert installation.called("deb-systemd-invoke") == ["restart dps-agent.service"]


def test_the_other_variant_starts_a_service_whose_id_scope_only_its_unit_knows(installation: Installation) -> None:
    installation.stub("dps-agent", NO_SCOPE)
    installation.stub("systemctl", "")
    assert installation.run("postinst", "configure", "") == ""
    assert installation.called("deb-systemd-invoke") == ["start dps-agent.service"]


def test_an_upgrade_starts_nothing_that_somebody_disabled(installation: Installation) -> None:
    installation.stub("deb-systemd-helper", "case $* in *was-enabled*) exit 1;; esac")
    assert installation.run("postinst", "configure", "0.1-1") == ""
    assert installation.called("deb-systemd-invoke") == ["try-restart dps-agent.service"]


@pytest.mark.parametrize("is_mount_point", [False, True])
def test_a_purge_empties_the_state_folder_and_ends_well(is_mount_point: bool, installation: Installation) -> None:
    state = installation.root / "var/lib/private/dps-agent"
    state.mkdir(parents=True)
    (state / "identity.0").write_text("record")
    (installation.root / "var/lib/dps-agent").symlink_to("private/dps-agent")
    if is_mount_point:
        for name in ("rmdir", "rm"):
            busy = f'case $* in *private/dps-agent) {name} "$@"/* 2>/dev/null; exit 1;; esac'
            installation.stub(name, f'{busy}\n{name} "$@"')
    said = installation.run("postrm", "purge")
    assert "dps-agent: deleted: /var/lib/private/dps-agent/identity.0\n" in said
    assert (list(state.iterdir()) == []) if is_mount_point else not state.exists()
    assert ("deleted: /var/lib/private/dps-agent\n" in said) is not is_mount_point
    assert ("kept: /var/lib/private/dps-agent, " in said) is is_mount_point
    assert not (installation.root / "var/lib/dps-agent").is_symlink()


def test_a_purge_escapes_the_names_that_it_prints_and_follows_nothing(installation: Installation) -> None:
    state = installation.root / "var/lib/private/dps-agent"
    state.mkdir(parents=True)
    elsewhere = installation.root / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("not ours")
    for name in ("a\nb", "a\x1b]0;c", "d\u00e4$"):
        (state / name).write_text("")
    (state / "link").symlink_to(elsewhere)
    os.mkfifo(state / "fifo")
    said = installation.run("postrm", "purge")
    for name in ("a\\nb", "a\\033]0;c", "d\\303\\244$", "link", "fifo"):
        assert f"dps-agent: deleted: /var/lib/private/dps-agent/{name}\n" in said
    assert said.isprintable() or said.replace("\n", "").isprintable()
    assert not state.exists() and (elsewhere / "kept").read_text() == "not ours"


def test_a_purge_leaves_the_record_to_the_other_variant(installation: Installation) -> None:
    (installation.root / "usr/bin/dps-agent").touch()
    (installation.root / "var/lib/dps-agent").mkdir()
    assert installation.run("postrm", "purge") == ""
    assert (installation.root / "var/lib/dps-agent").is_dir()


def test_removal_needs_no_python_and_leaves_no_compiled_files(installation: Installation) -> None:
    site = installation.root / "usr/lib/dps-agent"
    (site / "dps_agent/__pycache__").mkdir(parents=True)
    (site / "dps_agent/__pycache__/session.cpython-311.pyc").touch()
    (site / "dps_agent/session.py").touch()
    installation.stub("py3clean", "exit 127")
    installation.run("prerm", "remove")
    assert installation.called("deb-systemd-invoke") == ["stop dps-agent.service"]
    assert [path.name for path in (site / "dps_agent").iterdir()] == ["session.py"]


def test_the_unit_has_the_kernel_know_every_class_of_devices_that_it_allows() -> None:
    unit = (SERVICE / "dps-agent.service").read_text()
    classes = re.findall(r"^DeviceAllow=char-(\w+)", unit, re.M)
    assert classes == ["tpm"]
    for name in classes:  # a class is looked up once, in /proc/devices, when the service starts
        for key in ("Wants", "After"):
            assert re.search(rf"^{key}=.*\bmodprobe@{name}\.service\b", unit, re.M), f"{key}=modprobe@{name}.service"


def test_the_program_uses_its_own_packages_whatever_else_is_installed(full: Path, tmp_path: Path) -> None:
    rogue = tmp_path / "rogue"
    rogue.mkdir()
    for name in ("ujson", "dps_agent", "argparse"):
        (rogue / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    launcher = (full / "usr/bin/dps-agent").read_text()
    assert launcher.startswith("#!/usr/bin/python3 -IS\n")
    program = rogue / "dps-agent"
    program.write_text(launcher.replace('"/usr/lib/dps-agent"', f'"{full}/usr/lib/dps-agent"'))
    program.chmod(0o755)
    done = subprocess.run(
        [program, "version"],
        cwd=rogue,
        env={"PYTHONPATH": str(rogue), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0 and "not installed" not in done.stdout, done.stdout + done.stderr


def test_every_package_that_comes_along_has_its_licence_in_the_copyright_file(full: Path) -> None:
    text = (full / "usr/share/doc/dps-agent/copyright").read_text()
    for information in (full / "usr/lib/dps-agent").glob("*.dist-info"):
        name = HeaderParser().parsestr((information / "METADATA").read_text())["Name"]
        module = {"paho-mqtt": "paho", "tpm2-pytss": "tpm2_pytss", "dps-agent": "*"}.get(name, name)
        assert re.search(rf"^Files:.*{re.escape(module)}", text, re.M), name


def test_the_manual_has_every_verb_option_setting_exit_status_and_code(light: Path) -> None:
    roff = gzip.decompress((light / "usr/share/man/man8/dps-agent.8.gz").read_bytes()).decode()
    text = roff.replace("\\-", "-").replace("\\fB", "").replace("\\fR", "").replace("\\&", "")
    lines = text.splitlines()
    assert {f".SS {verb}" for verb in VERBS} <= set(lines)
    assert {f".B {key}" for key in KEYS} <= set(lines)
    assert {environment_name(key) for key in KEYS} <= set(lines)
    assert {f".B {code}" for code in REMEDIES} <= set(lines)
    assert {f".B {status}" for status in range(len(EXIT_GROUPS))} <= set(lines)
    for option in ("--config", "--set", "--json", "--force", "--timeout", "--format", "--offline", "--only", "--yes"):
        assert re.search(rf"^{option}\b|, {option}\b", text, re.M), option
    assert "%(" not in text, "a default that was not filled in"
    macros = {line.split()[0] for line in roff.splitlines() if line.startswith((".", "'"))}
    assert macros <= {".TH", ".SH", ".SS", ".TP", ".PP", ".B", ".BR", ".I", ".RS", ".RE", ".nf", ".fi", ".br"}, macros


def test_the_same_commit_gives_the_same_bytes(built: dict[str, Path], tmp_path: Path) -> None:
    # What is compiled anew, by another user, `tools/release` compares.
    again = build(tmp_path / "out", "--deb", "--light", SOURCE_DATE_EPOCH=EPOCH_S)
    assert len(again) == 2
    for path in again:
        first = next(other for other in built.values() if other.name == path.name)
        assert first.read_bytes() == path.read_bytes(), path.name


def test_versions_sort_in_debian_as_they_do_in_python() -> None:
    ordered = ["0.2.0.dev1", "0.2.0a1", "0.2.0rc1", "0.2.0", "0.2.1.dev3", "0.2.1", "0.10.0"]
    for older, newer in itertools.pairwise(debian_version(version, "1") for version in ordered):
        done = subprocess.run(["dpkg", "--compare-versions", older, "lt", newer], check=False, timeout=60)
        assert done.returncode == 0, f"{older} should be older than {newer}"


@pytest.mark.parametrize("words", [("--nonsense",), ("--revision",)])
def test_a_wrong_command_line_is_refused(words: tuple[str, ...]) -> None:
    done = subprocess.run(
        [CHECKOUT / "tools/package", "--light", *words], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 2 and "usage" in done.stderr, done.stderr


def test_who_is_not_root_learns_that_other_processors_can_not_be_tried(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(foreign, "build", lambda _: pytest.fail("nothing is built for it"))
    assert foreign.main() == 2
    assert "takes root" in capsys.readouterr().err
