"""The description of a component for its remote users."""

from __future__ import annotations

import hashlib
import secrets
from typing import Any

import torch
from torch import nn

from splitlearn_core.build.component import ComponentModel
from splitlearn_core.errors import ConfigurationError
from splitlearn_core.hosts.facts import Facts, layer_windows, origin_json
from splitlearn_core.hosts.payload import library_versions
from splitlearn_core.plan.splitplan import kv_bytes_per_layer

#: Elements of each tensor that enter the digest of the weights.
_DIGEST_ELEMENTS = 64


def component_facts(component: ComponentModel, max_tokens: int, max_payload: int) -> Facts:
    """Describe a component for its remote users.

    Raises:
        ConfigurationError: Sessions do not support its kind of cache.
    """
    config: Any = component.config
    windows = layer_windows(component.new_cache().layers)
    if windows is None:
        raise ConfigurationError(
            f"the layers of a {config.model_type} keep a running state, which a session could not restore",
            hint="use this component in one process",
        )
    parameter = next(component.parameters())
    dtype = str(parameter.dtype).removeprefix("torch.")
    decoder = component.decoder_config
    kinds = getattr(decoder, "layer_types", None)
    owned = component.layer_range
    return Facts(
        component=str(component.component),
        layers=(owned.start, owned.end, owned.total),
        model_type=config.model_type,
        hidden_size=decoder.hidden_size,
        vocab_size=decoder.vocab_size,
        dtype=dtype,
        digest=weights_digest(component),
        attention=str(getattr(config, "_attn_implementation", None) or "eager"),
        versions=library_versions(),
        threads=torch.get_num_threads(),
        device=parameter.device.type,
        arguments=tuple(sorted(component.routing.everywhere)),
        windows=windows,
        has_dropout=_has_dropout(component),
        cache_bytes_per_token=len(owned) * kv_bytes_per_layer(component.family, config.to_dict(), dtype),
        max_tokens=max_tokens,
        max_payload=max_payload,
        epoch=secrets.token_hex(8),
        layer_types=None if kinds is None else tuple(kinds),
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
