"""The kernel's device nodes of a TPM, opened by either back end, and why one can not be; CPython only."""

from __future__ import annotations

import errno
import os

from dps_hal.errors import AskOperator, RetryLater

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from dps_hal.errors import DpsError

_UNMAPPED_GID = 65534  # any group's that a user namespace, such as PrivateUsers makes, does not map
_SYSFS = "/sys/class"
_CONTAINER_MARKS = ("/run/systemd/container", "/run/.containerenv", "/.dockerenv")  # nspawn and LXC, Podman, Docker
_CONTAINER_ROOTS = ("/docker/", "/containerd/", "/containers/storage/")  # where the layers of / lie
_NOT_THERE = (errno.ENOENT, errno.ENODEV, errno.ENXIO)


def is_managed(path: str) -> bool:
    """Whether a device node is one of the kernel's resource manager, which flushes what its user leaves."""
    return os.path.basename(os.path.realpath(path)).startswith("tpmrm")


def in_container() -> bool:
    """Whether this process runs in a container, as far as it can be seen from inside."""
    if os.environ.get("container") or "KUBERNETES_SERVICE_HOST" in os.environ:  # noqa: SIM112
        return True
    if any(os.path.exists(mark) for mark in _CONTAINER_MARKS):
        return True
    try:
        with open("/proc/self/mountinfo") as mounts:
            roots = [line for line in mounts if line.split(" ")[4] == "/"]
    except (OSError, IndexError, UnicodeError):
        return False
    return any(place in line for line in roots for place in _CONTAINER_ROOTS)


def open_device(path: str, flags: int = 0) -> int:
    """The descriptor of a TPM's device node, open for reading and writing.

    AskOperator `tpm.denied` says which file, group and command it takes; RetryLater `tpm.busy`; `tpm.absent` is
    RetryLater where there is no such node, for a driver may find its TPM late, else AskOperator.
    """
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY | flags)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM):
            raise AskOperator("tpm.denied", _denied(path)) from None
        if error.errno == errno.EBUSY:
            raise RetryLater("tpm.busy", f"{path} is in use by another program") from None
        raise absent(path, error) from None


def absent(path: str, error: OSError, seen: str = "") -> DpsError:
    """The error `tpm.absent` for what the system says of a device node; `seen` is added to its message."""
    message = f"no TPM at {path}: {error.strerror}{seen}"
    if error.errno not in _NOT_THERE:
        return AskOperator("tpm.absent", message)
    folder, name = os.path.split(path)
    kind = "tpmrm" if name.startswith("tpmrm") else "tpm"
    known = os.path.join(_SYSFS, kind, name)
    if folder == "/dev" and os.path.exists(known):
        return RetryLater("tpm.no_node", f"{message}, though the kernel has this TPM ({known}): {_handed_in(path)}")
    direct = os.path.join(folder, name.replace("tpmrm", "tpm"))
    if direct != path and os.path.exists(direct):
        message += (
            f"; as {direct} is there, this kernel has no resource manager for it: that takes Linux 4.12 or newer and a"
            f' TPM 2.0, a TPM 1.2 will not do; else set tcti = "device:{direct}" in [tpm] if no other program uses it'
        )
    return RetryLater("tpm.absent", message)


def _denied(path: str) -> str:
    import grp
    import pwd
    import stat

    try:
        node = os.stat(path)
    except OSError as error:  # a folder above it may not be searched
        return f"{path} cannot be looked at: {error.strerror}; let this user search the folders above it"
    owner = _name_of(node.st_uid, lambda number: pwd.getpwuid(number).pw_name)
    group = _name_of(node.st_gid, lambda number: grp.getgrgid(number).gr_name)
    user = _name_of(os.geteuid(), lambda number: pwd.getpwuid(number).pw_name)
    seen = f"{user} may not open {path} ({stat.filemode(node.st_mode)}, owner {owner}, group {group})"
    if in_container():
        return f"{seen}, in a container: {_handed_in(path, node.st_gid)}"
    if os.geteuid() == 0:
        return f"{seen}, though root may do all; {_look_elsewhere()}"
    if node.st_gid == _UNMAPPED_GID and "INVOCATION_ID" in os.environ:
        return (
            f"{seen}; which group that is, this unit cannot see: if 'ls -l {path}' shows another one than tss, put it"
            f" in SupplementaryGroups= with 'sudo systemctl edit dps-agent'; else look at DeviceAllow"
        )
    if node.st_mode & 0o060 == 0o060 and node.st_gid != 0 and node.st_gid not in (os.getegid(), *os.getgroups()):
        return f"{seen}; {_join(group, user)}"
    managed = path.replace("/dev/tpm", "/dev/tpmrm")
    if path.startswith("/dev/tpm") and not path.startswith("/dev/tpmrm") and os.path.exists(managed):
        return f'{seen}, and no group may; set tcti = "device:{managed}" in [tpm]'
    if node.st_mode & 0o060 == 0o060 and node.st_gid != 0:  # something else than the mode
        return f"{seen}, though its group may; {_look_elsewhere()}"
    name = os.path.basename(path)
    return (
        f"{seen}, and no group may; give it one with the udev rule"
        f' \'KERNEL=="{name}", GROUP="tss", MODE="0660"\' in /etc/udev/rules.d, run'
        f" 'sudo udevadm trigger --name-match={name}', then {_join('tss', user)}"
    )


def _handed_in(path: str, gid: int | None = None) -> str:
    """What gives a node to this process; `gid` is the node's group where it is here, and not open to us."""
    if in_container():
        number = str(gid) if gid else f"NUMBER, the group's on the host ('stat -c %g {path}')"
        if gid is not None and gid in (0, _UNMAPPED_GID):
            number = f"NUMBER of a group that may open it on the host ('stat -c %g {path}')"
        return f"start the container with --device {path}, and as another user than root also with --group-add {number}"
    if "INVOCATION_ID" in os.environ:
        return "look at PrivateDevices, DevicePolicy and DeviceAllow in the unit ('systemctl cat dps-agent')"
    return f"look whether udev, or whatever fills /dev here, has made it ('sudo udevadm trigger --name-match={path}')"


def _look_elsewhere() -> str:
    """Where to look for what refuses a node that its mode does not."""
    if "INVOCATION_ID" in os.environ:
        return "look at DevicePolicy and DeviceAllow in the unit, or AppArmor"
    return "look at what else refuses it, such as AppArmor or SELinux ('sudo dmesg | grep -i denied')"


def _join(group: str, user: str) -> str:
    if "INVOCATION_ID" in os.environ:  # this is a systemd unit, whose user may exist only while it runs
        return f"put SupplementaryGroups={group} under [Service] with 'sudo systemctl edit dps-agent' and restart it"
    if group.isdecimal():  # no file on this machine names the group
        made = f"'sudo groupadd --gid {group} tpm' and "
        return f"run {made}'sudo usermod -aG tpm {user}', for the group has no name here, and log in again"
    return f"run 'sudo usermod -aG {group} {user}' and log in again"


def _name_of(number: int, look_up: Callable[[int], str]) -> str:
    try:
        return look_up(number)
    except KeyError:
        return str(number)
