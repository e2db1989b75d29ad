"""From checkpoint keys to module keys to components."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from splitlearn_core import ConfigurationError, ModelFamily
from splitlearn_core.plan.keys import map_keys, place_keys
from splitlearn_core.plan.split_points import split_layers
from splitlearn_core.plan.splitplan import parse_parts, plan_components, resolve_dtype
from splitlearn_core.types import ALL_PARTS, Component, TensorInfo

pytestmark = pytest.mark.light

FAMILY = ModelFamily(model_type="llama", architecture="LlamaForCausalLM")
GPT = ModelFamily(
    model_type="gpt",
    architecture="X",
    base="transformer",
    layers="h",
    embedding="wte",
    norm="ln_f",
    zero_outside_bottom=("wpe",),
    skip_outside_bottom=("drop",),
    ignored_suffixes=(".attn.bias", ".masked_bias"),
    renamed=((".gamma", ".weight"), (".beta", ".bias")),
)
CONFIG = {"num_hidden_layers": 12, "tie_word_embeddings": False}
ENDS = ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]


def place(
    family: ModelFamily, keys: list[str], config: dict[str, Any] = CONFIG, cuts: tuple[int, int] = (2, 10)
) -> Any:
    return place_keys(family, config, map_keys(family, keys), split_layers(family, config, cuts))


def test_layers_go_to_the_component_that_owns_them() -> None:
    """Layer numbers are numbers: layer 1 is no prefix of layers 10 and 11."""
    table = place(FAMILY, [*(f"model.layers.{layer}.mlp.weight" for layer in range(12)), *ENDS])

    layers = {
        component: sorted(int(name.split(".")[2]) for name in names if ".layers." in name)
        for component, names in table.sources.items()
    }
    assert layers == {Component.BOTTOM: [0, 1], Component.TRUNK: list(range(2, 10)), Component.TOP: [10, 11]}


def test_ends_go_to_the_ends() -> None:
    """The embedding is the bottom's; the final norm and the head are the top's."""
    table = place(FAMILY, ENDS)

    assert table.sources == {
        Component.BOTTOM: {"model.embed_tokens.weight": "model.embed_tokens.weight"},
        Component.TRUNK: {},
        Component.TOP: {"model.norm.weight": "model.norm.weight", "lm_head.weight": "lm_head.weight"},
    }
    assert (table.tied, table.separate_ends) == ((), None)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("transformer.h.3.mlp.weight", "transformer.h.3.mlp.weight"),
        ("h.3.mlp.weight", "transformer.h.3.mlp.weight"),
        ("wte.weight", "transformer.wte.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("h.3.ln_1.gamma", "transformer.h.3.ln_1.weight"),
        ("h.3.ln_1.beta", "transformer.h.3.ln_1.bias"),
        ("h.3.attn.bias", None),
        ("transformer.h.3.attn.masked_bias", None),
        ("h.3.attn.c_attn.bias", "transformer.h.3.attn.c_attn.bias"),
    ],
)
def test_a_key_is_mapped_by_the_familys_tables(key: str, name: str | None) -> None:
    """A missing base prefix is added, old names are renamed, ignored tensors are left out."""
    assert map_keys(GPT, [key]) == {key: name}


def test_what_is_added_to_the_embeddings_is_the_bottoms() -> None:
    """Position embeddings belong to the same component as the token embedding."""
    table = place(GPT, ["wte.weight", "wpe.weight", "ln_f.weight", "lm_head.weight"])

    assert sorted(table.sources[Component.BOTTOM]) == ["transformer.wpe.weight", "transformer.wte.weight"]


@pytest.mark.parametrize("present", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_tied_tensor_serves_both_ends(present: str) -> None:
    """One tensor under either name becomes the embedding and the head."""
    table = place(FAMILY, ["model.norm.weight", present], {**CONFIG, "tie_word_embeddings": True})

    assert table.sources[Component.BOTTOM] == {"model.embed_tokens.weight": present}
    assert table.sources[Component.TOP]["lm_head.weight"] == present
    assert (table.tied, table.separate_ends) == ((present,), None)


def test_a_tied_model_with_both_tensors_keeps_both() -> None:
    """Whether they are equal is known only by value, so both are planned."""
    table = place(FAMILY, ENDS, {**CONFIG, "tie_word_embeddings": True})

    assert table.tied == ()
    assert table.separate_ends == ("model.embed_tokens.weight", "lm_head.weight")
    assert table.sources[Component.TOP]["lm_head.weight"] == "lm_head.weight"


def test_a_module_that_layers_share_is_in_each_component() -> None:
    """A file has it under one name, any of them; which layers share one is said by config.json."""
    family = replace(FAMILY, shared_modules={"block": ("kinds", "hybrid", "blocks")})
    config = {**CONFIG, "num_hidden_layers": 6, "kinds": ["plain", "hybrid", "hybrid"] * 2, "blocks": 2}
    keys = ["model.layers.1.block.w", "model.layers.5.block.w", "model.layers.1.own.w"]
    table = place(family, keys, config, (2, 3))
    assert table.sources == {
        "bottom": {"model.layers.1.block.w": keys[0], "model.layers.1.own.w": keys[2]},
        "trunk": {"model.layers.2.block.w": keys[1]},
        "top": {"model.layers.4.block.w": keys[0], "model.layers.5.block.w": keys[1]},
    }
    assert table.tied == (keys[0], keys[1])
    separate = place(family, [*keys, "model.layers.4.block.w"], config, (2, 3))
    assert separate.sources["top"]["model.layers.4.block.w"] == "model.layers.4.block.w"
    for wrong in ({"kinds": None}, {"kinds": ["hybrid"]}, {"blocks": 0}, {"blocks": None}):
        with pytest.raises(ConfigurationError, match="do not say which of its 6 layers share block") as caught:
            place(family, keys, {**config, **wrong}, (2, 3))
        assert caught.value.hint


def test_an_untied_model_without_a_head_gets_none() -> None:
    """Nothing is made up for a model whose config ties nothing."""
    table = place(FAMILY, ["model.embed_tokens.weight", "model.norm.weight"])

    assert sorted(table.sources[Component.TOP]) == ["model.norm.weight"]


@pytest.mark.parametrize(
    "key",
    [
        "model.layers.12.mlp.weight",
        "model.layers.-1.mlp.weight",
        "model.layers.x.mlp.weight",
        "model.layers..mlp.weight",
        "model.layersx.1.mlp.weight",
        "model.embed_tokens_extra.weight",
        "model.normal.weight",
        "lm_head_extra.weight",
        "vision.weight",
        "",
    ],
)
def test_a_tensor_without_a_place_is_unexpected(key: str) -> None:
    """The problem names the key as the file has it, and no component gets the tensor."""
    table = place(FAMILY, [key, *ENDS])

    assert list(table.unexpected) == [key]
    assert not any(key in names.values() for names in table.sources.values())


def test_all_tensors_without_a_place_are_listed() -> None:
    """Unexpected and doubled tensors are noted together."""
    table = place(FAMILY, [*ENDS, "vision.a", "vision.b", "norm.weight"])
    problems = [*table.unexpected, *table.problems]

    assert len(problems) == 3
    for text in ("vision.a", "vision.b", "model.norm.weight and norm.weight"):
        assert any(text in problem for problem in problems)


def test_a_sound_checkpoint_has_no_problems() -> None:
    """Ignored tensors are none either."""
    assert place(FAMILY, ENDS).problems == ()
    assert place(GPT, ["wte.weight", "h.1.attn.bias"]).problems == ()


INFOS = {
    "model.layers.0.w": TensorInfo("model.layers.0.w", "F32", (2, 3), "b.safetensors", 100, 124),
    "model.layers.1.w": TensorInfo("model.layers.1.w", "I64", (2,), "b.safetensors", 40, 56),
    "model.layers.2.w": TensorInfo("model.layers.2.w", "F16", (5,), "a.safetensors", 10, 20),
    "model.embed_tokens.weight": TensorInfo("model.embed_tokens.weight", "F32", (7,), "a.safetensors", 20, 48),
}
SIZES = {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "tie_word_embeddings": True}


def plan_of(dtype: str = "float32", **sizes: object) -> Any:
    config = {**SIZES, **sizes}
    ranges = split_layers(FAMILY, config, (1, 2))
    table = place_keys(FAMILY, config, map_keys(FAMILY, INFOS), ranges)
    return plan_components(FAMILY, config, table, ranges, INFOS, dict.fromkeys(Component, dtype))


def test_tensors_are_planned_in_file_order() -> None:
    """A component reads each shard from front to back."""
    bottom, trunk, top = plan_of()

    assert [tensor.info.key for tensor in bottom.tensors] == ["model.embed_tokens.weight", "model.layers.0.w"]
    assert (bottom.nbytes, bottom.parameters, bottom.shards) == (52, 13, ("a.safetensors", "b.safetensors"))
    assert (trunk.nbytes, trunk.parameters) == (16, 2)
    assert {tensor.module_key for tensor in top.tensors} == {"model.layers.2.w", "lm_head.weight"}


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float32", [52, 16, 48]), ("bfloat16", [26, 16, 24]), ("float64", [104, 16, 96])]
)
def test_loaded_bytes_follow_the_dtype(dtype: str, expected: list[int]) -> None:
    """Floating tensors take on the dtype, whole numbers keep theirs."""
    assert [part.loaded_bytes(dtype) for part in plan_of()] == expected


@pytest.mark.parametrize(
    ("sizes", "per_layer"),
    [({}, 256), ({"num_key_value_heads": 2}, 128), ({"head_dim": 16}, 512), ({"num_key_value_heads": None}, 256)],
    ids=["as many as heads", "grouped", "head_dim", "null"],
)
def test_the_cache_of_a_token_is_counted(sizes: dict[str, object], per_layer: int) -> None:
    """Keys and values of each of a component's layers, in the planned dtype."""
    assert [part.kv_bytes_per_token for part in plan_of(**sizes)] == [per_layer] * 3
    assert plan_of("float16", **sizes)[0].kv_bytes_per_token == per_layer // 2


@pytest.mark.parametrize("value", [None, 0, -4, "four", 4.0, [4]], ids=repr)
@pytest.mark.parametrize("name", ["hidden_size", "num_attention_heads"])
def test_a_rubbish_size_is_refused(name: str, value: object) -> None:
    """The message names the key of config.json and what it says."""
    with pytest.raises(ConfigurationError, match=name):
        plan_of(**{name: value})


@pytest.mark.parametrize("value", ["two", [2], -2, 0.5], ids=repr)
@pytest.mark.parametrize("name", ["num_key_value_heads", "head_dim"])
def test_a_rubbish_optional_size_is_refused(name: str, value: object) -> None:
    """A size that may be left out may not be rubbish."""
    with pytest.raises(ConfigurationError, match=name):
        plan_of(**{name: value})


@pytest.mark.parametrize(
    ("asked", "config", "dtype"),
    [
        ("auto", {"dtype": "bfloat16"}, "bfloat16"),
        ("auto", {"torch_dtype": "float16"}, "float16"),
        ("auto", {"dtype": "float16", "torch_dtype": "float32"}, "float16"),
        ("auto", {"dtype": None}, "float32"),
        ("auto", {}, "float32"),
        ("float16", {"dtype": "bfloat16"}, "float16"),
        ("torch.float64", {}, "float64"),
    ],
)
def test_the_dtype_is_that_of_from_pretrained(asked: str, config: dict[str, object], dtype: str) -> None:
    """The requested dtype, else that of config.json, else the first floating dtype in the file."""
    assert resolve_dtype(asked, config, INFOS.values()) == dtype


def test_the_dtype_of_integers_alone_is_the_default() -> None:
    """Without a floating tensor, float32 is left."""
    assert resolve_dtype("auto", {}, [INFOS["model.layers.1.w"]]) == "float32"


@pytest.mark.parametrize("dtype", ["nonsense", "", "int8", "torch.int64", "float8_e4m3fn", "F32", "None"])
def test_a_dtype_that_is_none_is_refused(dtype: str) -> None:
    """The hint says how to do without."""
    with pytest.raises(ConfigurationError, match="dtype") as caught:
        resolve_dtype(dtype, {}, ())

    assert "auto" in caught.value.hint


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ("trunk", ["trunk"]),
        (["top", "bottom"], ["bottom", "top"]),
        (("trunk", "trunk"), ["trunk"]),
        (iter(["top"]), ["top"]),
        ((Component.TOP,), ["top"]),
    ],
    ids=["one name", "order of the model", "twice", "an iterator", "members"],
)
def test_parts_are_names_of_components(parts: Any, expected: list[str]) -> None:
    """One name or several, in any order."""
    assert [str(part) for part in parse_parts(parts)] == expected


@pytest.mark.parametrize("parts", ["head", ["bottom", "head"], (), [], "", [1], ["Trunk"], None, 3], ids=repr)
def test_parts_that_are_none_are_refused(parts: Any) -> None:
    """The hint lists the three."""
    with pytest.raises(ConfigurationError) as caught:
        parse_parts(parts)

    assert "bottom, trunk, top" in caught.value.hint


def test_parts_that_are_left_out_are_all() -> None:
    """The default is all of the components that there are; the same names from a caller are taken at their word."""
    there = ("bottom", "trunk1", "trunk2", "top")
    assert parse_parts(ALL_PARTS, there) == there
    assert parse_parts(["top", "trunk2"], there) == ("trunk2", "top")
    with pytest.raises(ConfigurationError, match="parts names 'trunk'") as caught:
        parse_parts(("bottom", "trunk", "top"), there)
    assert "bottom, trunk1, trunk2, top" in caught.value.hint
