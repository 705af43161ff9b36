"""The two Debian packages.

`dps-agent` brings everything in Python with it, in an environment of its own, and needs of the distribution Python,
tpm2-tss and systemd: it is built for one architecture, distribution and Python. `dps-agent-light` is pure Python: the
TPM back end `wire`, and ujson from the distribution.
"""

import gzip
import hashlib
import os
import platform
import re
import shutil
import sys
import tempfile
import textwrap
import time
import zipfile
from collections.abc import Sequence
from email.parser import HeaderParser
from pathlib import Path
from typing import NamedTuple

from dps_package.completion import script
from dps_package.distributions import CHECKOUT, NOT_ON_DEVICES, BuildFailed, build_time_s, debian_version, run
from dps_package.manual import manual

TEMPLATES = Path(__file__).resolve().parent / "debian"
SERVICE_FOLDER = CHECKOUT / "agent" / "service"
SITE = "usr/lib/dps-agent"  # the agent, and the packages that come with it
SYSTEM_SITE = "/usr/lib/python3/dist-packages"
FOR_PROGRAMS = ("dps_agent", "dps_hal")  # what dps_agent.client consists of
SYSTEM_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
TCTI_LIBRARIES = ("libtss2-tcti-device.so.0",)  # opened by name at run time, so no linker knows of them
BOTH_NEED = ("tpm-udev", "ca-certificates", "systemd")
MODULES = {  # where they are, for distributions whose modules have other names
    "cffi": ["cffi", "_cffi_backend*"],
    "paho-mqtt": ["paho"],
    "tpm2-pytss": ["tpm2_pytss"],
    "ujson": ["ujson*"],
}
COMPLETIONS = {
    "bash": "usr/share/bash-completion/completions/dps-agent",
    "zsh": "usr/share/zsh/vendor-completions/_dps-agent",
    "fish": "usr/share/fish/vendor_completions.d/dps-agent.fish",
}
SUMMARY = "Azure IoT Hub identity from the TPM"
DESCRIPTION = """\
 The agent registers this device with the Device Provisioning Service by its
 TPM 2.0, stores the assigned hub with a key that only this TPM can use, and
 stays connected to that hub.
"""


class Variant(NamedTuple):
    """What one of the packages is: names, what it needs, and the folder of Python packages that comes with it."""

    package: str
    architecture: str
    version: str
    depends: Sequence[str]
    fields: Sequence[str]  # further lines of its control file
    site: Path
    paths: Sequence[str]  # sys.path of its launcher
    defaults: str  # settings that are other than the agent's own, as TOML
    about: str


def build_full(out: Path, wheel: Path, revision: str) -> Path:
    """Builds dps-agent for this machine; `wheel` is the agent."""
    needs = "requirements.txt"
    with tempfile.TemporaryDirectory(prefix="dps-package-") as name:
        site = Path(name) / "site"
        shutil.copytree(_environment(TEMPLATES / needs), site)
        _unpack(wheel, site)
        major, minor, _ = platform.python_version_tuple()
        about = " This variant reaches the TPM through tpm2-tss, with an environment of Python packages of its own.\n"
        variant = Variant(
            package="dps-agent",
            architecture=run(["dpkg", "--print-architecture"]).strip(),
            version=debian_version(_version(wheel), f"{revision}+{_distribution()}"),
            depends=[
                f"python3 (>= {major}.{minor}~)",
                f"python3 (<< {major}.{int(minor) + 1}~)",
                *_libraries(site),
                *BOTH_NEED,
            ],
            fields=[
                "Conflicts: dps-agent-light",
                "Replaces: dps-agent-light",
                "Suggests: tpm2-tools, tpm2-openssl (>= 1.2)",
            ],
            site=site,
            paths=[f"/{SITE}"],
            defaults="",
            about=about,
        )
        return _build(out, variant)


def build_light(out: Path, wheel: Path, revision: str) -> Path:
    """Builds dps-agent-light; `wheel` is the agent."""
    with tempfile.TemporaryDirectory(prefix="dps-package-") as name:
        needs, site = Path(name) / "requirements.txt", Path(name) / "site"
        needs.write_text(pins()["paho-mqtt"])
        shutil.copytree(_environment(needs), site)
        _unpack(wheel, site)
        libraries = [str(path) for path in site.rglob("*.so*")]
        if libraries:
            raise BuildFailed(f"expected pure Python; came {libraries}")
        version = debian_version(_version(wheel), revision)
        variant = Variant(
            package="dps-agent-light",
            architecture="all",
            version=version,
            depends=["python3 (>= 3.11~)", "python3-ujson", *BOTH_NEED],
            fields=[
                f"Provides: dps-agent (= {version})",
                "Conflicts: dps-agent",
                "Replaces: dps-agent",
                "Suggests: python3-cryptography, tpm2-openssl (>= 1.2)",
            ],
            site=site,
            paths=[f"/{SITE}", SYSTEM_SITE],
            defaults='# This package has no tpm2-tss.\n[tpm]\nbackend = "wire"\n',
            about=" This variant is pure Python and needs no tpm2-tss: TPMs with a device node, and swtpm.\n",
        )
        return _build(out, variant)


def pins() -> dict[str, str]:
    """Name -> the pin of what comes with dps-agent, with the digests of the files that may be that, as pip reads it."""
    text = re.sub(r"^#.*\n", "", (TEMPLATES / "requirements.txt").read_text(), flags=re.MULTILINE)
    return {pin.partition("==")[0]: pin for pin in re.split(r"\n(?=\w)", text)}


def _environment(requirements: Path) -> Path:
    """A folder with the Python packages of a requirements file, made once; without programs and compiled bytes."""
    wanted = f"{sys.version} {platform.machine()} {_distribution()} 1\n{requirements.read_text()}"
    cache = Path(os.environ.get("DPS_PACKAGE_CACHE") or Path(sys.prefix).parent)
    folder = cache / f"package-site-{hashlib.sha256(wanted.encode()).hexdigest()[:12]}"
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory(dir=cache, prefix="package-site-") as name:
        made = Path(name) / "site"
        # Debugging symbols name the folder of the build, and would differ with every build.
        environ = {**os.environ, "PATH": f"{Path(sys.prefix) / 'bin'}:{SYSTEM_PATH}", "CFLAGS": "-g0", "TZ": "UTC"}
        options = [
            "--require-hashes",
            "--no-deps",
            "--no-compile",
            "--no-input",
            "--quiet",
            "--disable-pip-version-check",
        ]
        pip = [sys.executable, "-m", "pip", "install", *options, "--target", str(made), "-r", str(requirements)]
        run(pip, environ)
        shutil.rmtree(made / "bin", ignore_errors=True)
        for stub in made.glob("*-stubs"):
            shutil.rmtree(stub)
        for library in made.rglob("*.so*"):
            run(["strip", "--strip-unneeded", "--remove-section=.comment", str(library)])
        for information in made.glob("*.dist-info"):
            for name_inside in ("RECORD", "INSTALLER", "REQUESTED", "direct_url.json"):
                (information / name_inside).unlink(missing_ok=True)
        try:
            made.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    return folder


def _unpack(wheel: Path, site: Path) -> None:
    """Puts the agent into `site`, without what is for no device and what is about the wheel alone."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    for name in NOT_ON_DEVICES:
        shutil.rmtree(site / name)
    for name in ("RECORD", "WHEEL", "entry_points.txt"):
        for path in site.glob(f"dps_agent-*.dist-info/{name}"):
            path.unlink()


def _version(wheel: Path) -> str:
    return wheel.name.split("-")[1]


def _distribution() -> str:
    """The distribution this is built on, e.g. debian12: libraries of one do not fit another."""
    found = platform.freedesktop_os_release()
    return f"{found['ID']}{found.get('VERSION_ID', '')}"


def _libraries(site: Path) -> list[str]:
    """The distribution's packages that the compiled parts of `site` need, in Debian's own words."""
    with tempfile.TemporaryDirectory(prefix="dps-package-") as name:
        (Path(name) / "debian").mkdir()
        (Path(name) / "debian" / "control").write_text("Source: dps-agent\n\nPackage: dps-agent\nArchitecture: any\n")
        binaries = sorted(str(path) for path in site.rglob("*.so*"))
        words = ["dpkg-shlibdeps", "-O", "--warnings=0", *(word for path in binaries for word in ("-e", path))]
        found = run(words, {**os.environ, "PATH": SYSTEM_PATH}, Path(name)).strip()
    packages = found.removeprefix("shlibs:Depends=").split(", ")
    for library in TCTI_LIBRARIES:
        packages.append(run(["dpkg-query", "-S", f"*/{library}"]).partition(":")[0])
    return sorted(packages)


def _build(out: Path, variant: Variant) -> Path:
    epoch_s = build_time_s()
    with tempfile.TemporaryDirectory(prefix="dps-package-") as name:
        tree = Path(name)
        shutil.copytree(variant.site, tree / SITE)
        _fill(tree, variant, epoch_s)
        _control(tree, variant)
        _settle(tree, epoch_s)
        path = out / f"{variant.package}_{variant.version}_{variant.architecture}.deb"
        environ = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch_s), "PATH": SYSTEM_PATH}
        run(["dpkg-deb", "--root-owner-group", "-Zxz", "--build", str(tree), str(path)], environ)
    return path


def _fill(tree: Path, variant: Variant, epoch_s: int) -> None:
    """Everything but the Python packages and DEBIAN/."""
    documents = f"usr/share/doc/{variant.package}"
    launcher = (TEMPLATES / "launcher").read_text().replace("@PATHS@", ", ".join(f'"{at}"' for at in variant.paths))
    contents = {
        "usr/bin/dps-agent": launcher,
        "etc/dps-agent/config.toml": (SERVICE_FOLDER / "config.toml").read_text(),
        **({f"{SITE}/dps_agent/host/defaults.toml": variant.defaults} if variant.defaults else {}),
        "usr/lib/systemd/system/dps-agent.service": (SERVICE_FOLDER / "dps-agent.service").read_text(),
        "usr/lib/systemd/catalog/dps-agent.catalog": (SERVICE_FOLDER / "dps-agent.catalog").read_text(),
        "usr/lib/sysusers.d/dps-agent.conf": (SERVICE_FOLDER / "dps-agent.sysusers").read_text(),
        "usr/share/man/man8/dps-agent.8.gz": manual(epoch_s),
        f"{documents}/copyright": _copyright(tree / SITE),
        f"{documents}/changelog.gz": (CHECKOUT / "CHANGELOG.md").read_text(),
        f"{documents}/changelog.Debian.gz": _debian_changelog(variant, epoch_s),
        **{at: script(shell) for shell, at in COMPLETIONS.items()},
    }
    for name, text in contents.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        content = text.encode()
        path.write_bytes(gzip.compress(content, 9, mtime=0) if name.endswith(".gz") else content)
    library = tree / SYSTEM_SITE.lstrip("/")
    library.mkdir(parents=True)
    for name in FOR_PROGRAMS:  # any program of the system's Python may import the client, and none of what came with us
        (library / name).symlink_to(os.path.relpath(f"/{SITE}/{name}", SYSTEM_SITE))
    (tree / "usr/bin/dps-agent").chmod(0o755)
    (tree / "etc/dps-agent/config.d").mkdir(exist_ok=True)


def _control(tree: Path, variant: Variant) -> None:
    """DEBIAN/: what dpkg reads and runs."""
    size_kib = sum(-(-path.lstat().st_size // 1024) for path in tree.rglob("*") if path.is_file())
    control = [
        f"Package: {variant.package}",
        "Source: dps-agent" if variant.package != "dps-agent" else "",
        f"Version: {variant.version}",
        f"Architecture: {variant.architecture}",
        f"Maintainer: {maintainer()}",
        f"Installed-Size: {size_kib}",
        f"Depends: {', '.join(variant.depends)}",
        *variant.fields,
        "Section: net",
        "Priority: optional",
        f"Description: {SUMMARY}",
        (DESCRIPTION + _wrapped(variant.about)).rstrip(),
    ]
    sums = [
        f"{hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()}  {path.relative_to(tree)}"
        for path in sorted(tree.rglob("*"))
        if path.is_file() and not str(path.relative_to(tree)).startswith("etc/")
    ]
    folder = tree / "DEBIAN"
    folder.mkdir()
    (folder / "control").write_text("".join(f"{line}\n" for line in control if line))
    (folder / "md5sums").write_text("".join(f"{line}\n" for line in sums))
    conffiles = sorted(f"/{path.relative_to(tree)}\n" for path in (tree / "etc").rglob("*") if path.is_file())
    (folder / "conffiles").write_text("".join(conffiles))
    for name in ("postinst", "prerm", "postrm"):
        (folder / name).write_text((TEMPLATES / name).read_text().replace("@PACKAGE@", variant.package))
        (folder / name).chmod(0o755)


def _settle(tree: Path, epoch_s: int) -> None:
    """Modes that do not depend on who builds, and one time for everything."""
    for path in (tree, *tree.rglob("*")):
        executable = path.is_dir() or (path.stat().st_mode & 0o100 and path.suffix == "" and not path.is_symlink())
        path.chmod(0o755 if executable else 0o644)
        os.utime(path, (epoch_s, epoch_s), follow_symlinks=False)


def maintainer() -> str:
    """As Debian's own tools are told: $DEBFULLNAME and $DEBEMAIL."""
    name = os.environ.get("DEBFULLNAME") or "The dps-agent authors"
    return f"{name} <{os.environ.get('DEBEMAIL') or 'maintainers@dps-agent.invalid'}>"


def _debian_changelog(variant: Variant, epoch_s: int) -> str:
    date = time.strftime("%a, %d %b %Y %H:%M:%S +0000", time.gmtime(epoch_s))
    upstream = variant.version.rpartition("-")[0]
    return (
        f"dps-agent ({variant.version}) unstable; urgency=medium\n\n"
        f"  * Version {upstream}; what changed is in changelog.gz.\n\n"
        f" -- {maintainer()}  {date}\n"
    )


def _copyright(site: Path) -> str:
    """The licences of the agent and of every package that comes with it, in Debian's form, with their texts."""
    licence = (CHECKOUT / "LICENSE").read_text()
    holder = next(line for line in licence.splitlines() if line.startswith("Copyright"))
    parts = [
        "Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\nUpstream-Name: dps-agent\n",
        f"Files: *\nCopyright: {holder.removeprefix('Copyright (c) ')}\nLicense: Expat\n{_indented(licence)}",
    ]
    for information in sorted(site.glob("*.dist-info")):
        fields = HeaderParser().parsestr((information / "METADATA").read_text())
        name = fields["Name"]
        if name == "dps-agent":
            continue
        texts = sorted(path for path in information.rglob("*") if _is_licence(path))
        if not texts:
            raise BuildFailed(f"{name}: expected the text of its licence in {information.name}")
        short = (fields["License-Expression"] or fields["License"] or "as below").splitlines()[0]
        author = fields["Author"] or fields["Author-email"] or fields["Maintainer-email"] or f"the authors of {name}"
        text = "\n".join(f"{path.name}:\n{_licence_text(path)}" for path in texts)
        folders = " ".join(sorted(_files_of(name, site)))
        parts.append(f"Files: {folders}\nCopyright: {author}\nLicense: {short}\n{_indented(text)}")
    return "\n".join(parts)


def _is_licence(path: Path) -> bool:
    return path.is_file() and re.match(r"(LICEN[CS]E|COPYING|AUTHORS|NOTICE|edl|epl)", path.name, re.I) is not None


def _licence_text(path: Path) -> str:
    """The text, or where every Debian system has it."""
    text = path.read_text(errors="replace")
    if "Apache License" in text and "END OF TERMS AND CONDITIONS" in text:
        return "/usr/share/common-licenses/Apache-2.0\n"
    return text


def _files_of(name: str, site: Path) -> list[str]:
    """Where the modules of a bundled distribution are, as patterns."""
    modules = MODULES.get(name, [name])
    for module in modules:
        if not list(site.glob(module)):
            raise BuildFailed(f"{name}: expected {module} in the environment")
    return [f"{SITE}/{module}{'' if '*' in module else '/*'}" for module in modules]


def _indented(text: str) -> str:
    return "".join(f" {line.rstrip()}\n" if line.strip() else " .\n" for line in text.strip().splitlines())


def _wrapped(text: str) -> str:
    return "".join(f" {line}\n" for line in textwrap.wrap(text.strip(), 76))
