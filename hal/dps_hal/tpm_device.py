"""The kernel's device nodes of a TPM, opened by either back end, and why one can not be; CPython only."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from dps_hal.errors import AskOperator, RetryLater

if TYPE_CHECKING:
    from collections.abc import Callable

    from dps_hal.errors import DpsError

_UNMAPPED_GID = 65534  # of any group that is not mapped into a user namespace, such as a unit's PrivateUsers makes
_NOT_THERE = (errno.ENOENT, errno.ENODEV, errno.ENXIO)


def is_managed(path: str) -> bool:
    """Whether a device node is one of the kernel's resource manager, which flushes what its user leaves."""
    return os.path.basename(os.path.realpath(path)).startswith("tpmrm")


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
    if os.geteuid() == 0:
        return f"{seen}, though root may do all; look at the container's devices or the service's sandbox (DeviceAllow)"
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
    if node.st_mode & 0o060 == 0o060 and node.st_gid != 0:  # something else than the mode: a sandbox, a container
        return f"{seen}, though its group may; look at the service's sandbox (DeviceAllow), the container, or AppArmor"
    name = os.path.basename(path)
    return (
        f"{seen}, and no group may; give it one with the udev rule"
        f' \'KERNEL=="{name}", GROUP="tss", MODE="0660"\' in /etc/udev/rules.d, run'
        f" 'sudo udevadm trigger --name-match={name}', then {_join('tss', user)}"
    )


def _join(group: str, user: str) -> str:
    if "INVOCATION_ID" in os.environ:  # of a systemd unit, whose user may exist only while it runs
        return f"put SupplementaryGroups={group} under [Service] with 'sudo systemctl edit dps-agent' and restart it"
    return f"run 'sudo usermod -aG {group} {user}' and log in again"


def _name_of(number: int, look_up: Callable[[int], str]) -> str:
    try:
        return look_up(number)
    except KeyError:
        return str(number)
