"""The key-value cache of one component."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from splitlearn_core.types import LayerRange

#: What transformers calls the cache of a model's output: ``past_key_values`` until 5.23, ``cache`` since.
CACHE_FIELD = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


def cache_argument(forward: Callable[..., Any]) -> str:
    """Return the name of the cache in a model's forward; the old name causes a warning where the new one exists."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


class PartCache(Cache):
    """A cache that holds a component's own layers and is addressed with the model's layer numbers.

    A plain cache on a later component would keep its first slots empty; Hugging Face derives masks
    and positions from slot 0, so the text would be wrong without an error.

    Args:
        layers: Cache layers of the component, in order; they may be shared with another cache.
        layer_range: Their numbers in the model.
    """

    def __init__(self, layers: list[Any], layer_range: LayerRange) -> None:
        super().__init__(layers=layers)
        self.layer_range = layer_range

    @classmethod
    def empty(cls, config: Any, layer_range: LayerRange) -> PartCache:
        """Make an empty cache for the component that runs these layers of the model."""
        whole = DynamicCache(config=config)
        return cls(whole.layers[layer_range.start : layer_range.end], layer_range)

    @classmethod
    def view(cls, whole: Cache, layer_range: LayerRange) -> PartCache:
        """Return a view of a component's layers in a cache of the whole model; both share the layers' state."""
        # A DynamicCache made without a configuration creates its layers on first use.
        while whole.layer_class_to_replicate is not None and len(whole.layers) < layer_range.total:
            whole.layers.append(whole.layer_class_to_replicate())
        return cls(whole.layers[layer_range.start : layer_range.end], layer_range)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return super().update(key_states, value_states, self._own(layer_idx), *args, **kwargs)  # type: ignore[no-any-return]  # Cache is untyped

    # Methods for layers with a recurrent state, in versions of transformers that have them.

    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return super().update_conv_state(conv_states, self._own(layer_idx), *args, **kwargs)

    def update_recurrent_state(self, recurrent_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return super().update_recurrent_state(recurrent_states, self._own(layer_idx), *args, **kwargs)

    def get_conv_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return super().get_conv_state(self._own(layer_idx), *args, **kwargs)

    def get_recurrent_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return super().get_recurrent_state(self._own(layer_idx), *args, **kwargs)

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> Any:
        return super().update_indexer(indexer_key_states, self._own(layer_idx))

    def has_previous_state(self, layer_idx: int | None = None, *args: Any, **kwargs: Any) -> Any:
        own = None if layer_idx is None else self._own(layer_idx)
        return super().has_previous_state(own, *args, **kwargs)

    def _own(self, layer_idx: int) -> int:
        """Return the slot of one of the model's layers."""
        return layer_idx - self.layer_range.start
