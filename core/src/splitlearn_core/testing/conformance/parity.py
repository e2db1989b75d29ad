"""Checks of parity: the split model computes the same values as the unsplit one, bit by bit."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from splitlearn_core import ModelRegistry, SplitCausalLM, plan_split
from splitlearn_core.build.component import ComponentModel
from splitlearn_core.build.kv_cache import CACHE_FIELD, PartCache, cache_argument, has_states_alone
from splitlearn_core.build.packing import PackItem, can_pack, packed
from splitlearn_core.testing.conformance.base import Checks, explained
from splitlearn_core.testing.conformance.batches import PADDINGS, PROMPT_TOKENS, batch, no_grad, positions, token_ids
from splitlearn_core.testing.conformance.findings import Suspect, expect
from splitlearn_core.testing.conformance.numbers import at_cut, compare, different, expect_equal, watched_layers
from splitlearn_core.testing.conformance.subject import Cut, Subject

#: Tokens of each call: a prompt, single tokens, and a chunk with a past; or the prompt in chunks.
_STEPS = {"prompt first": (PROMPT_TOKENS, 1, 1, 1, 4), "chunked prompt": (3, 2, 2, 1)}
#: Relative difference that another order of summation may cause.
_ROUNDING = 1e-4
#: Tokens of each session in a pack.
_PACK = [5, 1, 3]


@explained
class Parity(Checks):
    """Weights, logits, and the cache."""

    def test_components_are_complete(self, subject: Subject, cut: Cut) -> None:
        """Parameters and buffers are those of the unsplit model, in evaluation mode, none empty."""
        expected = subject.weights()
        for part in subject.split(cut).components:
            expect(not part.training, f"the {part.component} is in training mode")
            own = {**dict(part.named_parameters(remove_duplicate=False)), **dict(part.named_buffers())}
            for name, tensor in own.items():
                other = expected[name]
                same = tensor.dtype == other.dtype and tensor.requires_grad == other.requires_grad
                expect(
                    same and compare(tensor.detach(), other.detach()),
                    f"{name} of the {part.component} is not that of the unsplit model",
                    Suspect("renamed", "or the hook splitlearn_map_weight_keys: another tensor may lie there"),
                )

    @pytest.mark.parametrize("component", ["bottom", "trunk", "top"])
    def test_from_state_dict(self, subject: Subject, component: str) -> None:
        """The registry's classes build the same components from the state dict of the whole model."""
        whole, (first, second) = subject.whole(), subject.middle
        ends = {
            "bottom": {"end_layer": first},
            "trunk": {"start_layer": first, "end_layer": second},
            "top": {"start_layer": second},
        }
        model_class = ModelRegistry.get_model_class(self.model_type, component)
        made = model_class.from_pretrained_split(whole.state_dict(), whole.config, **ends[component])
        got, expected = made.state_dict(), getattr(subject.split(subject.middle), component).state_dict()
        expect(got.keys() == expected.keys(), f"other tensors: {sorted(got.keys() ^ expected.keys())}")
        differ = [name for name, tensor in got.items() if not torch.equal(tensor, expected[name])]
        expect(not differ, f"other values: {', '.join(differ)}")
        expect(not made.training, f"the {component} is in training mode")

    def test_logits(self, subject: Subject, dtype: str, attention: str, cut: Cut) -> None:
        """Logits without a cache are equal, with and without left padding and positions."""
        whole, split = subject.whole(dtype, attention), subject.split(cut, dtype, attention)
        for padding in PADDINGS:
            inputs = batch(padding)
            for given in ({}, {"position_ids": positions(inputs["attention_mask"])}):
                arguments = {**inputs, **given, "use_cache": False}
                expected = subject.once(("logits", dtype, attention, padding, *given), _logits, whole, arguments)
                what = f"logits{' with left padding' if padding else ''}{' and position_ids' if given else ''}"
                expect_equal(no_grad(split, **arguments).logits, expected, what, subject, whole, split)
        unmasked = {"input_ids": batch(None)["input_ids"]}
        expected = subject.once(("unmasked", dtype, attention), _logits, whole, unmasked)
        expect_equal(no_grad(split, **unmasked).logits, expected, "logits without a mask", subject, whole, split)

    def test_every_cut(self, subject: Subject) -> None:
        """Logits are equal under every cut that is not declared impossible."""
        whole, inputs = subject.whole(), batch(3)
        expected = subject.once("logits of every cut", _logits, whole, {**inputs, "use_cache": False})
        expect(subject.cuts, "no two cuts are possible", Suspect("impossible_cuts", "it leaves fewer than two"))
        wrong = [cut for cut in subject.cuts if not compare(_logits_or_none(subject.split(cut), inputs), expected)]
        points = [point for point in range(1, subject.layers) if all(point in cut for cut in wrong)]
        if wrong and points:
            why = f"every failing cut is at layer {points[0]}"
            expect(False, f"cuts {wrong} give different logits", Suspect("impossible_cuts", why))
        if wrong:
            split = subject.split(wrong[0])
            expect_equal(_logits_or_none(split, inputs), expected, f"logits under cuts {wrong}", subject, whole, split)

    @pytest.mark.parametrize("steps", _STEPS.values(), ids=_STEPS)
    def test_cache(self, subject: Subject, dtype: str, attention: str, cut: Cut, steps: tuple[int, ...]) -> None:
        """A prompt, single tokens and chunks with a past are equal, each component with its own cache."""
        whole, split = subject.whole(dtype, attention), subject.split(cut, dtype, attention)
        for padding in PADDINGS:
            for with_positions in (False, True):
                fed = _fed(whole, padding, steps, with_positions=with_positions)
                expected = subject.once(
                    ("cache", dtype, attention, padding, with_positions, steps), _step_whole, whole, fed
                )
                for number, (got, right) in enumerate(zip(_step_split(split, fed), expected, strict=True)):
                    what = f"logits of step {number} (of {steps} tokens, padding {padding}) with a cache"
                    expect_equal(got, right, what, subject, whole, split)

    def test_what_crosses(self, subject: Subject, cut: Cut) -> None:
        """What leaves a component is what the next layer of the unsplit model is given, and as much as is planned."""
        if not subject.family.crossing:
            pytest.skip("hidden states [batch, sequence, hidden_size] alone cross a cut")
        whole, split, ids = subject.whole(), subject.split(cut), batch(None)["input_ids"]
        field = Suspect("crossing", "each argument of the layers that is computed from the tokens, with its dimensions")
        with watched_layers(whole, subject) as calls:
            no_grad(whole, input_ids=ids, use_cache=False)
        state: Any = ids
        for part, following in pairwise(split.components):
            state = no_grad(part, **{"input_ids" if part is split.bottom else "hidden_states": state})
            names = different(state, at_cut(calls, following))
            expect(not names, f"{', '.join(names)} of the {part.component} differ from those in the model", field)
            if part is split.bottom:
                tensors = [state] if isinstance(state, torch.Tensor) else [value for _, value in state.items()]
                left = sum(tensor.nbytes for tensor in tensors) // ids.shape[1]
                planned = plan_split(subject.checkpoint, cut).cut_bytes_per_token
                expect(left == planned, f"{left} bytes a token cross the first cut, and {planned} are planned", field)

    def test_any_number_of_cuts(self, subject: Subject) -> None:
        """With fewer and with more split points, logits are equal: with and without padding and cache."""
        whole = subject.whole()
        for cut in subject.other_cuts[: 1 if self.quick else None]:
            split = subject.split(cut)
            for padding in PADDINGS:
                inputs = {**batch(padding), "use_cache": False}
                expected = subject.once(("logits of any number", padding), _logits, whole, inputs)
                what = f"logits under cut {cut}{' with left padding' if padding else ''}"
                expect_equal(no_grad(split, **inputs).logits, expected, what, subject, whole, split)
                fed = _fed(whole, padding, _STEPS["prompt first"], with_positions=False)
                steps = subject.once(("cache of any number", padding), _step_whole, whole, fed)
                for number, (got, right) in enumerate(zip(_step_split(split, fed), steps, strict=True)):
                    expect_equal(got, right, f"{what} at step {number} with a cache", subject, whole, split)

    def test_packed_steps(self, subject: Subject, dtype: str, attention: str, cut: Cut) -> None:
        """Steps of several sessions in one forward are equal to the same pack in the unsplit model."""
        if not subject.family.packable:
            pytest.skip("the family is not packable")
        whole, split = subject.whole(dtype, attention), subject.split(cut, dtype, attention)
        models = (whole, *split.components)
        caches = [
            [model.new_cache() if model is not whole else DynamicCache(config=whole.config) for _ in _PACK]
            for model in models
        ]
        for component, own in zip(split.components, caches[1:], strict=True):
            # The unsplit model cannot compute such a pack, either.
            if not can_pack(subject.family, component.decoder_config, own[0].layers):
                pytest.skip("packs of this configuration are refused")
        for sizes in (_PACK, _PACK[::-1], [1] * len(_PACK)):
            flat = token_ids(1, sum(sizes))
            expected = _packed(whole, caches[0], sizes, {"input_ids": flat}).logits
            states: Any = flat
            name = "input_ids"
            for component, own in zip(split.components, caches[1:], strict=True):
                states, name = _packed(component, own, sizes, {name: states}), "hidden_states"
            expect_equal(states.logits, expected, f"logits of a pack of {sizes} tokens", subject, whole, split)

    def test_causality(self, subject: Subject, dtype: str, attention: str, cut: Cut) -> None:
        """Changing the last token changes no earlier position's logits, but for rounding, as in the unsplit model."""
        split, ids = subject.split(cut, dtype, attention), batch(None)["input_ids"]
        other = ids.clone()
        other[:, -1] = (ids[:, -1] + 1) % 100
        first, second = (no_grad(split, input_ids=tokens).logits for tokens in (ids, other))
        if not torch.equal(first[:, :-1], second[:, :-1]):
            # Experts add in an order that depends on all tokens: not more than that, and as in the unsplit model.
            whole = subject.whole(dtype, attention)
            for got, tokens in ((first, ids), (second, other)):
                expect_equal(got, no_grad(whole, input_ids=tokens).logits, "the logits", subject, whole, split)
            earlier, last = (float((first[:, at] - second[:, at]).abs().max()) for at in (slice(-1), slice(-1, None)))
            expect(earlier <= _ROUNDING * last, "an earlier position sees the last token")
        expect(not torch.equal(first[:, -1], second[:, -1]), "the last token changes nothing at its own position")

    def test_logits_to_keep(self, subject: Subject, dtype: str, attention: str, cut: Cut) -> None:
        """The top computes logits only for the requested positions."""
        whole, split = subject.whole(dtype, attention), subject.split(cut, dtype, attention)
        arguments = {**batch(None), "logits_to_keep": 2}
        got = no_grad(split, **arguments).logits
        expected = subject.once(("kept", dtype, attention), _logits, whole, arguments)
        expect(got.shape[1] == 2, f"logits of {got.shape[1]} positions, not of 2")
        expect_equal(got, expected, "the last logits", subject, whole, split)


def _new_cache(model: Any) -> Any:
    return model.new_cache() if isinstance(model, ComponentModel) else DynamicCache(config=model.config)


def _packed(model: Any, caches: list[Any], sizes: list[int], inputs: dict[str, Any]) -> Any:
    """Run steps of several sessions as one."""
    items = [PackItem(1, tokens, cache) for tokens, cache in zip(sizes, caches, strict=True)]
    config = model.config.get_text_config()
    with torch.no_grad(), packed(config, items, next(model.parameters())) as (places, cache):
        result = model(**inputs, position_ids=places, **{cache_argument(type(model).forward): cache})
    for tokens, own in zip(sizes, caches, strict=True):
        if isinstance(own, PartCache):
            own.advance(tokens)
    return result


def _logits(model: Any, arguments: dict[str, Any]) -> torch.Tensor:
    logits: torch.Tensor = no_grad(model, **arguments).logits
    return logits


def _logits_or_none(split: SplitCausalLM, inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
    """Run a split model; None if its layers need the state of other components."""
    try:
        return _logits(split, {**inputs, "use_cache": False})
    # A layer raises these if the state of another component is missing.
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return None


def _fed(whole: Any, padding: int | None, steps: tuple[int, ...], *, with_positions: bool) -> list[dict[str, Any]]:
    """Return the arguments of each step: the first tokens are the prompt's, with its padding."""
    prompt, begin, calls = batch(padding), 0, []
    rows = len(prompt["input_ids"])
    ids = torch.cat([prompt["input_ids"], token_ids(rows, sum(steps), seed=1)], dim=1)
    mask = torch.cat([prompt["attention_mask"], torch.ones(rows, sum(steps), dtype=torch.long)], dim=1)
    of_new = has_states_alone(whole.config)
    for tokens in steps:
        end = begin + tokens
        arguments: dict[str, Any] = {
            "input_ids": ids[:, begin:end],
            "attention_mask": mask[:, begin if of_new else 0 : end],
        }
        if with_positions:
            arguments["position_ids"] = positions(mask[:, :end])[:, begin:]
        calls.append(arguments)
        begin = end
    return calls


def _step_whole(whole: Any, fed: list[dict[str, Any]]) -> list[torch.Tensor]:
    past, logits = None, []
    for arguments in fed:
        output = no_grad(whole, use_cache=True, **{cache_argument(whole.forward): past}, **arguments)
        past = output[CACHE_FIELD]
        logits.append(output.logits)
    return logits


def _step_split(split: SplitCausalLM, fed: list[dict[str, Any]]) -> list[torch.Tensor]:
    caches, logits = [part.new_cache() for part in split.components], []
    for arguments in fed:
        common = {name: value for name, value in arguments.items() if name != "input_ids"}
        state: Any = arguments["input_ids"]
        for part, cache in zip(split.components, caches, strict=True):
            argument = "input_ids" if part is split.bottom else "hidden_states"
            state = no_grad(part, **{argument: state}, past_key_values=cache, **common)
        logits.append(state.logits)
    return logits
