"""What the scaffold finds out of the types that this repository has plugins for is what the plugins say."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any

import pytest

from splitlearn_auto.examining import examine
from splitlearn_core import ModelFamily
from splitlearn_core.plugins.registry import registry

#: What no model tells: where to find one, what files of long ago carry, how a plugin's own tests go.
NOT_DERIVED = {"default_model", "bundled_checkpoint", "ignored_suffixes", "tiny_config"}


@pytest.mark.sample(2)
@pytest.mark.parametrize("model_type", ["gpt2", "qwen2", "gemma", "gemma2", "gemma3_text"])
def test_the_scaffold_says_what_the_plugin_says(model_type: str) -> None:
    """Field for field."""
    derived = examine(model_type, {})
    assert derived.questions == []
    family = registry().family(model_type)
    compared = 0
    for field in fields(ModelFamily):
        if field.name not in NOT_DERIVED:
            found = derived.fields[field.name] if field.name in derived.fields else default(field)
            assert found == getattr(family, field.name), field.name
            compared += 1
    assert compared > 10


def default(field: Any) -> Any:
    return field.default if field.default is not MISSING else field.default_factory()
