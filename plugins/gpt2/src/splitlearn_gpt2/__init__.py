"""GPT-2 for splitlearn: model type ``gpt2``."""

from __future__ import annotations

from splitlearn_core import ModelFamily, hookimpl

GPT2 = ModelFamily(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    base="transformer",
    layers="h",
    embedding="wte",
    norm="ln_f",
    # Learned positions are added even to hidden states that come in from outside.
    zero_outside_bottom=("wpe",),
    # The embedding dropout would be applied again in every component.
    skip_outside_bottom=("drop",),
    # Causal masks that old checkpoints carry as tensors.
    ignored_suffixes=(".attn.bias", ".attn.masked_bias"),
    config_names={
        "num_hidden_layers": "n_layer",
        "hidden_size": "n_embd",
        "num_attention_heads": "n_head",
    },
    config_defaults={
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "num_attention_heads": 12,
        "tie_word_embeddings": True,
    },
    packable=True,
    default_model="openai-community/gpt2",
    bundled_checkpoint="splitlearn_gpt2:bundled",
)


@hookimpl
def splitlearn_model_families() -> list[ModelFamily]:
    return [GPT2]
