"""A ``config.json`` from the metadata of a GGUF file, for a folder that has none.

The names are those of transformers' own GGUF reader. What the metadata does not state in full is refused, not guessed:
the original ``config.json`` is then needed next to the file.
"""

from __future__ import annotations

import logging
import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from splitlearn_core import CheckpointError, InvalidCheckpointError
from splitlearn_gguf.architectures import architecture
from splitlearn_gguf.header import Header
from splitlearn_gguf.metadata import SHARED_WIDTH, head_size, metadata_problems

log = logging.getLogger(__name__)

_ADVICE = "put the config.json of the original checkpoint next to the file"

#: Metadata key without the architecture's prefix -> name in config.json; all are required.
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
#: Ids of special tokens, if the file states them.
_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
_DEFAULT_THETA = 10_000.0
#: Of a rotation by time, height and width; files have a fourth, which is 0.
_SECTIONS = 3
#: Architectures with sliding-window layers, and with soft caps on logits.
_SLIDING = ("gemma2", "gemma3")
_COUNTED = {"expert_count": "num_experts", "expert_used_count": "num_experts_per_tok"}
_OF_QWEN3 = {**_COUNTED, "expert_feed_forward_length": "moe_intermediate_size"}
_OF_QWEN2 = {**_OF_QWEN3, "expert_shared_feed_forward_length": "shared_expert_intermediate_size"}
#: Architecture -> metadata key -> name in config.json, of counts that are required.
_EXPERTS = {
    "llama": {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    "qwen2moe": _OF_QWEN2,
    **dict.fromkeys(("qwen3moe", "qwen3vlmoe"), _OF_QWEN3),
    **dict.fromkeys(("qwen3next", "qwen35moe"), _OF_QWEN2),
    **dict.fromkeys(("olmoe", "jamba"), _COUNTED),
    "minimax-m2": {
        "expert_count": "num_local_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_gating_func": "",
    },
    "granitemoe": {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    "glm4moe": {
        "expert_count": "n_routed_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_count": "n_shared_experts",
        "expert_gating_func": "",
    },
    "ernie4_5-moe": {
        "expert_count": "moe_num_experts",
        "expert_used_count": "moe_k",
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_count": "moe_num_shared_experts",
        "interleave_moe_layer_step": "moe_layer_interval",
    },
}
#: The same of counts from 0, with what llama.cpp takes if they are not stated.
_COUNTS = {
    "glm4moe": {
        "leading_dense_block_count": ("first_k_dense_replace", 0),
        "expert_group_count": ("n_group", 1),
        "expert_group_used_count": ("topk_group", 1),
    },
    "ernie4_5-moe": {"leading_dense_block_count": ("moe_layer_start_index", 0)},
}
#: The same of factors, which are required.
_FACTORS = {
    "glm4moe": {"expert_weights_scale": "routed_scaling_factor"},
    "granitemoe": {
        "attention.scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
    },
}
#: Sizes of layers of linear attention, and of state spaces; they are required too.
_LINEAR = {
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.time_step_rank": "linear_num_value_heads",
    # Of all heads together; one has a part of it.
    "ssm.inner_size": "linear_value_head_dim",
}
_STATE_SPACES = {
    "ssm.conv_kernel": "mamba_d_conv",
    "ssm.state_size": "mamba_d_state",
    "ssm.time_step_rank": "mamba_dt_rank",
    # It is how many times larger than hidden states.
    "ssm.inner_size": "mamba_expand",
}
#: Architectures that have them; and what they take for a period of layers with full attention if none is stated.
_WITH_LINEAR, _USUAL_INTERVAL = ("qwen3next", "qwen35", "qwen35moe"), 4
#: Architectures that rotate a part of each head.
_PARTLY_ROTATED = ("glm4moe", "minimax-m2", *_WITH_LINEAR)
#: ``query_pre_attn_scalar`` if it is not stated: the size of a head in the released models.
_USUAL_SCALAR = 256
_MAX_SHOWN = 8
#: Layers of the Gemmas whose attention is scaled by the size of a head as if heads shared the hidden
#: size; llama.cpp knows these models by that number too.
_SCALED_BY_HIDDEN = {("gemma2", 46), ("gemma3", 62)}


def read_config(header: Header) -> dict[str, Any]:
    """Return the configuration of the model, as in a ``config.json``.

    Raises:
        InvalidCheckpointError: Metadata is missing or not a number; all of it is listed.
        CheckpointError: The architecture is unknown, or the metadata is incomplete.
    """
    known = architecture(header.architecture, str(header.path))
    if known.unstated:
        raise CheckpointError(
            f"{header.path}: files of the architecture {known.name} do not say {known.unstated}", hint=_ADVICE
        )
    needed = _needed(known.name)
    _refuse_invalid(header, tuple(needed))
    problems = metadata_problems(header)
    if problems:
        shown = [*problems[:_MAX_SHOWN], *([f"and {len(problems) - _MAX_SHOWN} more"] * (len(problems) > _MAX_SHOWN))]
        raise CheckpointError(
            f"{header.path}: metadata changes what the model computes, in unsupported ways: {'; '.join(shown)}",
            hint=f"{_ADVICE}: it states all of it",
        )
    experts = _experts(header)
    # Mixtral's models are llama's with experts.
    model_type = "mixtral" if experts and known.name == "llama" else known.model_types[0]
    config: dict[str, Any] = {"model_type": model_type, **experts}
    config |= {name: _get(header, key) for key, name in needed.items()}
    config |= {
        name: header.metadata[f"tokenizer.ggml.{key}"]
        for key, name in _TOKENS.items()
        if type(header.metadata.get(f"tokenizer.ggml.{key}")) is int
    }
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None:
        raise InvalidCheckpointError(
            f"{header.path} has no token_embd.weight, which says how large the vocabulary is", hint=_ADVICE
        )
    config["vocab_size"] = embedding.shape[0]
    config["num_hidden_layers" if known.name != "gpt2" else "n_layer"] -= _predicting_layers(header)
    # llama.cpp writes the head only if it is not the embedding.
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    if known.name == "gpt2":
        return config | {"layer_norm_epsilon": _epsilon(header, "attention.layer_norm_epsilon")}
    config["rms_norm_eps"] = _epsilon(header, "attention.layer_norm_rms_epsilon")
    if known.name == "jamba":
        return config | _of_jamba(header, config)
    if known.name == "lfm2":
        return config | _of_lfm2(header, config)
    config["num_key_value_heads"] = _get(header, "attention.head_count_kv") or config["num_attention_heads"]
    config["rope_parameters"] = _rope_parameters(header)
    head_dim = _head_dim(header)
    if head_dim is not None:
        config["head_dim"] = head_dim
    if known.name in _WITH_LINEAR:
        config |= _linear_attention(header, config)
    return config | _windows(header) | _softcaps(header) | _attention_scale(header, config)


def _needed(architecture: str) -> dict[str, str]:
    """Return the metadata keys of the sizes that are required, and their names in the configuration."""
    if architecture == "gpt2":
        return _GPT2_SIZES
    if architecture == "jamba":
        return {**_SIZES, **_STATE_SPACES}
    if architecture == "lfm2":
        return {**_SIZES, "shortconv.l_cache": "conv_L_cache"}
    if architecture in _WITH_LINEAR:
        # Of Qwen 3.5 with experts, no layer is without.
        absent = "intermediate_size" if architecture == "qwen35moe" else ""
        return {key: name for key, name in (_SIZES | _LINEAR).items() if name != absent}
    return _SIZES


def _linear_attention(header: Header, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the size of a head of values, and which layers have linear attention.

    Raises:
        InvalidCheckpointError: Heads do not divide what they have together, or the period of layers is no number.
    """
    heads, rows, keys = (
        config["linear_num_value_heads"],
        config["linear_value_head_dim"],
        config["linear_num_key_heads"],
    )
    interval = _stated(header, "full_attention_interval", _USUAL_INTERVAL)
    if rows % heads or heads % keys or not _counts(interval):
        raise InvalidCheckpointError(
            f"{header.path}: ssm.group_count {keys}, ssm.time_step_rank {heads}, ssm.inner_size {rows} and "
            f"full_attention_interval {str(interval)[:80]} do not fit together",
            hint=_ADVICE,
        )
    types = [
        "full_attention" if layer % interval == interval - 1 else "linear_attention"
        for layer in range(config["num_hidden_layers"])
    ]
    return {"linear_value_head_dim": rows // heads, "layer_types": types}


def _of_jamba(header: Header, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return which layers attend, and which have experts; the others are state spaces, and without.

    Raises:
        InvalidCheckpointError: They do not recur at a fixed distance, or heads differ, or sizes do not fit.
    """
    layers, heads = config["num_hidden_layers"], _heads_by_layer(header)
    width, states = config["hidden_size"], config["mamba_expand"]
    if states % width:
        raise InvalidCheckpointError(
            f"{header.path}: jamba.ssm.inner_size is {states}, no multiple of the size of hidden states, {width}",
            hint=_ADVICE,
        )
    attending = [layer for layer, count in enumerate(heads) if count]
    routed = [layer for layer in range(layers) if f"blk.{layer}.ffn_gate_inp.weight" in header.tensors]
    return {
        **_period(header, "attn", attending, layers),
        **_period(header, "expert", routed, layers),
        "num_key_value_heads": max(heads) or config["num_attention_heads"],
        "mamba_expand": states // width,
        "mamba_conv_bias": any(name.endswith(".ssm_conv1d.bias") for name in header.tensors),
        "mamba_proj_bias": any(name.endswith(".ssm_in.bias") for name in header.tensors),
    }


def _of_lfm2(header: Header, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return which layers attend; the others are short convolutions."""
    heads = _heads_by_layer(header)
    return {
        "norm_eps": config["rms_norm_eps"],
        # The width is the final one, which the class would adjust again.
        "block_auto_adjust_ff_dim": False,
        "num_key_value_heads": max(heads) or config["num_attention_heads"],
        "layer_types": ["full_attention" if count else "conv" for count in heads],
        "conv_bias": any(name.endswith(".shortconv.in_proj.bias") for name in header.tensors),
        "rope_parameters": _rope_parameters(header),
    }


def _heads_by_layer(header: Header) -> list[int]:
    """Return the number of heads of keys of each layer, which is 0 in those that do not attend.

    Raises:
        InvalidCheckpointError: It is no such list, or has more than one number besides 0.
    """
    heads, layers = _get(header, "attention.head_count_kv"), _get(header, "block_count")
    whole = isinstance(heads, list) and len(heads) == layers and all(type(n) is int and n >= 0 for n in heads)
    if not whole or len({*heads, 0}) > 2:  # noqa: PLR2004  # 0 and another
        raise InvalidCheckpointError(
            f"{header.path}: {header.architecture}.attention.head_count_kv is {str(heads)[:80]}, "
            f"not one number or 0 for each of {layers} layers",
            hint=_ADVICE,
        )
    return list(heads)


def _period(header: Header, kind: str, layers: list[int], count: int) -> dict[str, int]:
    """Return the period at which these of so many layers recur, and the first of them.

    Raises:
        InvalidCheckpointError: They do not.
    """
    first = layers[0] if layers else count
    period = layers[1] - first if len(layers) > 1 else count + 1
    if first >= period or layers != list(range(first, count, period)):
        which = "with experts" if kind == "expert" else "that attend (attention.head_count_kv)"
        raise InvalidCheckpointError(
            f"{header.path}: the layers {which} do not recur at a fixed distance: {str(layers)[:80]}", hint=_ADVICE
        )
    return {f"{kind}_layer_period": period, f"{kind}_layer_offset": first}


def _experts(header: Header) -> dict[str, Any]:
    """Return what the configuration says of experts, and of what else only such architectures have.

    Raises:
        InvalidCheckpointError: Numbers are missing or invalid.
    """
    known = header.architecture
    names = _EXPERTS.get(known, {})
    if known == "llama" and not _get(header, "expert_count"):
        return {}
    counts = {key: _get(header, key) for key in names}
    wrong = [
        f"{key} is {str(value)[:80]}, not an integer from 1" for key, value in counts.items() if not _counts(value)
    ]
    others = {key: _stated(header, key, default) for key, (_, default) in _COUNTS.get(known, {}).items()}
    wrong += [
        f"{key} is {str(value)[:80]}, not an integer from 0"
        for key, value in others.items()
        if type(value) is not int or value < 0
    ]
    factors = {key: _get(header, key) for key in _FACTORS.get(known, {})}
    wrong += [
        f"{key} is {str(value)[:80]}, not a number above 0"
        for key, value in factors.items()
        if type(value) not in (int, float) or not 0 < value < math.inf
    ]
    if wrong:
        stated = "; ".join(f"{known}.{each}" for each in wrong)
        raise InvalidCheckpointError(f"{header.path}: {stated}", hint=_ADVICE)
    return {
        # llama.cpp always divides the weights of the experts of Qwen 3 by their sum, and never those of Qwen 2.
        **({"norm_topk_prob": True} if known in ("qwen3moe", "qwen3vlmoe") else {}),
        **(_of_glm(header) if known == "glm4moe" else {}),
        **{names[key]: value for key, value in counts.items() if names[key]},
        **{_COUNTS[known][key][0]: value for key, value in others.items()},
        **{_FACTORS[known][key]: _shortest(value) for key, value in factors.items()},
    }


def _of_glm(header: Header) -> dict[str, Any]:
    return {
        "norm_topk_prob": bool(_get(header, "expert_weights_norm")),
        "use_qk_norm": "blk.0.attn_q_norm.weight" in header.tensors,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
    }


def _shortest(value: float) -> float:
    """Return the shortest decimal number that a file, which has 32 bits for it, stores as this one.

    It is what the original configuration says: 0.2 and the number of 32 bits next to it scale attention differently.
    """
    shown = (float(f"{value:.{digits}g}") for digits in range(1, 10))
    return next((one for one in shown if struct.pack("f", one) == struct.pack("f", value)), float(value))


def _stated(header: Header, key: str, default: Any) -> Any:
    value = _get(header, key)
    return default if value is None else value


def _counts(value: Any) -> bool:
    return type(value) is int and value > 0


def _refuse_invalid(header: Header, needed: tuple[str, ...]) -> None:
    counted = (*needed, "attention.head_count_kv", "attention.key_length", "attention.sliding_window")
    if header.architecture in ("jamba", "lfm2"):
        # One for each layer.
        counted = tuple(key for key in counted if key != "attention.head_count_kv")
    problems = []
    for key in counted:
        value = _get(header, key)
        if value is None and key in needed:
            problems.append(f"{header.architecture}.{key} is missing")
        elif value is not None and (type(value) is not int or value < 1):
            problems.append(f"{header.architecture}.{key} is {str(value)[:80]}, not an integer from 1")
    for key in ("rope.freq_base", "rope.freq_base_swa", "rope.scaling.factor"):
        value = _get(header, key)
        if value is not None and not (type(value) in (int, float) and 0 < value < float("inf")):
            problems.append(f"{header.architecture}.{key} is {str(value)[:80]}, not a number above 0")
    if problems:
        raise InvalidCheckpointError(f"{header.path}: {'; '.join(problems)}", hint=_ADVICE)


def _predicting_layers(header: Header) -> int:
    """Return the number of layers after the model's own, which predict several tokens.

    Raises:
        InvalidCheckpointError: It is not a number of layers, of which one at least is the model's.
    """
    count = _get(header, "nextn_predict_layers") or 0
    if type(count) is not int or not 0 <= count < _get(header, "block_count"):
        raise InvalidCheckpointError(
            f"{header.path}: {header.architecture}.nextn_predict_layers is {str(count)[:80]} of "
            f"{_get(header, 'block_count')} layers",
            hint=_ADVICE,
        )
    return count


def _get(header: Header, key: str) -> Any:
    return header.metadata.get(f"{header.architecture}.{key}")


def _epsilon(header: Header, key: str) -> float:
    value = _get(header, key)
    if type(value) is not float or not 0 < value < 1:
        raise InvalidCheckpointError(f"{header.path}: {header.architecture}.{key} is {str(value)[:80]}", hint=_ADVICE)
    return value


def _rope_parameters(header: Header) -> dict[str, Any]:
    theta = float(_get(header, "rope.freq_base") or _DEFAULT_THETA)
    scaling = dict(_scaling(header))
    whole = {"rope_type": "default", "rope_theta": theta, **scaling}
    if header.architecture in _PARTLY_ROTATED:
        rotated, size = _get(header, "rope.dimension_count"), head_size(header)
        if not _counts(rotated) or not size or rotated > size:
            raise InvalidCheckpointError(
                f"{header.path}: {header.architecture}.rope.dimension_count is {str(rotated)[:80]} of heads of {size}",
                hint=_ADVICE,
            )
        whole["partial_rotary_factor"] = rotated / size
    sections = _get(header, "rope.dimension_sections")
    if header.architecture in ("qwen35", "qwen35moe") and isinstance(sections, list):
        whole |= {"mrope_section": sections[:_SECTIONS], "mrope_interleaved": True}
    if header.architecture != "gemma3":
        return whole
    local = float(_get(header, "rope.freq_base_swa") or _DEFAULT_THETA)
    return {"full_attention": whole, "sliding_attention": {"rope_type": "default", "rope_theta": local}}


def _scaling(header: Header) -> Iterator[tuple[str, Any]]:
    """Yield how rotary positions are scaled; only Gemma 3's scaling is stated in full."""
    kind, factor = _get(header, "rope.scaling.type"), _get(header, "rope.scaling.factor")
    if header.architecture == "gemma3" and kind == "linear" and factor is not None:
        yield from (("rope_type", "linear"), ("factor", float(factor)))
        return
    scaled = (kind or "none") != "none" or factor is not None or _get(header, "rope.scale_linear") not in (None, 1)
    if scaled or "rope_freqs.weight" in header.tensors:
        raise CheckpointError(
            f"{header.path} scales its rotary positions, and its metadata does not state how in full",
            hint=_ADVICE,
        )


def _head_dim(header: Header) -> int | None:
    length = _get(header, "attention.key_length")
    if length is None and header.architecture == "llama":
        length = _get(header, "rope.dimension_count")
    # Qwen2's configuration has no head_dim: heads divide the hidden size.
    return length if type(length) is int and length > 0 and header.architecture not in SHARED_WIDTH else None


def _windows(header: Header) -> dict[str, Any]:
    if header.architecture not in _SLIDING:
        return {}
    window, pattern = _get(header, "attention.sliding_window"), _get(header, "attention.sliding_window_pattern")
    config = {} if window is None else {"sliding_window": window}
    return config if pattern is None else {**config, "layer_types": _layer_types(header, pattern)}


def _layer_types(header: Header, pattern: Any) -> list[str]:
    """Return the type of each layer: from a flag for each, or, as llama.cpp counts, full attention every so many.

    Raises:
        InvalidCheckpointError: The pattern is neither.
    """
    count = _get(header, "block_count")
    if isinstance(pattern, list | tuple) and len(pattern) == count and all(flag in (0, 1) for flag in pattern):
        slides = [bool(flag) for flag in pattern]
    elif type(pattern) is int and pattern >= 0:
        slides = [pattern == 0 or layer % pattern < pattern - 1 for layer in range(count)]
    else:
        raise InvalidCheckpointError(
            f"{header.path}: {header.architecture}.attention.sliding_window_pattern is {str(pattern)[:80]}, "
            f"neither a number nor a flag for each of {count} layers",
            hint=_ADVICE,
        )
    return ["sliding_attention" if sliding else "full_attention" for sliding in slides]


def _softcaps(header: Header) -> dict[str, Any]:
    """Return the soft caps of logits that the file states; 0 means none.

    Raises:
        InvalidCheckpointError: It is not a number from 0.
    """
    caps: dict[str, Any] = {}
    for name in ("attn_logit_softcapping", "final_logit_softcapping") if header.architecture in _SLIDING else ():
        value = _get(header, name)
        if value is None:
            continue
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise InvalidCheckpointError(
                f"{header.path}: {header.architecture}.{name} is {str(value)[:80]}, not a number from 0",
                hint=_ADVICE,
            )
        caps[name] = float(value) or None
    return caps


def _attention_scale(header: Header, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the square of the number that attention scores of the Gemmas are divided by.

    Raises:
        InvalidCheckpointError: It is stated, and not an integer.
    """
    if header.architecture not in _SLIDING:
        return {}
    scale = _get(header, "attention.scale")
    if scale:
        scalar = float(scale) ** -2 if type(scale) in (int, float) and 0 < scale < math.inf else 0.0
        if not scalar or not math.isclose(scalar, round(scalar), rel_tol=1e-4):
            raise InvalidCheckpointError(
                f"{header.path}: {header.architecture}.attention.scale is {str(scale)[:80]}, "
                "not 1 divided by the square root of an integer",
                hint=_ADVICE,
            )
        return {"query_pre_attn_scalar": round(scalar)}
    if (header.architecture, config["num_hidden_layers"]) in _SCALED_BY_HIDDEN:
        return {"query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"]}
    if head_size(header) != _USUAL_SCALAR:
        log.warning(
            "%s does not say how attention is scaled; by %d as in transformers, where llama.cpp takes the size "
            "of a head, %s. The config.json of the original checkpoint, put into its folder, says it",
            header.path,
            _USUAL_SCALAR,
            head_size(header),
        )
    return {}
