"""What a remote component allows, compared with what a model is about to do, before that costs anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from transformers import Cache

from splitlearn_core.errors import ConfigurationError
from splitlearn_core.hosts.remote import RemoteComponent


def declare_length(component: RemoteComponent, tokens: int, cache: Any) -> None:
    """Have room reserved for a sequence of so many tokens, when its session is opened.

    Args:
        component: Where it runs.
        tokens: The most that will be cached; a longer one asks for more when it comes.
        cache: The cache of the whole model; None without one.

    Raises:
        ConfigurationError: The host does not allow so many.
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
    """Refuse what would change the dtype of a component's parameters, if they were here.

    Raises:
        ConfigurationError: It would.
    """
    dtype = function(torch.empty(0, dtype=component.dtype)).dtype
    if dtype != component.dtype:
        raise ConfigurationError(
            f"the {component.component} at {component.url} runs in {component.dtype}, and cannot be changed to {dtype} "
            "from here",
            hint=f"serve it with --dtype {str(dtype).removeprefix('torch.')}; or let the cuts cast: "
            "SplitCausalLM(..., mixed_dtypes=True)",
        )
