"""A ``config.json`` out of the metadata of a GGUF file, for a file that has none beside it.

The names are those that transformers gives them when it reads such a file itself. What the metadata
cannot say in full is refused, not guessed: the original ``config.json`` then has to lie beside the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from splitlearn_core import CheckpointError, InvalidCheckpointError
from splitlearn_gguf.architectures import architecture
from splitlearn_gguf.header import Header

_BESIDE = "put the config.json of the original checkpoint beside the file"

#: Metadata without the architecture's prefix -> what config.json calls it; all of these are needed.
_SIZES = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
}
_GPT2_SIZES = {
    "block_count": "n_layer",
    "context_length": "n_positions",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
}
#: Numbers of special tokens, where the file states them.
_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
_DEFAULT_THETA = 10_000.0
#: Layers of the Gemmas whose attention is scaled by the size of a head as if heads shared the hidden
#: size; llama.cpp knows these models by that number too.
_SCALED_BY_HIDDEN = {("gemma2", 46), ("gemma3", 62)}


def read_config(header: Header) -> dict[str, Any]:
    """Return what ``config.json`` would say of the model.

    Raises:
        InvalidCheckpointError: Metadata is missing or no number; all of it is listed.
        CheckpointError: The architecture is unknown, or the metadata does not say enough.
    """
    known = architecture(header.architecture, str(header.path))
    needed = _GPT2_SIZES if known.name == "gpt2" else _SIZES
    _refuse_unsound(header, tuple(needed))
    config: dict[str, Any] = {"model_type": known.model_types[0]}
    config |= {name: _get(header, key) for key, name in needed.items()}
    config |= {
        name: header.metadata[f"tokenizer.ggml.{key}"]
        for key, name in _TOKENS.items()
        if type(header.metadata.get(f"tokenizer.ggml.{key}")) is int
    }
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise InvalidCheckpointError(
            f"{header.path} has no token_embd.weight, which says how large the vocabulary is", hint=_BESIDE
        )
    config["vocab_size"] = embedding.shape[0]
    # llama.cpp writes the head only where it is not the embedding.
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    if known.name == "gpt2":
        return config | {"layer_norm_epsilon": _epsilon(header, "attention.layer_norm_epsilon")}
    config["num_key_value_heads"] = _get(header, "attention.head_count_kv") or config["num_attention_heads"]
    config["rms_norm_eps"] = _epsilon(header, "attention.layer_norm_rms_epsilon")
    config["rope_parameters"] = _rope_parameters(header)
    head_dim = _head_dim(header)
    if head_dim is not None:
        config["head_dim"] = head_dim
    return config | _windows(header) | _attention_scale(header, config)


def _refuse_unsound(header: Header, needed: tuple[str, ...]) -> None:
    counted = (*needed, "attention.head_count_kv", "attention.key_length", "attention.sliding_window")
    problems = []
    for key in counted:
        value = _get(header, key)
        if value is None and key in needed:
            problems.append(f"{header.architecture}.{key} is missing")
        elif value is not None and (type(value) is not int or value < 1):
            problems.append(f"{header.architecture}.{key} is {str(value)[:80]}, no whole number from 1")
    for key in ("rope.freq_base", "rope.freq_base_swa", "rope.scaling.factor"):
        value = _get(header, key)
        if value is not None and not (type(value) in (int, float) and 0 < value < float("inf")):
            problems.append(f"{header.architecture}.{key} is {str(value)[:80]}, no number above 0")
    if problems:
        raise InvalidCheckpointError(f"{header.path}: {'; '.join(problems)}", hint=_BESIDE)


def _get(header: Header, key: str) -> Any:
    return header.metadata.get(f"{header.architecture}.{key}")


def _epsilon(header: Header, key: str) -> float:
    value = _get(header, key)
    if type(value) is not float or not 0 < value < 1:
        raise InvalidCheckpointError(f"{header.path}: {header.architecture}.{key} is {str(value)[:80]}", hint=_BESIDE)
    return value


def _rope_parameters(header: Header) -> dict[str, Any]:
    theta = float(_get(header, "rope.freq_base") or _DEFAULT_THETA)
    scaling = dict(_scaling(header))
    whole = {"rope_type": "default", "rope_theta": theta, **scaling}
    if header.architecture != "gemma3":
        return whole
    local = float(_get(header, "rope.freq_base_swa") or _DEFAULT_THETA)
    return {"full_attention": whole, "sliding_attention": {"rope_type": "default", "rope_theta": local}}


def _scaling(header: Header) -> Iterator[tuple[str, Any]]:
    """Yield how positions are stretched; only Gemma 3's way is stated in full."""
    kind, factor = _get(header, "rope.scaling.type"), _get(header, "rope.scaling.factor")
    if header.architecture == "gemma3" and kind == "linear" and factor is not None:
        yield from (("rope_type", "linear"), ("factor", float(factor)))
        return
    stretched = (kind or "none") != "none" or factor is not None or _get(header, "rope.scale_linear") not in (None, 1)
    if stretched or "rope_freqs.weight" in header.tensors:
        raise CheckpointError(
            f"{header.path} stretches its rotary positions, and its metadata does not say how in full", hint=_BESIDE
        )


def _head_dim(header: Header) -> int | None:
    length = _get(header, "attention.key_length")
    if length is None and header.architecture == "llama":
        length = _get(header, "rope.dimension_count")
    # Qwen2's configuration has no size of heads: they share the hidden size.
    return length if type(length) is int and length > 0 and header.architecture != "qwen2" else None


def _windows(header: Header) -> dict[str, Any]:
    window = _get(header, "attention.sliding_window")
    return {"sliding_window": window} if window is not None and header.architecture in ("gemma2", "gemma3") else {}


def _attention_scale(header: Header, config: Mapping[str, Any]) -> dict[str, Any]:
    if (header.architecture, config["num_hidden_layers"]) not in _SCALED_BY_HIDDEN:
        return {}
    return {"query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"]}
