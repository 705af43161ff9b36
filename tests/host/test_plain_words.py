"""The plain reading of a command line beside argparse's, which reads the same declarations."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dps_agent.host.cli.parser import read
from dps_agent.host.cli.plain_words import _Words, read_plain
from dps_agent.host.cli.verb import VERBS, UsageError, declare_program, declare_verb, verb_named
from dps_hal.errors import DpsError

CHECKOUT = Path(__file__).parents[2]


def options_of(*names: str) -> dict[str, tuple[str, ...]]:
    """Each option of these verbs and of the program, and the values to try it with, none where it takes none."""
    found = _Words()
    declare_program(found, None)
    for name in names:
        declare_verb(found, verb_named(name), None)
    return {
        option: () if action == "store_true" else (*choices, "5", "a=b")
        for option, (_, action, _, choices) in found._options.items()
    }


KNOWN = options_of(*VERBS)
ODD = (
    "",
    "-",
    "--",
    "-h",
    "--help",
    "-vv",
    "-1",
    "--forc",
    "--config=x",
    "--json=1",
    "--timeout=5",
    "x y",
    "\udcff",
    "@x",
)
VALUES = ("5", "0", "0x5", "86401", "show", "validate", *sorted({value for tried in KNOWN.values() for value in tried}))
WORD = st.sampled_from([*VERBS, *KNOWN, *VALUES, *ODD]) | st.text(max_size=4)
PAIR = st.tuples(st.sampled_from([option for option in KNOWN if KNOWN[option]]), st.sampled_from(VALUES))
PART = st.one_of(WORD.map(lambda word: (word,)), PAIR, st.sampled_from(list(KNOWN)).map(lambda name: (name,)))
PARTS = st.lists(PART, max_size=4).map(lambda parts: [word for part in parts for word in part])
LINES = st.builds(lambda before, verb, after: [*before, verb, *after], PARTS, st.sampled_from(VERBS), PARTS) | PARTS


def by_argparse(words: list[str]) -> "dict[str, object] | None":
    """What argparse makes of `words`; None where it shows its help, or refuses them."""
    try:
        return vars(read(words))
    except (SystemExit, DpsError):
        return None


@given(words=LINES)
@example(words=["config", "show"])
@example(words=["config", "show", "validate"])
@example(words=["--config", "status", "status"])
@example(words=["--set", "a=b", "--set", "c=d", "token", "--set", "e=f", "--life", "60", "--set", "g=h"])
@example(words=["check", "--only", "a", "--only", "b"])
@example(words=["install-certificate", "--json", "x.pem", "-v"])
@example(words=["enroll", "--format", "xml"])
def test_what_is_read_plainly_is_what_argparse_reads(words: list[str]) -> None:
    plain = read_plain(words)
    if plain is not None:
        assert vars(plain) == by_argparse(words)


PLAIN_LINES = [
    [name, option, *values[:1], *({"config": ["show"], "install-certificate": ["x.pem"]}.get(name, []))]
    for name in VERBS
    for option, values in options_of(name).items()
    if option != "--version"
]


@pytest.mark.parametrize("words", PLAIN_LINES, ids=" ".join)
def test_each_option_of_each_verb_is_read_without_argparse(words: list[str]) -> None:
    said = read_plain(words)
    assert said is not None and vars(said) == by_argparse(words)


@pytest.mark.parametrize(
    "words",
    [
        *([], ["nothing"], ["help"], ["--help"], ["status", "-h"], ["--version"], ["status", "more"], ["config"]),
        *(["config", "look"], ["token", "--life", "soon"], ["token", "--life"], ["status", "--config"]),
        *(["status", "--config", "-"], ["provision", "--forc"], ["--bogus", "status"], ["status", "--"]),
        ["provision", "--timeout=5"],
    ],
    ids=" ".join,
)
def test_anything_else_is_left_to_argparse(words: list[str]) -> None:
    assert read_plain(words) is None


def test_what_is_said_of_a_mistake_is_what_argparse_says() -> None:
    with pytest.raises(UsageError, match="argument --life: expected whole seconds from 1 to 31536000; came 'soon'"):
        read(["token", "--life", "soon"])


def test_a_declaration_that_the_plain_reader_does_not_know_is_refused() -> None:
    with pytest.raises(TypeError):
        _Words().add_argument("file", nargs="*")  # type: ignore[call-arg]


@pytest.mark.parametrize("words", [["status"], ["--config", os.devnull, "token"], ["provision", "--timeout", "5"]])
def test_a_plain_line_does_not_load_argparse(words: list[str]) -> None:
    code = (
        "import sys\nfrom dps_agent.host.cli import _parsed\n_parsed(sys.argv[1:])\n"
        "print([name for name in ('argparse', 'gettext', 'locale', 're', 'enum') if name in sys.modules])"
    )
    paths = os.pathsep.join([str(CHECKOUT / "agent"), str(CHECKOUT / "hal")])
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, *words],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")
