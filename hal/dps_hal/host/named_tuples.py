"""Named tuples without what each of `collections.namedtuple` costs a start: it compiles code for every one of forty."""

from __future__ import annotations

import sys
from operator import itemgetter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any, Self


class _Named(tuple):  # type: ignore[type-arg]
    """What they have in common: as those of `collections` they are made, shown, matched, copied and pickled."""

    __slots__ = ()
    _fields: tuple[str, ...]
    _field_defaults: Mapping[str, Any]

    def __new__(cls, *values: Any, **named: Any) -> Self:
        if named or len(values) != len(cls._fields):
            values = tuple(_filled(cls, values, named))
        return tuple.__new__(cls, values)

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in zip(self._fields, self, strict=True))
        return f"{type(self).__name__}({fields})"

    def __getnewargs__(self) -> tuple[Any, ...]:
        return tuple(self)

    @classmethod
    def _make(cls, values: Iterable[Any]) -> Self:
        return cls(*values)

    def _replace(self, **named: Any) -> Self:
        return type(self)(**{**self._asdict(), **named})

    def _asdict(self) -> dict[str, Any]:
        return dict(zip(self._fields, self, strict=True))


def _filled(kind: type[_Named], values: tuple[Any, ...], named: Mapping[str, Any]) -> list[Any]:
    """The values of all fields; TypeError where one is missing, comes twice or is none of this `kind`."""
    given = dict(zip(kind._fields, values, strict=False))
    if len(values) > len(kind._fields) or not given.keys().isdisjoint(named):
        raise TypeError(f"{kind.__name__} takes {', '.join(kind._fields)}, each once")
    filled = {**kind._field_defaults, **given, **named}
    if filled.keys() != set(kind._fields):
        raise TypeError(f"{kind.__name__} takes {', '.join(kind._fields)}; came {', '.join(filled)}")
    return [filled[name] for name in kind._fields]


def namedtuple(name: str, fields: Sequence[str], defaults: Sequence[Any] = ()) -> type[_Named]:
    """As `collections.namedtuple` where `fields` is a sequence of names that may be attributes."""
    made: dict[str, Any] = {field: property(itemgetter(at)) for at, field in enumerate(fields)}
    made["__slots__"] = ()
    made["__module__"] = sys._getframe(1).f_globals["__name__"]
    made["__match_args__"] = made["_fields"] = tuple(fields)
    made["_field_defaults"] = dict(zip(fields[len(fields) - len(defaults) :], defaults, strict=True))
    return type(name, (_Named,), made)
