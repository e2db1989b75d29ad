"""Directories of saved components: their manifests and files, and whether they are unchanged and belong together."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitlearn_core.arguments import user_path
from splitlearn_core.checkpoint.checkpoint import Checkpoint
from splitlearn_core.checkpoint.files import CONFIG
from splitlearn_core.checkpoint.manifest import MANIFEST, Manifest, component_folders, read_manifest
from splitlearn_core.checkpoint.origin import fingerprint, origin_mismatches
from splitlearn_core.checkpoint.source import open_source
from splitlearn_core.errors import ConfigurationError, InvalidCheckpointError, MissingFileError, SplitLearnError
from splitlearn_core.loading.opening import open_model
from splitlearn_core.loading.planning import make_plan, refuse_misfit
from splitlearn_core.progress import passing_through
from splitlearn_core.storage.durable_files import hash_file, range_pieces
from splitlearn_core.types import Progress, ProgressCallback, TensorInfo, component_names, is_component_name, place_of


@dataclass(frozen=True, slots=True)
class SavedComponent:
    """A saved component: its folder and its manifest."""

    folder: Path
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class SplitDirectory:
    """Saved components, by name."""

    path: Path
    components: Mapping[str, SavedComponent]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all components of the model, by the split points of the first that is present."""
        points = next(iter(self.components.values())).manifest.origin.split_points
        return component_names(len(points) + 1)

    @property
    def missing(self) -> list[str]:
        """The names of the components that are not present."""
        return [str(name) for name in self.names if name not in self.components]

    @classmethod
    def open(cls, *directories: str | os.PathLike[str]) -> SplitDirectory:
        """Read the manifests of a directory of components, of one component, or of several such.

        Raises:
            MissingFileError: There is no manifest.
            InvalidCheckpointError: A manifest is invalid, or contradicts the name of its folder.
            ConfigurationError: Two directories hold the same component.
        """
        by_name: dict[str, SavedComponent] = {}
        for directory in (as_path(each, "the directory") for each in directories):
            for folder in _component_folders(directory):
                saved = SavedComponent(folder, read_manifest(folder))
                component = saved.manifest.component
                if folder != directory and folder.name != component:
                    raise InvalidCheckpointError(
                        f"{folder / MANIFEST} is the manifest of a {component}, in a folder called {folder.name!r}",
                        hint=f"rename the folder to {str(component)!r}, or save the split again",
                    )
                if component in by_name:
                    raise ConfigurationError(
                        f"two {component}s were given: {by_name[component].folder} and {folder}",
                        hint="name each component once",
                    )
                by_name[component] = saved
        return cls(user_path(directories[0]), {name: by_name[name] for name in sorted(by_name, key=place_of)})

    def mismatches(self) -> list[str]:
        """Return the reasons why the components do not belong together."""
        return origin_mismatches([saved.manifest.origin for saved in self.components.values()])


def as_path(given: Any, what: str) -> Path:
    """Return an argument as a path; raises ConfigurationError if it is not one."""
    if not isinstance(given, str | os.PathLike) or not os.fspath(given):
        raise ConfigurationError(f"{what} is {given!r}", hint="give the path of a directory")
    return user_path(given)


def is_split_directory(path: Path) -> bool:
    """Return whether a directory holds saved components and nothing else."""
    if not path.is_dir() or path.is_symlink():
        return False
    entries = list(path.iterdir())
    return bool(entries) and all(is_component_name(entry.name) and (entry / MANIFEST).is_file() for entry in entries)


def file_problems(saved: SavedComponent) -> list[str]:
    """Compare names, kinds and sizes of the files with the manifest, without reading them."""
    problems = []
    for name, record in saved.manifest.files.items():
        path = saved.folder / name
        try:
            status = path.lstat()
        except FileNotFoundError:
            problems.append(f"{path} is missing")
            continue
        if not stat.S_ISREG(status.st_mode):
            problems.append(f"{path} is not a regular file")
        elif status.st_size != record.size:
            problems.append(f"{path} has {status.st_size} bytes, and had {record.size} when it was saved")
    # An unrecorded weight file would be read instead of a recorded one.
    suffixes = (".safetensors", ".safetensors.index.json")
    unrecorded = {
        entry.name for entry in saved.folder.iterdir() if entry.name.endswith(suffixes)
    } - saved.manifest.files.keys()
    return problems + [f"{saved.folder / name} is not in the manifest" for name in sorted(unrecorded)]


def _component_folders(directory: Path) -> list[Path]:
    if (directory / MANIFEST).is_file():
        return [directory]
    folders = component_folders(directory)
    links = [str(folder) for folder in folders if folder.is_symlink()]
    if links:
        raise InvalidCheckpointError(
            f"{', '.join(links)} is a link, and a saved split has none", hint="name the folder that it leads to"
        )
    if not folders:
        raise MissingFileError(
            f"{directory} holds no saved component: there is no {MANIFEST} in it, nor in a folder bottom, trunk or top",
            hint="save one: splitlearn split MODEL --split A B --out DIR",
        )
    return folders


@dataclass(frozen=True, slots=True)
class SavedVerification:
    """The result of verifying saved components; they are valid if there are no problems."""

    path: str
    components: tuple[str, ...]
    #: Whether they are all components of a model.
    complete: bool
    #: Bytes that were hashed.
    nbytes: int
    problems: tuple[str, ...]

    @property
    def sound(self) -> bool:
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "components": [str(component) for component in self.components],
            "complete": self.complete,
            "bytes": self.nbytes,
            "sound": self.sound,
            "problems": list(self.problems),
        }


def verify_saved(
    *directories: str | os.PathLike[str], progress: ProgressCallback = lambda _: None
) -> SavedVerification:
    """Check saved components: hashes, sizes, tensors, ties, and whether they belong together.

    Args:
        directories: What :func:`save_split` made, or folders of components.
        progress: Called with each :class:`Progress`; it may raise to stop.

    Returns:
        The result, with all problems.

    Raises:
        MissingFileError: There are no saved components.
        InvalidCheckpointError: A manifest is invalid.
    """
    split = SplitDirectory.open(*directories)
    total = sum(record.size for saved in split.components.values() for record in saved.manifest.files.values())
    done = 0

    with passing_through(progress) as report:

        def count(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            report(Progress("hashing", None, done, total))

        problems = split.mismatches() + absent_problems(split)
        readable = []
        for saved in split.components.values():
            own_problems = file_problems(saved)
            if not own_problems:
                readable.append(saved)
                own_problems = hash_problems(saved, count) + tensor_problems(saved)
            problems += own_problems
    problems += tie_problems(readable)
    names = tuple(split.components)
    shown = " ".join(os.fspath(directory) for directory in directories)
    return SavedVerification(shown, names, names == split.names, done, tuple(dict.fromkeys(problems)))


def absent_problems(split: SplitDirectory) -> list[str]:
    """Return the components that were saved into the same directory and are missing from it."""
    if len(split.components) == 1 and next(iter(split.components.values())).folder == split.path:
        return []  # The folder of one component was named.
    expected = {name for saved in split.components.values() for name in saved.manifest.saved_with}
    missing = sorted(expected - split.components.keys(), key=place_of)
    return [f"the {name} that was saved with the others is missing" for name in missing]


def hash_problems(saved: SavedComponent, on_bytes: Callable[[int], None] = lambda _: None) -> list[str]:
    """Read the files of a component, and compare their hashes with its manifest."""
    return [
        f"{saved.folder / name} is not what was saved: its SHA-256 is another"
        for name, record in saved.manifest.files.items()
        if hash_file(saved.folder / name, on_bytes).sha256 != record.sha256
    ]


def tensor_problems(saved: SavedComponent) -> list[str]:
    """Return the reasons why the tensors are not those of the layers that the manifest names."""
    origin = saved.manifest.origin
    try:
        model = open_model(saved.folder, origin.model_type)
        refuse_misfit(model, make_plan(model, origin.split_points, (origin.component,), origin.dtype))
    except SplitLearnError as error:
        return [f"{saved.folder}: {error.message}"]
    return []


def tie_problems(components: list[SavedComponent]) -> list[str]:
    """Return the tied tensors whose values differ between two components."""
    first: dict[str, tuple[SavedComponent, TensorInfo]] = {}
    problems = []
    for saved in components:
        for key, info in tensors_of(saved).items():
            other, theirs = first.setdefault(key, (saved, info))
            if other is saved:
                continue
            pieces = zip(_pieces(other.folder, theirs), _pieces(saved.folder, info), strict=True)
            same_layout = (info.dtype, info.shape) == (theirs.dtype, theirs.shape)
            if not (same_layout and all(left == right for left, right in pieces)):
                names = f"{other.manifest.component} and {saved.manifest.component}"
                problems.append(f"{key} is one tensor for {names}, and they hold different values of it")
    return problems


def tensors_of(saved: SavedComponent) -> dict[str, TensorInfo]:
    """Describe the tensors of a saved component by their checkpoint keys."""
    checkpoint = Checkpoint(open_source(saved.folder))
    return checkpoint.tensors(checkpoint.weight_map)


def configuration_problems(split: SplitDirectory) -> list[str]:
    """Return the components whose configuration differs, apart from the dtype and the version that wrote it."""
    by_fingerprint: dict[str, Path] = {}
    for saved in split.components.values():
        path = saved.folder / CONFIG
        by_fingerprint.setdefault(fingerprint(Checkpoint(open_source(saved.folder)).config, ()), path)
    paths = list(by_fingerprint.values())
    return [f"{path} is another configuration than {paths[0]}" for path in paths[1:]]


def _pieces(folder: Path, info: TensorInfo) -> Iterator[memoryview]:
    return range_pieces(folder / info.shard, info.begin, info.end)()
