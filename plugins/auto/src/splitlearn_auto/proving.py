"""Cut a tiny model by a derived family, and compare with the model in one piece to the last bit."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch

from splitlearn_core import Component, ModelFamily, SplitCausalLM, SplitLearnError, TensorInfo
from splitlearn_core.extension import (
    CACHE_FIELD,
    cache_argument,
    component_from_state_dict,
    hf_config,
    kv_bytes_per_layer,
    map_keys,
    place_keys,
    plan_components,
    said,
    split_layers,
    through_no_layers,
)

#: Tokens of a prompt, and of the steps after it.
_STEPS = (7, 1, 3)
_PADDING = 2
_EMPTY_TOKENS = 3


def differences(model: Any, family: ModelFamily) -> list[str]:
    """Say where the model that the family describes is another than the model itself; empty where it is the same.

    Args:
        model: The tiny model in one piece, in evaluation mode.
        family: What was derived of it.
    """
    # As a file says it: the family has to understand that, and not only the object.
    values = json.loads(model.config.to_json_string())
    attention = model.config._attn_implementation  # noqa: SLF001  # the name that transformers gives it
    dtype = str(model.dtype).removeprefix("torch.")
    found: list[str] = []
    for cut in cuts(int(model.config.num_hidden_layers)):
        try:
            split = _cut(model, family, hf_config(family, values, "the tiny model", dtype, attention), cut)
        except SplitLearnError as error:
            return [f"it cannot be cut at {cut[0]} and {cut[1]}: {error.message}"]
        problems = (*_compare(model, split), *_training(split, family))
        found += [f"cut at {cut[0]} and {cut[1]}, {what}" for what in problems]
    return found or list(_plan_problems(model, family, values))


def cuts(depth: int) -> tuple[tuple[int, int], ...]:
    """Return cuts with a small and a large trunk, at even and odd layers."""
    return tuple(dict.fromkeys(((1, depth - 1), (depth // 2 - 1, depth // 2), (depth // 2, depth - 1))))


def _cut(model: Any, family: ModelFamily, config: Any, cut: tuple[int, int]) -> SplitCausalLM:
    whole = model.state_dict()
    ends: dict[Component, tuple[int | None, int | None]] = {
        Component.BOTTOM: (None, cut[0]),
        Component.TRUNK: cut,
        Component.TOP: (cut[1], None),
    }
    parts = [
        component_from_state_dict(family, component, whole, copy.deepcopy(config), start, end)
        for component, (start, end) in ends.items()
    ]
    return cast("SplitCausalLM", SplitCausalLM(*parts).eval())


@torch.no_grad()
def _compare(model: Any, split: SplitCausalLM) -> Iterator[str]:
    for title, check in (("a forward", _forward), ("decoding with a cache", _decode)):
        expected = check(model)
        # The model's code raises whatever comes of what it was given; that is evidence, too.
        try:
            got = check(split)
        except Exception as error:  # noqa: BLE001
            yield f"{title} fails: {said(error)}"
            continue
        if not all(map(torch.equal, got, expected)):
            yield f"{title} differs by up to {max(_distance(*pair) for pair in zip(got, expected, strict=True)):.3g}"


def _training(split: SplitCausalLM, family: ModelFamily) -> Iterator[str]:
    """Say where hidden states that enter meet something else than layers; the split is of no use afterwards."""
    for component in (Component.TRUNK, Component.TOP):
        got, expected = through_no_layers(getattr(split, component.value), family)
        if not torch.equal(got, expected):
            yield f"in training, the {component.value} changes hidden states outside its layers"


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max()) if one.shape == other.shape else float("inf")


def _forward(model: Any) -> list[torch.Tensor]:
    ids, mask = _batch()
    return [model(input_ids=ids, attention_mask=mask, use_cache=False).logits]


def _decode(model: Any) -> list[torch.Tensor]:
    ids, mask = _batch()
    name = cache_argument(model.forward)
    past, logits = None, []
    for number, tokens in enumerate(_STEPS):
        if number:
            ids = _ids(tokens, number)
            mask = torch.cat([mask, torch.ones(len(mask), tokens, dtype=mask.dtype)], dim=1)
        output = model(input_ids=ids, attention_mask=mask, use_cache=True, **{name: past})
        past = output[CACHE_FIELD]
        logits.append(output.logits)
    return logits


def _batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = _ids(_STEPS[0], 0)
    mask = torch.ones_like(ids)
    ids[0, :_PADDING], mask[0, :_PADDING] = 0, 0
    return ids, mask


def _ids(tokens: int, seed: int) -> torch.Tensor:
    return torch.randint(_EMPTY_TOKENS, 100, (2, tokens), generator=torch.Generator().manual_seed(seed))


def _plan_problems(model: Any, family: ModelFamily, values: Mapping[str, Any]) -> Iterator[str]:
    """Hold the plan, which knows ``config.json`` alone, against the model."""
    infos = {
        key: TensorInfo(key, "F32", tuple(tensor.shape), "", 0, tensor.nbytes)
        for key, tensor in model.state_dict().items()
    }
    try:
        ranges = split_layers(family, values, cuts(int(model.config.num_hidden_layers))[0])
        table = place_keys(family, values, map_keys(family, infos), ranges)
        plan_components(family, values, table, ranges, infos, dict.fromkeys(Component, "float32"))
    except SplitLearnError as error:
        yield f"it cannot be planned: {error.message}"
        return
    tied = bool(family.config_value(values, "tie_word_embeddings"))
    if tied != bool(model.get_output_embeddings().weight is model.get_input_embeddings().weight):
        yield f"its plan takes head and embedding for {'one tensor' if tied else 'two tensors'}, and they are not"


@torch.no_grad()
def cache_note(model: Any, family: ModelFamily) -> str:
    """Say where a plan is wrong about the cache of a model whose family is right otherwise; empty where it is not.

    A type may keep fewer heads of keys and values than any value of ``config.json`` says (Falcon: one).
    """
    depth = int(model.config.num_hidden_layers)
    planned = depth * kv_bytes_per_layer(family, json.loads(model.config.to_json_string()), "float32")
    ids = _ids(_EMPTY_TOKENS, 0)
    cache = model(input_ids=ids, use_cache=True)[CACHE_FIELD]
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) // ids.numel()
    if held == planned:
        return ""
    return f"what a plan says of the cache: {planned} bytes a token for the small model, which takes {held}"
