"""One target under atheris, which is libFuzzer for Python: `tools/fuzz` runs this once for each.

Its own process: libFuzzer ends the one that it is in. Only what is imported inside the block below is watched.
"""

from __future__ import annotations

import hashlib
import sys
import warnings
from pathlib import Path

import atheris

OURS = ["dps_agent", "dps_board", "dps_emulator", "dps_enroll", "dps_hal", "dps_text"]
INPUT_LIMIT = 8192  # bytes
HANG_S = 60  # for one input, on a machine that does other things too
MEMORY_MIB = 2048

with atheris.instrument_imports(include=OURS):
    from support.fuzz.targets import TARGETS


def main() -> None:
    """`python -m support.fuzz NAME SECONDS CORPUS FOUND`, or `… NAME FILE` for one input; never returns."""
    warnings.simplefilter("ignore")  # `cryptography` warns of every odd certificate
    target = TARGETS[sys.argv[1]]

    def take(content: bytes) -> None:
        target.take(content)

    if len(sys.argv) == 3:
        taken = target.take(Path(sys.argv[2]).read_bytes())
        print(f"{target.name}: {'taken' if taken else 'refused'}")
        return
    seconds, corpus, found = sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
    corpus.mkdir(parents=True, exist_ok=True)
    found.mkdir(parents=True, exist_ok=True)
    for seed in target.seeds():
        (corpus / hashlib.sha1(seed, usedforsecurity=False).hexdigest()).write_bytes(seed)
    options = [
        f"-max_total_time={seconds}",
        f"-max_len={INPUT_LIMIT}",
        f"-timeout={HANG_S}",
        f"-rss_limit_mb={MEMORY_MIB}",
        f"-artifact_prefix={found}/",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], str(corpus), *options], take)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
