"""PEFT adapters of the whole model on its components: bit-equal unmerged and merged, and the same file again."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from splitlearn_core import (
    ConfigurationError,
    InvalidCheckpointError,
    MissingFileError,
    SplitCausalLM,
    SplitLearnError,
    TensorMismatchError,
    load_adapter,
    load_split_model,
    merge_and_unload,
    save_adapter,
    save_split,
    unload_adapter,
)
from splitlearn_core.testing.worlds import tiny_model, write_checkpoint
from support.hub import LoopbackHub

peft = pytest.importorskip("peft", reason="the extra peft is not installed")

pytestmark = [
    pytest.mark.libs,
    # PEFT says so of the whole model and of components alike.
    pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. .* have invalid shape"),
    # Its 0.21 uses the name that transformers had before 5.23.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

CUTS = (2, 4)
IDS = torch.tensor([[5, 17, 42, 99, 3, 8, 64], [1, 2, 3, 4, 5, 6, 7]])
MASK = torch.tensor([[1] * 7, [0] * 2 + [1] * 5])
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
GPT2 = {"n_embd": 32, "n_layer": 6, "n_head": 4}
UNTIED = {"tie_word_embeddings": False}


def lora(**options: Any) -> Any:
    return peft.LoraConfig(r=4, task_type="CAUSAL_LM", **options)


#: What distinguishes adapters: kind, modules, layers, ranks, dtype of the model.
CASES: dict[str, tuple[str, dict[str, Any], torch.dtype, Any]] = {
    "gpt2": ("gpt2", GPT2, torch.float32, lora(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)),
    "gpt2-dora-head": (
        "gpt2",
        GPT2,
        torch.float32,
        lora(target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True, modules_to_save=["lm_head"]),
    ),
    "gpt2-ia3": ("gpt2", GPT2, torch.float32, peft.IA3Config(task_type="CAUSAL_LM", fan_in_fan_out=True)),
    "qwen2-patterns": (
        "qwen2",
        {},
        torch.float32,
        lora(
            target_modules="all-linear",
            use_rslora=True,
            rank_pattern={"layers.3.self_attn.q_proj": 7},
            alpha_pattern={"^model.layers.4.mlp.up_proj": 3},
        ),
    ),
    # The trunk has nothing of it but biases.
    "qwen2-layers-bias": (
        "qwen2",
        {},
        torch.bfloat16,
        lora(target_modules=["q_proj"], layers_to_transform=[0, 5], layers_pattern="layers", bias="all"),
    ),
    # The trunk has nothing at all, the top only a module that is replaced.
    "qwen2-one-layer": (
        "qwen2",
        UNTIED,
        torch.bfloat16,
        lora(target_modules=["q_proj"], layers_to_transform=[0], modules_to_save=["lm_head", "embed_tokens"]),
    ),
    "qwen2-regex-ends": ("qwen2", UNTIED, torch.float32, lora(target_modules=r".*(q_proj|lm_head|embed_tokens)")),
    "qwen2-loha": ("qwen2", {}, torch.float32, peft.LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])),
    "qwen2-lokr": ("qwen2", {}, torch.float32, peft.LoKrConfig(task_type="CAUSAL_LM", target_modules=["up_proj"])),
}


class World:
    """A checkpoint, and an adapter that PEFT made for the whole of it."""

    def __init__(self, folder: Path, model_type: str, sizes: dict[str, Any], dtype: torch.dtype, config: Any) -> None:
        self.model_type, self.model, self.adapter = model_type, folder / "model", folder / "adapter"
        write_checkpoint(self.model, tiny_model(model_type, dtype, **sizes))
        trained = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(self.model), config)
        generator = torch.Generator().manual_seed(1)
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.1).to(parameter.dtype)
        trained.save_pretrained(self.adapter, save_embedding_layers=True if "ends" in folder.name else "auto")

    def whole(self) -> Any:
        return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(self.model), self.adapter)

    def parts(self, **options: Any) -> Any:
        return load_split_model(self.model_type, CUTS, self.model, **options)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], World]:
    made: dict[str, World] = {}

    def world(name: str) -> World:
        if name not in made:
            model_type, sizes, dtype, config = CASES[name]
            made[name] = World(tmp_path_factory.mktemp(name), model_type, sizes, dtype, config)
        return made[name]

    return world


@pytest.fixture
def plain(worlds: Callable[[str], World], tmp_path: Path) -> World:
    """A world with an adapter that is the test's to spoil."""
    original = worlds("qwen2-patterns")
    copy = object.__new__(World)
    copy.model_type, copy.model = original.model_type, original.model
    copy.adapter = Path(shutil.copytree(original.adapter, tmp_path / "adapter"))
    return copy


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=IDS, attention_mask=MASK, use_cache=False).logits
    return found


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_says_what_it_says_on_the_whole_model(
    worlds: Callable[[str], World], name: str, tmp_path: Path
) -> None:
    """Unmerged and merged, to the last bit; saved together again, it is the same file, which PEFT loads."""
    world = worlds(name)
    parts, whole = world.parts(), world.whole()
    bare = logits(SplitCausalLM(*parts))
    names = [list(part.state_dict()) for part in parts]

    load_adapter(parts, world.adapter)
    split = SplitCausalLM(*parts)

    expected = logits(whole)
    assert torch.equal(logits(split), expected)
    assert not torch.equal(expected, bare)
    generated = [model.generate(input_ids=IDS[:1], max_new_tokens=4, pad_token_id=0) for model in (split, whole)]
    assert torch.equal(*generated)

    saved = save_adapter(split, tmp_path / "saved")
    before, after = load_file(world.adapter / WEIGHTS), load_file(saved / WEIGHTS)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    assert (saved / CONFIG).read_bytes() == (world.adapter / CONFIG).read_bytes()
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG, WEIGHTS]

    merge_and_unload(parts)
    assert torch.equal(logits(SplitCausalLM(*parts)), logits(whole.merge_and_unload()))
    assert [list(part.state_dict()) for part in parts] == names


@pytest.mark.parametrize("part", ["bottom", "trunk", "top"])
def test_a_component_reads_its_own_tensors_alone(plain: World, part: str) -> None:
    """With rubbish in the tensors of the others, a component's are those of the whole model."""
    reference = plain.parts()
    load_adapter(reference, plain.adapter)
    tensors = load_file(plain.adapter / WEIGHTS)
    layers = getattr(reference, part).layer_range
    for key, tensor in tensors.items():
        if int(key.split(".layers.")[1].split(".")[0]) not in layers:
            tensor.fill_(float("nan"))
    save_file(tensors, plain.adapter / WEIGHTS)
    alone = getattr(plain.parts(parts=[part]), part)

    load_adapter(alone, plain.adapter)

    expected = getattr(reference, part).state_dict()
    assert any("lora_B" in name for name in expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in alone.state_dict().items())


def test_an_adapter_learns_as_on_the_whole_model(plain: World, tmp_path: Path) -> None:
    """Gradients are those of the whole model; what was learned is saved; the model's own weights stand still."""
    parts = plain.parts()
    whole = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(plain.model), plain.adapter, is_trainable=True
    )
    load_adapter(parts, plain.adapter, is_trainable=True)
    split = SplitCausalLM(*parts)
    for model in (whole, split):
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()

    expected = {name.removeprefix("base_model.model."): p.grad for name, p in whole.named_parameters()}
    learning = {name for part in parts for name, p in part.named_parameters() if p.requires_grad}
    assert learning
    assert all(".lora_" in name for name in learning)
    for part in parts:
        for name, parameter in part.named_parameters():
            assert (parameter.grad is None) == (name not in learning)
            assert parameter.grad is None or torch.equal(parameter.grad, expected[name]), name
    torch.optim.SGD([p for part in parts for p in part.parameters() if p.requires_grad], lr=0.1).step()
    saved = load_file(save_adapter(parts, tmp_path / "saved") / WEIGHTS)
    assert not any(torch.equal(tensor, saved[key]) for key, tensor in load_file(plain.adapter / WEIGHTS).items())


def test_loading_leaves_random_numbers_alone(plain: World) -> None:
    """PEFT draws first values that are overwritten at once."""
    parts = plain.parts(parts=["trunk"])
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)

    load_adapter(parts, plain.adapter)

    assert torch.equal(torch.rand(3), expected)


def test_an_adapter_comes_off(plain: World) -> None:
    """What is left are the components as they were, and another adapter may come."""
    parts = plain.parts()
    bare = logits(SplitCausalLM(*parts))
    load_adapter(parts, plain.adapter)
    with pytest.raises(ConfigurationError, match="already"):
        load_adapter(parts.top, plain.adapter)

    unload_adapter(parts)

    assert torch.equal(logits(SplitCausalLM(*parts)), bare)
    for action in (unload_adapter, merge_and_unload, lambda given: save_adapter(given, plain.adapter)):
        with pytest.raises(ConfigurationError, match="no adapter on bottom, trunk, top"):
            action(parts)
    load_adapter(parts, plain.adapter)


def test_merging_leaves_the_file_as_it_is(plain: World) -> None:
    """Weights are views of the mapped file; where they change they are this process's own."""
    before = (plain.model / "model.safetensors").read_bytes()
    parts = plain.parts(strategy="mapped")
    load_adapter(parts, plain.adapter)

    merge_and_unload(parts)

    assert (plain.model / "model.safetensors").read_bytes() == before


def test_some_components_do_not_make_up_an_adapter(plain: World, tmp_path: Path) -> None:
    """What is missing is named, and nothing is written."""
    parts = plain.parts(parts=["bottom", "top"])
    load_adapter(parts, plain.adapter)

    with pytest.raises(ConfigurationError, match="bottom, top hold") as caught:
        save_adapter(parts, tmp_path / "saved")

    assert "layers.2." in caught.value.message
    assert not (tmp_path / "saved").exists()


def test_a_tied_embedding_is_not_merged(tmp_path: Path) -> None:
    """Its other name may be another component's; unmerged, the adapter works."""
    tied = World(tmp_path, "gpt2", GPT2, torch.float32, lora(target_modules=["wte", "c_fc"], fan_in_fan_out=True))
    parts = tied.parts()
    load_adapter(parts, tied.adapter)
    expected = logits(tied.whole())

    with pytest.raises(ConfigurationError, match="one tensor in this model"):
        merge_and_unload(parts)

    assert torch.equal(logits(SplitCausalLM(*parts)), expected)


def test_an_adapter_from_the_hub(plain: World, hub: LoopbackHub) -> None:
    """Its two files are fetched, and found again without the Hub; missing files are reported."""
    (plain.adapter / "README.md").write_text("Of no use here.")
    hub.add_repo("someone/adapter", plain.adapter)
    hub.add_repo("someone/model", plain.model)
    parts = plain.parts()
    load_adapter(parts, "someone/adapter")

    assert hub.downloaded("someone/adapter") == {CONFIG, WEIGHTS}
    assert torch.equal(logits(SplitCausalLM(*parts)), logits(plain.whole()))
    unload_adapter(parts)
    load_adapter(parts, "someone/adapter", local_files_only=True)
    for missing, options in (("someone/model", {}), ("someone/nobody", {}), ("someone/adapter", {"revision": "v9"})):
        with pytest.raises(MissingFileError, match=missing):
            load_adapter(plain.parts(), missing, **options)


def spoil_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def spoil(adapter: Path) -> None:
        tensors = load_file(adapter / WEIGHTS)
        change(tensors)
        save_file(tensors, adapter / WEIGHTS)

    return spoil


def spoil_config(**changes: Any) -> Callable[[Path], None]:
    def spoil(adapter: Path) -> None:
        (adapter / CONFIG).write_text(json.dumps({**json.loads((adapter / CONFIG).read_text()), **changes}))

    return spoil


def only_pickle(adapter: Path) -> None:
    (adapter / WEIGHTS).unlink()
    torch.save({}, adapter / "adapter_model.bin")


KEY = "base_model.model.model.layers.3.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (spoil_tensors(lambda t: t.pop(KEY)), TensorMismatchError, [f"missing: {KEY}"]),
        (
            spoil_tensors(lambda t: t.update({KEY: torch.zeros(1, 2), "base_model.vera_A": torch.zeros(1)})),
            TensorMismatchError,
            ["unexpected: base_model.vera_A"],
        ),
        (spoil_tensors(lambda t: t.update({KEY: torch.zeros(1, 2)})), TensorMismatchError, [f"mis-shaped: {KEY}"]),
        (
            spoil_tensors(lambda t: t.update({KEY.replace(".3.", ".6."): torch.zeros(4, 32)})),
            TensorMismatchError,
            ["unexpected", "layers.6."],
        ),
        (spoil_config(peft_type="PREFIX_TUNING"), ConfigurationError, ["'PREFIX_TUNING'", "LORA"]),
        (
            spoil_config(peft_type=["x"], task_type="SEQ_CLS", layer_replication=[[0, 2]], init_lora_weights="pissa"),
            ConfigurationError,
            ["a list of 1", "SEQ_CLS", "renumbers", "pissa"],
        ),
        (spoil_config(modules_to_save=["score"]), TensorMismatchError, ["every tensor of score"]),
        (spoil_config(modules_to_save="lm_head"), ConfigurationError, ["not a list"]),
        (spoil_config(target_modules=["k_proj"]), TensorMismatchError, ["unexpected: tensors of", "q_proj"]),
        (spoil_config(target_modules=["nothing"]), TensorMismatchError, ["unexpected: tensors of", "up_proj"]),
        (spoil_config(target_modules=r".*layers\.[0-3]\..*_proj"), TensorMismatchError, ["model.layers.4."]),
        (spoil_config(target_modules=r".*(_proj|lm_head)"), TensorMismatchError, ["missing: every tensor of lm_head"]),
        (spoil_config(target_modules="(q_proj"), InvalidCheckpointError, ["PEFT cannot load"]),
        (spoil_config(r="many"), TensorMismatchError, ["the rank 'many'"]),
        (lambda adapter: (adapter / CONFIG).write_text("[]"), InvalidCheckpointError, ["a JSON list, not an object"]),
        (lambda adapter: (adapter / CONFIG).write_text("{"), InvalidCheckpointError, ["not valid JSON"]),
        (lambda adapter: (adapter / WEIGHTS).write_bytes(b"x" * 99), InvalidCheckpointError, [WEIGHTS]),
        (only_pickle, InvalidCheckpointError, ["pickle", "save_pretrained"]),
        (lambda adapter: (adapter / CONFIG).unlink(), MissingFileError, [f"lacks {CONFIG}"]),
        (shutil.rmtree, MissingFileError, ["there is no directory"]),
    ],
    ids=lambda value: "" if callable(value) else str(value),
)
def test_an_adapter_that_does_not_fit_changes_nothing(
    plain: World, spoil: Callable[[Path], Any], error: type[SplitLearnError], words: list[str]
) -> None:
    """The error says what is wrong, and the components are as before."""
    parts = plain.parts()
    names = [list(part.state_dict()) for part in parts]
    spoil(plain.adapter)

    with pytest.raises(error) as caught:
        load_adapter(parts, plain.adapter)

    assert all(word in str(caught.value) for word in words), caught.value
    assert caught.value.hint
    assert [list(part.state_dict()) for part in parts] == names


def test_what_is_no_component_is_refused(plain: World, worlds: Callable[[str], World]) -> None:
    """Nor are components of two models."""
    parts = plain.parts(parts=["trunk"])
    for wrong in ([], AutoModelForCausalLM.from_pretrained(plain.model), [None]):
        with pytest.raises(ConfigurationError, match="is not a component"):
            load_adapter(wrong, plain.adapter)
    for pair in ([parts.trunk, parts.trunk], [parts.trunk, worlds("gpt2").parts().top]):
        with pytest.raises(ConfigurationError, match="not components of one model"):
            load_adapter(pair, plain.adapter)


def test_without_peft_the_hint_is_how_to_install_it(plain: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT is an extra."""
    monkeypatch.setitem(sys.modules, "peft", None)

    with pytest.raises(ConfigurationError, match="need the package peft") as caught:
        load_adapter(plain.parts(), plain.adapter)

    assert "splitlearn-core[peft]" in caught.value.hint


def test_the_file_says_what_peft_wants_it_to_say(plain: World, tmp_path: Path) -> None:
    """The metadata too, without which older loaders refuse a file."""
    parts = plain.parts()
    load_adapter(parts, plain.adapter)

    with safe_open(save_adapter(parts, tmp_path / "saved") / WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", ["gpt2", "qwen2"])
def test_replaced_modules_come_back(tmp_path: Path, model_type: str, tied: bool) -> None:
    """Unloaded, weights are those of a fresh load, and a tied head is one parameter with the embedding again."""
    first, embedding = ("c_attn", "transformer.wte") if model_type == "gpt2" else ("q_proj", "model.embed_tokens")
    sizes = {**(GPT2 if model_type == "gpt2" else {}), "tie_word_embeddings": tied}
    options = {"target_modules": [first], "modules_to_save": ["lm_head", embedding.rpartition(".")[2]]}
    world = World(tmp_path, model_type, sizes, torch.float32, lora(fan_in_fan_out=model_type == "gpt2", **options))
    parts, fresh = world.parts(), world.parts()
    load_adapter(parts, world.adapter)
    assert not torch.equal(parts.top.lm_head.weight, fresh.top.lm_head.weight)

    unload_adapter(parts)

    for part, other in zip(parts, fresh, strict=True):
        state, expected = part.state_dict(), other.state_dict()
        assert list(state) == list(expected)
        assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert (parts.bottom.get_parameter(f"{embedding}.weight") is parts.top.lm_head.weight) == tied


def test_a_failed_load_leaves_no_replaced_module(worlds: Callable[[str], World], tmp_path: Path) -> None:
    """The modules that were wrapped before the failure are the model's own again."""
    world = worlds("qwen2-one-layer")
    adapter = Path(shutil.copytree(world.adapter, tmp_path / "adapter"))
    spoil_tensors(lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(1, 2)}))(adapter)
    parts = world.parts()
    kept = parts.bottom.get_input_embeddings(), parts.top.get_output_embeddings()

    with pytest.raises(TensorMismatchError, match="mis-shaped"):
        load_adapter(parts, adapter)

    assert kept == (parts.bottom.get_input_embeddings(), parts.top.get_output_embeddings())


def test_components_of_different_adapters_do_not_join(plain: World, tmp_path: Path) -> None:
    """Nor do adapted ones and a bare one that the adapter has tensors for."""
    other = Path(shutil.copytree(plain.adapter, tmp_path / "other"))
    spoil_tensors(lambda tensors: tensors[KEY].add_(1))(other)
    parts = plain.parts()
    load_adapter([parts.bottom, parts.top], plain.adapter)
    with pytest.raises(ConfigurationError, match="is not loaded on trunk"):
        SplitCausalLM(*parts)
    load_adapter(parts.trunk, other)

    with pytest.raises(ConfigurationError, match="different adapters"):
        SplitCausalLM(*parts)
    with pytest.raises(ConfigurationError, match="different adapters"):
        save_adapter(parts, tmp_path / "saved")


def test_a_component_without_tensors_of_the_adapter_joins(worlds: Callable[[str], World]) -> None:
    """The trunk has none of them: loaded or not, the model is the same."""
    world = worlds("qwen2-one-layer")
    parts = world.parts()
    load_adapter([parts.bottom, parts.top], world.adapter)

    assert torch.equal(logits(SplitCausalLM(*parts)), logits(world.whole()))


@pytest.mark.parametrize("model_type", ["qwen2", "gemma3_text"])
def test_modules_are_replaced_by_the_end_of_their_names(tmp_path: Path, model_type: str) -> None:
    """PEFT takes ``norm`` for every layer's norms too, which all components have."""
    world = World(tmp_path, model_type, {}, torch.float32, lora(target_modules=["q_proj"], modules_to_save=["norm"]))
    parts = world.parts()
    load_adapter(parts, world.adapter)

    split = SplitCausalLM(*parts)
    assert torch.equal(logits(split), logits(world.whole()))
    saved = load_file(save_adapter(split, tmp_path / "saved") / WEIGHTS)
    expected = load_file(world.adapter / WEIGHTS)
    assert any("input_layernorm" in key for key in expected)
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[key], expected[key]) for key in saved)


@pytest.mark.parametrize("target", [None, 3, "a_file", "a_folder", "stale"])
def test_where_no_adapter_is_saved(plain: World, tmp_path: Path, target: Any) -> None:
    """Next to other files, the adapter's own could not be identified."""
    (tmp_path / "a_file").write_text("x")
    for folder, file in (("a_folder", "notes.txt"), ("stale", "adapter_model.bin")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / file).write_text("x")
    parts = plain.parts()
    load_adapter(parts, plain.adapter)

    with pytest.raises(ConfigurationError) as caught:
        save_adapter(parts, tmp_path / target if isinstance(target, str) else target)

    assert caught.value.hint
    assert not list(tmp_path.glob("*/.adapter*"))


def test_an_earlier_adapter_is_replaced(plain: World, tmp_path: Path) -> None:
    """The folder that PEFT wrote, and its own."""
    parts = plain.parts()
    load_adapter(parts, plain.adapter)

    for _ in range(2):
        save_adapter(parts, plain.adapter)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A whole model in a folder of its own, to which an adapter may be added."""
    return write_checkpoint(tmp_path / "single", tiny_model("qwen2", tie_word_embeddings=False))


def unsplit(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def split(folder: Path, **options: Any) -> SplitCausalLM:
    return SplitCausalLM(*load_split_model(None, CUTS, folder, **options)).eval()


def add_adapter(folder: Path, *, rank: int = 4, **options: Any) -> None:
    """Write an adapter that PEFT makes for a folder's model, with random values, next to the weights."""
    torch.manual_seed(2)
    settings = {"target_modules": ["q_proj", "down_proj"], **options}
    model = peft.get_peft_model(unsplit(folder), peft.LoraConfig(r=rank, task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3)
    model.save_pretrained(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("strategy", ["mapped", "copied", "incremental", "whole"])
def test_an_adapter_with_the_weights_is_applied(single: Path, strategy: str, dtype: str) -> None:
    """As ``from_pretrained`` does: bit for bit, whichever way the weights are read."""
    plain = logits(unsplit(single))
    add_adapter(single)
    whole = AutoModelForCausalLM.from_pretrained(single, dtype=dtype).eval()

    got = logits(split(single, strategy=strategy, dtype=dtype))

    assert torch.equal(got, logits(whole))
    assert not torch.allclose(got.float(), plain)


def test_one_component_gets_its_share_of_the_adapter(single: Path) -> None:
    """A trunk alone is the one of a load of all."""
    add_adapter(single)
    hidden = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))

    alone = load_split_model(None, CUTS, single, parts=("trunk",)).trunk
    together = load_split_model(None, CUTS, single).trunk

    assert alone is not None
    assert together is not None
    assert torch.equal(alone(hidden), together(hidden))
    assert any("lora_A" in name for name, _ in alone.named_parameters())


def test_an_adapter_with_the_weights_needs_peft(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers leaves it out in silence then; here the package is named."""
    from splitlearn_core.loading import options

    add_adapter(single)
    monkeypatch.setattr(options, "find_spec", lambda _: None)

    with pytest.raises(SplitLearnError, match="adapter") as caught:
        load_split_model(None, CUTS, single)

    assert "[peft]" in caught.value.hint


def test_an_adapter_that_cannot_be_cut_is_refused(single: Path) -> None:
    """With the reason, and nothing is loaded without it."""
    add_adapter(single)
    path = single / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layer_replication": [[0, 2]]}))

    with pytest.raises(SplitLearnError, match="layer_replication") as caught:
        load_split_model(None, CUTS, single)

    assert "merge" in caught.value.hint


def test_a_folder_with_an_adapter_is_not_split_without_it(single: Path, tmp_path: Path) -> None:
    """Saved components have no adapter: the error says what would be missing, and what to do."""
    add_adapter(single)

    for dtype in ("auto", "bfloat16"):
        with pytest.raises(SplitLearnError, match="adapter") as caught:
            save_split(single, tmp_path / "out", CUTS, dtype=dtype)
        assert "load_adapter" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_an_adapter_alone_names_load_adapter(single: Path, tmp_path: Path) -> None:
    """The error says what the folder is and what it belongs onto."""
    add_adapter(single)
    alone = tmp_path / "alone"
    alone.mkdir()
    for path in single.glob("adapter_*"):
        path.rename(alone / path.name)

    with pytest.raises(SplitLearnError, match="adapter") as caught:
        load_split_model(None, CUTS, alone)

    assert "load_adapter" in caught.value.hint
    assert str(single) in caught.value.hint


def state(parts: Any) -> dict[str, torch.Tensor]:
    return {f"{part.component}.{name}": each.clone() for part in parts for name, each in part.state_dict().items()}


@pytest.mark.parametrize(
    ("spoil", "options", "words"),
    [
        # No layer of the first projection refuses, each of the second does: qwen2 has a bias in one of them alone.
        ("lora_bias", {}, "base layer has no bias"),
        ("nan", {"safe_merge": True}, "NaNs detected"),
    ],
)
def test_a_merge_that_peft_refuses_changes_nothing(
    tmp_path: Path, spoil: str, options: dict[str, Any], words: str
) -> None:
    """Nor does it at a second try; the adapter comes off, and the components are those of a fresh load."""
    config = lora(target_modules=["q_proj", "o_proj"], lora_bias=spoil == "lora_bias")
    world = World(tmp_path, "qwen2", {}, torch.float32, config)
    if spoil == "nan":
        last = "base_model.model.model.layers.5.self_attn.o_proj.lora_B.weight"
        spoil_tensors(lambda tensors: tensors[last].fill_(float("nan")))(world.adapter)
    parts = world.parts()
    load_adapter(parts, world.adapter)
    before = state(parts)

    for _ in range(2):
        with pytest.raises(ConfigurationError, match=words) as caught:
            merge_and_unload(parts, **options)
        after = state(parts)
        assert list(after) == list(before)
        for name, each in before.items():
            torch.testing.assert_close(after[name], each, rtol=0, atol=0, equal_nan=True)

    assert "o_proj of" in caught.value.message
    unload_adapter(parts)
    fresh = state(world.parts())
    assert all(torch.equal(each, fresh[name]) for name, each in state(parts).items())


def test_an_adapter_on_the_components_is_seen_by_their_model(plain: World, tmp_path: Path) -> None:
    """Also one that came after the model was made of them; it is no part of a checkpoint of the whole model."""
    split, whole = SplitCausalLM(*plain.parts()), plain.whole()
    bare = list(split.state_dict())
    for component in split.components:
        if component is not split.top:
            load_adapter(component, plain.adapter)
    load_adapter(split.top, plain.adapter)

    assert torch.equal(logits(split), logits(whole))
    learned = {f"base_model.model.{name}" for name, _ in split.named_parameters() if ".lora_" in name}
    assert learned == {name for name, _ in whole.named_parameters() if ".lora_" in name}
    with pytest.raises(ConfigurationError, match="adapter on bottom, trunk, top"):
        split.save_pretrained(tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()
    merge_and_unload(split)
    assert list(split.state_dict()) == bare
    split.save_pretrained(tmp_path / "checkpoint")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    assert torch.equal(logits(merged), logits(whole.merge_and_unload()))


def test_an_adapter_of_pefts_own_is_not_taken_for_ours(plain: World, tmp_path: Path) -> None:
    """What get_peft_model put on a split model is neither overwritten, nor dropped, nor saved with a component."""
    split = SplitCausalLM(*plain.parts())
    own = peft.get_peft_model(split, lora(target_modules=["q_proj"], init_lora_weights=False))
    before, weights = logits(own), state(split.components)
    out = tmp_path / "saved"
    for action in (
        lambda: load_adapter(split, plain.adapter),
        lambda: save_adapter(split, out),
        lambda: merge_and_unload(split.trunk),
        lambda: unload_adapter(split),
    ):
        with pytest.raises(ConfigurationError, match="applied with PEFT itself"):
            action()
    for saved in (split, split.trunk, own):
        with pytest.raises(ConfigurationError, match=r"there is an adapter|PeftModelForCausalLM cannot be saved"):
            save_split(saved, out)
    with pytest.raises(ConfigurationError, match="PeftModelForCausalLM is not a component") as caught:
        save_adapter(own, out)
    with pytest.raises(ConfigurationError, match="a checkpoint of the whole model cannot hold"):
        split.save_pretrained(out)

    assert "save_pretrained" in caught.value.hint
    assert not out.exists()
    assert torch.equal(logits(own), before)
    assert all(torch.equal(each, weights[name]) for name, each in state(split.components).items())
    own.unload()
    load_adapter(split, plain.adapter)
    assert torch.equal(logits(split), logits(plain.whole()))


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
def test_an_adapter_that_peft_changed_is_not_saved_as_the_one_that_was_loaded(plain: World, tmp_path: Path) -> None:
    """PEFT takes the same name again, and overwrites what was there."""
    split = SplitCausalLM(*plain.parts())
    load_adapter(split, plain.adapter)
    peft.get_peft_model(split, lora(target_modules=["q_proj"], init_lora_weights=False))

    for action in (lambda: save_adapter(split, tmp_path / "saved"), lambda: merge_and_unload(split)):
        with pytest.raises(ConfigurationError, match="PEFT itself has changed the adapter"):
            action()
    assert not (tmp_path / "saved").exists()
