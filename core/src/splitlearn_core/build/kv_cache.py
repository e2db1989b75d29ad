"""The cache of one component: keys and values, or running states."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable
from dataclasses import fields
from functools import cache as kept
from typing import Any, cast, get_args

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from splitlearn_core.errors import ConfigurationError
from splitlearn_core.types import LayerRange

#: What transformers calls the cache of a model's output: ``past_key_values`` until 5.23, ``cache`` since.
CACHE_FIELD = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"


#: Attribute of layers with a running state, which do not count tokens themselves.
_SEEN = "seen_tokens"
#: A method of classes of cache that keep running states in a list next to their layers.
_GET_LINEAR = "get_linear_cache"


def cache_argument(forward: Callable[..., Any]) -> str:
    """Return the name of the cache in a model's forward; the old name causes a warning where the new one exists."""
    return "cache" if "cache" in inspect.signature(forward).parameters else "past_key_values"


def counts_tokens(layer: Any) -> bool:
    """Return whether a cache layer knows its number of tokens: it has keys and values, not just a running state."""
    return isinstance(layer, CacheLayerMixin)


def holds_state(layer: Any) -> bool:
    """Return whether a cache layer has a running state; keys and values may be there as well."""
    return hasattr(layer, "recurrent_states")


def own_cache_class(forward: Callable[..., Any]) -> type[Any] | None:
    """Return the class of cache that a model insists on (MiniMax), by the forward of its base model; None for none."""
    annotation = inspect.signature(forward).parameters.get(cache_argument(forward))
    classes = () if annotation is None else get_args(annotation.annotation)
    return next((item for item in classes if isinstance(item, type) and hasattr(item, _GET_LINEAR)), None)


def has_states_alone(config: Any) -> bool:
    """Return whether no layer of a model counts tokens. It then takes the attention mask of the new tokens alone."""
    return not any(map(counts_tokens, DynamicCache(config=config).layers or [DynamicLayer()]))


def key_value_tensors(layer: Any) -> list[torch.Tensor]:
    """Return the keys and values of a cache layer; none before its first step, or if it has a running state alone."""
    held = (getattr(layer, "keys", None), getattr(layer, "values", None))
    return [tensor for tensor in held if tensor is not None]


def state_tensors(layer: Any) -> list[torch.Tensor]:
    """Return the running states of a cache layer; none before its first step, or if it has only keys and values."""
    held = (*layer.conv_states.values(), *layer.recurrent_states.values()) if holds_state(layer) else ()
    return [tensor for tensor in held if tensor is not None]


def cached_rows(cache: Cache) -> int:
    """Return the number of sequences in a cache; 0 before the first step."""
    held = (tensor for layer in cache.layers for tensor in (*key_value_tensors(layer), *state_tensors(layer)))
    return next((int(tensor.shape[0]) for tensor in held), 0)


def cached_tokens(cache: Cache) -> int:
    """Return the number of tokens of each sequence in a cache."""
    counting = next(filter(counts_tokens, cache.layers), None)
    if counting is not None:
        return int(counting.get_seq_length())
    filled = (layer for layer in cache.layers if holds_state(layer) and any(layer.has_previous_state.values()))
    return max((getattr(layer, _SEEN, 0) for layer in filled), default=0)


def preserved(layer: Any) -> dict[str, Any]:
    """Return the attributes of a cache layer as no later step changes them.

    A step replaces keys and values, which need no copy; it writes into running states.
    """
    return {
        name: {key: item.clone() if isinstance(item, torch.Tensor) else item for key, item in value.items()}
        if isinstance(value, dict)
        else value
        for name, value in vars(layer).items()
    }


def empty_states(layer: Any) -> None:
    """Take the running states out of a cache layer: the next sequences may be more, or fewer."""
    for states in (layer.conv_states, layer.recurrent_states):
        states.update(dict.fromkeys(states))
    for flags in (layer.is_conv_states_initialized, layer.is_recurrent_states_initialized, layer.has_previous_state):
        flags.update(dict.fromkeys(flags, False))


def select_rows(layer: Any, rows: torch.Tensor) -> None:
    """Keep these sequences of a cache layer, in this order; transformers' own method leaves out running states."""
    if holds_state(layer):
        layer.reorder_cache(rows.nonzero().reshape(-1) if rows.dtype == torch.bool else rows)
    else:
        layer.batch_select_indices(rows)


def refuse_crop(layers: Iterable[Any], hint: str) -> None:
    """Refuse to remove tokens from a running state, before anything is changed.

    Raises:
        ConfigurationError: A layer has one that cannot go back.
    """
    states = [layer for layer in layers if holds_state(layer)]
    if not all(layer.is_croppable and layer.record_past for layer in states):
        raise ConfigurationError(
            "this cache has layers with a running state, from which no tokens can be removed", hint=hint
        )


class PartCache(Cache):
    """A cache that holds a component's own layers and is addressed with the model's layer numbers.

    A plain cache on a later component would keep its first slots empty; Hugging Face derives masks
    and positions from slot 0, so the text would be wrong without an error.

    Args:
        layers: Cache layers of the component, in order; they may be shared with another cache.
        layer_range: Their numbers in the model.
        past: The number of tokens in them. It is counted here, for layers with only a running state do not know it.
    """

    def __init__(self, layers: list[Any], layer_range: LayerRange, past: int = 0) -> None:
        Cache.__init__(self, layers=layers)
        self.layer_range = layer_range
        self.past = past

    @classmethod
    def empty(cls, config: Any, layer_range: LayerRange) -> PartCache:
        """Make an empty cache for the component that runs these layers of the model."""
        return cls.view(DynamicCache(config=config), layer_range)

    @classmethod
    def view(cls, whole: Cache, layer_range: LayerRange) -> PartCache:
        """Return a view of a component's layers in a cache of the whole model; both share the layers' state.

        Layers of the whole model that count tokens must agree: a view is made before a step, not during it.
        """
        # A DynamicCache made without a configuration creates its layers on first use.
        while whole.layer_class_to_replicate is not None and len(whole.layers) < layer_range.total:
            whole.layers.append(whole.layer_class_to_replicate())
        return cls(whole.layers[layer_range.start : layer_range.end], layer_range, cached_tokens(whole))

    def copy(self) -> PartCache:
        """Return a cache with the same content, which later steps of this one do not change."""
        other = copy.copy(self)
        other.layers = [copy.copy(layer) for layer in self.layers]
        for layer, own in zip(other.layers, self.layers, strict=True):
            vars(layer).update(preserved(own))
        return other

    def advance(self, tokens: int) -> None:
        """Count the tokens of a step that the component has run."""
        self.past += tokens
        for layer in filter(holds_state, self.layers):
            # For the next view of the same layers.
            setattr(layer, _SEEN, self.past)

    # What transformers derives positions and masks from: the first layer of a kind, by its number among all layers.
    # Where there is none of that kind it takes layer 0, which may be another component's.

    @property
    def is_sliding(self) -> list[Any]:
        # Neither True nor False, both of which are looked for.
        return [*[None] * self.layer_range.start, *super().is_sliding]

    @property
    def is_linear(self) -> list[bool]:
        return [*[True] * self.layer_range.start, *super().is_linear]

    @property
    def is_dummy(self) -> list[bool]:
        return [*[True] * self.layer_range.start, *super().is_dummy]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        counting = self._counting(layer_idx)
        return self.past if counting is None else int(counting.get_seq_length())

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        counting = self._counting(layer_idx)
        return (self.past + query_length, 0) if counting is None else counting.get_mask_sizes(query_length)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length(layer_idx)

    # What changes a cache as a whole.

    def crop(self, tokens: int) -> None:
        """Remove the last tokens, given as a negative number.

        Raises:
            ConfigurationError: A running state cannot go back.
        """
        if tokens:
            refuse_crop(self.layers, "start again with new_cache(), and the tokens to keep")
        super().crop(tokens)
        self.past += min(tokens, 0)

    def reset(self) -> None:
        for layer in filter(holds_state, self.layers):
            empty_states(layer)
        super().reset()
        self.past = 0

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        for layer in self.layers:
            select_rows(layer, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(cached_rows(self)).repeat_interleave(repeats)
        for layer in self.layers:
            select_rows(layer, rows)

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

    def is_recording_past(self, layer_idx: int) -> Any:
        return super().is_recording_past(self._own(layer_idx))

    def _counting(self, layer_idx: int) -> Any:
        """Return a layer if it is this component's and counts tokens, or else the first that counts tokens.

        None if no layer counts tokens.
        """
        slot = self._own(layer_idx)
        own = self.layers[slot : slot + 1] if slot >= 0 else []
        return next(filter(counts_tokens, own + self.layers), None)

    def _own(self, layer_idx: int) -> int:
        """Return the slot of one of the model's layers."""
        return layer_idx - self.layer_range.start


class LinearPartCache(PartCache):
    """The same for models that insist on a cache of their own, which keeps running states in a list.

    The component's own cache keeps them in its layers; a view of the model's shares the list.
    """

    #: The states of all layers of the model, in a view.
    linear_cache: list[Any] | None = None

    @classmethod
    def view(cls, whole: Cache, layer_range: LayerRange) -> PartCache:
        view = cast("LinearPartCache", super().view(whole, layer_range))
        view.linear_cache = getattr(whole, "linear_cache", None)
        return view

    def get_linear_cache(self, layer_idx: int) -> Any:
        if self.linear_cache is None:
            return self.get_recurrent_state(layer_idx)
        state = self.linear_cache[layer_idx] if layer_idx < len(self.linear_cache) else None
        return state if isinstance(state, torch.Tensor) else None

    def set_linear_cache(self, layer_idx: int, linear_cache: torch.Tensor) -> None:
        if self.linear_cache is None:
            self.update_recurrent_state(linear_cache, layer_idx)
            self.layers[self._own(layer_idx)].has_previous_state[0] = True
            return
        missing = layer_idx + 1 - len(self.linear_cache)
        self.linear_cache.extend([] for _ in range(missing))
        self.linear_cache[layer_idx] = linear_cache

    def __len__(self) -> int:
        return len(self.layers)

    def _counting(self, layer_idx: int) -> Any:
        # All layers of the model's own cache look as if they counted.
        return super()._counting(layer_idx) if self.linear_cache is None else None


@kept
def part_cache_class(own: Any) -> type[PartCache]:
    """Return the class of a component's caches; ``own`` is the class that the model insists on, or None."""
    return PartCache if own is None else type(own.__name__, (LinearPartCache, own), {"is_croppable": False})
