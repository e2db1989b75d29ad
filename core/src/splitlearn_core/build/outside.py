"""What a component does to hidden states outside its layers, in training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from splitlearn_core.build.pruning import EnteringLayer, PassLayer, TupleLayer, entering
from splitlearn_core.family import ModelFamily

#: That of every dropout module, which a configuration may have at 0.
_DROPOUT = 0.5


def through_no_layers(part: Any, family: ModelFamily) -> tuple[torch.Tensor, torch.Tensor]:
    """Send hidden states through a trunk or top in training, with a neutral layer in place of each of its layers.

    Args:
        part: The component. It is taken apart, and of no use afterwards.
        family: The family that it was built by.

    Returns:
        What comes of hidden states ``[2, 5, hidden_size]``, and what the family's outlets alone make of them: the
        same where nothing else of the model touches what enters from outside.
    """
    base = part.get_submodule(family.base)
    layers = base.get_submodule(family.layers)
    for number, layer in enumerate(layers):
        # The first of a component that hidden states enter at its layers is neutral as it is.
        if not isinstance(layer, EnteringLayer):
            layers[number] = TupleLayer() if family.layers_return_tuple else PassLayer()
    for module in part.train().modules():
        if isinstance(module, nn.Dropout):
            module.p = _DROPOUT
    drawn = torch.randn(2, 5, part.config.hidden_size, generator=torch.Generator().manual_seed(0))
    hidden = drawn.to(part.config.dtype)
    with torch.no_grad(), torch.random.fork_rng(devices=()):
        # The same draws for both: an outlet may be a dropout.
        torch.manual_seed(0)
        expected = hidden
        for outlet in family.outlets:
            # A model that does without it has None in its place.
            expected = base.get_submodule(outlet)(expected) if outlet in dict(base.named_modules()) else expected
        torch.manual_seed(0)
        with entering(hidden):
            # A copy, because a model may change its embeddings in place.
            got: torch.Tensor = part.base_model(inputs_embeds=hidden.clone()).last_hidden_state
    return got, expected
