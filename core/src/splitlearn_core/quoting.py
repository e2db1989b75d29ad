"""Text of others in messages: of files, of answers, of other libraries' errors. Never more of it than a line bears."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from splitlearn_core.errors import printable, shortened

#: Characters of one name or value, of what a library says in its error, and of a sentence of ours, which has paths.
WORD, LINE, SENTENCE = 100, 300, 700
#: Entries of a list.
MOST = 8
#: Of a number that is written out: 78 digits.
_BITS = 256


def quote(value: Any, limit: int = WORD) -> str:
    """Repeat a value as Python writes it, in one line and shortened in the middle.

    Of what is nested deeply, of large numbers and of long lists not even the text is made.
    """
    if isinstance(value, str):
        # Shortened first: the text of a gigabyte takes no other gigabyte.
        return shortened(repr(shortened(value, 2 * limit)), limit)
    if isinstance(value, int) and value.bit_length() > _BITS:
        return f"a number of {value.bit_length():,} bits"
    if isinstance(value, list | tuple | dict) and value:
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value):,}"
    return shortened(printable(repr(value)), limit)


def plain(text: object, limit: int = WORD) -> str:
    """Repeat a name or a text without quotation marks, in one line and shortened in the middle."""
    return shortened(printable(shortened(str(text), 2 * limit)).replace("\n", "\\n"), limit)


def said(error: BaseException, limit: int = LINE) -> str:
    """Repeat what an error of another library says: its type, and the beginning of its text in one line."""
    name, text = type(error).__name__, reason(error, limit)
    return f"{name}: {text}" if text else name


def reason(error: BaseException, limit: int = LINE) -> str:
    """Repeat the text of another library's error alone, in one line and shortened in the middle."""
    text = shortened(str(error).strip(), 4 * limit)
    return shortened(" ".join(printable(text).split()), limit)


def listed(items: Iterable[object], separator: str = ", ", most: int = MOST, limit: int = WORD) -> str:
    """Join the first of many names or sentences, and say how many others there are.

    Args:
        items: What to join.
        separator: What goes between them.
        most: How many are shown.
        limit: Characters of each.
    """
    every = list(items)
    more = [f"and {len(every) - most:,} more"] if len(every) > most else []
    return separator.join([plain(item, limit) for item in every[:most]] + more)
