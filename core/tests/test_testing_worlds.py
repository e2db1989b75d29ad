"""The small worlds that plugin authors test in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from splitlearn_core.testing.worlds import tiny_model, write_checkpoint

pytestmark = pytest.mark.libs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_tiny_model_is_what_its_checkpoint_holds(tmp_path: Path, dtype: torch.dtype) -> None:
    """Read back by transformers, every parameter and every buffer is the same: a reference to compare with."""
    from transformers import AutoModelForCausalLM

    model = tiny_model("llama", dtype)
    again = AutoModelForCausalLM.from_pretrained(write_checkpoint(tmp_path / "tiny", model))

    assert again.dtype == dtype
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        other = dict([*again.named_parameters(), *again.named_buffers()])[name]
        assert (name, other.dtype) == (name, tensor.dtype)
        assert torch.equal(other, tensor)


def test_a_tiny_model_is_the_same_each_time() -> None:
    """A seed decides all weights; another seed gives others, and the process's random state counts for nothing."""
    torch.manual_seed(1)
    first = tiny_model("llama").state_dict()
    torch.manual_seed(2)
    second = tiny_model("llama").state_dict()

    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(tiny_model("llama", seed=1).state_dict()["model.norm.weight"], first["model.norm.weight"])
