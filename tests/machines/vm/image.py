"""The guest's disk: a small Debian with its own kernel, built once for each set of inputs and then kept.

Built without a loop mount and without a network of its own: mmdebstrap fetches from the sources that this machine's apt
uses, mke2fs fills the disk. The kernel is Debian's for the cloud: the drivers of both TPM interfaces and of ext4 are in
it, those of the disk come from a small initial file system.
"""

import fcntl
import hashlib
import lzma
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from fresh_machine import SYSTEM_PATH, NotReady

BUILD_DEADLINE_S = 1800
DISK_BYTES = 1 << 30
HOST_PACKAGES = ("mmdebstrap", "qemu-system-x86", "qemu-utils", "swtpm", "e2fsprogs", "debian-archive-keyring")
KERNEL = "linux-image-cloud-amd64"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
SUITES = ("bookworm", "trixie")
GUEST_PACKAGES = (
    "systemd",
    "systemd-sysv",
    "dbus",
    "udev",
    "kmod",
    "iproute2",
    "python3-minimal",
    "tpm2-tools",
    "tpm-udev",
    "libtss2-tcti-device0",
    "e2fsprogs",
    "busybox-static",
)
BOOT_MODULES = ("virtio_pci", "virtio_blk")
OTHER_MODULES = ("virtio_net", "sch_netem")
GUEST = Path(__file__).resolve().parent / "guest"
STATE_DISK_MOUNT = "/var/lib/private"  # where systemd keeps the folders of dynamic users
# Nobody logs in, nothing is to be waited for, and a test of minutes needs no daily chores.
MASKED = (
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty@tty1.service",
    "serial-getty@ttyS0.service",
    "systemd-hwdb-update.service",
    "systemd-networkd-wait-online.service",
    "systemd-random-seed.service",
    "systemd-tmpfiles-clean.timer",
    "systemd-update-utmp.service",
)
# The address that QEMU's user network gives, and the way to the host: no server to wait for.
NETWORK = "[Match]\nName=eth0\n[Network]\nAddress=10.0.2.15/24\nGateway=10.0.2.2\nLinkLocalAddressing=no\n"
FILE_TABLE = (
    f"/dev/vda / ext4 defaults 0 1\n"
    f"/dev/vdb {STATE_DISK_MOUNT} ext4 defaults,nofail,x-systemd.before=dps-agent.service 0 0\n"
)


class Image(NamedTuple):
    """Files of one built guest; none is written to after it was built."""

    disk: Path
    kernel: Path
    initial_files: Path
    suite: str
    was_built: bool


def suite_of_this_machine() -> str:
    """The Debian release here, which is the guest's too: packages are built for the machine they are built on."""
    if platform.machine() != "x86_64":
        raise NotReady(f"the guest is an x86-64 machine with packages built here; this machine is {platform.machine()}")
    text = Path("/etc/os-release").read_text()
    found = re.search(r'^VERSION_CODENAME="?([a-z]+)"?$', text, re.MULTILINE)
    if found is None or found[1] not in SUITES:
        raise NotReady(f"the guest is made on and from Debian {' or '.join(SUITES)}; /etc/os-release names neither")
    return found[1]


def make_image(folder: Path, packages: Sequence[str]) -> Image:
    """The guest in `folder`, with the Debian `packages` beside its own; built unless it is there already."""
    suite = suite_of_this_machine()
    wanted = sorted({*GUEST_PACKAGES, *packages})
    inputs = hashlib.sha256(" ".join([suite, *wanted]).encode())
    for source in [Path(__file__), *sorted(GUEST.iterdir())]:
        inputs.update(source.read_bytes())
    place = folder / inputs.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        was_built = not place.is_dir()
        if was_built:
            for former in folder.iterdir():
                if former.is_dir():
                    shutil.rmtree(former)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                os.chmod(scratch, 0o755)
                _build(Path(scratch), suite, wanted)
                os.replace(Path(scratch) / "result", place)
    return Image(place / "disk.raw", place / "vmlinuz", place / "initrd", suite, was_built)


def _build(scratch: Path, suite: str, packages: Sequence[str]) -> None:
    root, result = scratch / "root", scratch / "result"
    result.mkdir()
    _bootstrap(root, suite, packages)
    version = _install_kernel(root, scratch, result / "vmlinuz")
    order = _keep_modules(root, version)
    _configure(root)
    entries = [("init", 0o755, (GUEST / "init").read_bytes())]
    entries += [("bin/busybox", 0o755, (root / "bin/busybox").read_bytes())]
    entries += [(f"modules/{path.stem.partition('.')[0]}.ko", 0o644, _module_bytes(path)) for path in order]
    names = " ".join(f"{path.stem.partition('.')[0]}.ko" for path in order)
    entries.append(("modules/order", 0o644, names.encode()))
    (result / "initrd").write_bytes(b"".join(cpio(("bin", "dev", "modules", "proc", "root"), entries)))
    disk = result / "disk.raw"
    with disk.open("wb") as file:
        file.truncate(DISK_BYTES)
    run(["mke2fs", "-q", "-t", "ext4", "-m", "0", "-d", str(root), str(disk)])


def _bootstrap(root: Path, suite: str, packages: Sequence[str]) -> None:
    """A minimal Debian, with the kernel's package file in its /root."""
    sources = "\n".join(f"deb [signed-by={KEYRING}] {line}" for line in apt_sources(suite))
    fetch = (
        f'cd "$1/root" && export APT_CONFIG="$MMDEBSTRAP_APT_CONFIG" &&'
        f" apt-get download -q $(apt-cache depends {KERNEL} | sed -n 's/^ *Depends: //p' | head -n 1)"
    )
    settings = [line for line in run(["apt-config", "dump"]).splitlines() if line.startswith("Acquire::http")]
    run(
        [
            *("mmdebstrap", "--mode=root", "--variant=minbase", f"--include={','.join(packages)}"),
            *(f"--aptopt={line}" for line in settings if not line.startswith("Acquire::http ")),
            *(f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "locale", "man")),
            f"--customize-hook={fetch}",
            *(suite, str(root), "-"),
        ],
        sources,
    )


def apt_sources(suite: str) -> list[str]:
    """URI, release and components of Debian's own archives in this machine's apt settings, as in sources.list."""
    asked = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages"]
    releases = (suite, f"{suite}-updates", f"{suite}-security")
    found = {tuple(line.split()) for line in run(asked).splitlines()}
    main = sorted(" ".join(words) for words in found if len(words) == 3 and words[1] in releases and words[2] == "main")
    if not any(f" {suite} " in line for line in main):
        raise NotReady(f"apt's sources on this machine name no archive of {suite}: correct /etc/apt/sources.list")
    return main


def _install_kernel(root: Path, scratch: Path, kernel: Path) -> str:
    """Copies the kernel and puts its modules into the root; returns its version."""
    (package,) = (root / "root").glob("linux-image-*.deb")
    unpacked = scratch / "kernel"
    run(["dpkg-deb", "-x", str(package), str(unpacked)])
    package.unlink()
    (image,) = (unpacked / "boot").glob("vmlinuz-*")
    version = image.name.removeprefix("vmlinuz-")
    shutil.copyfile(image, kernel)
    (modules,) = unpacked.glob("**/lib/modules")
    shutil.copytree(modules / version, root / "usr/lib/modules" / version, symlinks=True)
    shutil.rmtree(unpacked)
    run(["chroot", str(root), "depmod", version])
    return version


def _keep_modules(root: Path, version: str) -> list[Path]:
    """Deletes the modules that the guest does not need; those for the boot in the order in which they load."""
    folder = root / "usr/lib/modules" / version
    needs: dict[str, list[str]] = {}
    places: dict[str, Path] = {}
    for line in (folder / "modules.dep").read_text().splitlines():
        path, _, others = line.partition(":")
        name = _module_name(path)
        places[name] = folder / path
        needs[name] = [_module_name(other) for other in others.split()]

    def in_order(names: Sequence[str]) -> list[str]:
        found: list[str] = []
        for name in names:
            # What comes last in modules.dep has to be loaded first.
            found += [other for other in [*reversed(needs.get(name, [])), name] if other in places]
        return list(dict.fromkeys(found))

    kept = {places[name] for name in in_order((*BOOT_MODULES, *OTHER_MODULES))}
    for module in folder.glob("**/*.ko*"):
        if module not in kept:
            module.unlink()
    run(["chroot", str(root), "depmod", version])
    return [places[name] for name in in_order(BOOT_MODULES)]


def _module_name(path: str) -> str:
    return path.rpartition("/")[2].partition(".")[0].replace("-", "_")


def _module_bytes(path: Path) -> bytes:
    content = path.read_bytes()
    return lzma.decompress(content) if path.suffix == ".xz" else content


def _configure(root: Path) -> None:
    """Names, network, the control service; nothing that the agent's package brings itself."""
    for name, text in {
        "etc/fstab": FILE_TABLE,
        "etc/hostname": "edge-box\n",
        "etc/hosts": "127.0.0.1 localhost edge-box\n",
        "etc/machine-id": f"{hashlib.sha256(b'edge-box').hexdigest()[:32]}\n",
        "etc/modules-load.d/vm.conf": "virtio_net\n",
        "etc/resolv.conf": "nameserver 10.0.2.3\n",
        "etc/systemd/journald.conf.d/vm.conf": "[Journal]\nStorage=persistent\nRateLimitIntervalSec=0\n",
        "etc/systemd/network/eth0.network": NETWORK,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).unlink(missing_ok=True)
        (root / name).write_text(text)
    (root / STATE_DISK_MOUNT[1:]).mkdir(mode=0o700, parents=True, exist_ok=True)
    control = root / "usr/local/lib/vm_control.py"
    shutil.copyfile(GUEST / "vm_control.py", control)
    control.chmod(0o755)
    shutil.copyfile(GUEST / "vm-control.service", root / "etc/systemd/system/vm-control.service")
    for command in (
        ["enable", "vm-control.service", "systemd-networkd.service"],
        ["set-default", "multi-user.target"],
        ["mask", *MASKED],
    ):
        run(["chroot", str(root), "systemctl", *command])
    run(["chroot", str(root), "journalctl", "--update-catalog"])
    run(["chroot", str(root), "systemd-sysusers"])
    run(["chroot", str(root), "systemd-hwdb", "update", "--usr"], may_fail=True)
    for name in ("etc/.updated", "var/.updated"):
        (root / name).touch()


def cpio(folders: Sequence[str], files: Sequence[tuple[str, int, bytes]]) -> Iterator[bytes]:
    """An archive that the kernel unpacks as its first file system; kernel documentation, initramfs buffer format."""

    def entry(number: int, name: str, mode: int, content: bytes) -> bytes:
        named = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(named), 0)
        head = b"070701" + b"".join(b"%08X" % field for field in fields) + named
        return head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)

    for number, folder in enumerate(folders, 1):
        yield entry(number, folder, 0o040755, b"")
    for number, (name, mode, content) in enumerate(files, len(folders) + 1):
        yield entry(number, name, 0o100000 | mode, content)
    yield entry(0, "TRAILER!!!", 0, b"")


def run(words: Sequence[str], text: str = "", may_fail: bool = False) -> str:
    """What a program wrote to its standard output; NotReady if it failed, with all that it said."""
    try:
        done = subprocess.run(
            words,
            input=text,
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, "PATH": f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}", "LC_ALL": "C.UTF-8"},
            timeout=BUILD_DEADLINE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotReady(f"{words[0]}: {error}") from None
    if done.returncode != 0 and not may_fail:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-30:])
        raise NotReady(f"{tail}\nthis failed with status {done.returncode}: {' '.join(words)}")
    return done.stdout
