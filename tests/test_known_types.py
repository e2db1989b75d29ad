"""What errors say of model types that no plugin provides is true of the installed transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

from splitlearn_auto import new_plugin
from splitlearn_auto.findings import CannotSplitError
from splitlearn_core import SplitCausalLM, SplitLearnError, UnknownModelTypeError, load_split_model, plan_split
from splitlearn_core.plugins.known import ENCODER_DECODERS, REFUSED, WRITTEN
from splitlearn_core.testing.worlds import write_checkpoint

pytestmark = pytest.mark.libs

IDS = torch.tensor([[5, 17, 42, 99, 3]])
#: Not of a family of its own, and quick to look at.
SAMPLE_REFUSED = ("bert", "bart", "gemma3n", "rwkv", "recurrent_gemma", "zamba")
SAMPLE_WRITTEN = ("llama", "phi", "olmo2", "mixtral", "qwen2_moe", "deepseek_v3")


@pytest.fixture(autouse=True)
def without_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the plugin that would examine these types."""
    monkeypatch.setenv("SPLITLEARN_DISABLE_PLUGINS", "splitlearn-auto")


@pytest.mark.parametrize("model_type", SAMPLE_REFUSED)
def test_what_is_said_to_be_refused_is(model_type: str) -> None:
    assert model_type in REFUSED
    with pytest.raises(CannotSplitError):
        new_plugin(model_type, None, dry_run=True)


@pytest.mark.parametrize("model_type", sorted(ENCODER_DECODERS))
def test_what_is_said_to_have_an_encoder_has_one(model_type: str, tmp_path: Path) -> None:
    """And the class that is named loads it; no command is named, for each would refuse it."""
    if model_type not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"this transformers knows no {model_type}")
    assert model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    with pytest.raises(CannotSplitError):
        new_plugin(model_type, None, dry_run=True)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(UnknownModelTypeError) as caught:
        plan_split(tmp_path, (2, 4))
    assert "only causal decoders" in caught.value.hint
    assert "AutoModelForSeq2SeqLM" in caught.value.hint
    assert "splitlearn " not in caught.value.hint


def test_an_unknown_type_that_says_it_has_an_encoder(tmp_path: Path) -> None:
    """What config.json says of it is enough."""
    (tmp_path / "config.json").write_text('{"model_type": "t9", "is_encoder_decoder": true}')
    with pytest.raises(UnknownModelTypeError, match="'t9'") as caught:
        plan_split(tmp_path, (2, 4))
    assert "only causal decoders" in caught.value.hint


@pytest.mark.slow
@pytest.mark.sample(1)
@pytest.mark.parametrize("model_type", SAMPLE_WRITTEN)
def test_what_is_proposed_is_written(model_type: str) -> None:
    assert model_type in WRITTEN
    assert new_plugin(model_type, None, dry_run=True).verified


@pytest.fixture
def gemma3(tmp_path: Path) -> tuple[Path, Any]:
    """Return the folder of a random gemma3 and the model: images besides, and tied embeddings."""
    text = {"vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 6, "head_dim": 8}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "sliding_window": 5, "query_pre_attn_scalar": 8}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config={**text, **heads, "max_position_embeddings": 96},
        vision_config={**vision, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=290,
    )
    torch.manual_seed(0)
    model: Any = Gemma3ForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.15)
    return write_checkpoint(tmp_path / "gemma3", model), model


def test_the_lines_for_gemma3_save_what_can_be_split(gemma3: tuple[Path, Any], tmp_path: Path) -> None:
    """As they stand in the error; the split model then says what the model with images says of a text."""
    folder, whole = gemma3
    with pytest.raises(UnknownModelTypeError) as caught:
        plan_split(folder, (2, 4))
    _, *lines = caught.value.hint.splitlines()
    exec("\n".join(lines), {"MODEL": str(folder), "DIR": str(tmp_path / "text")})  # our own lines
    with torch.no_grad():
        expected = whole(input_ids=IDS).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "text")(input_ids=IDS).logits, expected)
        split = SplitCausalLM(*load_split_model(None, (2, 4), tmp_path / "text"))
        assert torch.equal(split(input_ids=IDS).logits, expected)


def test_gemma3_leads_in_no_circle(gemma3: tuple[Path, Any], tmp_path: Path) -> None:
    """Following the advice of an error does not lead back to it."""
    folder, _ = gemma3
    for attempt in (
        lambda: plan_split(folder, (2, 4)),
        lambda: plan_split(folder, (2, 4), model_type="gemma3_text"),
        lambda: new_plugin("gemma3", tmp_path / "new"),
        lambda: new_plugin("gemma3_text", tmp_path / "new", origin=str(folder), force=True),
    ):
        with pytest.raises(SplitLearnError) as caught:
            attempt()
        assert "save_pretrained(" in caught.value.hint
        assert "plugins new" not in caught.value.hint
