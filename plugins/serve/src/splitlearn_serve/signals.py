"""SIGINT and SIGTERM while a server starts, when there is nothing to shut down yet."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

#: The signals that end a server.
ENDING = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def exit_at_once() -> Iterator[None]:
    """End the process with exit code 0 on a signal, until the event loop handles the signals.

    An exception is not enough: imports run code that swallows it, and finalizers that only print it.
    """
    before = {number: signal.signal(number, _exit) for number in ENDING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit(number: int, frame: FrameType | None) -> None:
    # Not through sys.stderr, which is not reentrant.
    os.write(2, f"Ended by {signal.Signals(number).name} before anything was served\n".encode())
    os._exit(0)
