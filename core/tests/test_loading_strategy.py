"""Weight readers: what a strategy adds to read files that core cannot describe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from splitlearn_core import CheckpointError, MissingFileError, load_split_model, plan_split

CUTS = (2, 4)

#: A strategy that reads safetensors under another name and in another order of bytes.
READER = '''
import json

from splitlearn_core.types import TensorInfo


class Reversed:
    """Reads what save_reversed of the tests wrote."""

    name = format = "reversed"
    suffixes = (".rev",)

    def refusal(self, plan):
        return "" if plan.formats() == {"reversed"} else "it reads reversed files alone"

    def anonymous_bytes(self, plan):
        return plan.nbytes

    def tensors(self, path, config):
        import torch

        return {
            key: TensorInfo(key, "F32", tuple(value.shape), path.name, 0, value.nbytes, "reversed")
            for key, value in torch.load(path).items()
            if key != "config"
        }

    def config(self, path):
        import torch

        return json.loads(torch.load(path)["config"])

    def read(self, plan):
        import torch

        for shard, tensors in plan.by_shard().items():
            state = torch.load(plan.paths[shard])
            for planned in tensors:
                yield planned, state[planned.info.key].flip(0).to(getattr(torch, plan.dtype))


@hookimpl
def splitlearn_loading_strategies():
    return [Reversed()]
'''


@pytest.fixture
def reversed_model(world: Any, single: Path, whole: Any) -> Path:
    """Return a checkpoint in a format that a plugin alone knows."""
    world.install("llama", world.source("llama") + READER)
    state: dict[str, Any] = {key: tensor.flip(0) for key, tensor in whole.state_dict().items()}
    (single / "model.safetensors").unlink()
    torch.save({**state, "config": (single / "config.json").read_text()}, single / "weights.rev")
    return single


def check(parts: Any, whole: Any) -> None:
    for part in parts:
        for name, tensor in part.state_dict().items():
            assert torch.equal(tensor, whole.state_dict()[name])


def test_a_format_that_an_added_strategy_reads_is_planned_and_loaded(reversed_model: Path, whole: Any) -> None:
    """Without its being named: nothing else can read the files."""
    plan = plan_split(reversed_model, CUTS)

    assert (plan.source, plan.shards) == ("headers", ("weights.rev",))
    check(load_split_model("llama", CUTS, reversed_model), whole)


def test_weights_that_core_knows_come_first(reversed_model: Path, whole: Any) -> None:
    """A plugin's reader is not called if core can read the files."""
    torch.save(whole.state_dict(), reversed_model / "pytorch_model.bin")

    assert plan_split(reversed_model, CUTS).shards == ("pytorch_model.bin",)


def test_two_such_files_are_refused(reversed_model: Path) -> None:
    """Each may be a model of its own, and both are named."""
    (reversed_model / "other.rev").touch()

    with pytest.raises(CheckpointError, match=r"other\.rev, weights\.rev") as caught:
        plan_split(reversed_model, CUTS)

    assert caught.value.hint


def test_a_file_without_a_reader_is_refused(reversed_model: Path) -> None:
    """Its folder is the way out."""
    (reversed_model / "notes.txt").touch()

    with pytest.raises(MissingFileError, match=r"notes\.txt is a file") as caught:
        plan_split(reversed_model / "notes.txt", CUTS)

    assert str(reversed_model) in caught.value.hint
