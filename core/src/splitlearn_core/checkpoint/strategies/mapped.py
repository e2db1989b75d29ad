"""Views of the mapped file: the cheapest way, on the CPU and in the stored dtype."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from splitlearn_core.checkpoint.strategies.base import ReadPlan, refused_formats, torch_dtype
from splitlearn_core.checkpoint.strategies.views import copy_to_plan, views
from splitlearn_core.plan.splitplan import PlannedTensor, loaded_nbytes
from splitlearn_core.types import SAFETENSORS

if TYPE_CHECKING:
    import torch


class MappedStrategy:
    """Views of the mapped file: nothing is copied, pages are shared between processes.

    A file that is cut or replaced before it is mapped is refused. One that is cut while it is mapped
    ends the process where a page is used that is gone (SIGBUS); to delete it does no harm.

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
