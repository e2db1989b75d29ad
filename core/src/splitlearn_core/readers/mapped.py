"""Ways of reading one tensor after another: views of mapped files, copies out of them, and out of a loaded model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from splitlearn_core.checkpoint.torch_file import is_mappable
from splitlearn_core.errors import TensorMismatchError
from splitlearn_core.loading_strategy import ReadPlan, refused_formats
from splitlearn_core.plan.splitplan import PlannedTensor, loaded_nbytes
from splitlearn_core.quoting import SENTENCE, listed
from splitlearn_core.readers.copied import CopiedStrategy
from splitlearn_core.readers.tensor_parts import source_from
from splitlearn_core.readers.views import copy_to_plan, state_dict_views, views
from splitlearn_core.types import OPAQUE, PYTORCH, SAFETENSORS, stored_dtype

if TYPE_CHECKING:
    import torch


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
        taken = sum(loaded_nbytes(t, plan.dtype) for t in plan.tensors if t.places or plan.needs_conversion(t))
        return taken + self.passing_bytes(plan)

    def passing_bytes(self, plan: ReadPlan) -> int:
        return CopiedStrategy().passing_bytes(_with(plan, placed=True))

    def read(self, plan: ReadPlan) -> Iterator[tuple[PlannedTensor, torch.Tensor]]:
        # Copied into what is made of them: several threads read without a fault at each page.
        yield from CopiedStrategy().read(_with(plan, placed=True))
        for planned, view in views(_with(plan, placed=False)):
            converted = plan.needs_conversion(planned)
            yield planned, copy_to_plan(plan, view, plan.loaded_dtype(planned)) if converted else view


def _with(plan: ReadPlan, *, placed: bool) -> ReadPlan:
    """Return a plan with the tensors that others are made of, or with all others."""
    return replace(plan, tensors=tuple(planned for planned in plan.tensors if bool(planned.places) is placed))


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
            source = state_dict_views(shard) if tensors[0].info.format == PYTORCH else views(shard)
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
        import torch

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
                # Scales are no part of what transformers has dequantised.
                is_scales = planned.quantised is not None and planned.info.key == planned.quantised.scales
                empty = torch.empty(planned.info.shape, dtype=stored_dtype(planned.info.dtype)) if is_scales else None
                yield planned, source_from(planned, state) if empty is None else empty
                continue
            tensor = state[planned.module_key]
            dtype = plan.loaded_dtype(planned) if plan.is_floating(planned) else tensor.dtype
            yield planned, copy_to_plan(plan, tensor, dtype)
