"""Checkpoints in 8-bit floats with scales, and in MXFP4: planned, dequantised by component, saved, and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config, Mxfp4Config
from transformers.utils import is_accelerate_available
from transformers.utils.import_utils import is_compressed_tensors_available

from splitlearn_core import (
    CheckpointError,
    ConfigurationError,
    InvalidCheckpointError,
    SplitCausalLM,
    SplitLearnError,
    TensorMismatchError,
    load_component,
    load_split_model,
    merge_split,
    plan_split,
    save_split,
)
from splitlearn_core.plan.quantised import QuantisedTensor, resolved
from splitlearn_core.readers import dequantising
from splitlearn_core.testing.worlds import tiny_model, write_checkpoint
from splitlearn_core.types import TensorInfo

needs_accelerate = pytest.mark.skipif(
    not is_accelerate_available(), reason="accelerate is not installed: nothing was compared with transformers"
)
CUTS, SINGLE, BLOCK = (2, 4), "model.safetensors", 8
IDS = torch.tensor([[5, 17, 42, 99, 3], [7, 1, 64, 23, 9]])
STRATEGIES = ("mapped", "copied", "incremental")
FAMILY = """
from splitlearn_core import ModelFamily, hookimpl


@hookimpl
def splitlearn_model_families():
    return [ModelFamily(model_type="{0}", architecture="{1}", transformers_tables=True, uniform_layers=False)]
"""
EXPERTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "deepseek_v3": {
        "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
        "first_k_dense_replace": 1, "moe_intermediate_size": 16, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 8,
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32, "hidden_size": 64},
}  # fmt: skip
CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
}


def in_eight_bits(tensor: torch.Tensor, block: int = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix as 8-bit floats, and the scale of each block, also of those that the edges cut."""
    grid = torch.zeros([-(-size // block) for size in tensor.shape])
    result = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn)
    for row in range(grid.shape[0]):
        for column in range(grid.shape[1]):
            where = slice(row * block, (row + 1) * block), slice(column * block, (column + 1) * block)
            grid[row, column] = tensor[where].abs().max() / 448
            result[where] = (tensor[where] / grid[row, column]).to(torch.float8_e4m3fn)
    return result, grid


def quantise(folder: Path, method: str, block: int = BLOCK) -> Path:
    """Quantise the layers of a saved model, as released checkpoints are."""
    state = load_file(folder / SINGLE)
    tensors: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(1)
    for key, tensor in state.items():
        if method == "fp8" and ".layers." in key and tensor.dim() == 2 and not key.endswith("mlp.gate.weight"):
            tensors[key], tensors[f"{key}_scale_inv"] = in_eight_bits(tensor.float(), block)
        elif method == "mxfp4" and key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, columns, rows = tensor.shape
            tensors[f"{key}_blocks"] = torch.randint(
                256, (experts, rows, columns // 32, 16), generator=generator, dtype=torch.uint8
            )
            tensors[f"{key}_scales"] = torch.randint(
                118, 124, (experts, rows, columns // 32), generator=generator, dtype=torch.uint8
            )
        else:
            tensors[key] = tensor
    (folder / SINGLE).unlink()
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    stated: dict[str, Any] = {"quant_method": method}
    if method == "fp8":
        stated |= {"weight_block_size": [block, block], "activation_scheme": "dynamic"}
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"quantization_config": stated}))
    return folder


@pytest.fixture
def quantised(tmp_path: Path, world: Any) -> Callable[..., Path]:
    """Return a function that writes a quantised checkpoint of a type, whose family is installed."""

    def write(model_type: str, method: str = "fp8", dtype: torch.dtype = torch.bfloat16, block: int = BLOCK) -> Path:
        world.install(model_type, FAMILY.format(model_type, CLASSES[model_type]))
        model = tiny_model(model_type, dtype, **EXPERTS.get(model_type, {}))
        return quantise(write_checkpoint(tmp_path / f"{model_type}-{method}", model), method, block)

    return write


def whole(folder: Path, method: str, dtype: str = "auto") -> Any:
    config = FineGrainedFP8Config(dequantize=True) if method == "fp8" else Mxfp4Config(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config).eval()


@pytest.fixture
def compressed(quantised: Any) -> Callable[..., Path]:
    """Return a function that writes 8-bit floats as compressed-tensors does, with a scale for each row."""

    def write(model_type: str, scales: torch.dtype = torch.bfloat16, **scheme: Any) -> Path:
        folder: Path = quantised(model_type)

        def change(state: dict[str, torch.Tensor]) -> None:
            for key in [key for key in state if key.endswith("_scale_inv")]:
                name = key.removesuffix("_inv")
                state[name] = torch.linspace(0.001, 0.003, len(state[name.removesuffix("_scale")]))[:, None].to(scales)
                del state[key]

        edit(folder, change)
        weights = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True, "dynamic": False}
        group = {"targets": ["Linear"], "weights": {**weights, **scheme}}
        stated = {
            "quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
            "quantization_status": "compressed", "config_groups": {"group_0": group},
        }  # fmt: skip
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | {"quantization_config": stated}))
        return folder

    return write


@pytest.mark.skipif(
    not is_compressed_tensors_available(), reason="compressed-tensors is not installed: it was NOT compared with"
)
@needs_accelerate
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("dtype", "scales"), [("auto", torch.bfloat16), ("float32", torch.bfloat16), ("auto", torch.float32)]
)
@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_eight_bit_floats_of_compressed_tensors(
    compressed: Any, model_type: str, dtype: str, scales: torch.dtype
) -> None:
    """As those that transformers decompresses."""
    folder = compressed(model_type, scales)
    config = CompressedTensorsConfig(
        **json.loads((folder / "config.json").read_text())["quantization_config"], dequantize=True
    )
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, quantization_config=config)
    assert plan_split(folder, CUTS).source == "headers"
    assert equal(state_of(load_split_model(None, CUTS, folder, dtype=dtype)), expected.state_dict())


def test_other_schemes_of_compressed_tensors_are_left_to_transformers(compressed: Any) -> None:
    folder = compressed("llama", num_bits=4, type="int")
    assert plan_split(folder, CUTS).source == "config"


@pytest.mark.skipif(
    not is_compressed_tensors_available(), reason="compressed-tensors is not installed: it was NOT compared with"
)
@needs_accelerate
@pytest.mark.newest
@pytest.mark.filterwarnings("ignore")
def test_integers_of_compressed_tensors_are_dequantised_by_transformers(compressed: Any) -> None:
    """Of the whole model; components are made from that."""
    folder = compressed("llama", type="int")

    def change(state: dict[str, torch.Tensor]) -> None:
        for key in [key for key, tensor in state.items() if tensor.dtype == torch.float8_e4m3fn]:
            state[key] = (torch.arange(state[key].numel()) % 255 - 127).to(torch.int8).view(state[key].shape)

    edit(folder, change)
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"]["format"] = "int-quantized"
    (folder / "config.json").write_text(json.dumps(values))
    config = CompressedTensorsConfig(**values["quantization_config"], dequantize=True)
    expected = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).eval()

    parts = load_split_model(None, CUTS, folder)
    assert equal(state_of(parts), expected.state_dict())
    with torch.no_grad():
        assert torch.equal(SplitCausalLM(*parts)(IDS).logits, expected(IDS).logits)


@pytest.mark.parametrize("method", ["gptq", "awq", "hqq", "eetq"])
def test_what_transformers_only_computes_with_is_refused(quantised: Any, method: str) -> None:
    """Before a package is asked for, which would be of no use; of these, transformers makes no plain weights."""
    folder = quantised("llama")
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 128}
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=rf"\({method}\), and transformers only computes with such") as caught:
        load_split_model(None, CUTS, folder)
    assert "unquantised" in caught.value.hint
    assert "install" not in caught.value.hint


def state_of(parts: Any) -> dict[str, torch.Tensor]:
    return {name: tensor for part in parts if part is not None for name, tensor in part.state_dict().items()}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]) for name, tensor in first.items()
    )


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = load_file(folder / SINGLE)
    change(state)
    (folder / SINGLE).unlink()
    save_file(state, folder / SINGLE, {"format": "pt"})


@needs_accelerate
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize(
    ("model_type", "method"),
    [("llama", "fp8"), ("qwen3_moe", "fp8"), ("deepseek_v3", "fp8"), ("gpt_oss", "mxfp4")],
)
def test_components_are_those_of_the_model_that_transformers_dequantises(
    quantised: Any, model_type: str, method: str, dtype: str
) -> None:
    """Tensors and logits to the last bit, however the files are read."""
    folder = quantised(model_type, method)
    expected = whole(folder, method, dtype)
    with torch.no_grad():
        logits = expected(IDS).logits
    for strategy in STRATEGIES:
        parts = load_split_model(None, CUTS, folder, strategy=strategy, dtype=dtype)
        assert equal(state_of(parts), expected.state_dict()), strategy
        with torch.no_grad():
            assert torch.equal(SplitCausalLM(*parts)(IDS).logits, logits)
    assert not hasattr(parts.trunk.config, "quantization_config")


@needs_accelerate
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("model_type", "method"), [("deepseek_v3", "fp8"), ("gpt_oss", "mxfp4")])
def test_the_whole_model_is_dequantised_by_transformers_where_that_is_asked_for(
    quantised: Any, model_type: str, method: str
) -> None:
    folder = quantised(model_type, method)
    parts = load_split_model(None, CUTS, folder, strategy="whole")
    assert equal(state_of(parts), state_of(load_split_model(None, CUTS, folder)))


@pytest.mark.parametrize(("model_type", "method"), [("deepseek_v3", "fp8"), ("gpt_oss", "mxfp4")])
def test_a_plan_counts_what_is_read_and_what_is_kept(quantised: Any, model_type: str, method: str) -> None:
    """The bytes of its numbers and scales in the file, and the parameters of the plain model."""
    folder = quantised(model_type, method)
    plan = plan_split(folder, CUTS)
    stored = load_file(folder / SINGLE)
    parts = load_split_model(None, CUTS, folder)

    assert plan.source == "headers"
    assert plan.nbytes == sum(tensor.nbytes for tensor in stored.values())
    for planned, part in zip(plan.components, parts, strict=True):
        tensors = part.state_dict().values()
        assert planned.parameters == sum(tensor.numel() for tensor in tensors)
        assert planned.loaded_bytes(planned.dtype) == sum(tensor.nbytes for tensor in tensors)
    kept = sum(tensor.nbytes for tensor in state_of(parts).values())
    assert plan.memory["copied"].kept == kept
    assert kept < plan.memory["copied"].peak < kept + 16 * 2**20


def test_values_are_computed_in_parts(quantised: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for parts of any size."""
    folders = [quantised("deepseek_v3"), quantised("gpt_oss", "mxfp4")]
    expected = [state_of(load_split_model(None, CUTS, folder)) for folder in folders]
    for size in (1, 100, 700):
        monkeypatch.setattr(dequantising, "_VALUES", size)
        for folder, state in zip(folders, expected, strict=True):
            assert equal(state_of(load_split_model(None, CUTS, folder)), state)


def test_blocks_that_the_edge_of_a_matrix_cuts(quantised: Any) -> None:
    """They have the stated size; transformers takes it from the number of scales, and refuses most of these."""
    folder = quantised("llama", block=20)
    stored = load_file(folder / SINGLE)
    loaded = state_of(load_split_model(None, CUTS, folder, dtype="float32"))
    key = "model.layers.2.mlp.down_proj.weight"
    scales = stored[f"{key}_scale_inv"].repeat_interleave(20, 0).repeat_interleave(20, 1)
    rows, columns = stored[key].shape
    assert rows % 20
    assert columns % 20
    assert torch.equal(loaded[key], stored[key].float() * scales[:rows, :columns])


@needs_accelerate
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["one", "rows", "exponents"])
def test_scales_of_other_kinds(quantised: Any, kind: str) -> None:
    """One for a matrix, one for each row, and exponents of two."""
    folder = quantised("llama")

    def change(state: dict[str, torch.Tensor]) -> None:
        for key in [key for key in state if key.endswith("_scale_inv")]:
            rows = state[key.removesuffix("_scale_inv")].shape[0]
            state[key] = {
                "one": torch.tensor([[0.01]]),
                "rows": torch.linspace(0.001, 0.1, rows)[:, None],
                "exponents": torch.full(state[key].shape, 0.25).to(torch.float8_e8m0fnu),
            }[kind]

    edit(folder, change)
    assert equal(state_of(load_split_model(None, CUTS, folder)), whole(folder, "fp8").state_dict())


def test_a_component_is_loaded_without_the_bytes_of_the_others(quantised: Any) -> None:
    """Neither numbers nor scales of others: their bytes may be anything."""
    folder = quantised("deepseek_v3")
    trunk = plan_split(folder, CUTS, parts=("trunk",)).component("trunk")
    expected = load_split_model(None, CUTS, folder, parts=("trunk",)).trunk.state_dict()
    content = (folder / SINGLE).read_bytes()
    spoiled = bytearray(content[: trunk.tensors[0].info.begin]) + bytes(len(content) - trunk.tensors[0].info.begin)
    header = 8 + int.from_bytes(content[:8], "little")
    spoiled[header:] = b"\xff" * (len(content) - header)
    for tensor in trunk.tensors:
        spoiled[tensor.info.begin : tensor.info.end] = content[tensor.info.begin : tensor.info.end]
    (folder / SINGLE).write_bytes(bytes(spoiled))

    assert equal(load_split_model(None, CUTS, folder, parts=("trunk",)).trunk.state_dict(), dict(expected))


@pytest.mark.parametrize(("model_type", "method"), [("deepseek_v3", "fp8"), ("gpt_oss", "mxfp4")])
def test_saved_components_have_plain_weights(quantised: Any, tmp_path: Path, model_type: str, method: str) -> None:
    """Under the names of plain checkpoints, so that merged ones are such."""
    folder = quantised(model_type, method)
    state = state_of(load_split_model(None, CUTS, folder))
    with pytest.raises(ConfigurationError, match="quantised"):
        save_split(folder, tmp_path / "refused", CUTS)
    save_split(folder, tmp_path / "split", CUTS, dtype="bfloat16")
    trunk = load_component(tmp_path / "split", "trunk")
    assert all(torch.equal(tensor, state[name]) for name, tensor in trunk.state_dict().items())

    merged = merge_split(tmp_path / "split", out=tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(merged)
    assert equal({**plain.state_dict()}, state)
    names = load_file(merged / SINGLE).keys()
    assert not any(name.endswith(("_scale_inv", "_blocks", "_scales")) for name in names)
    if model_type == "deepseek_v3":
        assert "model.layers.2.mlp.experts.3.up_proj.weight" in names


def test_doctor_says_how_they_are_read(quantised: Any) -> None:
    from splitlearn_core.doctor.load_checks import check_model

    found = [finding.what for finding in check_model(str(quantised("llama")), load=True)]
    assert any("those of a component are dequantised" in what for what in found)
    assert any("components load" in what or "top load" in what for what in found), found


def lose(suffix: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda state: state.pop(next(key for key in sorted(state) if key.endswith(suffix)))


def reshape(suffix: str, *shape: int) -> Callable[[dict[str, torch.Tensor]], Any]:
    def change(state: dict[str, torch.Tensor]) -> None:
        key = next(key for key in sorted(state) if key.endswith(suffix))
        state[key] = torch.ones(shape, dtype=state[key].dtype)

    return change


@pytest.mark.parametrize(
    ("method", "change", "expected"),
    [
        ("fp8", lose("q_proj.weight_scale_inv"), "q_proj.weight is F8_E4M3, and has no scales"),
        ("fp8", lose("q_proj.weight"), "lack numbers or scales: .*q_proj.weight"),
        (
            "fp8",
            reshape("q_proj.weight_scale_inv", 3, 5),
            r"do not fit .*q_proj.weight \[32, 32\] in blocks of \[8, 8\]",
        ),
        ("fp8", reshape("q_proj.weight_scale_inv", 7), r"do not fit .*q_proj.weight"),
        ("mxfp4", lose("gate_up_proj_scales"), "lack numbers or scales: .*gate_up_proj_scales"),
        ("mxfp4", lose("gate_up_proj_blocks"), "lack numbers or scales: .*gate_up_proj_blocks"),
        ("mxfp4", reshape("gate_up_proj_scales", 4, 64, 3), "do not fit .*gate_up_proj_blocks"),
    ],
)
def test_what_is_missing_or_does_not_fit_is_refused_by_the_plan(
    quantised: Any, method: str, change: Any, expected: str
) -> None:
    folder = quantised("llama" if method == "fp8" else "gpt_oss", method)
    edit(folder, change)
    for act in (plan_split, lambda path, cuts: load_split_model(None, cuts, path)):
        with pytest.raises((TensorMismatchError, InvalidCheckpointError), match=expected) as caught:
            act(folder, CUTS)
        assert caught.value.hint


@pytest.mark.parametrize("block", [[128], [0, 8], "8", [8.0, 8], 8])
def test_an_invalid_size_of_blocks_is_refused(quantised: Any, edit_json: Any, block: Any) -> None:
    folder = quantised("llama")
    edit_json(folder / "config.json", quantization_config={"quant_method": "fp8", "weight_block_size": block})
    with pytest.raises(SplitLearnError, match="weight_block_size"):
        plan_split(folder, CUTS)


@pytest.mark.parametrize("scales", [torch.float8_e8m0fnu, torch.uint8])
def test_exponents_are_no_scales_of_compressed_tensors(compressed: Any, scales: torch.dtype) -> None:
    """Its values are rounded to the dtype of the scales, which cannot hold them."""
    folder = compressed("llama", scales)
    with pytest.raises(TensorMismatchError, match="exponents"):
        plan_split(folder, CUTS)


def test_blocks_that_are_wider_than_the_matrix_take_no_more_memory(quantised: Any, edit_json: Any) -> None:
    folder = quantised("llama")

    def change(state: dict[str, torch.Tensor]) -> None:
        for key in [key for key in state if key.endswith("_scale_inv")]:
            rows = len(state[key.removesuffix("_scale_inv")])
            state[key] = torch.linspace(0.001, 0.1, rows // BLOCK)[:, None]

    edit(folder, change)
    states = []
    for stated in ({}, {"weight_block_size": [BLOCK, 10**7]}):
        edit_json(folder / "config.json", quantization_config={"quant_method": "fp8", **stated})
        states.append(state_of(load_split_model(None, CUTS, folder)))
    assert equal(*states)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
def test_one_scale_for_several_matrices(shape: tuple[int, ...]) -> None:
    numbers = torch.arange(96).reshape(3, 4, 8).to(torch.float8_e4m3fn)
    infos = {
        "n": TensorInfo("n", "F8_E4M3", (3, 4, 8), "", 0, 96),
        "s": TensorInfo("s", "F32", shape, "", 96, 100),
    }
    tensor = resolved(QuantisedTensor("k", "fp8", "n", "s"), infos)
    values = dequantising.dequantise(tensor, numbers, torch.full(shape, 0.5), (0, 3), torch.float32)
    assert torch.equal(values, numbers.float() * 0.5)


@pytest.mark.parametrize("shape", [(0, 4, 2, 16), (4, 0, 2, 16), (4, 4, 0, 16), (4, 4, 2, 0)])
def test_packed_experts_of_no_size_are_refused(shape: tuple[int, ...]) -> None:
    infos = {
        "n": TensorInfo("n", "U8", shape, "", 0, 0),
        "s": TensorInfo("s", "U8", shape[:-1], "", 0, 0),
    }
    with pytest.raises(ValueError, match="do not fit"):
        resolved(QuantisedTensor("k", "mxfp4", "n", "s"), infos)
