"""Threads that read pieces of files at once, and end whatever happens."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Generic, TypeVar

from splitlearn_core.checkpoint.regular import open_regular
from splitlearn_core.checkpoint.strategies.pieces import Piece
from splitlearn_core.errors import InvalidCheckpointError

#: More readers than this do not read faster, but keep others waiting.
_MAX_READERS = 8

Slot = TypeVar("Slot")


def reader_count() -> int:
    """Return how many readers this process's share of the machine bears."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(2, min(_MAX_READERS, cpus))


class Landing(ABC, Generic[Slot]):
    """Where pieces go: straight to their place, or through one of a few slots that are used again and again."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.free: SimpleQueue[Slot | None] = SimpleQueue()
        for slot in slots:
            self.free.put(slot)

    @abstractmethod
    def needs_slot(self, piece: Piece) -> bool:
        """Say whether a piece goes through a slot."""

    @abstractmethod
    def views(self, piece: Piece, slot: Slot | None) -> list[memoryview]:
        """Return the memory for each span of a piece; called by the threads."""

    def landed(self, piece: Piece, slot: Slot | None) -> Slot | None:
        """Do what the thread that read a piece is to do with it, and return the slot that is still full."""
        return slot


@contextmanager
def reading(
    pieces: Sequence[Piece], paths: Mapping[str, Path], landing: Landing[Slot]
) -> Iterator[Iterator[tuple[Piece, Slot | None]]]:
    """Read pieces in parallel; yield an iterator over them in the order in which they arrive.

    A slot that comes with a piece has to be put back into ``landing.free`` once it is empty. When
    the block is left, however it is, the threads have ended.
    """
    coming, arrived = iter(pieces), SimpleQueue[tuple[Piece, Slot | None] | BaseException]()
    stopped = threading.Event()
    arguments = (coming, paths, landing, arrived, stopped)
    threads = [
        threading.Thread(target=_work, args=arguments, name="splitlearn-reader", daemon=True)
        for _ in range(min(reader_count(), len(pieces)))
    ]
    for thread in threads:
        thread.start()
    try:
        yield _arrivals(len(pieces), arrived)
    finally:
        stopped.set()
        for _ in threads:
            landing.free.put(None)  # whoever waits for a slot is woken
        for thread in threads:
            thread.join()


def _arrivals(
    count: int, arrived: SimpleQueue[tuple[Piece, Slot | None] | BaseException]
) -> Iterator[tuple[Piece, Slot | None]]:
    for _ in range(count):
        item = arrived.get()
        if isinstance(item, BaseException):
            raise item
        yield item


def _work(
    coming: Iterator[Piece],
    paths: Mapping[str, Path],
    landing: Landing[Slot],
    arrived: SimpleQueue[tuple[Piece, Slot | None] | BaseException],
    stopped: threading.Event,
) -> None:
    """Read one piece after the other; several threads take from one iterator."""
    # What goes wrong is raised where the pieces are wanted.
    try:
        with ExitStack() as files:
            # A file for each thread: the kernel reads ahead by open file.
            opened: dict[str, int] = {}
            for piece in coming:
                slot = landing.free.get() if landing.needs_slot(piece) else None
                if stopped.is_set():
                    return
                if piece.shard not in opened:
                    opened[piece.shard] = files.enter_context(open_regular(paths[piece.shard], buffering=0)).fileno()
                _fill(opened[piece.shard], piece, landing.views(piece, slot), paths[piece.shard])
                arrived.put((piece, landing.landed(piece, slot)))
    except BaseException as error:  # noqa: BLE001  # handed over, not swallowed
        arrived.put(error)


def _fill(descriptor: int, piece: Piece, views: list[memoryview], path: Path) -> None:
    done, total = 0, piece.nbytes
    while done < total:
        count = _read(descriptor, views, piece.begin + done)
        if count == 0:
            raise ends_early(piece, done, path)
        done += count
        while count and views:
            taken = min(count, len(views[0]))
            count -= taken
            views[0] = views[0][taken:]
            if not views[0]:
                views.pop(0)


def ends_early(piece: Piece, done: int, path: Path) -> InvalidCheckpointError:
    """Say which tensor a file does not hold to its end."""
    position, at = 0, piece.spans[-1]
    for span in piece.spans:
        position += span.nbytes
        if done < position:
            at = span
            break
    return InvalidCheckpointError(
        f"{path} ends at byte {piece.begin + done}, in the middle of {at.planned.info.key}, "
        f"which goes to byte {at.planned.info.end}",
        hint="it was cut or replaced after it was planned: load it again once it is complete",
    )


def _read_each(descriptor: int, views: Sequence[memoryview], position: int) -> int:
    """Read into the first place alone, where the system cannot read into several at once."""
    os.lseek(descriptor, position, os.SEEK_SET)
    content = os.read(descriptor, len(views[0]))
    views[0][: len(content)] = content
    return len(content)


_read: Callable[[int, Sequence[memoryview], int], int] = getattr(os, "preadv", _read_each)
