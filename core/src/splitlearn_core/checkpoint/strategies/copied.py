"""Copies of planned bytes, on any device and in any dtype."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from splitlearn_core.checkpoint.strategies.base import ReadPlan, refused_formats, torch_dtype
from splitlearn_core.checkpoint.strategies.views import copy_to_plan, views
from splitlearn_core.plan.splitplan import PlannedTensor, loaded_nbytes
from splitlearn_core.types import FLOAT_DTYPES, SAFETENSORS

if TYPE_CHECKING:
    import torch


class CopiedStrategy:
    """Tensors in memory of their own, on any device and in any dtype."""

    name = "copied"

    def refusal(self, plan: ReadPlan) -> str:
        return refused_formats(plan, SAFETENSORS)

    def anonymous_bytes(self, plan: ReadPlan) -> int:
        kept = sum(loaded_nbytes(tensor, plan.dtype) for tensor in plan.tensors)
        return kept if plan.device == "cpu" else 0

    def read(self, plan: ReadPlan) -> Iterator[tuple[PlannedTensor, torch.Tensor]]:
        for planned, view in views(plan):
            floating = planned.info.dtype in FLOAT_DTYPES.values()
            dtype = torch_dtype(plan.dtype) if floating else view.dtype
            yield planned, copy_to_plan(plan, view, dtype)
