"""What crosses a cut besides hidden states: taken from the output of a component, and given to the layers of the next.

A bundle is an output of transformers: ``last_hidden_state``, and other tensors by the names of the arguments of layers.
Each begins with batch and sequence, wherever these are in the layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput

from splitlearn_core.build.pruning import Entering, Left
from splitlearn_core.errors import ConfigurationError
from splitlearn_core.family import STATES
from splitlearn_core.plan.crossing import CrossingTensor, Source

#: The place of the layers in a tensor of which each layer takes a slice.
_LAYERS = 2

#: What crosses the cuts of a model, by name; empty if that is hidden states ``[batch, sequence, hidden_size]`` alone.
Crossing = Mapping[str, CrossingTensor]


def taken_apart(
    crossing: Crossing, states: Any, arguments: dict[str, Any], layers_left: int
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return the hidden states, and what crosses with them, which is taken out of the arguments.

    Args:
        crossing: What crosses.
        states: Hidden states; or all that the component before returned.
        arguments: The other arguments of a component.
        layers_left: The number of layers from the component's first on.

    Raises:
        ConfigurationError: Something is missing, or has another shape.
    """
    bundle: Mapping[str, Any] = states if isinstance(states, ModelOutput) else {}
    hidden = bundle.get("last_hidden_state", states)
    others: dict[str, Any] = {}
    for name in crossing.keys() - {STATES}:
        value = arguments.pop(name, None)
        others[name] = bundle.get(name) if value is None else value
    if not isinstance(hidden, torch.Tensor):
        return hidden, others
    for name, described in crossing.items():
        given = hidden if name == STATES else others[name]
        shape = (*hidden.shape[:2], *described.shape(layers_left))
        if not isinstance(given, torch.Tensor) or given.shape != shape or not given.is_floating_point():
            what = f"{given.dtype} {list(given.shape)}" if isinstance(given, torch.Tensor) else type(given).__name__
            raise ConfigurationError(
                f"{name} is {what}; what crosses this cut is {describe(crossing, layers_left)}",
                hint="give the result of the component before it, unchanged: trunk(hidden_states=bottom(input_ids))",
            )
    return hidden, {name: others[name] for name in crossing if name != STATES}


def describe(crossing: Crossing, layers_left: int) -> str:
    """Return what crosses, in words."""
    shapes = {name: ", ".join(map(str, described.shape(layers_left))) for name, described in crossing.items()}
    return ", ".join(f"{name} [batch, sequence, {sizes}]" for name, sizes in shapes.items())


def entering_layers(crossing: Crossing, hidden: torch.Tensor, others: Mapping[str, torch.Tensor]) -> Entering:
    """Return what enters a component, as its layers take it."""
    of = {
        source: [name for name in others if crossing[name].source is source]
        for source in (Source.LAYER, Source.START, Source.SLICES)
    }
    return Entering(
        _as_layers_take(hidden, crossing[STATES]) if crossing else hidden,
        tuple(_as_layers_take(others[name], crossing[name]) for name in of[Source.LAYER]),
        {name: _as_layers_take(others[name], crossing[name]) for name in of[Source.START]},
        {
            name: [_as_layers_take(item, crossing[name]) for item in others[name].unbind(_LAYERS)]
            for name in of[Source.SLICES]
        },
    )


def leaving_layers(
    crossing: Crossing, left: Sequence[Left], entered: Mapping[str, torch.Tensor], own_layers: int
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the hidden states that leave a component, and what crosses with them.

    Args:
        crossing: What crosses.
        left: What the layers after the component's were called with.
        entered: What entered the component besides hidden states; nothing for a bottom.
        own_layers: The number of its layers.
    """
    hidden = left[0][0]
    others = passed_on(crossing, entered, own_layers)
    for name, described in crossing.items():
        if described.source is Source.LAYER or (name != STATES and name not in others):
            slices = [_across(kept[name], described) for _, kept in left[: len(left) if _is_sliced(described) else 1]]
            others[name] = torch.stack(slices, _LAYERS) if _is_sliced(described) else slices[0]
    return _across(hidden, crossing[STATES]), others


def passed_on(crossing: Crossing, entered: Mapping[str, torch.Tensor], own_layers: int) -> dict[str, torch.Tensor]:
    """Return what a component hands on as it came: what was computed before the first layer, for the layers after."""
    return {
        name: tensor[:, :, own_layers:] if _is_sliced(crossing[name]) else tensor
        for name, tensor in entered.items()
        if crossing[name].source is not Source.LAYER
    }


def bundled(output: Any, others: Mapping[str, torch.Tensor]) -> Any:
    """Return the output of a component with what crosses besides its hidden states."""
    if not others:
        return output
    result = BaseModelOutputWithPast(last_hidden_state=output) if isinstance(output, torch.Tensor) else output
    for name, tensor in others.items():
        result[name] = tensor
    return result


def _is_sliced(described: CrossingTensor) -> bool:
    return described.source is Source.SLICES


def _as_layers_take(tensor: torch.Tensor, described: CrossingTensor) -> torch.Tensor:
    return tensor.movedim((0, 1), described.places).contiguous()


def _across(tensor: torch.Tensor, described: CrossingTensor) -> torch.Tensor:
    return tensor.movedim(described.places, (0, 1)).contiguous()
