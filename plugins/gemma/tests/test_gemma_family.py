"""Gemma, Gemma 2 and Gemma 3 (text) against the unsplit model."""

import pytest

from splitlearn_core.testing import FamilyConformance

pytestmark = pytest.mark.libs

LEGACY = {"layers.0.self_attn.rotary_emb.inv_freq": (4,)}


class TestGemma(FamilyConformance):
    model_type = "gemma"
    legacy_tensors = LEGACY


class TestGemma2(FamilyConformance):
    model_type = "gemma2"
    # Every other layer sees four tokens back.
    config = {"sliding_window": 4}
    legacy_tensors = LEGACY


class TestGemma3Text(FamilyConformance):
    model_type = "gemma3_text"
    config = {"sliding_window": 4}
    # One full layer among sliding ones, so that some components have no full layer at all.
    variants = {"sliding pattern": {"layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2}}
    legacy_tensors = LEGACY
