"""``split_manifest.json``: the description of a saved component, parsed, rendered and read from its folder."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from splitlearn_core.arguments import user_path
from splitlearn_core.checkpoint.config_json import parse_object
from splitlearn_core.checkpoint.files import CONFIG, open_regular
from splitlearn_core.checkpoint.origin import Origin
from splitlearn_core.errors import InvalidCheckpointError
from splitlearn_core.plan.split_points import MAX_LAYERS, layers_between
from splitlearn_core.quoting import SENTENCE, listed, quote
from splitlearn_core.types import (
    FLOAT_DTYPES,
    THREE,
    Component,
    is_component_name,
    place_of,
)

MANIFEST = "split_manifest.json"
FORMAT, VERSION = "splitlearn-split", 1

#: A larger file is refused without reading it; a manifest has a few kilobytes.
MAX_MANIFEST_BYTES = 4 * 2**20
_MAX_TEXT, _MAX_SIZE = 4096, 2**63 - 1
_SHA256 = re.compile(r"[0-9a-f]{64}")
_PAIR = 2
_AGAIN = "save the split again: splitlearn split MODEL --split A B --out DIR"


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file as it was written."""

    #: Its size in bytes.
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """A saved component: its origin, and the contents of its files."""

    origin: Origin
    #: The version of core that wrote it.
    core_version: str
    #: False for the source's values; True for those of a component in memory.
    own_values: bool
    #: The components that were saved by the same call.
    saved_with: tuple[str, ...]
    #: File name -> size and hash; without the manifest itself.
    files: Mapping[str, FileRecord]

    @property
    def component(self) -> str:
        return self.origin.component

    @property
    def weight_files(self) -> tuple[str, ...]:
        return tuple(sorted(name for name in self.files if name.endswith(".safetensors")))


def render_manifest(manifest: Manifest) -> str:
    """Return a manifest as JSON."""
    origin = manifest.origin
    values = {
        "format": FORMAT,
        "format_version": VERSION,
        "source": {
            "model": origin.model,
            "commit": origin.commit,
            "fingerprint": origin.fingerprint,
            "samples": dict(sorted(origin.samples.items())),
        },
        "model_type": origin.model_type,
        "plugin": {"distribution": origin.plugin, "version": origin.plugin_version},
        "core_version": manifest.core_version,
        "component": str(origin.component),
        "layers": list(origin.layers),
        "split_points": list(origin.split_points),
        "num_layers": origin.num_layers,
        "dtype": origin.dtype,
        "own_values": manifest.own_values,
        "saved_with": [str(component) for component in manifest.saved_with],
        "ties": list(origin.ties),
        "files": {
            name: {"size": record.size, "sha256": record.sha256} for name, record in sorted(manifest.files.items())
        },
    }
    return json.dumps(values, indent=2) + "\n"


def parse_manifest(content: bytes, where: str) -> Manifest:
    """Parse a manifest from an untrusted file.

    Args:
        content: The file's bytes, at most :data:`MAX_MANIFEST_BYTES` and one more.
        where: The file, for messages.

    Raises:
        InvalidCheckpointError: It is not a manifest, or of a newer format, or contradicts itself; all
            contradictions are listed.
    """
    values = parse_object(content, where, MAX_MANIFEST_BYTES, kind="manifest", hint=_AGAIN)
    if values.get("format") != FORMAT:
        raise _invalid(where, [f'its "format" is not {FORMAT!r}'])
    version = values.get("format_version")
    if type(version) is not int or version != VERSION:
        raise InvalidCheckpointError(
            f"{where} is of format version {quote(version)}; this splitlearn reads version {VERSION}",
            hint="install a splitlearn-core that is as new as the one that saved it",
        )
    return _Reader(values, where).manifest()


def is_plain_name(name: str) -> bool:
    """Return whether a name is that of a file in the same folder, under the rules of every system."""
    return (
        0 < len(name) <= 255  # noqa: PLR2004  # the longest name that file systems allow
        and name.isprintable()
        and name not in (".", "..")
        and ":" not in name
        and PurePosixPath(name).parts == PureWindowsPath(name).parts == (name,)
    )


class _Reader:
    """Reads the fields of a JSON object, and collects the problems with them."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self._where = where
        self._problems: list[str] = []

    def manifest(self) -> Manifest:
        source, plugin = self._object("source"), self._object("plugin")
        component = self._component(self._values.get("component"), "component")
        points, layers = self._points("split_points"), self._pair("layers")
        total = self._number(self._values.get("num_layers"), "num_layers", MAX_LAYERS)
        self._check_layers(component, points, layers, total)
        commit = source.get("commit")
        digest = self._text(source.get("fingerprint"), "source.fingerprint")
        if not _SHA256.fullmatch(digest):
            self._problems.append("source.fingerprint is not a SHA-256")
        dtype = self._text(self._values.get("dtype"), "dtype")
        if dtype not in FLOAT_DTYPES:
            self._problems.append(f"dtype {quote(dtype)} is none of {', '.join(FLOAT_DTYPES)}")
        own = self._values.get("own_values")
        if not isinstance(own, bool):
            self._problems.append(f"own_values is {quote(own)}, not true or false")
        origin = Origin(
            model=self._text(source.get("model"), "source.model"),
            commit=None if commit is None else self._text(commit, "source.commit"),
            fingerprint=digest,
            model_type=self._text(self._values.get("model_type"), "model_type"),
            plugin=self._text(plugin.get("distribution"), "plugin.distribution"),
            plugin_version=self._text(plugin.get("version"), "plugin.version"),
            split_points=points,
            num_layers=total,
            component=component,
            layers=layers,
            dtype=dtype,
            ties=self._texts("ties"),
            samples=self._samples(source.get("samples", {})),
        )
        saved_with = tuple(self._component(name, "saved_with") for name in self._texts("saved_with"))
        manifest = Manifest(
            origin=origin,
            core_version=self._text(self._values.get("core_version"), "core_version"),
            own_values=own is True,
            saved_with=saved_with,
            files=self._files(),
        )
        if component not in saved_with:
            self._problems.append("saved_with lacks the component itself")
        if self._problems:
            raise _invalid(self._where, self._problems)
        return manifest

    def _check_layers(self, component: str, points: tuple[int, ...], layers: tuple[int, int], total: int) -> None:
        if not points or any(before >= after for before, after in pairwise((0, *points, total))):
            self._problems.append(f"split points {points} do not cut a model of {total} layers")
            return
        ranges = {name: (owned.start, owned.end) for name, owned in layers_between(points, total).items()}
        if component not in ranges:
            self._problems.append(f"a model cut at {points} has no {component}, but {listed(ranges)}")
        elif layers != ranges[component]:
            owned = ranges[component]
            self._problems.append(f"a {component} cut at {points} of {total} layers holds {owned}, not {layers}")

    def _files(self) -> dict[str, FileRecord]:
        records = {}
        for name, record in self._object("files").items():
            if not is_plain_name(name) or name == MANIFEST:
                self._problems.append(f"files names {quote(name)}, which is not a file next to the manifest")
                continue
            fields = record if isinstance(record, dict) else {}
            digest = fields.get("sha256")
            if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
                self._problems.append(f"files: sha256 of {quote(name)} is invalid")
                continue
            records[name] = FileRecord(
                self._number(fields.get("size"), f"files: size of {quote(name)}", _MAX_SIZE), digest
            )
        if CONFIG not in records or not any(name.endswith(".safetensors") for name in records):
            self._problems.append(f"files lacks {CONFIG} or the weights")
        return records

    def _samples(self, value: Any) -> dict[str, str]:
        """Read the samples of the source's values, which older manifests lack."""
        if not isinstance(value, dict):
            self._problems.append(f"source.samples is {quote(value)}, not an object")
            return {}
        wrong = [name for name, text in value.items() if not isinstance(text, str) or not _SHA256.fullmatch(text)]
        self._problems += [f"source.samples: that of {quote(name)} is not a SHA-256" for name in wrong]
        return value if not wrong else {}

    def _object(self, name: str) -> dict[str, Any]:
        value = self._values.get(name)
        if not isinstance(value, dict):
            self._problems.append(f"{name} is {quote(value)}, not an object")
            return {}
        return value

    def _component(self, value: Any, name: str) -> str:
        if not isinstance(value, str) or not is_component_name(value):
            self._problems.append(f"{name} names {quote(value)}, which is none of {', '.join(Component)}")
            return Component.TRUNK
        return Component(value) if value in THREE else value

    def _text(self, value: Any, name: str) -> str:
        if not isinstance(value, str) or not 0 < len(value) <= _MAX_TEXT:
            self._problems.append(f"{name} is {quote(value)}, not a string of 1 to {_MAX_TEXT} characters")
            return ""
        return value

    def _texts(self, name: str) -> tuple[str, ...]:
        value = self._values.get(name)
        if not isinstance(value, list):
            self._problems.append(f"{name} is {quote(value)}, not a list")
            return ()
        return tuple(self._text(item, name) for item in value)

    def _number(self, value: Any, name: str, limit: int) -> int:
        if type(value) is not int or not 0 <= value <= limit:
            self._problems.append(f"{name} is {quote(value)}, not an integer from 0 to {limit}")
            return 0
        return value

    def _pair(self, name: str) -> tuple[int, int]:
        value = self._values.get(name)
        if not isinstance(value, list) or len(value) != _PAIR:
            self._problems.append(f"{name} is {quote(value)}, not a pair")
            return 0, 0
        first, second = (self._number(item, name, MAX_LAYERS) for item in value)
        return first, second

    def _points(self, name: str) -> tuple[int, ...]:
        value = self._values.get(name)
        if not isinstance(value, list) or not 0 < len(value) < MAX_LAYERS:
            self._problems.append(f"{name} is {quote(value)}, not a list of layer numbers")
            return ()
        return tuple(self._number(item, name, MAX_LAYERS) for item in value)


def _invalid(where: str, problems: list[str]) -> InvalidCheckpointError:
    return InvalidCheckpointError(
        f"{where} is not a valid manifest: {listed(problems, '; ', limit=SENTENCE)}", hint=_AGAIN
    )


def component_folders(directory: Path) -> list[Path]:
    """Return the folders in a directory that are named as a component and have a manifest, in the model's order."""
    if not directory.is_dir():
        return []
    names = [entry.name for entry in directory.iterdir() if is_component_name(entry.name)]
    return [directory / name for name in sorted(names, key=place_of) if (directory / name / MANIFEST).is_file()]


def holds_components(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a directory of saved components, or of one."""
    folder = user_path(path)
    return (folder / MANIFEST).is_file() or bool(component_folders(folder))


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of one saved component; raises like :meth:`SplitDirectory.open`."""
    path = folder / MANIFEST
    if not stat.S_ISREG(path.lstat().st_mode):
        raise InvalidCheckpointError(
            f"{path} is not a regular file", hint="copy the component itself, not a link to it"
        )
    with open_regular(path) as file:
        return parse_manifest(file.read(MAX_MANIFEST_BYTES + 1), str(path))
