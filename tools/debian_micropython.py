"""What Debian has and the machine may not: MicroPython, its sources, OpenSSL's provider tpm2, QEMU, a broker, musl.

Its MicroPython is the oldest release that the project supports; the sources of the newest one that Debian has are those
of its next version.

apt-get fetches both into a folder of their own and checks Debian's signatures; the lists, sources and packages of the
machine stay as they are. Debian's program runs with the C library of Debian 13, whatever the machine has.
"""

import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from fresh_machine import APT_DEADLINE_S, SYSTEM_PATH, NotReady, cache_folder, locked, output_of, require_success

SUITE = "trixie"
OLDEST = (1, 25)  # what the suite has
NEWEST_SUITE = "forky"
INTERPRETER_PACKAGES = ("micropython", "libc6", "libffi8", "libmbedcrypto16", "libmbedtls21", "libmbedx509-7")
SOURCES = ("micropython", "mbedtls", "lwip")
QEMU_NEEDED = (8, 1)  # the first with a TPM on I2C
QEMU_SUITE = "bookworm-backports"  # for Debian 12, which has an older one; later releases have what is needed
QEMU_PACKAGES = ("qemu-system-arm", "qemu-system-common", "qemu-system-data")
FETCH_PACKAGES = ("debian-archive-keyring",)  # Ubuntu lacks it
TLS_PROVIDER_PACKAGES = ("tpm2-openssl",)  # 1.3.0; Debian 12's 1.1.1 has no use for the project
BROKER_SUITE = "bookworm"  # the oldest that the project runs on: later ones have what it needs
BROKER_PACKAGES = ("mosquitto", "libcjson1", "libdlt2", "libmosquitto1", "libwrap0")
BUILD_PACKAGES = (
    *("dpkg-dev", "xz-utils", "bzip2", "gcc", "libc6-dev", "make"),  # what unpacks sources, and their own compiler
    *("gcc-arm-none-eabi", "libnewlib-arm-none-eabi", "qemu-system-arm"),
)
MUSL_SUITE = "bookworm"  # Python 3.11, the oldest that the project runs on
MUSL_SOURCES = ("libffi", "zlib", "openssl", "python3.11")
MUSL_BUILD_PACKAGES = ("musl-tools", "linux-libc-dev", "dpkg-dev", "xz-utils", "make", "gcc", "perl")
MUSL_OPENSSL_WITHOUT = (
    "shared tests engine legacy async dso cms ts srp gost sm2 sm3 sm4 aria camellia seed idea cast bf rc2 mdc2"
)
MUSL_PROGRAMS = {  # what builds Python asks both where the machine's own C library has its files
    "musl-cc": """#!/bin/sh
case "$*" in *-print-multiarch*) exit ;; esac
exec musl-gcc "$@" -idirafter {headers}
""",
    "dpkg-architecture": "#!/bin/sh\nexit 1\n",
}
MUSL_DEADLINE_S = 3000
KEYRINGS = ("debian-archive-keyring.gpg", "debian-archive-keyring.pgp")  # Debian 12 has the first, later ones both
DEBIAN = "http://deb.debian.org/debian"
UNPACK_DEADLINE_S = 120
QEMU_BELOW = "root/usr/bin/qemu-system-arm"

LAUNCHER = """#!/bin/sh
# Debian 13's MicroPython with that release's own loader and libraries.
root=$(dirname "$(readlink -f "$0")")/root
exec "$root/{loader}" --library-path "$root/{libraries}" "$root/usr/bin/micropython" "$@"
"""
APT_CONFIGURATION = """Dir::State "{folder}";
Dir::State::lists "{folder}/lists";
Dir::State::status "{folder}/status";
Dir::Cache "{folder}/cache";
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "{folder}/sources.d";
APT::Sandbox::User "root";
APT::Get::AllowUnauthenticated "false";
Acquire::AllowInsecureRepositories "false";
Acquire::Languages "none";
"""
APT_SOURCE = """Types: {types}
URIs: {mirror}
Suites: {suite}
Components: main
Signed-By: {keyring}
"""


def interpreter() -> Path:
    """The program `micropython`, downloaded once (4 MB and the package list)."""

    def make(folder: Path) -> None:
        root = _unpacked(folder, SUITE, INTERPRETER_PACKAGES)
        loader = _only(root, "usr/lib/*/ld-linux*.so.*").relative_to(root)
        launcher = folder / "micropython"
        launcher.write_text(LAUNCHER.format(loader=loader, libraries=loader.parent))
        launcher.chmod(0o755)
        words = [str(launcher), "-c", "import sys; print(sys.implementation[1][:2])"]
        version = require_success(words, 10, folder).strip()
        if version != str(OLDEST):
            raise NotReady(f"expected MicroPython {OLDEST} in Debian's {SUITE}; came {version}")

    return _made_once(f"micropython-{SUITE}", make) / "micropython"


def sources() -> tuple[Path, Path, Path]:
    """The folders with the sources of MicroPython, mbedTLS and lwIP, downloaded once (13 MB and the source list)."""

    def make(folder: Path) -> None:
        _apt(folder, SUITE, "deb-src", "source", *SOURCES)
        for archive in folder.glob("*.tar.*"):
            archive.unlink()

    folder = _made_once(f"board-sources-{SUITE}", make)
    return _only(folder, "micropython-*/"), _only(folder, "mbedtls-*/"), _only(folder, "lwip-*/")


def tls_provider() -> Path:
    """The folder with OpenSSL's provider tpm2, downloaded once (32 KB and the package list).

    Built for Debian 13, it asks no more of the C library and of tpm2-tss than Debian 12 has.
    """

    def make(folder: Path) -> None:
        _unpacked(folder, SUITE, TLS_PROVIDER_PACKAGES)

    return _only(_made_once(f"tpm2-openssl-{SUITE}", make) / "root", "usr/lib/*/ossl-modules/tpm2.so").parent


def newest_sources() -> Path:
    """The folder with the sources of the newest MicroPython that Debian has, downloaded once (6 MB and the list)."""

    def make(folder: Path) -> None:
        _apt(folder, NEWEST_SUITE, "deb-src", "source", "micropython")
        for archive in folder.glob("*.tar.*"):
            archive.unlink()

    return _only(_made_once(f"micropython-source-{NEWEST_SUITE}", make), "micropython-*/")


def emulator() -> list[str]:
    """The words that start a qemu-system-arm which has a TPM on I2C: the machine's own, else one downloaded once.

    The one that is downloaded (13 MB) runs where it was unpacked, with the libraries of the machine's own.
    """
    installed = shutil.which("qemu-system-arm")
    if installed is not None and _version_of([installed]) >= QEMU_NEEDED:
        return [installed]

    def make(folder: Path) -> None:
        _unpacked(folder, QEMU_SUITE, QEMU_PACKAGES)
        if _version_of([str(folder / QEMU_BELOW)]) < QEMU_NEEDED:
            raise NotReady(f"expected QEMU {QEMU_NEEDED} in Debian's {QEMU_SUITE}, and that it runs on this machine")

    folder = _made_once("qemu", make)
    return [str(folder / QEMU_BELOW), "-L", str(folder / "root/usr/share/qemu")]


def mosquitto() -> list[str]:
    """The words that start mosquitto: the machine's own, else one downloaded once, whose installation starts a service.

    The one that is downloaded (0.5 MB and the package list) runs where it was unpacked.
    """
    installed = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}")
    if installed is not None:
        return [installed]

    def make(folder: Path) -> None:
        _unpacked(folder, BROKER_SUITE, BROKER_PACKAGES)

    root = _made_once(f"mosquitto-{BROKER_SUITE}", make) / "root"
    return ["env", f"LD_LIBRARY_PATH={_only(root, 'usr/lib/*-linux-*/')}", str(root / "usr/sbin/mosquitto")]


def musl_python() -> Path:
    """The folder of a system that has musl as its C library and Python, built once from Debian's sources (45 MB).

    It takes six minutes of a core and the machine's `musl-tools`.
    """

    def make(folder: Path) -> None:
        _apt(folder, MUSL_SUITE, "deb-src", "source", *MUSL_SOURCES)
        parts = ("libffi", "zlib", "openssl", "[Pp]ython3*")
        libffi, zlib, openssl, python = (_only(folder, f"{name}-*/") for name in parts)
        root, built, headers, programs = (folder / name for name in ("root", "built", "headers", "programs"))
        headers.mkdir()
        for name in ("linux", "asm-generic"):
            (headers / name).symlink_to(Path("/usr/include", name))
        (headers / "asm").symlink_to(_only(Path("/usr/include"), "*-linux-gnu/asm"))
        programs.mkdir()
        for name, text in MUSL_PROGRAMS.items():
            (programs / name).write_text(text.format(headers=headers))
            (programs / name).chmod(0o755)
        environ = ("env", f"PATH={programs}:{SYSTEM_PATH}", "CC=musl-cc")
        quick = "CFLAGS=-O1 -fPIC"  # to build, not to run
        jobs, install = f"-j{os.cpu_count() or 1}", f"--prefix={built}"
        lean = [f"no-{name}" for name in MUSL_OPENSSL_WITHOUT.split()]
        found = f"CPPFLAGS=-I{built}/include", f"LDFLAGS=-L{built}/lib"
        wanted = f"--with-openssl={built}", "--without-ensurepip", "--disable-test-modules"
        for below, words in (
            (libffi, (*environ, quick, "./configure", install, "--disable-shared", "--disable-docs")),
            (libffi, (*environ, "make", jobs, "install")),
            (zlib, (*environ, quick, "./configure", install, "--static")),
            (zlib, (*environ, "make", "install")),
            (openssl, (*environ, "./Configure", install, "--libdir=lib", "--openssldir=/etc/ssl", *lean, quick)),
            (openssl, (*environ, "make", jobs, "build_libs")),
            (openssl, (*environ, "make", "install_dev")),
            (python, (*environ, "OPT=-O1", *found, "./configure", "--prefix=/usr", *wanted)),
            (python, (*environ, "make", jobs)),
            (python, (*environ, "make", "install", f"DESTDIR={root}")),
        ):
            require_success(list(words), MUSL_DEADLINE_S, below)
        loader = root / "lib" / f"ld-musl-{os.uname().machine}.so.1"
        loader.parent.mkdir()
        shutil.copy(_only(Path("/usr/lib"), "*-linux-musl/libc.so"), loader)
        for path in (libffi, zlib, openssl, python, built, headers, programs):
            shutil.rmtree(path)
        for archive in folder.glob("*.tar.*"):
            archive.unlink()

    return _made_once(f"musl-python-{MUSL_SUITE}", make) / "root"


def umqtt_folder() -> Path:
    """Where MicroPython's own MQTT client is, once it is fetched."""
    return cache_folder() / "umqtt"


def umqtt(micropython: Path) -> Path:
    """That folder, filled by the `mip` of a MicroPython newer than Debian's; NotReady where it reaches no server."""

    def make(folder: Path) -> None:
        words = [str(micropython), "-m", "mip", "install", "--target", str(folder), "umqtt.simple"]
        output = require_success(words, APT_DEADLINE_S, folder)
        if not (folder / "umqtt").is_dir():
            raise NotReady(output)

    return _made_once(umqtt_folder().name, make)


def _version_of(program: list[str]) -> tuple[int, ...]:
    """The version that QEMU says it has; () where it does not run."""
    status, output = output_of([*program, "--version"], 30)
    found = re.search(r"version (\d+)\.(\d+)", output)
    return (int(found[1]), int(found[2])) if status == 0 and found else ()


def _made_once(name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache; `make` fills it where no earlier run did so to the end."""
    folder = cache_folder() / name
    with locked(folder):
        stamp = folder / "complete"
        if not stamp.is_file():
            print(f"fetching into {folder}, once", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            stamp.touch()
    return folder


def _unpacked(folder: Path, suite: str, packages: Sequence[str]) -> Path:
    """The folder `root` in `folder` with what is in these packages; none of their scripts has run."""
    _apt(folder, suite, "deb", "download", *packages)
    root = folder / "root"
    for package in sorted(folder.glob("*.deb")):
        require_success(["dpkg-deb", "-x", str(package), str(root)], UNPACK_DEADLINE_S, folder)
        package.unlink()
    return root


def _apt(folder: Path, suite: str, types: str, *command: str) -> None:
    """Runs apt-get in `folder` with lists and settings of its own, which it removes again."""
    keyring = next((path for name in KEYRINGS if (path := Path("/usr/share/keyrings", name)).is_file()), None)
    if keyring is None:
        raise NotReady("Debian's keys are missing: apt-get install debian-archive-keyring")
    apt = folder / "apt"
    for below in ("lists/partial", "cache/archives/partial", "sources.d"):
        (apt / below).mkdir(parents=True)
    (apt / "status").touch()
    (apt / "apt.conf").write_text(APT_CONFIGURATION.format(folder=apt))
    source = APT_SOURCE.format(types=types, mirror=_mirror(), suite=suite, keyring=keyring)
    (apt / "sources.d" / "debian.sources").write_text(source)
    for words in (["update", "-q"], list(command)):
        require_success(["apt-get", "-c", str(apt / "apt.conf"), *words], APT_DEADLINE_S, folder)
    shutil.rmtree(apt)


def _mirror() -> str:
    """The mirror from which this machine has its own Debian packages, else Debian's."""
    asked = ["apt-get", "indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(REPO_URI)", "Created-By: Packages"]
    status, output = output_of(asked, APT_DEADLINE_S)
    for line in output.splitlines() if status == 0 else []:
        origin, _, rest = line.partition("|")
        label, _, mirror = rest.partition("|")
        if (origin, label) == ("Debian", "Debian"):
            return mirror
    return DEBIAN


def _only(folder: Path, pattern: str) -> Path:
    found = list(folder.glob(pattern))
    if len(found) != 1:
        raise NotReady(f"expected one {pattern} in {folder}; came {len(found)}; remove the folder to fetch it anew")
    return found[0]
