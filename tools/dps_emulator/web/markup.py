"""HTML that can't be broken out of: what is put into it is escaped unless it is HTML itself."""

import html
import string
from collections.abc import Iterable
from typing import Any


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


class _Escaping(string.Formatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        if isinstance(value, Html):
            return str(value)
        return html.escape(format(value, format_spec))


def fill(template: str, *values: object, **named: object) -> Html:
    """`template` with `{}` replaced, as str.format does."""
    return Html(_Escaping().vformat(template, values, named))


def join(parts: Iterable[Html]) -> Html:
    """Pieces of HTML one behind the other."""
    return Html("".join(parts))
