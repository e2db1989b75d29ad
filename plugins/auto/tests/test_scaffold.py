"""``splitlearn plugins new``: what it finds out, what it writes, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, cache_utils

from splitlearn_auto import NewPlugin, new_plugin
from splitlearn_auto.deriving import check_causal, derive_parts
from splitlearn_auto.examining import _WITH_SHARING, _required_values, _without_more, examine
from splitlearn_auto.findings import CannotSplitError, Derived, Question
from splitlearn_auto.making import tiny_config, tiny_model, with_values
from splitlearn_auto.observing import with_noise
from splitlearn_auto.package import package_files
from splitlearn_auto.proving import differences, is_packable
from splitlearn_auto.rendering import family_module, literal
from splitlearn_core import (
    ConfigurationError,
    InvalidSplitError,
    MissingFileError,
    ModelFamily,
    PluginError,
    SplitCausalLM,
    UnknownModelTypeError,
    load_split_directory,
    load_split_model,
    merge_split,
    plan_split,
    save_split,
)
from splitlearn_core.extension import CACHE_FIELD, layer_cache_sizes

pytestmark = pytest.mark.libs


@contextmanager
def every_mode() -> Iterator[None]:
    """Change all modes of torch that a caller may have set."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        # Whoever ends the inference mode finds gradients disabled all the same.
        with torch.no_grad(), torch.inference_mode(), torch.autocast("cpu"), torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


# -- what it finds out ------------------------------------------------------------------------------


def test_a_type_is_examined_alike_in_every_mode() -> None:
    """What is derived and proven depends on no mode of the caller's."""
    with every_mode():
        derived = examine("llama", {})

    assert derived.questions == []
    assert (derived.attention, derived.dtypes) == (("eager", "sdpa"), ("float32", "bfloat16"))
    assert derived.notes == []


def test_an_ordinary_decoder_is_its_class_alone(examined: Callable[..., Derived]) -> None:
    """Of llama nothing is said but its class, what old files carry, and the defaults of its configuration."""
    derived = examined("llama", {})
    assert derived.fields == {
        "model_type": "llama",
        "architecture": "LlamaForCausalLM",
        "packable": True,
        "ignored_suffixes": (".rotary_emb.inv_freq",),
        # Not num_key_value_heads and head_dim, which follow the other two.
        "config_defaults": {
            "num_hidden_layers": 32,
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "tie_word_embeddings": False,
        },
    }
    assert derived.questions == []
    assert list(derived.variants) == ["plain", "tied"]
    assert derived.attention == ("eager", "sdpa")


def test_layers_through_which_a_token_reaches_others_are_not_packable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A split model and the unsplit one would be equal, and each session would see tokens of the others."""
    from transformers.models.llama import modeling_llama

    family = ModelFamily(model_type="llama", architecture="LlamaForCausalLM")

    def model() -> Any:
        return tiny_model(tiny_config("llama", AutoConfig.for_model("llama"), {})[0])

    assert is_packable(model(), family)
    forward = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", lambda self, x: forward(self, x.mean(dim=1, keepdim=True)))
    assert not is_packable(model(), family)


def test_attention_without_the_interface_of_transformers_is_not_packable() -> None:
    """BLOOM's layers attend by code of their own, to all tokens of a row."""
    config, _ = tiny_config("bloom", AutoConfig.for_model("bloom"), {})
    family = ModelFamily(
        model_type="bloom",
        architecture="BloomForCausalLM",
        base="transformer",
        layers="h",
        embedding="word_embeddings",
        norm="ln_f",
        skip_outside_bottom=("word_embeddings_layernorm",),
        layers_return_tuple=True,
        config_names={"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
        config_defaults={"tie_word_embeddings": True},
    )
    assert differences(tiny_model(config), family) == []
    assert not is_packable(tiny_model(config), family)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("bloom", {"skip_outside_bottom": ("word_embeddings_layernorm",), "layers_return_tuple": True}),
        ("gpt_neox", {"skip_outside_bottom": ("emb_dropout",)}),
        ("granite", {"enter_at_layers": True}),
        (
            "opt",
            {
                "layers": "decoder.layers",
                "norm": "decoder.final_layer_norm",
                "zero_outside_bottom": ("decoder.embed_positions",),
                "skip_outside_bottom": ("decoder.project_in",),
                "skip_outside_top": ("decoder.project_out",),
            },
        ),
    ],
)
def test_peculiar_decoders(examined: Callable[..., Derived], model_type: str, expected: dict[str, Any]) -> None:
    """What is peculiar of a type is found by watching it, proven by cutting it, and its switches are turned."""
    derived = examined(model_type, {})
    assert derived.questions == []
    assert {name: derived.fields.get(name) for name in expected} == expected


@pytest.mark.sample(1)
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_tensors_that_are_made_of_others(
    examined: Callable[..., Derived], model_type: str, world: Any, tmp_path: Path
) -> None:
    """Experts lie apart in the file: the family says so, and what is written loads such a file bit-equal."""
    from transformers import AutoModelForCausalLM

    from splitlearn_auto.making import tiny_config

    derived = examined(model_type, {})
    assert derived.questions == []
    assert derived.fields["transformers_tables"] is True
    assert "renamed" not in derived.fields
    assert derived.dtypes == ("float32", "bfloat16")
    world.install(model_type, family_module(derived, model_type))
    config, _ = tiny_config(model_type, AutoConfig.for_model(model_type), {})
    tiny_model(config).save_pretrained(tmp_path / "model")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    split = SplitCausalLM(*load_split_model(None, (2, 4), tmp_path / "model"))
    ids = torch.tensor([[5, 17, 42, 99, 3]])
    with torch.no_grad():
        assert torch.equal(split(ids).logits, whole(ids).logits)


@pytest.mark.parametrize("said", [{}, {"embedding_dropout": 0.1}], ids=["by default at 0", "given"])
def test_a_dropout_in_no_module_is_seen(said: dict[str, Any]) -> None:
    """StarCoder2 drops values in a function, in training alone, and by default with a probability of 0."""
    derived = examine("starcoder2", said)
    assert derived.questions == []
    assert derived.fields["enter_at_layers"] is True
    assert "before the first layer in training" in derived.reasons["enter_at_layers"]
    # Its tests turn it on.
    on = {**derived.fields.get("tiny_config", {}), **derived.variants.get("dropout", {})}
    assert on["embedding_dropout"] > 0


def test_a_dropout_that_reaches_trunk_and_top_is_not_proven() -> None:
    """In training both would drop values of what a component before them has dropped values of already."""

    from splitlearn_auto.making import tiny_sizes

    sizes = tiny_sizes(AutoConfig.for_model("starcoder2"))
    model = tiny_model(AutoConfig.for_model("starcoder2", **sizes, embedding_dropout=0.5))
    said: dict[str, Any] = {"model_type": "starcoder2", "architecture": "Starcoder2ForCausalLM"}
    found = differences(model, ModelFamily(**said))
    assert [line.split(", ", 1)[1] for line in found[:2]] == [
        f"in training, the {part} changes hidden states outside its layers" for part in ("trunk", "top")
    ]
    assert differences(model, ModelFamily(**said, enter_at_layers=True)) == []


def test_layers_that_are_left_out_now_and_then_are_all_watched() -> None:
    """A given model may be one that leaves out nearly all of its layers in each step of training."""
    derived = examine("biogpt", {"model_type": "biogpt", "layerdrop": 0.99, "hidden_dropout_prob": 0.2})
    assert (derived.questions, derived.notes) == ([], [])
    assert derived.fields["tiny_config"]["hidden_dropout_prob"] == 0.2
    assert "layerdrop" not in derived.fields["tiny_config"]
    assert derived.fields["enter_at_layers"] is True


def test_what_is_computed_in_the_default_dtype_is_computed_in_that_of_the_weights() -> None:
    """XGLM asks torch for the default dtype when it makes its positions; transformers sets it to the weights'."""
    derived = examine("xglm", {})
    assert (derived.questions, derived.notes) == ([], [])
    assert derived.dtypes == ("float32", "bfloat16")


def test_names_on_disk_that_transformers_changes_are_renamed(examined: Callable[..., Derived]) -> None:
    """GPT-NeoX has its head under another name on disk than in newer modules."""
    family = examined("gpt_neox", {}).fields
    head = family.get("head", "lm_head")
    assert (head, family.get("renamed", ())) in (("lm_head", (("embed_out.", "lm_head."),)), ("embed_out", ()))


def test_a_given_configuration_is_followed() -> None:
    """Switches of the given model hold for the small one, too; its sizes do not."""
    said = {"model_type": "llama", "attention_bias": True, "hidden_size": 8192, "num_hidden_layers": 80}
    assert examine("llama", said).fields["tiny_config"] == {"attention_bias": True}


@pytest.mark.parametrize(
    ("wrong", "value"),
    [("enter_at_layers", False), ("layers", "layers.0"), ("skip_outside_bottom", ("norm",)), ("norm", "rotary_emb")],
)
def test_a_wrong_family_is_not_proven(wrong: str, value: Any) -> None:
    """A family that is wrong in one field differs, or cannot be cut: the proof is one."""

    from splitlearn_auto.making import tiny_sizes

    known = AutoConfig.for_model("granite")
    config = AutoConfig.for_model("granite", **{**tiny_sizes(known), "embedding_multiplier": 3.0})
    config.dtype = torch.float32
    model = tiny_model(config)
    right: dict[str, Any] = {"enter_at_layers": True, "model_type": "granite", "architecture": "GraniteForCausalLM"}
    assert differences(model, ModelFamily(**right)) == []
    assert differences(model, ModelFamily(**{**right, wrong: value})) != []


def test_a_family_that_cannot_be_cut_is_not_proven() -> None:

    config, _ = tiny_config("llama", AutoConfig.for_model("llama"), {})
    model = tiny_model(config)
    for possible in ([], [2]):
        refused = {number: "they belong together" for number in range(1, 100) if number not in possible}
        family = ModelFamily(
            model_type="llama", architecture="LlamaForCausalLM", impossible_cuts=lambda _, refused=refused: refused
        )
        assert differences(model, family) == ["fewer than two cuts are possible: they belong together"]


def test_a_refused_model_keeps_no_hooks() -> None:

    config, _ = tiny_config("bert", AutoConfig.for_model("bert"), {})
    model = tiny_model(config)
    with pytest.raises(CannotSplitError, match="not a causal decoder"):
        check_causal(model)
    assert not any(module._forward_pre_hooks for module in model.modules())


def _known(*model_types: str) -> list[str]:
    from transformers import CONFIG_MAPPING

    # Older transformers do not have all of them.
    return [name for name in model_types if name in CONFIG_MAPPING]


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "model_type", _known("exaone", "sarvam_moe", "dbrx", "dots1", "moshi", "cohere_compass_text", "nanochat")
)
def test_small_models_of_peculiar_configurations(model_type: str) -> None:
    """Sizes that no class states, parts with sizes of their own, and models of other types with names of their own."""
    if model_type == "dbrx" and transformers.__version__.startswith("5.4."):
        pytest.skip("the code of dbrx in transformers 5.4 reads a value that its configuration does not have")
    derived = examine(model_type, {}, settings=False)
    assert derived.questions == []
    assert derived.dtypes == ("float32", "bfloat16")


@pytest.mark.newest
@pytest.mark.sample(1)
@pytest.mark.parametrize("model_type", _known("dots3_note_text", "roc_bert", "big_bird"))
def test_layers_of_other_sizes_and_ends_of_other_kinds(model_type: str) -> None:
    """Sizes of single layers, embeddings that are joined, and a pooler that hidden states do not pass through."""
    derived = examine(model_type, {}, settings=False)
    assert derived.questions == []
    assert derived.dtypes == ("float32", "bfloat16")


@pytest.mark.parametrize("model_type", _known("gemma4_text"))
def test_what_a_forward_computes_from_token_ids(model_type: str, world: Any, tmp_path: Path) -> None:
    """It is found, and crosses; layers that share keys and values are in one component, switches of theirs included."""
    derived = examine(model_type, {}, settings=False)
    assert derived.questions == []
    assert "required_values" not in derived.fields
    slices = ("batch", "sequence", "layers", "hidden_size_per_layer_input")
    assert derived.fields["crossing"] == {"per_layer_input": slices}
    assert derived.fields["zero_arguments"] == {"per_layer_inputs": "per_layer_input"}
    assert derived.fields["sharing_layers"] == "num_kv_shared_layers"
    assert derived.dtypes == ("float32", "bfloat16")
    world.install(model_type, family_module(derived, model_type))
    config = tiny_config(model_type, AutoConfig.for_model(model_type), {})[0]
    kinds = ["sliding_attention", "full_attention"] * 3
    values = {"num_kv_shared_layers": 3, "layer_types": kinds, "use_double_wide_mlp": True}
    whole = tiny_model(with_values(config, values))
    whole.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    # Files of published models have what no layer of the module has.
    ignored = stored["model.layers.1.self_attn.k_proj.weight"].clone()
    save_file({**stored, "model.layers.5.self_attn.k_proj.weight": ignored}, tmp_path / "model.safetensors")
    with pytest.raises(InvalidSplitError, match="no cut before layer 3: layer 5 uses the keys") as caught:
        plan_split(tmp_path, (1, 3))
    assert "nearest possible is before layer 1" in caught.value.hint
    split = SplitCausalLM(*load_split_model(None, (1,), tmp_path, progress=False))
    ids, settings = torch.tensor([[5, 17, 42, 99, 3]]), {"max_new_tokens": 3, "do_sample": False, "output_scores": True}
    outputs = [model.generate(ids, return_dict_in_generate=True, **settings) for model in (split, whole)]
    assert torch.equal(outputs[0].sequences, outputs[1].sequences)
    assert all(map(torch.equal, outputs[0].scores, outputs[1].scores))


@pytest.mark.parametrize("model_type", _known("gemma4"))
def test_what_the_decoder_of_several_models_computes_from_token_ids(model_type: str) -> None:
    """As of the decoder alone; and values with which nothing more crosses are tried, too."""
    config = tiny_config(model_type, AutoConfig.for_model(model_type), {})[0]
    assert _required_values(config) == {}
    assert derive_parts(tiny_model(config)).zero_arguments == {"per_layer_inputs": "per_layer_input"}
    plain = {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0}
    assert _without_more(with_values(config, _WITH_SHARING)) == plain


@pytest.mark.parametrize("model_type", _known("zaya"))
def test_what_a_layer_computes_for_the_next(model_type: str) -> None:
    derived = examine(model_type, {}, settings=False)
    assert derived.questions == []
    assert derived.fields["crossing"] == {"prev_router_hidden_states": ("batch", "sequence", "router_hidden_size")}
    assert derived.fields["layer_results"] == ("prev_router_hidden_states",)
    assert derived.dtypes == ("float32", "bfloat16")


@pytest.mark.parametrize("model_type", _known("zamba2"))
def test_modules_that_layers_share(model_type: str, world: Any, tmp_path: Path) -> None:
    """They are found, and named by values of config.json; components of a file, and saved ones, equal the model."""
    if transformers.__version__.startswith("5.4."):
        pytest.skip("transformers 5.4 has a class of cache for zamba2 alone")
    derived = examine(model_type, {}, settings=False)
    assert derived.questions == []
    shared = {"shared_transformer": ("layers_block_type", "hybrid", "num_mem_blocks")}
    assert derived.fields["shared_modules"] == shared
    assert derived.fields["config_defaults"]["num_mem_blocks"] == 1
    assert derived.fields["crossing"] == {"original_hidden_states": ("batch", "sequence", "hidden_size")}
    assert derived.dtypes == ("float32", "bfloat16")
    world.install(model_type, family_module(derived, model_type))
    config, _ = tiny_config(model_type, AutoConfig.for_model(model_type), {})
    whole = tiny_model(config)
    whole.save_pretrained(tmp_path / "model")
    split = SplitCausalLM(*load_split_model(None, (2, 4), tmp_path / "model"))
    save_split(split, tmp_path / "split", progress=False)
    ids = torch.tensor([[5, 17, 42, 99, 3]])
    for model in (split, SplitCausalLM(*load_split_directory(tmp_path / "split", progress=False))):
        with torch.no_grad():
            assert torch.equal(model(ids).logits, whole(ids).logits)
    first, last = (f"model.layers.{number}.shared_transformer.self_attn.q_proj.weight" for number in (1, 5))
    assert split.get_parameter(first) is split.get_parameter(last)
    merged = merge_split(tmp_path / "split", out=tmp_path / "merged", progress=False)
    kept, stored = (load_file(folder / "model.safetensors") for folder in (merged, tmp_path / "model"))
    assert kept.keys() == stored.keys()
    assert all(torch.equal(kept[key], tensor) for key, tensor in stored.items())


@pytest.mark.parametrize("model_type", _known("gemma3n_text"))
def test_slices_and_shared_caches(model_type: str, world: Any, tmp_path: Path) -> None:
    """Hidden states of other dimensions and a slice for each layer cross; keys and values of other layers do not."""
    derived = examine(model_type, {}, settings=False)
    assert derived.questions == []
    assert derived.fields["crossing"] == {
        "hidden_states": ("altup_num_inputs", "batch", "sequence", "hidden_size"),
        "per_layer_input": ("batch", "sequence", "layers", "hidden_size_per_layer_input"),
    }
    assert derived.dtypes == ("float32", "bfloat16")
    world.install(model_type, family_module(derived, model_type))
    kinds = ["sliding_attention", "full_attention"] * 4
    config = {"model_type": model_type, "num_hidden_layers": 8, "num_kv_shared_layers": 3, "layer_types": kinds}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidSplitError, match="no cut before layer 5: layer 7 uses the keys") as caught:
        plan_split(tmp_path, (2, 5))
    assert "nearest possible is before layer 3; cuts are possible before layers 1, 2, 3" in caught.value.hint


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("model_type", "required"),
    [("bert", {"is_decoder": True, "add_cross_attention": False}), ("bart", {"is_encoder_decoder": False})],
)
def test_an_encoder_is_examined_as_a_decoder(model_type: str, required: dict[str, Any]) -> None:
    """Where the plain model is not causal, with values of its configuration that a model must then have."""
    derived = examine(model_type, {}, settings=False)
    assert derived.questions == []
    assert derived.fields["required_values"] == required
    assert required.items() <= derived.fields["tiny_config"].items()
    assert all(derived.fields["config_defaults"][name] != required[name] for name in required if name.startswith("is_"))


def test_what_layers_take_and_do_not_use_does_not_cross() -> None:
    """Noise in its place changes nothing."""

    class Layer(torch.nn.Module):
        def __init__(self, uses: float) -> None:
            super().__init__()
            self.uses = uses

        def forward(self, hidden_states: torch.Tensor, extra: list[torch.Tensor]) -> torch.Tensor:
            return hidden_states + self.uses * extra[0]

    state = torch.ones(1, 2, 3, requires_grad=True)
    for uses in (0.0, 1.0):
        result = with_noise("extra", Layer(uses).forward, (), {"hidden_states": state, "extra": [state * 2]})
        assert torch.equal(result, state) == (not uses)
        assert not torch.equal(with_noise("extra", Layer(1.0).forward, (state, [state * 2]), {}), state * 3)


# -- what it refuses --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("cpmant", "not a causal decoder"),
        ("t5", "not a causal language model: transformers has T5ForConditionalGeneration"),
        ("clip", "not a causal language model: transformers has"),
        # Older transformers fails on its configuration.
        ("musicgen", "encoder-decoder|Validation error"),
        ("roformer", "its layers take what encoder.embed_positions computes"),
        ("mllama", r"text alone passes by layers of its 6 \(layers: 3\)"),
        ("rwkv", "keeps no cache of transformers' own kind: what it keeps for the next token is state"),
        # Its modules keep the states themselves.
        ("recurrent_gemma", "keeps no cache of transformers' own kind: its layers keep their states themselves"),
    ],
)
def test_what_cannot_be_split_is_refused_with_the_reason(tmp_path: Path, model_type: str, reason: str) -> None:
    """The type is named, and nothing is written for it."""
    with pytest.raises(CannotSplitError, match=reason) as caught:
        new_plugin(model_type, tmp_path / "out")
    assert model_type in caught.value.message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "near"), [("lama", "'llama'"), ("qwen-3", "'qwen3'"), ("../x", "model_type")])
def test_names_that_are_no_model_type(tmp_path: Path, name: str, near: str) -> None:
    """The nearest is named, and nothing written."""
    with pytest.raises(ConfigurationError, match="knows no model type") as caught:
        new_plugin(name, tmp_path / "out")
    assert near in caught.value.hint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("examined_once")
def test_nothing_is_overwritten(tmp_path: Path) -> None:
    """A folder with something in it, a file and a link are taken; an empty folder is free."""
    full, file, link, empty = (tmp_path / name for name in ("full", "file", "link", "empty"))
    full.mkdir()
    (full / "mine").write_text("mine")
    file.write_text("mine")
    empty.mkdir()
    link.symlink_to(empty)
    for taken in (full, file, link, file / "below"):
        with pytest.raises(ConfigurationError):
            new_plugin("llama", taken)
    assert (full / "mine").read_text() == file.read_text() == "mine"
    assert list(full.iterdir()) == [full / "mine"]
    assert (new_plugin("llama", empty).folder / "pyproject.toml").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file", "full", "link"]


@pytest.mark.usefixtures("examined_once")
def test_a_folder_is_written_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails at the last file leaves nothing behind."""
    write = Path.write_text

    def failing(path: Path, *arguments: Any, **options: Any) -> int:
        if path.name == "LICENSE":
            raise OSError(28, "No space left on device")
        return write(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", failing)
    with pytest.raises(OSError, match="No space left"):
        new_plugin("llama", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("examined_once")
def test_a_type_that_a_plugin_has_is_refused(llama: Any, tmp_path: Path) -> None:
    """The plugin is named; --force writes all the same."""
    with pytest.raises(PluginError, match=r"splitlearn-llama 1\.0"):
        new_plugin("llama", tmp_path / "out")
    assert new_plugin("llama", tmp_path / "out", force=True).verified


@pytest.mark.usefixtures("examined_once")
def test_origins(tmp_path: Path) -> None:
    """A directory and a file are read; one of another type, one that is no JSON and none at all are refused."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "mistral", "sliding_window": None}))
    for origin in (file, tmp_path):
        assert new_plugin("mistral", tmp_path / "out", origin=str(origin), dry_run=True).verified
    with pytest.raises(ConfigurationError, match="'mistral', not 'llama'"):
        new_plugin("llama", tmp_path / "out", origin=str(file))
    file.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        new_plugin("mistral", tmp_path / "out", origin=str(file))
    with pytest.raises(MissingFileError):
        new_plugin("mistral", tmp_path / "out", origin="owner/nowhere", local_files_only=True)
    assert not (tmp_path / "out").exists()


def test_an_origin_that_is_a_file_and_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody means a repository that is named like a file: it is not asked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("splitlearn_auto.knowledge.open_source", lambda *_, **__: pytest.fail("the Hub was asked"))
    for origin in ("x.json", "some/config.json", str(tmp_path / "x.json")):
        with pytest.raises(MissingFileError, match="there is no file") as caught:
            new_plugin("mistral", tmp_path / "out", origin=origin)
        assert origin in caught.value.message


@pytest.mark.usefixtures("examined_once")
def test_a_bundled_model_is_an_origin(world: Any, tmp_path: Path) -> None:
    """As everywhere else; whose plugin carries none, or is not there, is said."""
    carrier = world.folder / "carrier"
    carrier.mkdir()
    (carrier / "__init__.py").touch()
    (carrier / "config.json").write_text(json.dumps({"model_type": "mistral", "sliding_window": None}))
    world.install(
        "mistral", world.source("mistral").replace('ForCausalLM"', 'ForCausalLM", bundled_checkpoint="carrier:."')
    )
    world.install("llama")

    made = new_plugin("mistral", None, origin="bundled:mistral", dry_run=True, force=True)

    assert made.verified
    with pytest.raises(MissingFileError, match="'llama' carries no model"):
        new_plugin("llama", None, origin="bundled:llama", dry_run=True, force=True)
    with pytest.raises(UnknownModelTypeError, match="brandnew"):
        new_plugin("llama", None, origin="bundled:brandnew", dry_run=True, force=True)


@pytest.mark.usefixtures("examined_once")
def test_a_dry_run_asks_for_no_folder(tmp_path: Path, cli: Any) -> None:
    """None is needed, and one that is taken does not matter; otherwise one is asked for by name."""
    (tmp_path / "taken").write_text("mine")

    assert new_plugin("llama", None, dry_run=True).folder is None
    assert new_plugin("llama", tmp_path / "taken", dry_run=True).verified
    code, out, err = cli("plugins", "new", "llama")

    assert (code, out) == (2, "")
    assert "plugins new llama: give --out DIR" in err
    assert (tmp_path / "taken").read_text() == "mine"


def test_what_does_not_hold_is_said_by_a_dry_run_as_well(
    examined: Callable[..., Derived], tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is where a package is written, and in its README."""
    note = "with tie_word_embeddings=True: it differs"
    derived = replace(examined("llama", {}), notes=[note])
    monkeypatch.setattr("splitlearn_auto.examining.examine", lambda *_: derived)

    dry, wet = cli("plugins", "new", "llama", "--dry-run"), cli("plugins", "new", "llama", "--out", tmp_path / "out")

    (said,) = (line for line in dry[2].splitlines() if line.startswith("not covered: "))
    assert said in wet[2].splitlines()
    assert said.removeprefix("not covered: ") == note
    assert note in (tmp_path / "out" / "README.md").read_text()


def test_a_cache_that_no_value_describes_is_measured(examined: Callable[..., Derived]) -> None:
    """Falcon keeps one head of keys and values, which no value of its configuration says."""
    from transformers import AutoModelForCausalLM

    derived = examined("falcon", {})
    assert derived.notes == []
    sizes = {"hidden_size": 32, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 100}
    config = AutoConfig.for_model("falcon", **sizes, multi_query=True)
    planned = layer_cache_sizes(ModelFamily(**derived.fields), config.to_dict(), "float32")
    # The truth: a model of as many layers and heads, and what its cache holds of one token.
    output = AutoModelForCausalLM.from_config(config)(torch.tensor([[1]]), use_cache=True)
    assert [size.per_token for size in planned] == [
        layer.keys.nbytes + layer.values.nbytes for layer in output[CACHE_FIELD].layers
    ]


@pytest.mark.sample(1)
@pytest.mark.skipif(not hasattr(cache_utils, "LinearAttentionLayer"), reason="each type has a cache of its own")
@pytest.mark.parametrize("model_type", ["lfm2", "bamba", "minimax", "mamba"])
def test_layers_with_running_states(examined: Callable[..., Derived], model_type: str) -> None:
    """They are proven together with layers of keys and values, where a type has both; and their caches measured."""
    derived = examined(model_type, {})
    assert (derived.questions, derived.notes) == ([], [])
    assert derived.fields["measured_cache"] is True
    assert derived.dtypes == ("float32", "bfloat16")


# -- what it writes ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory, examined: Callable[..., Derived]) -> NewPlugin:
    """A package for llama."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("splitlearn_auto.examining.examine", examined)
        return new_plugin("llama", tmp_path_factory.mktemp("new") / "splitlearn-llama", licence="MIT")


def test_the_files_of_a_package(package: NewPlugin) -> None:
    """All that a package needs, and a family module within forty lines."""
    written = {path.relative_to(package.folder).as_posix() for path in package.folder.rglob("*") if path.is_file()}
    written = {name for name in written if "__pycache__" not in name}  # of the test that ran its tests
    assert written == set(package.files)
    assert "MIT License" in (package.folder / "LICENSE").read_text()
    assert len(package.files[package.family_file].splitlines()) <= 40
    assert package.folder.stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def test_a_package_without_a_licence() -> None:
    """``none`` leaves the choice open: no file, and no claim."""
    files = package_files(Derived({"model_type": "llama", "architecture": "LlamaForCausalLM"}), "0.1", "none", 2026)
    assert "LICENSE" not in files
    assert "license" not in files["pyproject.toml"].lower()


def test_a_package_is_installed_and_passes_its_own_tests(world: Any, package: NewPlugin, tmp_path: Path) -> None:
    """pip builds and installs it; it is ready; and its test file, as it was written, is green."""
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--isolated", "--no-deps", "--no-build-isolation")
    subprocess.run(
        [*pip, "--no-index", "--target", world.folder, package.folder], check=True, capture_output=True, timeout=120
    )
    listed = world.warm_python("-m", "splitlearn_core", "plugins", "--check", "--json")
    row = next(row for row in json.loads(listed.stdout) if row["model_type"] == "llama")
    assert (row["status"], row["distribution"]) == ("ready", "splitlearn-llama")
    chosen = "test_entry_point or test_import_budget or test_config_defaults or (test_logits and 2-3 and float32)"
    options = ("-q", "-p", "no:cacheprovider", "--rootdir", str(package.folder), "-k", chosen)
    done = world.warm_python("-m", "pytest", *options, str(package.folder / "tests"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def test_questions_are_asked_in_the_file() -> None:
    """The module is sound Python, and shows each question with what was seen."""
    question = Question("norm", 'which one is the "final" norm?', "called after the last layer:\na, b")
    derived = Derived({"model_type": "1x-y", "architecture": "XForCausalLM"}, questions=[question])
    text = family_module(derived, "X")
    names: dict[str, Any] = {}
    exec(compile(text, "family", "exec"), names)
    assert names["splitlearn_model_families"]()[0].model_type == "1x-y"
    assert '# QUESTION (norm): which one is the "final" norm?' in text
    assert "#   a, b" in text


def test_a_dtype_that_does_not_hold_is_not_tested_and_said() -> None:
    """The tests of the package are in those that were equal, and the README has the reason."""
    derived = Derived(
        {"model_type": "x", "architecture": "XForCausalLM"},
        dtypes=("float32",),
        notes=["in bfloat16: a forward differs by up to 1"],
    )
    files = package_files(derived, "0.1.0", "Apache-2.0", 2026)
    assert '    dtypes = ("float32",)\n' in files["tests/test_x_family.py"]
    assert "in bfloat16: a forward differs by up to 1" in files["README.md"]


@pytest.mark.parametrize("value", [{"a": (1, 2.5, None)}, ("x",), (), [], {}, 'a"b\\c\nd', "ä\u2028", True])
def test_values_are_written_as_they_are(value: Any) -> None:
    """What is read back is what was written."""
    assert eval(literal(value)) == value


# -- the command ------------------------------------------------------------------------------------


def test_the_command(world: Any, tmp_path: Path) -> None:
    """Data on stdout, what is to be known on stderr; a refusal is one line and a hint, with exit code 1."""
    new = ("-m", "splitlearn_core", "plugins", "new")
    made = world.warm_python(*new, "stablelm", "--out", str(tmp_path / "out"), "--json")
    assert made.returncode == 0, made.stderr
    answer = json.loads(made.stdout)
    assert (answer["distribution"], answer["verified"]) == ("splitlearn-stablelm", True)
    assert answer["questions"] == []
    assert "to the last bit" in made.stderr
    assert (tmp_path / "out" / "pyproject.toml").is_file()
    refused = world.warm_python(*new, "stablelmm", "--out", str(tmp_path / "other"))
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "did you mean 'stablelm'" in refused.stderr
    assert "Traceback" not in refused.stderr
