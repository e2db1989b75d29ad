"""The description of a component for its remote users."""

from __future__ import annotations

import hashlib
import secrets
from typing import Any

import torch
from torch import nn

from splitlearn_core.build.cache_sizes import layer_cache_sizes
from splitlearn_core.build.component import ComponentModel
from splitlearn_core.build.forward_arguments import crosses_in_float32
from splitlearn_core.errors import ConfigurationError
from splitlearn_core.hosts.facts import PACKED, SOLO, Facts, layer_caches, layer_windows, origin_json
from splitlearn_core.hosts.packs import allows_packs
from splitlearn_core.hosts.payload import library_versions
from splitlearn_core.plan.splitplan import total_cache_size

#: Elements of each tensor that enter the digest of the weights.
_DIGEST_ELEMENTS = 64


def component_facts(component: ComponentModel, max_tokens: int, max_payload: int) -> Facts:
    """Describe a component for its remote users.

    Raises:
        ConfigurationError: Sessions do not support its kind of cache.
    """
    config: Any = component.config
    layers = component.new_cache().layers
    decoder, owned = component.decoder_config, component.layer_range
    kinds = getattr(decoder, "layer_types", None)
    caches = layer_caches(layers, None if kinds is None else kinds[owned.start : owned.end])
    if caches is None:
        unknown = ", ".join(sorted({type(layer).__name__ for layer in layers}))
        raise ConfigurationError(
            f"the layers of a {config.model_type} cache in a way that sessions do not support: {unknown}",
            hint="use this component in one process",
        )
    parameter = next(component.parameters())
    dtype = str(component.weights_dtype).removeprefix("torch.")
    sizes = layer_cache_sizes(component.family, config.to_dict(), dtype)
    per_token, per_sequence = total_cache_size(sizes[owned.start : owned.end])
    return Facts(
        component=str(component.component),
        layers=(owned.start, owned.end, owned.total),
        model_type=config.model_type,
        hidden_size=decoder.hidden_size,
        vocab_size=decoder.vocab_size,
        dtype=dtype,
        crosses_in_float32=crosses_in_float32(component.family, decoder),
        digest=weights_digest(component),
        attention=str(getattr(config, "_attn_implementation", None) or "eager"),
        versions=library_versions(),
        threads=torch.get_num_threads(),
        device=parameter.device.type,
        arguments=tuple(sorted(component.routing.everywhere)),
        windows=layer_windows(layers),
        caches=caches,
        has_dropout=_has_dropout(component),
        cache_bytes_per_token=per_token,
        cache_bytes_per_sequence=per_sequence,
        max_tokens=max_tokens,
        max_payload=max_payload,
        epoch=secrets.token_hex(8),
        modes=(SOLO, PACKED) if allows_packs(component) else (SOLO,),
        layer_types=None if kinds is None else tuple(kinds),
        crossing={name: [str(tensor.source), *tensor.sizes] for name, tensor in component.crossing.items()},
        origin=origin_json(component.origin),
    )


def weights_digest(module: nn.Module) -> str:
    """Hash names, shapes, dtypes and evenly spaced values of a module's tensors.

    It reads a few kilobytes of each tensor, so that a mapped component is not paged in. Modules that differ only
    elsewhere have the same digest; checkpoints that were trained differ in the values that are read, too.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        step = max(1, flat.numel() // _DIGEST_ELEMENTS)
        values = flat[::step].cpu().contiguous().view(torch.uint8).numpy().tobytes() if flat.numel() else b""
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode() + values)
    return digest.hexdigest()


def _has_dropout(component: ComponentModel) -> bool:
    rates = [module.p for module in component.modules() if isinstance(module, nn.Dropout)]
    values = [
        getattr(component.decoder_config, name, 0.0) for name in ("attention_dropout", "attn_pdrop", "resid_pdrop")
    ]
    return any(rates) or any(values)
