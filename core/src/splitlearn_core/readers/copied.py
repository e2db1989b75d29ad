"""Copies of planned bytes, on any device and in any dtype: several threads read contiguous pieces of the files."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from splitlearn_core.checkpoint.files import open_regular
from splitlearn_core.errors import InvalidCheckpointError
from splitlearn_core.loading_strategy import ReadPlan, refused_formats
from splitlearn_core.plan.splitplan import PlannedTensor, loaded_nbytes
from splitlearn_core.readers.views import ALIGNMENT, aligned, fresh_memory, refuse_other_files, views
from splitlearn_core.types import CHUNK_BYTES, DTYPE_BYTES, SAFETENSORS, TensorInfo, stored_dtype

if TYPE_CHECKING:
    import torch

#: More readers than this do not read faster, but delay other processes.
_MAX_READERS = 8

#: Bytes of one read where they are converted or moved: a piece is then still in the processor's cache.
STAGED_BYTES = 2**20

#: Most spans of one piece; the system reads into up to 1024 buffers at once.
MAX_SPANS = 512

#: Elements that torch converts in the calling thread. For more it starts a thread pool in each reader,
#: and many pools on few processors wait for each other.
_SERIAL = 2**15 - 64


class CopiedStrategy:
    """Tensors in memory of their own, on any device and in any dtype.

    Tensors in their stored dtype on the CPU are read straight into their memory. Tensors that are
    converted, or moved to a device, go through a buffer of the thread that reads them.
    """

    name = "copied"
    reads = "safetensors, in any dtype, on any device; in parallel"

    def refusal(self, plan: ReadPlan) -> str:
        return refused_formats(plan, SAFETENSORS)

    def anonymous_bytes(self, plan: ReadPlan) -> int:
        return plan.host_bytes + self.passing_bytes(plan)

    def passing_bytes(self, plan: ReadPlan) -> int:
        if not any(_is_staged(plan, planned) for planned in plan.tensors):
            return 0
        pieces = _pieces(plan)
        return min(reader_count(), len(pieces)) * _buffer_bytes(plan, pieces)

    def read(self, plan: ReadPlan) -> Iterator[tuple[PlannedTensor, torch.Tensor]]:
        refuse_other_files(plan)
        # Those that lie in another order in what is made of them are copied there from the mapped file.
        regions = {each.module_key: region for each in plan.tensors if (region := plan.region(each)) is not None}
        reordered = tuple(each for each in plan.tensors if each.places and each.module_key not in regions)
        if reordered:
            yield from views(replace(plan, tensors=reordered))
            plan = replace(plan, tensors=tuple(each for each in plan.tensors if each not in reordered))
        tensors = {**_allocate(plan, regions), **regions}
        missing = {planned.module_key: planned.info.nbytes for planned in plan.tensors}
        for planned in plan.tensors:
            if not planned.info.nbytes:
                yield planned, tensors.pop(planned.module_key)
        readers = _Readers(plan, _pieces(plan), tensors)
        try:
            for piece in readers.arrivals():
                plan.on_bytes(piece.nbytes)
                for span in piece.spans:
                    key = span.planned.module_key
                    missing[key] -= span.nbytes
                    if not missing[key]:
                        yield span.planned, tensors.pop(key)
        finally:
            readers.stop()
        refuse_other_files(plan)


def reader_count() -> int:
    """Return the number of reader threads for this process's share of the processors."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(2, min(_MAX_READERS, cpus))


@dataclass(frozen=True, slots=True)
class Span:
    """A range of one tensor, of whole elements."""

    planned: PlannedTensor
    #: First byte, counted from the beginning of the tensor.
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Contiguous bytes of one file, of one tensor or of several neighbours."""

    shard: str
    #: First byte, counted from the beginning of the file.
    begin: int
    spans: tuple[Span, ...]

    @property
    def nbytes(self) -> int:
        return sum(span.nbytes for span in self.spans)


def cut(tensors: Iterable[PlannedTensor], size: int) -> list[Piece]:
    """Cut the bytes of tensors into pieces of at most a size, in the order of the files.

    Args:
        tensors: Of safetensors files.
        size: In bytes; a piece is larger only if one element is.
    """
    pieces: list[Piece] = []
    spans: list[Span] = []
    room, expected = 0, ("", -1)
    for planned in sorted(tensors, key=lambda tensor: (tensor.info.shard, tensor.info.begin)):
        info, start = planned.info, 0
        item = DTYPE_BYTES[info.dtype]
        while start < info.nbytes:
            position = (info.shard, info.begin + start)
            if position != expected or room < item or len(spans) == MAX_SPANS:
                _close(pieces, spans)
                room = max(size, item)
            nbytes = min(info.nbytes - start, room - room % item)
            spans.append(Span(planned, start, nbytes))
            start, room = start + nbytes, room - nbytes
            expected = (info.shard, info.begin + start)
    _close(pieces, spans)
    return pieces


def _close(pieces: list[Piece], spans: list[Span]) -> None:
    if spans:
        first = spans[0]
        pieces.append(Piece(first.planned.info.shard, first.planned.info.begin + first.start, tuple(spans)))
        spans.clear()


def _pieces(plan: ReadPlan) -> list[Piece]:
    return cut(plan.tensors, STAGED_BYTES if any(_is_staged(plan, each) for each in plan.tensors) else CHUNK_BYTES)


def _is_staged(plan: ReadPlan, planned: PlannedTensor) -> bool:
    """Return whether a tensor goes through a buffer: all do, except tensors on the CPU in their stored dtype."""
    return plan.device != "cpu" or plan.needs_conversion(planned)


def _buffer_bytes(plan: ReadPlan, pieces: Sequence[Piece]) -> int:
    """Return the size in bytes of a buffer that holds the staged spans of any piece."""
    staged = ([span for span in piece.spans if _is_staged(plan, span.planned)] for piece in pieces)
    return max((sum(aligned(span.nbytes) for span in spans) for spans in staged), default=0)


class _Readers:
    """Threads that read pieces into tensors, which exist already."""

    def __init__(self, plan: ReadPlan, pieces: Sequence[Piece], tensors: dict[str, torch.Tensor]) -> None:
        import torch

        self._plan = plan
        self._pieces = pieces
        self._flat = {key: tensor.view(-1) for key, tensor in tensors.items()}
        self._direct = {
            planned.module_key: _bytes(self._flat[planned.module_key])
            for planned in plan.tensors
            if planned.info.nbytes and not _is_staged(plan, planned)
        }
        self._buffer_bytes = _buffer_bytes(plan, pieces)
        self._is_cuda = torch.device(plan.device).type == "cuda"
        # The memory of the tensors may still be in use by work that was queued here earlier, on this stream.
        self._stream = torch.cuda.current_stream(plan.device) if self._is_cuda else None
        self._arrived: SimpleQueue[Piece | BaseException] = SimpleQueue()
        self._stopped = threading.Event()
        self._threads: list[threading.Thread] = []

    def arrivals(self) -> Iterator[Piece]:
        """Start the threads, and yield the pieces in the order in which they arrive."""
        left = iter(self._pieces)
        for _ in range(min(reader_count(), len(self._pieces))):
            thread = threading.Thread(target=self._work, args=(left,), name="splitlearn-reader", daemon=True)
            self._threads.append(thread)
            thread.start()
        for _ in self._pieces:
            piece = self._arrived.get()
            if isinstance(piece, BaseException):
                raise piece
            yield piece

    def stop(self) -> None:
        """Return once all threads have ended."""
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _work(self, left: Iterator[Piece]) -> None:
        """Read one piece after the other; several threads take from one iterator."""
        import torch

        # Errors are raised in the thread that consumes the pieces. A mode and a stream are a thread's own, and
        # inference tensors can only be written in inference mode.
        try:
            stream: Any = torch.cuda.stream(self._stream) if self._is_cuda else nullcontext()
            with ExitStack() as files, torch.inference_mode(), stream:
                # A descriptor for each thread: the kernel's read-ahead state belongs to the open file.
                opened: dict[str, int] = {}
                buffer = torch.empty(self._buffer_bytes, dtype=torch.uint8, pin_memory=self._is_cuda)
                for piece in left:
                    if self._stopped.is_set():
                        return
                    path = self._plan.paths[piece.shard]
                    if piece.shard not in opened:
                        opened[piece.shard] = files.enter_context(open_regular(path, buffering=0)).fileno()
                    self._read(piece, opened[piece.shard], path, buffer)
                    self._arrived.put(piece)
        except BaseException as error:  # noqa: BLE001  # handed to the consumer, not swallowed
            self._arrived.put(error)

    def _read(self, piece: Piece, descriptor: int, path: Path, buffer: torch.Tensor) -> None:
        """Read a piece into its tensors, or through the buffer."""
        views, staged, position = [], [], 0
        for span in piece.spans:
            memory = self._direct.get(span.planned.module_key)
            if memory is not None:
                views.append(memory[span.start : span.start + span.nbytes])
                continue
            source = buffer[position : position + span.nbytes]
            views.append(_bytes(source))
            staged.append((span, source.view(stored_dtype(span.planned.info.dtype))))
            position += aligned(span.nbytes)
        _fill(descriptor, piece, views, path)
        for span, source in staged:
            first = span.start // source.element_size()
            target = self._flat[span.planned.module_key][first : first + source.numel()]
            step = _SERIAL if self._plan.device == "cpu" else source.numel()
            for start in range(0, source.numel(), step):
                target[start : start + step].copy_(source[start : start + step])


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


def _bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    flat: Any = tensor.view(torch.uint8).numpy()
    return memoryview(flat)


def _allocate(plan: ReadPlan, present: Container[str]) -> dict[str, torch.Tensor]:
    """Allocate the tensors of a plan that are not present yet on its device, by module key."""
    import torch

    absent = [each for each in plan.tensors if each.module_key not in present]
    dtypes = [plan.loaded_dtype(each) for each in absent]
    if plan.device != "cpu":
        return {
            planned.module_key: torch.empty(planned.info.shape, dtype=dtype, device=plan.device)
            for planned, dtype in zip(absent, dtypes, strict=True)
        }
    blocks = fresh_memory(
        (loaded_nbytes(planned, plan.dtype) for planned in absent),
        # A converted tensor is aligned as torch does it.
        (0 if _is_staged(plan, planned) else _phase(planned.info) for planned in absent),
    )
    return {
        planned.module_key: block.view(dtype).view(planned.info.shape)
        for planned, dtype, block in zip(absent, dtypes, blocks, strict=True)
    }


def _phase(info: TensorInfo) -> int:
    """Return the offset of a tensor within a cache line in its file; 0 if its dtype cannot be aligned there."""
    return 0 if info.begin % DTYPE_BYTES[info.dtype] else info.begin % ALIGNMENT
