"""Every value of the metadata that changes numbers is used or refused; measured by llama.cpp's own list of keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf.constants import Keys

from splitlearn_core import CheckpointError, InvalidCheckpointError, SplitCausalLM, load_split_model, plan_split
from splitlearn_gguf.architectures import ARCHITECTURES
from splitlearn_gguf.metadata import RULES, Effect, listed_rule

IDS = torch.tensor([[5, 17, 42, 9, 3, 8, 64, 20], [1, 2, 3, 4, 5, 6, 7, 8]])

pytestmark = [pytest.mark.libs, pytest.mark.usefixtures("families")]


def listed_keys() -> Iterator[str]:
    for group in vars(Keys).values():
        if isinstance(group, type):
            yield from (v for k, v in vars(group).items() if isinstance(v, str) and not k.startswith("__"))


@pytest.mark.parametrize("key", sorted(set(listed_keys())))
def test_the_table_knows_every_key_of_llama_cpp(key: str) -> None:
    """A key that a new version adds has to be decided on."""
    assert listed_rule(key) is not None


def test_what_is_used_is_used_by_architectures_that_there_are() -> None:
    """A slip in a name would refuse a sound file."""
    for key, rule in RULES.items():
        assert rule.used_by <= ARCHITECTURES.keys(), key
        assert bool(rule.used_by) == (rule.effect is Effect.USED), key


@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma3_text"])
@pytest.mark.parametrize("key", sorted(k for k, r in RULES.items() if r.effect is Effect.REFUSED and "{" in k))
def test_a_value_that_cannot_be_honoured_is_refused(gguf_file: Callable[..., Path], model_type: str, key: str) -> None:
    """Whatever the architecture; the key is named, and the way out."""
    own = key.removeprefix("{arch}.")
    path = gguf_file(model_type, metadata={own: 37})

    with pytest.raises(CheckpointError, match=own.replace(".", r"\.")) as caught:
        plan_split(path, (1, 3))

    assert "config.json" in caught.value.hint


CAPS = {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 3.0}
#: Metadata -> what the model that it describes has in its configuration.
USED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "softcaps": ("gemma2", CAPS, CAPS),
    "no softcaps": ("gemma2", dict.fromkeys(CAPS, 0.0), dict.fromkeys(CAPS)),
    "final softcap": ("gemma3_text", {"final_logit_softcapping": 3.0}, {"final_logit_softcapping": 3.0}),
    "pattern": (
        "gemma3_text",
        {"attention.sliding_window_pattern": 2},
        {"layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "pattern of gemma2": (
        "gemma2",
        {"attention.sliding_window_pattern": 4, "attention.sliding_window": 2},
        {"layer_types": ["sliding_attention"] * 3 + ["full_attention"], "sliding_window": 2},
    ),
    "window": ("gemma2", {"attention.sliding_window": 3}, {"sliding_window": 3}),
    "scale": ("gemma3_text", {"attention.scale": 0.125}, {"query_pre_attn_scalar": 64}),
    "theta": ("llama", {"rope.freq_base": 500.0}, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "epsilon": ("qwen2", {"attention.layer_norm_rms_epsilon": 0.25}, {"rms_norm_eps": 0.25}),
    "epsilon of gpt2": ("gpt2", {"attention.layer_norm_epsilon": 0.25}, {"layer_norm_epsilon": 0.25}),
}


@pytest.mark.parametrize("kind", USED)
def test_a_value_that_is_used_changes_the_numbers(
    gguf_file: Callable[..., Path], model: Callable[..., Any], kind: str
) -> None:
    """The model with such a configuration is the measure: transformers itself drops some of these values."""
    model_type, metadata, config = USED[kind]
    path = gguf_file(model_type, metadata=metadata)
    plain = model(model_type)
    expected = type(plain)(type(plain.config)(**{**plain.config.to_dict(), **config})).eval()
    expected.load_state_dict(plain.state_dict())

    with torch.inference_mode():
        before, wanted = plain(IDS).logits, expected(IDS).logits
        got = SplitCausalLM(*load_split_model(None, (1, 3), path))(IDS).logits

    assert torch.allclose(got, wanted, atol=1e-5)
    assert not torch.allclose(before, wanted, atol=1e-4)


@pytest.mark.parametrize(
    "metadata",
    [{"attn_logit_softcapping": -1.0}, {"attn_logit_softcapping": float("nan")}, {"attention.scale": 0.3}],
    ids=str,
)
def test_a_value_that_is_none_is_refused(gguf_file: Callable[..., Path], metadata: dict[str, Any]) -> None:
    """Neither taken nor left out."""
    with pytest.raises(InvalidCheckpointError, match=next(iter(metadata)).replace(".", r"\.")):
        plan_split(gguf_file("gemma2", metadata=metadata), (1, 3))


@pytest.mark.parametrize(
    "metadata",
    [
        {"expert_count": 0},
        {"logit_scale": 1.0},
        {"attention.value_length": 16},
        {"rope.dimension_count": 16},
        {"rope.scaling.type": "none"},
        {"pooling_type": 3},
        {"tensor_data_layout": "Meta AI original pth"},
        {"attention.sliding_window": 100_000},
    ],
    ids=str,
)
def test_a_neutral_value_is_no_hindrance(
    gguf_file: Callable[..., Path], model: Callable[..., Any], metadata: dict[str, Any]
) -> None:
    """What says the same as nothing is read."""
    if set(metadata) & {"attention.value_length", "rope.dimension_count"}:
        metadata = dict.fromkeys(metadata, model("llama").config.head_dim)

    assert plan_split(gguf_file("llama", metadata=metadata), (1, 3)).num_layers == 4


def test_an_unknown_key_is_refused(gguf_file: Callable[..., Path]) -> None:
    """It may mean anything."""
    with pytest.raises(CheckpointError, match="twist"):
        plan_split(gguf_file("llama", metadata={"twist": 2.0}), (1, 3))


def test_attention_that_is_not_stated_is_a_warning(
    gguf_file: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """transformers and llama.cpp take different numbers where heads are not of the usual size."""
    plan_split(gguf_file("gemma2"), (1, 3))

    assert "how attention is scaled" in caplog.text
