"""Copies of planned bytes, on any device and in any dtype: large reads in several threads."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from splitlearn_core.checkpoint.regular_files import open_regular
from splitlearn_core.errors import InvalidCheckpointError
from splitlearn_core.loading_strategy import ReadPlan, refused_formats
from splitlearn_core.plan.splitplan import PlannedTensor, loaded_nbytes
from splitlearn_core.readers.checks import refuse_other_files
from splitlearn_core.readers.staging import (
    Piece,
    Slot,
    Staging,
    cut,
    is_staged,
    make_staging,
    reader_count,
    slot_bytes,
    slot_count,
)
from splitlearn_core.types import CHUNK_BYTES, SAFETENSORS

if TYPE_CHECKING:
    import torch


@contextmanager
def reading(
    pieces: Sequence[Piece], paths: Mapping[str, Path], staging: Staging[Slot]
) -> Iterator[Iterator[tuple[Piece, Slot | None]]]:
    """Read pieces in parallel; yield an iterator over them in the order in which they arrive.

    A slot that is yielded with a piece has to be put back into ``staging.free`` once it is empty. When
    the block is left, also by an error, the threads have ended.
    """

    def arrivals() -> Iterator[tuple[Piece, Slot | None]]:
        for _ in pieces:
            item = arrived.get()
            if isinstance(item, BaseException):
                raise item
            yield item

    remaining, arrived = iter(pieces), SimpleQueue[tuple[Piece, Slot | None] | BaseException]()
    stopped = threading.Event()
    arguments = (remaining, paths, staging, arrived, stopped)
    threads = [
        threading.Thread(target=_work, args=arguments, name="splitlearn-reader", daemon=True)
        for _ in range(min(reader_count(), len(pieces)))
    ]
    for thread in threads:
        thread.start()
    try:
        yield arrivals()
    finally:
        stopped.set()
        for _ in threads:
            staging.free.put(None)  # wakes a thread that waits for a slot
        for thread in threads:
            thread.join()


def _work(
    remaining: Iterator[Piece],
    paths: Mapping[str, Path],
    staging: Staging[Slot],
    arrived: SimpleQueue[tuple[Piece, Slot | None] | BaseException],
    stopped: threading.Event,
) -> None:
    """Read one piece after the other; several threads take from one iterator."""
    # Errors are raised in the thread that consumes the pieces.
    try:
        with ExitStack() as files:
            # A descriptor for each thread: the kernel's read-ahead state belongs to the open file.
            opened: dict[str, int] = {}
            for piece in remaining:
                slot = staging.free.get() if staging.needs_slot(piece) else None
                if stopped.is_set():
                    return
                if piece.shard not in opened:
                    opened[piece.shard] = files.enter_context(open_regular(paths[piece.shard], buffering=0)).fileno()
                _fill(opened[piece.shard], piece, staging.views(piece, slot), paths[piece.shard])
                arrived.put((piece, staging.filled(piece, slot)))
    except BaseException as error:  # noqa: BLE001  # handed to the consumer, not swallowed
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
    """Return the error for a file that ends within a piece; it names the tensor that is incomplete."""
    position, incomplete = 0, piece.spans[-1]
    for span in piece.spans:
        position += span.nbytes
        if done < position:
            incomplete = span
            break
    return InvalidCheckpointError(
        f"{path} ends at byte {piece.begin + done}, in the middle of {incomplete.planned.info.key}, "
        f"which goes to byte {incomplete.planned.info.end}",
        hint="it was cut or replaced after it was planned: load it again once it is complete",
    )


def _read_each(descriptor: int, views: Sequence[memoryview], position: int) -> int:
    """Read into the first buffer only, on systems that cannot read into several at once."""
    os.lseek(descriptor, position, os.SEEK_SET)
    content = os.read(descriptor, len(views[0]))
    views[0][: len(content)] = content
    return len(content)


_read: Callable[[int, Sequence[memoryview], int], int] = getattr(os, "preadv", _read_each)


#: Bytes of one read where they are converted or moved: a piece is then still in the processor's cache.
STAGED_BYTES = 2**20


class CopiedStrategy:
    """Tensors in memory of their own, on any device and in any dtype.

    Tensors in their stored dtype on the CPU are read straight into their memory. Tensors that are
    converted, or moved to a device, go through a few staging buffers that are used again.
    """

    name = "copied"
    reads = "safetensors, in any dtype, on any device; in parallel"

    def refusal(self, plan: ReadPlan) -> str:
        return refused_formats(plan, SAFETENSORS)

    def anonymous_bytes(self, plan: ReadPlan) -> int:
        kept = sum(loaded_nbytes(tensor, plan.dtype) for tensor in plan.tensors) if plan.device == "cpu" else 0
        return kept + self.passing_bytes(plan)

    def passing_bytes(self, plan: ReadPlan) -> int:
        pieces = _pieces(plan)
        return slot_count(pieces, plan) * slot_bytes(pieces)

    def read(self, plan: ReadPlan) -> Iterator[tuple[PlannedTensor, torch.Tensor]]:
        refuse_other_files(plan)
        pieces = _pieces(plan)
        staging = make_staging(plan, pieces)
        missing = {planned.module_key: planned.info.nbytes for planned in plan.tensors}
        for planned in plan.tensors:
            if not planned.info.nbytes:
                yield planned, staging.tensors.pop(planned.module_key)
        try:
            with reading(pieces, plan.paths, staging) as arrivals:
                for piece, slot in arrivals:
                    staging.settle(piece, slot)
                    plan.on_bytes(piece.nbytes)
                    for span in piece.spans:
                        key = span.planned.module_key
                        missing[key] -= span.nbytes
                        if not missing[key]:
                            yield span.planned, staging.tensors.pop(key)
        finally:
            staging.finish()
        refuse_other_files(plan)


def _pieces(plan: ReadPlan) -> list[Piece]:
    staged = any(is_staged(plan, planned) for planned in plan.tensors)
    return cut(plan.tensors, STAGED_BYTES if staged else CHUNK_BYTES)
