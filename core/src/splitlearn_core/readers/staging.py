"""The targets of reads: the tensors themselves, or staging buffers on the way to another dtype or device."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from splitlearn_core.loading_strategy import ReadPlan, torch_dtype
from splitlearn_core.plan.splitplan import PlannedTensor, loaded_nbytes
from splitlearn_core.types import DTYPE_BYTES, TensorInfo, stored_dtype

if TYPE_CHECKING:
    import torch


#: More readers than this do not read faster, but delay other processes.
_MAX_READERS = 8
Slot = TypeVar("Slot")


def reader_count() -> int:
    """Return the number of reader threads for this process's share of the processors."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(2, min(_MAX_READERS, cpus))


class Staging(ABC, Generic[Slot]):
    """The targets of pieces: the tensors, or one of a few slots (staging buffers) that are used again."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.free: SimpleQueue[Slot | None] = SimpleQueue()
        for slot in slots:
            self.free.put(slot)

    @abstractmethod
    def needs_slot(self, piece: Piece) -> bool:
        """Return whether a piece goes through a slot."""

    @abstractmethod
    def views(self, piece: Piece, slot: Slot | None) -> list[memoryview]:
        """Return the memory for each span of a piece; called in the reader threads."""

    def filled(self, piece: Piece, slot: Slot | None) -> Slot | None:
        """Process a piece in the thread that read it; return the slot if it is still in use."""
        return slot


#: Bytes of a huge page; smaller tensors share a block.
HUGE = 2 * 2**20

#: Bytes of a cache line, at which tensors are aligned, as torch's own are.
ALIGNMENT = 64


def aligned(nbytes: int) -> int:
    """Round a number of bytes up to the alignment."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def fresh_memory(sizes: Iterable[int], phases: Iterable[int] = ()) -> list[torch.Tensor]:
    """Allocate flat uint8 tensors of the given sizes; their pages are not touched yet.

    Each large one has a block of its own, so that the memory of a tensor that is replaced or
    converted is freed at once. The small ones share a block, which lives as long as any of them.
    Each has a storage of its own size nevertheless, because saving a tensor saves all of its storage.

    Args:
        sizes: In bytes.
        phases: Offset of each within a cache line, in bytes; 0 by default. Products of one row differ in the last
            bit by it, and ``from_pretrained`` keeps the offset that a tensor has in its file.
    """
    import torch

    wanted = list(sizes)
    begins = list(phases) or [0] * len(wanted)
    places = list(zip(wanted, begins, strict=True))
    small = [aligned(phase + nbytes) for nbytes, phase in places if nbytes < HUGE]
    shared, position = _block(sum(small)).untyped_storage(), 0
    blocks = []
    for nbytes, phase in places:
        if nbytes >= HUGE:
            block, start = _block(phase + nbytes).untyped_storage(), phase
        else:
            block, start = shared, position + phase
            position += aligned(phase + nbytes)
        blocks.append(torch.empty(0, dtype=torch.uint8).set_(block[start : start + nbytes]))
    return blocks


def _block(nbytes: int) -> torch.Tensor:
    import torch

    if sys.platform != "linux" or nbytes < HUGE:
        return torch.empty(nbytes, dtype=torch.uint8)
    # One huge page more than needed, to align the start; pages that are not touched take no memory.
    try:
        block = mmap.mmap(-1, nbytes + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{nbytes} bytes for a tensor: {error}") from error
    start = -ctypes.addressof(ctypes.c_char.from_buffer(block)) % HUGE
    # Without the end that does not fill a huge page: half of one would be wasted there on average.
    with suppress(OSError):  # a kernel without them uses ordinary pages
        block.madvise(mmap.MADV_HUGEPAGE, start, nbytes - nbytes % HUGE)
    return torch.frombuffer(block, dtype=torch.uint8, count=nbytes, offset=start)


#: Most spans of one piece; the system reads into up to 1024 buffers at once.
MAX_SPANS = 512


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


#: Elements that torch converts in the calling thread. For more it starts a thread pool in each reader,
#: and many pools on few processors wait for each other.
_SERIAL = 2**15 - 64


def is_staged(plan: ReadPlan, planned: PlannedTensor) -> bool:
    """Return whether a tensor goes through a buffer: all do, except tensors on the CPU in their stored dtype."""
    return plan.device != "cpu" or plan.needs_conversion(planned)


def slot_count(pieces: list[Piece], plan: ReadPlan) -> int:
    """Return how many buffers a read uses: one per reader, and for a device another that is emptied meanwhile."""
    staged = sum(any(is_staged(plan, span.planned) for span in piece.spans) for piece in pieces)
    return min(reader_count() * (1 if plan.device == "cpu" else 2), staged)


def slot_bytes(pieces: list[Piece]) -> int:
    """Return the size in bytes of a buffer that holds any of the pieces."""
    return max((sum(aligned(span.nbytes) for span in piece.spans) for piece in pieces), default=0)


class HostStaging(Staging["torch.Tensor"]):
    """Tensors in the memory of this machine."""

    def __init__(self, plan: ReadPlan, pieces: list[Piece]) -> None:
        self.plan = plan
        self.tensors = self._targets()
        self._flat = {key: tensor.view(-1) for key, tensor in self.tensors.items()}
        #: Flat bytes of the tensors that are read without a buffer.
        self._direct = {
            planned.module_key: _bytes(self.tensors[planned.module_key])
            for planned in plan.tensors
            if not is_staged(plan, planned)
        }
        super().__init__([self._slot(slot_bytes(pieces)) for _ in range(slot_count(pieces, plan))])

    def needs_slot(self, piece: Piece) -> bool:
        return any(span.planned.module_key not in self._direct for span in piece.spans)

    def views(self, piece: Piece, slot: torch.Tensor | None) -> list[memoryview]:
        places = []
        for span, start in _laid_out(piece):
            memory = self._direct.get(span.planned.module_key)
            if memory is not None:
                places.append(memory[span.start : span.start + span.nbytes])
            elif slot is not None:
                places.append(_bytes(slot)[start : start + span.nbytes])
        return places

    def filled(self, piece: Piece, slot: torch.Tensor | None) -> torch.Tensor | None:
        """Convert the content of a buffer, while it is still in the processor's cache."""
        import torch

        if slot is None:
            return None
        # Inference mode is per thread, and inference tensors can only be written in it.
        with torch.inference_mode():
            for target, source in self._moves(piece, slot):
                for start in range(0, source.numel(), _SERIAL):
                    target[start : start + _SERIAL].copy_(source[start : start + _SERIAL])
        self.free.put(slot)
        return None

    def settle(self, piece: Piece, slot: torch.Tensor | None) -> None:
        """Copy the content of a buffer to the device, and free the buffer; nothing to do on the CPU."""

    def finish(self) -> None:
        """Wait until all copies have ended."""

    def _moves(self, piece: Piece, slot: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield flat ranges of tensors, and the ranges of a buffer to copy there."""
        for span, start in _laid_out(piece):
            if span.planned.module_key in self._direct:
                continue
            source = slot[start : start + span.nbytes].view(stored_dtype(span.planned.info.dtype))
            first = span.start // source.element_size()
            yield self._flat[span.planned.module_key][first : first + source.numel()], source

    def _targets(self) -> dict[str, torch.Tensor]:
        tensors = self.plan.tensors
        blocks = fresh_memory(
            (loaded_nbytes(planned, self.plan.dtype) for planned in tensors),
            # A converted tensor is aligned as torch does it.
            (0 if is_staged(self.plan, planned) else phase(planned.info) for planned in tensors),
        )
        return {
            planned.module_key: block.view(_dtype(self.plan, planned)).view(planned.info.shape)
            for planned, block in zip(self.plan.tensors, blocks, strict=True)
        }

    def _slot(self, nbytes: int) -> torch.Tensor:
        import torch

        return torch.empty(nbytes, dtype=torch.uint8)


class DeviceStaging(HostStaging):
    """Tensors on a device; each piece is copied there before the next is taken."""

    def filled(self, piece: Piece, slot: torch.Tensor | None) -> torch.Tensor | None:
        return slot

    def settle(self, piece: Piece, slot: torch.Tensor | None) -> None:
        if slot is not None:
            for target, source in self._moves(piece, slot):
                target.copy_(source)
            self.free.put(slot)

    def _targets(self) -> dict[str, torch.Tensor]:
        import torch

        return {
            planned.module_key: torch.empty(
                planned.info.shape, dtype=_dtype(self.plan, planned), device=self.plan.device
            )
            for planned in self.plan.tensors
        }


class CudaStaging(DeviceStaging):
    """Tensors on a CUDA device: buffers are pinned, and copied while others are filled."""

    def __init__(self, plan: ReadPlan, pieces: list[Piece]) -> None:
        import torch

        super().__init__(plan, pieces)
        self._stream: Any = torch.cuda.Stream(plan.device)  # type: ignore[no-untyped-call]  # torch's own
        # The memory of the tensors may still be in use by work that was queued earlier.
        self._stream.wait_stream(torch.cuda.current_stream(plan.device))
        #: Buffers that are being copied, each with the event that marks the end.
        self._in_flight: deque[tuple[Any, torch.Tensor]] = deque()
        self._max_in_flight = max(1, slot_count(pieces, plan) // 2)

    def settle(self, piece: Piece, slot: torch.Tensor | None) -> None:
        import torch

        if slot is None:
            return
        with torch.cuda.stream(self._stream):
            # With non_blocking, a conversion runs on the device, too.
            for target, source in self._moves(piece, slot):
                target.copy_(source, non_blocking=True)
            event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's own
            event.record(self._stream)
        self._in_flight.append((event, slot))
        while self._in_flight and (len(self._in_flight) > self._max_in_flight or self._in_flight[0][0].query()):
            done, emptied = self._in_flight.popleft()
            done.synchronize()
            self.free.put(emptied)
        # Later work on a tensor waits until its last bytes have arrived.
        torch.cuda.current_stream(self.plan.device).wait_event(event)

    def finish(self) -> None:
        self._stream.synchronize()
        self._in_flight.clear()

    def _slot(self, nbytes: int) -> torch.Tensor:
        import torch

        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def phase(info: TensorInfo) -> int:
    """Return the offset of a tensor within a cache line in its file; 0 if its dtype cannot be aligned there."""
    return 0 if info.begin % stored_dtype(info.dtype).itemsize else info.begin % ALIGNMENT


def make_staging(plan: ReadPlan, pieces: list[Piece]) -> HostStaging:
    """Allocate the tensors of a plan on its device, and the buffers for its pieces."""
    import torch

    kinds = {"cpu": HostStaging, "cuda": CudaStaging}
    return kinds.get(torch.device(plan.device).type, DeviceStaging)(plan, pieces)


def _laid_out(piece: Piece) -> list[tuple[Span, int]]:
    """Return the spans of a piece with the offset of each in a buffer."""
    places, position = [], 0
    for span in piece.spans:
        places.append((span, position))
        position += aligned(span.nbytes)
    return places


def _dtype(plan: ReadPlan, planned: PlannedTensor) -> torch.dtype:
    return torch_dtype(plan.dtype) if plan.is_floating(planned) else stored_dtype(planned.info.dtype)


def _bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    flat: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(flat)
