"""Tiny checkpoints and plugins, real in everything but size."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from splitlearn_core.build.torch_state import own_state
from splitlearn_core.testing.installing import write_plugin as write_plugin  # noqa: PLC0414  # re-exported

#: Sizes that suit every ordinary decoder; six layers allow all the cuts that tests make.
TINY: Mapping[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

#: Numbers of layers of models for images or sound; and all of their sizes.
DEPTHS: Mapping[str, int] = dict.fromkeys(("num_hidden_layers", "depth", "encoder_layers", "num_layers"), 1)
OF_OTHERS: Mapping[str, int] = {
    **DEPTHS,
    **dict.fromkeys(("hidden_size", "intermediate_size", "d_model", "embed_dim", "encoder_ffn_dim", "hidden_dim"), 32),
    **dict.fromkeys(("out_hidden_size", "projection_dim", "output_dim", "vision_output_dim"), 32),
    **dict.fromkeys(("projector_input_dim", "projector_output_dim", "base_channels"), 32),
    **dict.fromkeys(("adapter_in_dim", "adapter_out_dim", "adapter_input_size"), 32),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "num_heads", "encoder_attention_heads"), 2),
    "head_dim": 16,
}


def tiny_model(model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any) -> Any:
    """Make a small model of any model type of transformers, with random parameters.

    Args:
        model_type: The ``model_type`` of ``config.json``.
        dtype: The dtype of its weights.
        seed: The seed of the weights.
        overrides: Values of the configuration.
    """
    config = tiny_config(type(AutoConfig.for_model(model_type)), **overrides)
    return random_model(AutoModelForCausalLM.from_config, config, dtype, seed)


def tiny_config(config_class: Any, **overrides: Any) -> Any:
    """Make a configuration of a transformers class, or of a similar one, with small sizes.

    Args:
        config_class: The class.
        overrides: Values that differ from :data:`TINY`, or go beyond it.
    """
    known = config_class()
    _allow_values_of_layers(known)
    # Computed properties cannot be set.
    own = [
        name for name in TINY if hasattr(known, name) and not isinstance(getattr(config_class, name, None), property)
    ]
    sizes = {name: TINY[name] for name in own}
    return config_class(**{**sizes, **overrides})


def other_sizes(known: Any, decoder: str, small: Mapping[str, int] = OF_OTHERS) -> dict[str, Any]:
    """Return values that make the models for images or sound small, in a configuration of several models.

    Args:
        known: The configuration, of any sizes.
        decoder: The name of the decoder's configuration in it, which is left out.
        small: The sizes; names that a configuration does not have are ignored.
    """
    values: dict[str, Any] = {}
    for name in known.sub_configs:
        other = getattr(known, name, None)
        if name == decoder or other is None:
            continue
        _allow_values_of_layers(other)
        sizes: dict[str, Any] = {
            other.attribute_map.get(size, size): value
            for size, value in small.items()
            if type(getattr(other, size, None)) is int and getattr(other, size) > value
            if not isinstance(getattr(type(other), size, None), property)
        }
        depth = sizes.get("num_hidden_layers")
        if depth is not None:
            kinds = {key: value for key, value in other.to_dict().items() if key.endswith("layer_types") and value}
            sizes |= {key: value[:depth] for key, value in kinds.items()}
        values[name] = {"model_type": other.model_type, **sizes, **other_sizes(other, "", small)}
    return values


def _allow_values_of_layers(config: Any) -> None:
    """Let a configuration say values that some of its layers have otherwise; these are those of the others."""
    config.allow_global_per_layer_attribute_access = True


@own_state(gradients=True)
def random_model(make: Callable[[Any], Any], config: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Make a model with random parameters.

    Args:
        make: The class of the model, or a function that makes a model from a configuration.
        config: Its configuration.
        dtype: The dtype of its weights.
        seed: The seed of the weights.
    """
    config.dtype = dtype
    model = make(config)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        # Norms and biases too: at their usual 1 and 0, a misplaced one would change nothing. Scales of hidden states
        # are near 1: a small one in each layer would leave nothing of the tokens.
        usual = 1.0 if not name.endswith("weight") and bool((parameter == 1).all()) else 0.0
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.15 + usual).to(dtype)
    # No end token, so that every generated sequence has its full length.
    model.generation_config.eos_token_id = None
    return model.eval()


def write_checkpoint(directory: str | os.PathLike[str], model: Any, *, max_shard_size: str | int = "5GB") -> Path:
    """Save a model as a checkpoint, and return its folder."""
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    return Path(directory)


def parts_equal(first: Iterable[Any], second: Iterable[Any]) -> bool:
    """Compare the components of two loads bit by bit; a component that only one of them has is a difference."""
    for a, b in zip(first, second, strict=True):
        if (a is None) != (b is None):
            return False
        if a is not None:
            left, right = a.state_dict(), b.state_dict()
            if left.keys() != right.keys() or not all(torch.equal(left[key], right[key]) for key in left):
                return False
    return True
