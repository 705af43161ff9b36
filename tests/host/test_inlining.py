"""Functions that one place calls are written there, and the program does what it did."""

import ast
import asyncio
import re
from typing import Any

import pytest

from dps_deploy.inlining import inlined

# Each has `run`, which returns what it does; functions and methods that begin with `gone` are to be written elsewhere,
# those that begin with `stays` not.
DONE = {
    "an expression": """
def gone(a, b=2):
    return a + b
def run():
    return gone(1) * 3
""",
    "an expression in several places": """
def gone(a):
    return a == 1 or a > 5
def run():
    one, two = 1, 3
    return gone(one), gone(two), gone(6)
""",
    "arguments by name": """
def gone(a, b):
    return [a, b]
def run():
    return gone(b=1, a=2)
""",
    "a body behind a return": """
def gone(a):
    for each in a:
        if each > 1:
            return each
def run(x=(0, 1, 2, 3)):
    if x:
        return gone(x)
    return -1
""",
    "a body that returns nothing behind a return": """
def gone(a):
    a.append(1)
def run():
    found = []
    if not found:
        return gone(found)
    return found
""",
    "a body in an assignment, with the same names": """
def gone(a):
    total = 0
    for each in a:
        total += each
    return total
def run():
    total = 5
    each = gone([1, 2, 3])
    return total, each
""",
    "a body before a condition and before an error": """
log = []
def gone(a):
    log.append(a)
    return len(log) > a
def gone_too(text):
    text = text + "!"
    return ValueError(text)
def run():
    try:
        if gone(0):
            raise gone_too("no")
    except ValueError as error:
        return str(error)
""",
    "a last statement that may end early": """
log = []
def gone(a):
    if a > 1:
        return
    log.append(a)
def tell(a):
    log.append("told")
    gone(a)
def run():
    tell(1)
    tell(2)
    return log
""",
    "early ends where more follows": """
def gone(a):
    if a == 1:
        return "one"
    if a == 2:
        b = "two"
    elif a == 3:
        raise ValueError("three")
    else:
        b = "more"
    if a > 10:
        return b + "!"
def told(a):
    try:
        found = gone(a)
    except ValueError as error:
        return str(error)
    return found
def run():
    return [told(each) for each in (1, 2, 3, 4, 11)]
""",
    "an error that is caught inside": """
def gone(a):
    try:
        found = int(a)
    except ValueError as error:
        found = str(error)
    return found
def run():
    error = "kept"
    found = gone("x")
    return found, error
""",
    "generators and coroutines": """
import asyncio
def gone():
    got = yield 1
    if got:
        return got
    yield 2
def told():
    yield 0
    return (yield from gone())
async def gone_later(a):
    await asyncio.sleep(0)
    return a + 1
async def later():
    return await gone_later(1)
def run():
    made = told()
    seen = [next(made), next(made)]
    try:
        made.send("end")
    except StopIteration as end:
        seen.append(end.value)
    return seen, list(told()), asyncio.run(later())
""",
    "methods, by the class": """
class A:
    def _gone(self, a):
        return self.a + a
    def b(self):
        return self._gone(2)
class B:
    def _gone(self, a):
        return self.a * a
    def b(self):
        return self._gone(2)
def run():
    found = []
    for kind in (A, B):
        one = kind()
        one.a = 5
        found.append(one.b())
    return found
""",
    "an import": """
def gone(text):
    from json import loads as read
    return read(text)
def run():
    read = 1
    found = gone("[2]")
    return read, found
""",
    "one in another": """
def gone(a):
    return gone_too(a) + 1
def gone_too(a):
    b = a * 2
    return b
def run():
    found = gone(4)
    return found
""",
}
LEFT = {
    "what is used as a value": """
def stays(a):
    return a
def run():
    return stays(1), list(map(stays, [1, 2]))
""",
    "what a text has": """
def stays():
    return 1
def run():
    return globals()["stays"](), stays()
""",
    "what calls itself": """
def stays(a):
    return a and stays(a - 1) + 1
def run():
    return stays(3)
""",
    "arguments that would be evaluated in another order, or twice, or not at all": """
log = []
def note(a):
    log.append(a)
    return a
def stays(a, b):
    return b - a
def stays_too(a):
    return a + a
def stays_as_well(a, b):
    return a or b
def run():
    return note(0), stays(note(1), note(2)), stays_too(note(3)), stays_as_well(note(4), note(5)), log
""",
    "what is evaluated behind something else": """
log = []
def note(a):
    log.append(a)
    return a
def stays(a):
    b = len(log)
    return a + b
def run():
    return note(7) + stays(1)
""",
    "a method that another class has as well": """
class A:
    def _stays(self):
        return 1
    def b(self):
        return self._stays()
class B(A):
    def _stays(self):
        return 2
def run():
    return A().b(), B().b()
""",
    "a method of another object": """
class A:
    def _stays(self):
        return 1
def run():
    a = A()
    return a._stays()
""",
    "a method that a class has by another name, too": """
class A:
    def _stays(self):
        return 1
    table = {"a": _stays}
    def b(self):
        return self._stays()
def run():
    return A().b(), A.table["a"](A())
""",
    "a method that a class within a function overrides": """
class A:
    def _stays(self):
        return 1
    def b(self):
        return self._stays()
def run():
    class B(A):
        def _stays(self):
            return 2
    return A().b(), B().b()
""",
    "a method that a class overrides by assignment": """
class A:
    def _stays(self):
        return 1
    def b(self):
        return self._stays()
class B(A):
    _stays = lambda self: 5
def run():
    return A().b(), B().b()
""",
    "a method that a function calls of what it names self": """
class A:
    def _stays(self):
        return 1
    def b(self):
        return self._stays()
def other(self):
    return self._stays() + 1
def run():
    return A().b(), other(A())
""",
    "a name that is a parameter there": """
def stays(a):
    return a + 1
def other(stays):
    return stays(5)
def run():
    return other(lambda a: a * 2)
""",
    "a generator that is asked later": """
def stays(a, b):
    return (each + a for each in b)
def run():
    made = [stays(each, [1]) for each in (1, 2)]
    return [list(each) for each in made]
""",
    "what others may change meanwhile": """
count = 0
def raised():
    global count
    count += 1
    return count
def stays(before):
    return [raised(), before]
def run():
    return 0, stays(count)
""",
    "a property that would be asked later": """
class A:
    n = 0
    @property
    def next(self):
        self.n += 1
        return self.n
    def _stays(self, value):
        return [self.n, value]
    def b(self, other):
        return 0, self._stays(other.next)
def run():
    a = A()
    return a.b(a)
""",
    "a call in a class": """
def stays(a):
    b = a + 1
    return b
def run():
    class A:
        x = stays(1)
    return [name for name in vars(A) if name in ("b", "x")]
""",
    "more names than can be let go of": """
def stays(a):
    b = c = d = e = f = g = h = i = j = a
    return [b, c, d, e, f, g, h, i, j]
def run():
    k = l = m = n = o = p = q = r = s = 1
    found = stays(1)
    return found, k, l, m, n, o, p, q, r, s
""",
    "a public method": """
class A:
    def stays(self):
        return 1
    def b(self):
        return self.stays()
def run():
    return A().b()
""",
    "a name that is another one there": """
a = 1
def stays():
    return a
def run():
    a = 2
    return stays() + a
""",
    "an early end within a loop": """
def stays(a):
    for each in a:
        if each:
            return each
    return 2
def run():
    found = stays([0, 3])
    return found
""",
    "names that would live for long": """
def stays(a):
    b = a + 1
    print(b)
def told():
    stays(1)
    yield 1
def run():
    return list(told())
""",
    "what is told what it returns itself": """
def stays(a):
    return [a, 1]
def run():
    return stays(stays(2))
""",
    "functions within": """
def stays(a):
    return lambda: a
def run():
    made = [stays(each) for each in (1, 2)]
    return [each() for each in made]
""",
    "what is called while the module is loaded": """
def stays(a):
    return a + 1
b = stays(1)
def run():
    return b
""",
    "a loop's condition": """
def stays(a):
    b = len(a)
    return b < 3
def run():
    a = []
    while stays(a):
        a.append(1)
    return a
""",
}


def written(source: str, *programs: str, public: tuple[str, ...] = ("run", "note")) -> str:
    tree = ast.parse(source)
    inlined([tree], [ast.parse(each) for each in programs], public)
    return ast.unparse(ast.fix_missing_locations(tree))


def result(source: str) -> Any:
    names: dict[str, Any] = {"__name__": "a"}
    exec(compile(source, "a", "exec"), names)
    return names["run"]()


def functions(source: str) -> set[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name.lstrip("_") for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)}


@pytest.mark.parametrize("case", DONE)
def test_what_one_place_calls_is_written_there_and_does_the_same(case: str) -> None:
    after = written(DONE[case])
    assert not [name for name in functions(after) if name.startswith("gone")], after
    assert result(after) == result(DONE[case])


@pytest.mark.parametrize("case", LEFT)
def test_a_function_stays_where_its_body_would_mean_something_else(case: str) -> None:
    after = written(LEFT[case])
    stay = {name for name in functions(LEFT[case]) if name.startswith("stays")}
    assert stay and stay <= functions(after), after
    assert result(after) == result(LEFT[case])


def test_a_function_stays_that_somebody_else_may_ask_for() -> None:
    source = "def stays(a):\n    return a\ndef run():\n    return stays(1)\n"
    assert "stays" not in functions(written(source))
    assert "stays" in functions(written(source, public=("run", "stays")))
    for program in ("from dps_base import stays\n", "import dps_base\ndps_base.stays(1)\n", "name = 'stays'\n"):
        assert "stays" in functions(written(source, program)), program
    for other in ("from a import stays\n", "import a\na.stays(2)\n"):
        trees = [ast.parse(source), ast.parse(other)]
        inlined(trees, [], ("run",))
        assert "stays" in functions(ast.unparse(trees[0])), other


def test_a_name_of_a_body_holds_nothing_behind_it() -> None:
    """Else what it held would live until the function ends."""
    after = written(
        "def gone(a):\n    b = [a]\n    return len(b)\ndef run():\n    found = gone(1)\n    return found, b\n"
    )
    assert functions(after) == {"run"} and re.search(r"found = len\((b_*)\)\n    \1 = None\n", after), after


def test_a_program_s_own_class_may_override_a_method() -> None:
    source = "class A:\n    def _stays(self):\n        return 1\n    def b(self):\n        return self._stays()\n"
    assert "stays" not in functions(written(source))
    assert "stays" in functions(written(source, "class B(A):\n    def _stays(self):\n        return 2\n"))


def test_what_is_written_into_a_coroutine_runs_in_it() -> None:
    """Its tasks are as many as before, and it still waits where it waited."""
    source = DONE["generators and coroutines"]
    names: dict[str, Any] = {}
    exec(compile(written(source), "a", "exec"), names)
    assert asyncio.run(names["later"]()) == 2
