"""Several sessions in one forward: their tokens share norms and linear layers, and attend to their own caches.

The tokens of all sessions are one sequence of one row. Wherever a layer attends, its keys and values go to the cache of
each session, and the attention of the model runs once for each session, on that session's tokens alone. The result for
a session is close to that of its own forward, not equal: kernels add in another order for another number of rows.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, Cache
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from splitlearn_core.family import ModelFamily
from splitlearn_core.plan.crossing import crossing_tensors

#: The name under which the models find the attention of a pack.
_PACKED = "splitlearn_packed"
#: The attention that a pack runs for each session.
_KERNELS = frozenset({"sdpa", "eager"})
#: Rotary positions that depend on the longest sequence of a forward.
_DEPENDENT_ROTARY = frozenset({"dynamic", "longrope"})
_CACHE_KINDS = frozenset({"DynamicLayer", "DynamicSlidingWindowLayer"})
_MASKED = "cache" if "cache" in inspect.signature(create_masks_for_generate).parameters else "past_key_values"


@dataclass(frozen=True, slots=True)
class PackItem:
    """The part of one session in a pack."""

    #: Its sequences and tokens.
    rows: int
    tokens: int
    #: The cache of its component, or of the whole model.
    cache: Cache
    #: A padding mask ``[rows, past + tokens]``, or None.
    attention_mask: torch.Tensor | None = None
    #: ``[rows, tokens]`` or ``[1, tokens]``; None for those after what is cached.
    position_ids: torch.Tensor | None = None

    def positions(self) -> torch.Tensor:
        """Return the positions of its tokens, ``[rows, tokens]``."""
        given = self.position_ids
        if given is None:
            past = self.cache.get_seq_length()
            given = torch.arange(past, past + self.tokens).unsqueeze(0)
        return given.expand(self.rows, self.tokens)


def can_pack(family: ModelFamily, config: Any, layers: Sequence[Any]) -> bool:
    """Return whether a component's forward may be shared: by its family, what crosses, its caches, and its attention.

    Args:
        family: The family.
        config: The configuration of the decoder.
        layers: The layers of an empty cache of the component.
    """
    rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = {item.get("rope_type", "default") for item in (rotary, *rotary.values()) if isinstance(item, dict)}
    return (
        family.packable
        and not (family.crossing and crossing_tensors(family, config.to_dict()))
        and (getattr(config, "_attn_implementation", None) or "eager") in _KERNELS
        and {type(layer).__name__ for layer in layers} <= _CACHE_KINDS
        and not kinds & _DEPENDENT_ROTARY
    )


@contextmanager
def packed(config: Any, items: Sequence[PackItem], like: torch.Tensor) -> Iterator[tuple[torch.Tensor, Cache]]:
    """Prepare one forward of a model or component on a pack; nothing else may use the model meanwhile.

    Args:
        config: The configuration of its decoder.
        items: What is in the pack, in the order of the tokens in its one row.
        like: A tensor of the model's dtype and device.

    Yields:
        The positions ``[1, tokens]`` and the cache, for the forward's arguments.
    """
    implementation = getattr(config, "_attn_implementation", None) or "eager"
    positions = [item.positions().to(like.device) for item in items]
    masks = [_masks(config, item, place, like) for item, place in zip(items, positions, strict=True)]
    pack = _Pack(items, masks, implementation, getattr(config, "layer_types", None))
    token = _RUNNING.set(pack)
    # Each attention module reads it at each forward.
    config._attn_implementation = _PACKED  # noqa: SLF001  # the public setter is the model's, and checks names
    try:
        yield torch.cat([place.reshape(1, -1) for place in positions], dim=1), _PackCache(pack)
        if pack.open_layers:
            # Tokens of one session would have attended to those of others.
            raise RuntimeError(f"{pack.open_layers} layers do not attend by transformers' attention interface")
    finally:
        config._attn_implementation = implementation  # noqa: SLF001  # as above
        _RUNNING.reset(token)


def _masks(config: Any, item: PackItem, positions: torch.Tensor, like: torch.Tensor) -> Any:
    """Return the masks that the model would make for a session alone: one, or one for each type of layer."""
    shape = torch.empty(item.rows, item.tokens, 1, dtype=like.dtype, device=like.device)
    arguments = {"attention_mask": item.attention_mask, _MASKED: item.cache, "position_ids": positions}
    if "cache_position" in inspect.signature(create_masks_for_generate).parameters:
        arguments["cache_position"] = item.cache.get_seq_length() + torch.arange(item.tokens, device=like.device)
    return create_masks_for_generate(config=config, inputs_embeds=shape, **arguments)


class _Pack:
    def __init__(
        self, items: Sequence[PackItem], masks: Sequence[Any], implementation: str, layer_types: Sequence[str] | None
    ) -> None:
        self.items = items
        self._masks = masks
        self._layer_types = layer_types
        self._implementation = implementation
        #: Of the layer that is running, the keys and values of each session.
        self.attended: tuple[int, list[tuple[torch.Tensor, torch.Tensor]]] = (-1, [])
        #: How many layers have cached keys, and not attended to them.
        self.open_layers = 0

    def parted(self, packed_states: torch.Tensor) -> list[torch.Tensor]:
        """Part ``[1, heads, tokens, size]`` into ``[rows, heads, tokens, size]`` of each session."""
        parts = torch.split(packed_states, [item.rows * item.tokens for item in self.items], dim=2)
        return [
            part.reshape(part.shape[1], item.rows, item.tokens, part.shape[3]).transpose(0, 1)
            for item, part in zip(self.items, parts, strict=True)
        ]

    def attend(self, module: Any, query: torch.Tensor, **settings: Any) -> torch.Tensor:
        attention = self._attention(module)
        number, cached = self.attended
        if number != module.layer_idx:
            raise RuntimeError(f"layer {module.layer_idx} attends to keys that it did not cache: it cannot be packed")
        self.open_layers -= 1
        outputs = []
        for part, (keys, values), masks in zip(self.parted(query), cached, self._masks, strict=True):
            mask = masks[(self._layer_types or ())[number]] if isinstance(masks, dict) else masks
            output, _ = attention(module, part, keys, values, mask, **settings)
            outputs.append(output.reshape(1, -1, *output.shape[2:]))
        return torch.cat(outputs, dim=1)

    def _attention(self, module: Any) -> Any:
        if self._implementation != "eager":
            return ALL_ATTENTION_FUNCTIONS[self._implementation]
        # Each model's own; a class that is derived elsewhere has that of the class that it is derived from.
        modules = (sys.modules[base.__module__] for base in type(module).__mro__)
        return next(forward for each in modules if (forward := getattr(each, "eager_attention_forward", None)))


_RUNNING: ContextVar[_Pack] = ContextVar("pack")


class _PackCache(Cache):
    """The caches of all sessions of a pack, as the one cache of a forward."""

    def __init__(self, pack: _Pack) -> None:
        first = pack.items[0].cache
        super().__init__(layers=list(first.layers))
        self._pack = pack
        owned = getattr(first, "layer_range", None)
        if owned is not None:
            # What a component compares with its own layers.
            self.layer_range = owned

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        pack = self._pack
        parts = zip(pack.items, pack.parted(key_states), pack.parted(value_states), strict=True)
        pack.open_layers += 1
        pack.attended = layer_idx, [item.cache.update(keys, values, layer_idx) for item, keys, values in parts]
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        # Positions are given, and masks are each session's own.
        return 0


def _attend(
    module: Any, query: torch.Tensor, key: Any, value: Any, attention_mask: Any, **settings: Any
) -> tuple[torch.Tensor, None]:
    return _RUNNING.get().attend(module, query, **settings), None


AttentionInterface.register(_PACKED, _attend)
