"""Qwen2 and Qwen2.5 for splitlearn: model type ``qwen2``."""

from __future__ import annotations

from splitlearn_core import ModelFamily, hookimpl

QWEN2 = ModelFamily(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    # Rotary frequencies that old checkpoints carry as tensors; they are computed.
    ignored_suffixes=(".rotary_emb.inv_freq",),
    packable=True,
    # Small Qwen2 models tie head and embedding and say so; the large ones do not.
    config_defaults={
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "tie_word_embeddings": False,
    },
    default_model="Qwen/Qwen2-0.5B",
)


@hookimpl
def splitlearn_model_families() -> list[ModelFamily]:
    return [QWEN2]
