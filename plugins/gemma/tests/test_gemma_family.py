"""Gemma, Gemma 2 and Gemma 3 (text) against the unsplit model."""

from splitlearn_core.testing import FamilyConformance

LEGACY = {"layers.0.self_attn.rotary_emb.inv_freq": (4,)}


class TestGemma(FamilyConformance):
    model_type = "gemma"
    variants = {"plain": {}, "untied": {"tie_word_embeddings": False}}
    legacy_tensors = LEGACY


class TestGemma2(FamilyConformance):
    model_type = "gemma2"
    # Every other layer sees four tokens back.
    variants = {"plain": {"sliding_window": 4}}
    # Attention scores are capped, which sdpa cannot do; transformers refuses it.
    attention = ("eager",)
    legacy_tensors = LEGACY


class TestGemma3Text(FamilyConformance):
    model_type = "gemma3_text"
    variants = {
        "plain": {"sliding_window": 4},
        # One full layer among sliding ones, so that some components have no full layer at all.
        "sliding pattern": {
            "sliding_window": 4,
            "layer_types": [
                "sliding_attention",
                "sliding_attention",
                "full_attention",
                "sliding_attention",
                "sliding_attention",
                "full_attention",
            ],
        },
    }
    legacy_tensors = LEGACY
