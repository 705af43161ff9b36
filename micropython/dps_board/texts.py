"""The words of errors, which `tools/deploy` has put into a table.

What is deployed calls `sentence` where the source has the words. Without the module `dps_texts`, which a firmware may
leave out, the number and the values stand for them: `tools/deploy --texts` prints the words of each number.
"""

from dps_board.memory import forget

FIRST_PIECE = 14  # of the characters, up to 31, that stand for a piece of many texts


def sentence(number: int, *values: object) -> str:
    """The text of that number with its values; where there are no texts, or no room for them, the number and those."""
    try:
        from dps_texts import (  # type: ignore[import-not-found]  # pyright: ignore[reportMissingImports]
            PIECES,
            TEXTS,
        )

        at = 0
        for _ in range(number):
            at = TEXTS.index(b"\n", at) + 1
        text: str = TEXTS[at : TEXTS.index(b"\n", at)].decode()
        for place, piece in enumerate(PIECES.split("\n")):
            text = text.replace(chr(FIRST_PIECE + place), piece)
        text = text.format(*values) if values else text
    except (ImportError, MemoryError):
        text = f"({number}) " + ", ".join([str(value) for value in values])
    forget("dps_texts")
    return text
