"""Checkpoints of several models, of which one is a decoder: components are of the decoder, equal in the whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from splitlearn_core import (
    ConfigurationError,
    ModelFamily,
    SplitCausalLM,
    SplitLearnError,
    TensorMismatchError,
    UnexpectedArgumentError,
    load_component,
    load_split_directory,
    load_split_model,
    merge_split,
    plan_split,
    save_split,
)
from splitlearn_core.factory import ModelRegistry
from splitlearn_core.plan.keys import map_keys
from splitlearn_core.testing.worlds import TINY, parts_equal, random_model, write_checkpoint
from support.hosts import hosting

pytestmark = [
    pytest.mark.libs,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

CUTS, SINGLE = (2, 4), "model.safetensors"
IDS = torch.tensor([[5, 17, 42, 99, 3], [7, 1, 64, 23, 9]])
#: A row of which is padded.
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
#: Two of the text, two of an image, and one of the text.
KINDS = torch.tensor([[0, 1, 1, 0, 0]] * 2)
SMALL = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
TYPE = "mistral3"


@dataclass(frozen=True)
class Several:
    """A type of model, and what is peculiar of a small one."""

    architecture: str
    text: Mapping[str, Any] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)
    family: Mapping[str, Any] = field(default_factory=dict)


def vision(**values: Any) -> dict[str, Any]:
    return {"vision_config": {**SMALL, **values}}


QWEN_VISION = vision(depth=1, embed_dim=32, num_heads=2, out_hidden_size=32)
TYPES = {
    "mistral3": Several("Mistral3ForConditionalGeneration", {}, vision(model_type="pixtral", head_dim=16)),
    "llava": Several("LlavaForConditionalGeneration", {}, vision(model_type="clip_vision_model")),
    "paligemma": Several(
        "PaliGemmaForConditionalGeneration", {}, vision(model_type="siglip_vision_model", projection_dim=32)
    ),
    "idefics3": Several("Idefics3ForConditionalGeneration", {}, vision(), {"base": "model.text_model"}),
    "qwen2_vl": Several("Qwen2VLForConditionalGeneration", MROPE, QWEN_VISION),
    "qwen3_vl_moe": Several(
        "Qwen3VLMoeForConditionalGeneration",
        {**MROPE, **EXPERTS, "mlp_only_layers": [0]},
        vision(depth=1, num_heads=2, out_hidden_size=32, deepstack_visual_indexes=[0]),
        {"uniform_layers": False},
    ),
    "qwen2_audio": Several(
        "Qwen2AudioForConditionalGeneration",
        {},
        {"audio_config": {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}},
    ),
    # The class of the decoder alone: that of the whole model fails in transformers 5.24.
    "llama4": Several(
        "Llama4ForCausalLM",
        {"num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 8, "no_rope_layers": None},
        vision(vision_output_dim=32, projector_input_dim=32, projector_output_dim=32),
        {"base": "model", "renamed": (("language_model.", ""),), "uniform_layers": False},
    ),
}


def family(model_type: str) -> dict[str, Any]:
    """Return the fields of the family of a type."""
    several = TYPES[model_type]
    return {
        "model_type": model_type,
        "architecture": several.architecture,
        "base": "model.language_model",
        "text_config": "text_config",
        "transformers_tables": model_type != "llama4",
        "bottom_arguments": (),
        "config_defaults": {
            "tie_word_embeddings": getattr(AutoConfig.for_model(model_type), "tie_word_embeddings", False)
        },
        **several.family,
    }


def install(world: Any, model_type: str) -> None:
    fields = ", ".join(f"{name}={value!r}" for name, value in family(model_type).items())
    imports = "from splitlearn_core import ModelFamily, hookimpl\n\n\n@hookimpl\n"
    world.install(model_type, f"{imports}def splitlearn_model_families():\n    return [ModelFamily({fields})]\n")


def make(model_type: str, seed: int = 0, **values: Any) -> Any:
    """Make a small random model of a type, with all of its models."""
    several = TYPES[model_type]
    known = AutoConfig.for_model(model_type).text_config
    sizes = {name: value for name, value in TINY.items() if hasattr(known, name)}
    text = {**sizes, **several.text, "model_type": known.model_type}
    config = AutoConfig.for_model(model_type, **{"text_config": text, **several.others, **values})
    whole = several.architecture.replace("Llama4ForCausalLM", "Llama4ForConditionalGeneration")
    return random_model(getattr(transformers, whole), config, seed=seed)


def loaded(model_type: str, folder: Path, **options: Any) -> Any:
    """Load the unsplit model of a checkpoint."""
    model = getattr(transformers, TYPES[model_type].architecture).from_pretrained(folder, **options).eval()
    model.generation_config.eos_token_id = None
    return model


def split(folder: Path, **options: Any) -> Any:
    model = SplitCausalLM(*load_split_model(None, CUTS, folder, **options))  # type: ignore[arg-type]  # all parts
    model.generation_config.eos_token_id = None
    return model


@torch.no_grad()
def logits(model: Any, **arguments: Any) -> torch.Tensor:
    result: torch.Tensor = model(**({"input_ids": IDS} | arguments)).logits
    return result


@torch.no_grad()
def generated(model: Any, **arguments: Any) -> tuple[torch.Tensor, ...]:
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    inputs = {"input_ids": IDS, "attention_mask": MASK} | arguments
    output = model.generate(**inputs, **settings, output_logits=True, return_dict_in_generate=True)
    return output.sequences, *output.logits


def same(first: tuple[torch.Tensor, ...], second: tuple[torch.Tensor, ...]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def others_in(folder: Path) -> list[str]:
    """Return the keys of a checkpoint that are not the decoder's."""
    known = ModelFamily(**family(json.loads((folder / "config.json").read_text())["model_type"]))
    own = {tensor.info.key for part in plan_split(folder, CUTS).components for tensor in part.tensors}
    assert set(map_keys(known, own))
    return sorted(load_file(folder / SINGLE).keys() - own)


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Return folders of checkpoints by type, each made when it is first needed."""

    class Folders(dict[str, Path]):
        def __missing__(self, model_type: str) -> Path:
            folder = tmp_path_factory.mktemp(model_type)
            self[model_type] = write_checkpoint(folder, make(model_type))
            return self[model_type]

    return Folders()


@pytest.fixture
def checkpoint(originals: Mapping[str, Path], world: Any, tmp_path: Path) -> Path:
    """Return a checkpoint of a decoder and a model for images, in a world where its family is installed."""
    install(world, TYPE)
    return Path(shutil.copytree(originals[TYPE], tmp_path / "checkpoint"))


# -- types ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", TYPES)
def test_the_decoder_is_equal_in_the_whole_model(model_type: str, originals: Mapping[str, Path], world: Any) -> None:
    """Without and with a cache, with padding, and with embeddings in place of tokens."""
    install(world, model_type)
    whole = loaded(model_type, originals[model_type])
    if family(model_type)["base"] not in dict(whole.named_modules()):
        pytest.skip("this transformers has the decoder elsewhere in the model")
    parts = split(originals[model_type])
    assert torch.equal(logits(parts), logits(whole))
    assert torch.equal(logits(parts, attention_mask=MASK), logits(whole, attention_mask=MASK))
    assert same(generated(parts), generated(whole))
    embeddings = {"input_ids": None, "inputs_embeds": torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))}
    assert torch.equal(logits(parts, **embeddings), logits(whole, **embeddings))
    assert [name for name, _ in parts.named_parameters()] == [
        name for name, _ in whole.named_parameters() if any(name.startswith(f"{at}.") for at in _decoder(parts))
    ]


def _decoder(parts: Any) -> tuple[str, str]:
    return parts.top.family.base, parts.top.family.head


@pytest.mark.parametrize("rows", [3, 4])
def test_positions_of_three_dimensions(originals: Mapping[str, Path], world: Any, rows: int) -> None:
    """Of time, height and width; or those and the numbers of the tokens, as ``generate`` makes them."""
    install(world, "qwen2_vl")
    whole, parts = loaded("qwen2_vl", originals["qwen2_vl"]), split(originals["qwen2_vl"])
    positions = torch.randint(0, 5, (rows, 2, 5), generator=torch.Generator().manual_seed(2)).sort(-1).values
    positions[0] = torch.arange(5)
    embeddings = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    given = {"input_ids": None, "inputs_embeds": embeddings, "position_ids": positions}
    assert torch.equal(logits(parts, **given), logits(whole, **given))
    assert not torch.equal(logits(parts, **given), logits(parts, **{**given, "position_ids": None}))
    assert same(generated(parts, **given), generated(whole, **given))


def test_token_types_reach_all_components(originals: Mapping[str, Path], world: Any, tmp_path: Path) -> None:
    """Masks depend on them, also where the trunk runs elsewhere."""
    install(world, "paligemma")
    whole, parts = loaded("paligemma", originals["paligemma"]), split(originals["paligemma"])
    expected = logits(whole, token_type_ids=KINDS)
    assert torch.equal(logits(parts, token_type_ids=KINDS), expected)
    assert not torch.equal(logits(parts), expected)
    with hosting("unix", parts.trunk, tmp_path) as remote:
        apart = SplitCausalLM(parts.bottom, remote, parts.top)
        assert torch.equal(logits(apart, token_type_ids=KINDS), expected)


def test_experts_that_the_file_has_the_other_way(originals: Mapping[str, Path], world: Any, tmp_path: Path) -> None:
    """Files of older versions of transformers have each expert's matrix transposed."""
    install(world, "qwen3_vl_moe")
    folder = Path(shutil.copytree(originals["qwen3_vl_moe"], tmp_path / "other"))
    expected = logits(loaded("qwen3_vl_moe", folder))
    tensors = load_file(folder / SINGLE)
    turned = {key: value.transpose(1, 2) if ".experts." in key else value for key, value in tensors.items()}
    assert any(turned[key].shape != tensors[key].shape for key in tensors)
    rewrite(folder, turned)
    assert torch.equal(logits(split(folder)), expected)


def test_a_configuration_without_an_inner_one(originals: Mapping[str, Path], world: Any, tmp_path: Path) -> None:
    """Older files have the decoder's values among the others, and its tensors without a prefix."""
    install(world, "qwen2_vl")
    folder = Path(shutil.copytree(originals["qwen2_vl"], tmp_path / "flat"))
    expected = logits(loaded("qwen2_vl", folder))
    config = json.loads((folder / "config.json").read_text())
    inner = config.pop("text_config")
    keep = ("model_type", "architectures", "vision_config", "dtype")
    flat = {**{key: value for key, value in inner.items() if key not in keep}, **config}
    (folder / "config.json").write_text(json.dumps(flat))
    old = {
        key.replace("model.language_model.", "model.").replace("model.visual.", "visual."): value
        for key, value in load_file(folder / SINGLE).items()
    }
    rewrite(folder, old)
    assert torch.equal(logits(loaded("qwen2_vl", folder)), expected)
    assert torch.equal(logits(split(folder)), expected)


def rewrite(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    (folder / SINGLE).unlink()
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / SINGLE, {"format": "pt"})


# -- what is read -----------------------------------------------------------------------------------


def test_no_byte_of_the_others_is_used(checkpoint: Path) -> None:
    """Planned and loaded is the decoder alone: garbage in the bytes of the others changes nothing."""
    expected = logits(loaded(TYPE, checkpoint))
    plan = plan_split(checkpoint, CUTS)
    own = {tensor.info.key for part in plan.components for tensor in part.tensors}
    assert (plan.model_type, plan.num_layers, plan.unexpected) == (TYPE, 6, ())
    assert plan.component("trunk").kv_bytes_per_token == 2 * 2 * 2 * 8 * 4
    tensors = load_file(checkpoint / SINGLE)
    assert {key for key in tensors if "vision" in key or "projector" in key} == tensors.keys() - own != set()
    rewrite(
        checkpoint,
        {key: value if key in own else torch.full_like(value, torch.nan) for key, value in tensors.items()},
    )
    assert torch.equal(logits(split(checkpoint)), expected)
    rewrite(checkpoint, {key: value for key, value in tensors.items() if key in own})
    assert torch.equal(logits(split(checkpoint)), expected)


@pytest.mark.parametrize("strategy", ["copied", "incremental", "whole"])
def test_every_strategy_reads_the_same(checkpoint: Path, strategy: str) -> None:
    expected = load_split_model(None, CUTS, checkpoint)
    assert parts_equal(load_split_model(None, CUTS, checkpoint, strategy=strategy), expected)


def test_a_narrower_dtype_is_that_of_from_pretrained(checkpoint: Path) -> None:
    narrow = logits(loaded(TYPE, checkpoint, dtype=torch.bfloat16))
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(logits(split(checkpoint, dtype="bfloat16")), narrow)
    # Such a model sets the default dtype of the process while its parts are built.
    assert torch.get_default_dtype() == torch.float32


def test_a_checkpoint_without_weights_is_planned(checkpoint: Path) -> None:
    planned = plan_split(checkpoint, CUTS)
    (checkpoint / SINGLE).unlink()
    bare = plan_split(checkpoint, CUTS)
    assert bare.source == "config"
    assert [part.parameters for part in bare.components] == [part.parameters for part in planned.components]


# -- saved, merged, made, adapted -------------------------------------------------------------------


def test_components_are_saved_and_merged(checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without the tensors of the others, which is said; what is merged is a checkpoint for both libraries."""
    expected = logits(loaded(TYPE, checkpoint))
    save_split(checkpoint, tmp_path / "split", CUTS)
    assert torch.equal(logits(SplitCausalLM(*load_split_directory(tmp_path / "split"))), expected)
    trunk = load_component(tmp_path / "split", "trunk")
    assert parts_equal([trunk], [load_split_model(None, CUTS, checkpoint).trunk])
    caplog.clear()
    merged = merge_split(tmp_path / "split", out=tmp_path / "merged")
    assert "the decoder alone" in caplog.text
    assert load_file(merged / SINGLE).keys() == load_file(checkpoint / SINGLE).keys() - set(others_in(checkpoint))
    assert torch.equal(logits(split(merged)), expected)
    assert torch.equal(logits(split(merged, strategy="whole")), expected)
    assert torch.equal(logits(loaded(TYPE, merged)), expected)
    caplog.clear()
    split(checkpoint).save_pretrained(tmp_path / "saved")
    assert "the decoder alone" in caplog.text
    assert torch.equal(logits(split(tmp_path / "saved")), expected)


def test_a_component_of_a_state_dict(checkpoint: Path) -> None:
    whole = loaded(TYPE, checkpoint)
    trunk = load_split_model(None, CUTS, checkpoint).trunk
    for config in (whole.config, json.loads((checkpoint / "config.json").read_text())):
        made = ModelRegistry.get_model_class(TYPE, "trunk").from_pretrained_split(whole.state_dict(), config, 2, 4)
        assert parts_equal([made], [trunk])


def test_training_is_that_of_the_whole_model(checkpoint: Path) -> None:
    whole, parts = loaded(TYPE, checkpoint), split(checkpoint)
    for model in (whole, parts):
        model(input_ids=IDS, labels=IDS).loss.backward()
    gradients = {name: parameter.grad for name, parameter in whole.named_parameters()}
    assert all(torch.equal(parameter.grad, gradients[name]) for name, parameter in parts.named_parameters())


def test_an_adapter_of_the_whole_model(checkpoint: Path, tmp_path: Path) -> None:
    """Its tensors for the other models have no effect here; an adapter of nothing else is refused."""
    peft = pytest.importorskip("peft")
    from splitlearn_core import load_adapter

    for folder, modules in (("both", ["q_proj", "v_proj"]), ("others", r".*vision_tower.*\.q_proj")):
        lora = peft.LoraConfig(target_modules=modules, r=2, init_lora_weights=False)
        adapted = peft.get_peft_model(loaded(TYPE, checkpoint), lora)
        adapted.save_pretrained(tmp_path / folder)
        parts = load_split_model(None, CUTS, checkpoint)
        if folder == "both":
            load_adapter(parts, tmp_path / folder)
            assert torch.equal(logits(SplitCausalLM(*parts)), logits(adapted))  # type: ignore[arg-type]  # all parts
        else:
            with pytest.raises(TensorMismatchError, match="does not fit"):
                load_adapter(parts, tmp_path / folder)


# -- what is refused --------------------------------------------------------------------------------


def test_images_are_refused(checkpoint: Path) -> None:
    """By all components and by ``generate``, with the way that there is."""
    parts = split(checkpoint)
    image = torch.zeros(1, 3, 28, 28)
    for attempt in (
        lambda: parts(IDS, pixel_values=image),
        lambda: parts.generate(IDS, pixel_values=image),
        lambda: parts.bottom(IDS, pixel_values=image),
        lambda: parts.trunk(torch.zeros(1, 1, 32), pixel_values=image),
    ):
        with pytest.raises(UnexpectedArgumentError, match="pixel_values") as caught:
            attempt()
        assert "inputs_embeds" in caught.value.hint


def test_a_tensor_of_the_decoder_that_is_missing(checkpoint: Path) -> None:
    """It is not taken for one of the others."""
    tensors = load_file(checkpoint / SINGLE)
    lost = next(key for key in tensors if "layers.3.self_attn.q_proj" in key and "vision" not in key)
    rewrite(checkpoint, {key: value for key, value in tensors.items() if key != lost})
    with pytest.raises(TensorMismatchError, match=r"missing: model\.language_model\.layers\.3") as caught:
        load_split_model(None, CUTS, checkpoint)
    assert "multimodal" not in caught.value.hint


def test_the_type_of_the_decoder_is_not_that_of_the_checkpoint(checkpoint: Path) -> None:
    with pytest.raises(ConfigurationError, match="'mistral' was requested") as caught:
        plan_split(checkpoint, CUTS, model_type="mistral")
    assert f"model_type={TYPE!r}" in caught.value.hint


@pytest.mark.parametrize("inner", [None, [], "x", {"num_hidden_layers": -1}, {"num_hidden_layers": 10**9}])
def test_an_inner_configuration_that_is_none(checkpoint: Path, inner: Any, edit_json: Any) -> None:
    edit_json(checkpoint / "config.json", text_config=inner)
    with pytest.raises(SplitLearnError):
        plan_split(checkpoint, CUTS)


def test_a_family_that_names_no_text_in_text_config() -> None:
    with suppress(TypeError), pytest.raises(ConfigurationError, match="text_config must be a text"):
        ModelFamily(model_type="x", architecture="X", text_config=None)  # type: ignore[arg-type]  # the subject
