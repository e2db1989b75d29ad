"""SIGINT and SIGTERM while a server starts: it has nothing yet that would have to be ended in order."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

#: What ends a server.
ENDING = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def exit_at_once() -> Iterator[None]:
    """Let a signal end the process with exit code 0, until the event loop takes the signals over.

    An exception would not do: imports run code that swallows it, and finalizers that only print it.
    """
    before = {number: signal.signal(number, _exit) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit(number: int, frame: FrameType | None) -> None:
    # Not through sys.stderr, which may be in the middle of writing.
    os.write(2, f"Ended by {signal.Signals(number).name} before anything was served\n".encode())
    os._exit(0)
