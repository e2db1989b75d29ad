"""The size of each layer's cache: by the values of ``config.json``, or measured on a model without weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import torch

from splitlearn_core.build.configuration import architecture_class, config_errors, decoder_config, hf_config
from splitlearn_core.build.kv_cache import CACHE_FIELD, key_value_tensors, state_tensors
from splitlearn_core.build.torch_state import BUILD_LOCK, own_modes
from splitlearn_core.errors import ConfigurationError
from splitlearn_core.family import ModelFamily
from splitlearn_core.plan.splitplan import CacheSize, kv_bytes_per_layer

#: The implementation of experts whose operations do not depend on the values of tensors.
_EXPERTS = "batched_mm"
#: Architecture, configuration and dtype -> the sizes: a plan is made several times for one load.
_MEASURED: dict[tuple[str, str, str], tuple[CacheSize, ...]] = {}
_MOST = 8


def layer_cache_sizes(family: ModelFamily, config: Mapping[str, Any], dtype: str) -> tuple[CacheSize, ...]:
    """Return the size of each layer's cache, in a model of a dtype.

    Raises:
        ConfigurationError: The configuration is invalid, or the model cannot run without weights.
    """
    if not family.measured_cache:
        size = CacheSize(kv_bytes_per_layer(family, config, dtype))
        return (size,) * int(family.config_value(config, "num_hidden_layers"))
    key = family.architecture, json.dumps(config, sort_keys=True, default=str), dtype
    if key not in _MEASURED:
        while len(_MEASURED) >= _MOST:
            del _MEASURED[next(iter(_MEASURED))]
        _MEASURED[key] = _measured(family, config, dtype)
    return _MEASURED[key]


def _measured(family: ModelFamily, config: Mapping[str, Any], dtype: str) -> tuple[CacheSize, ...]:
    """Run one token through the whole model, on the device whose tensors have shapes and no memory."""
    name = f"a {family.model_type} model"
    own = hf_config(family, config, name, dtype)
    with BUILD_LOCK, own_modes(gradients=False), config_errors(family, name), torch.device("meta"):
        model: Any = architecture_class(family)._from_config(own, dtype=getattr(torch, dtype))  # noqa: SLF001  # as AutoModel
        if getattr(model, "_can_set_experts_implementation", lambda: False)():
            model.set_experts_implementation(_EXPERTS)
        # Of several models, the decoder alone: what the whole does with images may need values.
        decoder = model.eval().get_submodule(family.base) if family.text_config else model.eval()
        cache = decoder(input_ids=torch.zeros(1, 1, dtype=torch.long), use_cache=True).get(CACHE_FIELD)
    sizes = () if cache is None else sizes_after_one_token(cache)
    layers = int(decoder_config(family, own).num_hidden_layers)
    if not sizes or len(sizes) > layers:
        raise ConfigurationError(
            f"{name} has {layers} layers, and its cache {len(sizes)}",
            hint=f"is the family {family.model_type!r} made for this version of transformers?",
        )
    # A cache may end with the last layer that has been used.
    return sizes + (CacheSize(0),) * (layers - len(sizes))


def sizes_after_one_token(cache: Any) -> tuple[CacheSize, ...]:
    """Return the size of each layer of a cache that holds one token of one sequence."""
    # Some classes of cache keep running states in a list of their own.
    listed = getattr(cache, "linear_cache", None) or []
    return tuple(
        CacheSize(
            per_token=sum(tensor.nbytes for tensor in key_value_tensors(layer)),
            fixed=sum(tensor.nbytes for tensor in (*state_tensors(layer), *listed_state)),
        )
        for layer, state in zip_longest(getattr(cache, "layers", ()), listed)
        for listed_state in ([state] if isinstance(state, torch.Tensor) else [],)
    )
