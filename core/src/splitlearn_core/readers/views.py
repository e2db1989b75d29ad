"""Tensors of files as views of mapped pages, and memory of their own for what is copied out of them."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from splitlearn_core.checkpoint.files import open_regular, path_of
from splitlearn_core.checkpoint.safetensors_header import header_of, read_header
from splitlearn_core.checkpoint.torch_file import read_state_dict
from splitlearn_core.errors import InvalidCheckpointError, MissingFileError
from splitlearn_core.loading_strategy import ReadPlan
from splitlearn_core.plan.splitplan import PlannedTensor
from splitlearn_core.types import CHUNK_BYTES, SAFETENSORS, TensorInfo, stored_dtype

if TYPE_CHECKING:
    import torch

#: Bytes of a huge page; smaller tensors share a block.
HUGE = 2 * 2**20

#: Bytes of a cache line, at which tensors are aligned, as torch's own are.
ALIGNMENT = 64


def views(plan: ReadPlan) -> Iterator[tuple[PlannedTensor, torch.Tensor]]:
    """Yield each planned tensor as a view of its mapped file; one file is open at a time.

    Equal to those of ``safe_open`` of safetensors, which holds the GIL while it opens a file and touches the first
    page of each tensor: if the disk or the network hangs, every thread of the process would hang with it.
    """
    import torch

    for shard, tensors in plan.by_shard().items():
        path = plan.paths[shard]
        with open_regular(path) as file:
            refuse_changed(path, header_of(path, file), tensors)
            size = os.fstat(file.fileno()).st_size
            storage = torch.from_file(path_of(file, path), shared=False, size=size, dtype=torch.uint8).untyped_storage()
            for planned in tensors:
                info = planned.info
                empty = torch.empty(0, dtype=stored_dtype(info.dtype))
                # Each has a storage of its own, as code expects of tensors that are not tied.
                yield planned, empty.set_(storage[info.begin : info.end]).view(info.shape)
            # Access to a page beyond the end of a truncated file would kill the process.
            refuse_cut(path, os.fstat(file.fileno()).st_size, tensors[-1].info)


def state_dict_views(plan: ReadPlan) -> Iterator[tuple[PlannedTensor, torch.Tensor]]:
    """Yield the planned tensors of one ``.bin`` file."""
    path = plan.paths[plan.tensors[0].info.shard]
    state = read_state_dict(path)
    for planned in plan.tensors:
        view = state.get(planned.info.key)
        if view is None or tuple(view.shape) != planned.info.shape or view.nbytes != planned.info.nbytes:
            raise InvalidCheckpointError(
                f"{path} was changed while it was being loaded: {planned.info.key} is not what it was",
                hint="load it again once it is written completely",
            )
        yield planned, view


def copy_to_plan(plan: ReadPlan, view: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Copy a view of a file to the plan's device, converted to a dtype."""
    import torch

    if not view.is_contiguous():
        # In the same order in memory, as transformers has it: other kernels would round differently.
        return torch.empty_like(view, dtype=dtype, device=plan.device).copy_(view)
    # Unconverted, it has the same offset within a cache line as in the file; see fresh_memory.
    copied = _target(plan, view.shape, dtype, view.data_ptr() % ALIGNMENT if dtype == view.dtype else 0)
    if view.nbytes <= CHUNK_BYTES:
        return copied.copy_(view)
    source, target = view.view(-1), copied.view(-1)
    elements = CHUNK_BYTES // view.element_size()
    for start in range(0, source.numel(), elements):
        chunk = source[start : start + elements]
        target[start : start + elements].copy_(chunk)
        plan.on_bytes(chunk.nbytes)
    return copied


def _target(plan: ReadPlan, shape: torch.Size, dtype: torch.dtype, phase: int) -> torch.Tensor:
    import torch

    if plan.device != "cpu":
        return torch.empty(shape, dtype=dtype, device=plan.device)
    (block,) = fresh_memory([shape.numel() * dtype.itemsize], [0 if phase % dtype.itemsize else phase])
    return block.view(dtype).view(shape)


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


def aligned(nbytes: int) -> int:
    """Round a number of bytes up to the alignment."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


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


def refuse_other_files(plan: ReadPlan) -> None:
    """Refuse safetensors files that do not hold the planned tensors at the planned offsets (any longer).

    Called before a file is read by offsets, and again afterwards.

    Raises:
        MissingFileError: A file is missing.
        InvalidCheckpointError: A file was truncated or replaced.
    """
    for shard, tensors in plan.by_shard().items():
        if tensors[0].info.format == SAFETENSORS:
            path = plan.paths[shard]
            if not path.exists():
                raise MissingFileError(f"{path} no longer exists", hint="fetch it again, then load again")
            refuse_changed(path, read_header(path), tensors)


def refuse_changed(path: Path, header: Mapping[str, TensorInfo], tensors: Iterable[PlannedTensor]) -> None:
    """Refuse a file whose header differs from the one that was planned with.

    Args:
        path: The file.
        header: The tensors that it holds now.
        tensors: The planned tensors of the file.
    """
    for planned in tensors:
        if header.get(planned.info.key) != planned.info:
            raise InvalidCheckpointError(
                f"{path} was changed while it was being loaded: {planned.info.key} has another dtype, shape or offset",
                hint="load it again once it is written completely",
            )


def refuse_cut(path: Path, size: int, last: TensorInfo) -> None:
    """Refuse a file that now ends before a tensor of it that was just mapped."""
    if size < last.end:
        raise InvalidCheckpointError(
            f"{path} was cut while it was being loaded: it ends at byte {size}, {last.key} at byte {last.end}",
            hint="load it again once it is written completely",
        )
