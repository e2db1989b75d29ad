"""A Gemma 3 that also sees: its language model is split, equal in the whole, and nothing else is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from splitlearn_core import ConfigurationError, SplitCausalLM, load_split_model, plan_split
from splitlearn_core.testing.worlds import TINY, random_model, write_checkpoint

pytestmark = pytest.mark.libs

CUTS, SINGLE = (2, 4), "model.safetensors"
IDS = torch.tensor([[5, 17, 42, 9, 33]])
#: Two of the tokens belong to one image.
KINDS = torch.tensor([[0, 1, 1, 0, 0]])


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, Any]:
    """Return the folder of a random model, and the model."""
    vision = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14, "vision_use_head": False,
    }  # fmt: skip
    config = Gemma3Config(
        text_config={**TINY, "sliding_window": 4},  # type: ignore[arg-type]  # a mapping is one, too
        vision_config=vision,  # type: ignore[arg-type]  # a mapping is one, too
        mm_tokens_per_image=4,
        image_token_index=99,
    )
    model = random_model(Gemma3ForConditionalGeneration, config)
    return write_checkpoint(tmp_path / "gemma3", model), model


def split(folder: Path) -> Any:
    return SplitCausalLM(*load_split_model(None, CUTS, folder))  # type: ignore[arg-type]


@torch.no_grad()
def logits(model: Any, **arguments: Any) -> torch.Tensor:
    result: torch.Tensor = model(IDS, **arguments).logits
    return result


@torch.no_grad()
def generated(model: Any, ids: torch.Tensor = IDS, **arguments: Any) -> torch.Tensor:
    model.generation_config.eos_token_id = None
    result: torch.Tensor = model.generate(ids, do_sample=False, max_new_tokens=6, pad_token_id=0, **arguments)
    return result


def test_the_language_model_is_equal_in_the_whole(checkpoint: tuple[Path, Any]) -> None:
    """Its masks, too: tokens of one image see each other."""
    folder, whole = checkpoint
    parts = split(folder)
    assert torch.equal(logits(parts), logits(whole))
    assert torch.equal(generated(parts), generated(whole))
    assert torch.equal(logits(parts, token_type_ids=KINDS), logits(whole, token_type_ids=KINDS))
    assert not torch.equal(logits(parts, token_type_ids=KINDS), logits(parts))
    assert torch.equal(generated(parts, token_type_ids=KINDS), generated(whole, token_type_ids=KINDS))


def test_embeddings_that_stand_for_an_image(checkpoint: tuple[Path, Any]) -> None:
    """What the model for images has made is taken by the bottom, where transformers has an argument for it."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    folder, whole = checkpoint
    parts = split(folder)
    if "mm_encoder_outputs" not in parts.bottom.routing.bottom:
        pytest.skip("this transformers has no such argument")
    image = torch.randn(1, 2, 32, generator=torch.Generator().manual_seed(3))
    ids = IDS.masked_fill(KINDS.bool(), 99)
    made = {"image": BaseModelOutputWithPooling(pooler_output=image)}
    expected = generated(whole, ids, token_type_ids=KINDS, mm_encoder_outputs=dict(made))
    assert torch.equal(generated(parts, ids, token_type_ids=KINDS, mm_encoder_outputs=dict(made)), expected)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("language_model.model.", "model.language_model."),
        ("language_model.model.", "model.language_model.model."),
        ("language_model.model.", "language_model.model."),
    ],
    ids=["as in the module", "of transformers 5.4", "of all other versions"],
)
def test_all_names_in_files_are_known(checkpoint: tuple[Path, Any], old: str, new: str) -> None:
    """And no tensor of the other models is planned, or missed."""
    folder, whole = checkpoint
    tensors = {
        f"{new}{key.partition(old)[2]}" if old in key else key: value
        for key, value in load_file(folder / SINGLE).items()
        if "vision" not in key and "projector" not in key
    }
    (folder / SINGLE).unlink()
    save_file(tensors, folder / SINGLE, {"format": "pt"})
    assert plan_split(folder, CUTS).unexpected == ()
    assert torch.equal(logits(split(folder)), logits(whole))


def test_the_type_of_the_language_model_is_not_that_of_the_checkpoint(checkpoint: tuple[Path, Any]) -> None:
    with pytest.raises(ConfigurationError, match="'gemma3_text' was requested") as caught:
        load_split_model("gemma3_text", CUTS, checkpoint[0])
    assert "model_type='gemma3'" in caught.value.hint
