"""Copies of planned bytes, on any device and in any dtype: several readers, large reads, no needless detour."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from splitlearn_core.checkpoint.strategies.base import ReadPlan, refused_formats
from splitlearn_core.checkpoint.strategies.landing import is_staged, make_landing, slot_bytes, slot_count
from splitlearn_core.checkpoint.strategies.pieces import Piece, cut
from splitlearn_core.checkpoint.strategies.readers import reading
from splitlearn_core.checkpoint.strategies.unchanged import refuse_other_files
from splitlearn_core.plan.splitplan import PlannedTensor, loaded_nbytes
from splitlearn_core.types import SAFETENSORS

if TYPE_CHECKING:
    import torch

#: Bytes that are read with one call. Those that are converted or moved are read in smaller pieces,
#: which are still in the processor's cache when they are.
CHUNK_BYTES = 8 * 2**20
STAGED_BYTES = 2**20


class CopiedStrategy:
    """Tensors in memory of their own, on any device and in any dtype.

    Where they are wanted as they are stored, the system reads straight into their memory. Where
    they are to be converted or moved, pieces go through a few buffers that are used again.
    """

    name = "copied"
    reads = "safetensors, in any dtype, on any device; in parallel"

    def refusal(self, plan: ReadPlan) -> str:
        return refused_formats(plan, SAFETENSORS)

    def anonymous_bytes(self, plan: ReadPlan) -> int:
        kept = sum(loaded_nbytes(tensor, plan.dtype) for tensor in plan.tensors) if plan.device == "cpu" else 0
        return kept + self.passing_bytes(plan)

    def passing_bytes(self, plan: ReadPlan) -> int:
        pieces = _pieces(plan)
        return slot_count(pieces, plan) * slot_bytes(pieces)

    def read(self, plan: ReadPlan) -> Iterator[tuple[PlannedTensor, torch.Tensor]]:
        refuse_other_files(plan)
        pieces = _pieces(plan)
        landing = make_landing(plan, pieces)
        missing = {planned.module_key: planned.info.nbytes for planned in plan.tensors}
        for planned in plan.tensors:
            if not planned.info.nbytes:
                yield planned, landing.tensors.pop(planned.module_key)
        try:
            with reading(pieces, plan.paths, landing) as arrivals:
                for piece, slot in arrivals:
                    landing.settle(piece, slot)
                    plan.on_bytes(piece.nbytes)
                    for span in piece.spans:
                        key = span.planned.module_key
                        missing[key] -= span.nbytes
                        if not missing[key]:
                            yield span.planned, landing.tensors.pop(key)
        finally:
            landing.finish()
        refuse_other_files(plan)


def _pieces(plan: ReadPlan) -> list[Piece]:
    staged = any(is_staged(plan, planned) for planned in plan.tensors)
    return cut(plan.tensors, STAGED_BYTES if staged else CHUNK_BYTES)
