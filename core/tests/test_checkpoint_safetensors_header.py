"""The header of a safetensors file: a sound one is read as the safetensors library reads it, no other is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from splitlearn_core import InvalidCheckpointError
from splitlearn_core.checkpoint.safetensors_header import read_header

#: Two tensors of 8 and 4 bytes.
SOUND = {
    "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
    "b": {"dtype": "F16", "shape": [2, 1], "data_offsets": [8, 12]},
}


def raw(header: bytes, data: bytes = bytes(12)) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def file_of(header: Any, data: bytes = bytes(12)) -> bytes:
    return raw(json.dumps(header).encode(), data)


def changed(**values: Any) -> bytes:
    """Return a file whose tensor ``b`` differs from the sound one."""
    return file_of({**SOUND, "b": {**SOUND["b"], **values}})


@pytest.fixture
def shard(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(content: bytes) -> Path:
        path = tmp_path / "shard.safetensors"
        path.write_bytes(content)
        return path

    return write


def test_a_sound_header_says_where_each_tensor_is(shard: Callable[[bytes], Path]) -> None:
    """Offsets are counted from the start of the file."""
    path = shard(file_of({"__metadata__": {"format": "pt"}, **SOUND}))
    start = path.stat().st_size - 12

    infos = read_header(path)

    assert [(i.key, i.dtype, i.shape, i.shard, i.begin, i.end) for i in infos.values()] == [
        ("a", "F32", (2,), "shard.safetensors", start, start + 8),
        ("b", "F16", (2, 1), "shard.safetensors", start + 8, start + 12),
    ]


def test_a_cached_header_cannot_be_changed(shard: Callable[[bytes], Path]) -> None:
    """The same bytes are understood once; other bytes of the same path and length are other bytes."""
    path = shard(file_of(SOUND))
    read_header(path).clear()
    assert list(read_header(path)) == ["a", "b"]

    shard(file_of(SOUND).replace(b'"a"', b'"c"'))
    assert list(read_header(path)) == ["c", "b"]


def test_headers_agree_with_the_safetensors_library(tmp_path: Path) -> None:
    """Names, shapes and bytes of a file that the library wrote, odd shapes and dtypes included."""
    tensors = {
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False, True]),
        "numbers": torch.arange(5),
        "half": torch.randn(3, 5).to(torch.bfloat16),
        "näme with spaces": torch.randn(2, 2, 2, dtype=torch.float64),
        "small": torch.randn(4).to(torch.float8_e4m3fn),
    }
    path = tmp_path / "all.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    content = path.read_bytes()

    infos = read_header(path)

    assert infos.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert infos[name].shape == tuple(tensor.shape)
        assert content[infos[name].begin : infos[name].end] == bytes(
            tensor.contiguous().flatten().view(torch.uint8).tolist()
        )


def test_a_file_without_tensors_is_sound(shard: Callable[[bytes], Path]) -> None:
    """It just holds nothing."""
    assert read_header(shard(raw(b"{}", b""))) == {}


#: Files that are no safetensors files, and what the message names.
BAD = {
    "empty file": (b"", ["0 bytes"]),
    "shorter than a length": (b"\x01\x00\x00", ["3 bytes"]),
    "length alone": ((5).to_bytes(8, "little"), ["ends before its header"]),
    "header cut off": (file_of(SOUND)[:40], ["ends before its header"]),
    "length beyond the file": ((1 << 40).to_bytes(8, "little") + b"{}", ["ends before its header"]),
    "length of all ones": (b"\xff" * 8 + b"{}", ["ends before its header"]),
    "data cut off": (file_of(SOUND)[:-1], ["complete"]),
    "all data cut off": (file_of(SOUND, b""), ["complete"]),
    "an HTML page": (b"<!DOCTYPE html><html><body>Sign in</body></html>", ["it is an HTML page and not the weights"]),
    "a pointer of Git LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 130\n",
        ["it is a pointer of Git LFS and not the weights", "git lfs pull"],
    ),
    "header is no JSON": (raw(b"{nonsense}"), ["not valid JSON"]),
    "header is empty": (raw(b"", b""), ["not valid JSON"]),
    "header is not in UTF-8": (raw(b'{"\xff": 1}'), ["not valid JSON"]),
    "header is deeply nested": (raw(b"[" * 200_000, b""), ["not valid JSON"]),
    "header is a list": (file_of([SOUND]), ["list"]),
    "header is a number": (file_of(7), ["int"]),
    "entry is a number": (file_of({"b": 7}), ["b"]),
    "entry is a list": (file_of({"b": [1, 2, 3]}), ["b"]),
    "entry is null": (file_of({"b": None}), ["b"]),
    "no dtype": (file_of({"b": {"shape": [1], "data_offsets": [0, 4]}}), ["b", "dtype"]),
    "no shape": (file_of({"b": {"dtype": "F32", "data_offsets": [0, 4]}}), ["b", "shape"]),
    "no offsets": (file_of({"b": {"dtype": "F32", "shape": [1]}}), ["b", "data_offsets"]),
    "one offset": (changed(data_offsets=[8]), ["b", "data_offsets"]),
    "three offsets": (changed(data_offsets=[8, 10, 12]), ["b", "data_offsets"]),
    "offsets are a text": (changed(data_offsets="ab"), ["b"]),
    "offsets are fractions": (changed(data_offsets=[8.0, 12.0]), ["b", "offsets"]),
    "offsets are true": (changed(data_offsets=[True, 12]), ["b", "offsets"]),
    "offsets are negative": (changed(data_offsets=[-4, 0]), ["b", "-4"]),
    "offsets run backwards": (changed(data_offsets=[12, 8]), ["b"]),
    "shape is negative": (changed(shape=[-2, -1]), ["b", "-2"]),
    "shape is a number": (changed(shape=2), ["b"]),
    "shape is a text": (changed(shape="2"), ["b"]),
    "shape is a mapping": (changed(shape={}, data_offsets=[8, 10])[:-2], ["b"]),
    "shape is a fraction": (changed(shape=[0.5, 4]), ["b"]),
    "shape does not fit the offsets": (changed(shape=[3, 1]), ["b", "6 bytes", "span 4"]),
    "shape is huge": (changed(shape=[2**63, 2**63]), ["b"]),
    "dtype is unknown": (changed(dtype="F31"), ["b", "F31"]),
    "dtype in small letters": (changed(dtype="f16"), ["b", "f16"]),
    "dtype is a list": (changed(dtype=["F16"]), ["b", "dtype"]),
    "dtype is a mapping": (changed(dtype={}), ["b", "dtype"]),
    "dtype is null": (changed(dtype=None), ["b", "None"]),
    "tensors overlap": (changed(data_offsets=[4, 8]), ["b", "overlaps", "a"]),
    "tensors are the same bytes": (
        file_of({"a": SOUND["a"], "b": SOUND["a"]}, bytes(8)),
        ["overlaps"],
    ),
    "a gap before the first": (file_of({"b": SOUND["b"]}), ["b", "gap"]),
    "a gap between two": (changed(data_offsets=[10, 14])[:-12] + bytes(14), ["b", "gap", "a"]),
    "bytes behind the last": (file_of(SOUND, bytes(20)), ["8 bytes"]),
    "data without tensors": (raw(b"{}", b"xyz"), ["3 bytes"]),
    "overlap and trailing bytes": (
        file_of({"a": SOUND["a"], "b": {**SOUND["b"], "data_offsets": [4, 8]}}, bytes(12)),
        ["overlaps", "4 bytes"],
    ),
}


@pytest.mark.parametrize(("content", "named"), BAD.values(), ids=list(BAD))
def test_a_bad_file_is_refused(shard: Callable[[bytes], Path], content: bytes, named: list[str]) -> None:
    """The error is a ValueError of ours that names the file, the tensor and what is wrong, with a hint."""
    path = shard(content)

    with pytest.raises(InvalidCheckpointError) as caught:
        read_header(path)

    assert isinstance(caught.value, ValueError)
    assert "shard.safetensors" in caught.value.message
    for text in named:
        assert text in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize("content", [content for content, _ in BAD.values()], ids=list(BAD))
def test_the_library_refuses_them_too(shard: Callable[[bytes], Path], content: bytes) -> None:
    """No file is refused that the safetensors library would read."""
    with pytest.raises(SafetensorError), safe_open(shard(content), framework="pt"):
        pass


def test_every_truncation_is_refused(shard: Callable[[bytes], Path]) -> None:
    """A file cut off at any byte is an error, wherever the cut is."""
    content = file_of(SOUND)

    for size in range(len(content)):
        with pytest.raises(InvalidCheckpointError):
            read_header(shard(content[:size]))


def test_a_header_over_the_limit_is_not_read(tmp_path: Path) -> None:
    """The limit of the safetensors library holds; the file is sparse."""
    path = tmp_path / "shard.safetensors"
    with path.open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(100_000_100)

    with pytest.raises(InvalidCheckpointError, match="100000001 bytes long"):
        read_header(path)


def test_many_faults_are_listed_and_counted(shard: Callable[[bytes], Path]) -> None:
    """A message shows some contradictions and says how many more there are."""
    header = {f"t{i:02}": {"dtype": "F32", "shape": [1], "data_offsets": [i * 8, i * 8 + 4]} for i in range(20)}
    path = shard(file_of(header, bytes(156)))

    with pytest.raises(InvalidCheckpointError, match="and 11 more") as caught:
        read_header(path)

    assert "t01" in caught.value.message


def test_entry_faults_of_several_tensors_are_listed(shard: Callable[[bytes], Path]) -> None:
    """Two tensors with bad entries are both named."""
    header = {name: {**entry, "dtype": "F31"} for name, entry in SOUND.items()}

    with pytest.raises(InvalidCheckpointError) as caught:
        read_header(shard(file_of(header)))

    assert "a: dtype" in caught.value.message
    assert "b: dtype" in caught.value.message
