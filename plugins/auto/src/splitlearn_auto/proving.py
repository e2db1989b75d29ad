"""Split a tiny model with a derived family, and compare with the unsplit model bit by bit."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from transformers import DynamicCache

from splitlearn_auto.deriving import saved_tensors
from splitlearn_core import Component, ModelFamily, SplitCausalLM, SplitLearnError, TensorInfo
from splitlearn_core.extension import (
    CACHE_FIELD,
    PackItem,
    cache_argument,
    can_pack,
    component_from_state_dict,
    has_states_alone,
    hf_config,
    impossible_cuts,
    layer_cache_sizes,
    map_keys,
    packed,
    place_keys,
    plan_components,
    said,
    sizes_after_one_token,
    split_layers,
    targets_by_tables,
    through_no_layers,
    total_cache_size,
)

#: Tokens of a prompt, and of the steps after it.
_STEPS = (7, 1, 3)
_PADDING = 2
_EMPTY_TOKENS = 3
#: Packs, one after the other: the sequences and tokens of each session's step.
_PACKS = (((1, 7), (2, 3), (1, 1)), ((1, 1), (2, 1), (1, 12)), ((1, 1), (2, 1), (1, 1)))
#: The relative difference of a session in a pack from the same alone that another order of additions may cause.
_ROUNDING = 1e-4


def differences(model: Any, family: ModelFamily) -> list[str]:
    """Return where the split model differs from the unsplit one; empty if they are equal.

    Args:
        model: The tiny unsplit model, in evaluation mode.
        family: The family derived from it.
    """
    # As in a file, which the family has to understand, too.
    values = json.loads(model.config.to_json_string())
    attention = _attention(model.config)
    dtype = str(model.dtype).removeprefix("torch.")
    differing: list[str] = []
    depth, impossible = _depth(model), impossible_cuts(family, values)
    if len({*range(1, depth)} - {*impossible}) < 2:  # noqa: PLR2004  # two cuts make three components
        why = next(iter(impossible.values()), f"the model has {depth} layers")
        return [f"fewer than two cuts are possible: {why}"]
    for cut in cuts(depth, impossible):
        try:
            split = _cut(model, family, hf_config(family, values, "the tiny model", dtype, attention), cut)
        except SplitLearnError as error:
            return [f"it cannot be cut at {cut[0]} and {cut[1]}: {error.message}"]
        problems = (*_compare(model, split), *_training(split, family))
        differing += [f"cut at {cut[0]} and {cut[1]}, {problem}" for problem in problems]
    return differing or list(_plan_problems(model, family, values))


def _attention(config: Any) -> str | None:
    """Return the attention implementation to request; None if the decoder has another than the whole by default."""
    used, own = (each._attn_implementation for each in (config, config.get_text_config(decoder=True)))  # noqa: SLF001  # as transformers
    return used if used == own else None


def _depth(model: Any) -> int:
    return int(model.config.get_text_config(decoder=True).num_hidden_layers)


def cuts(depth: int, impossible: Collection[int] = ()) -> tuple[tuple[int, int], ...]:
    """Return cuts with a small and a large trunk, at even and odd layers; where one is impossible, the first two."""
    pairs = dict.fromkeys(((1, depth - 1), (depth // 2 - 1, depth // 2), (depth // 2, depth - 1)))
    possible = [point for point in range(1, depth) if point not in impossible]
    return tuple(pair for pair in pairs if not {*pair} & {*impossible}) or (
        cast("tuple[int, int]", tuple(possible[:2])),
    )


def _cut(model: Any, family: ModelFamily, config: Any, cut: tuple[int, int]) -> SplitCausalLM:
    # As in a file where tensors are made of others, so that this is proven, too.
    whole = saved_tensors(model) if _differs_in_a_file(family) else model.state_dict()
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


def _differs_in_a_file(family: ModelFamily) -> bool:
    return family.transformers_tables or bool(family.shared_modules)


@torch.no_grad()
def _compare(model: Any, split: SplitCausalLM) -> Iterator[str]:
    for title, check in (("a forward", _forward), ("decoding with a cache", _decode)):
        expected = check(model)
        # The model's code may raise any exception for wrong inputs; that is evidence, too.
        try:
            got = check(split)
        except Exception as error:  # noqa: BLE001
            lacks = isinstance(error, IndexError | KeyError | AttributeError)
            why = "the code of a component looks up what only another component has" if lacks else said(error)
            yield f"{title} fails: {why}"
            continue
        if not all(map(torch.equal, got, expected)):
            yield f"{title} differs by up to {max(_distance(*pair) for pair in zip(got, expected, strict=True)):.3g}"


def _training(split: SplitCausalLM, family: ModelFamily) -> Iterator[str]:
    """Report components that change hidden states outside their layers in training; the split is changed."""
    # Where more crosses, hidden states enter at the layers, and leave there.
    for component in () if family.crossing else (Component.TRUNK, Component.TOP):
        got, expected = through_no_layers(getattr(split, component.value), family)
        if not torch.equal(got, expected):
            yield f"in training, the {component.value} changes hidden states outside its layers"


@torch.no_grad()
def keeps_states(model: Any) -> bool:
    """Return whether layers of a model keep running states."""
    cache = model(input_ids=_ids(1, 0), use_cache=True).get(CACHE_FIELD)
    return any(size.fixed for size in sizes_after_one_token(cache))


@torch.no_grad()
def is_packable(model: Any, family: ModelFamily) -> bool:
    """Return whether steps of several sessions can share a forward of a model's components.

    A pack must be equal to the same pack in the unsplit model, and each session in it close to the same one alone:
    tokens of one session that reach another one outside of attention would not be close.

    Args:
        model: The tiny unsplit model, in evaluation mode.
        family: The family derived from it.
    """
    family = replace(family, packable=True)
    values = json.loads(model.config.to_json_string())
    dtype, attention = str(model.dtype).removeprefix("torch."), _attention(model.config)
    cut = cuts(_depth(model), impossible_cuts(family, values))[0]
    try:
        split = _cut(model, family, hf_config(family, values, "the tiny model", dtype, attention), cut)
        return _packs_are_equal(model, split, family)
    except Exception:  # noqa: BLE001  # a layer that does not attend as a pack needs it may raise anything
        return False


def _packs_are_equal(model: Any, split: SplitCausalLM, family: ModelFamily) -> bool:
    components, sessions = split.components, range(len(_PACKS[0]))
    together, alone = ([DynamicCache(config=model.config) for _ in sessions] for _ in range(2))
    caches = [[component.new_cache() for _ in sessions] for component in components]
    if not all(can_pack(family, each.decoder_config, own[0].layers) for each, own in zip(components, caches)):
        return False
    for number, sizes in enumerate(_PACKS):
        ids = [
            torch.randint(_EMPTY_TOKENS, 100, size, generator=torch.Generator().manual_seed(10 * number + place))
            for place, size in enumerate(sizes)
        ]
        flat = torch.cat([part.reshape(1, -1) for part in ids], dim=1)
        expected = _in_a_pack(model, together, sizes, {"input_ids": flat}).logits
        states: Any = flat
        name = "input_ids"
        for component, own in zip(components, caches):
            states, name = _in_a_pack(component, own, sizes, {name: states}), "hidden_states"
            for cache, (_, tokens) in zip(own, sizes):
                cache.advance(tokens)
        if not torch.equal(states.logits, expected):
            return False
        for part, cache, logits in zip(ids, alone, expected.split([part.numel() for part in ids], dim=1)):
            own_logits = model(input_ids=part, **{cache_argument(model.forward): cache}).logits
            near = own_logits.reshape(logits.shape)
            if model.dtype == torch.float32 and _distance(logits, near) > _ROUNDING * float(near.abs().max()):
                return False
    return True


def _in_a_pack(model: Any, caches: Sequence[Any], sizes: Sequence[tuple[int, int]], inputs: Mapping[str, Any]) -> Any:
    items = [PackItem(rows, tokens, cache) for (rows, tokens), cache in zip(sizes, caches)]
    with packed(model.config.get_text_config(decoder=True), items, next(model.parameters())) as (positions, cache):
        return model(**inputs, position_ids=positions, **{cache_argument(type(model).forward): cache})


def _distance(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first - second).abs().max()) if first.shape == second.shape else float("inf")


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
        given = mask[:, -tokens:] if has_states_alone(model.config) else mask
        output = model(input_ids=ids, attention_mask=given, use_cache=True, **{name: past})
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
    """Compare a plan from ``config.json`` alone with the model."""
    infos = {
        key: TensorInfo(key, "F32", tuple(tensor.shape), "", 0, tensor.nbytes)
        for key, tensor in (saved_tensors(model) if _differs_in_a_file(family) else model.state_dict()).items()
    }
    try:
        points = cuts(_depth(model), impossible_cuts(family, values))[0]
        ranges = split_layers(family, values, points)
        by_table = family.transformers_tables
        targets = targets_by_tables(family, values, sorted(infos)) if by_table else map_keys(family, infos)
        table = place_keys(family, values, targets, ranges)
        sizes = (lambda dtype: layer_cache_sizes(family, values, dtype)) if family.measured_cache else None
        dtypes: Mapping[str, str] = dict.fromkeys(Component, "float32")
        plan_components(family, values, table, ranges, infos, dtypes, cache_sizes=sizes)
    except SplitLearnError as error:
        yield f"it cannot be planned: {error.message}"
        return
    tied = bool(family.config_value(values, "tie_word_embeddings"))
    if tied != bool(model.get_output_embeddings().weight is model.get_input_embeddings().weight):
        yield f"its plan takes head and embedding for {'one tensor' if tied else 'two tensors'}, and they are not"


@torch.no_grad()
def cache_note(model: Any, family: ModelFamily) -> str:
    """Return how the planned cache size of a model is wrong; empty if it is right.

    A model type may cache fewer key-value heads than any value of ``config.json`` says (Falcon: one), or states.
    """
    planned = layer_cache_sizes(family, json.loads(model.config.to_json_string()), "float32")
    cache = model(input_ids=_ids(1, 0)[:1], use_cache=True)[CACHE_FIELD]
    actual = sizes_after_one_token(cache)
    if actual == planned:
        return ""
    (tokens, states), (own_tokens, own_states) = map(total_cache_size, (planned, actual))
    return (
        f"what a plan says of the cache: {tokens} bytes a token and {states} for states for the small model, "
        f"which takes {own_tokens} and {own_states}"
    )
