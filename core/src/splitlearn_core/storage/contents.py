"""The contents of the folder of a saved component, and the layout of its weights, before any byte is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitlearn_core.checkpoint.files import CONFIG, GENERATION_CONFIG, SINGLE, TOKENIZER_PREFIXES
from splitlearn_core.checkpoint.manifest import is_plain_name
from splitlearn_core.checkpoint.origin import Origin
from splitlearn_core.errors import ConfigurationError
from splitlearn_core.loading.opening import OpenModel
from splitlearn_core.plan.placement import parse_size
from splitlearn_core.quoting import quote
from splitlearn_core.tokenization import converted_files
from splitlearn_core.types import (
    DTYPE_BYTES,
    Component,
    ProgressCallback,
)

_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor to write, and the source of its bytes."""

    key: str
    #: The name in the safetensors format: ``F32``, ``BF16``, ...
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    #: Yields the bytes in pieces; a piece stays valid until the next but one is requested.
    pieces: Callable[[], Iterator[memoryview]]


@dataclass(frozen=True, slots=True)
class WeightFile:
    """A safetensors file to write."""

    name: str
    header: bytes
    tensors: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors)


def parse_shard_size(size: str | int) -> int:
    """Parse a size in bytes: ``5GB``, ``500MiB`` or a number.

    Raises:
        ConfigurationError: It is not a size, or less than one byte.
    """
    nbytes = parse_size(size)
    if nbytes < 1:
        raise ConfigurationError(f"max_shard_size {quote(size)} is not a size", hint='give "5GB", or a number of bytes')
    return nbytes


def pack(tensors: Iterable[Tensor], max_shard_bytes: int) -> list[WeightFile]:
    """Distribute tensors over one file, or several of at most a size; a tensor is never divided."""
    # Widest dtype first: every tensor then begins at a multiple of its element size.
    ordered = sorted(tensors, key=lambda tensor: -DTYPE_BYTES[tensor.dtype])
    shards: list[list[Tensor]] = [[]]
    room = max_shard_bytes
    for tensor in ordered:
        if shards[-1] and tensor.nbytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= tensor.nbytes
    names = [SINGLE]
    if len(shards) > 1:
        names = [f"model-{number + 1:05}-of-{len(shards):05}.safetensors" for number in range(len(shards))]
    return [WeightFile(name, _header(shard), tuple(shard)) for name, shard in zip(names, shards, strict=True)]


def index_of(files: Sequence[WeightFile]) -> str | None:
    """Return the JSON index of several files; None for a single file, which needs none."""
    if len(files) == 1:
        return None
    weight_map = {tensor.key: file.name for file in files for tensor in file.tensors}
    total = sum(tensor.nbytes for file in files for tensor in file.tensors)
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"


def _header(tensors: Sequence[Tensor]) -> bytes:
    """Return the header of a safetensors file: its length, then JSON, padded so that the data is aligned."""
    entries: dict[str, Mapping[str, Any]] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        end = position + tensor.nbytes
        entries[tensor.key] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


@dataclass(frozen=True, slots=True)
class Part:
    """A component to be saved."""

    origin: Origin
    own_values: bool
    tensors: tuple[Tensor, ...]
    #: Small files to copy: name in the folder -> source.
    copied: Mapping[str, Path]
    #: Small files to write: name -> text.
    written: Mapping[str, str]


def companion_files(model: OpenModel, kind: Component, progress: ProgressCallback) -> dict[str, Path]:
    """Return the small files that go with a component; the trunk needs no tokenizer.

    A tokenizer that is part of a weight file is converted into files.
    """
    names = [CONFIG] if model.checkpoint.source.has_config else []
    if kind is not Component.TRUNK:
        available = sorted(model.checkpoint.source.files())
        names += [
            name
            for name in available
            if name == GENERATION_CONFIG or (name.startswith(TOKENIZER_PREFIXES) and is_plain_name(name))
        ]
    # A name like tokenizer.safetensors is that of a weight file all the same.
    files = {name: model.checkpoint.source.path(name) for name in names if not name.endswith((".safetensors", ".bin"))}
    arguments = model.checkpoint.pretrained_arguments()
    if arguments is None or kind is Component.TRUNK or any(name.startswith(TOKENIZER_PREFIXES) for name in files):
        return files
    file = model.checkpoint.path_with_header(model.checkpoint.weight_files()[0])
    return files | converted_files(file, dict(arguments), progress)


def config_text(config: Mapping[str, Any]) -> str:
    """Write a ``config.json``."""
    return json.dumps(config, indent=2) + "\n"
