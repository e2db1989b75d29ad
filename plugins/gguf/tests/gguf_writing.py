"""Write a Hugging Face model as a GGUF file, the way llama.cpp's convert_hf_to_gguf.py does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
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
    "qwen3_next": "qwen3next",
    "qwen3_5_text": "qwen35",
    "qwen3_5_moe_text": "qwen35moe",
    "minimax_m2": "minimax-m2",
    "llama4_text": "llama4",
    "gemma4_text": "gemma4",
}
#: The weights of one expert in a checkpoint -> GGUF's name for those of all.
EXPERTS = {
    **{f"{each}_proj": f"ffn_{each}_exps" for each in ("gate", "up", "down")},
    "w1": "ffn_gate_exps",
    "w3": "ffn_up_exps",
    "w2": "ffn_down_exps",
}
#: Endings in a checkpoint -> those that the converter gives them.
ENDINGS = {
    "e_score_correction_bias": "e_score_correction.bias",
    "sinks": "sinks.weight",
    "dt_bias": "dt_proj.bias",
    "layer_scalar": "layer_scalar.weight",
}
#: Architectures whose queries and keys are reordered.
ROTATED = ("llama", "granitemoe", "mistral3")
#: Architectures with layers of linear attention.
LINEAR = ("qwen3next", "qwen35", "qwen35moe")
_SIZES_OF_LINEAR = {
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
}
OF_EXPERTS = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}
_SIZE = {"expert_feed_forward_length": "moe_intermediate_size"}
_OF_QWEN2 = {
    **_SIZE,
    "expert_count": "num_experts",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
OF_ARCHITECTURES = {
    "qwen2moe": _OF_QWEN2,
    "qwen3moe": _SIZE,
    "qwen3next": {**_OF_QWEN2, **_SIZES_OF_LINEAR},
    "qwen35": _SIZES_OF_LINEAR,
    "qwen35moe": {**_OF_QWEN2, **_SIZES_OF_LINEAR},
    "jamba": {
        "expert_count": "num_experts",
        "ssm.conv_kernel": "mamba_d_conv",
        "ssm.state_size": "mamba_d_state",
        "ssm.time_step_rank": "mamba_dt_rank",
    },
    "lfm2": {"shortconv.l_cache": "conv_L_cache"},
    "minimax-m2": {"expert_feed_forward_length": "intermediate_size"},
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


def write_gguf(
    path: Path, model: Any, quantization: str = "F32", *, uncut: bool = False, fused: bool = False, **metadata: Any
) -> Path:
    """Write a model; matrices of whole blocks are stored as ``quantization`` says, everything else in float32.

    Args:
        path: The file to write.
        model: A causal model of Hugging Face.
        quantization: ggml's name of a type that the gguf library can quantise to, or ``Q4_K`` or
            ``Q6_K``, whose blocks are made up.
        uncut: Whether keys and values of latent attention, and projections of linear attention, stay one tensor, as in
            older files.
        fused: Whether gates and inputs of experts are one tensor.
        metadata: More entries, without the architecture's prefix.
    """
    config = model.config.get_text_config()
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    if architecture == "lfm2":
        # Its class rounds what the configuration says.
        metadata["feed_forward_length"] = len(model.model.layers[0].feed_forward.w1.weight)
    for key, value in {**_metadata(config, architecture), **metadata}.items():
        _add(writer, f"{architecture}.{key}", value)
    _add_vocabulary(writer, config.vocab_size)
    if config.bos_token_id is not None:
        writer.add_bos_token_id(config.bos_token_id)
    tensors = converted(model, architecture, uncut=uncut)
    for name in [name for name in tensors if fused and name.endswith("ffn_gate_exps.weight")]:
        gates, inputs = tensors.pop(name), tensors.pop(name.replace("gate_exps", "up_exps"))
        tensors[name.replace("gate_exps", "gate_up_exps")] = np.concatenate((gates, inputs), axis=1)
    for name, values in tensors.items():
        block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[quantization]][0]
        quantised = values.ndim > 1 and name.endswith(".weight") and values.shape[-1] % block == 0
        kind = gguf.GGMLQuantizationType[quantization if quantised else "F32"]
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
        if architecture == "gemma4" and (stem := text.removesuffix("router.scale")) != text:
            tensors[f"blk.{stem.split('.')[2]}.ffn_gate_inp.scale"] = values
            continue
        if architecture == "gemma4" and (stem := text.removesuffix("router.per_expert_scale")) != text:
            tensors[f"blk.{stem.split('.')[2]}.ffn_down_exps.scale"] = values
            continue
        for old, new in ENDINGS.items():
            text = text.replace(old, new)
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
    if architecture == "gemma4" and ".experts." in key:
        return {f"blk.{layer[1]}.ffn_{layer[2].removeprefix('experts.').removesuffix('_proj')}_exps.weight": values}
    turned = architecture in ("gpt-oss", "llama4")
    match layer[2].rpartition(".")[2] if turned or architecture == "qwen3vlmoe" else layer[2]:
        case "self_attn.kv_b_proj.weight":
            heads = values.reshape(config.num_attention_heads, -1, values.shape[1])
            first = config.qk_nope_head_dim
            pieces = {"attn_k_b.weight": heads[:, :first].swapaxes(1, 2), "attn_v_b.weight": heads[:, first:]}
        case "linear_attn.in_proj_qkvz.weight":
            groups, each = config.linear_num_key_heads, config.linear_num_value_heads // config.linear_num_key_heads
            sizes = np.cumsum([config.linear_key_head_dim] * 2 + [each * config.linear_value_head_dim])
            parts = np.split(values.reshape(groups, -1, values.shape[1]), sizes, axis=1)
            query, key_rows, value, gates = (part.reshape(-1, values.shape[1]) for part in parts)
            pieces = {"attn_qkv.weight": np.concatenate((query, key_rows, value)), "attn_gate.weight": gates}
        case "block_sparse_moe.input_linear.weight":
            gate, up = np.split(values, 2, axis=1)
            pieces = {"ffn_gate_exps.weight": gate, "ffn_up_exps.weight": up}
        case "gate_up_proj" | "gate_up_proj_bias" as name:
            ending = "bias" if name.endswith("bias") else "weight"
            rows = values.swapaxes(-1, -2) if turned and ending == "weight" else values
            gate, up = (rows[:, ::2], rows[:, 1::2]) if architecture == "gpt-oss" else np.split(rows, 2, axis=1)
            pieces = {f"ffn_gate_exps.{ending}": gate, f"ffn_up_exps.{ending}": up}
        case "down_proj":
            pieces = {"ffn_down_exps.weight": values.swapaxes(1, 2) if turned else values}
        case "down_proj_bias":
            pieces = {"ffn_down_exps.bias": values}
    return {f"blk.{layer[1]}.{name}": np.ascontiguousarray(piece) for name, piece in pieces.items()}


def _changed(architecture: str, config: Any, key: str, values: Any) -> Any:
    if key.endswith(".A_log"):
        values = -torch.exp(torch.from_numpy(values)).numpy()
    if architecture in ("jamba", "lfm2", *LINEAR) and key.endswith(("conv1d.weight", "conv.conv.weight")):
        values = values.squeeze()
    if architecture in ("qwen35", "qwen35moe") and "linear_attn." in key:
        values = _tiled(config, key.split("linear_attn.")[1], values)
    if architecture in LINEAR and key.endswith("norm.weight") and "linear_attn." not in key:
        return values + 1
    if architecture in ("gemma", "gemma2", "gemma3") and key.endswith("norm.weight"):
        return values + 1
    if architecture == "gpt2" and key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return np.ascontiguousarray(values.T)
    if architecture in ROTATED and (name := key.split(".")[-2]) in ("q_proj", "k_proj"):
        count = config.num_attention_heads if name == "q_proj" else config.num_key_value_heads
        split = values.reshape(count, 2, values.shape[0] // count // 2, *values.shape[1:])
        return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(values.shape)
    return values


def _tiled(config: Any, name: str, values: Any) -> Any:
    """Put heads of values in the order of ggml's broadcast: the first of each key head, then the second, and so on."""
    keys, heads, size = config.linear_num_key_heads, config.linear_num_value_heads, config.linear_value_head_dim

    def tile(part: Any, axis: int, size: int) -> Any:
        shape = [*part.shape[:axis], keys, heads // keys, size, *part.shape[axis + 1 :]]
        return part.reshape(shape).swapaxes(axis, axis + 1).reshape(part.shape)

    match name.split(".", maxsplit=1)[0]:
        case "in_proj_qkv" | "conv1d":
            first = 2 * keys * config.linear_key_head_dim
            tiled = np.concatenate((values[:first], tile(values[first:], 0, size)))
        case "in_proj_z":
            tiled = tile(values, 0, size)
        case "out_proj":
            tiled = tile(values, 1, size)
        case "norm":
            tiled = values
        case _:
            tiled = tile(values, 0, 1)
    return np.ascontiguousarray(tiled)


def _metadata(config: Any, architecture: str) -> dict[str, Any]:
    config = config.get_text_config()
    if architecture == "gemma4":
        return _metadata_of_gemma4(config)
    values = {key: getattr(config, name) for key, name in _HEADER.items() if hasattr(config, name)}
    if architecture == "gpt2":
        return {
            **values,
            "feed_forward_length": 4 * config.n_embd,
            "attention.layer_norm_epsilon": config.layer_norm_epsilon,
        }
    values["attention.layer_norm_rms_epsilon"] = getattr(config, "rms_norm_eps", None) or config.norm_eps
    stated = {**OF_EXPERTS, **OF_ARCHITECTURES.get(architecture, {})}
    values |= {key: getattr(config, name) for key, name in stated.items() if hasattr(config, name)}
    if architecture in ("jamba", "lfm2"):
        heads = {"full_attention": config.num_key_value_heads}
        values["attention.head_count_kv"] = [heads.get(kind, 0) for kind in config.layer_types]
    if architecture == "jamba":
        return {**values, "ssm.inner_size": config.mamba_expand * config.hidden_size}
    rope = config.rope_parameters
    if architecture == "gemma3":
        values["rope.freq_base_swa"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    values["rope.freq_base"] = rope["rope_theta"]
    if architecture in ("llama", "granitemoe"):
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        values["rope.dimension_count"] = size
    if architecture in ("glm4moe", "minimax-m2", *LINEAR):
        values["rope.dimension_count"] = int(config.head_dim * rope.get("partial_rotary_factor", 1))
    if architecture in ("glm4moe", "minimax-m2"):
        values["expert_gating_func"] = 2
    if architecture in LINEAR:
        values["ssm.inner_size"] = config.linear_num_value_heads * config.linear_value_head_dim
        values["full_attention_interval"] = config.layer_types.index("full_attention") + 1
        values |= {} if architecture == "qwen3next" else {"rope.dimension_sections": [11, 11, 10, 0]}
    if architecture == "ernie4_5-moe":
        values["expert_shared_feed_forward_length"] = config.intermediate_size // config.num_key_value_heads
    if architecture.startswith(("gemma", "qwen3", "glm", "minimax")):
        values["attention.key_length"] = config.head_dim
    if architecture in ("gemma2", "gemma3"):
        values["attention.sliding_window"] = config.sliding_window
    return values


def _metadata_of_gemma4(config: Any) -> dict[str, Any]:
    layers = [config.per_layer_config[layer] for layer in range(config.num_hidden_layers)]
    sliding = [kind == "sliding_attention" for kind in config.layer_types]
    whole = layers[sliding.index(False)]
    return {
        **{key: getattr(config, name) for key, name in _HEADER.items() if key != "attention.head_count_kv"},
        "attention.head_count_kv": [layer.num_key_value_heads for layer in layers],
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.sliding_window": config.sliding_window,
        "attention.sliding_window_pattern": sliding,
        "attention.key_length": whole.head_dim,
        "attention.key_length_swa": layers[sliding.index(True)].head_dim,
        "attention.shared_kv_layers": config.num_kv_shared_layers,
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input,
        "rope.freq_base": config.rope_parameters["full_attention"]["rope_theta"],
        "rope.freq_base_swa": config.rope_parameters["sliding_attention"]["rope_theta"],
        "rope.dimension_count": whole.head_dim,
    }


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
    elif isinstance(value, list):
        writer.add_array(key, value)
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
