"""Named tuples that are soon made do all that those of the standard library do here."""

import collections
import copy
import pickle
from typing import Any

import pytest

from dps_hal.named import namedtuple

FIELDS = ("method", "path", "body")
Asked: Any = namedtuple("Asked", FIELDS)
Optional: Any = namedtuple("Optional", FIELDS, defaults=("/", b""))
Nothing: Any = namedtuple("Nothing", ())
THEIRS: Any = collections.namedtuple("Asked", FIELDS)
THEIR_OPTIONAL: Any = collections.namedtuple("Optional", FIELDS, defaults=("/", b""))


def test_one_is_what_one_of_collections_is() -> None:
    ours, theirs = Asked("GET", path="/", body=b""), THEIRS("GET", path="/", body=b"")
    assert ours == theirs and hash(ours) == hash(theirs) and repr(ours) == repr(theirs)
    assert (ours.method, ours.path, ours.body) == tuple(ours) == ("GET", "/", b"")
    assert ours._asdict() == theirs._asdict() and ours._fields == theirs._fields == FIELDS
    assert Asked._make(ours) == ours and type(Asked._make(ours)) is Asked
    assert Optional._field_defaults == THEIR_OPTIONAL._field_defaults
    changed = ours._replace(path="/b")
    assert type(changed) is Asked and changed == theirs._replace(path="/b")
    assert Asked.__module__ == __name__ and Asked.__slots__ == () and not hasattr(ours, "__dict__")
    for again in (copy.copy(ours), copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(again) is Asked and again == ours
    assert Nothing() == () and repr(Nothing()) == "Nothing()"
    match ours:
        case Asked(method, _, body):
            assert (method, body) == ("GET", b"")
        case _:
            pytest.fail("it matches by place")
    with pytest.raises(AttributeError):
        ours.path = "/b"


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ((), {}),
        (("GET",), {}),
        (("GET", "/", b"", 1), {}),
        (("GET", "/"), {"path": "/"}),
        (("GET", "/", b""), {"body": b""}),
        (("GET", "/", b""), {"other": 1}),
        (("GET",), {"other": 1}),
        ((), {"method": "GET"}),
        (("GET", "/"), {"body": b"x"}),
    ],
)
def test_what_makes_none_makes_none_here(values: tuple[Any, ...], named: dict[str, Any]) -> None:
    for ours, theirs in ((Asked, THEIRS), (Optional, THEIR_OPTIONAL)):
        try:
            wanted = theirs(*values, **named)
        except TypeError:
            with pytest.raises(TypeError, match=f"{ours.__name__} takes method, path, body"):
                ours(*values, **named)
        else:
            assert ours(*values, **named) == wanted
    with pytest.raises(TypeError):
        Asked("GET", "/", b"")._replace(other=1)
