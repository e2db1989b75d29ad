"""Write a Hugging Face model as a GGUF file, the way llama.cpp's convert_hf_to_gguf.py does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import pre_tokenizers

ARCHITECTURES = {"gemma3_text": "gemma3", "mistral": "llama", "mixtral": "llama", "qwen3_moe": "qwen3moe"}
#: Hugging Face's tensors of all experts of a layer -> GGUF's, into which their rows are cut.
EXPERTS = {"gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"), "down_proj": ("ffn_down_exps",)}
_HEADER = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}


def write_gguf(path: Path, model: Any, quantization: str = "F32", **metadata: Any) -> Path:
    """Write a model; matrices are stored as ``quantization`` says, everything else in float32.

    Args:
        path: The file to write.
        model: A causal model of Hugging Face.
        quantization: ggml's name of a type that the gguf library can quantise to, or ``Q4_K`` or
            ``Q6_K``, whose blocks are made up.
        metadata: More entries, without the architecture's prefix.
    """
    config = model.config
    architecture = ARCHITECTURES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {**_metadata(config, architecture), **metadata}.items():
        _add(writer, f"{architecture}.{key}", value)
    _add_vocabulary(writer, config.vocab_size)
    writer.add_bos_token_id(config.bos_token_id)
    for name, values in converted(model, architecture).items():
        kind = gguf.GGMLQuantizationType[quantization if values.ndim > 1 else "F32"]
        if quantization in ("Q4_K", "Q6_K") and values.ndim > 1:
            writer.add_tensor(name, _made_up(values.shape, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def converted(model: Any, architecture: str) -> dict[str, Any]:
    """Return the tensors by their GGUF names, with values as llama.cpp wants them."""
    config = model.config
    names = gguf.get_tensor_name_map(_arch(architecture), config.num_hidden_layers)
    tied = config.tie_word_embeddings
    tensors = {}
    for key, tensor in model.state_dict().items():
        if tied and key == "lm_head.weight":
            continue
        if ".experts." in key:
            *_, layer, _, _, kind = key.split(".")
            pieces = np.split(tensor.float().numpy(), len(EXPERTS[kind]), axis=1)
            for piece, values in zip(EXPERTS[kind], pieces, strict=True):
                tensors[f"blk.{layer}.{piece}.weight"] = np.ascontiguousarray(values)
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert name is not None, key
        tensors[name] = _changed(architecture, config, key, tensor.float().numpy())
    return tensors


def _changed(architecture: str, config: Any, key: str, values: Any) -> Any:
    if architecture.startswith("gemma") and key.endswith("norm.weight"):
        return values + 1
    if architecture == "gpt2" and key.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
        return np.ascontiguousarray(values.T)
    heads = {"q_proj": config.num_attention_heads, "k_proj": getattr(config, "num_key_value_heads", 0)}
    if architecture == "llama" and key.split(".")[-2] in heads:
        count = heads[key.split(".")[-2]]
        split = values.reshape(count, 2, values.shape[0] // count // 2, *values.shape[1:])
        return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(values.shape)
    return values


def _metadata(config: Any, architecture: str) -> dict[str, Any]:
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
    if architecture == "llama":
        values["rope.dimension_count"] = config.head_dim
    if config.model_type in ("mixtral", "qwen3_moe"):
        values["expert_count"] = config.num_local_experts
        values["expert_used_count"] = config.num_experts_per_tok
    if architecture == "qwen3moe":
        values["expert_feed_forward_length"] = config.moe_intermediate_size
    if architecture.startswith(("gemma", "qwen3")):
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
