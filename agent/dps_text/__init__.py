"""What people write, read in one way by every part: text, secrets, whole numbers, lists of enrolments (`enrolments`).

An editor or a spreadsheet puts bytes into a file that nobody typed: a byte order mark, CR LF, UTF-16. Standard library
alone, and nothing of a protocol: the agent, the tools and the emulator, which shares nothing else with the agent, use
this.
"""

BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # of UTF-8; Notepad and PowerShell write it
_MARKS_OF_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


class NotText(ValueError):
    """Bytes that are no text in UTF-8; the message says where, what came, and what to do."""


def without_mark(content: bytes) -> bytes:
    """`content` without the byte order mark in front, the same object where there is none; NotText for UTF-16."""
    if _is_utf_16(content):
        raise NotText("expected text in UTF-8; came UTF-16: save the file as UTF-8")
    return content.removeprefix(BYTE_ORDER_MARK) if content.startswith(BYTE_ORDER_MARK) else content


def text_of(content: bytes) -> str:
    """The text in `content`, UTF-8 with or without a byte order mark, its line ends all LF; NotText."""
    try:
        return without_mark(content).decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        wrong, before = error.object[error.start], error.object[: error.start]
        line, column = before.count(b"\n") + 1, error.start - (before.rfind(b"\n") + 1) + 1
        raise NotText(
            f"expected text in UTF-8; came the byte 0x{wrong:02x} at line {line}, byte {column}: save the file as UTF-8"
        ) from None


def whole_number(text: str, lowest: int, highest: int) -> int | None:
    """The number from `lowest` to `highest` that `text` writes in at most twelve digits of ASCII, else None."""
    if not (text.isascii() and text.isdecimal() and len(text) <= 12):
        return None
    return int(text) if lowest <= int(text) <= highest else None


class Secret(bytes):
    """A password or key from a file; `odd` says in words what in it nobody types on purpose, "" for nothing."""

    def __repr__(self) -> str:
        return "Secret()"

    __str__ = __repr__

    @property
    def odd(self) -> str:
        """As `oddities`, "" for the empty one, for which there is no file; never a part of the secret itself."""
        return oddities(self) if self else ""


def secret_of(content: bytes) -> Secret:
    """The secret in a file that holds `content`: all of it but one line end, LF or CR LF, at its end."""
    whole = content.removesuffix(b"\n")
    return Secret(whole if whole == content else whole.removesuffix(b"\r"))


def oddities(secret: bytes) -> str:
    """What in a secret an editor has put there rather than a person, such as "it ends with a blank"; "" for nothing.

    Bytes that are no text, as of a generated key, have none.
    """
    if not secret:
        return "it is empty"
    if _is_utf_16(secret):
        return "it is in UTF-16"
    found = ["begins with a byte order mark"] if secret.startswith(BYTE_ORDER_MARK) else []
    try:
        text = secret.removeprefix(BYTE_ORDER_MARK).decode()
    except UnicodeDecodeError:
        text = ""
    if any(character < " " and character not in "\t\r\n" for character in text):
        text = ""
    if "\n" in text:
        found.append("has more than one line")
    if "\r" in text:
        found.append("has a carriage return in it")
    line = text.strip("\r\n")
    if line[:1].isspace():
        found.append("begins with a blank")
    if line[-1:].isspace():
        found.append("ends with a blank")
    if not "".join(line.split()).isprintable():
        found.append("has a character that nobody sees")
    return "it " + " and ".join(found) if found else ""


def _is_utf_16(content: bytes) -> bool:
    """Whether there is its mark, or each first or each second of the first bytes is NUL, as in ASCII text without."""
    head = content[: min(len(content), 16) & ~1]
    if content.startswith(_MARKS_OF_UTF_16):
        return True
    return bool(head) and 0 in (any(head[0::2]), any(head[1::2])) and any(head)
