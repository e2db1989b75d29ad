"""Architectures whose names and layouts differ: each against the model that was written, to the last bit."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from splitlearn_core import (
    CheckpointError,
    InvalidCheckpointError,
    ReadPlan,
    SplitCausalLM,
    SplitLearnError,
    load_split_model,
    plan_split,
)
from splitlearn_core.extension import other_sizes
from splitlearn_core.testing.worlds import random_model
from splitlearn_gguf.architectures import ARCHITECTURES, Join, Joined
from splitlearn_gguf.header import read_header
from splitlearn_gguf.strategy import GgufStrategy
from splitlearn_gguf.values import WORKING_BYTES

pytestmark = pytest.mark.libs

Write = Callable[..., Path]
IDS = torch.tensor([[5, 17, 42, 99, 3, 8]])
#: Model types that the oldest gguf library cannot write; reading them needs nothing of it.
NEWER = {
    *("glm4_moe", "ernie4_5_moe", "gpt_oss", "ministral3", "qwen3_vl", "qwen3_vl_moe", "qwen3_next", "qwen3_5_text"),
    *("qwen3_5_moe_text", "lfm2", "jamba", "minimax_m2", "llama4_text", "gemma4_text"),
}
#: Sizes that blocks of 32 divide.
EXPERTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "routed_scaling_factor": 1.5,
        "use_qk_norm": True,
        "attention_bias": True,
    },
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 32,
        "moe_num_shared_experts": 1,
        "tie_word_embeddings": False,
    },
    "minimax_m2": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    },
    "granitemoe": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.22,
        "logits_scaling": 6.0,
    },
}
_OF_QWEN = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64,
}
_LINEAR = {
    "linear_conv_kernel_dim": 3,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
#: Model types of which some layers, or all, have running states instead of attention.
RUNNING: dict[str, dict[str, Any]] = {
    "qwen3_next": {**_OF_QWEN, **_LINEAR},
    "qwen3_5_text": _LINEAR,
    "qwen3_5_moe_text": {**_OF_QWEN, **_LINEAR},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "conv"], "conv_L_cache": 4},
    "jamba": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 0,
        "mamba_d_state": 8,
        "mamba_dt_rank": 5,
    },
}
_LATENT = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
}
#: Model types of which files do not say all.
WITH_CONFIG: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**_LATENT, "topk_method": "group_limited_greedy"},
    "deepseek_v3": _LATENT,
    "phimoe": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "attention_bias": True,
        "lm_head_bias": True,
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    "ministral3": {},
    "llama4_text": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "moe_layers": [1, 3],
        "intermediate_size_mlp": 160,
        "attention_chunk_size": 4,
        "no_rope_layers": [1, 0, 1, 1],
        "attn_temperature_tuning": True,
        "floor_scale": 4,
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
        "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": True,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
}


def written(names: Iterable[str]) -> list[Any]:
    """Return the parameters for model types, marked as far as the oldest library cannot write them."""
    return [pytest.param(name, marks=[pytest.mark.newest] if name in NEWER else []) for name in names]


def with_numbers(model: Any) -> Any:
    """Give buffers that are stored, which a new model has as zeros, values."""
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(-0.2, 0.2, buffer.numel()).view(buffer.shape))
        elif name.endswith("layer_scalar"):
            buffer.fill_(1.0 - 0.125 * int(name.split(".")[2]))
    return model


def as_published(model: Any) -> Any:
    """Give a model values that the converter keeps, as it does those of a checkpoint in bfloat16."""
    with torch.no_grad():
        for name, values in model.named_parameters():
            if name.endswith("norm.weight") and "linear_attn" not in name:
                values.copy_((values + 1) - 1)
            elif name.endswith("A_log") and model.config.model_type.startswith("qwen3_5"):
                # transformers' own way back, a logarithm in 32 bits, gives back few others.
                values.copy_(values.exp().log())
            elif name.endswith("A_log"):
                values.copy_(values.bfloat16())
    return model


def assert_same(path: Path, reference: Any) -> None:
    """Compare tensors and logits, and the bytes of the plan with those of the file."""
    parts = load_split_model(None, (1, 3), path)
    expected = reference.state_dict()
    found = {name: tensor for part in parts for name, tensor in part.state_dict().items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert all(tensor.is_contiguous() for tensor in found.values())
    with torch.inference_mode():
        assert torch.equal(SplitCausalLM(*parts)(IDS).logits, reference(IDS).logits)
    assert plan_split(path, (1, 3)).nbytes == sum(stored.nbytes for stored in read_header(path).tensors.values())


@pytest.mark.parametrize("model_type", written(EXPERTS))
def test_experts_are_read_out_of_the_tensor_of_all(gguf_file: Write, model: Any, model_type: str) -> None:
    """The tensors and logits of the model that was written; and a plan of the bytes that the file has."""
    reference = with_numbers(model(model_type, **EXPERTS[model_type]))
    assert_same(gguf_file(model_type, **EXPERTS[model_type]), reference)

    path = gguf_file(model_type, "Q8_0", **EXPERTS[model_type])
    trunk = load_split_model(None, (1, 3), path, parts=("trunk",)).trunk
    assert trunk is not None


@pytest.mark.parametrize("model_type", written(RUNNING))
def test_layers_with_running_states(gguf_file: Write, model: Any, model_type: str) -> None:
    """Heads of values are in their places; and the exponentials that files have become numbers again."""
    reference = as_published(model(model_type, **RUNNING[model_type]))
    assert_same(gguf_file(model_type, **RUNNING[model_type]), reference)


@pytest.mark.newest
@pytest.mark.parametrize("model_type", ["qwen3_next", "jamba"])
def test_numbers_whose_exponentials_are_stored_compute_the_same(
    gguf_file: Write, model: Any, writing: Any, tmp_path: Path, model_type: str
) -> None:
    """Several numbers of 32 bits have one exponential, and which of them it was is not to be known."""
    reference = copy.deepcopy(as_published(model(model_type, **RUNNING[model_type])))
    chance = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, values in reference.named_parameters():
            if name.endswith("A_log"):
                values.copy_(torch.empty(values.shape).uniform_(0.01, 16, generator=chance).log())
    path = writing.write_gguf(tmp_path / "model.gguf", reference)

    parts = load_split_model(None, (1, 3), path)
    found = {name: tensor for part in parts for name, tensor in part.state_dict().items()}
    expected = reference.state_dict()
    for name, tensor in found.items():
        if name.endswith("A_log"):
            assert torch.allclose(tensor, expected[name], rtol=1e-6)
            assert torch.equal(tensor.exp(), expected[name].exp())
        else:
            assert torch.equal(tensor, expected[name]), name
    with torch.inference_mode():
        assert torch.equal(SplitCausalLM(*parts)(IDS).logits, reference(IDS).logits)


@pytest.mark.newest
@pytest.mark.parametrize("model_type", ["qwen3_next", "qwen3_5_moe_text"])
def test_tensors_that_only_some_files_have_in_one_piece(gguf_file: Write, model: Any, model_type: str) -> None:
    """The projections of older files, and the experts of newer ones."""
    reference = as_published(model(model_type, **RUNNING[model_type]))
    path = gguf_file(model_type, uncut=True, fused=True, **RUNNING[model_type])

    names = read_header(path).tensors
    assert "blk.1.ffn_gate_up_exps.weight" in names
    assert ("blk.0.ssm_in.weight" in names) == (model_type == "qwen3_next")
    assert_same(path, reference)


@pytest.mark.newest
def test_heads_of_values_that_there_are_not(gguf_file: Write, model: Any) -> None:
    """Whatever config.json says, rows are put back by the metadata of the file."""
    reference = model("qwen3_5_text", **RUNNING["qwen3_5_text"])
    path = gguf_file("qwen3_5_text", metadata={"ssm.group_count": 5}, **RUNNING["qwen3_5_text"])
    reference.config.save_pretrained(path.parent)
    with pytest.raises(InvalidCheckpointError, match=r"are not those of 6 heads of values and 5 of keys") as caught:
        load_split_model(None, (1, 3), path)
    assert caught.value.hint

    reference = model("qwen3_next", **RUNNING["qwen3_next"])
    path = gguf_file("qwen3_next", metadata={"ssm.group_count": 5}, **RUNNING["qwen3_next"])
    reference.config.save_pretrained(path.parent)
    with pytest.raises(InvalidCheckpointError, match=r"attn_qkv.*attn_gate.* are not those of 5 heads") as caught:
        load_split_model(None, (1, 3), path)
    assert caught.value.hint


@pytest.mark.newest
def test_what_is_no_exponential_has_no_logarithm(gguf_file: Write) -> None:
    """A damaged file, or one of another converter."""
    path = gguf_file("jamba", **RUNNING["jamba"])
    with path.open("r+b") as file:
        file.seek(read_header(path).tensors["blk.2.ssm_a"].begin)
        file.write(struct.pack("<f", 1.0))
    with pytest.raises(InvalidCheckpointError, match=r"'blk\.2\.ssm_a' has values that are no negative") as caught:
        load_split_model(None, (1, 3), path)
    assert caught.value.hint


@pytest.mark.newest
def test_embeddings_for_each_layer_have_their_names(gguf_file: Write, model: Any) -> None:
    """Whether a model with them can be split, its family says, by the name of the value."""
    values = {**WITH_CONFIG["gemma4_text"], "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 101}
    reference = model("gemma4_text", **values)
    path = gguf_file("gemma4_text", **values)

    found = GgufStrategy().tensors(path, reference.config.to_dict())
    shapes = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items() if name != "lm_head.weight"}
    assert {key: info.shape for key, info in found.items()} == shapes
    reference.config.save_pretrained(path.parent)
    with pytest.raises(SplitLearnError, match="hidden_size_per_layer_input"):
        plan_split(path, (1, 3))


@pytest.mark.newest
def test_of_a_model_that_sees_the_part_for_text_is_wanted(gguf_file: Write) -> None:
    """Not what describes the whole, whose other parts no such file has."""
    path = gguf_file("llama4_text", **WITH_CONFIG["llama4_text"])
    (path.parent / "config.json").write_text(json.dumps({"model_type": "llama4", "text_config": {"hidden_size": 64}}))
    with pytest.raises(InvalidCheckpointError, match="'llama4'") as caught:
        GgufStrategy().tensors(path, json.loads((path.parent / "config.json").read_text()))
    assert "text_config" in caught.value.hint


@pytest.mark.parametrize("model_type", written(WITH_CONFIG))
def test_what_a_file_does_not_say_is_in_the_original_configuration(
    gguf_file: Write, model: Any, model_type: str
) -> None:
    """Which is asked for; that it tells of quantised weights, which the file replaces, is no hindrance."""
    reference = with_numbers(model(model_type, **WITH_CONFIG[model_type]))
    path = gguf_file(model_type, **WITH_CONFIG[model_type])
    with pytest.raises(CheckpointError, match="do not say") as caught:
        plan_split(path, (1, 3))
    assert "config.json" in caught.value.hint

    quantised = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config = {**reference.config.to_dict(), "quantization_config": quantised}
    (path.parent / "config.json").write_text(json.dumps(config))
    assert_same(path, reference)


@pytest.mark.newest
def test_blocks_of_four_bit_floats(gguf_file: Write, model: Any) -> None:
    """As the experts of gpt-oss are stored: to the bit what the library dequantises, cut and turned."""
    reference = model("gpt_oss", **WITH_CONFIG["gpt_oss"])
    path = gguf_file("gpt_oss", **WITH_CONFIG["gpt_oss"])
    reference.config.save_pretrained(path.parent)
    kind = gguf.GGMLQuantizationType.MXFP4
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(path.with_name("packed.gguf"), "gpt-oss")
    blocks = {}
    for stored in reader.tensors:
        if stored.name.endswith("exps.weight"):
            blocks[stored.name] = gguf.quants.quantize(stored.data, kind)
        writer.add_tensor(
            stored.name, blocks.get(stored.name, stored.data), raw_dtype=kind if stored.name in blocks else None
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.unlink()

    gate, up, down = (
        torch.from_numpy(gguf.quants.dequantize(blocks[f"blk.1.ffn_{name}_exps.weight"], kind))
        for name in ("gate", "up", "down")
    )
    trunk = load_split_model(None, (1, 3), path.parent, parts=("trunk",)).trunk
    assert trunk is not None
    state = trunk.state_dict()
    assert torch.equal(state["model.layers.1.mlp.experts.gate_up_proj"][..., ::2], gate.mT)
    assert torch.equal(state["model.layers.1.mlp.experts.gate_up_proj"][..., 1::2], up.mT)
    assert torch.equal(state["model.layers.1.mlp.experts.down_proj"], down.mT)


def test_older_files_have_keys_and_values_in_one_tensor(gguf_file: Write, model: Any) -> None:
    """llama.cpp cut it in two later."""
    reference = with_numbers(model("deepseek_v3", **_LATENT))
    path = gguf_file("deepseek_v3", uncut=True, **_LATENT)
    reference.config.save_pretrained(path.parent)

    assert "blk.1.attn_kv_b.weight" in read_header(path).tensors
    assert_same(path, reference)


SEEING: dict[str, dict[str, Any]] = {
    "qwen2_5_vl": {},
    "qwen3_vl": {"head_dim": 16},
    "qwen3_vl_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}


@pytest.mark.parametrize("model_type", written(SEEING))
def test_the_text_models_of_those_that_see(tmp_path: Path, writing: Any, model_type: str) -> None:
    """As llama.cpp stores them, without the rest: with text, their logits are those of the whole model."""
    text = {
        "vocab_size": 101,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "mrope_section": [2, 3, 3]},
        **SEEING[model_type],
    }
    kind = type(AutoConfig.for_model(model_type))
    others = other_sizes(kind(), "text_config")
    reference = with_numbers(
        random_model(
            AutoModelForImageTextToText.from_config, kind(**others, text_config=text, tie_word_embeddings=False)
        )
    )
    path = writing.write_gguf(tmp_path / "model.gguf", reference, n_deepstack_layers=3)

    parts = load_split_model(None, (1, 3), path)
    assert parts.bottom is not None
    assert parts.bottom.config.model_type == {"qwen2_5_vl": "qwen2", "qwen3_vl": "qwen3"}.get(model_type, "qwen3_moe")
    with torch.inference_mode():
        assert torch.equal(SplitCausalLM(*parts)(IDS).logits, reference(IDS).logits)


@pytest.mark.newest
@pytest.mark.parametrize(
    ("model_type", "wrong"),
    [
        ("qwen3_moe", {"expert_count": 0}),
        ("qwen3_moe", {"expert_used_count": 0}),
        ("qwen2_moe", {"expert_shared_feed_forward_length": 0}),
        ("glm4_moe", {"expert_weights_scale": -1.0}),
        ("glm4_moe", {"leading_dense_block_count": -1.0}),
        ("glm4_moe", {"expert_gating_func": 1}),
        ("glm4_moe", {"rope.dimension_count": 64}),
        ("glm4_moe", {"nextn_predict_layers": 4}),
        ("granitemoe", {"residual_scale": 0.0}),
        ("olmoe", {"expert_weights_norm": True}),
        ("minimax_m2", {"expert_gating_func": 1}),
        ("qwen3_next", {"ssm.group_count": 0}),
        ("qwen3_next", {"ssm.conv_kernel": -1.0}),
        ("qwen3_next", {"ssm.dt_b_c_rms": True}),
        ("qwen3_next", {"rope.dimension_count": 0}),
        ("qwen3_5_text", {"ssm.time_step_rank": 5}),
        ("qwen3_5_text", {"ssm.inner_size": 49}),
        ("qwen3_5_moe_text", {"full_attention_interval": 0}),
        ("lfm2", {"shortconv.l_cache": 0}),
        ("lfm2", {"attention.head_count_kv": [0, 2, 1, 0]}),
        ("jamba", {"attention.head_count_kv": 2}),
        ("jamba", {"attention.head_count_kv": [0, 2, 1, 0]}),
        ("jamba", {"attention.head_count_kv": [0, 2, 2, 0]}),
        ("jamba", {"attention.head_count_kv": [0, 2]}),
        ("jamba", {"ssm.inner_size": 100}),
    ],
    ids=str,
)
def test_numbers_that_are_none_are_refused(gguf_file: Write, model_type: str, wrong: dict[str, Any]) -> None:
    path = gguf_file(model_type, metadata=wrong, **{**EXPERTS, **RUNNING}[model_type])
    with pytest.raises(CheckpointError, match=next(iter(wrong)).replace(".", r"\.")) as caught:
        plan_split(path, (1, 3))
    assert "config.json" in caught.value.hint


@pytest.mark.newest
@pytest.mark.parametrize(
    ("model_type", "values"),
    [
        ("glm4_moe", EXPERTS["glm4_moe"]),
        ("qwen3_5_text", {**_LINEAR, "layer_types": [*_LINEAR["layer_types"], "full_attention"]}),
    ],
    ids=["glm4_moe", "qwen3_5_text"],
)
def test_layers_that_predict_several_tokens_are_left_out(
    gguf_file: Write, model: Any, model_type: str, values: dict[str, Any]
) -> None:
    """They come after those of the model, whose number is without them."""
    reference = as_published(with_numbers(model(model_type, num_hidden_layers=5, **values)))
    path = gguf_file(model_type, metadata={"nextn_predict_layers": 1}, num_hidden_layers=5, **values)

    assert plan_split(path, (1, 3)).num_layers == 4
    parts = load_split_model(None, (1, 3), path)
    expected = reference.state_dict()
    for part in parts:
        for key, tensor in part.state_dict().items():
            assert torch.equal(tensor, expected[key]), key


@pytest.mark.newest
def test_architectures_are_those_of_the_library() -> None:
    """A slip in a name would refuse a sound file."""
    assert ARCHITECTURES.keys() <= set(gguf.MODEL_ARCH_NAMES.values())


def test_a_piece_that_is_missing_is_named(gguf_file: Write) -> None:
    """It may be in another part of the model."""
    path = gguf_file("granitemoe", **EXPERTS["granitemoe"])
    path.write_bytes(path.read_bytes().replace(b"blk.1.ffn_up_exps.weight", b"blk.1.ffn_up_expx.weight"))
    with pytest.raises(InvalidCheckpointError, match=r"blk\.1\.ffn_gate_exps\.weight without ffn_up_exps") as caught:
        plan_split(path, (1, 3))
    assert "--merge" in caught.value.hint


@pytest.mark.parametrize(
    ("join", "shapes", "together"),
    [
        (Join.ROWS, [(4, 2, 8), (4, 2, 8)], (4, 4, 8)),
        (Join.ROWS, [(4, 2, 8), (4, 3, 8)], ()),
        (Join.ROWS, [(4,), (4,)], ()),
        (Join.IN_TURN, [(4, 2, 8), (4, 2, 8)], (4, 8, 4)),
        (Join.IN_TURN, [(4, 2), (4, 2)], (4, 4)),
        (Join.IN_TURN, [(4, 2, 8)], (4, 8, 2)),
        (Join.IN_TURN, [(4, 2, 8, 1)], ()),
        (Join.HEADS, [(4, 8, 2), (4, 3, 8)], (20, 8)),
        (Join.HEADS, [(4, 8, 2), (4, 3, 7)], ()),
        (Join.HEADS, [(8, 2), (3, 8)], ()),
    ],
)
def test_pieces_have_a_shape_together_or_none(
    join: Join, shapes: list[tuple[int, ...]], together: tuple[int, ...]
) -> None:
    """Whatever a file says, it is compared before values are read."""
    assert Joined("key", ("a", "b"), join).shape(shapes) == together


def test_memory_of_pieces_is_predicted(gguf_file: Write) -> None:
    """The pieces and the whole tensor are in memory together."""
    plan = plan_split(gguf_file("granitemoe", **EXPERTS["granitemoe"]), (1, 3), parts=("trunk",))
    tensors = plan.component("trunk").tensors
    whole = max(tensor.elements for tensor in tensors if tensor.info.key.endswith("input_linear.weight"))
    read = ReadPlan(tensors, {}, "cpu", "float32")
    assert GgufStrategy().passing_bytes(read) == whole * WORKING_BYTES + whole * 4
