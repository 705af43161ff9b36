"""What `tools/package --foreign` does: dps-agent-light on other userlands than the machine's.

Those of other processors qemu-user emulates; no kernel has to know of it (binfmt_misc): packages are unpacked, not
installed, and each program is started by the emulator. One has musl as its C library, and the apk. So what is not run
here are the maintainer scripts, systemd, and tpm2-tss of those processors; nor does `status` find the service, whose
time of start qemu tells the service otherwise than all others.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

from debian_micropython import musl_python
from dps_package.__main__ import main as build
from dps_package.distributions import run
from dps_package.foreign import build_foreign
from machines.packages.container import ENDS_WITH_US, CommandFailed, Unavailable, apt_sources, codename
from machines.packages.lifecycle import ID_SCOPE, claim, import_enrolment, title
from support.cloud.emulator import EmulatorProcess
from support.tpm.swtpm import Swtpm

COMMAND_DEADLINE_S = 300  # of a processor that is emulated, on a busy machine
PROGRAM = "/usr/bin/dps-agent"
# With a mount namespace of its own nothing stays mounted, whatever ends it.
ENTER = 'mount --bind /proc "$0/proc" && mount --bind /dev "$0/dev" && exec chroot "$0" "$@"'


class Processor(NamedTuple):
    """One architecture as Debian calls it, qemu and Python's platform.machine()."""

    architecture: str
    emulator: str
    machine: str


PROCESSORS = (
    Processor("arm64", "qemu-aarch64-static", "aarch64"),
    Processor("armhf", "qemu-arm-static", "armv7l"),
)


def main() -> int:
    """Exit status 0: it lives on each of them; 1: not; 2: this machine cannot try it."""
    try:
        if os.geteuid():
            raise Unavailable("to mount into the folders of other processors' programs takes root")
        return build(try_built)
    except CommandFailed as error:
        print(f"\ntools/package: {error}", file=sys.stderr)
        return 1
    except Unavailable as error:
        print(f"\ntools/package: {error}", file=sys.stderr)
        return 2


def try_built(built: list[Path], work: Path) -> None:
    """A life on each userland."""
    light = next(path for path in built if path.name.endswith("_all.deb"))
    for make in (*(partial(unpack_debian, processor, light) for processor in PROCESSORS), partial(unpack_musl, light)):
        with tempfile.TemporaryDirectory(prefix="dps-foreign-", dir="/var/tmp") as folder:
            userland = make(Path(folder) / "root")
            with EmulatorProcess("--id-scope", ID_SCOPE, "--retry-after", "1") as emulator, Swtpm(work / "tpm") as tpm:
                live(userland, emulator, tpm)
        shutil.rmtree(work / "tpm")


def unpack_debian(processor: Processor, light: Path, root: Path) -> Userland:
    """The distribution's packages for that processor, unpacked, and `light` among them."""
    needs = run(["dpkg-deb", "--field", str(light), "Depends"]).split(",")
    names = [need.split()[0] for need in needs if need.split()[0].startswith("python3")]
    sources = root.with_name("sources.list")
    # The release itself: its updates change nothing of what is tried here.
    sources.write_text("".join(line for line in apt_sources().splitlines(True) if f"/ {codename()} " in line))
    title(f"{processor.architecture}: {', '.join(names)} unpacked, {light.name} too")
    words = ["unshare", "--mount", "mmdebstrap", "--quiet", "--variant=extract", f"--include={','.join(names)}"]
    run([*words, f"--architectures={processor.architecture}", codename(), str(root), str(sources)])
    run(["dpkg-deb", "--extract", str(light), str(root)])
    program = shutil.which(processor.emulator)
    if program is None:
        raise Unavailable(f"this needs {processor.emulator} (package qemu-user-static)")
    shutil.copy(program, root / "emulator")
    return Userland(root, processor.machine, ("/emulator", *interpreter_of(root)))


def unpack_musl(light: Path, root: Path) -> Userland:
    """A Python that was linked with musl, ujson's wheel for it, and the apk that is made of `light`."""
    (apk,) = (path for path in build_foreign(root.parent, light) if path.suffix == ".apk")
    title(f"musl: Python 3.11 and {apk.name}")
    shutil.copytree(musl_python(), root, symlinks=True)
    # Debian 12's musl knows no packed relocations, with which wheels for newer ones are made: they crash.
    platform = f"--platform=musllinux_1_1_{os.uname().machine}"
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:", platform]
    run([*words, "--python-version=3.11", f"--target={root / 'usr/lib/python3/dist-packages'}", "ujson"])
    run(["tar", "--warning=no-unknown-keyword", "-C", str(root), "-xzf", str(apk)])
    return Userland(root, os.uname().machine, interpreter_of(root))


def interpreter_of(root: Path) -> tuple[str, ...]:
    """The words with which the kernel would start the program that is in `root`."""
    first, _, _ = (root / PROGRAM[1:]).read_text().partition("\n")
    return tuple(first.removeprefix("#!").split())


class Userland:
    """A folder with a system's programs, dps-agent-light among them."""

    def __init__(self, root: Path, machine: str, interpreter: tuple[str, ...]) -> None:
        """`machine`: what its Python calls the processor; `interpreter`: what starts its dps-agent."""
        self.root = root
        self.machine = machine
        self._program = (*interpreter, PROGRAM)
        for name in ("proc", "dev", "run"):
            (root / name).mkdir(exist_ok=True)

    def started(self, *words: str) -> subprocess.Popen[str]:
        """`dps-agent` with these words, begun."""
        enter = [*ENDS_WITH_US, "unshare", "--mount", "sh", "-c", ENTER, str(self.root), *self._program]
        return subprocess.Popen(
            [*enter, *words],
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8", "HOME": "/"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words: str) -> str:
        """Runs `dps-agent` with these words and returns its output, both streams; CommandFailed where it fails."""
        print(f"# dps-agent {' '.join(words)}", flush=True)
        with self.started(*words) as process:
            try:
                output, _ = process.communicate(timeout=COMMAND_DEADLINE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise CommandFailed(f"did not end within {COMMAND_DEADLINE_S} s: dps-agent {words[0]}") from None
        for line in output.splitlines():
            print(f"  {line}", flush=True)
        if process.returncode:
            raise CommandFailed(f"exit status {process.returncode}: dps-agent {' '.join(words)}")
        return output


def live(userland: Userland, emulator: EmulatorProcess, tpm: Swtpm) -> None:
    """Version, enrolment, registration through the back end `wire`, and the service until it is at its hub."""
    said = userland.run("version")
    claim(f"a {userland.machine}", f"-{userland.machine}-" in said, said)
    folder = userland.root / "etc/dps-agent"
    (folder / "config.d").mkdir(parents=True, exist_ok=True)
    shutil.copy(emulator.ca_file, folder / "test-ca.pem")
    (folder / "config.d/50-test.toml").write_text(
        f'id_scope = "{ID_SCOPE}"\nendpoint = "{emulator.url}"\nca_file = "/etc/dps-agent/test-ca.pem"\n'
        f'[tpm]\ntcti = "{tpm.tcti}"\n'
        f'[hub]\nconnect_to = "{emulator.hub_connect_to}"\nca_file = "/etc/dps-agent/test-ca.pem"\n'
    )
    import_enrolment(userland.run("enroll", "--format", "csv"), emulator.state_dir)
    userland.run("provision")
    claim("assigned", "assigned" in userland.run("status"))
    print("# dps-agent run", flush=True)
    service = userland.started("run")
    try:
        until_s = time.monotonic() + COMMAND_DEADLINE_S
        while not any(line.event == "connected" for line in emulator.hub_log):
            if service.poll() is not None or time.monotonic() > until_s:
                service.kill()
                raise CommandFailed(f"not at its hub: {service.communicate()[0]}")
            time.sleep(0.5)
        claim("it is at its hub", True)
        service.terminate()
        output, _ = service.communicate(timeout=COMMAND_DEADLINE_S)
        for line in output.splitlines():
            print(f"  {line}", flush=True)
        claim("asked to end it ends in order", service.returncode == 0, output)
        registrations = sum(line.operation == "register" and line.status == 202 for line in emulator.log)
        claim("one registration", registrations == 1, registrations)
    finally:
        service.kill()
        service.wait()


if __name__ == "__main__":
    sys.exit(main())
