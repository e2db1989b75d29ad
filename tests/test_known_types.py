"""What errors say of model types that no plugin provides is true of the installed transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

from splitlearn_auto import new_plugin
from splitlearn_auto.findings import CannotSplitError
from splitlearn_core import UnknownModelTypeError, plan_split
from splitlearn_core.plugins.known import ENCODER_DECODERS, REFUSED, WRITTEN

pytestmark = pytest.mark.libs

#: Not of a family of its own, and quick to look at.
SAMPLE_REFUSED = ("cpmant", "dory", "rwkv", "recurrent_gemma")
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
