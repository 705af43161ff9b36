"""What is done to the device, in order, and what must be true afterwards: it has reached its hub again.

A trial is a function of a `Bench`; it returns what is worth a line in the table, raises `VmError` where the device
failed and `Skipped` where it can't be tried here.
"""

import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from machines.vm.cloud import ID_SCOPE, Cloud
from machines.vm.image import STATE_DISK_MOUNT
from machines.vm.machine import Machine, VmError

EXPOSURE_LIMIT = 1.5
REACH_DEADLINE_S = 300
START_DEADLINE_S = 120
WATCHDOG_DEADLINE_S = 180
REGISTRATION_DEADLINE_S = 180
KEEP_ALIVE_S = 30  # the least that the settings allow: a pulled cable is noticed soon
OWNER_PASSWORD = "vm-owner-0815"
ENDORSEMENT_PASSWORD = "vm-endorsement-4711"
DAY_S = 86_400
WRONG_CLOCK_S = 45
STALL_S = 45
STOP_LIMIT_S = 10
STATE = f"{STATE_DISK_MOUNT}/dps-agent"
TPM_DEVICE = "MSFT0101:00"
TPM_DRIVERS = {"tpm-tis": "/sys/bus/platform/drivers/tpm_tis", "tpm-crb": "/sys/bus/acpi/drivers/tpm_crb"}
MEMBER, STRANGER = 4242, 4243  # user ids that nobody has
SETTINGS = f"""\
id_scope = "{ID_SCOPE}"
endpoint = "https://localhost:{{port}}"
connect_to = "10.0.2.2:{{port}}"
ca_file = "/etc/dps-agent/ca.pem"
[hub]
connect_to = "10.0.2.2:{{hub_port}}"
ca_file = "/etc/dps-agent/ca.pem"
keep_alive_s = {KEEP_ALIVE_S}
"""
CREDENTIALS = """\
[tpm]
owner_auth_file = "/etc/dps-agent/owner-auth"
endorsement_auth_file = "/etc/dps-agent/endorsement-auth"
"""


class Skipped(Exception):
    """A trial cannot be done on this machine; the text says why."""


class Trial(NamedTuple):
    """One line of the table."""

    name: str
    run: Callable[["Bench"], str]
    anew: bool = False  # begins with a start of the service


class Bench:
    """The device, the cloud, and what has been measured."""

    def __init__(self, machine: Machine, cloud: Cloud, package_bytes: int, cuts: int, seed: int) -> None:
        self.machine = machine
        self.cloud = cloud
        self.package_bytes = package_bytes
        self.cuts = cuts
        self.seed = seed
        self.measured: dict[str, Any] = {}
        self._texts = 0

    # The device.

    def reach(self, deadline_s: float = REACH_DEADLINE_S) -> float:
        """Seconds until telemetry of now has arrived at the hub that DPS assigned; VmError if it does not."""
        self._texts += 1
        text = f"reading {self._texts}"

        def arrived() -> bool:
            return self.machine.post("/telemetry", text).status == 200 and self.cloud.has_message(text)

        seconds = self.machine.wait_until("telemetry reaches the hub", arrived, deadline_s)
        if not self.cloud.connected_hub():
            raise VmError("the hub has the telemetry, yet knows no connected device")
        return seconds

    def start_anew(self) -> None:
        """Ends the service in order and starts it: its waits are then those of a device that had no trouble lately."""
        self.machine.check("systemctl restart dps-agent", START_DEADLINE_S)
        self.reach()

    def register_again(self) -> None:
        """Makes the running service register, without waiting for it."""
        self.machine.post("/command/provision?force=true", wait=False)

    def re_register(self, deadline_s: float = REGISTRATION_DEADLINE_S) -> float:
        """Makes the running service register; seconds until it is at its new hub."""
        before = self.cloud.connected_hub()
        self.register_again()

        def moved() -> bool:
            return self.cloud.connected_hub() not in ("", before)

        return self.machine.wait_until("the device is at the hub of its new registration", moved, deadline_s)

    def property(self, name: str) -> str:
        """A property of the unit, as systemd has it."""
        return self.machine.check(f"systemctl show -P {name} dps-agent").strip()

    def mark(self) -> str:
        """Where the guest's journal ends now; its clock says nothing, for it jumps."""
        return self.machine.check("journalctl -q -n 1 -o json --output-fields=_ --no-pager | tail -n 1").strip()

    def journal(self, since: str = "") -> list[dict[str, Any]]:
        """The agent's own lines with all their fields, since a `mark`."""
        after = f"--after-cursor='{json.loads(since)['__CURSOR']}'" if since else ""
        text = self.machine.check(f"journalctl -q -t dps-agent -o json --no-pager {after}")
        return [line for line in map(json.loads, text.splitlines()) if "DPS_EVENT" in line]

    def codes(self, since: str, area: str) -> list[str]:
        """The error codes of an area in the journal since, `area` being `tpm.` or the like."""
        codes = [line.get("DPS_CODE", "") for line in self.journal(since)]
        return [code for code in codes if code and code.startswith(area)]

    def wait_for_event(self, event: str, since: str, deadline_s: float) -> dict[str, Any]:
        """The first line of this event since; VmError if it does not come."""
        found: list[dict[str, Any]] = []

        def written() -> bool:
            found.extend(line for line in self.journal(since) if line["DPS_EVENT"] == event)
            return bool(found)

        self.machine.wait_until(f"the journal has a line of the event '{event}'", written, deadline_s, 1)
        return found[0]

    def drop_in(self, name: str, lines: str) -> None:
        """Changes the unit by a file of its own; `lines` empty: takes it away."""
        folder = "/etc/systemd/system/dps-agent.service.d"
        if lines:
            self.machine.check(f"mkdir -p {folder} && printf '[Service]\\n{lines}\\n' > {folder}/{name}.conf")
        else:
            self.machine.check(f"rm -f {folder}/{name}.conf")
        self.machine.check("systemctl daemon-reload && systemctl restart dps-agent", START_DEADLINE_S)

    def main_pid(self) -> int:
        """The service's process."""
        return int(self.property("MainPID"))

    def bind_tpm(self, bind: bool) -> None:
        """Gives the TPM to its driver in the guest's kernel, or takes it away."""
        model = self.measured["tpmModel"]
        verb = "bind" if bind else "unbind"
        self.machine.check(f"echo {TPM_DEVICE} > {TPM_DRIVERS[model]}/{verb} && udevadm settle")


def require(condition: object, text: str) -> None:
    """VmError with this text unless the condition holds."""
    if not condition:
        raise VmError(text)


# Setting up.


def boot(bench: Bench) -> str:
    """The kernel's own driver serves the TPM, and nothing but translated code runs."""
    seconds = bench.machine.boot()
    require(bench.machine.qmp("query-kvm")["enabled"] is False, "QEMU uses KVM")
    driver = bench.machine.check("basename $(readlink /sys/class/tpm/tpm0/device/driver)").strip()
    require(driver in ("tpm_tis", "tpm_crb"), f"the TPM's driver is {driver!r}")
    node = bench.machine.check("stat -c '%F %a %U:%G' /dev/tpmrm0").strip()
    require(node == "character special file 660 tss:tss", f"/dev/tpmrm0 is: {node}")
    bench.machine.check(f"chmod 700 {STATE_DISK_MOUNT}")  # as systemd demands; a new disk's first folder is open
    bench.measured["bootS"] = round(seconds, 1)
    kernel = bench.machine.check("uname -r").strip()
    systemd = bench.machine.check("systemctl --version").split()[1]
    bench.measured |= {"kernel": kernel, "systemd": systemd, "driver": driver}
    return f"Linux {kernel}, systemd {systemd}, {driver}, /dev/tpmrm0 {node.partition('file ')[2]}"


def install(bench: Bench) -> str:
    """The package installs, and the unit waits for an ID scope."""
    machine = bench.machine
    machine.check(f"head -c {bench.package_bytes} /dev/vdc > /var/tmp/dps-agent.deb", 120)
    started_s = time.monotonic()
    machine.check("dpkg -i /var/tmp/dps-agent.deb && rm /var/tmp/dps-agent.deb", 600)
    seconds = time.monotonic() - started_s
    require(machine.run("systemctl is-active dps-agent").status != 0, "the service runs without any settings")
    verified = machine.run("systemd-analyze verify --man=no /usr/lib/systemd/system/dps-agent.service", 120)
    complaints = [line for line in verified.output.splitlines() if "dps-agent" in line]
    require(not complaints, f"systemd-analyze verify: {complaints}")
    settings = SETTINGS.format(port=bench.cloud.port, hub_port=bench.cloud.hub_port)
    for path, text in {
        "/etc/dps-agent/ca.pem": bench.cloud.ca_file.read_text(),
        "/etc/dps-agent/config.d/50-vm.toml": settings,
    }.items():
        machine.check(f"cat > {path} <<'END'\n{text}END\n")
    machine.check("dps-agent config validate", 120)
    return f"{machine.check('dpkg-query -W dps-agent').split()[1]} in {seconds:.0f} s"


def credentials(bench: Bench) -> str:
    """Without the hierarchies' passwords the service says so and lives on; LoadCredential gives it them."""
    machine = bench.machine
    for hierarchy, password in (("o", OWNER_PASSWORD), ("e", ENDORSEMENT_PASSWORD)):
        machine.check(f"tpm2_changeauth -T device:/dev/tpmrm0 -c {hierarchy} {password}")
    since = bench.mark()
    machine.check("systemctl enable --now dps-agent", START_DEADLINE_S)
    halted = bench.wait_for_event("halted", since, START_DEADLINE_S)
    require(halted["DPS_CODE"] == "tpm.hierarchy_auth", f"expected tpm.hierarchy_auth, came {halted['DPS_CODE']}")
    for name, password in (("owner-auth", OWNER_PASSWORD), ("endorsement-auth", ENDORSEMENT_PASSWORD)):
        machine.check(f"umask 077; printf %s {password} > /etc/dps-agent/{name}")
    machine.check(f"cat > /etc/dps-agent/config.d/60-credentials.toml <<'END'\n{CREDENTIALS}END\n")
    lines = [f"LoadCredential={name}:/etc/dps-agent/{name}" for name in ("owner-auth", "endorsement-auth")]
    bench.drop_in("credentials", "\\n".join(lines))
    return "tpm.hierarchy_auth without, past it with LoadCredential"


def refused(bench: Bench) -> str:
    """A device that is not enrolled stays alive and quiet, and registers when it is told to."""
    machine = bench.machine
    found: list[dict[str, Any]] = []

    def refused_by_dps() -> bool:
        found.extend(line for line in bench.journal() if line.get("DPS_CODE", "").startswith("dps."))
        return bool(found)

    machine.wait_until("DPS refuses the device", refused_by_dps, REGISTRATION_DEADLINE_S, 1)
    halted = found[0]
    require(halted["DPS_CODE"] == "dps.not_found", f"expected dps.not_found, came {halted['DPS_CODE']}")
    require(int(halted["DPS_RETRY_S"]) >= 1800, f"it asks again in {halted['DPS_RETRY_S']} s")
    require(halted["DPS_REQUEST_ID"], "the line has no request id")
    require(bench.property("ActiveState") == "active", "the refused service is not active")
    status = bench.property("StatusText")
    require(status.startswith("halted: ") and "until" in status, f"systemd's status is {status!r}")
    bench.cloud.enroll(machine.check("dps-agent enroll --format csv", 120))
    machine.check("systemctl reload dps-agent", START_DEADLINE_S)
    seconds = bench.reach()
    require(bench.property("NRestarts") == "0", "systemd had to start the service again")
    return (
        f"dps.not_found, asks again in {halted['DPS_RETRY_S']} s; enrolled and reloaded: at the hub in {seconds:.0f} s"
    )


# What the unit is.


def unit(bench: Bench) -> str:
    """A user of its own without rights, its folders, its groups, the socket's group."""
    machine = bench.machine
    for name, wanted in {
        "Type": "notify",
        "DynamicUser": "yes",
        "Result": "success",
        "WatchdogUSec": "30s",
        "User": "dps-agent",
        "Group": "dps-agent-clients",
    }.items():
        require(bench.property(name) == wanted, f"{name} is {bench.property(name)}, expected {wanted}")
    pid = bench.main_pid()
    status = dict(
        line.split(":\t", 1) for line in machine.check(f"cat /proc/{pid}/status").splitlines() if ":\t" in line
    )
    user = int(status["Uid"].split()[0])
    require(61184 <= user <= 65519, f"user {user} is no dynamic one")
    require(int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0, f"capabilities: {status['CapEff']}")
    require(status["NoNewPrivs"] == "1" and status["Seccomp"] == "2", "NoNewPrivs or Seccomp is off")
    groups = status["Groups"].split()
    tss = machine.check("getent group tss").split(":")[2]
    require(tss in groups, f"the groups are {groups}, without tss ({tss})")
    folder = machine.check(f"stat -c '%a %u' {STATE}; readlink /var/lib/dps-agent").split()
    require(folder == ["700", str(user), "private/dps-agent"], f"the state folder: {folder}")
    socket = machine.check("stat -c '%a %u:%G' /run/dps-agent/api.sock").split()
    require(socket == ["660", f"{user}:dps-agent-clients"], f"the socket: {socket}")
    clients = machine.check("getent group dps-agent-clients").split(":")[2]
    ask = (
        "import http.client,socket,sys;c=http.client.HTTPConnection('x');c.sock=socket.socket(socket.AF_UNIX);"
        "c.sock.connect('/run/dps-agent/api.sock');c.request(*sys.argv[1:]);print(c.getresponse().status)"
    )

    def asked_by(number: int, group: str, *request: str) -> str:
        words = f'setpriv --reuid {number} --regid {number} --groups {group} python3 -c "{ask}" {" ".join(request)}'
        return machine.run(words).output.strip().splitlines()[-1]

    said = asked_by(MEMBER, clients, "POST", "/telemetry", "hello")
    require(said == "200", f"a member of dps-agent-clients got: {said}")
    said = asked_by(MEMBER, clients, "POST", "/command/reset")
    require(said == "403", f"a member of dps-agent-clients may reset: {said}")
    said = asked_by(STRANGER, str(STRANGER), "GET", "/status")
    require("PermissionError" in said, f"a stranger got: {said}")
    peak_kib = int(status["VmHWM"].split()[0])
    bench.measured |= {"memoryPeakKiB": peak_kib, "memoryCurrentKiB": int(status["VmRSS"].split()[0])}
    bench.measured["threads"] = int(status["Threads"])
    return f"user {user} with tss, no capability, state 0700, socket 0660; VmHWM {peak_kib / 1024:.1f} MiB"


def exposure(bench: Bench) -> str:
    """`systemd-analyze security` with TPM and network at work."""
    text = bench.machine.check("systemd-analyze security --no-pager dps-agent.service", 120)
    found = re.search(r"Overall exposure level for dps-agent\.service: ([0-9.]+) (\w+)", text)
    require(found, f"no figure in: {text[-300:]}")
    assert found is not None
    bench.measured["exposure"] = figure = float(found[1])
    lines = [line.split() for line in text.splitlines()]
    bench.measured["exposed"] = [words[1] for words in lines if words[:1] == ["✗"]]
    require(figure <= EXPOSURE_LIMIT, f"exposure {figure}, at most {EXPOSURE_LIMIT} is wanted")
    bench.reach()
    return f"{figure} {found[2]}; left: {', '.join(bench.measured['exposed'])}"


def journal(bench: Bench) -> str:
    """Every line has its fields, and `journalctl -x` the remedy."""
    lines = bench.journal()
    catalogue = bench.machine.check("journalctl --list-catalog --no-pager")
    for line in lines:
        require(line["MESSAGE_ID"] in catalogue, f"no catalogue entry for: {line['MESSAGE']}")
        require(line.get("_SYSTEMD_UNIT") == "dps-agent.service", f"systemd does not know whose line this is: {line}")
    connected = [line for line in lines if line["DPS_EVENT"] == "connected"]
    require(connected and connected[-1]["DPS_HUB"] and connected[-1]["DPS_STATE"] == "connected", f"{connected}")
    explained = bench.machine.check("journalctl -q -x --no-pager DPS_CODE=tpm.hierarchy_auth -n 1")
    require("owner_auth_file" in explained.partition("\n")[2], f"journalctl -x gives no remedy:\n{explained}")
    named = Counter(line["DPS_EVENT"] for line in lines)
    return f"{len(lines)} lines, all with MESSAGE_ID and catalogue entry: {', '.join(sorted(named))}"


def denied(bench: Bench) -> str:
    """What the unit allows is what is needed: without the device or the group the service names what is missing."""
    for name, lines in {"DeviceAllow": "DeviceAllow=", "SupplementaryGroups": "SupplementaryGroups="}.items():
        since = bench.mark()
        bench.drop_in("less", lines)
        found = bench.wait_for_event("halted", since, START_DEADLINE_S)
        require(found["DPS_CODE"] == "tpm.denied", f"without {name}: {found['DPS_CODE']}: {found['MESSAGE']}")
        require(bench.property("ActiveState") == "active", f"without {name} the service is not active")
    bench.drop_in("less", "")
    return f"tpm.denied without DeviceAllow and without tss; with them at the hub in {bench.reach():.0f} s"


# What it survives.


def watchdog(bench: Bench) -> str:
    """A process that hangs is ended by systemd's watchdog and started again."""
    before, pid = int(bench.property("NRestarts")), bench.main_pid()
    bench.machine.check(f"kill -STOP {pid}")
    restarted = bench.machine.wait_until(
        "systemd starts the service again",
        lambda: int(bench.property("NRestarts")) > before and bench.main_pid() not in (0, pid),
        WATCHDOG_DEADLINE_S,
    )
    said = bench.machine.check("journalctl -q --no-pager -u dps-agent -n 200 -o cat")
    require("Watchdog timeout" in said, "it was not the watchdog that ended the service")
    return f"stopped; ended and started again after {restarted:.0f} s; at the hub after another {bench.reach():.0f} s"


def kill(bench: Bench) -> str:
    """SIGKILL."""
    before, pid = int(bench.property("NRestarts")), bench.main_pid()
    bench.machine.check(f"kill -KILL {pid}")
    bench.machine.wait_until(
        "systemd starts the service again", lambda: int(bench.property("NRestarts")) > before, START_DEADLINE_S
    )
    return f"at the hub after {bench.reach():.0f} s"


def stop(bench: Bench) -> str:
    """`systemctl stop` is quick and clean; started again the device connects without asking DPS."""
    started_s = time.monotonic()
    bench.machine.check("systemctl stop dps-agent", START_DEADLINE_S)
    seconds = time.monotonic() - started_s
    require(bench.property("Result") == "success", f"the result is {bench.property('Result')}")
    require(seconds < STOP_LIMIT_S, f"it took {seconds:.0f} s")
    mark = bench.cloud.log_size()
    bench.machine.check("systemctl start dps-agent", START_DEADLINE_S)
    reached_s = bench.reach()
    require(not bench.cloud.requests_since(mark), "DPS was asked, although the device has its hub")
    return f"stopped in {seconds:.1f} s; started: at the hub after {reached_s:.0f} s, DPS was not asked"


def _clock(bench: Bench, days: int) -> str:
    """A jump; the process lives on, and after a new connection and the right time all is well."""
    machine, pid = bench.machine, bench.main_pid()
    since = bench.mark()
    machine.check(f"date -s @{time.time() + days * DAY_S:.0f}")
    steady_s = bench.reach()
    bench.cloud.disconnect()
    try:
        with_wrong_clock = f"with the wrong clock connected anew after {bench.reach(WRONG_CLOCK_S):.0f} s"
    except VmError:
        with_wrong_clock = (
            f"with the wrong clock not within {WRONG_CLOCK_S} s ({', '.join(set(bench.codes(since, '')))})"
        )
    machine.check(f"date -s @{time.time():.3f}")
    reached_s = bench.reach()
    require(bench.main_pid() == pid, "the process ended")
    return f"same connection {steady_s:.0f} s; {with_wrong_clock}; right clock: at the hub after {reached_s:.0f} s"


def clock_forwards(bench: Bench) -> str:
    """The clock jumps a day ahead, and back."""
    return _clock(bench, 1)


def clock_backwards(bench: Bench) -> str:
    """The clock jumps a month back, and ahead."""
    return _clock(bench, -30)


def disk_full(bench: Bench) -> str:
    """Not a byte is left where the state is: a new assignment is stored all the same, and survives a kill."""
    machine = bench.machine
    machine.run(
        f"dd if=/dev/zero of={STATE_DISK_MOUNT}/fill bs=64k; dd if=/dev/zero of={STATE_DISK_MOUNT}/more bs=1", 120
    )
    left = machine.check(f"df --output=avail {STATE_DISK_MOUNT} | tail -n 1").strip()
    require(left == "0", f"{left} KiB are left")
    seconds = bench.re_register()
    bench.reach()
    hub = bench.cloud.connected_hub()
    machine.check(f"kill -KILL {bench.main_pid()}")
    reached_s = bench.reach()
    require(bench.cloud.connected_hub() == hub, "it is at another hub")
    machine.check(f"rm {STATE_DISK_MOUNT}/fill {STATE_DISK_MOUNT}/more; sync")
    return f"registered again in {seconds:.0f} s on 0 bytes; killed: at the same hub after {reached_s:.0f} s"


def disk_read_only(bench: Bench) -> str:
    """The file system finds an error and becomes read-only under the running service; then it is repaired."""
    machine = bench.machine
    machine.check(
        f"mount -o remount,errors=remount-ro {STATE_DISK_MOUNT} && echo vm > /sys/fs/ext4/vdb/trigger_fs_error"
    )
    require(machine.run(f"touch {STATE_DISK_MOUNT}/x").status != 0, "the disk can still be written")
    since = bench.mark()
    bench.register_again()
    time.sleep(1)
    while_s = bench.reach()
    codes = bench.codes(since, "store.")
    repair = f"e2fsck -fy /dev/vdb; test $? -le 1 && mount {STATE_DISK_MOUNT}"  # 1: errors were corrected
    machine.check(f"systemctl stop dps-agent && umount {STATE_DISK_MOUNT} && {{ {repair}; }}", START_DEADLINE_S)
    machine.check("systemctl start dps-agent", START_DEADLINE_S)
    return (
        f"at the hub after {while_s:.0f} s while read-only ({', '.join(codes)}); repaired: after {bench.reach():.0f} s"
    )


def network_lost(bench: Bench) -> str:
    """The cable is pulled until the service has noticed, and put in again."""
    since = bench.mark()
    bench.machine.set_link(False)
    try:
        started_s = time.monotonic()
        bench.wait_for_event("disconnected", since, 5 * KEEP_ALIVE_S)
        noticed_s = time.monotonic() - started_s
        time.sleep(20)  # a try to connect fails meanwhile
    finally:
        bench.machine.set_link(True)
    return f"noticed after {noticed_s:.0f} s; cable in: at the hub after {bench.reach():.0f} s"


def network_bad(bench: Bench) -> str:
    """Half a second of delay each way and every tenth packet lost: it registers and connects."""
    machine = bench.machine
    if machine.run("modprobe sch_netem && tc qdisc add dev eth0 root netem delay 500ms 100ms loss 10%").status != 0:
        raise Skipped("the guest's kernel has no netem")
    try:
        seconds = bench.re_register(600)
        reached_s = bench.reach()
    finally:
        machine.check("tc qdisc del dev eth0 root")
    bench.reach()
    return f"registered again in {seconds:.0f} s, telemetry in {reached_s:.0f} s, with delay 500 ms and 10 % loss"


def hub_silent(bench: Bench) -> str:
    """The hub takes everything and answers nothing, as behind a balancer that forgot the connection."""
    since = bench.mark()
    bench.cloud.call("faults", script=[{"method": "MQTT", "silent": "before"}])
    try:
        bench.wait_for_event("disconnected", since, 5 * KEEP_ALIVE_S)
    finally:
        bench.cloud.call("faults", script=[])
    return f"noticed; at the hub after {bench.reach():.0f} s"


def tpm_gone(bench: Bench) -> str:
    """The TPM's node vanishes and the service is killed: it waits; the node comes back."""
    machine = bench.machine
    bench.bind_tpm(False)
    try:
        since = bench.mark()
        machine.check(f"kill -KILL {bench.main_pid()}")

        def says_so() -> bool:
            return "tpm.absent" in bench.codes(since, "tpm.")

        machine.wait_until("the service says tpm.absent", says_so, START_DEADLINE_S, 1)
        require(bench.property("ActiveState") == "active", "the service is not active")
    finally:
        bench.bind_tpm(True)
    return f"tpm.absent; TPM back: at the hub after {bench.reach():.0f} s"


def tpm_stalls(bench: Bench) -> str:
    """The TPM takes no command for a while in the midst of a registration."""
    pid, since = bench.main_pid(), bench.mark()
    with bench.machine.tpm_stalled():
        bench.register_again()
        time.sleep(STALL_S)
        events = {line["DPS_EVENT"] for line in bench.journal(since)}
    require("provisioning" in events and "assigned" not in events, f"the stall held nothing up: {sorted(events)}")
    seconds = bench.reach()
    require(bench.main_pid() == pid, "the process was ended")
    return f"TPM back after {STALL_S} s: at the hub after {seconds:.0f} s, same process"


# Power.


class Cut(NamedTuple):
    """One power cut: after which of DPS's answers, how long after that, and what the device then did."""

    after: int
    delay_s: float
    sync: bool
    outcome: str
    reached_s: float


def prepare_cuts(bench: Bench) -> str:
    """Measures a registration, then keeps the machine as it is before the service starts."""
    times: list[float] = []
    mark, started_s = bench.cloud.log_size(), time.monotonic()
    before = bench.cloud.connected_hub()
    bench.register_again()
    while bench.cloud.connected_hub() in ("", before):
        while len(bench.cloud.requests_since(mark)) > len(times):
            times.append(time.monotonic() - started_s)
        require(time.monotonic() - started_s < REGISTRATION_DEADLINE_S, "the registration took too long")
        time.sleep(0.01)
    total_s = time.monotonic() - started_s
    steps = [f"{line.method} {line.operation} {line.status}" for line in bench.cloud.requests_since(mark)]
    bench.measured["registration"] = {
        "requests": steps,
        "atS": [round(t, 2) for t in times],
        "connectedS": round(total_s, 2),
    }
    bench.reach()
    machine = bench.machine
    machine.check(f"systemctl stop dps-agent && umount {STATE_DISK_MOUNT}", START_DEADLINE_S)
    bench.bind_tpm(False)
    machine.check("sync")
    machine.take_snapshot()
    power_on(bench)
    seconds = bench.reach()
    return f"{len(steps)} requests and the new hub in {total_s:.1f} s; from the snapshot: at the hub in {seconds:.0f} s"


def power_on(bench: Bench) -> str:
    """Wakes the machine and starts the service as a boot does; where the journal ended before that."""
    bench.machine.wake()
    bench.machine.check(f"date -s @{time.time():.3f}")  # as from the clock that a battery keeps
    bench.bind_tpm(True)
    bench.machine.mount_state()
    since = bench.mark()
    bench.machine.check("systemctl start --no-block dps-agent")
    return since


def plan(cuts: int, times: Sequence[float], connected_s: float, seed: int) -> list[tuple[int, float]]:
    """After which answer of DPS and how many seconds later each cut comes: all of a registration, its end twice."""
    spans = [after - before for before, after in zip([0.0, *times], [*times, connected_s], strict=True)]
    chosen = random.Random(seed)
    order = [*range(len(spans)), len(spans) - 1]
    return [(order[cut % len(order)], chosen.random() * 1.1 * spans[order[cut % len(order)]]) for cut in range(cuts)]


def power_cuts(bench: Bench) -> str:
    """The power goes in the midst of a registration, again and again; no cut costs the device its identity."""
    registration = bench.measured["registration"]
    planned = plan(bench.cuts, registration["atS"], registration["connectedS"], bench.seed)
    done: list[Cut] = []
    lost_unsynced = 0
    for number, (after, delay_s) in enumerate(planned):
        where = f"cut={number} after={after} delay={delay_s:.3f} seed={bench.seed}"
        sync = number % 2 == 1
        machine = bench.machine
        old = bench.cloud.connected_hub()
        if number:
            bench.start_anew()
        machine.check(f"rm -f {STATE_DISK_MOUNT}/unsynced; sync; echo {number} > {STATE_DISK_MOUNT}/unsynced")
        if sync:  # what else runs on the device forces the file system's journal out between any two writes
            machine.start_command(f"while :; do sync -f {STATE_DISK_MOUNT}; done")
        mark = bench.cloud.log_size()
        bench.register_again()
        if not bench.cloud.wait_for_requests(mark, after, REGISTRATION_DEADLINE_S):
            raise VmError(f"{where}: the registration did not come so far")
        time.sleep(delay_s)
        machine.cut()
        try:
            since = power_on(bench)
            unsynced = machine.run(f"cat {STATE_DISK_MOUNT}/unsynced").output.strip()
            lost_unsynced += not sync and unsynced != str(number)
            reached_s = bench.reach()
            done.append(Cut(after, delay_s, sync, _outcome(bench, since, old), reached_s))
        except VmError as error:
            raise VmError(f"{where}: {error}") from None
        print(f"    {where} {done[-1].outcome}, at the hub after {reached_s:.1f} s", flush=True)
    bench.measured["cuts"] = [cut._asdict() for cut in done]
    bench.measured["unsyncedLost"] = lost_unsynced
    require(lost_unsynced, "a file that was never synced survived every cut: the cuts are none")
    outcomes = Counter(cut.outcome for cut in done)
    reached = sorted(cut.reached_s for cut in done)
    told = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
    return f"{len(done)} cuts: {told}; at the hub after {reached[len(reached) // 2]:.0f} s (worst {reached[-1]:.0f} s)"


def _outcome(bench: Bench, since: str, old: str) -> str:
    """What the device held after a cut; VmError if it held nothing."""
    lines = [
        line for line in bench.journal(since) if line["DPS_EVENT"] in ("provisioning", "connected", "disconnected")
    ]
    require(lines, "the journal does not say how the device came back")
    hub = lines[0].get("DPS_HUB", "")
    require(hub, f"the record was lost: {lines[0]['MESSAGE']}")
    again = any(line["DPS_EVENT"] == "provisioning" for line in lines)
    return ("old record" if hub == old else "new record") + (", registered again" if again else "")


def cold_boot(bench: Bench) -> str:
    """A last cut, and the machine boots from its disks as they are."""
    machine = bench.machine
    bench.register_again()
    time.sleep(bench.measured["registration"]["connectedS"] / 2)
    machine.cut()
    seconds = machine.boot()
    reached_s = bench.reach()
    counter = re.search(
        r"LOCKOUT_COUNTER: (0x[0-9A-Fa-f]+)",
        machine.check("tpm2_getcap -T device:/dev/tpmrm0 properties-variable"),
    )
    require(counter, "the TPM does not tell its lockout counter")
    assert counter is not None
    bench.measured["lockoutCounter"] = int(counter[1], 16)
    require(int(counter[1], 16) == 0, f"the TPM's lockout counter is {counter[1]}")
    return f"booted in {seconds:.0f} s, at the hub after another {reached_s:.0f} s; the TPM counts 0 failures"


def secrets(bench: Bench) -> str:
    """Nothing secret is in the journal, in the console, or where others may read."""
    machine = bench.machine
    written = machine.check("journalctl -q -o export --no-pager -t dps-agent -u dps-agent | tr -d '\\000'", 120)
    written += bench.machine.serial.read_text(errors="replace")
    written += machine.check(
        "cat /run/dps-agent/state.json; for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline; done; true"
    )
    for name, secret in {
        "the owner's password": OWNER_PASSWORD,
        "the endorsement hierarchy's password": ENDORSEMENT_PASSWORD,
        "a token": "SharedAccessSignature",
        "a signature": "&sig=",
    }.items():
        require(secret not in written, f"{name} was written")
    return f"none in {len(written) // 1024} KiB of journal, console, state file and process list"


TRIALS = (
    Trial("boot", boot),
    Trial("install", install),
    Trial("credentials", credentials),
    Trial("refused", refused),
    Trial("unit", unit),
    Trial("exposure", exposure),
    Trial("journal", journal),
    Trial("denied", denied),
    Trial("stop", stop),
    Trial("watchdog", watchdog, anew=True),
    Trial("kill", kill, anew=True),
    Trial("clock-forwards", clock_forwards, anew=True),
    Trial("clock-backwards", clock_backwards, anew=True),
    Trial("disk-full", disk_full, anew=True),
    Trial("disk-read-only", disk_read_only, anew=True),
    Trial("network-lost", network_lost, anew=True),
    Trial("network-bad", network_bad, anew=True),
    Trial("hub-silent", hub_silent, anew=True),
    Trial("tpm-gone", tpm_gone, anew=True),
    Trial("tpm-stalls", tpm_stalls, anew=True),
    Trial("prepare-cuts", prepare_cuts, anew=True),
    Trial("power-cuts", power_cuts),
    Trial("cold-boot", cold_boot),
    Trial("secrets", secrets),
)
REQUIRED = ("boot", "install", "credentials", "refused")  # without these there is nothing to try
