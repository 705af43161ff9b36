"""The words of errors, which `tools/deploy` has put into a table.

What is deployed calls `sentence` where the source has the words. Without the module `dps_texts`, which a firmware may
leave out, the number and the values stand for them: `tools/deploy --texts` prints the words of each number.

The table has a line for each number. The words are in ASCII; a byte that is no printable character of it stands for a
piece of many texts, which is a line of a second table, and may have such bytes itself.
"""

from dps_board.memory import forget


def sentence(number: int, *values: object) -> str:
    """The text of that number with its values; the number and those without texts, and without room for them.

    So it is with a table of another release, which a firmware or a copy left on the board, as far as that shows.
    """
    try:
        from dps_texts import (  # type: ignore[import-not-found]  # pyright: ignore[reportMissingImports]
            PIECES,
            TEXTS,
        )

        text = _line(TEXTS, number)
        at = 0
        while at < len(text):
            byte = text[at]
            if 32 <= byte < 127:
                at += 1
            else:
                text = text[:at] + _line(PIECES, byte if byte < 32 else byte - 95) + text[at + 1 :]
        words = text.decode()
        words = words.format(*values) if values else words
    except (ImportError, MemoryError, TypeError, ValueError, IndexError):
        words = f"({number}) " + ", ".join([str(value) for value in values])
    forget("dps_texts")
    return words


def _line(table: bytes, number: int) -> bytes:
    at = 0
    for _ in range(number):
        at = table.index(b"\n", at) + 1
    return table[at : table.index(b"\n", at)]
