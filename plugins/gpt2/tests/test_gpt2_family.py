"""GPT-2 against the unsplit model, in every variant that the Hub holds."""

from importlib import resources

import pytest
import torch
from transformers import GPT2LMHeadModel, modeling_utils

from splitlearn_core import ConfigurationError, SplitCausalLM, load_split_model
from splitlearn_core.testing import FamilyConformance

pytestmark = pytest.mark.libs


class TestGpt2(FamilyConformance):
    model_type = "gpt2"
    # Numbers of layers enter the attention's scale: a component must not renumber its layers.
    variants = {"inverse layer scale": {"scale_attn_by_inverse_layer_idx": True}}
    legacy_tensors = {
        "h.0.attn.bias": (1, 1, 64, 64),
        "h.5.attn.bias": (1, 1, 64, 64),
        "h.0.attn.masked_bias": (),
    }


def test_a_load_and_a_loss_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-2's class name has no known loss, about which transformers warns; the loss is the unsplit model's."""
    said: list[str] = []
    monkeypatch.setattr(modeling_utils.logger, "warning_once", lambda text, *_: said.append(text))
    ids = torch.tensor([[11, 22, 33]])

    split = SplitCausalLM(*load_split_model("gpt2", (1, 5), "bundled:gpt2", dtype="float32"))
    loss = split(input_ids=ids, labels=ids).loss

    assert said == []
    folder = resources.files("splitlearn_gpt2") / "bundled"
    whole = GPT2LMHeadModel.from_pretrained(str(folder), dtype=torch.float32)
    assert torch.equal(loss, whole(input_ids=ids, labels=ids).loss)
    assert any("loss_type" in text for text in said)


def test_a_sequence_beyond_the_positions_is_refused() -> None:
    """With the number of positions, where torch says of an index that it is out of range."""
    split = SplitCausalLM(*load_split_model("gpt2", (1, 5), "bundled:gpt2"))

    with pytest.raises(ConfigurationError, match="300 tokens exceeds the 256 positions"):
        split(torch.ones(1, 300, dtype=torch.long))
