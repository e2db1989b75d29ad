"""Tensors of the module that are made of several in the file: their memory, which is filled as the files are read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from splitlearn_core.loading_strategy import ReadPlan
from splitlearn_core.plan.splitplan import PlannedTensor
from splitlearn_core.readers.tensor_parts import part_of_source, part_of_target
from splitlearn_core.readers.views import fresh_memory

if TYPE_CHECKING:
    import torch


class MadeTensors:
    """The tensors that a plan makes of others. One takes memory once the first value of it is read."""

    def __init__(self, plan: ReadPlan) -> None:
        self._plan = plan
        self._targets: dict[str, torch.Tensor] = {}
        self._dtypes = {
            place.target: plan.loaded_dtype(planned) for planned in plan.tensors for place in planned.places
        }
        self._missing = Counter(place.target for planned in plan.tensors for place in planned.places)

    def region(self, planned: PlannedTensor) -> torch.Tensor | None:
        """Return the memory into which all of a tensor is read; None if it lies there in another order."""
        if len(planned.places) != 1 or not planned.elements:
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
        if region is None or region.data_ptr() != tensor.data_ptr():
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
