"""The error of a comparison that is impossible names the cause."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from splitlearn_core import CheckpointError
from splitlearn_core.testing.worlds import tiny_model, write_checkpoint

pytestmark = pytest.mark.libs


@pytest.fixture
def windowless(world: Any, tmp_path: Path, edit_json: Any) -> Path:
    """Return a checkpoint whose layers use a sliding window without a size in the configuration."""
    world.install("qwen2", world.source("qwen2").replace("Llama", "Qwen2"))
    folder = write_checkpoint(tmp_path / "windowless", tiny_model("qwen2"))
    layers = 6
    edit_json(
        folder / "config.json",
        layer_types=["sliding_attention"] + ["full_attention"] * (layers - 1),
        num_hidden_layers=layers,
        sliding_window=None,
    )
    return folder


def test_a_config_that_transformers_refuses_in_its_forward(windowless: Path, cli: Any) -> None:
    """The unsplit model fails: the message quotes transformers, without a traceback."""
    from transformers import AutoModelForCausalLM

    with pytest.raises(ValueError, match="sliding_window") as own:
        AutoModelForCausalLM.from_pretrained(windowless)(input_ids=torch.tensor([[1, 2]]), use_cache=False)

    code, out, err = cli("verify", windowless, "--split", "2", "4")

    assert (code, out) == (1, "")
    assert "Traceback" not in err
    assert f"error: the unsplit model of {windowless} fails in transformers" in err
    assert str(own.value) in err
    assert "hint: check the values of config.json" in err


def test_the_cause_is_chained(windowless: Path) -> None:
    """Users of Python see where transformers fails."""
    from splitlearn_core.loading.opening import open_model
    from splitlearn_core.loading.options import LoadOptions
    from splitlearn_core.verification import verify_split

    with pytest.raises(CheckpointError) as caught:
        verify_split(open_model(windowless), (2, 4), "auto", LoadOptions(), lambda _: None)

    assert isinstance(caught.value.__cause__, ValueError)
