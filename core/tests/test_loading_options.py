"""Components with a dtype and a device each, and the reports of their load."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from splitlearn_core import (
    ConfigurationError,
    InsufficientMemoryError,
    InvalidSplitError,
    ModelFactory,
    ModelRegistry,
    SplitCausalLM,
    TensorMismatchError,
    load_split_model,
    plan_split,
)

pytestmark = [pytest.mark.libs, pytest.mark.usefixtures("llama")]

CUTS = (2, 4)
IDS = torch.tensor([[5, 17, 42, 99, 3, 8, 64], [1, 2, 3, 4, 5, 6, 7]])
MASK = torch.tensor([[1] * 7, [0] * 2 + [1] * 5])
MIXED = {"bottom": "float32", "trunk": torch.bfloat16, "top": "float64"}


def cast_at_the_cuts(folder: Path) -> torch.Tensor:
    """Run three unsplit models, one in each dtype, each going on from the last one's hidden states."""
    entering: torch.Tensor | None = None
    for name, leave in (("bottom", CUTS[0]), ("trunk", CUTS[1]), ("top", None)):
        dtype: Any = MIXED[name]
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        begin = {"bottom": None, "trunk": CUTS[0], "top": CUTS[1]}[name]
        seen: list[torch.Tensor] = []

        def enter(_: Any, inputs: Any, kwargs: Any, state: Any = entering, to: Any = whole.dtype) -> Any:
            return (state.to(to), *inputs[1:]), kwargs

        def keep(_: Any, inputs: Any, kept: Any = seen) -> None:
            kept.append(inputs[0])

        if begin is not None:
            whole.model.layers[begin].register_forward_pre_hook(enter, with_kwargs=True)
        if leave is not None:
            whole.model.layers[leave].register_forward_pre_hook(keep)
        with torch.inference_mode():
            logits: torch.Tensor = whole(IDS, attention_mask=MASK, use_cache=False).logits
        entering = seen[0] if seen else None
    return logits


@pytest.mark.parametrize("kind", ["single", "sharded", "tied"])
@pytest.mark.parametrize("strategy", ["mapped", "copied"])
def test_mixed_dtypes_cast_at_the_cuts(checkpoint: Callable[[str], Path], kind: str, strategy: str) -> None:
    """Logits are those of the unsplit model's layers, each part of them in its own dtype."""
    folder = checkpoint(kind)
    parts: Any = load_split_model("llama", CUTS, folder, dtype=MIXED, strategy=strategy)

    assert [part.dtype for part in parts] == [torch.float32, torch.bfloat16, torch.float64]
    split = SplitCausalLM(*parts, mixed_dtypes=True)
    with torch.inference_mode():
        logits = split(IDS, attention_mask=MASK, use_cache=False).logits
        assert torch.equal(logits, cast_at_the_cuts(folder))
    assert split.generate(IDS, max_new_tokens=3, pad_token_id=0).shape == (2, 10)


def test_mixed_dtypes_are_an_explicit_choice(single: Path) -> None:
    """Otherwise they are taken for a mistake; the hint says how to mean it."""
    parts: Any = load_split_model("llama", CUTS, single, dtype=MIXED)

    with pytest.raises(ConfigurationError, match="dtype differs") as caught:
        SplitCausalLM(*parts)

    assert "mixed_dtypes=True" in caught.value.hint


def test_a_plan_of_mixed_dtypes(single: Path) -> None:
    """Each component counts in its own; the cut counts in the widest."""
    plan = plan_split(single, CUTS, dtype=MIXED)

    assert plan.dtype == "mixed"
    assert [part.dtype for part in plan.components] == ["float32", "bfloat16", "float64"]
    assert [part.kv_bytes_per_token for part in plan.components] == [256, 128, 512]
    assert plan.cut_bytes_per_token == 32 * 8
    assert plan_split(single, CUTS, dtype={"trunk": "float32"}).dtype == "float32"


def test_a_tied_tensor_of_two_dtypes_is_two(tied: Path) -> None:
    """One parameter has one dtype; with the same one, it stays one parameter."""
    mixed: Any = load_split_model("llama", CUTS, tied, dtype={"top": "bfloat16"})
    same: Any = load_split_model("llama", CUTS, tied, dtype={"trunk": "bfloat16"})

    assert mixed.top.lm_head.weight.dtype == torch.bfloat16
    assert mixed.bottom.model.embed_tokens.weight.dtype == torch.float32
    assert same.top.lm_head.weight is same.bottom.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"dtype": {"head": "float32", "top": "int8"}}, ConfigurationError, ["'head'", "'int8' of top"]),
        ({"device_map": {"bottom": "cpu"}}, ConfigurationError, ["leaves out trunk", "leaves out top"]),
        ({"device_map": {"bottom": "cpu", "trunk": "meta", "top": "nowhere"}}, ConfigurationError, ["meta", "nowhere"]),
        ({"device_map": "auto", "max_memory": {"nowhere": 1}}, ConfigurationError, ["nowhere"]),
        ({"device_map": "auto", "max_memory": {"cpu": "1KiB"}}, InsufficientMemoryError, ["trunk", "cpu 1.0 KiB"]),
        ({"max_memory": {"cpu": "1KiB"}}, InsufficientMemoryError, ["trunk on cpu", "cpu 1.0 KiB"]),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(single: Path, options: Any, error: type[Exception], words: list[str]) -> None:
    """Before a weight is read, and all of it at once."""
    stages: list[str] = []

    with pytest.raises(error) as caught:
        load_split_model("llama", CUTS, single, progress=lambda said: stages.append(said.stage), **options)

    assert all(word in str(caught.value) for word in words), caught.value
    assert "reading" not in stages
    assert "building" not in stages


def test_auto_without_a_gpu_is_the_cpu(single: Path, whole: Any) -> None:
    """And within limits that suffice, nothing changes."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    parts: Any = load_split_model("llama", CUTS, single, device_map="auto", max_memory={"cpu": "1GiB"})

    assert {part.device.type for part in parts} == {"cpu"}
    assert torch.equal(SplitCausalLM(*parts)(IDS).logits, whole(IDS).logits)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("device_map", ["auto", {"bottom": "cpu", "trunk": "cuda:0", "top": "cpu"}], ids=str)
def test_components_on_a_gpu(single: Path, whole: Any, device_map: Any) -> None:
    """Hidden states go where the next component is; those on the CPU stay pages of the file."""
    parts: Any = load_split_model("llama", CUTS, single, device_map=device_map)

    assert parts.trunk.device == torch.device("cuda:0")
    with torch.inference_mode():
        got = SplitCausalLM(*parts)(IDS.to(parts.bottom.device)).logits.cpu()
        assert torch.allclose(got, whole(IDS).logits, atol=1e-4)


def test_the_log_says_where_a_load_stands(single: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One line a stage, with the files, the bytes and the time."""
    with caplog.at_level(logging.INFO, "splitlearn_core"):
        load_split_model("llama", CUTS, single, parts=["trunk"])

    lines = [record.getMessage() for record in caplog.records]
    assert [line.split()[0] for line in lines] == ["Resolving", "Found", "Planning", "Building", "Loading", "Ready:"]
    assert lines[3].startswith("Building trunk, layers [2, 4) of 6")
    assert "KiB of 1 files" in lines[4]
    assert f"in {single} (mapped)" in lines[4]
    assert "trunk on cpu in float32" in lines[5]
    assert lines[5].endswith(" s")
    assert all(record.name.startswith("splitlearn_core.loading") for record in caplog.records)


def test_the_classic_factory(single: Path, whole: Any) -> None:
    """Its arguments are explicit, and reach the load."""
    parts: Any = ModelFactory.create_split_models(
        "llama", single, *CUTS, torch_dtype=torch.float32, attn_implementation="eager", parts=("bottom", "trunk", "top")
    )
    whole_eager = AutoModelForCausalLM.from_pretrained(single, attn_implementation="eager")

    assert parts.trunk.config._attn_implementation == "eager"
    with torch.inference_mode():
        assert torch.equal(SplitCausalLM(*parts)(IDS).logits, whole_eager(IDS).logits)


def test_arguments_that_contradict_each_other(single: Path) -> None:
    """All are named."""
    with pytest.raises(ConfigurationError) as caught:
        ModelFactory.create_split_models(
            "llama", single, *CUTS, dtype="float32", torch_dtype="float16", low_memory=True, strategy="mapped"
        )

    assert "torch_dtype" in caught.value.message
    assert "low_memory" in caught.value.message


def test_the_classic_registry() -> None:
    """It lists what plugins offer."""
    assert "llama" in ModelRegistry.list_models()
    assert ModelRegistry.is_model_registered("llama")


@pytest.mark.parametrize(
    "layers", [(4, 2), (-1, 2), (0, 7), (0, 4), (2, 6), (None, 4), ("2", 4), (2, 4.0), (True, 4)], ids=str
)
def test_a_component_of_no_such_layers(whole: Any, layers: tuple[Any, Any]) -> None:
    """Out of range, or no number at all: one kind of error."""
    trunk = ModelRegistry.get_model_class("llama", "trunk")

    with pytest.raises(InvalidSplitError) as caught:
        trunk.from_pretrained_split(whole.state_dict(), whole.config, start_layer=layers[0], end_layer=layers[1])

    assert caught.value.hint


@pytest.mark.parametrize("wrong", [None, [1], {"model.layers.2.mlp.up_proj.weight": 1}], ids=str)
def test_what_is_no_state_dict(whole: Any, wrong: Any) -> None:
    """Refused before anything is built."""
    trunk = ModelRegistry.get_model_class("llama", "trunk")

    with pytest.raises(ConfigurationError, match="not a mapping from names to tensors"):
        trunk.from_pretrained_split(wrong, whole.config, start_layer=2, end_layer=4)


def trunk_of(state: Any, config: Any) -> Any:
    return ModelRegistry.get_model_class("llama", "trunk").from_pretrained_split(
        state, config, start_layer=2, end_layer=4
    )


def test_a_config_may_be_the_values_of_its_file(whole: Any) -> None:
    """A mapping becomes the family's own class; the component is the same."""
    expected = trunk_of(whole.state_dict(), whole.config)(torch.ones(1, 3, 32))

    assert torch.equal(trunk_of(whole.state_dict(), whole.config.to_dict())(torch.ones(1, 3, 32)), expected)


@pytest.mark.parametrize("config", [None, "tiny", 3, GPT2Config(), {"num_hidden_layers": "many"}], ids=repr)
def test_what_is_no_config(whole: Any, config: Any) -> None:
    """Another family's, or none at all."""
    with pytest.raises(ConfigurationError) as caught:
        trunk_of(whole.state_dict(), config)

    assert caught.value.hint


def test_tensors_of_several_dtypes_are_refused(whole: Any) -> None:
    """What is mixed is named; those of other components do not matter."""
    state = dict(whole.state_dict())
    state["model.layers.0.mlp.up_proj.weight"] = state["model.layers.0.mlp.up_proj.weight"].half()
    trunk_of(state, whole.config)
    state["model.layers.2.mlp.up_proj.weight"] = state["model.layers.2.mlp.up_proj.weight"].half()

    with pytest.raises(ConfigurationError, match=r"float16: model\.layers\.2\.mlp\.up_proj\.weight"):
        trunk_of(state, whole.config)


def test_tensors_without_memory_are_the_callers(whole: Any) -> None:
    """Not an error of ours to be reported."""
    with pytest.raises(ConfigurationError, match="meta device"):
        trunk_of({key: tensor.to("meta") for key, tensor in whole.state_dict().items()}, whole.config)


def test_whole_numbers_are_no_weights(whole: Any) -> None:
    """The tensors are named, and no configuration is blamed."""
    with pytest.raises(TensorMismatchError, match="mis-typed") as caught:
        trunk_of({key: tensor.to(torch.int32) for key, tensor in whole.state_dict().items()}, whole.config)

    assert "transformers cannot make" not in str(caught.value)


def test_limits_are_a_mapping(single: Path) -> None:
    """A size alone does not say of which device."""
    with pytest.raises(ConfigurationError, match="no mapping"):
        load_split_model("llama", CUTS, single, max_memory="10GiB")  # type: ignore[arg-type]


def test_both_names_of_a_dtype(single: Path) -> None:
    """One dtype, by torch's object and by its name."""
    parts: Any = ModelFactory.create_split_models("llama", single, *CUTS, dtype="float16", torch_dtype=torch.float16)

    assert parts.trunk.dtype == torch.float16


def test_a_storage_path_is_a_path(single: Path) -> None:
    """A number is none."""
    with pytest.raises(ConfigurationError, match="storage_path is 3"):
        ModelFactory.create_split_models("llama", single, *CUTS, storage_path=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations(single: Path, implementation: str) -> None:
    """Each gives what the unsplit model gives with it."""
    parts: Any = load_split_model("llama", CUTS, single, attn_implementation=implementation)
    whole = AutoModelForCausalLM.from_pretrained(single, attn_implementation=implementation)

    with torch.inference_mode():
        got = SplitCausalLM(*parts)(IDS, attention_mask=MASK).logits
        assert torch.equal(got, whole(IDS, attention_mask=MASK).logits)


def test_an_attention_that_is_not_there(single: Path) -> None:
    """The message names those that are."""
    with pytest.raises(ConfigurationError) as caught:
        load_split_model("llama", CUTS, single, attn_implementation="telepathy")

    assert "telepathy" in caught.value.message
    assert "sdpa" in str(caught.value)
