"""PEFT's own means on a split model: what is trained, saved and merged is what the unsplit model gives, bit for bit."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from splitlearn_core import MissingFileError, SplitCausalLM, load_adapter, load_split_model
from splitlearn_core.testing.worlds import tiny_model, write_checkpoint

peft = pytest.importorskip("peft", reason="the extra peft is not installed")

pytestmark = [
    pytest.mark.libs,
    # PEFT warns of its own settings, of the unsplit model too.
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
    # Its 0.21 uses names that transformers had before 5.23.
    pytest.mark.filterwarnings("ignore:`(is_gradient_checkpointing|past_key_values)` is deprecated:FutureWarning"),
]

CUTS = (2, 4)
IDS = torch.tensor([[5, 17, 42, 99, 3, 8, 64], [1, 2, 3, 4, 5, 6, 7]])
SIZES = {"gpt2": {"n_embd": 32, "n_layer": 6, "n_head": 4}}
UNTIED = {"tie_word_embeddings": False}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
#: What makes no change of weights, and so cannot be merged.
PROMPTS = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING")


def lora(**options: Any) -> Any:
    return peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options)


Checkpoints = Callable[..., Path]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    made: dict[str, Path] = {}

    def write(model_type: str, **sizes: Any) -> Path:
        name = f"{model_type}-{sizes}"
        if name not in made:
            made[name] = tmp_path_factory.mktemp("model") / "model"
            write_checkpoint(made[name], tiny_model(model_type, **{**SIZES.get(model_type, {}), **sizes}))
        return made[name]

    return write


def unsplit(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def split(folder: Path) -> Any:
    return SplitCausalLM(*load_split_model(None, CUTS, folder))


def train(model: Any, steps: int = 2) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        for _ in range(steps):
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    model.eval()
    return losses


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return list(left) == list(right) and all(torch.equal(each, right[name]) for name, each in left.items())


CASES: dict[str, tuple[str, dict[str, Any], Callable[[], Any]]] = {
    "gpt2-dropout": ("gpt2", {}, lambda: lora(target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.1)),
    "qwen2-all-linear": ("qwen2", {}, lambda: lora(target_modules="all-linear", lora_dropout=0.2)),
    "gemma2-regex-dora": (
        "gemma2", {}, lambda: lora(target_modules=r".*layers\.[1-4]\..*(q_proj|down_proj)", use_dora=True)
    ),
    "qwen2-layers-bias": (
        "qwen2", {}, lambda: lora(target_modules=["q_proj"], bias="all", layers_to_transform=[0, 5])
    ),
    "qwen2-ends": ("qwen2", UNTIED, lambda: lora(target_modules=["q_proj", "embed_tokens", "lm_head"])),
    "qwen2-replaced-ends": (
        "qwen2", UNTIED, lambda: lora(target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])
    ),
    "qwen2-replaced-tied-ends": (
        "qwen2", {}, lambda: lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    ),
    "gpt2-replaced-tied-head": (
        "gpt2", {}, lambda: lora(target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["lm_head"])
    ),
    "qwen2-tokens": ("qwen2", {}, lambda: lora(target_modules=["q_proj"], trainable_token_indices=[3, 5, 8])),
    "qwen2-pissa": ("qwen2", {}, lambda: lora(target_modules=["q_proj"], init_lora_weights="pissa")),
    "qwen2-olora": ("qwen2", {}, lambda: lora(target_modules=["q_proj"], init_lora_weights="olora")),
    "gpt2-ia3": ("gpt2", {}, lambda: peft.IA3Config(task_type="CAUSAL_LM", fan_in_fan_out=True)),
    "qwen2-vera": (
        "qwen2", {}, lambda: peft.VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4)
    ),
    "qwen2-norms": ("qwen2", {}, lambda: peft.LNTuningConfig(task_type="CAUSAL_LM")),
    "qwen2-prefix": ("qwen2", {}, lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
    "gpt2-prompt": ("gpt2", {}, lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)),
    "gpt2-p-tuning": (
        "gpt2",
        {},
        lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=16),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_split_model_learns_an_adapter_as_the_unsplit_one(checkpoint: Checkpoints, name: str, tmp_path: Path) -> None:
    """Losses, tensors, files and logits are equal; each loads the other's; merged, they are one checkpoint."""
    model_type, sizes, make_config = CASES[name]
    folder = checkpoint(model_type, **sizes)
    models, losses = {}, {}
    for make in (unsplit, split):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            models[make] = peft.get_peft_model(make(folder), make_config())
        losses[make] = train(models[make])
        models[make].save_pretrained(tmp_path / make.__name__)
    expected = logits(models[unsplit])

    assert losses[split] == losses[unsplit]
    assert torch.equal(logits(models[split]), expected)
    assert not torch.equal(expected, logits(unsplit(folder)))
    learned = [load_file(tmp_path / make.__name__ / WEIGHTS) for make in (split, unsplit)]
    assert equal(*learned)
    configs = [(tmp_path / make.__name__ / CONFIG).read_text() for make in (split, unsplit)]
    assert configs[0] == configs[1]
    if "pissa" not in name and "olora" not in name:  # which have changed the model's own weights
        for make, saved in ((unsplit, "split"), (split, "unsplit")):
            loaded = peft.PeftModel.from_pretrained(make(folder), tmp_path / saved)
            assert torch.equal(logits(loaded), expected), saved
    if models[split].peft_type in PROMPTS:
        return
    merged = {make: model.merge_and_unload() for make, model in models.items()}
    assert torch.equal(logits(merged[split]), logits(merged[unsplit]))
    for make, model in merged.items():
        model.save_pretrained(tmp_path / f"merged-{make.__name__}")
    folders = [tmp_path / f"merged-{make.__name__}" for make in merged]
    assert equal(*(load_file(each / "model.safetensors") for each in folders))
    assert (folders[0] / "config.json").read_text() == (folders[1] / "config.json").read_text()


def test_our_load_adapter_takes_what_a_split_model_learned(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Both ways to an adapter have one file."""
    folder = checkpoint("qwen2")
    model = peft.get_peft_model(split(folder), lora(target_modules=["q_proj", "up_proj"]))
    train(model)
    model.save_pretrained(tmp_path)
    parts = load_split_model(None, CUTS, folder)

    load_adapter(parts, tmp_path)

    assert torch.equal(logits(SplitCausalLM(*parts)), logits(model))


def test_several_adapters(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """They are loaded, chosen, combined, switched off, merged for a time and taken off, as on the unsplit model."""
    folder = checkpoint("qwen2")
    for name in ("q_proj", "v_proj"):
        trained = peft.get_peft_model(unsplit(folder), lora(target_modules=[name], init_lora_weights=False))
        trained.save_pretrained(tmp_path / name)
    results = {}
    for make in (unsplit, split):
        model = peft.PeftModel.from_pretrained(make(folder), tmp_path / "q_proj", adapter_name="q_proj")
        model.load_adapter(tmp_path / "v_proj", "v_proj")
        found = [logits(model)]
        model.set_adapter("v_proj")
        found.append(logits(model))
        model.add_weighted_adapter(["q_proj", "v_proj"], [0.5, 0.5], "both", combination_type="cat")
        model.set_adapter("both")
        found.append(logits(model))
        with model.disable_adapter():
            found.append(logits(model))
        model.delete_adapter("both")
        model.set_adapter("q_proj")
        model.merge_adapter()
        found.append(logits(model))
        model.unmerge_adapter()
        found.append(logits(model))
        found.append(logits(model.unload()))
        results[make] = found

    assert [torch.equal(*pair) for pair in zip(*results.values(), strict=True)] == [True] * 7
    assert not torch.equal(results[split][0], results[split][3])


def test_copies_of_an_adapted_model_are_its_own(checkpoint: Checkpoints) -> None:
    """A deep copy shares nothing; another dtype is that of the unsplit model."""
    folder, models = checkpoint("qwen2"), {}
    for make in (unsplit, split):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            models[make] = peft.get_peft_model(make(folder), lora(target_modules=["q_proj"], init_lora_weights=False))
    expected = logits(models[unsplit])
    copied = copy.deepcopy(models[split])
    assert torch.equal(logits(copied), expected)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()

    assert torch.equal(logits(models[split]), expected)
    assert equal(dict(models[split].state_dict()), dict(models[unsplit].state_dict()))
    for model in models.values():
        model.to(torch.bfloat16)
    assert torch.equal(logits(models[split]), logits(models[unsplit]))


def test_layers_that_peft_would_replicate_are_refused(checkpoint: Checkpoints) -> None:
    """They would be layers of no component."""
    model = split(checkpoint("qwen2"))
    expected = logits(model)

    with pytest.raises(ValueError, match="layers of a split model cannot be replaced"):
        peft.get_peft_model(model, lora(target_modules=["q_proj"], layer_replication=[[0, 4], [2, 6]]))

    assert torch.equal(logits(model), expected)


def test_an_adapter_of_a_bundled_model_names_its_folder(tmp_path: Path) -> None:
    """``bundled:gpt2`` is a name that PEFT and transformers cannot look up."""
    model = SplitCausalLM(*load_split_model("bundled:gpt2", (2, 4)))
    options = {"target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
    peft.get_peft_model(model, peft.LoraConfig(r=2, **options)).save_pretrained(tmp_path)

    stated = json.loads((tmp_path / CONFIG).read_text())["base_model_name_or_path"]
    whole = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path)

    assert Path(stated, "config.json").is_file()
    assert type(whole.get_base_model()).__name__ == "GPT2LMHeadModel"


def test_an_adapter_that_names_a_bundled_model_says_what_to_load(tmp_path: Path) -> None:
    """Written by an earlier version: the file is named, and its base, which is a model here."""
    (tmp_path / CONFIG).write_text('{"base_model_name_or_path": "bundled:gpt2", "peft_type": "LORA"}')

    with pytest.raises(MissingFileError, match=r"adapter_config\.json") as caught:
        load_split_model(None, (2, 4), tmp_path)

    assert "bundled:gpt2" in caught.value.hint
    assert "load_adapter" in caught.value.hint
