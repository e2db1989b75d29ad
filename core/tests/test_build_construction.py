"""Components as pickles and deep copies, and state dicts whose tensors are assigned: ties stay, values are exact."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from splitlearn_core import ConfigurationError, ModelFamily, SplitCausalLM, load_split_model
from splitlearn_core.build.construction import component_class
from splitlearn_core.types import Component

pytestmark = pytest.mark.libs

IDS = torch.tensor([[5, 17, 42, 9, 3], [1, 2, 3, 4, 5]])


def through_torch(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def through_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


ROUND_TRIPS = pytest.mark.parametrize("trip", [through_torch, through_pickle, copy.deepcopy])


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


@ROUND_TRIPS
@pytest.mark.parametrize("strategy", ["mapped", "copied"])
def test_a_split_model_is_the_same_after_a_round_trip(
    llama: Any, tied: Path, tied_whole: Any, trip: Callable[[Any], Any], strategy: str
) -> None:
    split = SplitCausalLM(*load_split_model("llama", (2, 4), tied, strategy=strategy))
    again = trip(split)
    assert torch.equal(logits_of(again), logits_of(tied_whole))
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert again.get_input_embeddings().weight is not split.get_input_embeddings().weight
    assert [part.origin for part in again.components] == [part.origin for part in split.components]
    generated = again.generate(IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(generated, tied_whole.generate(IDS, max_new_tokens=4, do_sample=False))


@ROUND_TRIPS
@pytest.mark.parametrize("part", list(Component))
def test_a_component_is_of_the_same_class_after_a_round_trip(
    llama: Any, single: Path, trip: Callable[[Any], Any], part: Component
) -> None:
    component: Any = getattr(load_split_model("llama", (2, 4), single, parts=(part,)), part)
    component.train()
    again = trip(component)
    assert type(again) is type(component)
    assert again.training
    assert again.layer_range == component.layer_range
    assert again.state_dict().keys() == component.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], value) for name, value in component.state_dict().items())
    buffers = dict(component.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in again.named_buffers())


def test_another_process_opens_a_pickled_component(llama: Any, single: Path, tmp_path: Path) -> None:
    """There the class is made again by the installed plugin, which the pickle names."""
    trunk: Any = load_split_model("llama", (2, 4), single, parts=("trunk",)).trunk
    torch.save(trunk, tmp_path / "trunk.pt")
    code = (
        "import sys, torch\n"
        "trunk = torch.load(sys.argv[1], weights_only=False)\n"
        "trunk(hidden_states=torch.zeros(1, 2, trunk.config.hidden_size))\n"
        "held = dict(trunk.named_parameters()) | dict(trunk.named_buffers())\n"
        "torch.save({name: tensor.detach() for name, tensor in held.items()}, sys.argv[2])\n"
    )
    done = llama.warm_python("-c", code, str(tmp_path / "trunk.pt"), str(tmp_path / "held.pt"))
    assert done.returncode == 0, done.stderr
    held, own = torch.load(tmp_path / "held.pt"), dict(trunk.named_parameters()) | dict(trunk.named_buffers())
    assert held.keys() == own.keys()
    assert all(torch.equal(held[name], own[name]) for name in own)


def test_a_component_of_no_installed_family_names_what_saves_it(llama: Any, tied_whole: Any) -> None:
    family = ModelFamily(model_type="llama", architecture="LlamaForCausalLM")
    made = component_class(family, Component.TRUNK)
    trunk = made.from_pretrained_split(tied_whole.state_dict(), tied_whole.config, 2, 4)
    with pytest.raises(ConfigurationError, match="save_split"):
        pickle.dumps(trunk)
    hidden = torch.randn(1, 2, trunk.config.hidden_size)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(trunk)(hidden_states=hidden), trunk(hidden_states=hidden))


def test_assigned_values_keep_embedding_and_head_one_parameter(llama: Any, tied: Path, tied_whole: Any) -> None:
    """As in the unsplit model once its weights are tied again; what runs on a probe of the weights follows."""
    split = SplitCausalLM(*load_split_model("llama", (2, 4), tied))
    state = {name: value.double() * 2 for name, value in split.state_dict().items()}
    split.load_state_dict(state, assign=True)
    unsplit = copy.deepcopy(tied_whole)
    unsplit.load_state_dict({name: value.double() * 2 for name, value in unsplit.state_dict().items()}, assign=True)
    unsplit.tie_weights()
    assert split.get_output_embeddings().weight is split.get_input_embeddings().weight
    assert torch.equal(logits_of(split), logits_of(unsplit))
    assert logits_of(split).dtype == torch.float64


def test_no_end_alone_is_assigned_what_both_hold(llama: Any, tied: Path) -> None:
    parts: Any = load_split_model("llama", (2, 4), tied)
    state = {name: value * 2 for name, value in parts.top.state_dict().items()}
    before = parts.bottom.get_input_embeddings().weight.clone()
    with pytest.raises(ConfigurationError, match=r"lm_head\.weight.*\n.*leave assign out"):
        parts.top.load_state_dict(state, assign=True)
    assert torch.equal(parts.bottom.get_input_embeddings().weight, before)
    # A trunk shares nothing, and an end that was loaded alone neither.
    parts.trunk.load_state_dict({name: value * 2 for name, value in parts.trunk.state_dict().items()}, assign=True)
    alone: Any = load_split_model("llama", (2, 4), tied, parts=("top",)).top
    alone.load_state_dict(state, assign=True)
    assert torch.equal(alone.lm_head.weight, state["lm_head.weight"])
