"""Types whose models are encoders, or have one: configured as a decoder they are split, and otherwise refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from splitlearn_core import (
    BrokenPluginError,
    InvalidSplitError,
    ModelFamily,
    SplitCausalLM,
    load_split_directory,
    load_split_model,
    merge_split,
    plan_split,
    save_split,
)
from splitlearn_core.build.construction import component_from_state_dict
from splitlearn_core.testing.worlds import random_model as random_model_of
from splitlearn_core.testing.worlds import tiny_config, write_checkpoint
from splitlearn_core.types import Component

pytestmark = [
    pytest.mark.libs,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

CUTS, SINGLE = (2, 4), "model.safetensors"
BIAS, HEAD = "cls.predictions.bias", "cls.predictions.decoder"
IDS = torch.tensor([[5, 17, 42, 99, 3], [7, 1, 64, 23, 9]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {
        "architecture": "BertLMHeadModel",
        "base": "bert",
        "layers": "encoder.layer",
        "embedding": "embeddings.word_embeddings",
        "norm": "",
        "head": HEAD,
        "head_bias": BIAS,
        "before_head": ("cls.predictions.transform",),
        "zero_outside_bottom": ("embeddings.position_embeddings", "embeddings.token_type_embeddings"),
        "skip_outside_bottom": ("embeddings.LayerNorm", "embeddings.dropout"),
        "config_defaults": {"tie_word_embeddings": True, "is_decoder": False},
        "required_values": {"is_decoder": True},
    },
    # Embeddings that are joined, projected and then added to others.
    "roc_bert": {
        "architecture": "RoCBertForCausalLM",
        "base": "roc_bert",
        "layers": "encoder.layer",
        "embedding": "embeddings.word_embeddings",
        "norm": "",
        "head": HEAD,
        "head_bias": BIAS,
        "before_head": ("cls.predictions.transform",),
        "zero_outside_bottom": (
            *("embeddings.shape_embed", "embeddings.pronunciation_embed"),
            *("embeddings.position_embeddings", "embeddings.token_type_embeddings"),
        ),
        "skip_outside_bottom": ("embeddings.map_inputs_layer", "embeddings.LayerNorm", "embeddings.dropout"),
        "enter_at_layers": True,
        "config_defaults": {"tie_word_embeddings": True, "is_decoder": False},
        "required_values": {"is_decoder": True},
    },
    "bart": {
        "architecture": "BartForCausalLM",
        "base": "model",
        "layers": "decoder.layers",
        "embedding": "decoder.embed_tokens",
        "norm": "",
        "zero_outside_bottom": ("decoder.embed_positions",),
        "skip_outside_bottom": ("decoder.layernorm_embedding",),
        "enter_at_layers": True,
        "config_names": {
            "num_hidden_layers": "decoder_layers",
            "num_attention_heads": "decoder_attention_heads",
            "hidden_size": "d_model",
        },
        "config_defaults": {"tie_word_embeddings": True, "is_encoder_decoder": True},
        "required_values": {"is_encoder_decoder": False},
    },
}
#: The decoder has other numbers of layers and heads than the encoder, which it does not use.
VALUES: dict[str, dict[str, Any]] = {
    "bert": {"is_decoder": True},
    "roc_bert": {"is_decoder": True},
    "bart": {
        "is_encoder_decoder": False,
        "decoder_layers": 6,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 48,
        "encoder_layers": 8,
    },
}


@pytest.fixture(params=FAMILIES)
def model_type(request: pytest.FixtureRequest, world: Any) -> str:
    """Return a type whose family is installed."""
    install(world, request.param)
    return str(request.param)


def install(world: Any, model_type: str) -> None:
    fields = ", ".join(
        f"{name}={value!r}" for name, value in {"model_type": model_type, **FAMILIES[model_type]}.items()
    )
    imports = "from splitlearn_core import ModelFamily, hookimpl\n\n\n@hookimpl\n"
    world.install(model_type, f"{imports}def splitlearn_model_families():\n    return [ModelFamily({fields})]\n")


def make(model_type: str, **values: Any) -> Any:
    config = tiny_config(type(AutoConfig.for_model(model_type)), **{**VALUES[model_type], **values})
    return random_model_of(getattr(transformers, FAMILIES[model_type]["architecture"]), config)


def split(folder: Path) -> Any:
    model = SplitCausalLM(*load_split_model(None, CUTS, folder))  # type: ignore[arg-type]  # all parts
    model.generation_config.eos_token_id = None
    return model


@torch.no_grad()
def results(model: Any, **arguments: Any) -> tuple[torch.Tensor, ...]:
    """Return logits without a cache, and tokens and logits with one."""
    plain = model(input_ids=IDS, attention_mask=MASK, **arguments, use_cache=False).logits
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    output = model.generate(
        input_ids=IDS, attention_mask=MASK, **settings, output_logits=True, return_dict_in_generate=True
    )
    return plain, output.sequences, *output.logits


def same(first: tuple[torch.Tensor, ...], second: tuple[torch.Tensor, ...]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.parametrize("tied", [True, False])
def test_a_decoder_is_equal_to_the_unsplit_one(model_type: str, tied: bool, tmp_path: Path) -> None:
    """Tied and untied, through prefill and decoding; saved and merged, its files hold the same tensors."""
    whole = make(model_type, tie_word_embeddings=tied)
    folder = write_checkpoint(tmp_path / "whole", whole)
    parts = load_split_model(None, CUTS, folder)

    assert same(results(split(folder)), results(whole))
    assert split(folder).state_dict().keys() == whole.state_dict().keys()
    save_split(parts, tmp_path / "split")
    assert same(results(SplitCausalLM(*load_split_directory(tmp_path / "split"))), results(whole))
    merge_split(tmp_path / "split", out=tmp_path / "merged")
    stored, merged = (load_file(where / SINGLE) for where in (folder, tmp_path / "merged"))
    assert stored.keys() == merged.keys()
    assert all(torch.equal(stored[key], merged[key]) for key in stored)


def test_a_model_with_an_encoder_is_refused(model_type: str, tmp_path: Path) -> None:
    """With the value that makes a decoder of it; without the value, the default of the class counts."""
    folder = write_checkpoint(tmp_path / "whole", make(model_type))
    config = json.loads((folder / "config.json").read_text())
    for name, required in FAMILIES[model_type]["required_values"].items():
        for values in ({**config, name: not required}, {key: value for key, value in config.items() if key != name}):
            (folder / "config.json").write_text(json.dumps(values))
            with pytest.raises(InvalidSplitError) as caught:
                plan_split(folder, CUTS)
            assert f"the model is no causal decoder ({name} is {not required}, not {required})" in caught.value.message


def test_the_bias_of_the_head_is_one_tensor(world: Any, tmp_path: Path) -> None:
    """In a tied model, under whichever of its two names the file has it; only the top has it."""
    install(world, "bert")
    folder = write_checkpoint(tmp_path / "whole", make("bert"))
    # Copies: older safetensors maps the file, which is written again.
    tensors = {key: tensor.clone() for key, tensor in load_file(folder / SINGLE).items()}
    assert f"{HEAD}.bias" not in tensors
    for names in ((BIAS,), (f"{HEAD}.bias",), (BIAS, f"{HEAD}.bias")):
        others = {key: value for key, value in tensors.items() if key != BIAS}
        save_file({**others, **{name: tensors[BIAS].clone() for name in names}}, folder / SINGLE, {"format": "pt"})
        bottom, trunk, top = load_split_model(None, CUTS, folder)
        assert not any(name.endswith("predictions.bias") for part in (bottom, trunk) for name in part.state_dict())
        shared = top.get_parameter(BIAS) is top.get_parameter(f"{HEAD}.bias")
        assert shared == (len(names) == 1)
        assert torch.equal(top.get_parameter(f"{HEAD}.bias"), tensors[BIAS])
    fields: dict[str, Any] = FAMILIES["bert"]
    whole = make("bert")
    family = ModelFamily(model_type="bert", **fields)
    made = component_from_state_dict(family, Component.TOP, whole.state_dict(), whole.config, CUTS[1], None)
    assert torch.equal(made.get_parameter(BIAS), whole.cls.predictions.bias)
    broken = ModelFamily(model_type="bert", **{**fields, "head_bias": "cls.bias"})
    with pytest.raises(BrokenPluginError, match=r"names cls\.bias"):
        component_from_state_dict(broken, Component.TOP, whole.state_dict(), whole.config, CUTS[1], None)


@torch.no_grad()
def test_what_an_encoder_has_made_reaches_every_layer(world: Any, tmp_path: Path) -> None:
    """Its hidden states, through a class whose forward takes anything (BART's wrapper of its decoder)."""
    install(world, "bart")
    whole = make("bart")
    folder = write_checkpoint(tmp_path / "whole", whole)
    seen = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    plain, given = (
        [model(input_ids=IDS, use_cache=False, **states).logits for model in (split(folder), whole)]
        for states in ({}, {"encoder_hidden_states": seen})
    )
    assert torch.equal(*given)
    assert not torch.equal(plain[0], given[0])


def test_the_configuration_of_the_whole_model_stays_as_it_was() -> None:
    """A component has one of its own, with the decoder's number of layers by the common name."""
    whole = make("bart")
    fields: dict[str, Any] = FAMILIES["bart"]
    family = ModelFamily(model_type="bart", **fields)
    before = whole.config.to_dict()
    trunk = component_from_state_dict(family, Component.TRUNK, whole.state_dict(), whole.config, *CUTS)
    assert trunk.config.num_hidden_layers == trunk.layer_range.total == 6
    assert whole.config.to_dict() == before
