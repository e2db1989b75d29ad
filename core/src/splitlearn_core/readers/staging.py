"""Where the bytes read go: into the tensors themselves, or through staging buffers into another dtype or device."""

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


#: Bytes of a huge page; what is smaller shares a block with its like.
HUGE = 2 * 2**20

#: Where a tensor begins by itself: at the beginning of a cache line, as torch's own do.
ALIGNMENT = 64


def aligned(nbytes: int) -> int:
    """Round up to where the next tensor may begin."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def fresh_memory(sizes: Iterable[int], phases: Iterable[int] = ()) -> list[torch.Tensor]:
    """Return memory of the wanted sizes in bytes, as flat tensors of bytes; nothing of it is touched yet.

    Each large one is a block of its own, so that the memory of a tensor that is replaced or
    converted goes back at once. The small ones share a block, which lives as long as any of them.
    Each has a storage of its own size nevertheless: what saves a tensor saves all of its storage.

    Args:
        sizes: The sizes.
        phases: How many bytes after the beginning of a cache line each begins; by default there. Products of one
            row differ in the last bit by it, and ``from_pretrained`` leaves tensors where they are in their file.
    """
    import torch

    wanted = list(sizes)
    begins = list(phases) or [0] * len(wanted)
    places = list(zip(wanted, begins, strict=True))
    small = [aligned(phase + nbytes) for nbytes, phase in places if nbytes < HUGE]
    shared, position = _block(sum(small)).untyped_storage(), 0
    found = []
    for nbytes, phase in places:
        if nbytes >= HUGE:
            block, start = _block(phase + nbytes).untyped_storage(), phase
        else:
            block, start = shared, position + phase
            position += aligned(phase + nbytes)
        found.append(torch.empty(0, dtype=torch.uint8).set_(block[start : start + nbytes]))
    return found


def _block(nbytes: int) -> torch.Tensor:
    import torch

    if sys.platform != "linux" or nbytes < HUGE:
        return torch.empty(nbytes, dtype=torch.uint8)
    # One huge page more than needed, to begin where one begins; what is not touched takes no memory.
    try:
        block = mmap.mmap(-1, nbytes + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{nbytes} bytes for a tensor: {error}") from error
    start = -ctypes.addressof(ctypes.c_char.from_buffer(block)) % HUGE
    # The end that does not fill a huge page is left out: half of one would be wasted there on average.
    with suppress(OSError):  # a kernel without them: ordinary pages do
        block.madvise(mmap.MADV_HUGEPAGE, start, nbytes - nbytes % HUGE)
    return torch.frombuffer(block, dtype=torch.uint8, count=nbytes, offset=start)


#: Stretches of one piece; the system reads into 1024 places at once.
MAX_SPANS = 512


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of one tensor, of whole elements."""

    planned: PlannedTensor
    #: First byte, counted from the beginning of the tensor.
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes that lie together in one file, of one tensor or of several neighbours."""

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
        size: In bytes; a piece is larger only where one element is.
    """
    pieces: list[Piece] = []
    spans: list[Span] = []
    room, expected = 0, ("", -1)
    for planned in sorted(tensors, key=lambda tensor: (tensor.info.shard, tensor.info.begin)):
        info, start = planned.info, 0
        item = DTYPE_BYTES[info.dtype]
        while start < info.nbytes:
            here = (info.shard, info.begin + start)
            if here != expected or room < item or len(spans) == MAX_SPANS:
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


#: Elements that torch converts in the thread that asks. Of more it makes work for a team of its own
#: in each reader, and many teams on few processors wait for each other.
_SERIAL = 2**15 - 64


def is_staged(plan: ReadPlan, planned: PlannedTensor) -> bool:
    """Say whether a tensor has to go through a buffer: what is wanted as it is stored does not, on the CPU."""
    return plan.device != "cpu" or plan.needs_conversion(planned)


def slot_count(pieces: list[Piece], plan: ReadPlan) -> int:
    """Return how many buffers a read uses: one for each reader, and for a device another that is emptied meanwhile."""
    staged = sum(any(is_staged(plan, span.planned) for span in piece.spans) for piece in pieces)
    return min(reader_count() * (1 if plan.device == "cpu" else 2), staged)


def slot_bytes(pieces: list[Piece]) -> int:
    """Return the size of a buffer that takes any of the pieces."""
    return max((sum(aligned(span.nbytes) for span in piece.spans) for piece in pieces), default=0)


class HostLanding(Landing["torch.Tensor"]):
    """Tensors in the memory of this machine."""

    def __init__(self, plan: ReadPlan, pieces: list[Piece]) -> None:
        self.plan = plan
        self.tensors = self._targets()
        self._flat = {key: tensor.view(-1) for key, tensor in self.tensors.items()}
        #: Flat bytes of the tensors that are filled without a detour.
        self._straight = {
            planned.module_key: _bytes(self.tensors[planned.module_key])
            for planned in plan.tensors
            if not is_staged(plan, planned)
        }
        super().__init__([self._slot(slot_bytes(pieces)) for _ in range(slot_count(pieces, plan))])

    def needs_slot(self, piece: Piece) -> bool:
        return any(span.planned.module_key not in self._straight for span in piece.spans)

    def views(self, piece: Piece, slot: torch.Tensor | None) -> list[memoryview]:
        places = []
        for span, start in _laid_out(piece):
            memory = self._straight.get(span.planned.module_key)
            if memory is not None:
                places.append(memory[span.start : span.start + span.nbytes])
            elif slot is not None:
                places.append(_bytes(slot)[start : start + span.nbytes])
        return places

    def landed(self, piece: Piece, slot: torch.Tensor | None) -> torch.Tensor | None:
        """Convert what came into a buffer, while the processor still has it at hand."""
        import torch

        if slot is None:
            return None
        # Each thread has a mode of its own, and tensors that were made in this one are filled in no other.
        with torch.inference_mode():
            for target, source in self._moves(piece, slot):
                for start in range(0, source.numel(), _SERIAL):
                    target[start : start + _SERIAL].copy_(source[start : start + _SERIAL])
        self.free.put(slot)
        return None

    def settle(self, piece: Piece, slot: torch.Tensor | None) -> None:
        """Bring what came into a buffer to the device, and free the buffer; on the CPU it is there already."""

    def finish(self) -> None:
        """Wait until everything is where it belongs, or at least nothing moves any more."""

    def _moves(self, piece: Piece, slot: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield flat stretches of tensors, and the stretches of a buffer that belong there."""
        for span, start in _laid_out(piece):
            if span.planned.module_key in self._straight:
                continue
            source = slot[start : start + span.nbytes].view(stored_dtype(span.planned.info.dtype))
            first = span.start // source.element_size()
            yield self._flat[span.planned.module_key][first : first + source.numel()], source

    def _targets(self) -> dict[str, torch.Tensor]:
        tensors = self.plan.tensors
        blocks = fresh_memory(
            (loaded_nbytes(planned, self.plan.dtype) for planned in tensors),
            # Converted, a tensor begins where torch lets it begin.
            (0 if is_staged(self.plan, planned) else phase(planned.info) for planned in tensors),
        )
        return {
            planned.module_key: block.view(_dtype(self.plan, planned)).view(planned.info.shape)
            for planned, block in zip(self.plan.tensors, blocks, strict=True)
        }

    def _slot(self, nbytes: int) -> torch.Tensor:
        import torch

        return torch.empty(nbytes, dtype=torch.uint8)


class DeviceLanding(HostLanding):
    """Tensors on a device, each piece copied there before the next is taken."""

    def landed(self, piece: Piece, slot: torch.Tensor | None) -> torch.Tensor | None:
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


class CudaLanding(DeviceLanding):
    """Tensors on a CUDA device: buffers are pinned, and copied from while others are filled."""

    def __init__(self, plan: ReadPlan, pieces: list[Piece]) -> None:
        import torch

        super().__init__(plan, pieces)
        self._stream: Any = torch.cuda.Stream(plan.device)  # type: ignore[no-untyped-call]  # torch's own
        # The memory of the tensors may still be in use by work that was queued before.
        self._stream.wait_stream(torch.cuda.current_stream(plan.device))
        #: Buffers that are being copied from, and what tells when that is over.
        self._leaving: deque[tuple[Any, torch.Tensor]] = deque()
        self._most = max(1, slot_count(pieces, plan) // 2)

    def settle(self, piece: Piece, slot: torch.Tensor | None) -> None:
        import torch

        if slot is None:
            return
        with torch.cuda.stream(self._stream):
            # Not blocking, a conversion takes place on the device too.
            for target, source in self._moves(piece, slot):
                target.copy_(source, non_blocking=True)
            event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's own
            event.record(self._stream)
        self._leaving.append((event, slot))
        while self._leaving and (len(self._leaving) > self._most or self._leaving[0][0].query()):
            done, emptied = self._leaving.popleft()
            done.synchronize()
            self.free.put(emptied)
        # Whoever uses a tensor next does so after its last bytes have come.
        torch.cuda.current_stream(self.plan.device).wait_event(event)

    def finish(self) -> None:
        self._stream.synchronize()
        self._leaving.clear()

    def _slot(self, nbytes: int) -> torch.Tensor:
        import torch

        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def phase(info: TensorInfo) -> int:
    """Return where in a cache line a tensor begins in its file; 0 where values of its dtype cannot begin there."""
    return 0 if info.begin % stored_dtype(info.dtype).itemsize else info.begin % ALIGNMENT


def make_landing(plan: ReadPlan, pieces: list[Piece]) -> HostLanding:
    """Allocate what is to be filled, on the plan's device."""
    import torch

    kinds = {"cpu": HostLanding, "cuda": CudaLanding}
    return kinds.get(torch.device(plan.device).type, DeviceLanding)(plan, pieces)


def _laid_out(piece: Piece) -> list[tuple[Span, int]]:
    """Say where in a buffer each span of a piece begins."""
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
