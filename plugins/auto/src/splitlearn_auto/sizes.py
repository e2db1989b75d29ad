"""Tiny sizes for the configuration of any model type, with the usual divisibility."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Sizes that suit every ordinary decoder; six layers allow all the cuts that tests make.
TINY: Mapping[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

#: Sizes that only some model types have, by their names in transformers.
_RARE: Mapping[str, int] = {
    # Feed-forward layers under other names.
    **dict.fromkeys(("ffn_dim", "ffn_hidden_size", "dff", "dim_ff", "intermediate_size_mlp", "n_inner"), 48),
    **dict.fromkeys(("dense_intermediate_size", "shared_intermediate_size", "block_ff_dim"), 48),
    "word_embed_proj_dim": 16,
    # Attention under other names; rotary dimensions are an even part of a head's.
    "num_kv_heads": 2,
    "dim_head": 8,
    "kv_channels": 8,
    "rotary_dim": 4,
    # Latent attention and its indexer.
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 64,
    # Experts: few, so that each of them is used.
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    "router_hidden_size": 16,
    # Linear attention and state spaces.
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    "linear_num_key_heads": 2,
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    "mamba_d_ssm": 64,
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 8),
}


def tiny_sizes(known: Any) -> dict[str, Any]:
    """Return the values that make a model of a type small.

    Args:
        known: A configuration of the type, of any size.

    Returns:
        Values for its configuration class, by its own names.
    """
    sizes = {name: value for name, value in TINY.items() if hasattr(known, name) and not _is_computed(known, name)}
    if "num_key_value_heads" in sizes and hasattr(known, "kv_lora_rank"):
        # Latent attention has keys for each head.
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    own = {known.attribute_map.get(name, name) for name in sizes}
    for name, value in _RARE.items():
        current = getattr(known, name, None)
        # Values that are None by default are computed from others.
        if type(current) is int and current > value and known.attribute_map.get(name, name) not in own:
            sizes[name] = value
    return sizes


def _is_computed(known: Any, name: str) -> bool:
    return isinstance(getattr(type(known), name, None), property)
