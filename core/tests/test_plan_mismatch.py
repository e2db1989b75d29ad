"""Mismatching tensors in few lines, and their likely cause."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from splitlearn_core import SplitLearnError, TensorMismatchError, load_split_model
from splitlearn_core.plan.mismatch import folded, likely_cause

pytestmark = pytest.mark.libs


def test_lines_that_differ_in_the_layer_alone_are_one() -> None:
    """In the place of the first; a single one stays as it was."""
    lines = [
        *(f"unexpected: h.{number}.extra (as transformer.h.{number}.extra)" for number in (0, 1, 2, 10)),
        "missing: transformer.wte.weight [100, 32] (bottom)",
        *(f"missing: every tensor of layer {number}" for number in (3, 4)),
        "mis-shaped: model.layers.5.mlp.up.weight is [5, 7] in the file, [7, 5] by config.json (trunk)",
        # Another shape is another fault.
        "mis-shaped: model.layers.6.mlp.up.weight is [5, 8] in the file, [7, 5] by config.json (trunk)",
    ]
    assert folded(lines) == [
        "unexpected: h.{0-2 and 10}.extra (as transformer.h.{0-2 and 10}.extra)",
        "missing: transformer.wte.weight [100, 32] (bottom)",
        "missing: every tensor of layer {3-4}",
        *lines[-2:],
    ]


@pytest.mark.parametrize(
    ("kinds", "named"),
    [
        (["mis-shaped"] * 3 + ["missing"], "other sizes than the weights"),
        (["missing", "unexpected"], "splitlearn plugins test llama"),
        (["missing"] * 2, "num_hidden_layers"),
        (["unexpected"] * 2, "architectures"),
        (["twice"], "belong together"),
    ],
)
def test_the_cause_depends_on_the_faults(kinds: list[str], named: str) -> None:
    """Where to look is not the same for each kind of fault."""
    assert named in likely_cause([f"{kind}: x" for kind in kinds], "llama", "lm_head")


@pytest.mark.usefixtures("llama")
def test_a_config_of_other_sizes(single: Path, edit_json: Any) -> None:
    """All layers are wrong in the same way: a few lines, and the hint is about sizes."""
    edit_json(single / "config.json", intermediate_size=40)

    with pytest.raises(TensorMismatchError) as caught:
        load_split_model("llama", (2, 4), single)

    message, hint = caught.value.message, caught.value.hint
    assert "18 are wrong" in message
    # Each part names its own layers.
    assert "mlp.up_proj.weight is [48, 32] in the file, [40, 32] by config.json (trunk)" in message
    assert len(message.splitlines()) == 1 + 9
    assert "model.layers.{0-1}.mlp.up_proj.weight" in message
    assert "other sizes" in hint


@pytest.mark.usefixtures("llama")
def test_a_model_of_nan_cannot_be_compared(single: Path, cli: Any) -> None:
    """NaN equals nothing, itself included: that is no difference between split and unsplit."""
    tensors = load_file(single / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], float("nan"))
    save_file(tensors, single / "model.safetensors", metadata={"format": "pt"})

    cuts = ("--split", "2", "4")
    code, out, err = cli("verify", single, *cuts)

    assert (code, out) == (1, "")
    assert "computes NaN" in err
    assert err.endswith("hint: its weights contain values that are not numbers\n")
    assert "or float16 is too narrow: try --dtype float32" in cli("verify", single, *cuts, "--dtype", "float16")[2]


def test_what_fails_in_transformers_while_text_is_made(
    single: Path, llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is named as that; a closed pipe where the text goes is not."""
    from splitlearn_core import SplitCausalLM
    from splitlearn_core.generation import generate_text

    parts = load_split_model("llama", (2, 4), single)
    model = SplitCausalLM(parts.bottom, parts.trunk, parts.top)

    def fail(error: Exception) -> None:
        def generate(**_: Any) -> None:
            raise error

        monkeypatch.setattr(model, "generate", generate)

    class Tokenizer:
        pad_token_id = 0

        def __call__(self, _: str, return_tensors: str) -> Any:
            from transformers import BatchEncoding

            ids = torch.tensor([[5, 6]])
            return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    fail(KeyError("rope_theta"))
    with pytest.raises(SplitLearnError, match="fails in transformers: KeyError: 'rope_theta'") as caught:
        generate_text(model, Tokenizer(), "x", 2)
    assert "splitlearn verify" in caught.value.hint

    fail(BrokenPipeError())
    with pytest.raises(BrokenPipeError):
        generate_text(model, Tokenizer(), "x", 2)


@pytest.mark.usefixtures("llama")
def test_a_tokenizer_that_is_none(single: Path, cli: Any) -> None:
    """transformers' words in one error, and no traceback."""
    (single / "tokenizer.json").write_text("{")

    code, out, err = cli("generate", single, "--split", "2", "4", "--prompt", "x")

    assert (code, out) == (1, "")
    assert f"error: transformers cannot use the tokenizer of {single}" in err
    assert "Traceback" not in err


@pytest.mark.usefixtures("llama")
def test_a_missing_head_may_be_the_embedding(tied: Path, edit_json: Any, cli: Any) -> None:
    """Plan and load alike; with what the hint says, the load is as it should be."""
    edit_json(tied / "config.json", tie_word_embeddings=False)

    code, out, err = cli("plan", tied, "--split", "2", "4")
    with pytest.raises(TensorMismatchError, match=r"missing: lm_head\.weight") as caught:
        load_split_model(None, (2, 4), tied)

    assert (code, out) == (1, "")
    assert "missing: lm_head.weight" in err
    assert '"tie_word_embeddings": true' in err
    assert '"tie_word_embeddings": true' in caught.value.hint
    edit_json(tied / "config.json", tie_word_embeddings=True)
    top = load_split_model(None, (2, 4), tied, parts=("top",)).top
    whole = AutoModelForCausalLM.from_pretrained(tied)
    assert torch.equal(top.lm_head.weight, whole.lm_head.weight)
