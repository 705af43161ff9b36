"""The completion scripts of the Debian package, asked in the shells that they are for.

ALLOW_SKIP=zsh,fish in the environment leaves those shells out.
"""

import os
import pty
import re
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from support.built_packages import build, unpacked

ALLOWED = set(os.environ.get("ALLOW_SKIP", "").replace(",", " ").split())
SHELLS = [shell for shell in ("bash", "zsh", "fish") if shell not in ALLOWED]
DEADLINE_S = 120

# What is typed; some of the words that then fit, and one that does not.
EXPECTED = [
    ("dps-agent ", {"provision", "run", "status", "check", "config"}, "show"),
    ("dps-agent pro", {"provision"}, "status"),
    ("dps-agent config ", {"show", "validate"}, "provision"),
    ("dps-agent provision --", {"--force", "--timeout", "--config", "--json"}, "--offline"),
    ("dps-agent enroll --format ", {"text", "csv", "json", "az"}, "show"),
    ("dps-agent --set tpm.ba", {"tpm.backend="}, "tpm.tcti="),
    ("dps-agent provision --set hub.t", {"hub.transport=", "hub.token_life_s="}, "hub.ca_file="),
    ("dps-agent check --only tpm-", {"tpm-node", "tpm-ek", "tpm-self-challenge"}, "settings"),
]

ASK_BASH = """\
source "$1"
line="$2"
read -ra COMP_WORDS <<<"$line"
[[ $line == *' ' ]] && COMP_WORDS+=('')
COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMP_LINE="$line" COMP_POINT=${#line}
function=$(complete -p dps-agent | sed 's/.* -F \\([^ ]*\\) .*/\\1/')
compopt() { :; }  # works in a real completion only
"$function" dps-agent "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The three scripts, where the package puts them."""
    folder = tmp_path_factory.mktemp("package")
    share = unpacked(build(folder, "--light")[0], folder / "root") / "usr/share"
    return {
        "bash": share / "bash-completion/completions/dps-agent",
        "zsh": share / "zsh/vendor-completions/_dps-agent",
        "fish": share / "fish/vendor_completions.d/dps-agent.fish",
    }


def asked_bash(script: Path, line: str) -> set[str]:
    done = subprocess.run(
        ["bash", "--norc", "-c", ASK_BASH, "bash", script, line],
        capture_output=True,
        text=True,
        check=True,
        timeout=DEADLINE_S,
    )
    assert not done.stderr, done.stderr
    return {word.strip() for word in done.stdout.splitlines()}


def asked_fish(script: Path, line: str) -> set[str]:
    done = subprocess.run(
        ["fish", "--no-config", "-c", 'source $argv[1]; complete -C "$argv[2]"', script, line],
        capture_output=True,
        text=True,
        check=True,
        timeout=DEADLINE_S,
    )
    return {word.partition("\t")[0] for word in done.stdout.splitlines()}


def asked_zsh(script: Path, line: str) -> set[str]:
    """Types the line and Tab into a zsh of its own, and reads what it offers."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(TERM="dumb", PS1="", PROMPT="", HISTFILE="")
        os.execvp("zsh", ["zsh", "-f", "-i"])
    try:
        for command in (
            "PS1=''; setopt no_always_last_prompt list_ambiguous no_list_beep; LISTMAX=1000; stty -echo cols 200",
            f"fpath=({script.parent} $fpath); autoload -Uz compinit; compinit -u -D",
            "zstyle ':completion:*' list-separator '  '; bindkey '^X' list-choices; echo rea''dy",
        ):
            os.write(terminal, f"{command}\n".encode())
        read_until(terminal, "ready")
        os.write(terminal, f"{line}\x18".encode())
        offered = read_until(terminal, None)
        os.write(terminal, b"\t")
        inserted = read_until(terminal, None)
    finally:
        os.close(terminal)
        os.waitpid(pid, 0)
    return set(re.findall(r"[\w.=-]+", offered + inserted))


def read_until(terminal: int, word: str | None) -> str:
    """What the terminal shows until `word` came, or until it is quiet."""
    text = ""
    until_s = time.monotonic() + DEADLINE_S
    quiet_s = 1.5 if word is None else DEADLINE_S
    while time.monotonic() < until_s and (word is None or word not in text):
        if not select.select([terminal], [], [], quiet_s)[0]:
            break
        text += os.read(terminal, 65536).decode(errors="replace")
    assert word is None or word in text, f"zsh did not say {word}: {text}"
    return text


ASKED = {"bash": asked_bash, "zsh": asked_zsh, "fish": asked_fish}


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(("line", "fitting", "foreign"), EXPECTED, ids=[line.strip() for line, _, _ in EXPECTED])
def test_a_shell_offers_what_fits_and_nothing_else(
    shell: str, line: str, fitting: set[str], foreign: str, scripts: dict[str, Path]
) -> None:
    assert shutil.which(shell), f"{shell} is missing: apt-get install {shell}, or ALLOW_SKIP={shell}"
    offered = ASKED[shell](scripts[shell], line)
    typed = set(line.split())
    assert fitting <= offered | typed, f"{shell} offers for {line!r}: {sorted(offered)}"
    assert foreign not in offered, f"{shell} offers for {line!r}: {sorted(offered)}"
