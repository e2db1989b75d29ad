"""GPT-2 against the unsplit model, in every variant that the Hub holds."""

from splitlearn_core.testing import FamilyConformance


class TestGpt2(FamilyConformance):
    model_type = "gpt2"
    # Numbers of layers enter the attention's scale: a component must not renumber its layers.
    variants = {"inverse layer scale": {"scale_attn_by_inverse_layer_idx": True}}
    legacy_tensors = {
        "h.0.attn.bias": (1, 1, 64, 64),
        "h.5.attn.bias": (1, 1, 64, 64),
        "h.0.attn.masked_bias": (),
    }
