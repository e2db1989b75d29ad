"""Parts of tensors at the places that a plan gives them, and tensors in memory that are made of parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from splitlearn_core.plan.conversions import Place, WeightConversion, places_of
from splitlearn_core.plan.splitplan import PlannedTensor

if TYPE_CHECKING:
    import torch


def part_of_target(target: torch.Tensor, place: Place) -> torch.Tensor:
    """Return a view of the part of a contiguous target that a place describes."""
    return target.as_strided(place.sizes, place.target_strides, target.storage_offset() + place.target_offset)


def part_of_source(source: torch.Tensor, place: Place) -> torch.Tensor:
    """Return a view of the part of a contiguous source that a place describes."""
    return source.as_strided(place.sizes, place.source_strides, source.storage_offset() + place.source_offset)


def source_from(planned: PlannedTensor, targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return a tensor of a file from the tensors that were made of it."""
    import torch

    source = torch.empty(planned.shape, dtype=targets[planned.places[0].target].dtype)
    for place in planned.places:
        part_of_source(source, place).copy_(part_of_target(targets[place.target].contiguous(), place))
    return source


def make(conversion: WeightConversion, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Make tensors of others in memory.

    Raises:
        ValueError: They do not fit together.
    """
    import torch

    shapes, places = places_of(conversion, {key: tuple(tensors[key].shape) for key in conversion.keys})
    first = tensors[conversion.keys[0]]
    targets = {name: torch.empty(shape, dtype=first.dtype, device=first.device) for name, shape in shapes.items()}
    for key, parts in places.items():
        source = tensors[key].detach().contiguous()
        for place in parts:
            part_of_target(targets[place.target], place).copy_(part_of_source(source, place))
    return targets
