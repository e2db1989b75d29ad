"""The arguments of a family's forward: which components need them, and what a component passes on."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import utils
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs

from splitlearn_core.errors import ConfigurationError, UnexpectedArgumentError
from splitlearn_core.family import ModelFamily
from splitlearn_core.types import LayerRange

#: Argument that makes a model return more than its result -> the name under which it is returned.
RECORDINGS = {"output_hidden_states": "hidden_states", "output_attentions": "attentions"}

#: Arguments that are handled before the layers are called.
_SETTLED = frozenset({"self", "input_ids", "inputs_embeds", "past_key_values", "cache", "use_cache", "return_dict"})
#: Arguments of a loss that the model supplies itself.
_OF_THE_MODEL = frozenset({"logits", "labels", "vocab_size"})
#: What transformers passes to attention kernels and losses, by its own list.
_KERNELS = frozenset(getattr(getattr(utils, "TransformersKwargs", None), "__annotations__", ())) | frozenset(
    FlashAttentionKwargs.__annotations__
)
#: Arguments that tokenizers and generate supply, whether the family uses them or not.
_COMMON = frozenset({"attention_mask", "position_ids", "cache_position", "token_type_ids"})
#: For the head, also where the layers of a model use it, to leave out tokens whose logits are not kept.
_OF_THE_HEAD = frozenset({"logits_to_keep"})
#: The argument, since transformers 5.24, of embeddings that a model for images has made of them.
_MADE_BY_OTHERS = "mm_encoder_outputs"
#: How arguments end that are not for such a model: masks may depend on which tokens stand for an image.
_KEPT = ("token_type_ids", _MADE_BY_OTHERS)
#: A padding mask ``[batch, past + sequence]``, or a full one ``[batch, heads, sequence, past + sequence]``.
_MASK_DIMENSIONS = (2, 4)
#: The types of layers whose masks transformers names by the type.
_MASKED_TYPES = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
_PAGED_CACHES = "transformers.generation.continuous_batching.cache"


@dataclass(frozen=True, slots=True)
class Routing:
    """The arguments of a causal language model's forward, by the components that need them.

    A name in none of the three is unknown to the family, which would ignore it silently.
    """

    #: Used by the embeddings: only the bottom takes it.
    bottom: frozenset[str]
    #: Changes the result of layers: each component takes it.
    everywhere: frozenset[str]
    #: Used by head and loss: only the top takes it.
    top: frozenset[str]
    #: For a composite model that components lack, such as the one for images. No component takes it.
    others: frozenset[str] = frozenset()

    def refuse_others(self, passed: Mapping[str, Any]) -> None:
        """Refuse what is for a model that components do not have; raises UnexpectedArgumentError."""
        names = sorted(name for name in self.others & passed.keys() if passed[name] is not None)
        if names:
            raise UnexpectedArgumentError(
                f"{', '.join(names)}: a split model is the decoder alone, and has no model for images or sound",
                hint="run that model where the data are (get_image_features of the whole model, say), put what it "
                "makes into the embeddings of the tokens, and give those to the bottom as inputs_embeds",
            )


def routing(forward: Callable[..., Any], model: Any, family: ModelFamily) -> Routing:
    """Derive the routing from a family's signatures.

    Args:
        forward: The forward of the causal language model's class.
        model: A model of that class, whole or pruned.
        family: The family.
    """
    known = _arguments_within(model.base_model)
    others = known - argument_names(model.get_submodule(family.base).forward) if family.text_config else frozenset()
    others = frozenset(name for name in others if not name.endswith(_KEPT) and name not in _OF_THE_MODEL)
    layers = (known - others - _OF_THE_MODEL - _OF_THE_HEAD) | _KERNELS | _COMMON
    loss = argument_names(model.loss_function) - _OF_THE_MODEL
    bottom = layers.intersection((*family.bottom_arguments, *family.zero_arguments, _MADE_BY_OTHERS))
    top = (argument_names(forward) - layers - others | loss) - _SETTLED
    return Routing(bottom=bottom, everywhere=layers - bottom - top - _SETTLED, top=top, others=others - _SETTLED)


def argument_names(function: Callable[..., Any]) -> frozenset[str]:
    """Return the names of a function's parameters, without ``**kwargs``."""
    parameters = inspect.signature(function).parameters.values()
    return frozenset(parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD)


def _arguments_within(module: Any) -> frozenset[str]:
    """Return the names of the arguments of a module; of one that takes any (BART's), those of the only module in it."""
    kinds = {parameter.kind for parameter in inspect.signature(module.forward).parameters.values()}
    inner = list(module.children())
    if inspect.Parameter.VAR_POSITIONAL in kinds and len(inner) == 1:
        return _arguments_within(inner[0])
    return argument_names(module.forward)


def crosses_in_float32(family: ModelFamily, config: Any) -> bool:
    """Return whether layers pass hidden states on in float32, whatever the dtype of their parameters."""
    name = "residual_in_fp32"
    return bool(getattr(config, name, family.config_defaults.get(name, False)))


def named_cache(arguments: dict[str, Any], past_key_values: Any = None) -> Any:
    """Return the cache; ``arguments`` may hold it under the name that newer versions of transformers use.

    Raises:
        ConfigurationError: It was given under both names.
    """
    cache = arguments.pop("cache", None)
    if cache is not None and past_key_values is not None:
        raise ConfigurationError("cache and past_key_values are two names of one argument", hint="give one of them")
    return past_key_values if cache is None else cache


def is_paged(cache: Any) -> bool:
    """Return whether a cache is that of continuous batching, which is addressed by the model's layer numbers."""
    module = sys.modules.get(_PAGED_CACHES)
    return module is not None and isinstance(cache, module.PagedAttentionCache)


def mask_for_layers(mask: Any, layer_types: Sequence[str] | None, layers: LayerRange) -> Any:
    """Return the part of an attention mask that a component needs.

    Args:
        mask: None, a padding mask, a full mask, or a mapping of full masks by type of layer, as transformers
            makes them for ``generate``.
        layer_types: The type of each layer of the model; None if all are of one type.
        layers: The component's own layers.

    Raises:
        ConfigurationError: The mask has another rank, or the mapping lacks a type that the component has.
    """
    if isinstance(mask, torch.Tensor):
        if mask.dim() not in _MASK_DIMENSIONS:
            raise ConfigurationError(
                f"attention_mask has {mask.dim()} dimensions",
                hint="give a padding mask [batch, past + sequence] as the tokenizer makes it, a full mask "
                "[batch, heads, sequence, past + sequence], or a mapping of full masks by type of layer",
            )
        return mask
    if not isinstance(mask, Mapping):
        return mask
    if layer_types is None:
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
    # The neutral layers of other components look up their masks too, but use none.
    unused = dict.fromkeys(set(layer_types) - own)
    return {**unused, **{kind: value for kind, value in mask.items() if kind not in unused}}
