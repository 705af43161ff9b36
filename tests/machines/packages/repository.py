"""A signed APT repository behind a web server on this machine, and what the page about it has a device do."""

from __future__ import annotations

import contextlib
import functools
import http.server
import threading
from typing import TYPE_CHECKING

from dps_package.repository import PUBLIC_KEY, build_repository
from support.documents import CHECKOUT, blocks_of, commands_of
from support.release_key import release_key

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PAGE = CHECKOUT / "docs" / "upgrades.md"
ADDRESS = "https://example.com/dps-agent"  # on the page
VERSION = "=0.1.0-1"  # likewise
ADDING, UPGRADING, GOING_BACK = "/etc/apt/keyrings", "--only-upgrade", VERSION


class _Quiet(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, without a line for each."""

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


class Repository:
    """One such repository: its files, its address on the loopback interface, and the key that signs it."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        self.url = url
        self._key = release_key("release")

    @property
    def public_key(self) -> Path:
        """The file that devices get."""
        return self.folder / PUBLIC_KEY

    def add(self, package: Path) -> None:
        """A further release."""
        build_repository(self.folder, [package], self._key)

    def commands(self, part: str, version: str = "") -> list[str]:
        """The commands of the page's block that has `part` in it, as root types them in a system without sudo."""
        blocks = [block for block in blocks_of(PAGE) if block.detail == "root" and part in block.text]
        if len(blocks) != 1:
            raise ValueError(f"{PAGE.name}: expected one block with {part}; there are {len(blocks)}")
        given = {"sudo ": "", ADDRESS: self.url, VERSION: f"={version}"}
        lines = commands_of(blocks[0])
        for shown, real in given.items():
            lines = [line.replace(shown, real) for line in lines]
        return lines


@contextlib.contextmanager
def repository(folder: Path) -> Iterator[Repository]:
    """An empty one, served for as long as the block lasts."""
    folder.mkdir()
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield Repository(folder, f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
            thread.join()


def altered(package: Path) -> None:
    """One byte in the middle of a file becomes another; its size stays."""
    with package.open("r+b") as file:
        file.seek(package.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
