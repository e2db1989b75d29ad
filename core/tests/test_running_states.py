"""Layers with running states, split, equal the unsplit model, here and at a host; and say what they cannot."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, cache_utils

from splitlearn_core import ConfigurationError, ModelFamily, RemoteError, SplitCausalLM
from splitlearn_core.build.cache_sizes import layer_cache_sizes, sizes_after_one_token
from splitlearn_core.build.construction import component_from_state_dict
from splitlearn_core.build.kv_cache import CACHE_FIELD, cache_argument
from splitlearn_core.hosts.sessions import SessionLimits, SessionTable
from splitlearn_core.types import Component
from support.hosts import MemoryEndpoint, lost, remote

pytestmark = pytest.mark.skipif(
    not hasattr(cache_utils, "LinearAttentionLayer"), reason="each type has a cache of its own in this transformers"
)

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
#: What a family names, and a small configuration.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # States alone.
    "mamba": (
        {"base": "backbone", "embedding": "embeddings", "norm": "norm_f"},
        {"state_size": 8},
    ),
    # Keys and values in the bottom and in the top alone.
    "bamba": (
        {"norm": "final_layernorm", "layers_return_tuple": True},
        {**MAMBA2, "attn_layer_indices": [0, 3]},
    ),
    # Both in one layer.
    "falcon_h1": (
        {"norm": "final_layernorm", "layers_return_tuple": True, "enter_at_layers": True},
        {**MAMBA2, "mamba_d_ssm": 64, "head_dim": 8},
    ),
    # The inputs of a convolution, from which tokens can be removed.
    "lfm2": (
        {"norm": "embedding_norm"},
        {"layer_types": ["conv", "full_attention", "conv", "conv"], "tie_embedding": False},
    ),
    # A class of cache of its own.
    "minimax": (
        {},
        {
            "layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"],
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "head_dim": 8,
        },
    ),
    # Layers that cache nothing.
    "nemotron_h": (
        {"norm": "norm_f", "embedding": "embeddings", "config_names": {"num_hidden_layers": "layers_block_type"}},
        {
            "layers_block_type": ["linear_attention", "full_attention", "mlp", "linear_attention"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "chunk_size": 8,
            "n_groups": 2,
            "head_dim": 8,
        },
    ),
}
#: At the cut, a trunk of states alone; of nemotron_h, one that caches nothing.
CUTS = dict.fromkeys(CASES, (1, 3)) | {"nemotron_h": (2, 3)}


@functools.cache
def model(name: str) -> tuple[Any, ModelFamily]:
    """Return a small model with random values, and its family."""
    fields, values = CASES[name]
    config = AutoConfig.for_model(name, **{**SIZES, **values})
    whole: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in whole.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15
    family = ModelFamily(
        model_type=name, architecture=type(whole).__name__, uniform_layers=False, measured_cache=True, **fields
    )
    return whole, family


def parts_of(name: str) -> list[Any]:
    whole, family = model(name)
    first, second = CUTS[name]
    ends = ((Component.BOTTOM, None, first), (Component.TRUNK, first, second), (Component.TOP, second, None))
    state = whole.state_dict()
    return [component_from_state_dict(family, kind, state, whole.config, start, end) for kind, start, end in ends]


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def endpoint(name: str) -> MemoryEndpoint:
    trunk = parts_of(name)[1]
    return MemoryEndpoint(lambda: SessionTable(trunk, SessionLimits(max_tokens=64, max_rows=8)))


def apart(name: str, endpoint: MemoryEndpoint) -> SplitCausalLM:
    bottom, _, top = parts_of(name)
    return SplitCausalLM(bottom, remote(endpoint), top)


def batch(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 90, (2, tokens), generator=torch.Generator().manual_seed(seed))


def steps(whole: Any, sizes: tuple[int, ...], change: Callable[[Any], None] = lambda cache: None) -> list[torch.Tensor]:
    """Return the logits of steps with a cache of the whole model, the first row padded on the left."""
    past: dict[str, Any] = {}
    mask, logits = torch.ones(2, 0, dtype=torch.long), []
    for number, tokens in enumerate(sizes):
        ids = batch(tokens, number)
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        mask[0, :2] = 0
        # Of its mask, a mamba takes the part of the new tokens.
        given = mask[:, -tokens:] if whole.config.model_type == "mamba" else mask
        with torch.no_grad():
            output = whole(input_ids=ids, attention_mask=given, use_cache=True, **past)
        past = {cache_argument(whole.forward): output[CACHE_FIELD]}
        logits.append(output.logits)
        change(output[CACHE_FIELD])
    return logits


def generated(whole: Any, **arguments: Any) -> list[torch.Tensor]:
    ids = batch(7)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    settings = {"max_new_tokens": 6, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    output = whole.generate(input_ids=ids, attention_mask=mask, **{**settings, **arguments})
    return [output.sequences, *output.scores]


def equal(got: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return len(got) == len(expected) and all(map(torch.equal, got, expected))


def reverse(cache: Any) -> None:
    cache.reorder_cache(torch.tensor([1, 0]))


SIZES_OF_STEPS = {"prompt": (7, 1, 1, 3), "chunks": (3, 4, 2, 1)}


@pytest.mark.parametrize("sizes", SIZES_OF_STEPS.values(), ids=SIZES_OF_STEPS)
def test_steps_are_equal(name: str, sizes: tuple[int, ...], endpoint: MemoryEndpoint) -> None:
    """With the rows of the cache exchanged after each, too; here, and with the trunk at a host."""
    whole, split = model(name)[0], SplitCausalLM(*parts_of(name))
    assert equal(steps(split, sizes), steps(whole, sizes))
    assert equal(steps(apart(name, endpoint), sizes), steps(whole, sizes))
    expected = steps(whole, sizes, reverse)
    assert equal(steps(split, sizes, reverse), expected)
    # transformers does not exchange the states of a minimax; a host does.
    assert equal(steps(apart(name, endpoint), sizes, reverse), expected) == (name != "minimax")


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_equal(name: str, beams: int, endpoint: MemoryEndpoint) -> None:
    whole, split = model(name)[0], SplitCausalLM(*parts_of(name))
    expected = generated(whole, num_beams=beams)
    assert equal(generated(split, num_beams=beams), expected)
    if name != "minimax" or beams == 1:
        assert equal(generated(apart(name, endpoint), num_beams=beams), expected)


@torch.no_grad()
def test_components_with_their_own_caches(name: str) -> None:
    """Each knows how many tokens came before; a copy, and rows chosen of it, go on like the original."""
    whole = model(name)[0]
    parts = parts_of(name)
    caches = [part.new_cache() for part in parts]

    def run(ids: torch.Tensor, caches: list[Any]) -> torch.Tensor:
        hidden: Any = ids
        for part, cache, argument in zip(parts, caches, ("input_ids", "hidden_states", "hidden_states"), strict=True):
            hidden = part(**{argument: hidden}, past_key_values=cache)
        logits: torch.Tensor = hidden.logits
        return logits

    expected = whole(input_ids=batch(5), use_cache=True)
    assert torch.equal(run(batch(5), caches), expected.logits)
    assert [cache.get_seq_length() for cache in caches] == [5, 5, 5]
    copies, chosen = [[cache.copy() for cache in caches] for _ in range(2)]
    for cache in chosen:
        cache.batch_select_indices(torch.tensor([1]))
        cache.batch_repeat_interleave(2)
    after = whole(input_ids=batch(1, 1), **{cache_argument(whole.forward): expected[CACHE_FIELD]}).logits
    assert torch.equal(run(batch(1, 1), caches), after)
    assert [cache.get_seq_length() for cache in caches] == [6, 6, 6]
    assert torch.equal(run(batch(1, 1), copies), after)
    again = run(batch(1, 1)[[1, 1]], chosen)
    assert torch.equal(again[0], again[1])
    assert torch.allclose(again[0], after[1], atol=1e-5)


@torch.no_grad()
def test_attentions_can_be_requested_where_some_layers_have_none(name: str) -> None:
    expected = model(name)[0](input_ids=batch(5), output_attentions=True)
    got = SplitCausalLM(*parts_of(name))(input_ids=batch(5), output_attentions=True)
    assert torch.equal(got.logits, expected.logits)
    assert ("attentions" in got) == ("attentions" in expected)


def test_a_session_is_rebuilt(name: str, endpoint: MemoryEndpoint) -> None:
    """A restart of the host in the middle of a generation does not change it."""
    beams = 1 if name == "minimax" else 2
    expected = generated(model(name)[0], num_beams=beams)

    def restart(number: int, _: Any) -> None:
        if number == 5:
            endpoint.restart()

    endpoint.before = restart
    assert equal(generated(apart(name, endpoint), num_beams=beams), expected)


def test_a_failed_step_changes_nothing(name: str, endpoint: MemoryEndpoint) -> None:
    """Neither one that fails at the host, nor one that fails here after the host has run it."""
    split = apart(name, endpoint)
    expected = steps(model(name)[0], (5, 1, 1))
    fails = iter(("here", "at the host"))

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    def again(cache: Any) -> None:
        where = next(fails, None)
        if where is None:
            return
        module = split.top if where == "here" else endpoint.table._component
        handle = list(module.layer_modules.children())[-1 if where == "here" else CUTS[name][1] - 1]
        hook = handle.register_forward_hook(fail) if where == "here" else None
        own = type(module).forward
        if hook is None:
            module.forward = fail
        mask = torch.ones(2, 6 if where == "here" else 7, dtype=torch.long)
        mask[0, :2] = 0
        try:
            with torch.no_grad(), pytest.raises((RuntimeError, RemoteError)):
                split(input_ids=batch(1, 1), attention_mask=mask, **{cache_argument(own): cache})
        finally:
            if hook is None:
                del module.forward
            else:
                hook.remove()

    assert equal(steps(split, (5, 1, 1), again), expected)


def test_drafts_are_refused_where_a_state_cannot_go_back(name: str, endpoint: MemoryEndpoint) -> None:
    """Or made, where it can; a cache says the same."""
    whole, local, far = model(name)[0], SplitCausalLM(*parts_of(name)), apart(name, endpoint)
    arguments = {"prompt_lookup_num_tokens": 2, "max_new_tokens": 8, "do_sample": False}
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    if name == "lfm2":
        expected = whole.generate(input_ids=ids, **arguments)
        for split in (local, far):
            assert torch.equal(split.generate(input_ids=ids, **arguments), expected)
        return
    for split in (local, far):
        with pytest.raises(ConfigurationError, match="running states") as caught:
            split.generate(input_ids=ids, **arguments)
        assert caught.value.hint
    for part in (local.top,) if name == "nemotron_h" else (local.trunk, far.trunk):
        cache = part.new_cache()
        with torch.no_grad():
            part(hidden_states=torch.zeros(1, 3, 32), past_key_values=cache)
        with pytest.raises(ConfigurationError, match="no tokens can be removed"):
            cache.crop(-1)
        assert cache.get_seq_length() == 3


def test_what_a_cache_takes_is_planned(name: str, endpoint: MemoryEndpoint) -> None:
    """Bytes for each token, and bytes that do not grow; a host reserves both."""
    whole, family = model(name)
    with torch.no_grad():
        cache = whole(input_ids=torch.ones(1, 1, dtype=torch.long), use_cache=True)[CACHE_FIELD]
    sizes = layer_cache_sizes(family, whole.config.to_dict(), "float32")
    assert sizes == sizes_after_one_token(cache)
    owned = sizes[slice(*CUTS[name])]
    split = apart(name, endpoint)
    split.generate(input_ids=batch(4), max_new_tokens=4, do_sample=False)
    steps(split, (4,))
    facts = endpoint.table.facts
    assert facts.cache_bytes_per_sequence == sum(size.fixed for size in owned)
    assert facts.cache_bytes_per_token == sum(size.per_token for size in owned)


def test_a_lost_connection_is_repaired(name: str, endpoint: MemoryEndpoint) -> None:
    """A step whose reply is lost is not run twice."""
    expected = steps(model(name)[0], (4, 1, 2))

    def lose(number: int, _: Any) -> None:
        if number == 3:
            raise lost()

    endpoint.after = lose
    assert equal(steps(apart(name, endpoint), (4, 1, 2)), expected)
