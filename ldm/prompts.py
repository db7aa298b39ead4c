"""Prompts as text: cleaned, read from files, and made into file names; knows no network."""

import re
import unicodedata

from ldm.errors import DataError

# ECMA-48: a terminal reads ESC [ parameters final-byte as one command.
TERMINAL_COMMAND = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
LINE_BREAKS_AND_TABS = re.compile("[\t\n\v\f\r\x85\u2028\u2029]+")
# Windows opens a device for these names, whatever the folder and the extension.
RESERVED = frozenset({"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))})
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def clean(prompt: str) -> str:
    """`prompt` on one line without control characters and terminal commands; every other character stays.

    Direction marks and zero-width joiners stay too: right-to-left text and emoji need them.
    """
    text = LINE_BREAKS_AND_TABS.sub(" ", TERMINAL_COMMAND.sub("", prompt))
    return "".join(c for c in text if unicodedata.category(c) != "Cc")


def slug(prompt: str, limit: int = 60) -> str:
    """The letters and digits of `prompt` joined by `-`: a part of a file name that is safe on every system.

    At most `limit` characters and 3·`limit` bytes; no dot, slash, space, direction mark or leading `-`; never empty.
    """
    text = unicodedata.normalize("NFC", prompt).lower()
    kept = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text)
    joined = "-".join(kept.split())[:limit].encode("utf-8", "ignore")[: 3 * limit].decode("utf-8", "ignore")
    name = joined.strip("-") or "image"
    return f"{name}_" if name in RESERVED else name


def read_lines(data: bytes, where: str) -> list[tuple[int, str]]:
    """The lines that are not blank of a text file, with their numbers; UTF-8, or UTF-16 with its mark.

    Raises DataError for bytes that are not text and for a file without a usable line.
    """
    encoding = "utf-16" if data.startswith(UTF16_MARKS) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{where}:{line}: not UTF-8 text; save the file as UTF-8, one prompt a line") from None
    lines = [(number, line) for number, line in enumerate(re.split(r"\r\n|\n|\r", text), start=1) if line.strip()]
    if not lines:
        raise DataError(f"{where}: no prompt in it; write one prompt a line")
    return lines
