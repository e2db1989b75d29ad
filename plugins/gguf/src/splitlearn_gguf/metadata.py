"""The effect of each metadata key of llama.cpp on what a model computes, and whether a value of it is supported.

A key becomes a part of the configuration, has no effect on logits, or is refused unless its value is neutral: it
changes nothing. A key that is not in this table may mean anything, and is refused as well.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any

from splitlearn_gguf.architectures import ARCHITECTURES
from splitlearn_gguf.header import Array, Header

_ARCH = "{arch}."
#: The architectures whose files say all of a configuration.
_ALL = frozenset(known.name for known in ARCHITECTURES.values() if not known.unstated)
_WITH_EXPERTS = frozenset(
    {
        *("qwen2moe", "qwen3moe", "qwen3vlmoe", "qwen3next", "qwen35moe", "llama", "olmoe", "glm4moe", "ernie4_5-moe"),
        *("granitemoe", "jamba", "minimax-m2"),
    }
)
#: The size of each expert is another than that of a layer without experts.
_OWN_SIZE = frozenset({"qwen2moe", "qwen3moe", "qwen3vlmoe", "qwen3next", "qwen35moe", "glm4moe", "ernie4_5-moe"})
_GLM, _ERNIE, _GRANITE = frozenset({"glm4moe"}), frozenset({"ernie4_5-moe"}), frozenset({"granitemoe"})
#: Text models of those that see.
_SEEING = frozenset({"qwen2vl", "qwen3vl", "qwen3vlmoe"})
#: With layers of linear attention, or state spaces.
_LINEAR, _JAMBA = frozenset({"qwen3next", "qwen35", "qwen35moe"}), frozenset({"jamba"})
_WITH_RMS = _ALL - {"gpt2"}
_ROTARY = _WITH_RMS - _JAMBA
#: Architectures whose configuration has no size of a head: heads divide the hidden size.
SHARED_WIDTH = frozenset({"qwen2", "qwen2vl"})
_MAX_WORD = 80
_TOLERANCE = 1e-4


class Effect(Enum):
    """The effect of a key on what a model computes."""

    #: It becomes a value of the configuration, for some architectures; for others its value has to be neutral.
    USED = "used"
    #: Logits do not depend on it.
    NONE = "none"
    #: Only a neutral value is supported.
    REFUSED = "refused"


Neutral = Callable[[Any, Header], bool]


@dataclass(frozen=True, slots=True)
class Rule:
    """How one key is handled."""

    effect: Effect
    #: The architectures whose configuration it is a part of.
    used_by: frozenset[str] = frozenset()
    neutral: Neutral = lambda value, header: False


def _get(header: Header, key: str) -> Any:
    return header.metadata.get(f"{header.architecture}.{key}")


def _one_of(*values: Any) -> Neutral:
    def neutral(value: Any, header: Header) -> bool:
        return not isinstance(value, (Array, list, tuple)) and value in values

    return neutral


def _zeros(value: Any, header: Header) -> bool:
    return not isinstance(value, Array) and not any(value if isinstance(value, (list, tuple)) else [value])


def _equals(*keys: str) -> Neutral:
    """Neutral if it repeats another key."""

    def neutral(value: Any, header: Header) -> bool:
        return value in (0, next((other for key in keys if (other := _get(header, key)) is not None), None))

    return neutral


def head_size(header: Header) -> float | None:
    """Return the size of a head that the file states, or that follows from other sizes."""
    stated = _get(header, "attention.key_length")
    if stated is None and header.architecture == "llama":
        stated = _get(header, "rope.dimension_count")
    width, heads = _get(header, "embedding_length"), _get(header, "attention.head_count")
    if stated is None and type(width) is int and type(heads) is int and heads:
        stated = width / heads
    return stated if isinstance(stated, int | float) else None


def _head_size(value: Any, header: Header) -> bool:
    return value in (0, head_size(header))


def _rotated_size(value: Any, header: Header) -> bool:
    """Neutral if all of a head is rotated; the size of a head follows from the rows of the queries."""
    queries, heads = header.tensors.get("blk.0.attn_q.weight"), _get(header, "attention.head_count")
    if queries is None or type(heads) is not int or not heads:
        return _head_size(value, header)
    return value in (0, queries.shape[0] / heads)


def _shared_head_size(value: Any, header: Header) -> bool:
    width, heads = _get(header, "embedding_length"), _get(header, "attention.head_count")
    return type(width) is int and type(heads) is int and heads > 0 and value == width / heads


def _usual_scale(value: Any, header: Header) -> bool:
    size = head_size(header)
    return value == 0 or (
        isinstance(value, int | float) and bool(size) and math.isclose(value, float(size) ** -0.5, rel_tol=_TOLERANCE)  # type: ignore[arg-type]
    )


def _beyond_context(value: Any, header: Header) -> bool:
    length = _get(header, "context_length")
    return value == 0 or (type(value) is int and type(length) is int and value >= length)


def _without_window(value: Any, header: Header) -> bool:
    window = _get(header, "attention.sliding_window")
    return window is None or _beyond_context(window, header)


_NO_EFFECT = Rule(Effect.NONE)
_ABSENT = Rule(Effect.REFUSED)
_ZERO = Rule(Effect.REFUSED, neutral=_zeros)
_ONE = Rule(Effect.REFUSED, neutral=_one_of(0, 1))


def _own_choice(value: Any, header: Header) -> bool:
    """Neutral if it is how the architecture weighs experts, whatever a file says: 1, a softmax; 2, a sigmoid."""
    return _one_of(*((2,) if header.architecture in ("glm4moe", "minimax-m2") else (0, 1)))(value, header)


def _own_norm(value: Any, header: Header) -> bool:
    """Neutral unless weights were divided by their sum in an architecture that never does it."""
    return _one_of(*((0,) if header.architecture in ("qwen2moe", "olmoe", "jamba") else (0, 1)))(value, header)


def _own_length(value: Any, header: Header) -> bool:
    """Neutral if experts are as large as layers without are stated to be."""
    return _zeros(value, header) or (
        header.architecture == "minimax-m2" and value == _get(header, "feed_forward_length")
    )


def _used(by: frozenset[str] = _ALL, neutral: Neutral = lambda value, header: False) -> Rule:
    return Rule(Effect.USED, by, neutral)


_SIZES = {
    "vocab_size": _NO_EFFECT,  # The size of the embedding counts.
    "context_length": _used(),
    "embedding_length": _used(),
    "embedding_length_out": Rule(Effect.REFUSED, neutral=_equals("embedding_length")),
    "block_count": _used(),
    "feed_forward_length": _used(),
    "decoder_block_count": Rule(Effect.REFUSED, neutral=_equals("block_count")),
    "decoder_start_token_id": _NO_EFFECT,
    "pooling_type": _NO_EFFECT,  # Of embeddings of texts, not of logits.
    "{dense}_feat_in": _NO_EFFECT,
    "{dense}_feat_out": _NO_EFFECT,
    "classifier.output_labels": _NO_EFFECT,
    # The order of the rows of queries and keys that every file of the architecture llama has.
    "tensor_data_layout": Rule(Effect.REFUSED, neutral=_one_of("Meta AI original pth")),
    "use_parallel_residual": _ZERO,
    "attn_logit_softcapping": _used(frozenset({"gemma2", "gemma3"}), _zeros),
    "final_logit_softcapping": _used(frozenset({"gemma2", "gemma3"}), _zeros),
    "logit_scale": _used(_GRANITE, _one_of(0, 1)),
    "residual_scale": _used(_GRANITE, _one_of(0, 1)),
    "embedding_scale": _used(_GRANITE, _one_of(0, 1)),
    "interleave_moe_layer_step": _used(_ERNIE, _one_of(0, 1)),
    "full_attention_interval": _used(_LINEAR, _one_of(0, 1)),
}
_EXPERTS = {
    "expert_count": _used(_WITH_EXPERTS, _zeros),
    "expert_used_count": _used(_WITH_EXPERTS, _zeros),
    "expert_feed_forward_length": _used(_OWN_SIZE, _own_length),
    # Of Ernie it follows from the number of shared experts.
    "expert_shared_feed_forward_length": _used(frozenset({"qwen2moe", "qwen3next", "qwen35moe"}) | _ERNIE, _zeros),
    "expert_shared_count": _used(_GLM | _ERNIE, _zeros),
    "expert_group_count": _used(_GLM, _zeros),
    "expert_group_used_count": _used(_GLM, _zeros),
    "expert_weights_scale": _used(_GLM, _zeros),
    "expert_weights_norm": _used(_GLM, _own_norm),
    "expert_gating_func": Rule(Effect.REFUSED, neutral=_own_choice),
    "leading_dense_block_count": _used(_GLM | _ERNIE, _zeros),
    # Those layers are left out.
    "nextn_predict_layers": _used(_GLM | _LINEAR, _zeros),
    # Layers to which images are added.
    "n_deepstack_layers": _used(_SEEING, _zeros),
}
_STATES = {
    **dict.fromkeys(
        ("ssm.conv_kernel", "ssm.inner_size", "ssm.state_size", "ssm.time_step_rank"), _used(_LINEAR | _JAMBA, _zeros)
    ),
    "ssm.group_count": _used(_LINEAR, _zeros),
    "shortconv.l_cache": _used(frozenset({"lfm2"}), _zeros),
}
#: Of experts, of state spaces, of Gemma 3n and others: features that no architecture here has.
_OTHER_FEATURES = (
    "features_length", "expert_chunk_feed_forward_length", "expert_group_scale",
    "experts_per_group", "moe_every_n_layers", "moe_latent_size", "router_logit_softcapping", "swin_norm",
    "rescale_every_n_layers",
    "time_mix_extra_dim", "time_decay_extra_dim", "token_shift_count", "activation_sparsity_scale",
    "altup.active_idx", "altup.num_inputs", "embedding_length_per_layer_input", "swiglu_clamp_exp",
    "swiglu_clamp_shexp", "ssm.dt_b_c_rms", "kda.head_dim", "wkv.head_size", "posnet.embedding_length",
    "posnet.block_count", "convnext.embedding_length", "convnext.block_count",
)  # fmt: skip
_ATTENTION = {
    "head_count": _used(),
    "head_count_kv": _used(_WITH_RMS, _equals("attention.head_count")),
    "key_length": _used(_ROTARY - SHARED_WIDTH, _shared_head_size),
    "value_length": Rule(Effect.REFUSED, neutral=_head_size),
    "key_length_swa": Rule(Effect.REFUSED, neutral=_head_size),
    "value_length_swa": Rule(Effect.REFUSED, neutral=_head_size),
    "layer_norm_epsilon": _used(frozenset({"gpt2"}), _zeros),
    "layer_norm_rms_epsilon": _used(_WITH_RMS, _zeros),
    "causal": Rule(Effect.REFUSED, neutral=_one_of(True)),
    "sliding_window": _used(frozenset({"gemma2", "gemma3"}), _beyond_context),
    "sliding_window_pattern": _used(frozenset({"gemma2", "gemma3"}), _without_window),
    "scale": _used(frozenset({"gemma2", "gemma3"}) | _GRANITE, _usual_scale),
    "output_scale": _ONE,
    "temperature_length": _ZERO,
    "temperature_scale": _ZERO,
    **dict.fromkeys(
        (
            "max_alibi_bias", "clamp_kqv", "group_norm_epsilon", "group_norm_groups", "q_lora_rank", "kv_lora_rank",
            "decay_lora_rank", "iclr_lora_rank", "value_residual_mix_lora_rank", "gate_lora_rank",
            "relative_buckets_count", "key_length_mla", "value_length_mla", "shared_kv_layers",
        ),
        _ZERO,
    ),
}  # fmt: skip
_ROPE = {
    "dimension_count": _used(_GLM | _LINEAR | {"minimax-m2"}, _rotated_size),
    "dimension_count_swa": Rule(Effect.REFUSED, neutral=_rotated_size),
    # Of text, all sections have the same positions.
    "dimension_sections": _used(_SEEING | {"qwen35", "qwen35moe"}, _zeros),
    "freq_base": _used(_ROTARY, _zeros),
    "freq_base_swa": _used(frozenset({"gemma3"}), _equals("rope.freq_base")),
    # Scaled positions that are not stated in full are refused in `configuration`.
    "scaling.type": _used(),
    "scaling.factor": _used(),
    "scale_linear": _used(),
    "scaling.original_context_length": _NO_EFFECT,
    "scaling.finetuned": _NO_EFFECT,
    "scaling.yarn_beta_fast": _NO_EFFECT,
    "scaling.yarn_beta_slow": _NO_EFFECT,
    "scaling.alpha": _ZERO,
    "scaling.attn_factor": _ONE,
    "scaling.yarn_log_multiplier": _ZERO,
    "scaling.yarn_ext_factor": Rule(Effect.REFUSED, neutral=_one_of(0, -1)),
    "scaling.yarn_attn_factor": _ONE,
}
#: Of the file and its tokenizer: no part of the model's arithmetic.
_FREE_GROUPS = ("general.", "tokenizer.", "imatrix.", "clip.", "split.")
_OF_ARCHITECTURE = {
    **_SIZES,
    **_EXPERTS,
    **_STATES,
    **dict.fromkeys(_OTHER_FEATURES, _ZERO),
    **{f"attention.{key}": rule for key, rule in _ATTENTION.items()},
    **{f"rope.{key}": rule for key, rule in _ROPE.items()},
}
_GLOBAL = {
    "general.type": Rule(Effect.REFUSED, neutral=_one_of("model")),
    "diffusion.shift_logits": _ZERO,
    **dict.fromkeys(("xielu.alpha_p", "xielu.alpha_n", "xielu.beta", "xielu.eps"), _ABSENT),
    **dict.fromkeys(
        (
            "adapter.type", "adapter.lora.alpha", "adapter.lora.task_name", "adapter.lora.prompt_prefix",
            "adapter.alora.invocation_tokens",
        ),
        _ABSENT,
    ),
}  # fmt: skip
#: Key as llama.cpp lists it, with its placeholders -> how it is handled.
RULES: Mapping[str, Rule] = MappingProxyType(
    {**{_ARCH + key: rule for key, rule in _OF_ARCHITECTURE.items()}, **_GLOBAL}
)
#: Keys that are not llama.cpp's: of encoders for images and audio, whose tensors are not read.
_TOWERS = re.compile(r"(vision|mm|audio)\.")
_DENSE = re.compile(r"\w+_feat_(in|out)")


def rule_of(key: str, architecture: str) -> Rule | None:
    """Return how a key of a file is handled, or None if it is unknown."""
    if key in _GLOBAL:
        return _GLOBAL[key]
    if not key.startswith(f"{architecture}."):
        # Of another architecture, or unknown: llama.cpp does not read it either.
        return _NO_EFFECT
    own = key.removeprefix(f"{architecture}.")
    if _TOWERS.match(own) or _DENSE.fullmatch(own):
        return _NO_EFFECT
    return _OF_ARCHITECTURE.get(own)


def listed_rule(key: str) -> Rule | None:
    """Return how a key is handled, written as llama.cpp lists it, with placeholders."""
    free = _NO_EFFECT if key.startswith(_FREE_GROUPS) and key not in _GLOBAL else None
    return RULES.get(key, free)


def metadata_problems(header: Header) -> list[str]:
    """Return the values that change what the model computes and are not supported; empty if there are none."""
    problems = []
    for key, value in header.metadata.items():
        rule = rule_of(key, header.architecture)
        shown = f"{key} = {str(value)[:_MAX_WORD]}"
        if rule is None:
            problems.append(f"{shown} is an unknown key")
        elif (
            rule.effect is not Effect.NONE
            and header.architecture not in rule.used_by
            and not rule.neutral(value, header)
        ):
            problems.append(shown)
    return problems
