"""Write a Hugging Face model as a GGUF file, the way llama.cpp's convert_hf_to_gguf.py does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import pre_tokenizers
from transformers.core_model_loading import revert_weight_conversion

ARCHITECTURES = {
    "gemma3_text": "gemma3",
    "mistral": "llama",
    "mixtral": "llama",
    "ministral3": "mistral3",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "glm4_moe": "glm4moe",
    "ernie4_5_moe": "ernie4_5-moe",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "gpt_oss": "gpt-oss",
    "qwen2_5_vl_text": "qwen2vl",
    "qwen3_vl_text": "qwen3vl",
    "qwen3_vl_moe_text": "qwen3vlmoe",
}
#: The weights of one expert in a checkpoint -> GGUF's name for those of all.
EXPERTS = {
    **{f"{each}_proj": f"ffn_{each}_exps" for each in ("gate", "up", "down")},
    "w1": "ffn_gate_exps",
    "w3": "ffn_up_exps",
    "w2": "ffn_down_exps",
}
#: Architectures whose queries and keys are reordered.
ROTATED = ("llama", "granitemoe", "mistral3")
OF_EXPERTS = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
_SIZE = {"expert_feed_forward_length": "moe_intermediate_size"}
OF_ARCHITECTURES = {
    "qwen2moe": {
        **_SIZE,
        "expert_count": "num_experts",
        "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
    },
    "qwen3moe": _SIZE,
    "qwen3vlmoe": {**_SIZE, "expert_count": "num_experts"},
    "olmoe": {"expert_count": "num_experts"},
    "glm4moe": {
        **_SIZE,
        "expert_count": "n_routed_experts",
        "expert_shared_count": "n_shared_experts",
        "expert_group_count": "n_group",
        "expert_group_used_count": "topk_group",
        "expert_weights_scale": "routed_scaling_factor",
        "expert_weights_norm": "norm_topk_prob",
        "leading_dense_block_count": "first_k_dense_replace",
    },
    "ernie4_5-moe": {
        **_SIZE,
        "expert_count": "moe_num_experts",
        "expert_used_count": "moe_k",
        "expert_shared_count": "moe_num_shared_experts",
        "interleave_moe_layer_step": "moe_layer_interval",
        "leading_dense_block_count": "moe_layer_start_index",
    },
    "granitemoe": {
        "attention.scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
    },
}
_HEADER = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}


def write_gguf(path: Path, model: Any, quantization: str = "F32", *, uncut: bool = False, **metadata: Any) -> Path:
    """Write a model; matrices are stored as ``quantization`` says, everything else in float32.

    Args:
        path: The file to write.
        model: A causal model of Hugging Face.
        quantization: ggml's name of a type that the gguf library can quantise to, or ``Q4_K`` or
            ``Q6_K``, whose blocks are made up.
        uncut: Whether keys and values of latent attention stay one tensor, as in older files.
        metadata: More entries, without the architecture's prefix.
    """
    config = model.config.get_text_config()
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {**_metadata(config, architecture), **metadata}.items():
        _add(writer, f"{architecture}.{key}", value)
    _add_vocabulary(writer, config.vocab_size)
    if config.bos_token_id is not None:
        writer.add_bos_token_id(config.bos_token_id)
    for name, values in converted(model, architecture, uncut=uncut).items():
        kind = gguf.GGMLQuantizationType[quantization if values.ndim > 1 and not name.endswith(".bias") else "F32"]
        if quantization in ("Q4_K", "Q6_K") and values.ndim > 1:
            writer.add_tensor(name, _made_up(values.shape, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def converted(model: Any, architecture: str, *, uncut: bool = False) -> dict[str, Any]:
    """Return the tensors by their GGUF names, with values as llama.cpp wants them."""
    config = model.config.get_text_config()
    names = gguf.get_tensor_name_map(_arch(architecture), config.num_hidden_layers)
    tied = model.config.tie_word_embeddings
    tensors: dict[str, Any] = {}
    experts: dict[str, list[Any]] = {}
    state = dict(model.state_dict())
    # As a checkpoint has them: what the converter reads. Of the experts that follow, a checkpoint has the transposed.
    for key, tensor in (state if architecture == "qwen3vlmoe" else revert_weight_conversion(model, state)).items():
        text = key.replace("model.language_model.", "model.")
        if (tied and key == "lm_head.weight") or "visual." in key:
            continue
        values = tensor.float().numpy()
        if expert := re.fullmatch(r"model\.layers\.(\d+)\..*\.experts\.(\d+)\.(\w+)\.weight", text):
            stored = experts.setdefault(f"blk.{expert[1]}.{EXPERTS[expert[3]]}.weight", [])
            assert len(stored) == int(expert[2])
            stored.append(values)
            continue
        if cut := {} if uncut else _cut(architecture, config, text, values):
            tensors |= cut
            continue
        # Numbers that are added to scores end like weights in the file, and sinks like a weight's.
        text = text.replace("e_score_correction_bias", "e_score_correction.bias").replace("sinks", "sinks.weight")
        name = names.get_name(text, try_suffixes=(".weight", ".bias"))
        assert name is not None, key
        tensors[name] = _changed(architecture, config, text, values)
    return tensors | {name: np.stack(stored) for name, stored in experts.items()}


def _cut(architecture: str, config: Any, key: str, values: Any) -> dict[str, Any]:
    """Return the pieces of a tensor that the converter cuts, or transposes; empty if it does neither."""
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", key)
    if layer is None:
        return {}
    pieces: dict[str, Any] = {}
    match layer[2].rpartition(".")[2] if architecture in ("gpt-oss", "qwen3vlmoe") else layer[2]:
        case "self_attn.kv_b_proj.weight":
            heads = values.reshape(config.num_attention_heads, -1, values.shape[1])
            first = config.qk_nope_head_dim
            pieces = {"attn_k_b.weight": heads[:, :first].swapaxes(1, 2), "attn_v_b.weight": heads[:, first:]}
        case "block_sparse_moe.input_linear.weight":
            gate, up = np.split(values, 2, axis=1)
            pieces = {"ffn_gate_exps.weight": gate, "ffn_up_exps.weight": up}
        case "gate_up_proj" | "gate_up_proj_bias" as name:
            ending = "bias" if name.endswith("bias") else "weight"
            rows = values.swapaxes(-1, -2) if architecture == "gpt-oss" and ending == "weight" else values
            gate, up = (rows[:, ::2], rows[:, 1::2]) if architecture == "gpt-oss" else np.split(rows, 2, axis=1)
            pieces = {f"ffn_gate_exps.{ending}": gate, f"ffn_up_exps.{ending}": up}
        case "down_proj":
            pieces = {"ffn_down_exps.weight": values.swapaxes(1, 2) if architecture == "gpt-oss" else values}
        case "down_proj_bias":
            pieces = {"ffn_down_exps.bias": values}
    return {f"blk.{layer[1]}.{name}": np.ascontiguousarray(piece) for name, piece in pieces.items()}


def _changed(architecture: str, config: Any, key: str, values: Any) -> Any:
    if architecture.startswith("gemma") and key.endswith("norm.weight"):
        return values + 1
    if architecture == "gpt2" and key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return np.ascontiguousarray(values.T)
    heads = {"q_proj": config.num_attention_heads, "k_proj": getattr(config, "num_key_value_heads", 0)}
    if architecture in ROTATED and key.split(".")[-2] in heads:
        count = heads[key.split(".")[-2]]
        split = values.reshape(count, 2, values.shape[0] // count // 2, *values.shape[1:])
        return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(values.shape)
    return values


def _metadata(config: Any, architecture: str) -> dict[str, Any]:
    config = config.get_text_config()
    values = {key: getattr(config, name) for key, name in _HEADER.items() if hasattr(config, name)}
    if architecture == "gpt2":
        return {
            **values,
            "feed_forward_length": 4 * config.n_embd,
            "attention.layer_norm_epsilon": config.layer_norm_epsilon,
        }
    values["attention.layer_norm_rms_epsilon"] = config.rms_norm_eps
    rope = config.rope_parameters
    if architecture == "gemma3":
        values["rope.freq_base_swa"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    values["rope.freq_base"] = rope["rope_theta"]
    if architecture in ("llama", "granitemoe"):
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        values["rope.dimension_count"] = size
    stated = {**OF_EXPERTS, **OF_ARCHITECTURES.get(architecture, {})}
    values |= {key: getattr(config, name) for key, name in stated.items() if hasattr(config, name)}
    if architecture == "glm4moe":
        values["rope.dimension_count"] = int(config.head_dim * rope["partial_rotary_factor"])
        values["expert_gating_func"] = 2
    if architecture == "ernie4_5-moe":
        values["expert_shared_feed_forward_length"] = config.intermediate_size // config.num_key_value_heads
    if architecture.startswith(("gemma", "qwen3", "glm")):
        values["attention.key_length"] = config.head_dim
    if architecture in ("gemma2", "gemma3"):
        values["attention.sliding_window"] = config.sliding_window
    return values


def _add_vocabulary(writer: Any, size: int) -> None:
    """Add a token for each byte, as far as the vocabulary goes, and such a tokenizer where it has all of them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = (letters + [letters[1] + letters[2]] + [f"<{number}>" for number in range(size)])[:size]
    writer.add_token_list(tokens)
    if size > len(letters):
        writer.add_tokenizer_model("gpt2")
        writer.add_token_merges([f"{letters[1]} {letters[2]}"])
        writer.add_token_types([1] * size)
        writer.add_eos_token_id(size - 1)


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def _made_up(shape: tuple[int, ...], kind: Any) -> Any:
    """Return blocks of a type that the library can read but not write: random ones with small scales."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    random = np.random.default_rng(len(shape) + shape[0])
    blocks = random.integers(0, 256, (shape[0] * shape[1] // block, size), np.uint8)
    scale = np.frombuffer(np.float16(0.0005).tobytes(), np.uint8)
    if kind.name == "Q4_K":
        blocks[:, 0:2] = blocks[:, 2:4] = scale
    else:
        blocks[:, -2:] = scale
    return blocks.reshape(shape[0], -1)


def _arch(name: str) -> Any:
    return next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
