"""The identity of a model's weights: what tells components of one split of one model from all others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from splitlearn_core.checkpoint.regular_files import open_regular

#: Values of ``config.json`` that say who wrote it and how the values are kept, not what the model is.
_INCIDENTAL = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "quantization_config"})


@dataclass(frozen=True, slots=True)
class Origin:
    """The source of a component, and how it was cut. Kept with the component, and in its manifest."""

    #: The directory or Hub repository, as the caller named it.
    model: str
    #: The commit that a Hub revision was resolved to; None for a directory.
    commit: str | None
    #: Of ``config.json`` and the names of all tensors of the checkpoint; see :func:`fingerprint`.
    fingerprint: str
    model_type: str
    #: The distribution of the family's plugin, and its version.
    plugin: str
    plugin_version: str
    split_points: tuple[int, ...]
    num_layers: int
    component: str
    #: The layers ``[start, end)`` of the component.
    layers: tuple[int, int]
    #: The dtype of its weights once loaded as ``auto``, by torch's name.
    dtype: str
    #: Checkpoint keys of its tensors that another component holds as well.
    ties: tuple[str, ...] = field(default=(), compare=False)
    #: Module key -> the name under which the checkpoint has the tensor.
    keys: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    #: Weight file of the source -> a hash of a few of its values; see :mod:`.checkpoint.sample`. Only of
    #: files that the component reads, and that were here as a whole.
    samples: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    #: The values of the checkpoint's ``config.json``.
    config: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __str__(self) -> str:
        commit = f"@{self.commit[:12]}" if self.commit else ""
        return f"{self.component} of {self.model}{commit}"


#: What components of one model have in common, and how a message calls it.
_COMMON = {
    "fingerprint": "checkpoint",
    "model_type": "model type",
    "plugin": "family plugin",
    "plugin_version": "version of the family plugin",
    "num_layers": "number of layers",
    "split_points": "split points",
}


def fingerprint(config: Mapping[str, Any], keys: Iterable[str]) -> str:
    """Tell a checkpoint by its configuration and the names of its tensors, in hexadecimal digits.

    It needs no weights, and so is the same whichever component is loaded. Checkpoints that differ
    in nothing but values have the same one; commits, and samples of values, tell those apart.
    """
    values = {name: value for name, value in config.items() if name not in _INCIDENTAL}
    return hashlib.sha256(json.dumps([values, sorted(keys)], sort_keys=True).encode()).hexdigest()


def origin_mismatches(origins: Sequence[Origin], *, dtypes: bool = True) -> list[str]:
    """Say why components do not belong together, both sides named.

    Args:
        origins: Of the components; each is held against the first.
        dtypes: Whether different dtypes are a fault.
    """
    problems = []
    # A directory knows no commit, and says nothing about those of others.
    known = [origin for origin in origins if origin.commit]
    for first, other, facts in [
        *((origins[0], other, _facts(origins[0], other, dtypes=dtypes)) for other in origins[1:]),
        *((known[0], other, {"commit": (known[0].commit, other.commit)}) for other in known[1:]),
    ]:
        problems += [
            f"{what} differs: {one} ({first}), {two} ({other})" for what, (one, two) in facts.items() if one != two
        ]
    return problems + _sample_mismatches(origins)


def _sample_mismatches(origins: Sequence[Origin]) -> list[str]:
    """Say which components read files of one name that hold different values."""
    first: dict[str, tuple[Origin, str]] = {}
    problems = []
    for origin in origins:
        for name, sample in origin.samples.items():
            other, theirs = first.setdefault(name, (origin, sample))
            if sample != theirs:
                problems.append(f"the values of {name} differ: {other}, {origin}")
                break
    return problems


def _facts(first: Origin, other: Origin, *, dtypes: bool) -> dict[str, tuple[Any, Any]]:
    names = _COMMON | ({"dtype": "dtype"} if dtypes else {})
    return {what: (getattr(first, name), getattr(other, name)) for name, what in names.items()}


_PROBES, _PROBE_BYTES = 16, 4096


def sample_values(path: Path) -> str:
    """Hash the size of a file and a few evenly spaced pieces of it, the first and the last among them.

    It costs the same for a file of any size. Files that differ between the pieces alone have the same one.
    """
    with open_regular(path, buffering=0) as file:
        size = file.seek(0, 2)
        digest = hashlib.sha256(size.to_bytes(8, "little"))
        room = max(0, size - _PROBE_BYTES)
        for begin in sorted({room * number // (_PROBES - 1) for number in range(_PROBES)}):
            file.seek(begin)
            digest.update(file.read(_PROBE_BYTES))
    return digest.hexdigest()
