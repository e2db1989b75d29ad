"""Types of which more than hidden states crosses a cut: split they equal the unsplit model, here and at a host."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from splitlearn_core import ConfigurationError, Cut, ModelFamily, RemoteError, SplitCausalLM, load_split_model
from splitlearn_core.build.construction import component_from_state_dict
from splitlearn_core.build.kv_cache import CACHE_FIELD, cache_argument
from splitlearn_core.hosts.process import ProcessLoad, start_process
from splitlearn_core.hosts.protocol import Kind
from splitlearn_core.hosts.sessions import SessionLimits, SessionTable
from splitlearn_core.plan.crossing import crossing_tensors
from splitlearn_core.plan.splitplan import cut_bytes
from splitlearn_core.types import LayerRange, component_names, kind_of
from support.hosts import CARRIERS, MemoryEndpoint, hosting, remote

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PROJECTIONS = range(3)
#: What a family names, and a small configuration.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # What a layer computes for the next one.
    "zaya": (
        {
            "layers_return_tuple": True,
            "skip_outside_bottom": ("input_hidden_states_scale", "input_hidden_states_bias"),
            "config_defaults": {"residual_in_fp32": True},
            "crossing": {"prev_router_hidden_states": ("batch", "sequence", "router_hidden_size")},
            "layer_results": ("prev_router_hidden_states",),
        },
        {"num_experts": 4, "moe_intermediate_size": 16, "router_hidden_size": 16},
    ),
    # Hidden states of other dimensions, and a slice for each layer of what is computed before the first.
    "gemma3n_text": (
        {
            "skip_outside_bottom": (
                *("embed_tokens_per_layer", "per_layer_model_projection", "per_layer_projection_norm"),
                *(f"altup_projections.{number}" for number in PROJECTIONS),
            ),
            "skip_outside_top": tuple(f"altup_unembed_projections.{number}" for number in PROJECTIONS),
            "crossing": {
                "hidden_states": ("altup_num_inputs", "batch", "sequence", "hidden_size"),
                "per_layer_input": ("batch", "sequence", "layers", "hidden_size_per_layer_input"),
            },
        },
        {
            "vocab_size_per_layer_input": 101,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0] * 6,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "sliding_window": 6,
        },
    ),
    # Such slices alone, computed from token ids that the forward insists on, unless it is given the slices.
    "gemma4_text": (
        {
            "skip_outside_bottom": (
                "embed_tokens_per_layer",
                "per_layer_model_projection",
                "per_layer_projection_norm",
            ),
            "crossing": {"per_layer_input": ("batch", "sequence", "layers", "hidden_size_per_layer_input")},
            "zero_arguments": {"per_layer_inputs": "per_layer_input"},
            "sharing_layers": "num_kv_shared_layers",
        },
        {
            "vocab_size_per_layer_input": 101,
            "hidden_size_per_layer_input": 8,
            "global_head_dim": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "sliding_window": 6,
        },
    ),
    # The embeddings, which every layer takes; and layers that share modules, in different components, too.
    "zamba2": (
        {
            "norm": "final_layernorm",
            "crossing": {"original_hidden_states": ("batch", "sequence", "hidden_size")},
            "shared_modules": {"shared_transformer": ("layers_block_type", "hybrid", "num_mem_blocks")},
        },
        {
            "layers_block_type": ["linear_attention", "hybrid", "hybrid", "linear_attention", "hybrid", "hybrid"],
            "num_mem_blocks": 2,
            "mamba_d_state": 8,
            "chunk_size": 8,
        },
    ),
}


@functools.cache
def model(name: str) -> tuple[Any, ModelFamily]:
    """Return a small model with random values, and its family."""
    fields, values = CASES[name]
    if name not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config = AutoConfig.for_model(name, **{**SIZES, **values})
    whole: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    for key, parameter in whole.named_parameters():
        # Scales near 1, as in the tests of a package.
        usual = 1.0 if not key.endswith("weight") and bool((parameter == 1).all()) else 0.0
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15 + usual
    family = ModelFamily(
        model_type=name, architecture=type(whole).__name__, uniform_layers=False, measured_cache=True, **fields
    )
    return whole, family


def parts_of(name: str, points: tuple[int, ...] = (2, 4)) -> list[Any]:
    whole, family = model(name)
    edges = (0, *points, SIZES["num_hidden_layers"])
    return [
        component_from_state_dict(
            family,
            kind_of(part),
            whole.state_dict(),
            whole.config,
            start or None,
            None if end == SIZES["num_hidden_layers"] else end,
        )
        for part, start, end in zip(component_names(len(points) + 1), edges, edges[1:], strict=False)
    ]


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def batch(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 90, (2, tokens), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def steps(whole: Any, *sizes: int) -> list[torch.Tensor]:
    """Return the logits of a forward, and of steps with a cache, the first row padded on the left."""
    past: dict[str, Any] = {}
    mask, logits = torch.ones(2, 0, dtype=torch.long), [whole(input_ids=batch(5), use_cache=False).logits]
    for number, tokens in enumerate(sizes):
        mask = torch.cat([mask, torch.ones(2, tokens, dtype=torch.long)], dim=1)
        mask[0, :2] = 0
        output = whole(input_ids=batch(tokens, number), attention_mask=mask, use_cache=True, **past)
        past = {cache_argument(whole.forward): output[CACHE_FIELD]}
        logits.append(output.logits)
    return logits


def generated(whole: Any, **arguments: Any) -> list[torch.Tensor]:
    settings = {"max_new_tokens": 6, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    inputs = {"input_ids": batch(7), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    output = whole.generate(**{**inputs, **settings, **arguments})
    return [output.sequences, *output.scores]


def equal(got: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return len(got) == len(expected) and all(map(torch.equal, got, expected))


@pytest.mark.parametrize("points", [(3,), (2, 4), (1, 2, 5)])
def test_steps_are_equal(name: str, points: tuple[int, ...]) -> None:
    """With one trunk, none, and two: what enters the second has passed through the first."""
    split = SplitCausalLM(*parts_of(name, points))
    assert equal(steps(split, 7, 1, 3), steps(model(name)[0], 7, 1, 3))


def test_parameters_are_those_of_the_unsplit_model(name: str) -> None:
    """Those of the base model itself, too, which only a bottom has."""
    models = (SplitCausalLM(*parts_of(name)), model(name)[0])
    split, whole = (dict(each.named_parameters(remove_duplicate=False)) for each in models)
    assert split.keys() == whole.keys()
    assert all(torch.equal(split[key], whole[key]) for key in whole)


@pytest.mark.parametrize("carrier", CARRIERS)
def test_steps_at_a_host_are_equal(name: str, carrier: str, tmp_path: Path) -> None:
    bottom, trunk, top = parts_of(name)
    with hosting(carrier, trunk, tmp_path) as far:
        split = SplitCausalLM(bottom, far, top)
        assert equal(steps(split, 7, 1, 3), steps(model(name)[0], 7, 1, 3))
        assert equal(generated(split, num_beams=2), generated(model(name)[0], num_beams=2))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a process is forked")
def test_a_trunk_in_a_process(world: Any, tmp_path: Path) -> None:
    """All that crosses passes through its shared memory, there and back."""
    whole, family = model("gemma3n_text")
    fields = {**CASES["gemma3n_text"][0], "model_type": family.model_type, "architecture": family.architecture}
    arguments = ", ".join(f"{field}={value!r}" for field, value in fields.items())
    world.install(
        "gemma3n_text",
        "from splitlearn_core import ModelFamily, hookimpl\n\n\n@hookimpl\ndef splitlearn_model_families():\n"
        f"    return [ModelFamily({arguments}, uniform_layers=False, measured_cache=True)]\n",
    )
    whole.save_pretrained(tmp_path / "model")
    handle = start_process(ProcessLoad(str(tmp_path / "model"), (2, 4)))
    try:
        ends = load_split_model(None, (2, 4), tmp_path / "model", parts=("bottom", "top"), progress=False)
        split = SplitCausalLM(ends.bottom, handle.component, ends.top)
        assert equal(steps(split, 7, 1, 3), steps(whole, 7, 1, 3))
        assert equal(generated(split), generated(whole))
        losses = []
        for trained in (whole, split):
            trained.zero_grad()
            output = trained(input_ids=batch(7), labels=batch(7), use_cache=False)
            output.loss.backward()
            losses.append(output.loss.detach())
        assert torch.equal(*losses)
        expected = whole.get_parameter("model.embed_tokens_per_layer.weight").grad
        assert torch.equal(ends.bottom.get_parameter("model.embed_tokens_per_layer.weight").grad, expected)
    finally:
        whole.zero_grad()
        assert handle.kill().status == 0


def test_a_session_is_rebuilt(name: str) -> None:
    """The journal keeps all that crossed: a restart of the host in the middle of a generation does not change it."""
    bottom, trunk, top = parts_of(name)
    endpoint = MemoryEndpoint(lambda: SessionTable(trunk, SessionLimits(max_tokens=64)))
    endpoint.before = lambda number, _: endpoint.restart() if number == 5 else None
    assert equal(generated(SplitCausalLM(bottom, remote(endpoint), top)), generated(model(name)[0]))


@pytest.mark.parametrize("place", ["here", "at a host"])
def test_gradients_are_equal(name: str, place: str) -> None:
    """Those of the ends, of embeddings to which gradients come by every way that crosses, too."""
    whole = model(name)[0]
    bottom, trunk, top = parts_of(name)
    far = remote(MemoryEndpoint(lambda: SessionTable(trunk))) if place == "at a host" else trunk
    split = SplitCausalLM(bottom, far, top)
    labels = batch(7)
    losses = []
    for trained in (whole, split):
        trained.zero_grad()
        output = trained(input_ids=batch(7), labels=labels, use_cache=False)
        output.loss.backward()
        losses.append(output.loss.detach())
    assert torch.equal(*losses)
    expected = {key: parameter.grad for key, parameter in whole.named_parameters()}
    # Of a tied tensor, each component has a part of the gradient.
    tied = ("model.embed_tokens.", "lm_head.")
    for part in (bottom, top):
        for key, parameter in part.named_parameters():
            if key.startswith(tied) or any(f".{shared}." in key for shared in model(name)[1].shared_modules):
                continue
            got, wanted = parameter.grad, expected[key]
            assert (got is None) == (wanted is None), key
            assert wanted is None or torch.equal(got, wanted), key
    whole.zero_grad()


def test_other_tensors_are_sent_as_they_are(name: str) -> None:
    """An encoding with fewer bits is for hidden states; and what a host could only send back is not sent back."""
    bottom, trunk, top = parts_of(name)
    endpoint = MemoryEndpoint(lambda: SessionTable(trunk))
    with torch.no_grad():
        SplitCausalLM(bottom, remote(endpoint, wire="int8"), top)(input_ids=batch(7), use_cache=False)
    (frame,) = (frame for frame in endpoint.frames if frame.kind is Kind.STEP)
    others = model(name)[1].crossing.keys() - {"hidden_states"}
    assert frame.meta["encoded"].keys() == {"hidden_states"}
    assert {spec.name: spec.dtype for spec in frame.tensors} == {"hidden_states": "U8", **dict.fromkeys(others, "F32")}
    reply = {spec.name for spec in endpoint.answered(frame).tensors}
    assert reply == {"output", *model(name)[1].layer_results}


@torch.no_grad()
def test_components_alone(name: str) -> None:
    """A component takes what the one before returned, or each tensor by its name; and refuses less, or others."""
    bottom, trunk, top = parts_of(name)
    family = model(name)[1]
    others = family.crossing.keys() - {"hidden_states"}
    left: Any = bottom(input_ids=batch(5))
    named = {"hidden_states": left.last_hidden_state, **{key: left[key] for key in others}}
    sizes = {key: tensor.shape(4) for key, tensor in trunk.crossing.items()}
    assert {key: tuple(value.shape) for key, value in named.items()} == {key: (2, 5, *sizes[key]) for key in named}
    once, again = trunk(hidden_states=left), trunk(**named)
    assert torch.equal(once.last_hidden_state, again.last_hidden_state)
    assert torch.equal(top(hidden_states=once).logits, model(name)[0](input_ids=batch(5), use_cache=False).logits)
    with pytest.raises(ConfigurationError, match=f"{next(iter(others))} is NoneType; what crosses this cut is"):
        trunk(hidden_states=left.last_hidden_state)
    with pytest.raises(ConfigurationError, match=r"hidden_states is .* what crosses this cut is") as caught:
        trunk(**{**named, "hidden_states": named["hidden_states"][..., :5]})
    assert caught.value.hint
    far = remote(MemoryEndpoint(lambda: SessionTable(trunk)))
    with pytest.raises(ConfigurationError, match="what crosses this cut is"):
        far(hidden_states=left.last_hidden_state)
    nothing = {key: torch.full_like(value, torch.nan) for key, value in named.items()}
    with pytest.raises(RemoteError, match="values that are not finite"):
        far(**nothing)


def small_gemma4(name: str, **values: Any) -> tuple[Any, ModelFamily]:
    """Return a model whose last two layers use keys and values of others, alone or as the decoder of several."""
    fields, own = CASES["gemma4_text"]
    if name not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    kinds = ["full_attention", *["sliding_attention"] * 2, "full_attention", "sliding_attention", "full_attention"]
    values = {**SIZES, **own, "num_kv_shared_layers": 2, "layer_types": kinds, **values}
    if name == "gemma4":
        ids = {f"{what}_token_id": 95 + number for number, what in enumerate(("image", "video", "audio"))}
        values = {"text_config": {"model_type": "gemma4_text", **values}, "vision_config": None, **ids}
        fields = {**fields, "base": "model.language_model", "text_config": "text_config", "bottom_arguments": ()}
    model_class = transformers.Gemma4ForConditionalGeneration if name == "gemma4" else transformers.Gemma4ForCausalLM
    torch.manual_seed(0)
    whole: Any = model_class._from_config(AutoConfig.for_model(name, **values), dtype=torch.float32).eval()
    for parameter in whole.parameters():
        parameter.data = torch.randn(parameter.shape) * 0.15 + (parameter == 1).all()
    family = ModelFamily(
        model_type=name, architecture=model_class.__name__, uniform_layers=False, measured_cache=True, **fields
    )
    return whole, family


def cut_at(points: tuple[int, ...], whole: Any, family: ModelFamily) -> list[Any]:
    edges = (None, *points, None)
    return [
        component_from_state_dict(family, kind_of(part), whole.state_dict(), whole.config, start, end)
        for part, start, end in zip(component_names(len(points) + 1), edges, edges[1:], strict=False)
    ]


@pytest.mark.newest
@pytest.mark.parametrize("name", ["gemma4_text", "gemma4"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_tokens_whose_logits_are_not_kept(name: str, attention: str) -> None:
    """Layers that use keys and values of others leave them out, in the top alone, and of what crossed as well."""
    whole, family = small_gemma4(name)
    whole.set_attn_implementation(attention)
    split = SplitCausalLM(*cut_at((1, 2), whole, family))
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :2] = 0
    with torch.no_grad():
        for kept in (0, 1, 3, torch.tensor([0, 3])):
            arguments = {"input_ids": batch(7), "attention_mask": mask, "use_cache": False, "logits_to_keep": kept}
            assert torch.equal(split(**arguments).logits, whole(**arguments).logits)
    assert equal(generated(split, attention_mask=mask), generated(whole, attention_mask=mask))
    settings = {"input_ids": batch(7)[:1], "attention_mask": mask[1:], "prompt_lookup_num_tokens": 2}
    assert equal(*([model.generate(**settings, max_new_tokens=6, do_sample=False)] for model in (split, whole)))


@pytest.mark.newest
@torch.no_grad()
@pytest.mark.parametrize("name", ["gemma4_text", "gemma4"])
def test_embeddings_in_place_of_token_ids(name: str) -> None:
    """The ids are found by exact embeddings, and for others the slices are given; the bottom alone takes both."""
    whole, family = small_gemma4(name)
    split = SplitCausalLM(*cut_at((1, 2), whole, family))
    exact = whole.get_input_embeddings()(batch(7))
    slices = torch.randn(2, 7, 6, 8)
    for given in ({"inputs_embeds": exact}, {"inputs_embeds": exact * 1.1, "per_layer_inputs": slices}):
        assert torch.equal(split(**given, use_cache=False).logits, whole(**given, use_cache=False).logits)
    with pytest.raises(RuntimeError, match="do not exactly match the embedding weights"):
        split(inputs_embeds=exact * 1.1, use_cache=False)


@pytest.mark.newest
def test_a_model_without_what_may_cross() -> None:
    """It has hidden states at its cuts, which may be treated, and lacks the modules that make the rest."""
    whole, family = small_gemma4("gemma4_text", num_kv_shared_layers=0, hidden_size_per_layer_input=0)
    bottom, trunk, top = cut_at((2, 4), whole, family)
    assert bottom.crossing == {}
    split = SplitCausalLM(bottom, trunk, top, cuts=[Cut(clip=1e9), Cut()])
    assert equal(steps(split, 7, 1, 3), steps(whole, 7, 1, 3))
    assert isinstance(bottom(input_ids=batch(3)), torch.Tensor)


def test_cuts_that_treat_hidden_states_alone_are_refused(name: str) -> None:
    """Noise on hidden states would hide nothing of what crosses with them."""
    with pytest.raises(ConfigurationError, match="cross") as caught:
        SplitCausalLM(*parts_of(name), cuts=[Cut(clip=1.0, noise=1.0), Cut()])
    assert caught.value.hint


def test_what_crosses_is_counted() -> None:
    """Of the slices for layers, as many as there are layers after the first cut."""
    whole, family = model("gemma3n_text")
    config = whole.config.to_dict()
    ranges = {"bottom": LayerRange(0, 2, 6), "trunk": LayerRange(2, 4, 6), "top": LayerRange(4, 6, 6)}
    assert cut_bytes(family, config, ["bfloat16"], ranges.values()) == 2 * (4 * 32 + 4 * 8)
    with pytest.raises(ConfigurationError, match="altup_num_inputs = None"):
        crossing_tensors(family, {**config, "altup_num_inputs": None})
    without = crossing_tensors(family, {**config, "hidden_size_per_layer_input": 0})
    assert list(without) == ["hidden_states"]


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"crossing": {"x": ("sequence", "hidden_size")}}, "crossing must be a mapping"),
        ({"crossing": {"x": ("batch", "sequence")}, "layer_results": ("y",)}, "layer_results must be names in"),
        ({"crossing": {"x": ("batch", "sequence")}, "layer_results": ("x",)}, "layers_return_tuple must be True"),
        ({"zero_arguments": {"x": "y"}}, "zero_arguments must be a mapping of names to names in crossing"),
        ({"shared_modules": {"x": ("layer_types", "hybrid")}}, "shared_modules must be a mapping"),
    ],
)
def test_wrong_descriptions_are_refused(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        ModelFamily(model_type="x", architecture="X", **fields)
