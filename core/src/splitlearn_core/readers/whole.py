"""Through transformers: the whole model is loaded, and the tensors of the components are copied out of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from splitlearn_core.errors import TensorMismatchError
from splitlearn_core.loading_strategy import ReadPlan, torch_dtype
from splitlearn_core.plan.splitplan import PlannedTensor, loaded_nbytes
from splitlearn_core.quoting import SENTENCE, listed
from splitlearn_core.readers.mapped import copy_to_plan
from splitlearn_core.types import OPAQUE, PYTORCH, SAFETENSORS

if TYPE_CHECKING:
    import torch


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
        kept = sum(loaded_nbytes(tensor, plan.dtype) for tensor in plan.tensors) if plan.device == "cpu" else 0
        return kept + self.passing_bytes(plan)

    def passing_bytes(self, plan: ReadPlan) -> int:
        return plan.whole.nbytes if plan.whole is not None and plan.tensors else 0

    def read(self, plan: ReadPlan) -> Iterator[tuple[PlannedTensor, torch.Tensor]]:
        if plan.whole is None or not plan.tensors:
            return
        state = plan.whole.tensors
        problems = [
            f"missing: {planned.module_key} {list(planned.info.shape)}"
            for planned in plan.tensors
            if planned.module_key not in state or tuple(state[planned.module_key].shape) != planned.info.shape
        ]
        if problems:
            raise TensorMismatchError(
                f"the model that transformers loads lacks {len(problems)} of the planned tensors:\n  "
                + listed(problems, "\n  ", limit=SENTENCE),
                hint="weights of this kind cannot be brought into plain modules; use the unquantised checkpoint",
            )
        for planned in plan.tensors:
            tensor = state[planned.module_key]
            yield (
                planned,
                copy_to_plan(plan, tensor, torch_dtype(plan.dtype) if plan.is_floating(planned) else tensor.dtype),
            )
