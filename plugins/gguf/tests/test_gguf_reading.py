"""What a component costs: its own bytes of the file, its own memory, and a load that can be watched and stopped."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from splitlearn_core import (
    InvalidCheckpointError,
    PlannedTensor,
    ReadPlan,
    load_component,
    load_split_model,
    plan_split,
    save_split,
)
from splitlearn_gguf import splitlearn_loading_strategies, strategy, values
from splitlearn_gguf.header import read_header

pytestmark = pytest.mark.libs

Write = Callable[..., Path]
(STRATEGY,) = splitlearn_loading_strategies()


def read_plan(path: Path, part: str = "trunk", dtype: str = "float32") -> ReadPlan:
    plan = plan_split(path, (1, 3), parts=(part,))
    return ReadPlan(plan.component(part).tensors, {path.name: path}, "cpu", dtype)


class Watched(io.FileIO):
    """A file that remembers which of its bytes were read."""

    spans: list[tuple[int, int]] = []

    def readinto(self, buffer: Any, /) -> int:
        begin = self.tell()
        count = super().readinto(buffer)
        self.spans.append((begin, begin + count))
        return count


def test_only_the_components_bytes_are_read(gguf_file: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte of its tensors once, in the order of the file, and no byte of another tensor."""
    path = gguf_file("gemma2", "Q8_0")
    plan = read_plan(path)
    monkeypatch.setattr(Watched, "spans", [])
    monkeypatch.setattr(strategy, "open_regular", lambda path, buffering: Watched(path))
    list(STRATEGY.read(plan))

    mine = {
        stored.name: stored
        for stored in read_header(path).tensors.values()
        if ".1." in stored.name or ".2." in stored.name
    }
    spans = [(begin, end) for begin, end in Watched.spans if end > begin]
    assert sorted(spans) == sorted((stored.begin, stored.end) for stored in mine.values())
    assert spans == sorted(spans)


@pytest.mark.parametrize("quantization", ["F32", "F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma2"])
def test_pieces_make_the_same_tensor(
    gguf_file: Write, monkeypatch: pytest.MonkeyPatch, model_type: str, quantization: str
) -> None:
    """However few rows are dequantised at a time."""
    plan = read_plan(gguf_file(model_type, quantization), dtype="bfloat16")
    whole = {planned.module_key: tensor for planned, tensor in STRATEGY.read(plan)}
    monkeypatch.setattr(values, "CHUNK_ELEMENTS", 300)

    for planned, tensor in STRATEGY.read(plan):
        assert torch.equal(tensor, whole[planned.module_key]), planned.module_key
        # The layout of transformers, on which the last bit of a product depends.
        assert tensor.is_contiguous() or (model_type == "gpt2" and tensor.T.is_contiguous())


def test_bytes_are_reported_as_they_are_read(gguf_file: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces that add up to the plan's bytes, which are those of the file."""
    path = gguf_file("llama", "Q4_0")
    monkeypatch.setattr(values, "CHUNK_ELEMENTS", 300)
    told: list[int] = []
    plan = replace(read_plan(path), on_bytes=told.append)
    stored = read_header(path).tensors.values()

    list(STRATEGY.read(plan))

    assert sum(told) == plan.nbytes == sum(one.nbytes for one in stored if ".1." in one.name or ".2." in one.name)
    assert len(told) > 2 * len(plan.tensors)


def test_a_load_stops_on_request(gguf_file: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``on_bytes`` raises comes through, in the middle of a tensor."""
    monkeypatch.setattr(values, "CHUNK_ELEMENTS", 300)
    told: list[int] = []

    def stop(nbytes: int) -> None:
        told.append(nbytes)
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(STRATEGY.read(replace(read_plan(gguf_file("llama")), on_bytes=stop)))
    assert len(told) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_memory_is_predicted(gguf_file: Write, dtype: str) -> None:
    """What is kept, to the byte, and the working memory of one piece on top."""
    plan = read_plan(gguf_file("llama", "Q8_0"), dtype=dtype)
    kept = sum(tensor.nbytes for _, tensor in STRATEGY.read(plan))
    largest = max(planned.elements for planned in plan.tensors)

    assert STRATEGY.anonymous_bytes(plan) == kept + largest * values.WORKING_BYTES


def test_a_file_that_was_exchanged_is_noticed(gguf_file: Write) -> None:
    """Between planning and reading: other sizes are named."""
    plan = read_plan(gguf_file("llama", "Q8_0"))
    gguf_file("llama", "Q4_0")

    with pytest.raises(InvalidCheckpointError, match="no longer the file that was planned"):
        list(STRATEGY.read(plan))


def test_a_file_that_shrinks_meanwhile_is_an_error(gguf_file: Write) -> None:
    """After its header was read: the tensor in which it ends is named."""
    path = gguf_file("llama", "Q8_0")
    reading = STRATEGY.read(read_plan(path))
    next(reading)
    with path.open("r+b") as file:
        file.truncate(max(stored.begin for stored in read_header(path).tensors.values()) // 2)

    with pytest.raises(InvalidCheckpointError, match="too early"):
        list(reading)


def test_tied_weights_are_one_tensor(gguf_file: Write) -> None:
    """A head that the file leaves out is the embedding, in memory too."""
    parts = load_split_model(None, (1, 3), gguf_file("gemma2", "Q8_0"))

    assert parts.bottom is not None
    assert parts.top is not None
    assert parts.bottom.get_input_embeddings().weight is parts.top.get_output_embeddings().weight


@pytest.mark.parametrize(("model_type", "offset"), [("gemma", 1), ("mistral", 0)])
def test_families_that_transformers_does_not_read_from_a_file_alone(
    gguf_file: Write, model: Callable[..., Any], model_type: str, offset: int
) -> None:
    """Held against the weights that went into the file, which float32 keeps but for the offset of norms."""
    path = gguf_file(model_type)
    original = model(model_type)
    if model_type == "mistral":
        # llama.cpp calls it a llama, so that only config.json says what it is.
        original.config.save_pretrained(path.parent)
    expected = {
        key: (tensor + offset) - offset if key.endswith("norm.weight") else tensor
        for key, tensor in original.state_dict().items()
    }

    for part in load_split_model(model_type, (1, 3), path):
        for key, tensor in part.state_dict().items():
            assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_components_are_saved_as_safetensors(gguf_file: Write, tmp_path: Path, model_type: str) -> None:
    """Dequantised once, and then as any other split."""
    path = gguf_file(model_type, "Q4_0")
    save_split(path, tmp_path / "split", (1, 3), dtype="float32")

    for name, part in load_split_model(None, (1, 3), path)._asdict().items():
        saved = load_component(tmp_path / "split", name).state_dict()
        for key, tensor in part.state_dict().items():
            assert torch.equal(tensor, saved[key]), key


def test_plans_are_planned_tensors(gguf_file: Write) -> None:
    """A plan of a part counts the file's bytes, and loads as float32 where nothing says otherwise."""
    plan = plan_split(gguf_file("llama", "Q4_0"), (1, 3))

    assert plan.dtype == "float32"
    assert all(isinstance(planned, PlannedTensor) for planned in plan.component("trunk").tensors)
    trunk = plan.component("trunk")
    assert trunk.nbytes < trunk.parameters * 0.7
    assert trunk.loaded_bytes("float32") == trunk.parameters * 4
