"""Saved components as one ordinary Hugging Face checkpoint again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from splitlearn_core.checkpoint.manifest import MANIFEST
from splitlearn_core.checkpoint.names import INDEX
from splitlearn_core.errors import ConfigurationError, InvalidCheckpointError
from splitlearn_core.progress import passing_through, reporting
from splitlearn_core.quoting import SENTENCE, listed
from splitlearn_core.storage.atomic import replacing, snapshot
from splitlearn_core.storage.directory import SplitDirectory, as_path, file_problems
from splitlearn_core.storage.durable_files import (
    Buffers,
    check_room,
    copy_durably,
    range_pieces,
    write_text,
    write_weights,
)
from splitlearn_core.storage.integrity import configuration_problems, hash_problems, tensors_of, tie_problems
from splitlearn_core.storage.saving import check_place
from splitlearn_core.storage.weight_layout import Tensor, index_of, pack, parse_size
from splitlearn_core.types import THREE, Component, Progress, ProgressCallback


def merge_split(
    directory: str | os.PathLike[str],
    *others: str | os.PathLike[str],
    out: str | os.PathLike[str],
    max_shard_size: str | int = "5GB",
    progress: ProgressCallback | Literal[False] | None = None,
) -> Path:
    """Put all components of a model together: a checkpoint whose tensors are the source's, byte for byte.

    Args:
        directory: What :func:`save_split` made, or the folder of one component.
        others: Further ones, where the components lie apart.
        out: The directory to make; it must not be there, or be empty.
        max_shard_size: Weights above this size are sharded: ``5GB``, or bytes.
        progress: Called with each :class:`Progress`; it may raise to stop.

    Returns:
        The directory of the checkpoint.

    Raises:
        ConfigurationError: Components are missing or do not belong together; all reasons are given.
        CheckpointError: There are none, or their files are not those that were saved.
        InsufficientDiskError: It does not fit.
    """
    target, limit = as_path(out, "out"), parse_size(max_shard_size)
    check_place(target)
    earlier = snapshot(target)
    if os.path.lexists(target) and not (target.is_dir() and not target.is_symlink() and not any(target.iterdir())):
        raise ConfigurationError(
            f"{target} is there: it is not overwritten", hint="choose a directory that does not exist yet"
        )
    split = SplitDirectory.open(directory, *others)
    tensors = _tensors(split)
    files = pack(tensors.values(), limit)
    small = _small_files(split)
    total = sum(file.nbytes for file in files)
    check_room(target, total + sum(path.stat().st_size for path in small.values()))
    done = 0
    with reporting(progress) as report, passing_through(report) as tell, replacing(target, earlier) as folder:
        _check_hashes(split, tell)

        for file in files:

            def count(nbytes: int, name: str = file.name) -> None:
                nonlocal done
                done += nbytes
                tell(Progress("merging", None, done, total, name))

            write_weights(folder, file, count)
        index = index_of(files)
        if index is not None:
            write_text(folder / INDEX, index)
        for name, path in small.items():
            copy_durably(path, folder / name)
    return target


def _check_hashes(split: SplitDirectory, tell: ProgressCallback) -> None:
    """Hold every file against its manifest; raises InvalidCheckpointError."""
    total = sum(record.size for saved in split.components.values() for record in saved.manifest.files.values())
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        tell(Progress("hashing", None, done, total))

    problems = [problem for saved in split.components.values() for problem in hash_problems(saved, count)]
    if problems:
        raise InvalidCheckpointError(
            f"these components are not what was saved: {listed(problems, '; ', limit=SENTENCE)}",
            hint="copy the component anew, or save it again",
        )


def _tensors(split: SplitDirectory) -> dict[str, Tensor]:
    """Return every tensor once, after all has been checked that can go wrong."""
    problems = [f"the {name} is missing" for name in split.missing] + split.mismatches()
    components = list(split.components.values())
    damaged = [problem for saved in components for problem in file_problems(saved)]
    if not damaged:
        problems += configuration_problems(split) + tie_problems(components)
    problems += damaged
    if problems:
        raise ConfigurationError(
            f"these components make up no checkpoint: {listed(problems, '; ', limit=SENTENCE)}",
            hint="give bottom, trunk and top of one source and one split"
            if len(split.names) == len(THREE)
            else f"give {listed(split.names)} of one source and one split",
        )
    tensors: dict[str, Tensor] = {}
    buffers = Buffers()
    for saved in components:
        for key, info in tensors_of(saved).items():
            pieces = range_pieces(saved.folder / info.shard, info.begin, info.end, buffers)
            tensors.setdefault(key, Tensor(key, info.dtype, info.shape, info.nbytes, pieces))
    return tensors


def _small_files(split: SplitDirectory) -> Mapping[str, Path]:
    """Choose configuration, tokenizer and generation settings; where two have one, the bottom's, or the top's."""
    found: dict[str, Path] = {}
    ends = [split.components[Component.BOTTOM], split.components[Component.TOP]]
    for saved in (*ends, *split.components.values()):
        for name in saved.manifest.files:
            if not name.endswith(".safetensors") and name not in (INDEX, MANIFEST):
                found.setdefault(name, saved.folder / name)
    return found
