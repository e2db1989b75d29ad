"""What a family's forward takes, by the components that need it; and what a component makes of it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import utils
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs

from splitlearn_core.errors import ConfigurationError
from splitlearn_core.types import LayerRange

#: Argument that makes a model return more than its result -> the name under which it is returned.
RECORDINGS = {"output_hidden_states": "hidden_states", "output_attentions": "attentions"}

#: What is settled before the layers are called.
_SETTLED = frozenset({"self", "input_ids", "inputs_embeds", "past_key_values", "cache", "use_cache", "return_dict"})
#: What a loss takes of the model itself.
_OF_THE_MODEL = frozenset({"logits", "labels", "vocab_size"})
#: What transformers hands on to attention kernels and losses, by its own list.
_KERNELS = frozenset(getattr(getattr(utils, "TransformersKwargs", None), "__annotations__", ())) | frozenset(
    FlashAttentionKwargs.__annotations__
)
#: What tokenizers and generate give, whether the family makes use of it or not.
_COMMON = frozenset({"attention_mask", "position_ids", "cache_position", "token_type_ids"})
#: A padding mask ``[batch, past + sequence]``, or a whole one ``[batch, heads, sequence, past + sequence]``.
_MASK_DIMENSIONS = (2, 4)
#: The types of layers whose masks transformers names by the type.
_MASKED_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
_PAGED_CACHES = "transformers.generation.continuous_batching.cache"


@dataclass(frozen=True, slots=True)
class Routing:
    """The arguments of a causal language model's forward, by the components that need them.

    A name that is in none of the three is unknown to the family, which would ignore it silently.
    """

    #: What the embeddings use up: the bottom alone takes it.
    bottom: frozenset[str]
    #: What changes the result of layers: each component takes it.
    everywhere: frozenset[str]
    #: What head and loss take: the top alone.
    top: frozenset[str]


def routing(forward: Callable[..., Any], model: Any, bottom_arguments: Sequence[str]) -> Routing:
    """Read the routing off a family's signatures.

    Args:
        forward: The forward of the causal language model's class.
        model: A model of that class, whole or pruned.
        bottom_arguments: The arguments that the family's embeddings use up.
    """
    layers = argument_names(model.base_model.forward) | _KERNELS | _COMMON
    loss = argument_names(model.loss_function) - _OF_THE_MODEL
    bottom = layers.intersection(bottom_arguments)
    top = (argument_names(forward) - layers | loss) - _SETTLED
    return Routing(bottom=bottom, everywhere=layers - bottom - top - _SETTLED, top=top)


def argument_names(function: Callable[..., Any]) -> frozenset[str]:
    """Return the names of a function's parameters, in which a mapping of further ones does not count."""
    parameters = inspect.signature(function).parameters.values()
    return frozenset(parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD)


def named_cache(arguments: dict[str, Any], past_key_values: Any = None) -> Any:
    """Take the cache out of ``arguments``, where it goes by the name that newer transformers give it.

    Raises:
        ConfigurationError: It was given by both names.
    """
    cache = arguments.pop("cache", None)
    if cache is not None and past_key_values is not None:
        raise ConfigurationError("cache and past_key_values are two names of one argument", hint="give one of them")
    return past_key_values if cache is None else cache


def is_paged(cache: Any) -> bool:
    """Say whether a cache is that of continuous batching, which is addressed by the model's layer numbers."""
    module = sys.modules.get(_PAGED_CACHES)
    return module is not None and isinstance(cache, module.PagedAttentionCache)


def mask_for_layers(mask: Any, layer_types: Sequence[str] | None, layers: LayerRange) -> Any:
    """Return what a component needs of an attention mask.

    Args:
        mask: None, a padding mask, a whole mask, or a mapping of whole masks by type of layer, as transformers
            makes them for ``generate``.
        layer_types: The type of each layer of the model; None where its layers are of one type.
        layers: The component's own layers.

    Raises:
        ConfigurationError: The mask has another rank, or the mapping lacks a type that the component has.
    """
    if isinstance(mask, torch.Tensor):
        if mask.dim() not in _MASK_DIMENSIONS:
            raise ConfigurationError(
                f"attention_mask has {mask.dim()} dimensions",
                hint="give a padding mask [batch, past + sequence] as the tokenizer makes it, a whole mask "
                "[batch, heads, sequence, past + sequence], or a mapping of whole masks by type of layer",
            )
        return mask
    if not isinstance(mask, Mapping):
        return mask
    if layer_types is None:
        # All layers are of one type, and so is the mask.
        if len(mask) != 1:
            raise ConfigurationError(
                f"attention_mask has masks of {', '.join(mask)}, and this model has layers of one type",
                hint="give one mask",
            )
        return next(iter(mask.values()))
    own = set(layer_types[layers.start : layers.end])
    missing = sorted((own & _MASKED_TYPES) - mask.keys())
    if missing:
        raise ConfigurationError(
            f"attention_mask has masks of {', '.join(mask) or 'nothing'}, and none of {', '.join(missing)}",
            hint=f"layers {layers} need a mask of each of their types: {', '.join(sorted(own))}",
        )
    # The neutral layers of other components look their masks up too, and use none.
    unused = dict.fromkeys(set(layer_types) - own)
    return {**unused, **{kind: value for kind, value in mask.items() if kind not in unused}}
