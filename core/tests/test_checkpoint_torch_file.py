"""Checkpoints in ``.bin`` files: what they hold is read as transformers reads it, and nothing in them is run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from splitlearn_core import CheckpointError, ConfigurationError, InvalidCheckpointError, load_split_model, plan_split

CUTS = (2, 4)
BIN = "pytorch_model.bin"
INDEX = "pytorch_model.bin.index.json"

pytestmark = [pytest.mark.libs, pytest.mark.usefixtures("llama")]


def save_bin(folder: Path, state: dict[str, Any], **options: Any) -> Path:
    """Replace the weights of a checkpoint by one ``.bin`` file."""
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    torch.save(state, folder / BIN, **options)
    return folder


def save_shards(folder: Path, state: dict[str, Any]) -> Path:
    """Replace the weights of a checkpoint by a ``.bin`` shard for each layer, and one for the rest."""
    shards: dict[str, dict[str, Any]] = {}
    for key, tensor in state.items():
        number = key.split(".")[2] if ".layers." in key else "rest"
        shards.setdefault(f"pytorch_model-{number}.bin", {})[key] = tensor
    save_bin(folder, {"unused": torch.zeros(1)})
    (folder / BIN).unlink()
    for name, part in shards.items():
        torch.save(part, folder / name)
    weight_map = {key: name for name, part in shards.items() for key in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("strategy", ["auto", "incremental"])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_a_bin_file_gives_the_tensors_that_transformers_reads(
    single: Path, whole: Any, zipped: bool, dtype: str, strategy: str
) -> None:
    """All of them, in every format that torch has written."""
    save_bin(single, whole.state_dict(), _use_new_zipfile_serialization=zipped)
    expected = AutoModelForCausalLM.from_pretrained(single, dtype=dtype, use_safetensors=False).state_dict()

    parts = load_split_model("llama", CUTS, single, dtype=dtype, strategy=strategy)

    found = {name: tensor for part in parts for name, tensor in part.state_dict().items()}
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name])


def test_only_the_shards_of_the_part_are_needed(single: Path, whole: Any) -> None:
    """The others may be missing."""
    save_shards(single, whole.state_dict())
    for number in (0, 1, 4, 5, "rest"):
        (single / f"pytorch_model-{number}.bin").unlink()

    trunk = load_split_model("llama", CUTS, single, parts=["trunk"]).trunk

    for name, tensor in trunk.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(tensor, whole.state_dict()[name])


def test_a_bin_file_is_planned_without_its_weights(single: Path, whole: Any) -> None:
    """From what its pickle says of them; the plan is that of the same weights in safetensors."""
    before = plan_split(single, CUTS)

    after = plan_split(save_bin(single, whole.state_dict()), CUTS)

    assert (after.source, after.dtype, after.nbytes, after.parameters) == (
        "headers",
        before.dtype,
        before.nbytes,
        before.parameters,
    )
    assert after.shards == (BIN,)


def test_nothing_of_a_bin_file_stays_open(single: Path, whole: Any) -> None:
    """A component is in memory of its own, so the file may be changed or deleted."""
    save_bin(single, whole.state_dict())
    trunk = load_split_model("llama", CUTS, single, parts=["trunk"]).trunk

    (single / BIN).write_bytes(b"gone")

    for name, tensor in trunk.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(tensor, whole.state_dict()[name])


def test_a_tie_in_a_bin_file_is_kept(single: Path, tied_whole: Any, edit_json: Callable[..., None]) -> None:
    """There the embedding stands under both of its names, which share their memory."""
    edit_json(single / "config.json", tie_word_embeddings=True)
    state = tied_whole.state_dict()
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
    save_bin(single, state)

    bottom, _, top = load_split_model("llama", CUTS, single)

    assert bottom is not None
    assert top is not None
    assert top.get_parameter("lm_head.weight") is bottom.get_parameter("model.embed_tokens.weight")
    assert torch.equal(top.get_parameter("lm_head.weight"), state["lm_head.weight"])


class Trap:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


class BlockedTrap(Trap):
    """By a function of the system, which torch refuses in other words."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.path}",))


@pytest.mark.parametrize("kind", [Trap, BlockedTrap])
@pytest.mark.parametrize("action", [plan_split, lambda folder, cuts: load_split_model("llama", cuts, folder)])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_code_in_a_bin_file_is_not_run(
    single: Path, whole: Any, tmp_path: Path, action: Callable[..., Any], zipped: bool, kind: type[Trap]
) -> None:
    """The file is refused, and what it would have done was not done."""
    trace = tmp_path / "trace"
    save_bin(single, {**whole.state_dict(), "trap": kind(trace)}, _use_new_zipfile_serialization=zipped)

    with pytest.raises(CheckpointError, match="could run code") as caught:
        action(single, CUTS)

    assert "safetensors" in caught.value.hint
    # Torch's own words say how to run the code after all.
    assert "weights_only" not in str(caught.value)
    assert "safe_globals" not in str(caught.value)
    assert not trace.exists()


def test_tensors_keep_their_order_in_memory(single: Path, whole: Any) -> None:
    """Kernels round by it; transformers has a transposed tensor transposed."""
    state = {name: value.T.contiguous().T if value.ndim > 1 else value for name, value in whole.state_dict().items()}
    save_bin(single, state)

    trunk = load_split_model("llama", CUTS, single, parts=["trunk"]).trunk

    assert trunk is not None
    name = "model.layers.2.mlp.up_proj.weight"
    assert trunk.get_parameter(name).stride() == state[name].stride()
    assert torch.equal(trunk.get_parameter(name), state[name])


@pytest.mark.parametrize(
    ("saved", "named"),
    [
        ([1, 2], "list"),
        ({}, "empty"),
        ({"model.norm.weight": 3}, "int"),
        ({"model.norm.weight": torch.zeros(2, 2).to_sparse()}, "sparse"),
        ({"state_dict": {"model.norm.weight": torch.zeros(2)}}, "state_dict"),
    ],
    ids=["a list", "nothing", "a number", "a sparse tensor", "nested"],
)
def test_a_bin_file_that_is_no_state_dict_is_refused(single: Path, saved: Any, named: str) -> None:
    """The entries that are in the way are named."""
    save_bin(single, saved)

    with pytest.raises(InvalidCheckpointError, match=named) as caught:
        plan_split(single, CUTS)

    assert caught.value.hint


@pytest.mark.parametrize("kept", [0, 3, 100, 20_000])
def test_a_truncated_bin_file_is_refused(single: Path, whole: Any, kept: int) -> None:
    """Wherever it ends."""
    save_bin(single, whole.state_dict())
    content = (single / BIN).read_bytes()
    (single / BIN).write_bytes(content[:kept])

    with pytest.raises(InvalidCheckpointError, match=BIN) as caught:
        load_split_model("llama", CUTS, single)

    assert caught.value.hint


@pytest.mark.parametrize("shard", ["../x.bin", "/etc/x.bin", "model.safetensors", "x\0.bin", "a/b.bin"])
def test_an_index_names_bin_files_of_its_own_folder_alone(single: Path, whole: Any, shard: str) -> None:
    """As with safetensors."""
    save_shards(single, whole.state_dict())
    index = json.loads((single / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = shard
    (single / INDEX).write_text(json.dumps(index))

    with pytest.raises(InvalidCheckpointError, match="own folder"):
        plan_split(single, CUTS)


def test_mapping_a_bin_file_is_refused_with_the_way_out(single: Path, whole: Any) -> None:
    """Only safetensors can be mapped."""
    save_bin(single, whole.state_dict())

    with pytest.raises(ConfigurationError, match="not pytorch") as caught:
        load_split_model("llama", CUTS, single, strategy="mapped")

    assert caught.value.hint
