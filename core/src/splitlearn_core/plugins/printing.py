"""What plugins print does not get among the data of a command.

On the command line stdout is data (``--json | jq``), and a ``print`` left in a plugin would spoil it. In a library
stdout is the host's, and redirecting it is none of our business: another thread may be printing just then, and two
redirections that overlap can put back the wrong stream for good. So it is the command line alone that puts a stream
in place of stdout, once; where a text goes is decided as it is written, by what the writing thread is doing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TextIO, cast

#: Whether a plugin's code is running: each thread has a value of its own.
_ASIDE: ContextVar[bool] = ContextVar("splitlearn_printing_aside", default=False)


@contextmanager
def printing_aside() -> Iterator[None]:
    """Mark what this thread runs as a plugin's code; it matters inside :func:`stdout_for_data`."""
    before = _ASIDE.set(True)
    try:
        yield
    finally:
        _ASIDE.reset(before)


@contextmanager
def stdout_for_data() -> Iterator[None]:
    """Send to stderr what plugins print to ``sys.stdout``, and let through what all others print.

    What goes past ``sys.stdout`` (a library in C, another process) is not held up.
    """
    data = sys.stdout
    # None where it is closed: then printing does nothing, and should go on doing it.
    if data is not None:
        sys.stdout = cast("TextIO", _Sorting(data))
    try:
        yield
    finally:
        sys.stdout = data


class _Sorting:
    """Is stdout to whoever prints data, and stderr to a plugin."""

    def __init__(self, data: TextIO) -> None:
        self._data = data

    def __getattr__(self, name: str) -> Any:
        return getattr((sys.stderr or self._data) if _ASIDE.get() else self._data, name)
