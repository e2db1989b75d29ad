"""Shard by shard: one file is open at a time, and its tensors are copied one by one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from splitlearn_core.checkpoint.torch_file import is_mappable, read_state_dict
from splitlearn_core.errors import InvalidCheckpointError
from splitlearn_core.loading_strategy import ReadPlan, refused_formats, torch_dtype
from splitlearn_core.plan.splitplan import PlannedTensor, loaded_nbytes
from splitlearn_core.readers.mapped import copy_to_plan, views
from splitlearn_core.types import FLOAT_DTYPES, PYTORCH, SAFETENSORS

if TYPE_CHECKING:
    import torch


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
        kept = sum(loaded_nbytes(tensor, plan.dtype) for tensor in plan.tensors) if plan.device == "cpu" else 0
        return kept + self.passing_bytes(plan)

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
                floating = planned.info.dtype in FLOAT_DTYPES.values()
                yield planned, copy_to_plan(plan, view, torch_dtype(plan.dtype) if floating else view.dtype)


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
