"""Tensors of mapped files, or of a loaded model, one after another: as views, or copied into memory of their own."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from splitlearn_core.checkpoint.files import open_regular, path_of
from splitlearn_core.checkpoint.safetensors_header import header_of, read_header
from splitlearn_core.checkpoint.torch_file import is_mappable, read_state_dict
from splitlearn_core.errors import InvalidCheckpointError, MissingFileError, TensorMismatchError
from splitlearn_core.loading_strategy import ReadPlan, refused_formats
from splitlearn_core.plan.splitplan import PlannedTensor, loaded_nbytes
from splitlearn_core.quoting import SENTENCE, listed
from splitlearn_core.readers.tensor_parts import source_from
from splitlearn_core.types import CHUNK_BYTES, OPAQUE, PYTORCH, SAFETENSORS, TensorInfo, stored_dtype

if TYPE_CHECKING:
    import torch

#: Bytes of a huge page; smaller tensors share a block.
HUGE = 2 * 2**20

#: Bytes of a cache line, at which tensors are aligned, as torch's own are.
ALIGNMENT = 64


class MappedStrategy:
    """Views of the mapped file: nothing is copied, pages are shared between processes.

    A file that is truncated or replaced before it is mapped is refused. If it is truncated later, access to
    a missing page kills the process (SIGBUS); deletion does no harm.

    Tensors that are stored in another dtype are converted; they, and those that are made of several, take memory.
    """

    name = "mapped"
    reads = "safetensors, on the CPU; takes no memory in the stored dtype"

    def refusal(self, plan: ReadPlan) -> str:
        if others := refused_formats(plan, SAFETENSORS):
            return others
        return "" if plan.device == "cpu" else f"file pages cannot be tensors on {plan.device}"

    def anonymous_bytes(self, plan: ReadPlan) -> int:
        return sum(loaded_nbytes(t, plan.dtype) for t in plan.tensors if t.places or plan.needs_conversion(t))

    def read(self, plan: ReadPlan) -> Iterator[tuple[PlannedTensor, torch.Tensor]]:
        for planned, view in views(plan):
            # A tensor with places is converted as it is copied there.
            converted = plan.needs_conversion(planned) and not planned.places
            yield planned, copy_to_plan(plan, view, plan.loaded_dtype(planned)) if converted else view


class IncrementalStrategy:
    """Tensors in memory of their own, from one shard after the other; the way to read ``.bin`` files.

    A ``.bin`` file that torch wrote before 1.6 cannot be mapped and is in memory as a whole while
    its tensors are copied.
    """

    name = "incremental"
    reads = "safetensors and .bin files, in any dtype, on any device; one shard at a time"

    def refusal(self, plan: ReadPlan) -> str:
        return refused_formats(plan, SAFETENSORS, PYTORCH)

    def anonymous_bytes(self, plan: ReadPlan) -> int:
        return plan.host_bytes + self.passing_bytes(plan)

    def passing_bytes(self, plan: ReadPlan) -> int:
        whole = [
            plan.paths[shard].stat().st_size
            for shard, tensors in plan.by_shard().items()
            # A file that is not downloaded yet is taken to be mappable, as torch has written since 2020.
            if shard in plan.paths and tensors[0].info.format == PYTORCH and not is_mappable(plan.paths[shard])
        ]
        return max(whole, default=0)

    def read(self, plan: ReadPlan) -> Iterator[tuple[PlannedTensor, torch.Tensor]]:
        for tensors in plan.by_shard().values():
            shard = replace(plan, tensors=tuple(tensors))
            source = _state_dict_views(shard) if tensors[0].info.format == PYTORCH else views(shard)
            for planned, view in source:
                yield planned, view if planned.places else copy_to_plan(plan, view, plan.loaded_dtype(planned))


class WholeStrategy:
    """Copies out of the whole model that ``from_pretrained`` loads.

    The reference, and the way to read what only transformers can: quantised weights, which are
    dequantised. It takes the memory of the whole model in addition to that of the components.
    """

    name = "whole"
    reads = "whatever transformers reads, quantised weights too; takes the memory of the whole model"

    def refusal(self, plan: ReadPlan) -> str:
        others = sorted(plan.formats() - {SAFETENSORS, PYTORCH, OPAQUE})
        if others:
            return f"transformers is not used to read {', '.join(others)} files"
        return plan.whole.missing if plan.whole is not None else "the plan does not say how the whole model is loaded"

    def anonymous_bytes(self, plan: ReadPlan) -> int:
        return plan.host_bytes + self.passing_bytes(plan)

    def passing_bytes(self, plan: ReadPlan) -> int:
        return plan.whole.nbytes if plan.whole is not None and plan.tensors else 0

    def read(self, plan: ReadPlan) -> Iterator[tuple[PlannedTensor, torch.Tensor]]:
        if plan.whole is None or not plan.tensors:
            return
        state = plan.whole.tensors
        results = {planned.module_key: planned.info for planned in plan.tensors if not planned.places} | {**plan.made}
        problems = [
            f"missing: {name} {list(info.shape)}"
            for name, info in results.items()
            if name not in state or tuple(state[name].shape) != info.shape
        ]
        if problems:
            raise TensorMismatchError(
                f"the model that transformers loads lacks {len(problems)} of the planned tensors:\n  "
                + listed(problems, "\n  ", limit=SENTENCE),
                hint="weights of this kind cannot be brought into plain modules; use the unquantised checkpoint",
            )
        for planned in plan.tensors:
            if planned.places:
                yield planned, source_from(planned, state)
                continue
            tensor = state[planned.module_key]
            dtype = plan.loaded_dtype(planned) if plan.is_floating(planned) else tensor.dtype
            yield planned, copy_to_plan(plan, tensor, dtype)


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


def _state_dict_views(plan: ReadPlan) -> Iterator[tuple[PlannedTensor, torch.Tensor]]:
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
