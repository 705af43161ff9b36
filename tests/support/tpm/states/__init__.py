"""Ready-made states of simulated TPMs: `vector` has the keys of vectors/activation.json, `press-07`, `press-08` others.

The keys are public, made for these tests alone.
"""

from __future__ import annotations

from pathlib import Path

STATES = Path(__file__).parent


def copy_state(name: str, folder: Path) -> str:
    """Copies the state `name` to a new `folder`, as private as the simulator makes it, and returns its path."""
    folder.mkdir(mode=0o700, parents=True)
    for source in (STATES / name).iterdir():
        copy = folder / source.name
        copy.touch(mode=0o600)
        copy.write_bytes(source.read_bytes())
    return str(folder)
