"""A signed APT repository as a folder of files, which any web server serves.

The form is the flat one of apt: `Packages`, `Release`, `InRelease` beside the packages. Source: sources.list(5),
DebianRepository/Format.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from email.utils import parsedate_to_datetime
from pathlib import Path

from dps_package.distributions import BuildFailed, build_time_s, run

VARIABLE = "DPS_RELEASE_KEY"
PUBLIC_KEY = "dps-agent.asc"
ORIGIN = "dps-agent"
INDICES = (PUBLIC_KEY, "Packages", "Release.gpg", "Release", "InRelease")  # in the order in which they are replaced


def build_repository(folder: Path, packages: Sequence[Path], key: str) -> list[Path]:
    """Adds packages to the repository in `folder`, which it makes where there is none, and signs what it has then.

    `key` is the secret key, armoured; it lies in a folder in memory while this runs. Packages of earlier releases that
    are there stay, so that a device can go back to them. Nothing is changed unless all of it could be made; each file
    is whole at any time, and what is signed comes last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    new = [path for path in packages if not (folder / path.name).exists()]
    for path in packages:
        there = folder / path.name
        if path not in new and there.read_bytes() != path.read_bytes():
            raise BuildFailed(f"{there}: there is another package of this version: a release is never changed")
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as work, _keyring(key) as gpg:
        made = Path(work)
        for path in new:
            shutil.copyfile(path, made / path.name)
        paths = {path.name: path for path in (*folder.glob("*.deb"), *made.glob("*.deb"))}
        index = "\n".join(_paragraph(path) for _, path in sorted(paths.items())).encode()
        (made / "Packages").write_bytes(index)
        (made / "Release").write_text(_release(index, max(build_time_s(), _date_s(folder / "Release"))))
        for name, words in (("InRelease", ["--clear-sign"]), ("Release.gpg", ["--armor", "--detach-sign"])):
            run([*gpg, *words, "--digest-algo", "SHA512", "--output", str(made / name), str(made / "Release")])
        (made / PUBLIC_KEY).write_text(run([*gpg, "--armor", "--export"]))
        for name in (*sorted(path.name for path in new), *INDICES):
            (made / name).chmod(0o644)
            (made / name).replace(folder / name)
    return [folder / name for name in INDICES]


def check_sums(sums: Path, packages: Sequence[Path]) -> None:
    """BuildFailed unless each file that `sums` names lies beside it and is what it says, and it names each package."""
    named: dict[str, str] = {}
    for line in sums.read_text().splitlines():
        digest, _, name = line.partition("  ")
        named[name] = digest
    wrong = [f"{path.name} is not in it" for path in packages if path.name not in named]
    for name, digest in named.items():
        path = sums.with_name(name)
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            wrong.append(f"{name} is another file")
    if wrong:
        raise BuildFailed(
            f"{sums}: expected the sums of what lies beside it; came: {', '.join(wrong)}: "
            "nothing is signed; begin with an empty folder and run tools/release again"
        )


def sign_sums(sums: Path, key: str) -> Path:
    """Signs the file of a release's digests; the signature, armoured, lies beside it. `check_sums` comes first."""
    signature = sums.with_name(f"{sums.name}.asc")
    with _keyring(key) as gpg:
        run([*gpg, "--armor", "--detach-sign", "--digest-algo", "SHA512", "--output", str(signature), str(sums)])
    signature.chmod(0o644)
    return signature


def key_from_environment() -> str:
    """The secret key, taken out of there: no program that is started gets it. BuildFailed where there is none."""
    key = os.environ.pop(VARIABLE, "")
    if "-----BEGIN PGP PRIVATE KEY BLOCK-----" not in key:
        raise BuildFailed(f"expected an armoured secret key in {VARIABLE}; came {'another text' if key else 'nothing'}")
    return key


def _paragraph(path: Path) -> str:
    """What apt reads of one package."""
    content = path.read_bytes()
    fields = run(["dpkg-deb", "--field", str(path)]).rstrip("\n")
    found = [f"Filename: ./{path.name}", f"Size: {len(content)}", f"SHA256: {hashlib.sha256(content).hexdigest()}"]
    return "\n".join([fields, *found, ""])


def _date_s(release: Path) -> int:
    """When the repository says that it was made; 0 where there is none. apt ignores one that is older than before."""
    found = re.search(r"^Date: (.*)$", release.read_text(), re.MULTILINE) if release.exists() else None
    return int(parsedate_to_datetime(found[1]).timestamp()) if found else 0


def _release(index: bytes, epoch_s: int) -> str:
    architectures = sorted(set(re.findall(rb"^Architecture: (\w+)$", index, re.MULTILINE)))
    return (
        f"Origin: {ORIGIN}\nLabel: {ORIGIN}\n"
        f"Date: {time.strftime('%a, %d %b %Y %H:%M:%S UTC', time.gmtime(epoch_s))}\n"
        f"Architectures: {b' '.join(architectures).decode()}\n"
        f"SHA256:\n {hashlib.sha256(index).hexdigest()} {len(index)} Packages\n"
    )


@contextlib.contextmanager
def _keyring(key: str) -> Iterator[list[str]]:
    """How gpg is called with this key alone; what holds it is gone afterwards."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="dps-key-", dir=memory) as home:
        gpg = ["gpg", "--homedir", home, "--batch", "--yes", "--quiet"]
        try:
            done = subprocess.run(
                [*gpg, "--import"], input=key, text=True, capture_output=True, check=False, timeout=60
            )
            if done.returncode:
                raise BuildFailed(f"{VARIABLE}: gpg does not take the key: {done.stderr.strip()}")
            yield gpg
        finally:
            subprocess.run(["gpgconf", "--homedir", home, "--kill", "all"], check=False, timeout=60)
