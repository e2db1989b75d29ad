"""Tensors of the module that are made of several in the file: their memory, which is filled as the files are read.

Quantised ones are computed once their numbers and their scales are there, as views of the files.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from splitlearn_core.loading_strategy import ReadPlan, torch_dtype
from splitlearn_core.plan.conversions import part_of_slab
from splitlearn_core.plan.quantised import QuantisedTensor
from splitlearn_core.plan.splitplan import PlannedTensor
from splitlearn_core.readers.dequantising import dequantise, slabs
from splitlearn_core.readers.tensor_parts import part_of_source, part_of_target
from splitlearn_core.readers.views import fresh_memory
from splitlearn_core.types import stored_dtype

if TYPE_CHECKING:
    import torch


class MadeTensors:
    """The tensors that a plan makes of others. One takes memory once the first value of it is read."""

    def __init__(self, plan: ReadPlan) -> None:
        self._plan = plan
        self._targets: dict[str, torch.Tensor] = {}
        self._dtypes = {
            place.target: result_dtype(plan, planned) for planned in plan.tensors for place in planned.places
        }
        #: Key -> the numbers or the scales of quantised tensors of which the others are not read yet.
        self._halves: dict[str, torch.Tensor] = {}
        self._missing = Counter(place.target for planned in plan.tensors for place in planned.places)

    def region(self, planned: PlannedTensor) -> torch.Tensor | None:
        """Return the memory into which all of a tensor is read; None if it lies there in another order."""
        if len(planned.places) != 1 or not planned.elements or planned.quantised is not None:
            return None
        (place,) = planned.places
        if place.elements != planned.elements or not place.is_contiguous:
            return None
        return (
            self._target(place.target).view(-1).narrow(0, place.target_offset, place.elements).view(planned.info.shape)
        )

    def put(self, planned: PlannedTensor, tensor: torch.Tensor) -> Iterator[tuple[PlannedTensor, torch.Tensor]]:
        """Copy a tensor of a file to its places, unless it was read there; yield the targets that are then complete."""
        region = self.region(planned)
        if planned.quantised is not None and tensor.dtype == stored_dtype(planned.info.dtype):
            self._dequantise(planned, planned.quantised, tensor)
        elif region is None or region.data_ptr() != tensor.data_ptr():
            source = tensor.contiguous()
            for place in planned.places:
                part_of_target(self._target(place.target), place).copy_(part_of_source(source, place))
            self._plan.on_bytes(planned.info.nbytes)
        for place in planned.places:
            self._missing[place.target] -= 1
            if not self._missing[place.target]:
                made = PlannedTensor(place.target, self._plan.made[place.target])
                yield made, self._target(place.target)
                del self._targets[place.target]

    def _dequantise(self, planned: PlannedTensor, quantised: QuantisedTensor, tensor: torch.Tensor) -> None:
        self._halves[planned.info.key] = tensor
        self._plan.on_bytes(planned.info.nbytes)
        if not all(key in self._halves for key in quantised.keys):
            return
        numbers, scales = (self._halves.pop(key) for key in quantised.keys)
        targets = [(place, self._target(place.target)) for place in planned.places]
        step = math.prod(quantised.shape[1:])
        for slab in slabs(quantised):
            # On the CPU, whatever the device: others round differently.
            values = dequantise(quantised, numbers, scales, slab, self._dtypes[planned.places[0].target])
            for place, target in targets:
                part = part_of_slab(place, *slab, step)
                if part is not None:
                    part_of_target(target, part).copy_(part_of_source(values, part))

    def _target(self, name: str) -> torch.Tensor:
        import torch

        if name not in self._targets:
            info, device, dtype = self._plan.made[name], self._plan.device, self._dtypes[name]
            if device == "cpu":
                (block,) = fresh_memory([math.prod(info.shape) * dtype.itemsize])
                self._targets[name] = block.view(dtype).view(info.shape)
            else:
                self._targets[name] = torch.empty(info.shape, dtype=dtype, device=device)
        return self._targets[name]


def result_dtype(plan: ReadPlan, planned: PlannedTensor) -> torch.dtype:
    """Return the dtype of what is made of a tensor."""
    return plan.loaded_dtype(planned) if planned.quantised is None else torch_dtype(planned.kept_dtype or plan.dtype)
