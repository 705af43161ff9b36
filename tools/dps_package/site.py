"""The documents as a site: each page where it lies in the checkout, so that the links between them are the same."""

from __future__ import annotations

import json
import logging
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from dps_package.distributions import CHECKOUT, BuildFailed

PAGES: dict[str, list[str]] = {
    "Start": ["README.md", "CHANGELOG.md", "SECURITY.md"],
    "Use": [f"docs/{name}.md" for name in ("operators", "upgrades", "ways", "programs", "library", "codes")],
    "Build": [
        f"docs/{name}.md"
        for name in ("factories", "firmware", "platforms", "fleet", "ci", "testing", "emulator", "clients")
    ],
    "Inside": ["docs/architecture.md", "agent/DESIGN.md", "hal/SPEC.md", "micropython/README.md", "docs/power-cuts.md"],
}
_TO_NEWEST = """\
<!doctype html>
<meta charset="utf-8">
<title>dps-agent</title>
<meta http-equiv="refresh" content="0; url={page}">
<a href="{page}">dps-agent</a>
"""
_FENCE = re.compile(r"^(\s*`{3,}\w+) .*$", re.MULTILINE)
_LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


def add_to_site(folder: Path, version: str) -> Path:
    """Builds the documents of one version into `folder`, which may have those of others; the page that leads to them.

    Each page lets its reader change to another version; who names none gets the newest release, or the newest candidate
    where there is no release. A folder whose name is no version is passed over.
    """
    with tempfile.TemporaryDirectory(prefix=".new-", dir=_made(folder)) as name:
        built = build_site(Path(name) / version, version, one_of_many=True)
        shutil.rmtree(folder / version, ignore_errors=True)
        built.rename(folder / version)
    there = [path.name for path in folder.iterdir() if _is_version(path.name) and (path / "README.html").is_file()]
    versions = sorted(there, key=Version, reverse=True)
    latest = next((each for each in versions if not Version(each).is_prerelease), versions[0])
    listed = [{"version": each, "title": each, "aliases": ["latest"] * (each == latest)} for each in versions]
    (folder / "versions.json").write_text(json.dumps(listed))
    index = folder / "index.html"
    index.write_text(_TO_NEWEST.format(page=f"{latest}/README.html"))
    return index


def build_site(out: Path, version: str, one_of_many: bool = False) -> Path:
    """Builds the site into the folder `out`; BuildFailed with every link that leads nowhere."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    with tempfile.TemporaryDirectory(prefix="dps-site-") as name:
        source = Path(name) / "source"
        for page in _pages():
            _copy(page, source)
        configuration: dict[str, Any] = {
            "site_name": f"dps-agent {version}",
            "docs_dir": str(source),
            "site_dir": str(out),
            "use_directory_urls": False,  # it is read from a folder, too
            "strict": True,
            "theme": {"name": "material", "font": False, "features": ["navigation.sections", "content.code.copy"]},
            "nav": [{title: pages} for title, pages in PAGES.items()],
            "plugins": ["search"],
            "markdown_extensions": ["tables", "fenced_code", "sane_lists", "md_in_html", {"toc": {"slugify": _slug}}],
            # What lists the versions is in the folder above, in the form of mike, which the theme reads.
            "extra": {"version": {"provider": "mike"}} if one_of_many else {},
            "validation": {"links": {"not_found": "warn", "anchors": "warn", "unrecognized_links": "warn"}},
        }
        said = _Said()
        logger = logging.getLogger("mkdocs")
        logger.addHandler(said)
        try:
            build(load_config(config_file=_nothing(Path(name)), **configuration))
        except Exception as error:
            raise BuildFailed("\n".join(["the documents are no site:", *said.lines, str(error)])) from error
        finally:
            logger.removeHandler(said)
    return out


class _Said(logging.Handler):
    """What mkdocs complains of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _pages() -> list[str]:
    listed = [page for pages in PAGES.values() for page in pages]
    missing = {str(path.relative_to(CHECKOUT)) for path in (CHECKOUT / "docs").glob("*.md")} - set(listed)
    if missing:
        raise BuildFailed(f"site.py: expected each document in PAGES; {', '.join(sorted(missing))} is not")
    return listed


def _copy(page: str, source: Path) -> None:
    """A page, with fences as mkdocs reads them, and the files that it links to."""
    text = (CHECKOUT / page).read_text(encoding="utf-8")
    target = source / page
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(_FENCE.sub(r"\1", text), encoding="utf-8")
    for link in _LINK.findall(text):
        path = (CHECKOUT / page).parent / link
        if "://" not in link and path.is_file() and path.suffix != ".md":
            linked = source / path.resolve().relative_to(CHECKOUT)
            linked.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, linked)


def _is_version(name: str) -> bool:
    try:
        Version(name)
    except InvalidVersion:
        return False
    return True


def _slug(heading: str, separator: str) -> str:
    """As GitHub makes an anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", separator)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _nothing(folder: Path) -> str:
    path = folder / "mkdocs.yml"
    path.write_text("site_name: x\n")
    return str(path)
