"""GPT-2 with cross-attention, which a decoder alone does not use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from splitlearn_core import SplitCausalLM, load_split_directory, load_split_model, save_split

pytestmark = pytest.mark.libs

CUTS = (2, 4)
IDS = torch.tensor([[5, 17, 42, 9, 3, 8]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(("saved", "stated"), [(False, True), (True, False), (True, True)])
def test_gpt2_with_unused_cross_attention(tmp_path: Path, saved: bool, stated: bool) -> None:
    """Whether config.json or the weights have it: a decoder alone does not compute it, and answers as unsplit."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 64}
    model = GPT2LMHeadModel(GPT2Config(**sizes, add_cross_attention=saved)).eval()
    model.save_pretrained(tmp_path / "gpt2")
    path = tmp_path / "gpt2" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "add_cross_attention": stated}))

    parts = load_split_model(None, CUTS, tmp_path / "gpt2")
    save_split(parts, tmp_path / "split")

    assert torch.equal(logits(SplitCausalLM(*parts)), logits(model))
    assert torch.equal(logits(SplitCausalLM(*load_split_directory(tmp_path / "split"))), logits(model))
