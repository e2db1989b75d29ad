"""Views of memory-mapped files: the cheapest strategy, on the CPU and in the stored dtype."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from splitlearn_core.checkpoint.regular_files import open_regular, path_of
from splitlearn_core.checkpoint.safetensors_header import header_of
from splitlearn_core.loading_strategy import ReadPlan, refused_formats, torch_dtype
from splitlearn_core.plan.splitplan import PlannedTensor, loaded_nbytes
from splitlearn_core.readers.checks import refuse_changed, refuse_cut
from splitlearn_core.readers.staging import ALIGNMENT, fresh_memory
from splitlearn_core.types import CHUNK_BYTES, SAFETENSORS, stored_dtype

if TYPE_CHECKING:
    import torch


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


class MappedStrategy:
    """Views of the mapped file: nothing is copied, pages are shared between processes.

    A file that is truncated or replaced before it is mapped is refused. If it is truncated later, access to
    a missing page kills the process (SIGBUS); deletion does no harm.

    Tensors that are stored in another dtype are converted, and only those take memory.
    """

    name = "mapped"
    reads = "safetensors, on the CPU; takes no memory in the stored dtype"

    def refusal(self, plan: ReadPlan) -> str:
        if others := refused_formats(plan, SAFETENSORS):
            return others
        return "" if plan.device == "cpu" else f"file pages cannot be tensors on {plan.device}"

    def anonymous_bytes(self, plan: ReadPlan) -> int:
        return sum(loaded_nbytes(t, plan.dtype) for t in plan.tensors if plan.needs_conversion(t))

    def read(self, plan: ReadPlan) -> Iterator[tuple[PlannedTensor, torch.Tensor]]:
        for planned, view in views(plan):
            yield planned, copy_to_plan(plan, view, torch_dtype(plan.dtype)) if plan.needs_conversion(planned) else view
