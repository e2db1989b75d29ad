"""What crosses a cut, where that is more than hidden states ``[batch, sequence, hidden_size]``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from splitlearn_core.errors import ConfigurationError
from splitlearn_core.family import BATCH, LAYERS, SEQUENCE, STATES, ModelFamily

#: The dimensions of hidden states in most models.
_USUAL = (BATCH, SEQUENCE, "hidden_size")


class Source(StrEnum):
    """Where a tensor that crosses a cut comes from, and so what becomes of it in the next component."""

    #: The hidden states themselves.
    STATES = "states"
    #: A layer computes it for the next one.
    LAYER = "layer"
    #: It is computed before the first layer, and each layer takes all of it.
    START = "start"
    #: It is computed before the first layer, and each layer takes a slice of its own.
    SLICES = "slices"


@dataclass(frozen=True, slots=True)
class CrossingTensor:
    """A tensor that crosses every cut of a model."""

    source: Source
    #: Its dimensions after ``[batch, sequence]``, with which it begins where it crosses; without that of the layers.
    sizes: tuple[int, ...]
    #: The places of batch and sequence among the dimensions that the layers take.
    places: tuple[int, int] = (0, 1)

    def shape(self, layers_left: int) -> tuple[int, ...]:
        """Return its dimensions after batch and sequence, at a cut that so many layers follow."""
        return (layers_left, *self.sizes) if self.source is Source.SLICES else self.sizes

    def elements(self, layers_left: int) -> int:
        """Return how many of its values cross a cut that so many layers follow, for each token."""
        return math.prod(self.shape(layers_left))


def crossing_tensors(family: ModelFamily, config: Mapping[str, Any]) -> dict[str, CrossingTensor]:
    """Return what crosses the cuts of a model, by the names of the arguments of its layers; hidden states come first.

    Empty if that is hidden states ``[batch, sequence, hidden_size]`` alone: models of one type may differ in it.

    Args:
        family: The model's family.
        config: ``config.json``.

    Raises:
        ConfigurationError: A size in ``config.json`` is missing, or is not a whole number.
    """
    described = {STATES: _USUAL, **family.crossing}
    tensors = {name: _tensor(family, config, name, dimensions) for name, dimensions in described.items()}
    crossing = {name: tensor for name, tensor in tensors.items() if 0 not in tensor.sizes}
    return {} if [*crossing] == [STATES] and described[STATES] == _USUAL else crossing


def computed(crossing: Mapping[str, CrossingTensor]) -> list[str]:
    """Return the names of what a component computes for the next, besides hidden states."""
    return [name for name, tensor in crossing.items() if tensor.source is Source.LAYER]


def _tensor(family: ModelFamily, config: Mapping[str, Any], name: str, dimensions: tuple[str, ...]) -> CrossingTensor:
    taken = [dimension for dimension in dimensions if dimension != LAYERS]
    sizes = tuple(_size(family, config, dimension) for dimension in taken if dimension not in (BATCH, SEQUENCE))
    if name == STATES:
        source = Source.STATES
    elif name in family.layer_results:
        source = Source.LAYER
    else:
        source = Source.SLICES if LAYERS in dimensions else Source.START
    return CrossingTensor(source, sizes, (taken.index(BATCH), taken.index(SEQUENCE)))


def _size(family: ModelFamily, config: Mapping[str, Any], dimension: str) -> int:
    """Return a dimension: a value of ``config.json``, or the product of several."""
    size = 1
    for name in dimension.split("*"):
        value = family.config_value(config, name)
        if type(value) is not int or value < 0:
            raise ConfigurationError(
                f"config.json says {family.config_names.get(name, name)} = {value!r}, which has to be a whole number: "
                "it is a dimension of a tensor that crosses a cut",
                hint="use the config.json that the checkpoint was saved with",
            )
        size *= value
    return size
