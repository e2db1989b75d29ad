"""The header of a safetensors file, checked before anything relies on it.

Format: 8 bytes little-endian length N, then N bytes of JSON, then the data. The JSON maps a
tensor's name to ``{"dtype", "shape", "data_offsets": [begin, end]}``, offsets counted from the end
of the header. The limits are those of the safetensors library.
"""

from __future__ import annotations

import json
import math
import os
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from splitlearn_core.checkpoint.files import open_regular
from splitlearn_core.errors import InvalidCheckpointError
from splitlearn_core.quoting import SENTENCE, listed, plain, reason
from splitlearn_core.types import DTYPE_BYTES, TensorInfo

#: Bytes of the number before the header.
LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
#: What a download may leave in place of weights: its first bytes, what it is, and how to get the weights.
_NOT_WEIGHTS = {
    b"version ": ("a pointer of Git LFS and not the weights", "git lfs pull, in the folder of the repository"),
    b"<!doctyp": ("an HTML page and not the weights", "download it again: the server answered with a page"),
    b"<html": ("an HTML page and not the weights", "download it again: the server answered with a page"),
}
#: The limits of a tensor of torch.
_MAX_DIMENSIONS, _MAX_NUMBER = 64, 2**63 - 1
#: Larger headers are not cached.
_MAX_CACHED_BYTES = 256 * 2**10


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read and check the header of a safetensors file; the data is not read.

    Raises:
        InvalidCheckpointError: The file is truncated or its header contradicts itself; all
            contradictions are listed.
    """
    with open_regular(path) as file:
        return header_of(path, file)


def header_of(path: Path, file: BinaryIO) -> dict[str, TensorInfo]:
    """Read and check the header of an open file, positioned at its start; see :func:`read_header`."""
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(LENGTH_BYTES)
    return parse_header(str(path), prefix + file.read(header_length(str(path), prefix, size)), size)


def header_length(where: str, prefix: bytes, size: int | None) -> int:
    """Return the length of the JSON that follows the first bytes of a file.

    Args:
        where: The file, for messages.
        prefix: Its first eight bytes, or more.
        size: Its size in bytes; None if unknown.

    Raises:
        InvalidCheckpointError: The file cannot hold such a header.
    """
    for beginning, (what, fix) in _NOT_WEIGHTS.items():
        if prefix.lower().startswith(beginning):
            raise _invalid(where, [f"it is {what}"], fix)
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    if len(prefix) < LENGTH_BYTES or (size is not None and length > size - LENGTH_BYTES):
        problem = f"the file of {len(prefix) if size is None else size} bytes ends before its header does"
        raise _invalid(where, [problem], "is the download complete?")
    if length > _MAX_HEADER_BYTES:
        raise _invalid(where, [f"its header is {length} bytes long; {_MAX_HEADER_BYTES} is the limit"])
    return length


def parse_header(where: str, content: bytes, size: int | None) -> dict[str, TensorInfo]:
    """Check the beginning of a safetensors file and return its tensors; see :func:`read_header`."""
    if len(content) > _MAX_CACHED_BYTES:
        return _parsed(where, content, size)
    return dict(_parsed_cached(where, content, size))


def _parsed(where: str, content: bytes, size: int | None) -> dict[str, TensorInfo]:
    length = header_length(where, content, size)
    try:
        # Decoded here: json would guess other encodings from the first bytes, and it accepts NaN as a number.
        text = content[LENGTH_BYTES : LENGTH_BYTES + length].decode("utf-8")
        header = json.loads(text, parse_constant=_refuse_constant)
        if "\\ud" in text.lower():  # perhaps a lone surrogate, which cannot be written to a message or file
            json.dumps(header, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise _invalid(where, [f"its header is not valid JSON: {reason(error)}"]) from error
    if not isinstance(header, dict):
        raise _invalid(where, [f"its header is a JSON {type(header).__name__}, not an object"])
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _invalid(where, ["its __metadata__ is not a mapping of strings to strings"])
    start = LENGTH_BYTES + length
    problems = [f"{plain(key)}: {problem}" for key, entry in header.items() if (problem := _entry_problem(entry))]
    if problems:
        raise _invalid(where, problems)
    shard = where.replace("\\", "/").rpartition("/")[2]
    return _check_layout(where, [_tensor(shard, key, entry, start) for key, entry in header.items()], start, size)


#: A header is parsed when a load is planned, and again when the file is read.
_parsed_cached = lru_cache(maxsize=64)(_parsed)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _entry_problem(entry: Any) -> str:
    """Return what is wrong with one tensor's entry in the header; empty if it is valid."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        return "its entry lacks dtype, shape or data_offsets"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        return f"dtype {plain(repr(dtype))} is unknown"
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:  # noqa: PLR2004  # a pair
        return "shape and data_offsets must be a list of sizes and a pair"
    return _size_problem(dtype, shape, offsets)


def _size_problem(dtype: str, shape: list[Any], offsets: list[Any]) -> str:
    """Return what is wrong with the sizes and offsets of one tensor; empty if they are valid."""
    # Checked before they are multiplied: the product of a million large numbers would take days.
    if len(shape) > _MAX_DIMENSIONS:
        return f"a shape of {len(shape)} dimensions; {_MAX_DIMENSIONS} is the limit"
    if any(type(number) is not int or not 0 <= number <= _MAX_NUMBER for number in (*shape, *offsets)):
        return f"shape {plain(str(shape))} and offsets {plain(str(offsets))} must be integers from 0"
    expected = math.prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != expected:
        sizes = f"takes {plain(str(expected))} bytes, its offsets span {offsets[1] - offsets[0]}"
        return f"{dtype} of shape {plain(str(shape))} {sizes}"
    return ""


def _tensor(shard: str, key: str, entry: Any, start: int) -> TensorInfo:
    begin, end = entry["data_offsets"]
    return TensorInfo(key, entry["dtype"], tuple(entry["shape"]), shard, start + begin, start + end)


def _check_layout(where: str, tensors: list[TensorInfo], start: int, size: int | None) -> dict[str, TensorInfo]:
    """Check that the tensors cover the data without gap or overlap, as the format demands."""
    ordered = sorted(tensors, key=lambda info: (info.begin, info.end))
    problems, position, previous = [], start, "the header"
    for info in ordered:
        if info.begin != position:
            relation = "overlaps" if info.begin < position else "leaves a gap after"
            problems.append(
                f"{plain(info.key)} {relation} {plain(previous)}: it begins at {info.begin}, not at {position}"
            )
        position, previous = max(position, info.end), info.key
    if size is not None and position > size:
        raise _invalid(where, [f"it needs {position} bytes and has {size}", *problems], "is the download complete?")
    if size is not None and position < size:
        problems.append(f"{size - position} bytes behind the last tensor belong to none")
    if problems:
        raise _invalid(where, problems)
    return {info.key: info for info in tensors}


def _invalid(where: str, problems: list[str], hint: str = "") -> InvalidCheckpointError:
    return InvalidCheckpointError(
        f"{where} is not a valid safetensors file: {listed(problems, '; ', limit=SENTENCE)}",
        hint=hint or "fetch or write the file again",
    )
