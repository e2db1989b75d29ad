"""Gemma, Gemma 2, and Gemma 3 with and without images for splitlearn.

The scale of the embeddings and the ``1 + weight`` of the norms live in Hugging Face's own modules
(the scale since transformers 5.4), so nothing of them is said here. What differs between the three
is where ``config.json`` may be silent. Of a Gemma 3 with images, components have the language model.
"""

from __future__ import annotations

from typing import Any

from splitlearn_core import ModelFamily, hookimpl


def _gemma(model_type: str, architecture: str, default_model: str, sizes: dict[str, int], **names: Any) -> ModelFamily:
    defaults: dict[str, Any] = {"head_dim": 256, "tie_word_embeddings": True, **sizes}
    return ModelFamily(
        model_type=model_type,
        architecture=architecture,
        # Rotary frequencies that old checkpoints carry as tensors; they are computed.
        ignored_suffixes=(".rotary_emb.inv_freq",),
        config_defaults=defaults,
        default_model=default_model,
        **names,
    )


_SECOND = {"num_hidden_layers": 26, "hidden_size": 2304, "num_attention_heads": 8, "num_key_value_heads": 4}

GEMMA = _gemma(
    "gemma",
    "GemmaForCausalLM",
    "google/gemma-2b",
    {"num_hidden_layers": 28, "hidden_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 16},
    packable=True,
)
GEMMA2 = _gemma("gemma2", "Gemma2ForCausalLM", "google/gemma-2-2b", _SECOND, packable=True)
GEMMA3_TEXT = _gemma("gemma3_text", "Gemma3ForCausalLM", "google/gemma-3-1b-pt", _SECOND, packable=True)
GEMMA3 = _gemma(
    "gemma3",
    "Gemma3ForConditionalGeneration",
    "google/gemma-3-4b-pt",
    _SECOND,
    base="model.language_model",
    text_config="text_config",
    # The masks of all layers depend on which tokens belong to one image.
    bottom_arguments=(),
    renamed=(
        # transformers 5.4 writes the first, all others the second.
        ("model.language_model.model.", "language_model.model."),
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
    ),
)


@hookimpl
def splitlearn_model_families() -> list[ModelFamily]:
    return [GEMMA, GEMMA2, GEMMA3_TEXT, GEMMA3]
