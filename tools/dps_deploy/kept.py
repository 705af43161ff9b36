"""Bundles that were made before: to make them takes seconds, and what they are made of says all that they are.

They stay in the cache folder of the tools, or in that which DPS_DEPLOY_CACHE names.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from fresh_machine import cache_folder

MOST = 50  # files, of 200 KB each
_MAKERS = sorted(Path(__file__).parent.glob("*.py"))


def kept(made_of: object, read: Iterable[Path], make: Callable[[], dict[str, str]]) -> dict[str, str]:
    """What `make` returns, texts by name; from the folder where it was made before of the same.

    `made_of` is what JSON can hold and `read` are files: all that the result depends on, beside this package.
    """
    digest = hashlib.sha256(json.dumps([sys.version, made_of]).encode())
    for path in [*_MAKERS, *sorted(read)]:
        content = path.read_bytes()
        digest.update(f"\n{path} {len(content)}\n".encode() + content)
    folder = Path(os.environ.get("DPS_DEPLOY_CACHE") or cache_folder() / "bundles")
    path = folder / f"{digest.hexdigest()}.json"
    with contextlib.suppress(OSError, ValueError):
        found: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
        os.utime(path)
        return found
    made = make()
    with contextlib.suppress(OSError):  # without a place for it, it is made again
        _keep(path, json.dumps(made))
    return made


def _keep(path: Path, text: str) -> None:
    """Writes the file as a whole, and removes those that have not been used for longest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
        file.write(text)
    os.replace(file.name, path)
    by_age = sorted(path.parent.glob("*.json"), key=lambda each: each.stat().st_mtime)
    for old in by_age[:-MOST]:
        old.unlink(missing_ok=True)
