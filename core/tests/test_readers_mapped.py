"""The traditional way: the whole model through transformers, the reference and the last resort."""

from __future__ import annotations

import importlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from transformers.utils import is_accelerate_available

from splitlearn_core import (
    CheckpointError,
    ConfigurationError,
    LoadCancelledError,
    load_split_model,
    plan_split,
    save_split,
)
from splitlearn_core.build.torch_state import BUILD_LOCK, build_turn
from splitlearn_core.loading.opening import open_model
from splitlearn_core.loading.options import LoadOptions, memory_needed
from splitlearn_core.loading.planning import plan_and_fetch
from splitlearn_core.types import Component

CUTS = (2, 4)
SINGLE = "model.safetensors"

pytestmark = [pytest.mark.libs, pytest.mark.usefixtures("llama")]


def state_of(parts: Any) -> dict[str, torch.Tensor]:
    return {name: tensor for part in parts if part is not None for name, tensor in part.state_dict().items()}


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("binary", [False, True], ids=["safetensors", "bin"])
def test_it_gives_what_from_pretrained_gives(single: Path, whole: Any, dtype: str, binary: bool) -> None:
    """Of each part, from every format that transformers reads."""
    if binary:
        (single / SINGLE).unlink()
        torch.save(whole.state_dict(), single / "pytorch_model.bin")
    expected = AutoModelForCausalLM.from_pretrained(single, dtype=dtype, use_safetensors=not binary).state_dict()

    found = state_of(load_split_model("llama", CUTS, single, strategy="whole", dtype=dtype))

    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name])


def test_the_components_have_memory_of_their_own(single: Path) -> None:
    """The whole model is let go of."""
    trunk = load_split_model("llama", CUTS, single, parts=["trunk"], strategy="whole").trunk
    before = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}  # type: ignore[union-attr]

    (single / SINGLE).write_bytes(b"gone")

    for name, tensor in trunk.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(tensor, before[name])


def test_the_model_is_loaded_once_for_all_parts(single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a part in another dtype is what it would be alone."""
    from transformers import LlamaForCausalLM

    loads: list[object] = []
    original = LlamaForCausalLM.from_pretrained
    monkeypatch.setattr(
        LlamaForCausalLM, "from_pretrained", lambda *args, **options: (loads.append(1), original(*args, **options))[1]
    )
    dtypes = {"bottom": "float32", "trunk": "bfloat16", "top": "float16"}

    found = load_split_model("llama", CUTS, single, strategy="whole", dtype=dtypes)

    assert len(loads) == 1
    for part, name in zip(found, dtypes, strict=True):
        alone = getattr(load_split_model("llama", CUTS, single, parts=[name], dtype=dtypes[name]), name)
        assert all(torch.equal(tensor, alone.state_dict()[key]) for key, tensor in part.state_dict().items())  # type: ignore[union-attr]


def test_its_memory_is_the_whole_models_and_the_parts(single: Path, whole: Any) -> None:
    """As the plan predicts; the whole model's is given back."""
    model = open_model(single)
    fetched = plan_and_fetch(model, CUTS, (Component.BOTTOM, Component.TRUNK), "auto", lambda _: None)
    plan = fetched.split

    needs = memory_needed(model, plan, LoadOptions(strategy="whole"), fetched.paths)

    everything = sum(tensor.nbytes for tensor in whole.state_dict().values())
    assert (needs.kept, needs.peak, needs.mapped) == (plan.nbytes, plan.nbytes + everything, 0)


def test_it_waits_for_its_turn_and_can_be_stopped_meanwhile() -> None:
    """from_pretrained runs alone; a load that waits for it can be cancelled."""
    asked: list[int] = []
    caught: list[BaseException] = []

    def waiting() -> None:
        asked.append(1)
        if len(asked) == 3:
            raise LoadCancelledError("stop")

    def wait() -> None:
        try:
            with build_turn(waiting):
                pass
        except LoadCancelledError as error:
            caught.append(error)

    thread = threading.Thread(target=wait)
    with BUILD_LOCK:
        thread.start()
        thread.join(60)

    assert len(caught) == 1


QUANTISED = {"quant_method": "gptq", "bits": 4}


def test_a_quantised_checkpoint_is_planned_by_its_configuration(single: Path, edit_json: Callable[..., None]) -> None:
    """Its parts in plain weights, which is what comes of loading them."""
    plain = plan_split(single, CUTS)
    edit_json(single / "config.json", quantization_config=QUANTISED)

    plan = plan_split(single, CUTS)

    assert (plan.source, plan.parameters, plan.shards) == ("config", plain.parameters, ())


@pytest.mark.parametrize("strategy", ["auto", "whole"])
@pytest.mark.parametrize(
    "stated", [QUANTISED, {"bits": 4}, {"quant_method": "of my own"}, {"quant_method": None}, "gptq", ["gptq"]], ids=str
)
def test_what_transformers_lacks_for_a_quantised_checkpoint_is_said(
    single: Path, edit_json: Callable[..., None], strategy: str, stated: Any
) -> None:
    """An error of ours before weights are read: a missing package, or an unknown method."""
    edit_json(single / "config.json", quantization_config=stated)
    (single / SINGLE).write_bytes(b"not to be read")

    with pytest.raises(CheckpointError, match="is quantised") as caught:
        load_split_model("llama", CUTS, single, strategy=strategy)

    assert "unquantised" in caught.value.hint


@pytest.fixture
def fp8(single: Path, edit_json: Callable[..., None]) -> Path:
    """Return a checkpoint whose linear layers are in blocks of 8-bit floats, as DeepSeek's are."""
    block = 16
    state = load_file(single / SINGLE)
    quantised: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        if ".layers." not in key or tensor.dim() == 1:
            quantised[key] = tensor
            continue
        rows, columns = (size // block for size in tensor.shape)
        blocks = tensor.view(rows, block, columns, block)
        scale = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-6) / torch.finfo(torch.float8_e4m3fn).max
        scaled = blocks / scale[:, None, :, None]
        quantised[key] = scaled.view(tensor.shape).to(torch.float8_e4m3fn)
        quantised[f"{key.removesuffix('weight')}weight_scale_inv"] = scale
    save_file(quantised, single / SINGLE, {"format": "pt"})
    stated = {"quant_method": "fp8", "weight_block_size": [block, block], "activation_scheme": "dynamic"}
    edit_json(single / "config.json", quantization_config=stated, dtype="bfloat16")
    return single


@pytest.mark.skipif(not is_accelerate_available(), reason="accelerate is not installed: fp8 weights were NOT tested")
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU transformers leaves fp8 weights as they are")
@pytest.mark.filterwarnings("ignore")
def test_a_quantised_checkpoint_is_dequantised_by_transformers(fp8: Path) -> None:
    """By that of the whole model, as a reference; see test_quantised for components alone."""
    try:
        importlib.import_module("transformers.integrations.finegrained_fp8")
    except ModuleNotFoundError as error:
        pytest.skip(f"this version of transformers needs {error.name} to read fp8 weights: they were NOT tested")
    expected = AutoModelForCausalLM.from_pretrained(fp8).state_dict()

    parts = load_split_model("llama", CUTS, fp8, strategy="whole")

    found = state_of(parts)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name])
    assert not hasattr(parts.trunk.config, "quantization_config")  # type: ignore[union-attr]


@pytest.mark.parametrize("strategy", ["mapped", "copied", "incremental"])
def test_the_others_refuse_quantised_weights(single: Path, edit_json: Callable[..., None], strategy: str) -> None:
    """They read what is there, and would take the numbers for weights."""
    stated = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    edit_json(single / "config.json", quantization_config=stated)
    if not is_accelerate_available():
        pytest.skip("accelerate is not installed: transformers itself would refuse before")

    with pytest.raises(ConfigurationError, match="quantised"):
        load_split_model("llama", CUTS, single, strategy=strategy)


def test_a_model_that_lacks_a_tensor_is_refused(single: Path) -> None:
    """transformers would fill it with random numbers."""
    state = load_file(single / SINGLE)
    lost = next(key for key in state if ".layers.0." in key)
    del state[lost]
    save_file(state, single / SINGLE, {"format": "pt"})

    with pytest.raises(CheckpointError, match="missing") as caught:
        load_split_model("llama", CUTS, single, parts=["trunk"], strategy="whole")

    assert lost in str(caught.value)
    assert json.loads((single / "config.json").read_text())["model_type"] == "llama"


def test_a_saved_component_is_no_whole_model(single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before transformers initialises the rest at random; ``auto`` still reads it."""
    save_split(single, tmp_path / "out", CUTS, parts=["trunk"])
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", None)
    folder = next(path.parent for path in (tmp_path / "out").rglob("config.json"))

    with pytest.raises(ConfigurationError, match="trunk only, no whole model"):
        load_split_model("llama", CUTS, folder, parts=["trunk"], strategy="whole")

    assert load_split_model("llama", CUTS, folder, parts=["trunk"]).trunk is not None
