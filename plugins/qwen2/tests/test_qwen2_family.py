"""Qwen2 against the unsplit model, tied and untied, with and without sliding windows."""

import pytest

from splitlearn_core.testing import FamilyConformance

pytestmark = pytest.mark.libs


class TestQwen2(FamilyConformance):
    model_type = "qwen2"
    variants = {"sliding window": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}}
    legacy_tensors = {"layers.0.self_attn.rotary_emb.inv_freq": (4,)}
