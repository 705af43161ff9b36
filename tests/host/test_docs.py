"""The documents say what the code does: its tables, names and options are those of the documents."""

import ast
import re
import shlex
from argparse import ArgumentParser
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from dps_agent import backoff, driver, http1, lifecycle, patience, session, twin, utc
from dps_agent.host.cli.parser import command_line
from dps_agent.host.cli.verb import VERBS
from dps_agent.host.config import environment_name, load
from dps_agent.host.journal import Journal
from dps_agent.host.local import events, routes, server
from dps_agent.host.network import https
from dps_agent.host.settings_table import KEYS
from dps_agent.lifecycle import BOOT, PROVISIONED, STANDINGS, TRANSITIONS, TRUSTED
from dps_agent.patience import CALM, PATIENCES
from dps_board import mqtt as board_mqtt
from dps_board import runner as board_runner
from dps_board.keys import read_values
from dps_deploy.settings import ON_A_BOARD
from dps_emulator.cli import _parser as emulator_parser
from dps_emulator.faults import _FIELDS, DPS_OPERATIONS, HUB_OPERATIONS
from dps_enroll.cli import _parser as enroll_parser
from dps_enroll.enrol import RESULTS
from dps_hal import platform
from dps_hal.errors import EXIT_GROUPS
from dps_hal.host.codes import REMEDIES
from generated_files import AREAS, HINT, MADE, outdated
from support.board import mps2_lives
from support.documents import (
    CHECKOUT,
    CODES,
    DOCUMENTS,
    OPERATORS,
    Block,
    blocks_of,
    commands_of,
    name_of,
    prose_of,
    table_under,
)

DESIGN = CHECKOUT / "agent" / "DESIGN.md"
SPEC = CHECKOUT / "hal" / "SPEC.md"
FIRMWARE = CHECKOUT / "docs" / "firmware.md"
README = CHECKOUT / "README.md"
EMULATOR = CHECKOUT / "docs" / "emulator.md"
FACTORIES = CHECKOUT / "docs" / "factories.md"
SOURCES = sorted([*(CHECKOUT / "agent").rglob("*.py"), *(CHECKOUT / "hal").rglob("*.py")])
FILES = ("api.sock", "config.json", "config.toml")
BOARD_KEYS = ("board.wifi_password_file", *read_values(b'{"id_scope": "x"}', "config.json"))


def code(text: str) -> str:
    """A cell's text without the backquotes round it."""
    return text.removeprefix("`").removesuffix("`")


def column(document: Path, title: str, index: int = 0) -> list[str]:
    """One column of the table behind a heading, without backquotes."""
    return [code(row[index]) for row in table_under(document, title)]


def rows_of(table: str) -> list[list[str]]:
    """State, event and next state of each row of a machine's table."""
    return [row.split(": ") for row in table.strip().splitlines()]


def diagram(table: str, first: str, last: str = "") -> str:
    """A machine's table as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", f"    [*] --> {first}"]
    lines += [f"    {source} --> {target}: {event}" for source, event, target in rows_of(table)]
    return "\n".join([*lines, *([f"    {last} --> [*]"] if last else [])])


@pytest.mark.parametrize(
    "wanted",
    [diagram(TRANSITIONS, BOOT, PROVISIONED), diagram(STANDINGS, TRUSTED), diagram(PATIENCES, CALM)],
    ids=["life", "standing", "patience"],
)
def test_the_diagrams_in_the_design_are_the_tables(wanted: str) -> None:
    drawn = f"```mermaid\n{wanted}\n```"
    assert drawn in DESIGN.read_text(), f"put this into {DESIGN.name}:\n{drawn}"


# States and codes.


def test_what_is_made_from_the_tables_in_the_code_is_as_it_would_be_made() -> None:
    assert not [str(path) for path, _ in outdated()], HINT


WITHIN = (
    "# keep_alive_s = ",
    "Correct the setting",
    "correct the setting",
    "| `hub.keep_alive_s",
    "| `board.bus_hz",
    '("board.bus',
    ">boot<",
    ">trusted<",
    ">calm<",
)


@pytest.mark.parametrize(("name", "words"), [*zip(MADE, WITHIN, strict=True)], ids=MADE)
def test_what_somebody_writes_into_what_is_made_is_noticed(name: str, words: str) -> None:
    text = (CHECKOUT / name).read_text()
    assert words in text
    assert MADE[name](text.replace(words, f"{words}x")) == text


def code_rows() -> dict[str, list[str]]:
    """The rows of all tables of codes, by code."""
    return {code(row[0]): row for title in AREAS.values() for row in table_under(CODES, title)}


def test_every_error_code_is_documented_and_no_other() -> None:
    assert set(code_rows()) == set(REMEDIES)


@cache
def texts_of_the_source() -> str:
    """Every literal text in the product, with … where an expression stands in it."""
    found: list[str] = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def pieces(line: str) -> list[str]:
    """The fixed words of a documented line."""
    return [piece for part in re.split(r"(?<=refused )\w+|…|: |[(){};,]|'|\d+", line) if len(piece := part.strip()) > 2]


SYSTEM_SAYS = {"No space left on device", "Read-only file system"}


def test_the_words_of_every_documented_line_stand_in_the_source() -> None:
    lines = {name: code(row[1]) for name, row in code_rows().items()}
    lines |= {row[0]: code(row[2]) for row in table_under(CODES, "States")}
    for name, line in lines.items():
        for piece in pieces(line):
            known = piece in SYSTEM_SAYS or piece in texts_of_the_source()
            assert known, f"{CODES.name}, {name}: the source has no text with {piece!r}"


def test_words_that_are_not_in_the_source_would_be_noticed() -> None:
    assert pieces("… was never said (closed: …)") == ["was never said", "closed"]
    assert "was never said" not in texts_of_the_source()


def test_every_state_is_documented_and_no_other() -> None:
    states = {state for source, _, target in rows_of(TRANSITIONS) for state in (source, target)}
    assert set(column(CODES, "States")) == states


# Operators.


def test_the_table_of_journal_fields_has_every_field_that_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[str, str] = {}
    monkeypatch.setattr(Journal, "_write", lambda self, text, level, fields: written.update(fields))
    Journal(environ={}).event("halted", "text", code="tpm.denied")
    fields = [field for field in column(OPERATORS, "The journal") if field.isupper()]
    assert sorted(fields) == sorted(written)


def test_the_table_of_exit_statuses_is_complete() -> None:
    rows = table_under(OPERATORS, "Exit status and JSON")
    assert [code(row[1]) for row in rows] == list(EXIT_GROUPS)
    assert [row[0] for row in rows] == [str(number) for number in range(len(EXIT_GROUPS))]


def test_every_verb_is_in_the_table_of_commands_and_no_other() -> None:
    named = {
        name.split()[0]
        for row in table_under(OPERATORS, "From the TPM to the hub")
        for name in re.findall("`(.+?)`", row[0])
    }
    assert named == set(VERBS)


# The emulator.


def test_every_command_of_the_emulator_is_in_its_table_and_no_other() -> None:
    rows = table_under(EMULATOR, "Commands for a running emulator")
    named = {name.split()[0] for row in rows for name in re.findall("`(.+?)`", row[0])}
    assert named == set(subparsers(emulator_parser()))


def test_every_option_of_the_emulator_is_documented() -> None:
    own = subparsers(emulator_parser())
    options = {row[0].strip("`").split()[0] for row in table_under(EMULATOR, "Options of `serve`")}
    assert options == flags(own["serve"]) - {"--help"}
    text = EMULATOR.read_text()
    for name, parser in own.items():
        for flag in flags(parser) - {"--help", "--json", "--state-dir"}:
            assert f"{flag} " in text or f"{flag}`" in text, f"{EMULATOR.name}: {name} {flag} is missing"


def test_every_option_and_every_result_of_an_enrolment_is_documented() -> None:
    rows = table_under(FACTORIES, "Options of `dps-enroll`")
    assert {row[0].strip("`").split()[0] for row in rows} == flags(enroll_parser()) - {"--help"}
    assert column(FACTORIES, "What becomes of each") == list(RESULTS)


def test_every_kind_of_breakage_and_every_field_of_a_fault_is_documented() -> None:
    breakage = subparsers(emulator_parser())["break"]
    choices = next(action.choices for action in breakage._actions if action.dest == "what")
    assert column(EMULATOR, "Breaking things") == list(choices or ())
    rows = [row for head in ("Which requests:", "What goes wrong, in any combination:") for row in rows_behind(head)]
    assert {name for row in rows for name in re.findall("`(.+?)`", row[0])} == set(_FIELDS)
    assert {*DPS_OPERATIONS, *HUB_OPERATIONS} <= set(re.findall("`(.+?)`", rows[2][1]))


def rows_behind(line: str) -> list[list[str]]:
    """The table behind a line of the emulator's page."""
    behind = EMULATOR.read_text().partition(f"\n{line}\n")[2].lstrip("\n")
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in behind.partition("\n\n")[0].splitlines()]
    return rows[2:]


# Names in all documents.


def subparsers(parser: ArgumentParser) -> dict[str, ArgumentParser]:
    """The parsers of a program's verbs; none for a program without verbs."""
    found = next((action.choices for action in parser._actions if isinstance(action.choices, dict)), {})
    assert isinstance(found, dict)
    return found


def flags(parser: ArgumentParser) -> set[str]:
    """The long options of one parser."""
    return {flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")}


@cache
def programs() -> dict[str, ArgumentParser]:
    """Ours, whose command lines can be read."""
    return {"dps-agent": command_line(), "dps-emulator": emulator_parser(), "dps-enroll": enroll_parser()}


def command_lines(text: str) -> Iterator[list[str]]:
    """Each call of one of our programs in a line of shell, as words."""
    for inner in re.findall(r"\$\(([^()]*)\)", text):
        yield from command_lines(inner)
    lexer = shlex.shlex(re.sub(r"\$\([^()]*\)", "$inner", text), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if not re.fullmatch(r"[();<>|&]+", word):
            words += [word] if words or not (word == "sudo" or re.fullmatch(r"\w+=.*", word)) else []
            continue
        if words and words[0] in programs():
            yield words
        words = ["to"] if set(word) & set("<>") else []  # a file's name follows


def documents_with_their_blocks() -> list[Block]:
    return [found for document in DOCUMENTS for found in blocks_of(document) if found.language in ("sh", "yaml")]


@pytest.mark.parametrize("block", documents_with_their_blocks(), ids=lambda block: block.place)
def test_every_command_line_of_ours_is_one_that_the_program_takes(block: Block) -> None:
    for line in commands_of(block):
        for program, *words in command_lines(line):
            try:
                programs()[program].parse_args(words)
            except SystemExit as refused:
                raise AssertionError(f"{block.place}: {program} refuses {words}") from refused


@pytest.mark.parametrize("block", documents_with_their_blocks(), ids=lambda block: block.place)
def test_no_command_asks_in_a_loop_until_something_is_there(block: Block) -> None:
    assert not re.search(r"\b(until|while)\b[^\n]*\bdo\b", block.text), "our programs wait by themselves"


# What a document tells to do to the machine and no trial of the package or of the virtual machine does.
ON_A_MACHINE_OF_ONES_OWN = (
    *("python3 -m venv", "pip install", "export PATH", "usermod -aG", "apt-get update"),
    *("ln -s /opt/", "install -D", "systemd-sysusers", "sed -i"),
)
TRIALS = CHECKOUT / "tests" / "machines"


def verb_of(command: str) -> str:
    """The program and its first word of a command that changes the machine: `systemctl enable`."""
    words = [word for word in command.split() if word != "sudo"]
    return " ".join(words[:2]) if words[0] != "journalctl" else words[0]


def test_every_command_that_changes_the_machine_is_also_part_of_a_trial() -> None:
    tried = "\n".join(path.read_text() for path in TRIALS.rglob("*.py")).replace("{APT}", "apt-get")
    blocks = [found for document in DOCUMENTS for found in blocks_of(document) if found.detail == "root"]
    assert blocks
    for block in blocks:
        for command in commands_of(block):
            verb = verb_of(command)
            known = command.startswith(("dps-agent", "sudo dps-agent", "tools/")) or any(
                part in command for part in ON_A_MACHINE_OF_ONES_OWN
            )
            assert known or verb in tried, f"{block.place}: nothing tries '{verb}'"


def test_every_option_of_a_tool_is_one_that_it_takes() -> None:
    for block in documents_with_their_blocks():
        for command in commands_of(block):
            if command.startswith("tools/"):
                assert not unknown_to_tool(command), f"{block.place}: {unknown_to_tool(command)}"


def unknown_to_tool(command: str) -> set[str]:
    """The options in a call of a program in tools that this program's parser does not know."""
    words = shlex.split(command, comments=True)
    return {word.partition("=")[0] for word in words[1:] if word.startswith("--")} - tool_flags(words[0])


@cache
def tool_flags(tool: str) -> set[str]:
    """Every option that one program in tools takes: the texts in its source that are nothing but an option."""
    program = CHECKOUT / tool
    folders = [CHECKOUT / name for name in TOOL_FOLDERS.get(program.name, ())]
    sources = [program, *(path for folder in folders for path in folder.rglob("*.py"))]
    nodes = [node for path in sources for node in ast.walk(ast.parse(path.read_text()))]
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {text for text in texts if re.fullmatch(r"--[a-z][a-z-]+", text)}


TOOL_FOLDERS = {
    "deploy": ("tools/dps_deploy",),
    "fleet": ("tools/dps_fleet",),
    "package": ("tools/dps_package",),
    "release": ("tools/dps_package",),
    "vm-test": ("tests/machines/vm",),
}


def test_an_option_of_another_tool_is_noticed() -> None:
    assert unknown_to_tool("tools/package --light --cuts 3  # --nothing") == {"--cuts"}
    assert not unknown_to_tool("tools/vm-test --cuts 3")


def test_a_command_line_that_the_program_does_not_take_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    line = "x=$(dps-agent --config a.toml status --json | jq .x) && sudo dps-emulator move a b --state-dir c >d"
    assert list(command_lines(line)) == [
        ["dps-agent", "--config", "a.toml", "status", "--json"],
        ["dps-emulator", "move", "a", "b", "--state-dir", "c"],
    ]
    with pytest.raises(SystemExit):
        programs()["dps-emulator"].parse_args(["move", "a", "b", "--state-dir", "c", "--no-such-option"])
    assert "unrecognized" in capsys.readouterr().err


def spans(document: Path) -> list[str]:
    """The text between backquotes in the prose of a document."""
    return [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", prose_of(document))]


def faults_of(span: str) -> Iterator[str]:
    """What in a span of code is a name of ours that does not exist."""
    words = span.split()
    known: set[str] = set()
    if words[0] in programs():
        own = subparsers(programs()[words[0]])
        verb = next((word for word in words[1:] if not word.startswith("-")), "")
        if own and verb and verb not in own and verb.islower():
            yield f"{words[0]} has no verb {verb!r}"
        known = flags(programs()[words[0]]) | (flags(own[verb]) if verb in own else set())
    elif words[0].startswith("--"):
        parsers = [each for parser in programs().values() for each in (parser, *subparsers(parser).values())]
        known = {flag for parser in parsers for flag in flags(parser)}
        known |= {flag for flag in tools_flags() if flag in span}
    elif words[0].startswith("tools/") and len(words) > 1:
        known = tool_flags(words[0]) | {"-h"}
    if known:
        yield from (f"no option {word}" for word in re.findall(r"(?<!\S)--[a-z][a-z-]*", span) if word not in known)
    variables = {environment_name(key) for key in KEYS}
    yield from (f"no variable {name}" for name in re.findall(r"DPS_AGENT_\w+", span) if name not in variables)
    is_dotted = re.fullmatch(r"(tpm|store|record|dps|network|hub|clock|config|agent|retry|api)\.[a-z_]+", span)
    if is_dotted and not (span in KEYS or span in REMEDIES or span in FILES):
        yield f"neither a setting nor a code: {span}"
    match = re.fullmatch(r"([a-z_]+) = .+", span)
    if match and match[1] not in {key.rpartition(".")[2] for key in [*KEYS, *BOARD_KEYS]}:
        yield f"no setting {match[1]}"


@cache
def tools_flags() -> set[str]:
    """Every option that a program in tools takes, by its text."""
    texts = [
        path.read_text() for path in (CHECKOUT / "tools").rglob("*") if path.is_file() and path.suffix in ("", ".py")
    ]
    return set(re.findall(r"--[a-z][a-z-]+", "\n".join(texts)))


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_every_option_setting_variable_and_code_that_is_named_exists(document: Path) -> None:
    found = [f"`{span}`: {fault}" for span in spans(document) for fault in faults_of(span)]
    assert not found, f"{document.name}: {found}"


@pytest.mark.parametrize(
    "span",
    [
        "dps-agent connect",
        "dps-agent check --online",
        "--no-such-option",
        "DPS_AGENT_SCOPE",
        "tpm.back_end",
        "id_scop = 1",
        "dps-emulator serve --ports 1",
        "tools/demo --cuts 3",
    ],
)
def test_a_name_that_does_not_exist_is_noticed(span: str) -> None:
    assert list(faults_of(span))


def settings_files() -> list[Block]:
    found = [block for document in DOCUMENTS for block in blocks_of(document) if block.language == "toml"]
    return [block for block in found if "[board]" not in block.text]


@pytest.mark.parametrize("block", settings_files(), ids=lambda block: block.place)
def test_every_settings_file_that_is_shown_is_accepted(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "shown.toml"
    path.write_text(block.text)
    load(path, environ={"HOME": str(tmp_path)}, need_id_scope=False)


def test_both_pages_on_boards_have_the_heaps_on_which_the_emulated_board_lives() -> None:
    """The rows of one table are the columns of the other; the lives hold what is left, and run on the smallest."""
    columns = list(zip(*[row[1:] for row in table_under(FIRMWARE, "What it takes")], strict=True))
    page = (CHECKOUT / "micropython" / "README.md").read_text()
    cell = r" ([^|\n]+) \|"
    rows = re.findall(rf"\| (?:frozen into|in a ROMFS|`\.mpy` files in)[^|]*\|{cell}{cell}{cell}", page)
    assert rows == columns
    assert [row[2] for row in rows] == [str(kib) for kib in mps2_lives.HEAPS_KIB.values()]
    assert [row[1] for row in rows if row[1].isdigit()] == [str(kib) for kib in mps2_lives.LEFT_KIB.values()]
    assert f"a heap of {rows[0][2]} KiB or more" in page


def test_the_transcript_of_a_board_is_as_its_life_prints_it_and_shows_that_life() -> None:
    (shown,) = [found.text for found in blocks_of(FIRMWARE) if "== power cut" in found.text]
    wide = mps2_lives.CONSOLE_WIDTH + 8
    rows = [mps2_lives.Row(float(line[:6]), line[8:wide].rstrip(), line[wide:].strip()) for line in shown.splitlines()]
    assert [row.text() for row in rows] == shown.splitlines()
    assert [row.after_s for row in rows] == sorted(row.after_s for row in rows)
    happened = iter([row.console or row.cloud for row in rows])
    for event in (
        *("== switched on", "DPS register 401", "DPS register 202", "DPS lookup 200", "hub connected", "hub telemetry"),
        *("hub method-answer", "message 3000", "desired 2", "== power cut", "== switched on", "hub connected"),
    ):
        assert event in happened, f"{event!r} is not behind those before it"
    assert [row.cloud for row in rows].count("DPS register 202") == 1


# Numbers in prose: each sentence here is made of the constants that it speaks of.

FEW = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
KIB = 1024
SPANS = {60: "a minute", 1800: "half an hour", 3600: "an hour", 86400: "a day"}  # seconds, in words


def percent(share: float) -> str:
    """A share as prose has it."""
    return f"{share * 100:.0f}"


def delays(failures: int) -> str:
    """The shortest and the longest delay before the hub is dialled again, after so many connections that failed."""
    shortest_s = backoff.exponential_floor_s(failures, backoff.HUB_FIRST_S, backoff.HUB_LIMIT_S)
    return f"{shortest_s:.0f} to {2 * shortest_s:.0f} s"


HELD_NUMBERS = [
    (OPERATORS, f"Each user has a share, whatever number of programs it runs: {server.CLIENTS[1]} connections,"),
    (OPERATORS, f"{server.STREAMS[1]} of them reading events, {server.UNDER_WAY[1]} messages and"),
    (OPERATORS, f"{server.BYTES[1] // KIB} KiB of them, topics included, under way to the hub"),
    (OPERATORS, f"The hub takes {session.TELEMETRY_LIMIT} bytes of body and properties"),
    (OPERATORS, f"has no acknowledgement within {routes.TELEMETRY_LIMIT_S:.0f} s is answered with 504"),
    (OPERATORS, f"JSON; within {session.METHOD_LIMIT_S} s"),
    (OPERATORS, f"at most {routes.TOKEN_LIFE_LIMIT_S} s; only with `allow_token`"),
    (OPERATORS, f"{FEW[routes.USER_TOKENS_A_MINUTE]} a minute for a user, sixteen for all but root"),
    (
        OPERATORS,
        f"The service holds up to {session.MESSAGE_LIMIT} messages, {events.HELD_LIMIT // KIB**2} MiB as they are",
    ),
    (OPERATORS, f"hung up {FEW[session.SHORT_ENDS_LIMIT]} times in a row is given up"),
    (OPERATORS, f"when its hub has not existed for {lifecycle.HUB_GONE_S // 60} minutes"),
    (OPERATORS, f"a random moment within {FEW[lifecycle.START_SPREAD_S]} seconds"),
    (OPERATORS, f"within so many seconds, at least {FEW[lifecycle.START_SPREAD_S]};"),
    (
        OPERATORS,
        f"it is renewed at {(session.RENEW_AT - session.RENEW_SPREAD) * 100:.0f} to {session.RENEW_AT * 100:.0f} %",
    ),
    (OPERATORS, f"of at most {routes.TOKEN_LIFE_LIMIT_S // 60} minutes, to whoever may use the socket"),
    (OPERATORS, f"never to more than {FEW[utc.AGREEMENT_S // 60]} minutes before what the last run believed"),
    (SPEC, f"of which none was steady yet, at most {patience.CONNECTS_LIMIT};"),
    (DESIGN, f"up to {FEW[patience.CONNECTS_LIMIT]}, from where the delay"),
    (DESIGN, f"{backoff.HUB_LIMIT_S // 2} to {backoff.HUB_LIMIT_S} s in the end"),
    (DESIGN, f"{backoff.HUB_FIRST_S // 2} to {backoff.HUB_FIRST_S} s at first"),
    (DESIGN, f"message on the connection that ended, the delay is {delays(patience.SERVED_LIMIT)} at most"),
    (DESIGN, f"until a connection has lasted {FEW[lifecycle.STEADY_S // 60]} minutes"),
    (DESIGN, f"is erased {FEW[session.IDLE_AFTER_S]} seconds after the hub accepted the newer one"),
    (DESIGN, f"and up to {backoff.POLL_LIMIT_S} s elsewhere (a longer one counts as that much)"),
    (DESIGN, f"{http1.HEAD_LIMIT // KIB} KiB of heads and {http1.LINES_LIMIT} lines in all for each answer"),
    (DESIGN, f"({https.BODY_LIMIT // KIB} KiB bodies,"),
    (DESIGN, f"for each answer, {platform.NESTING_LIMIT} levels)"),
    (DESIGN, f"is obeyed** up to {SPANS[backoff.THROTTLE_LIMIT_S]} with 429 and 503"),
    (DESIGN, f"before a wait over {driver._RELEASE_FOR_S} s |"),
    (DESIGN, f"before a wait over {driver._CLOSE_FOR_S} s, before the hub is dialled"),
    (DESIGN, f"the renewal is tried once {SPANS[session.RENEW_AGAIN_S]} until it expires"),
    (DESIGN, f"and only for {SPANS[lifecycle.HUB_GONE_S]} without anything else in between"),
    (DESIGN, f"from where the delay, {delays(patience.CONNECTS_LIMIT - 1)}, grows no more"),
    (DESIGN, f"keeps the device waiting {delays(patience.PROVOKED_LIMIT)} at most"),
    (DESIGN, f"it asks DPS about once {SPANS[backoff.HALTED_S]}"),
    (DESIGN, f"hangs up again ever more rarely, up to {SPANS[session.LACKING_LIMIT_S]}"),
    (DESIGN, f"meets a 429 waits {backoff.THROTTLED_STEP_S // 2} to {backoff.THROTTLED_STEP_S} s"),
    (DESIGN, f"followed by n minutes or less (`throttled_s`), up to {SPANS[backoff.WAITING_LIMIT_S]}"),
    (DESIGN, f"is renewed at {percent(session.RENEW_AT - session.CONNECT_SPREAD)} to {percent(session.RENEW_AT)} %"),
    (DESIGN, f"after it at {percent(session.RENEW_AT - session.RENEW_SPREAD)} to {percent(session.RENEW_AT)} %"),
    (DESIGN, f"of the twin is asked for ever more rarely**, up to {FEW[twin.TWIN_AGAIN_LIMIT_S // 3600]} hours"),
    (FIRMWARE, f"makes the agent begin anew after {board_runner.NO_ROOM_S} s"),
    (FIRMWARE, f"`publish(payload, properties=None, limit_s={board_runner.TELEMETRY_LIMIT_S})`"),
    (FIRMWARE, f"Messages of more than {board_mqtt.PAYLOAD_LIMIT // KIB} KiB arrive without their payload"),
    (FIRMWARE, f"for its acknowledgement is {board_mqtt.IN_FLIGHT_LIMIT // KIB} KiB in all"),
    (FIRMWARE, f"after which the hub hung up {FEW[session.SHORT_ENDS_LIMIT]} times in a row"),
    (FIRMWARE, f"So `watchdog_s` is at least {min(filter(ON_A_BOARD['board.watchdog_s'].accepts, range(1, 600)))},"),
]


@pytest.mark.parametrize(("document", "words"), HELD_NUMBERS, ids=[words[:40] for _, words in HELD_NUMBERS])
def test_a_number_in_prose_is_the_constant_s(document: Path, words: str) -> None:
    assert words in " ".join(prose_of(document).split()), f"{document.name}: expected '{words}'"


# Links.


def anchor(heading: str) -> str:
    """What a link to a heading ends with, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-")


@pytest.mark.parametrize("document", [*DOCUMENTS, DESIGN, SPEC], ids=name_of)
def test_every_link_leads_to_a_file_and_a_heading_that_exist(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose_of(document)):
        if target.startswith("https://"):
            continue
        name, _, fragment = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        assert path.exists(), f"{document.name}: {target} leads nowhere"
        if fragment:
            headings = re.findall(r"^#+ (.+)$", prose_of(path), re.M)
            assert fragment in map(anchor, headings), f"{document.name}: {target}: no such heading"


# The README.


def test_the_first_screen_says_what_it_is_and_has_the_two_commands() -> None:
    first = README.read_text().splitlines()[:30]
    text = "\n".join(first)
    assert first[0] == "# dps-agent"
    assert "tools/demo " in text
    assert "tools/test " in text
    assert "no cloud account, no TPM, no root" in text


def test_the_readme_stays_short() -> None:
    assert len(README.read_text().splitlines()) <= 200


def test_the_readme_leads_to_every_document_and_names_folders_and_tools_that_exist() -> None:
    text = README.read_text()
    for path in (CHECKOUT / "docs").glob("*.md"):
        assert f"(docs/{path.name})" in text, f"{README.name}: no link to docs/{path.name}"
    for row in table_under(README, "The repository"):
        for name in re.findall("`(.+?)`", row[0]):
            assert (CHECKOUT / name).exists() or (CHECKOUT / "tests" / name).exists(), f"{README.name}: no {name}"
