"""A multimodal Gemma 3 in the place of its language model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from splitlearn_core import SplitCausalLM, SplitLearnError, load_split_model

pytestmark = pytest.mark.libs

CUTS = (2, 4)


def test_the_language_model_of_a_multimodal_one(tmp_path: Path) -> None:
    """A gemma3 folder, taken for gemma3_text, is refused; the lines of the hint make one that loads."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = {
        "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14, "vision_use_head": False,
    }  # fmt: skip
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config).eval()
    folder = tmp_path / "multimodal"
    model.save_pretrained(folder)

    with pytest.raises(SplitLearnError, match="multimodal") as caught:
        load_split_model("gemma3_text", CUTS, folder)

    lines = caught.value.hint.partition("in Python: ")[2].replace("'OUT'", repr(str(tmp_path / "text")))
    exec(lines, {})  # the lines of the hint do what it says
    parts = load_split_model(None, CUTS, tmp_path / "text")
    assert parts.bottom is not None
    ids = torch.tensor([[5, 17, 42, 9]])
    with torch.no_grad():
        assert torch.equal(SplitCausalLM(*parts)(ids).logits, model(ids).logits)
