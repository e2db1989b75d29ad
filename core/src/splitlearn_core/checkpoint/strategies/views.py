"""Views of mapped safetensors files, and copies of views."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from splitlearn_core.checkpoint.strategies.base import CHUNK_BYTES, ReadPlan
from splitlearn_core.errors import InvalidCheckpointError
from splitlearn_core.plan.splitplan import PlannedTensor

if TYPE_CHECKING:
    import torch


def views(plan: ReadPlan) -> Iterator[tuple[PlannedTensor, torch.Tensor]]:
    """Yield each planned tensor as a view of its mapped file; one file is open at a time."""
    from safetensors import SafetensorError, safe_open

    for shard, tensors in plan.by_shard().items():
        # safetensors opens a file without letting go of the interpreter: where the disk or the network
        # hangs, every thread of the process would hang with it. Here only this one does.
        with plan.paths[shard].open("rb", buffering=0) as plain:
            try:
                with safe_open(plan.paths[shard], framework="pt", device="cpu") as file:
                    for planned in tensors:
                        # Nor does it where it looks at a tensor's first page; from the cache that takes no time.
                        plain.seek(planned.info.begin)
                        plain.read(1)
                        yield planned, file.get_tensor(planned.info.key)
            except SafetensorError as error:
                raise InvalidCheckpointError(
                    f"{plan.paths[shard]} is no sound safetensors file: {error}", hint="fetch or write the file anew"
                ) from error


def copy_to_plan(plan: ReadPlan, view: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Copy a view of a file to the plan's device, and convert it."""
    import torch

    copied = torch.empty(view.shape, dtype=dtype, device=plan.device)
    if view.nbytes <= CHUNK_BYTES or not view.is_contiguous():
        return copied.copy_(view)
    source, target = view.view(-1), copied.view(-1)
    elements = CHUNK_BYTES // view.element_size()
    for start in range(0, source.numel(), elements):
        chunk = source[start : start + elements]
        target[start : start + elements].copy_(chunk)
        plan.on_bytes(chunk.nbytes)
    return copied
