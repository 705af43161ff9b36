"""The life of the Debian packages on a system with systemd: each claim is a step, the output is the transcript."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from machines.packages.container import CommandFailed, Container
from machines.packages.repository import ADDING, GOING_BACK, UPGRADING, Repository, altered
from support.cloud.emulator import EmulatorProcess
from support.tpm.swtpm import ENDORSEMENT, OWNER, Swtpm

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ID_SCOPE = "0ne00FAC708"
CONNECT_DEADLINE_S = 60
STATE = "/var/lib/private/dps-agent"
RECORD = f"{STATE}/identity.0 {STATE}/identity.1"
APT = "apt-get -q -y -o Dpkg::Use-Pty=0"
UNIT_STATE = "systemctl show dps-agent -p ActiveState,UnitFileState,Result | sort | paste -sd' '"


class Machine:
    """A container with a TPM and the emulator on this machine beside it."""

    def __init__(self, container: Container, emulator: EmulatorProcess, tpm: Swtpm) -> None:
        self.container = container
        self.emulator = emulator
        self.tpm = tpm
        self._settings = (
            f'endpoint = "{emulator.url}"\nca_file = "/etc/dps-agent/test-ca.pem"\n'
            f'[tpm]\ntcti = "{tpm.tcti}"\n'
            f'[hub]\nconnect_to = "{emulator.hub_connect_to}"\nca_file = "/etc/dps-agent/test-ca.pem"\n'
        )
        self.run = container.run

    def install(self, package: Path) -> str:
        """apt-get install of a file, as users do it."""
        shutil.copy(package, self.container.root / "var/tmp" / package.name)
        return self.run(f"{APT} install /var/tmp/{package.name}")

    def configure(self) -> None:
        """What an operator does: the ID scope; and where this emulator and this TPM are."""
        folder = self.container.root / "etc/dps-agent"
        (folder / "config.d").mkdir(parents=True, exist_ok=True)
        shutil.copy(self.emulator.ca_file, folder / "test-ca.pem")
        (folder / "config.d/50-test.toml").write_text(self._settings)
        self.run(f"""echo 'id_scope = "{ID_SCOPE}"' > /etc/dps-agent/config.d/10-scope.toml""")

    def follow(self, commands: list[str], status: int = 0) -> str:
        """What a page has root type, in a folder with the repository's key; the last line's exit status is `status`."""
        *before, last = commands
        for command in before:
            self.run(f"cd /var/tmp && {command}")
        return self.run(f"cd /var/tmp && {last}", status)

    def version_of(self, package: str) -> str:
        """The version of a package that is installed."""
        return self.run(f"dpkg-query -W -f '${{Version}}' {package}", shown=False)

    def drop_in(self, name: str, *lines: str) -> None:
        """What `systemctl edit dps-agent` makes."""
        folder = self.container.root / "etc/systemd/system/dps-agent.service.d"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.conf").write_text("".join(f"{line}\n" for line in ("[Service]", *lines)))
        self.run(f"systemctl daemon-reload; systemctl cat dps-agent | tail -n {len(lines)}")

    def process(self) -> str:
        """The number of the service's process."""
        return self.run("systemctl show dps-agent -p MainPID --value", shown=False)

    def enrol(self) -> None:
        """Takes the device's line to the emulator, as a factory does."""
        import_enrolment(self.run("dps-agent enroll --format csv"), self.emulator.state_dir)

    def status(self) -> dict[str, Any]:
        """`dps-agent status --json`."""
        document: dict[str, Any] = json.loads(self.run("dps-agent status --json || true", shown=False))
        return document

    def await_connected(self) -> None:
        """Waits until the service is at its hub, and shows what its operator sees."""
        until_s = time.monotonic() + CONNECT_DEADLINE_S
        while (found := self.status()).get("state") != "connected":
            if time.monotonic() > until_s:
                self.run("journalctl -u dps-agent --no-pager -n 40")
                raise CommandFailed(f"not connected after {CONNECT_DEADLINE_S} s: {found}")
            time.sleep(0.2)
        self.run("systemctl show dps-agent -p StatusText --value; dps-agent status")

    def settled_record(self) -> str:
        """Digests of both copies, once the older one is erased: a while after the hub has taken the newer one."""
        content = f"for copy in {RECORD}; do tr -d '\\000\\377' < $copy | wc -c; done"  # an erased copy has none
        until_s = time.monotonic() + CONNECT_DEADLINE_S
        while "0" not in self.run(content, shown=False).split():
            if time.monotonic() > until_s:
                raise CommandFailed(f"the older copy is still there after {CONNECT_DEADLINE_S} s")
            time.sleep(0.5)
        return self.run(f"sha256sum {RECORD}")

    def registrations(self) -> int:
        """How many registrations the emulator's DPS has accepted."""
        return sum(line.operation == "register" and line.status == 202 for line in self.emulator.log)


def import_enrolment(lines: str, state_dir: Path) -> None:
    """Enrols the devices of a CSV file with the emulator that keeps its state there."""
    words = [sys.executable, "-m", "dps_emulator.cli", "enroll-import", "-", "--state-dir", str(state_dir)]
    done = subprocess.run(words, input=lines, text=True, capture_output=True, check=False, timeout=60)
    if done.returncode != 0:
        raise CommandFailed(f"enroll-import: {done.stderr}")


def claim(text: str, holds: bool, found: object = "") -> None:
    """Prints a claim that holds; CommandFailed where it does not."""
    if not holds:
        raise CommandFailed(f"not so: {text}" + (f"; found: {found}" if found != "" else ""))
    print(f"  ✓ {text}", flush=True)


@contextlib.contextmanager
def machine(archive: Path, folder: Path) -> Iterator[Machine]:
    """A booted system, an emulator and a TPM, for as long as the block lasts."""
    with (
        EmulatorProcess("--id-scope", ID_SCOPE, "--retry-after", "1") as emulator,
        Swtpm(folder) as tpm,
        Container(archive) as container,
    ):
        yield Machine(container, emulator, tpm)


def live_full(device: Machine, package: Path, newer: Path) -> None:
    """The life of dps-agent: install, configure, run, register by hand, upgrade, remove, install again, purge."""
    title("install: nothing starts before there is an ID scope")
    device.run("systemctl is-system-running")
    device.install(package)
    state = device.run(UNIT_STATE)
    quiet = "ActiveState=inactive Result=success UnitFileState=disabled"
    claim("the service is neither enabled nor started, and has not failed", state.strip() == quiet, state)
    device.run("getent group dps-agent-clients tss")
    device.run("dps-agent version; dps-agent config validate", status=6)
    manual = device.run("man -P cat dps-agent | sed -n 1,14p")
    claim("man dps-agent shows its page", "DPS-AGENT(8)" in manual)
    found = device.run("systemctl start dps-agent; systemctl show dps-agent -p ExecMainStatus,ActiveState")
    claim("started all the same, it fails at once, as unconfigured", "ExecMainStatus=6" in found, found)
    device.run("systemctl reset-failed dps-agent")

    title("configure, enrol, start")
    device.configure()
    device.enrol()
    device.run("systemctl enable --now dps-agent")
    device.await_connected()
    claim("one registration", device.registrations() == 1, device.registrations())
    nobody = "setpriv --reuid=nobody --regid=nogroup --clear-groups env HOME=/nonexistent"
    found = device.run(f"{nobody} dps-agent status | head -n 1")
    claim("a user without any rights sees the same", "connected" in found, found)
    member = "setpriv --reuid=nobody --regid=nogroup --groups=dps-agent-clients /usr/bin/python3 -c"
    program = 'from dps_agent.client import Client; Client().send(b"1"); print("sent")'
    found = device.run(f"{member} '{program}'")
    claim("a program in the group dps-agent-clients sends telemetry", "sent" in found, found)
    explained = device.run("journalctl -xu dps-agent --no-pager | grep -A 7 'connected to'")
    claim("the journal explains the line (journalctl -x)", "Defined-By: dps-agent" in explained)
    fields = device.run("journalctl DPS_EVENT=connected -o verbose --no-pager | grep -E ' (DPS_|MESSAGE_ID)'")
    claim("its fields can be searched", "DPS_HUB=emulator.azure-devices.net" in fields)
    device.run(f"stat -c '%U:%G %a %n' {STATE} /run/dps-agent/* /etc/dps-agent /etc/dps-agent/config.toml")
    owners = device.run(f"stat -c '%u %a %n' {STATE} {STATE}/*")

    title("stop; register by hand as root; start")
    device.run("systemctl stop dps-agent && dps-agent provision --force && systemctl start dps-agent")
    device.await_connected()
    claim("two registrations", device.registrations() == 2, device.registrations())
    found = device.run(f"stat -c '%u %a %n' {STATE} {STATE}/*")
    claim("owners and modes are as before", found == owners, found)
    record = device.settled_record()

    title("upgrade of a service that somebody disabled: it stays so")
    device.run("systemctl disable --now dps-agent")
    device.run(f"dpkg -i /var/tmp/{package.name}")
    state = device.run(UNIT_STATE)
    claim("inactive and disabled", state.strip() == quiet, state)
    device.run("systemctl enable --now dps-agent")
    device.await_connected()

    title("upgrade: settings and record are kept, the service runs anew")
    before = device.process()
    device.run("echo '# mine' >> /etc/dps-agent/config.toml")
    device.install(newer)
    device.await_connected()
    device.run("tail -n 1 /etc/dps-agent/config.toml | grep -x '# mine'")
    claim("another process", device.process() != before)
    claim("the same record", device.run(f"sha256sum {RECORD}", shown=False) == record)
    claim("DPS was not asked", device.registrations() == 2)

    title("reload; reboot")
    before = device.process()
    device.run("systemctl reload dps-agent && sleep 1 && journalctl -u dps-agent --no-pager -o cat -n 3")
    claim("the same process", device.process() == before)
    device.container.power_off()
    device.container.boot()
    device.await_connected()
    claim("after a boot it connects by itself, and DPS was not asked", device.registrations() == 2)

    title("remove: settings and record are kept")
    device.run(f"{APT} remove dps-agent")
    failed = device.run("systemctl list-units --failed --no-legend")
    claim("no unit has failed", not failed.strip(), failed)
    device.run("test ! -e /usr/bin/dps-agent && test ! -e /usr/lib/dps-agent")
    claim("the same record", device.run(f"sha256sum {RECORD}", shown=False) == record)
    device.install(newer)
    device.await_connected()
    claim("installed again it connects by itself, and DPS was not asked", device.registrations() == 2)

    title("purge: what was deleted is said, nothing else is left")
    said = device.run(f"{APT} purge dps-agent")
    claim("it names the record", f"deleted: {STATE}/identity.0" in said)
    device.run("rm -r /etc/dps-agent")  # the test's own files
    left = device.run("find /etc /run /usr /var/lib -xdev -name '*dps-agent*'")
    claim("no file is left", not left.strip(), left)

    title("settings that were there before the package, as on a prepared image")
    device.configure()
    device.install(newer)
    device.await_connected()
    claim("it was enabled and started, and registered", device.registrations() == 3, device.registrations())

    title("hierarchies with passwords: the service has them as credentials, root's commands from the files")
    device.run("systemctl stop dps-agent")
    passwords = {"owner": (OWNER, "hunter2 the owner's"), "endorsement": (ENDORSEMENT, "hunter3")}
    settings = "[tpm]\n"
    for name, (hierarchy, password) in passwords.items():
        device.tpm.set_hierarchy_auth(hierarchy, password.encode())
        path = f"/etc/dps-agent/{name}-auth"
        device.run(f"""umask 077; echo "{password}" > {path}""", shown=False)
        settings += f'{name}_auth_file = "{path}"\n'
    (device.container.root / "etc/dps-agent/config.d/60-passwords.toml").write_text(settings)
    device.drop_in("passwords", *(f"LoadCredential={name}-auth:/etc/dps-agent/{name}-auth" for name in passwords))
    device.run("dps-agent check --offline")
    device.run("dps-agent provision --force && systemctl start dps-agent")
    device.await_connected()
    device.run("dps-agent provision --force")
    device.await_connected()
    claim("root has registered, then the service", device.registrations() == 5, device.registrations())

    title("purge where the state folder is a mount point")
    device.run(f"systemctl stop dps-agent; mount --bind {STATE} {STATE}")
    said = device.run(f"{APT} purge dps-agent")
    claim("it names the record", f"deleted: {STATE}/identity.0" in said)
    claim("and the folder that it keeps", f"kept: {STATE}, " in said)
    claim("the folder is empty", not device.run(f"ls -A {STATE}").strip())


def live_light(device: Machine, releases: Repository, package: Path, newer: Path, full: Path) -> None:
    """The life of dps-agent-light from a repository: install, upgrade, downgrade; then dps-agent takes over from it."""
    old, new = (path.name.split("_")[1] for path in (package, newer))
    releases.add(package)

    title("dps-agent-light: a repository is added as the page says, install, configure, enrol")
    # What the packages need is installed; the archives of the distribution are not asked.
    device.run("rm -f /etc/apt/sources.list /etc/apt/sources.list.d/*")
    quiet = 'APT::Get::Assume-Yes "true";\nquiet "1";\nDpkg::Use-Pty "0";\nAPT::Update::Error-Mode "any";\n'
    (device.container.root / "etc/apt/apt.conf.d/90test").write_text(quiet)
    shutil.copy(releases.public_key, device.container.root / "var/tmp" / releases.public_key.name)
    device.follow(releases.commands(ADDING))
    claim("the first release", device.version_of("dps-agent-light") == old)
    device.configure()
    found = device.run("dps-agent config show | grep backend; dps-agent version")
    claim("the TPM back end is wire", 'backend = "wire"' in found)
    missing = [line.split()[0] for line in found.splitlines() if line.endswith("not installed")]
    claim("there is neither tpm2-pytss nor cryptography", {"tpm2-pytss", "cryptography"} <= set(missing))
    device.enrol()

    title("root registers before the service ever ran")
    device.run("dps-agent provision")
    device.run("systemctl enable --now dps-agent")
    device.await_connected()
    claim("one registration", device.registrations() == 1, device.registrations())
    record = device.settled_record()

    title("upgrade where only the unit's environment has the ID scope")
    device.run("rm /etc/dps-agent/config.d/10-scope.toml")
    device.drop_in("scope", f"Environment=DPS_AGENT_ID_SCOPE={ID_SCOPE}")
    device.run("systemctl restart dps-agent")
    device.await_connected()
    before = device.process()
    releases.add(newer)
    device.follow(releases.commands(UPGRADING))
    device.await_connected()
    claim("the second release", device.version_of("dps-agent-light") == new)
    claim("another process", device.process() != before)
    claim("the same record", device.run(f"sha256sum {RECORD}", shown=False) == record)

    title("downgrade")
    device.follow(releases.commands(GOING_BACK, old))
    device.await_connected()
    claim("the first release", device.version_of("dps-agent-light") == old)
    claim("the same record", device.run(f"sha256sum {RECORD}", shown=False) == record)

    title("a package that was altered on the server is refused, and one that is whole is taken")
    device.run("apt-get clean")
    altered(releases.folder / newer.name)
    said = device.follow(releases.commands(UPGRADING), status=100)
    claim("apt says why", "Hash Sum mismatch" in said)
    claim("the first release stays, and runs", device.version_of("dps-agent-light") == old)
    device.await_connected()
    shutil.copyfile(newer, releases.folder / newer.name)
    device.follow(releases.commands(UPGRADING))
    device.await_connected()
    claim("the second release", device.version_of("dps-agent-light") == new)

    title("a repository whose signed text was altered is refused")
    release = releases.folder / "InRelease"
    release.write_bytes(release.read_bytes().replace(b"Origin: dps-agent", b"Origin: somebody"))
    said = device.run("apt-get update", status=100)
    claim("apt says why", "signature" in said)
    claim("one registration, all the while", device.registrations() == 1, device.registrations())

    title("a setting of the operator's comes before the package's default")
    device.run("printf '[tpm]\\nbackend = \"esys\"\\n' > /etc/dps-agent/config.d/00-mine.toml")
    claim("esys", 'backend = "esys"' in device.run("dps-agent config show | grep backend"))
    device.run("rm /etc/dps-agent/config.d/00-mine.toml")

    title("dps-agent takes over settings and record")
    device.install(full)
    device.await_connected()
    device.run(f"{APT} purge dps-agent-light")
    kept = device.run(f"sha256sum {RECORD}", shown=False)
    claim("purging the other package has not deleted the record", kept == record)
    found = device.run("dps-agent config show | grep backend")
    claim("tpm2-tss uses the key that wire made", 'backend = "esys"' in found)
    claim("DPS was not asked", device.registrations() == 1)


def title(text: str) -> None:
    """Prints the heading of some steps."""
    print(f"\n== {text}", flush=True)
