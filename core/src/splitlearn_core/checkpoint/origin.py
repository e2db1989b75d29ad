"""The origin of components: the checkpoint and the split that they belong to, and how mismatches are detected."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from splitlearn_core.checkpoint.files import open_regular

#: Values of ``config.json`` about its writer and the storage of the weights, not about the model.
_INCIDENTAL = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "quantization_config"})


@dataclass(frozen=True, slots=True)
class Origin:
    """The source of a component, and how it was cut. Stored with the component, and in its manifest."""

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
    #: torch's name of the dtype of its weights when loaded as ``auto``.
    dtype: str
    #: Checkpoint keys of its tensors that another component has as well.
    ties: tuple[str, ...] = field(default=(), compare=False)
    #: Module key -> the name under which the checkpoint has the tensor.
    keys: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    #: Weight file of the source -> a hash of a few of its values; see :func:`sample_values`. Only of
    #: files that the component reads, and that were complete on this machine.
    samples: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    #: The values of the checkpoint's ``config.json``.
    config: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __str__(self) -> str:
        commit = f"@{self.commit[:12]}" if self.commit else ""
        return f"{self.component} of {self.model}{commit}"


#: Fields that components of one model have in common, and their names in messages.
_COMMON = {
    "fingerprint": "checkpoint",
    "model_type": "model type",
    "plugin": "family plugin",
    "plugin_version": "version of the family plugin",
    "num_layers": "number of layers",
    "split_points": "split points",
}


def fingerprint(config: Mapping[str, Any], keys: Iterable[str]) -> str:
    """Hash the configuration and the names of the tensors of a checkpoint, as hexadecimal digits.

    It needs no weights, so it is the same for each component. Checkpoints that differ only in values have
    the same fingerprint; commits, and samples of values, distinguish those.
    """
    values = {name: value for name, value in config.items() if name not in _INCIDENTAL}
    return hashlib.sha256(json.dumps([values, sorted(keys)], sort_keys=True).encode()).hexdigest()


def origin_mismatches(origins: Sequence[Origin], *, dtypes: bool = True) -> list[str]:
    """Describe why components do not belong together, naming both sides.

    Args:
        origins: Those of the components; each is compared with the first.
        dtypes: Whether different dtypes are a mismatch.
    """
    names = _COMMON | ({"dtype": "dtype"} if dtypes else {})
    problems = []
    # A directory has no commit, which is no mismatch.
    with_commit = [origin for origin in origins if origin.commit]
    for first, other, fields in [
        *((origins[0], other, names) for other in origins[1:]),
        *((with_commit[0], other, {"commit": "commit"}) for other in with_commit[1:]),
    ]:
        problems += [
            f"{label} differs: {getattr(first, name)} ({first}), {getattr(other, name)} ({other})"
            for name, label in fields.items()
            if getattr(first, name) != getattr(other, name)
        ]
    # The first component that read each file, and its sample.
    first_samples: dict[str, tuple[Origin, str]] = {}
    for origin in origins:
        for name, sample in origin.samples.items():
            other, other_sample = first_samples.setdefault(name, (origin, sample))
            if sample != other_sample:
                problems.append(f"{name} is not the same file: {other}, {origin}")
                break
    return problems


_PROBES, _PROBE_BYTES = 16, 4096


def sample_values(path: Path) -> str:
    """Hash the size of a file and a few evenly spaced pieces of it, the first and the last among them.

    The cost does not depend on the size. Files that differ only between the pieces have the same hash.
    """
    with open_regular(path, buffering=0) as file:
        size = file.seek(0, 2)
        digest = hashlib.sha256(size.to_bytes(8, "little"))
        last = max(0, size - _PROBE_BYTES)
        for begin in sorted({last * number // (_PROBES - 1) for number in range(_PROBES)}):
            file.seek(begin)
            digest.update(file.read(_PROBE_BYTES))
    return digest.hexdigest()
