"""Directories of saved components: their manifests and their files."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitlearn_core.arguments import user_path
from splitlearn_core.checkpoint.manifest import MANIFEST, Manifest, component_folders, read_manifest
from splitlearn_core.checkpoint.origin import origin_mismatches
from splitlearn_core.errors import ConfigurationError, InvalidCheckpointError, MissingFileError
from splitlearn_core.types import component_names, is_component_name, place_of


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
                        f"{folder / MANIFEST} is that of a {component}, and lies in a folder called {folder.name!r}",
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
    """Whether a directory holds saved components and nothing else."""
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
