"""A secret key of nobody, to sign repositories of tests with."""

from __future__ import annotations

import subprocess
import tempfile


def release_key(name: str) -> str:
    """An armoured secret key without a passphrase, as `tools/release` takes it; what made it is gone."""
    with tempfile.TemporaryDirectory(prefix="dps-key-") as home:
        gpg = ["gpg", "--homedir", home, "--batch", "--quiet", "--passphrase", "", "--pinentry-mode", "loopback"]
        try:
            subprocess.run([*gpg, "--quick-gen-key", f"{name} <{name}@x.invalid>", "ed25519", "sign"], check=True)
            words = [*gpg, "--armor", "--export-secret-keys"]
            return subprocess.run(words, check=True, capture_output=True, text=True).stdout
        finally:
            subprocess.run(["gpgconf", "--homedir", home, "--kill", "all"], check=True)
