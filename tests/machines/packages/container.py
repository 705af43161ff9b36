"""A Debian system of its own, booted in a container on this machine: systemd, dpkg, journal, no TPM, this network."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from dps_package.distributions import BuildFailed, run

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

BOOT_DEADLINE_S = 60
STOP_DEADLINE_S = 20
COMMAND_DEADLINE_S = 180
SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
SYSTEM_PACKAGES = ("systemd-sysv", "dbus", "python3", "python3-ujson", "man-db")
ENDS_WITH_US = ("setpriv", "--pdeathsig", "TERM")
_RUNNING = ("running", "degraded")


class Unavailable(Exception):
    """This machine cannot run such a container; the text says why."""


class CommandFailed(Exception):
    """A command in the container did not end as expected; the text has its output."""


def system_archive(packages: Sequence[str]) -> Path:
    """A tar file of this distribution's release with these packages installed; made once, from this machine's sources.

    Takes minutes the first time; `packages` may hold what is installed anyway.
    """
    sources = apt_sources()
    wanted = ",".join(sorted({*SYSTEM_PACKAGES, *packages}))
    name = hashlib.sha256(f"{wanted}\n{sources}".encode()).hexdigest()[:12]
    cache = Path(sys.prefix).parent
    archive = cache / f"package-root-{name}.tar"
    if not archive.is_file():
        print(f"making {archive.name}: downloads a small system, once", flush=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="package-root-") as folder:
            listed, made = Path(folder) / "sources.list", Path(folder) / "root.tar"
            listed.write_text(sources)
            # What it mounts nobody else sees: a program that looks through all folders would keep it from ending.
            alone = ["unshare", "--mount"] if os.geteuid() == 0 else []
            command = [*alone, "mmdebstrap", "--quiet", "--variant=minbase", f"--include={wanted}", codename()]
            try:
                run([*command, str(made), str(listed)], {**os.environ, "PATH": SYSTEM_PATH, "TMPDIR": folder})
            except BuildFailed as error:
                raise Unavailable(str(error)) from error
            for older in cache.glob("package-root-*.tar"):
                older.unlink()
            made.rename(archive)
    return archive


def codename() -> str:
    text = Path("/etc/os-release").read_text()
    found = re.search(r"^VERSION_CODENAME=(\w+)$", text, re.M)
    if found is None:
        raise Unavailable("this release of the distribution has no name in /etc/os-release")
    return found[1]


def apt_sources() -> str:
    """This machine's own sources of its release, as lines of sources.list, without those of other projects."""
    fields = "$(ORIGIN)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)|$(SIGNED_BY)"
    targets = run(["apt-get", "indextargets", "--format", fields, "Created-By: Packages"]).splitlines()
    keyrings = {
        "Debian": "/usr/share/keyrings/debian-archive-keyring.gpg",
        "Ubuntu": "/usr/share/keyrings/ubuntu-archive-keyring.gpg",
    }
    lines: set[str] = set()
    for target in targets:
        origin, address, release, component, _ = target.split("|")
        if origin in keyrings and release.startswith(codename()):
            lines.add(f"deb [signed-by={keyrings[origin]}] {address} {release} {component}\n")
    if not lines:
        raise Unavailable("apt knows no sources of this release; run apt-get update")
    return "".join(sorted(lines))


class Container:
    """One system, from an archive, booted and gone with the `with` block; prints what is run in it."""

    def __init__(self, archive: Path) -> None:
        if os.geteuid() != 0:
            raise Unavailable("a container with a systemd of its own needs root")
        self._archive = archive
        self._folder = Path(tempfile.mkdtemp(prefix="dps-package-root-", dir="/var/tmp"))
        self.root = self._folder / "root"
        self._process: subprocess.Popen[bytes] | None = None
        self._leader = ""

    def boot(self) -> None:
        """Boots and waits until systemd has started everything; Unavailable where it cannot."""
        options = ["--quiet", "--boot", "--register=no", "--console=pipe", f"--directory={self.root}"]
        if not Path("/run/systemd/system").is_dir():
            options.append("--keep-unit")  # there is no systemd that could make one
        log = self._folder / "console.log"
        with log.open("ab") as console:
            self._process = process = subprocess.Popen(
                [*ENDS_WITH_US, "systemd-nspawn", *options], stdin=subprocess.DEVNULL, stdout=console, stderr=console
            )
        until_s = time.monotonic() + BOOT_DEADLINE_S
        state = ""
        while time.monotonic() < until_s and process.poll() is None:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            with contextlib.suppress(OSError):
                self._leader = children.read_text().strip()
            if self._leader:
                state = self._status("systemctl is-system-running")[1].strip()
                if state in _RUNNING:
                    return
            time.sleep(0.1)
        raise Unavailable(f"systemd did not start in a container ({state or 'no state'}): {log.read_text()[-2000:]}")

    def power_off(self) -> None:
        """Shuts the system down; its files stay."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._status("systemctl poweroff")
        try:
            self._process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def run(self, command: str, status: int = 0, shown: bool = True) -> str:
        """Runs a shell command as root and returns its output, both streams; CommandFailed for another exit status."""
        if shown:
            print(f"# {command}", flush=True)
        found, output = self._status(command)
        if shown:
            for line in output.splitlines():
                print(f"  {line}", flush=True)
        if found != status:
            raise CommandFailed(f"{'' if shown else output}exit status {found}, expected {status}: {command}")
        return output

    def _status(self, command: str) -> tuple[int, str]:
        enter = ["nsenter", "-t", self._leader, "-m", "-u", "-i", "-p", "-r", "-w"]
        plain = {"PATH": SYSTEM_PATH, "LANG": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive", "HOME": "/root"}
        try:
            done = subprocess.run(
                [*enter, "sh", "-c", command],
                env=plain,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=COMMAND_DEADLINE_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise CommandFailed(f"did not end within {COMMAND_DEADLINE_S} s: {command}") from None
        return done.returncode, done.stdout

    def __enter__(self) -> Container:
        try:
            self.root.mkdir()
            run(["tar", "-xf", str(self._archive), "-C", str(self.root)])
            self.boot()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        self.power_off()
        shutil.rmtree(self._folder, ignore_errors=True)
