"""What `tools/deploy` makes of many modules: one in which every name means what it meant, and nothing else."""

from __future__ import annotations

import ast
import gc
import re
import sys
from collections.abc import Collection
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from dps_agent.lifecycle import STANDINGS, TRANSITIONS
from dps_agent.patience import PATIENCES
from dps_board.texts import sentence
from dps_deploy.bundles import EMPTY, Unbundled, as_format, bundled, without_certificates, without_notes
from dps_deploy.error_texts import Words, without_sentences
from dps_deploy.modules import compiled, for_a_board, for_firmware, of_any_program, texts_of_errors
from dps_deploy.names import named_in_calls, places_of, short_names, written_short
from dps_deploy.tables import events_as_characters

OURS = ("dps_base", "dps_registration", "dps_hub", "dps_agent", "dps_board", "dps_hal")


def made(monkeypatch: pytest.MonkeyPatch, public: dict[str, tuple[str, ...]], **sources: str) -> dict[str, str]:
    """The bundles of modules of `dps_agent`; those of the tests' own interpreter are out of the way."""
    for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
        monkeypatch.delitem(sys.modules, name)
    trees = {f"dps_agent.{name}": without_notes(ast.parse(source)) for name, source in sources.items()}
    return bundled(trees, {f"dps_agent.{name}": names for name, names in public.items()})


def loaded(monkeypatch: pytest.MonkeyPatch, sources: dict[str, str], name: str) -> Any:
    """The bundle `name`, run by this interpreter."""
    module = ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(sources[name], name, "exec"), module.__dict__)
    return module


def test_names_that_two_modules_have_stay_two_and_what_is_public_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = made(
        monkeypatch,
        {"b": ("ask",)},
        a="_seen = []\n\ndef ask(name):\n    _seen.append(name)\n    return list(_seen)\n",
        b=(
            "from dps_agent.a import ask as ask_a\n\n_seen = ['b']\n\n"
            "def ask(ask_count):\n    return [ask_a(each) for each in range(ask_count)][-1] + _seen\n"
        ),
    )
    base = loaded(monkeypatch, sources, "dps_base")
    assert base.ask(2) == [0, 1, "b"]
    assert sorted(name for name in vars(base) if not name.startswith("__")) == [
        *("_seen", "_seen_b", "ask", "ask_a"),
        *("head", "sys"),  # what the heads of packages call
    ]


def test_what_no_program_asks_for_gets_a_short_name_unless_that_is_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "TABLE = [1]\n_shown = [2]\n\ndef helper(_shown):\n    return _shown + TABLE\n\n"
        "def counted(each):\n    global TABLE\n    TABLE = TABLE + [len(TABLE)]\n    return helper(each.counted)\n\n"
        "class Kept:\n    counted = _shown\n\ndef ask():\n    return counted(Kept)\n"
    )
    tree = without_notes(ast.parse(source))
    short = short_names({"dps_agent.a": tree})
    bundle = bundled({"dps_agent.a": tree}, {"dps_agent.a": ("ask",)}, short)["dps_base"]
    assert sorted(name for _, name in short) == ["TABLE", "_shown", "ask", "counted", "helper"], "classes keep theirs"
    table, helper = short["dps_agent.a", "TABLE"], short["dps_agent.a", "helper"]
    assert f"def {helper}(_shown):\n    return _shown + {table}" in bundle and "def counted(each)" in bundle
    assert "helper" not in bundle and "TABLE" not in bundle
    assert loaded(monkeypatch, {"dps_base": bundle}, "dps_base").ask() == [2, 1, 1]


def test_local_names_hide_those_at_the_head_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = made(
        monkeypatch,
        {"b": ("run",)},
        a="limit = [1]\n\ndef first(each):\n    return each\n",
        b=(
            "from dps_agent.a import first as one, limit\n\n"
            "class Counter:\n    limit = [2]\n\n    def own(self):\n        return limit, self.limit\n\n"
            "def run(first):\n"
            "    def inner(limit):\n        return limit, one(first)\n"
            "    return inner(3), [limit for limit in (4, 5)], Counter().own(), (lambda limit: limit)(6), limit\n"
        ),
    )
    assert loaded(monkeypatch, sources, "dps_base").run(9) == ((3, 9), [4, 5], ([1], [2]), 6, [1])


def test_numbers_and_short_texts_take_the_place_of_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = made(
        monkeypatch,
        {"b": ("SIZE", "size")},
        a='UNIT = 4 * 2\nWORD = "x" * 2\nTABLE = (UNIT, WORD)\nLONG = "y" * 200\n',
        b=(
            "from dps_agent import a\nfrom dps_agent.a import TABLE, UNIT\n\n"
            "SIZE: int = UNIT + 1\n_KINDS = {UNIT: 1}\n\n"
            "def size(UNIT=UNIT):\n    return UNIT + SIZE, a.WORD, TABLE, _KINDS\n"
        ),
    )
    base = loaded(monkeypatch, sources, "dps_base")
    assert base.size() == (17, "xx", (8, "xx"), {8: 1}) and base.SIZE == 9
    assert "WORD" not in sources["dps_base"] and "LONG" not in sources["dps_base"]


def test_what_nobody_asks_for_is_left_out_and_what_acts_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = made(
        monkeypatch,
        {"a": ("wanted",)},
        a=(
            "import gc\nimport sys\n\nKNOWN = {}\n\n"
            "def register(name):\n    KNOWN[name] = len(KNOWN)\n    return name\n\n"
            'FIRST = register("first")\n\ndef unwanted():\n    return gc.collect()\n\n'
            "def wanted():\n    return sorted(KNOWN), sys.maxsize\n"
        ),
    )
    assert loaded(monkeypatch, sources, "dps_base").wanted() == (["first"], sys.maxsize)
    assert "unwanted" not in sources["dps_base"] and "gc" not in sources["dps_base"]


def test_a_phase_is_loaded_when_a_function_imports_it_and_forgotten_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {
        "dps_agent.base": (
            "from dps_board.memory import forget\n\nLIMIT = 5\nshared = ['base']\n\ndef begin(name):\n"
            "    from dps_agent.registration import LIMIT as most, register as go\n"
            "    from dps_agent import registration as ends\n"
            "    return go(name), most, ends.END, ends.register(name)\n\n"
            "def end():\n    forget('dps_agent.registration', 'dps_agent.messages', 'dps_agent.base')\n"
        ),
        "dps_agent.registration": (
            "from dps_agent.base import shared\nfrom dps_agent.messages import write\n\nLIMIT = 7\nEND = 'end'\n\n"
            "def register(name):\n    return shared + write(name)\n"
        ),
        "dps_agent.messages": "def write(name):\n    return [name]\n",
        "dps_board.memory": "def forget(*names):\n    forgotten.extend(names)\n",
    }
    trees = {name: without_notes(ast.parse(source)) for name, source in modules.items()}
    sources = bundled(trees, {"dps_agent.base": ("begin", "end")})
    assert "register" not in vars(loaded(monkeypatch, sources, "dps_base")), "nothing is imported before its time"
    base = sys.modules["dps_base"]
    loaded(monkeypatch, sources, "dps_registration")
    assert base.begin("x") == (["base", "x"], 7, "end", ["base", "x"])
    base.forgotten = []
    base.end()
    assert base.forgotten == ["dps_registration"]


def test_a_program_finds_what_is_public_under_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = made(
        monkeypatch,
        {"b": ("ask",)},
        a="def ask():\n    return 1\n",
        b="from dps_agent.a import ask as x\n\ndef ask():\n    return x() + 1\n",
    )
    base = loaded(monkeypatch, sources, "dps_base")
    package = loaded(monkeypatch, sources, "dps_agent")
    assert package.b is base and sys.modules["dps_agent.b"] is base and "dps_agent.a" not in sys.modules
    monkeypatch.delitem(sys.modules, "dps_agent.b")


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("from dps_agent import b\n\ndef f():\n    return b\n", "uses the module dps_agent.b as a value"),
        ("from dps_agent.b import absent\n\ndef f():\n    return absent\n", "imports absent from dps_agent.b"),
        ("import dps_agent.nowhere\nfrom dps_agent.nowhere import x\n\ndef f():\n    return x\n", "which is not there"),
        ('def f(width):\n    return f"{width:{width}}"\n', "a format made of values"),
        ("import time as gc\n\ndef f():\n    return gc\n", "has another gc than"),
    ],
)
def test_what_a_bundle_cannot_hold_is_refused(monkeypatch: pytest.MonkeyPatch, source: str, said: str) -> None:
    with pytest.raises(Unbundled, match=said):
        made(monkeypatch, {"a": ("f",), "b": ("g",)}, a=source, b="import gc\n\ndef g():\n    return gc\n")


def test_modules_that_import_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Unbundled, match="import each other"):
        made(monkeypatch, {"a": ()}, a="from dps_agent.b import g\n", b="from dps_agent.a import f\n")


def test_what_is_never_reached_is_left_out_and_a_generator_stays_one(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = ast.parse(
        "def first():\n    if MICROPYTHON:\n        return 1\n    return desk()\n\n"
        "def second(held):\n    if held.chain:\n        yield held.chain\n    held.chain = 'x'\n    return 2\n\n"
        "def third(held):\n    if not held.chain:\n        return 3\n    yield from desk()\n\n"
        "def fourth(held):\n    if MICROPYTHON or desk():\n        held = 4\n"
        "    return 'desk' if held.certificate and desk() else held\n"
    )
    source = ast.unparse(ast.fix_missing_locations(without_notes(without_certificates(tree))))
    module = loaded(monkeypatch, {"dps_base": source}, "dps_base")
    held = SimpleNamespace(chain="")
    assert "desk()" not in source and module.first() == 1 and module.fourth(held) == 4
    for generator, value in ((module.second(held), 2), (module.third(held), 3)):
        with pytest.raises(StopIteration) as ended:
            next(generator)
        assert ended.value.value == value
    assert held.chain == "x"


def test_no_certificate_is_shown_by_a_board_and_nothing_asks_for_one() -> None:
    """What a board never has is not in its modules, nor is what only those ask for who have it."""
    trees = [ast.parse(source) for source in for_firmware().values()]
    nodes = [node for tree in trees for each in tree.body[1:] for node in ast.walk(each)]
    asked = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not asked & set(EMPTY) and "hub_key" in asked
    ways = {name for name in imported if name and name.startswith("dps_agent.")}
    assert (
        ways == {"dps_agent.registration_by_key"} and "the certificate is renewed" not in for_firmware()["dps_hub.py"]
    )


@pytest.mark.parametrize("text", ["f'{a}'", "f'a {a!r} {{}} {b:04x}{a.real}'", "f\"{'x'}{a:>3}\"", "f'none'"])
def test_an_f_string_is_the_same_text_as_its_format(text: str) -> None:
    tree = ast.parse(text, mode="eval").body
    assert isinstance(tree, ast.JoinedStr)
    written = ast.unparse(ast.fix_missing_locations(as_format(tree)))
    assert eval(written, {"a": 7, "b": 255}) == eval(text, {"a": 7, "b": 255})


def sentences(source: str) -> tuple[str, list[str]]:
    trees = {"dps_agent.a": ast.parse(source)}
    words = Words()
    without_sentences(trees, words)
    return ast.unparse(ast.fix_missing_locations(trees["dps_agent.a"])), words.texts


def test_the_sentences_of_errors_become_numbers_and_all_other_texts_stay() -> None:
    source, texts = sentences(
        "WORDS = 'expected no change here'\n"
        "def f(came) -> 'AskOperator':\n"
        "    what = f'{came} is not one of them'\n"
        "    line = 'GET / HTTP/1.1 and more'\n"
        "    if came == 'the wait is over':\n"
        "        raise RetryLater('tpm.absent', what + ',')\n"
        "    return AskOperator('tpm.absent', f'{{}} of {came:04x} is odd')\n"
        "def g():\n"
        "    return f('all is as it was'), 'expected a name that fits'\n"
        "def difference(name):\n"
        "    return f'it is for {name}', 'no'\n"
    )
    assert texts[:3] == ["{} is not one of them", "{{}} of {:04x} is odd", "all is as it was"]
    assert texts[3:] == ["expected a name that fits", "it is for {}"] and "sentence(4, name), 'no'" in source
    assert "sentence(0, came)" in source and "sentence(1, came)" in source and "f(sentence(2)), sentence(3)" in source
    for kept in ("'expected no change here'", "'GET / HTTP/1.1 and more'", "'the wait is over'", "','"):
        assert kept in source


def test_a_table_has_the_words_that_its_modules_ask_for_at_the_same_numbers_everywhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the board reads of the table is the words, though pieces of them stand there once."""
    texts = ["no one asks", "expected a {}, came {}", "c", "expected a {{b}}", "expected a {} that fits {}"]
    source = Words(texts).module(["raise ValueError(sentence(1, x))", "sentence(3)", "sentence(4, 5)"])
    assert source.count("expecte") == 1 and "no one asks" not in source
    loaded(monkeypatch, {"dps_texts": source}, "dps_texts")
    assert [sentence(1, 2, 3), sentence(2), sentence(3)] == ["expected a 2, came 3", "", "expected a {{b}}"]
    assert sentence(4, 5, 6) == "expected a 5 that fits 6"
    every = texts_of_errors()
    source = for_firmware()["dps_texts.py"]
    table = loaded(monkeypatch, {"dps_texts": source}, "dps_texts")
    monkeypatch.setattr(gc, "collect", int)  # a board needs the room after each; here it is for the whole run's objects
    lines = [sentence(number) for number in range(len(every))]
    assert all(line in ("", text) for line, text in zip(lines, every, strict=True)) and len(set(lines)) > 100
    assert len(table.PIECES) + len(table.TEXTS) < 0.5 * sum(map(len, lines))


def test_the_words_of_an_error_are_in_ascii() -> None:
    with pytest.raises(Unbundled, match="printable ASCII"):
        Words(["expected a café"]).module(["sentence(0)"])


def test_a_module_by_itself_asks_a_board_for_nothing_that_only_a_type_checker_knows() -> None:
    named = {module.path: "TYPE_CHECKING" in for_a_board(module.file.read_text()) for module in of_any_program()}
    assert len(named) > 20 and not [path for path, is_there in named.items() if is_there]


def test_the_code_of_every_error_is_in_the_bundles() -> None:
    """Whatever the words, nothing that a program compares went with them; but what certificates alone bring about."""
    codes = set()
    for module in of_any_program():
        tree = without_notes(without_certificates(ast.parse(module.file.read_text())))
        for node in ast.walk(tree):
            is_raised = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args
            if is_raised and node.func.id in ("RetryLater", "AskOperator", "IdentityStale", "Broken"):  # type: ignore[attr-defined]
                code = node.args[0]  # type: ignore[attr-defined]
                codes |= {code.value} if isinstance(code, ast.Constant) else set()
    sources = "".join(for_firmware(texts=False).values())
    assert len(codes) > 30 and {code for code in codes if repr(code) not in sources} == set()


SHORT = """
from collections import namedtuple

Reading = namedtuple("Reading", ("celsius", "taken_by_sensor"))


class Base:
    def inherited(self, inherited_count):
        return inherited_count

class Open(Base):
    def ask(self, question, answer=2):
        return question + answer

    def _own(self, hidden):
        return hidden

def helper(named_one, by_place, z):
    total = [by_place for by_place in (1, 2)]
    later = lambda by_place, free: (by_place, free, z)
    def inner(value):
        nonlocal named_one
        named_one += value
        return named_one
    return total, later(3, 4), by_place, inner(5), z

def counted(first, *rest, last=1):
    try:
        raise ValueError(first)
    except ValueError as error:
        second = error
    return str(second), rest, last

def run():
    reading = Reading(celsius=21, taken_by_sensor="s")
    return (
        reading, reading.taken_by_sensor, helper(named_one=1, by_place=2, z=3), counted("x", 2, last=3),
        Open()._own(4), Open().ask(question=1), (lambda it: it * 2)(4), Open().inherited(6),
    )
"""


def shortened(source: str, public: Collection[str] = (), *programs: str) -> str:
    return written_short({"m": source}, programs, public)["m"]


OWN = """
class Counter:
    kind = "counter"

    def __init__(self):
        self._count_so_far, self.shown = 0, 1
        self._by_text = self._asked = self._step_size = self._by_program = 2
        self.__mangled = 3

    def _asked(self):
        return getattr(self, "_by_text")

def run():
    counter = Counter()
    counter._count_so_far += counter._step_size
    return counter._count_so_far, counter.shown, getattr(counter, "_by_text"), counter._asked
"""


def test_an_object_s_own_attributes_have_short_names_unless_anything_else_has_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    short = shortened(OWN, (), "Counter()._by_program")
    before, after = (loaded(monkeypatch, {"dps_base": source}, "dps_base").run() for source in (OWN, short))
    assert before == after == (2, 1, 2, 2)
    assert "_count_so_far" not in short and "_step_size" not in short
    assert all(
        name in short for name in ("self.shown", "self._by_text", "self._asked", "_by_program", "self.__mangled")
    )


def test_the_attributes_of_two_modules_get_the_same_short_name() -> None:
    other = "def f(counter):\n    return counter._count_so_far\n"
    short = written_short({"m": OWN, "n": other}, (), ())
    name = re.findall(r"return _0\.(_\d)\n", short["n"])[0]
    assert f"self.{name}, self.shown = (0, 1)" in short["m"]


UNUSED = """
class Plain:
    def __init__(self):
        self.count = 1

    def __repr__(self):
        return "Plain()"

    @property
    def first(self):
        return self.second

    @property
    def second(self):
        return self.count

class Told(dict):
    def __repr__(self):
        return "Told()"

def run():
    return Plain().count, repr(Told())
"""


def test_what_nobody_asks_for_is_left_out_and_what_that_alone_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    short = written_short({"m": UNUSED}, (), ("run",))["m"]
    assert loaded(monkeypatch, {"dps_base": short}, "dps_base").run() == (1, "Told()")
    assert "first" not in short and "second" not in short and short.count("__repr__") == 1
    kept = written_short({"m": UNUSED}, ["Plain().first"], ("run",))["m"]
    assert "def first" in kept and "def second" in kept


FAMILIES = """
class First:
    def __init__(self):
        self._first_one, self._of_all = 1, 2

    def ask(self):
        return [self._first_one, self._asked_too()]

class Second:
    def __init__(self):
        self._second_one, self._second_two = 3, 4

    def _asked_too(self):
        return self._second_one, self._second_two, self._second_two

class Both(Second, First):
    def __init__(self):
        super().__init__()
        First.__init__(self)

    def _asked_too(self):
        return [super()._asked_too(), self._of_all, lambda: self._first_one]

class Stranger:
    def __init__(self, both):
        self._of_stranger, self._far_less = both, 5

    def ask(self):
        both = self._of_stranger
        return both.ask()[1][:2], both._of_all, self._far_less, self._of_stranger._asked_too()[1]

def run():
    return Stranger(Both()).ask(), Second()._asked_too()
"""


def test_classes_that_are_no_relatives_have_the_same_short_names_for_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Relatives never do, and neither does what is used outside of its class; private methods have one name each."""
    names = short_names({"m": ast.parse(FAMILIES)})
    short = written_short({"m": FAMILIES}, (), (), names)["m"]
    before, after = (loaded(monkeypatch, {"dps_base": source}, "dps_base").run() for source in (FAMILIES, short))
    assert before == after
    used = {name: short.count(f".{name}") for name in re.findall(r"\._\d\b", short)}
    assert sorted(used) == ["._0", "._1", "._2", "._3"] and "_one" not in short and "_far_less" not in short
    assert f".{names['', '_asked_too']}()" in short and "_asked_too" not in short
    assert places_of("_asked_too", {"m": ast.parse(FAMILIES)}) == ["m.Second._asked_too", "m.Both._asked_too"]
    kept = written_short({"m": FAMILIES}, ["Both()._asked_too()"], (), names)["m"]
    assert kept.count("def _asked_too(self)") == 2, "a program asks for it"


def test_a_module_that_is_written_short_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    named = named_in_calls([ast.parse(SHORT), ast.parse("g(other=1)")])
    assert named == {"named_one", "by_place", "z", "last", "question", "other"}, "no fields of named tuples"
    short = shortened(SHORT, {"Open"})
    before, after = (loaded(monkeypatch, {"dps_base": source}, "dps_base").run() for source in (SHORT, short))
    assert before == after
    for kept in ("named_one", "question", "answer", "inherited_count", "(self, inherited_count)", "last=1"):
        assert kept in short
    assert "hidden" not in short and "['celsius', 'taken_by_sensor']" in short and "def counted(_0, *rest" in short


def test_methods_that_nothing_names_are_left_out_but_those_of_public_classes() -> None:
    source = (
        "class Base:\n    def first(self):\n        return self.first()\n\n"
        "class Open(Base):\n    def second(self):\n        pass\n\n"
        "class Life:\n    def first(self):\n        pass\n\n    def third(self):\n        return self.third\n\n"
        "class More:\n    def __str__(self):\n        pass\n\n    def fourth(self):\n        pass\n\n"
        "    def fifth(self):\n        pass\n\n    def sixth(self):\n        return 'fifth'\n"
    )
    tree = ast.parse(shortened(source, {"Open"}, "Life().sixth()"))
    methods = [method.name for node in tree.body if isinstance(node, ast.ClassDef) for method in functions_in(node)]
    assert methods == ["first", "second", "first", "__str__", "fifth", "sixth"]


def functions_in(node: ast.ClassDef) -> list[ast.FunctionDef]:
    return [each for each in node.body if isinstance(each, ast.FunctionDef)]


def test_a_parameter_keeps_its_name_where_another_scope_or_a_handler_has_it_too() -> None:
    sources = [
        "def f(x):\n    try:\n        pass\n    except OSError as x:\n        return x\n",
        "def f(x):\n    global x\n",
        "def f(x):\n    def g(x):\n        return x\n    return g(x)\n",
        "def f(x):\n    import x\n",
        "def f(x):\n    class C:\n        x = x\n    return C\n",
        "def f(x):\n    return _0(x)\n",
    ]
    for source in sources:
        assert "def f(x)" in shortened(source), source


def test_what_a_module_uses_most_has_the_numbers_of_one_byte() -> None:
    rare = "".join(f"    x.rare_{number}()\n" for number in range(150))
    often = "".join(f"    x.often_{number % 20}()\n" for number in range(160))
    source = f"def f(x):\n{rare}{often}"
    short = shortened(source)
    assert short.startswith("if not __name__:\n    __name__.often_")
    assert len(compiled(short, "m.py")) < len(compiled(source, "m.py"))
    assert "__name__" not in shortened("def f(x):\n    return x.y\n"), "few names have one byte each anyway"


TABLE = """
LOW = "low"
FULL = "it is full"
EMPTY = "it is empty"
OTHER = "low: it is full"
TABLE = "\\nlow: it is full: high\\nhigh: it is empty: low\\nhigh: it is full: high\\n"

def run(state, event):
    return TABLE.split(f"\\n{state}: {event}: ")[1].partition("\\n")[0]

def way():
    return run(LOW, FULL), run("high", EMPTY), run("high", FULL), OTHER
"""


def test_the_events_of_a_table_become_characters_and_it_says_what_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = ast.parse(TABLE)
    events_as_characters([tree])
    short = ast.unparse(tree)
    assert "low: a: high" in short and "OTHER = 'low: it is full'" in short and "LOW = 'low'" in short
    before, after = (loaded(monkeypatch, {"dps_base": source}, "dps_base").way() for source in (TABLE, short))
    assert before == after == ("high", "low", "high", "low: it is full")


@pytest.mark.parametrize("use", ["print('it is full')", "print(f'because {EMPTY}')"])
def test_an_event_that_is_shown_is_refused(use: str) -> None:
    with pytest.raises(Unbundled, match="the event"):
        events_as_characters([ast.parse(f"{TABLE}    {use}\n")])


def test_the_tables_of_a_board_have_the_rows_of_the_sources() -> None:
    source = for_firmware()["dps_base.py"]
    texts = [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    for table in (TRANSITIONS, STANDINGS, PATIENCES):
        rows = [row.split(": ") for row in table.strip().split("\n")]
        characters: dict[str, str] = {}
        for _, event, _ in rows:
            characters.setdefault(event, "abcdefghijklmn"[len(characters)])
        assert "".join([f"\n{state}: {characters[event]}: {to}" for state, event, to in rows]) + "\n" in texts
        assert not set(characters) & {text for text in texts if isinstance(text, str)}
