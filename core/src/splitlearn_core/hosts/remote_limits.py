"""Checks of what a model is about to do against the limits of a remote component, before any work is done."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from transformers import Cache

from splitlearn_core.errors import ConfigurationError
from splitlearn_core.hosts.remote import RemoteComponent


def declare_length(component: RemoteComponent, tokens: int, cache: Any) -> None:
    """Declare the length of a sequence, for which the host reserves memory when the session is opened.

    Args:
        component: The remote component.
        tokens: The largest number of cached tokens; a longer sequence grows the reservation later.
        cache: The cache of the whole model; None without one.

    Raises:
        ConfigurationError: The host does not allow as many tokens.
    """
    most = component.facts.max_tokens
    if tokens > most:
        raise ConfigurationError(
            f"a sequence may become {tokens} tokens long, and {component.url} allows {most}",
            hint="give a smaller max_new_tokens, or a shorter input; or serve it with a larger --max-tokens",
        )
    if isinstance(cache, Cache) and len(cache.layers) >= component.end_layer:
        cast("Any", component.cache_view(cache).layers[0]).session.expect(tokens)


def refuse_cast(component: RemoteComponent, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Refuse a cast of the parameters of a component that runs elsewhere.

    Raises:
        ConfigurationError: The function would change their dtype.
    """
    dtype = function(torch.empty(0, dtype=component.dtype)).dtype
    if dtype != component.dtype:
        raise ConfigurationError(
            f"the {component.component} at {component.url} runs in {component.dtype}, and cannot be changed to {dtype} "
            "from here",
            hint=f"serve it with --dtype {str(dtype).removeprefix('torch.')}; or let the cuts cast: "
            "SplitCausalLM(..., mixed_dtypes=True)",
        )
