"""Foreign text in messages (files, responses, errors of other libraries), cut to a readable length."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from splitlearn_core.errors import printable, shortened

#: Most characters of a name or value, of the text of a library's error, and of a sentence of ours with paths.
WORD, LINE, SENTENCE = 100, 300, 700
#: Most items of a list.
MOST = 8
#: Most bits of a number that is written out: 78 digits.
_MAX_BITS = 256


def quote(value: Any, limit: int = WORD) -> str:
    """Return the ``repr`` of a value, in one line and shortened in the middle.

    Containers and large numbers are described instead.
    """
    if isinstance(value, str):
        # Shortened first: the repr of a gigabyte would take another one.
        return shortened(repr(shortened(value, 2 * limit)), limit)
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        return f"a number of {value.bit_length():,} bits"
    if isinstance(value, list | tuple | dict) and value:
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value):,}"
    return shortened(printable(repr(value)), limit)


def plain(text: object, limit: int = WORD) -> str:
    """Return a text without quotation marks, in one line and shortened in the middle."""
    return shortened(printable(shortened(str(text), 2 * limit)).replace("\n", "\\n"), limit)


def said(error: BaseException, limit: int = LINE) -> str:
    """Return the type and text of an error of another library, in one line and shortened in the middle."""
    name, text = type(error).__name__, reason(error, limit)
    return f"{name}: {text}" if text else name


def reason(error: BaseException, limit: int = LINE) -> str:
    """Return the text of an error of another library, in one line and shortened in the middle."""
    text = shortened(str(error).strip(), 4 * limit)
    return shortened(" ".join(printable(text).split()), limit)


def listed(items: Iterable[object], separator: str = ", ", most: int = MOST, limit: int = WORD) -> str:
    """Join the first of many names or sentences, followed by the number of the others.

    Args:
        items: Names or sentences.
        separator: Text between them.
        most: Number of items shown.
        limit: Most characters of each.
    """
    every = list(items)
    more = [f"and {len(every) - most:,} more"] if len(every) > most else []
    return separator.join([plain(item, limit) for item in every[:most]] + more)
