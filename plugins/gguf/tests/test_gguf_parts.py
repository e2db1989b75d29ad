"""Models in several GGUF files, as llama-gguf-split writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from splitlearn_core import (
    CheckpointError,
    InvalidCheckpointError,
    MissingFileError,
    load_split_model,
    plan_split,
)
from splitlearn_core.loading.opening import open_model
from splitlearn_core.loading.options import LoadOptions
from splitlearn_core.verification import load_unsplit
from splitlearn_gguf.header import header_length, read_header

pytestmark = pytest.mark.libs

POINTS = (1, 3)


def split_file(path: Path, folder: Path, parts: int = 3, first: int | None = None) -> list[Path]:
    """Split a file: all metadata in the first part, and in each its number, the count and the number of tensors.

    Args:
        path: The whole file.
        folder: The folder of the parts.
        parts: How many there are.
        first: The tensors of the first part; by default as many as in the others.
    """
    reader = gguf.GGUFReader(path)
    size = -(-len(reader.tensors) // parts) if first is None else -(-(len(reader.tensors) - first) // (parts - 1))
    bounds = [0, *(min(len(reader.tensors), (size if first is None else first) + size * n) for n in range(parts))]
    folder.mkdir(exist_ok=True)
    paths = []
    for number in range(parts):
        paths.append(folder / f"{path.stem}-{number + 1:05}-of-{parts:05}.gguf")
        writer = gguf.GGUFWriter(paths[-1], str(reader.fields["general.architecture"].contents()))
        if number:
            writer.kv_data[0].pop("general.architecture")
        for key, field in reader.fields.items() if not number else ():
            if not key.startswith("GGUF.") and key != "general.architecture":
                kind, *inner = field.types
                writer.add_key_value(key, field.contents(), kind, sub_type=inner[0] if inner else None)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", parts)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for stored in reader.tensors[bounds[number] : bounds[number + 1]]:
            writer.add_tensor(stored.name, stored.data, raw_dtype=stored.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def state_of(model: Path, **options: Any) -> dict[str, torch.Tensor]:
    parts = load_split_model(None, POINTS, model, **options)
    return {name: tensor for part in parts if part is not None for name, tensor in part.state_dict().items()}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("first", [None, 0])
def test_parts_are_the_model_of_the_one_file(
    gguf_file: Callable[..., Path], tmp_path: Path, model_type: str, first: int | None
) -> None:
    """Named by any of them, or by their folder; the first may hold no tensors, as llama-gguf-split can write it."""
    path = gguf_file(model_type, "Q8_0")
    expected, plan = state_of(path), plan_split(path, POINTS)
    paths = split_file(path, tmp_path / "parts", first=first)

    for name in (paths[0], paths[2], paths[0].parent):
        assert equal(state_of(name), expected)
    planned = plan_split(paths[0], POINTS)
    assert (planned.nbytes, planned.parameters) == (plan.nbytes, plan.parameters)
    assert len(planned.shards) == (3 if first is None else 2)
    with pytest.raises(CheckpointError, match="reads no model in 3 gguf files"):
        load_unsplit(open_model(paths[0]), "float32", LoadOptions())


def test_a_component_opens_the_files_that_hold_it(gguf_file: Callable[..., Path], tmp_path: Path) -> None:
    """And the first, for its metadata; of the others the headers are enough."""
    path = gguf_file("llama")
    paths = split_file(path, tmp_path / "parts", parts=4)
    expected = state_of(path, parts=("top",))
    needed = plan_split(paths[0], POINTS, parts=("top",)).shards
    for other in paths:
        if other.name not in needed:
            with other.open("r+b") as file:
                file.seek(read_header(other).data)
                file.write(b"\xff" * (other.stat().st_size - file.tell()))

    assert len(needed) < len(paths)
    assert equal(state_of(paths[0], parts=("top",)), expected)


def test_a_part_that_is_missing_or_of_another_model(gguf_file: Callable[..., Path], tmp_path: Path) -> None:
    """Said before weights are read."""
    paths = split_file(gguf_file("llama"), tmp_path / "parts")
    content = paths[1].read_bytes()

    paths[1].unlink()
    with pytest.raises(MissingFileError, match=paths[1].name):
        plan_split(paths[0], POINTS)

    paths[1].write_bytes(paths[2].read_bytes())
    with pytest.raises(InvalidCheckpointError, match=r"part 3 of 3 .* another by its name") as caught:
        plan_split(paths[0], POINTS)
    assert "llama-gguf-split --merge" in caught.value.hint

    other = split_file(gguf_file("llama", name="other.gguf", num_hidden_layers=6), tmp_path / "other")
    paths[1].write_bytes(other[1].read_bytes())
    with pytest.raises(InvalidCheckpointError, match=r"tensors of a model of|is in .* and in"):
        load_split_model(None, POINTS, paths[0])

    paths[1].write_bytes(content)
    plan_split(paths[0], POINTS)


def test_the_length_of_a_header_of_which_only_a_beginning_is_there(gguf_file: Callable[..., Path]) -> None:
    """It is known as soon as its last byte is."""
    path = gguf_file("llama")
    data, size = read_header(path).data, path.stat().st_size
    lengths = [header_length(path, present) for present in (0, 4, 100, data // 2, data, size)]
    assert lengths == [None, None, None, None, data, data]
