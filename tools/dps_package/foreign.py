"""dps-agent-light for systems without dpkg: rpm, apk and ipk, by nfpm, from the files of the Debian package.

Nothing here has been installed on such a system: what the files are called and what they need is from the systems'
own package lists.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from dps_package.deb import DESCRIPTION, SITE, SUMMARY, TEMPLATES, maintainer
from dps_package.distributions import CHECKOUT, BuildFailed, build_time_s, run

WITHOUT = (  # Debian's own places, or not there
    *("usr/share/doc", "usr/share/bash-completion", "usr/share/zsh", "usr/share/fish", "usr/lib/python3"),
)
SYSTEMD = ("usr/lib/systemd", "usr/lib/sysusers.d")


class Form(NamedTuple):
    """One packager, and what the package needs by that system's names."""

    packager: str
    suffix: str
    depends: tuple[str, ...]
    has_systemd: bool


FORMS = (
    Form("rpm", ".noarch.rpm", ("python3 >= 3.11", "python3-ujson", "ca-certificates", "systemd"), True),
    Form("apk", ".apk", ("python3>=3.11", "py3-ujson", "ca-certificates"), False),
    Form("ipk", "_all.ipk", ("python3", "ca-bundle"), False),  # no feed of OpenWrt has ujson: docs/platforms.md
)


def build_foreign(out: Path, light: Path) -> list[Path]:
    """Builds all three from the Debian package `light`."""
    version = run(["dpkg-deb", "--field", str(light), "Version"]).strip().rpartition("-")[0]
    built = []
    with tempfile.TemporaryDirectory(prefix="dps-package-") as name:
        tree = Path(name) / "tree"
        run(["dpkg-deb", "--extract", str(light), str(tree)])
        for path in WITHOUT:
            shutil.rmtree(tree / path)
        launcher = (TEMPLATES / "launcher").read_text().replace("@PATHS@", f'"/{SITE}"')
        # The system's own folder of packages is known to its Python, which -S would keep from looking there.
        (tree / "usr/bin/dps-agent").write_text(launcher.replace(" -IS\n", " -I\n").replace("-IS keeps", "-I keeps"))
        for form in FORMS:
            built.append(_build(out / f"dps-agent-light-{version}{form.suffix}", tree, form, version))
    return built


def _build(path: Path, tree: Path, form: Form, version: str) -> Path:
    epoch_s = build_time_s()
    time_text = run(["date", "--utc", f"--date=@{epoch_s}", "+%Y-%m-%dT%H:%M:%SZ"]).strip()
    contents = [
        {
            "src": str(source),
            "dst": f"/{source.relative_to(tree)}",
            "file_info": {"mode": 0o755 if source == tree / "usr/bin/dps-agent" else 0o644, "mtime": time_text},
            **({"type": "config|noreplace"} if "etc" in source.relative_to(tree).parts[:1] else {}),
        }
        for source in sorted(tree.rglob("*"))
        if source.is_file() and (form.has_systemd or not str(source.relative_to(tree)).startswith(SYSTEMD))
    ]
    configuration = {
        "name": "dps-agent-light",
        "arch": "all",
        "platform": "linux",
        "version": version,
        "version_schema": "none",
        "release": "1",
        "maintainer": maintainer(),
        "description": f"{SUMMARY}\n{DESCRIPTION}",
        "license": "MIT",
        "mtime": time_text,
        "depends": list(form.depends),
        "contents": contents,
        "rpm": {"buildhost": "localhost", "group": "Unspecified", "summary": SUMMARY},
    }
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        json.dump(configuration, file)  # JSON is YAML
        file.flush()
        environ = {**os.environ, "SOURCE_DATE_EPOCH": str(epoch_s), "TZ": "UTC"}
        words = ["nfpm", "package", "--config", file.name, "--packager", form.packager, "--target", str(path)]
        run(words, environ, CHECKOUT)
    if not path.is_file():
        raise BuildFailed(f"nfpm has not written {path.name}")
    return path
