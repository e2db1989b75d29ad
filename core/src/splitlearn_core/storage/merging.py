"""Merge saved components into one ordinary Hugging Face checkpoint."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from splitlearn_core.checkpoint.config_json import read_config
from splitlearn_core.checkpoint.files import CONFIG, INDEX
from splitlearn_core.checkpoint.manifest import MANIFEST
from splitlearn_core.errors import ConfigurationError, InvalidCheckpointError
from splitlearn_core.plan.mismatch import without_others_words
from splitlearn_core.progress import passing_through, reporting
from splitlearn_core.quoting import SENTENCE, listed
from splitlearn_core.storage.atomic import replacing, snapshot
from splitlearn_core.storage.contents import Tensor, index_of, pack, parse_shard_size
from splitlearn_core.storage.directory import (
    SplitDirectory,
    as_path,
    configuration_problems,
    file_problems,
    hash_problems,
    tensors_of,
    tie_problems,
)
from splitlearn_core.storage.durable_files import (
    Buffers,
    check_room,
    copy_durably,
    range_pieces,
    write_text,
    write_weights,
)
from splitlearn_core.storage.saving import check_place
from splitlearn_core.types import THREE, Component, Progress, ProgressCallback

log = logging.getLogger(__name__)

#: Values that only the configuration of a composite model has.
_OF_OTHERS = {"text_config", "vision_config", "audio_config"}


def merge_split(
    directory: str | os.PathLike[str],
    *others: str | os.PathLike[str],
    out: str | os.PathLike[str],
    max_shard_size: str | int = "5GB",
    progress: ProgressCallback | Literal[False] | None = None,
) -> Path:
    """Merge all components of a model into a checkpoint whose tensors are the source's, byte for byte.

    Args:
        directory: The output of :func:`save_split`, or the folder of one component.
        others: Further ones, if the components are in different directories.
        out: The directory to create; it must not exist, or be empty.
        max_shard_size: Weights above this size are sharded: ``5GB``, or bytes.
        progress: Called with each :class:`Progress`; it may raise to stop.

    Returns:
        The directory of the checkpoint.

    Raises:
        ConfigurationError: Components are missing or do not belong together; all reasons are given.
        CheckpointError: There are none, or their files are not those that were saved.
        InsufficientDiskError: The checkpoint does not fit on the disk.
    """
    target, limit = as_path(out, "out"), parse_shard_size(max_shard_size)
    check_place(target)
    earlier = snapshot(target)
    if os.path.lexists(target) and not (target.is_dir() and not target.is_symlink() and not any(target.iterdir())):
        raise ConfigurationError(
            f"{target} exists already and is not overwritten", hint="choose a directory that does not exist yet"
        )
    split = SplitDirectory.open(directory, *others)
    tensors = _tensors(split)
    files = pack(tensors.values(), limit)
    small = _small_files(split)
    total = sum(file.nbytes for file in files)
    check_room(target, total + sum(path.stat().st_size for path in small.values()))
    done = 0
    with reporting(progress) as bar, passing_through(bar) as report, replacing(target, earlier) as folder:
        _check_hashes(split, report)

        for file in files:

            def count(nbytes: int, name: str = file.name) -> None:
                nonlocal done
                done += nbytes
                report(Progress("merging", None, done, total, name))

            write_weights(folder, file, count)
        index = index_of(files)
        if index is not None:
            write_text(folder / INDEX, index)
        for name, path in small.items():
            copy_durably(path, folder / name)
    if _OF_OTHERS & read_config(target / CONFIG).keys():
        log.warning("%s", without_others_words(target))
    return target


def _check_hashes(split: SplitDirectory, report: ProgressCallback) -> None:
    """Compare every file with its manifest; raises InvalidCheckpointError."""
    total = sum(record.size for saved in split.components.values() for record in saved.manifest.files.values())
    done = 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        report(Progress("hashing", None, done, total))

    problems = [problem for saved in split.components.values() for problem in hash_problems(saved, count)]
    if problems:
        raise InvalidCheckpointError(
            f"these components are not what was saved: {listed(problems, '; ', limit=SENTENCE)}",
            hint="copy the component again, or save it again",
        )


def _tensors(split: SplitDirectory) -> dict[str, Tensor]:
    """Return every tensor once, after checking that the components form a model."""
    problems = [f"the {name} is missing" for name in split.missing] + split.mismatches()
    components = list(split.components.values())
    damaged = [problem for saved in components for problem in file_problems(saved)]
    if not damaged:
        problems += configuration_problems(split) + tie_problems(components)
    problems += damaged
    if problems:
        raise ConfigurationError(
            f"these components do not form a complete model: {listed(problems, '; ', limit=SENTENCE)}",
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
    """Choose configuration, tokenizer and generation settings: of equal names the bottom's, else the top's."""
    files: dict[str, Path] = {}
    ends = [split.components[Component.BOTTOM], split.components[Component.TOP]]
    for saved in (*ends, *split.components.values()):
        for name in saved.manifest.files:
            if not name.endswith(".safetensors") and name not in (INDEX, MANIFEST):
                files.setdefault(name, saved.folder / name)
    return files
