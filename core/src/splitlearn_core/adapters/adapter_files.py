"""The files of a PEFT adapter: found, checked and written; PEFT itself is not needed for it."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitlearn_core.arguments import user_path
from splitlearn_core.checkpoint.config_json import MAX_CONFIG_BYTES, parse_object
from splitlearn_core.checkpoint.names import ADAPTER_CONFIG, ADAPTER_PICKLE, ADAPTER_WEIGHTS
from splitlearn_core.checkpoint.regular_files import open_regular
from splitlearn_core.checkpoint.safetensors_header import read_header
from splitlearn_core.checkpoint.source import Source, open_source
from splitlearn_core.errors import ConfigurationError, InvalidCheckpointError, MissingFileError
from splitlearn_core.plan.bounds import check_numbers
from splitlearn_core.types import CHUNK_BYTES, TensorInfo

if TYPE_CHECKING:
    import torch

#: What PEFT's save_pretrained leaves, and core's own.
_OWN_FILES = frozenset({ADAPTER_CONFIG, ADAPTER_WEIGHTS, "README.md"})


@dataclass(frozen=True, slots=True)
class AdapterFiles:
    """An adapter as PEFT saves it, read and checked but for its tensors."""

    name: str
    config: Mapping[str, Any]
    #: ``adapter_config.json`` as it is, to be written again.
    text: bytes
    weights: Path
    #: What the header says of all its tensors.
    tensors: Mapping[str, TensorInfo]
    #: Of the configuration and the weights: what tells adapters of the same shape apart.
    digest: str


def open_adapter(adapter: str | os.PathLike[str], hub: Mapping[str, Any]) -> AdapterFiles:
    """Find an adapter, fetch it where necessary, and check what can be checked without its tensors.

    Args:
        adapter: The folder that PEFT's ``save_pretrained`` wrote, or a repository on the Hub.
        hub: ``cache_dir``, ``revision``, ``token`` and ``local_files_only``.

    Raises:
        MissingFileError: There is none, or a file of it is missing.
        InvalidCheckpointError: Its files are not valid, or pickles.
    """
    return adapter_in(open_source(adapter, entrance=ADAPTER_CONFIG, **hub))


def adapter_in(source: Source) -> AdapterFiles:
    """Read the adapter among the files of a source; raises like :func:`open_adapter`."""
    name, there = source.model, source.files()
    absent = [file for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if file not in there]
    if absent and ADAPTER_PICKLE in there:
        raise InvalidCheckpointError(
            f"{name} has its weights only in {ADAPTER_PICKLE}, a pickle file, which can run code when it is opened",
            hint="convert it once: load it with PEFT where you trust it, and call save_pretrained",
        )
    if absent:
        raise MissingFileError(
            f"{name} lacks {', '.join(absent)}", hint="give the folder that PEFT's save_pretrained wrote"
        )
    path, weights = source.path(ADAPTER_CONFIG), source.path(ADAPTER_WEIGHTS)
    with open_regular(path) as file:
        text = file.read(MAX_CONFIG_BYTES + 1)
    config = parse_object(text, str(path), MAX_CONFIG_BYTES, hint="fetch it again")
    check_numbers(config, str(path))
    return AdapterFiles(name, config, text, weights, read_header(weights), _digest(text, weights))


def _digest(text: bytes, weights: Path) -> str:
    digest = hashlib.sha256(text)
    with open_regular(weights) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def check_adapter_target(directory: Any) -> Path:
    """Return the folder that an adapter is to be written to: a new or empty one, or that of an earlier adapter.

    Raises:
        ConfigurationError: It is none, or holds other files, which would lie next to the adapter as if they were of it.
    """
    hint = "give a new or empty folder, or that of an earlier adapter"
    if not isinstance(directory, str | os.PathLike):
        raise ConfigurationError(f"{directory!r} is no path to save an adapter to", hint=hint)
    target = user_path(directory)
    if not target.exists():
        return target
    if not target.is_dir():
        raise ConfigurationError(f"{target} is no folder to save an adapter to", hint=hint)
    foreign = sorted(path.name for path in target.iterdir() if path.name not in _OWN_FILES)
    if foreign:
        raise ConfigurationError(f"{target} holds other files than an adapter: {', '.join(foreign[:3])}", hint=hint)
    return target


def write_adapter(directory: Path, config: bytes, tensors: Mapping[str, torch.Tensor]) -> Path:
    """Write both files under temporary names first, and rename them, the weights before what names them."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".adapter-") as work:
        # Tensors that share memory, a tied head say, are two in the file.
        save_file(
            {key: tensor.clone().contiguous() for key, tensor in tensors.items()},
            Path(work) / ADAPTER_WEIGHTS,
            {"format": "pt"},
        )
        (Path(work) / ADAPTER_CONFIG).write_bytes(config)
        for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
            (Path(work) / name).replace(directory / name)
    return directory
