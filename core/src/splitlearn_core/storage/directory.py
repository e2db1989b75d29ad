"""Saved components on the disk: found, and loaded by the ordinary path."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitlearn_core.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from splitlearn_core.checkpoint.origin import origin_mismatches
from splitlearn_core.errors import ConfigurationError, InvalidCheckpointError, MissingFileError
from splitlearn_core.types import component_names, is_component_name, place_of
from splitlearn_core.user_paths import user_path


@dataclass(frozen=True, slots=True)
class SavedComponent:
    """One saved component: its folder, and what its manifest says."""

    folder: Path
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class SplitDirectory:
    """Saved components, by name."""

    path: Path
    components: Mapping[str, SavedComponent]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all components of the model, by the split points of the first that is here."""
        points = next(iter(self.components.values())).manifest.origin.split_points
        return component_names(len(points) + 1)

    @property
    def missing(self) -> list[str]:
        """The names of the components that are not here."""
        return [str(name) for name in self.names if name not in self.components]

    @classmethod
    def open(cls, *directories: str | os.PathLike[str]) -> SplitDirectory:
        """Read the manifests of a directory of components, of one component, or of several such.

        Raises:
            MissingFileError: There is no manifest.
            InvalidCheckpointError: A manifest is not sound, or lies about its folder.
            ConfigurationError: Two directories hold the same component.
        """
        found: dict[str, SavedComponent] = {}
        for directory in (as_path(each, "the directory") for each in directories):
            for folder in _component_folders(directory):
                saved = SavedComponent(folder, read_manifest(folder))
                component = saved.manifest.component
                if folder != directory and folder.name != component:
                    raise InvalidCheckpointError(
                        f"{folder / MANIFEST} is that of a {component}, and lies in a folder called {folder.name!r}",
                        hint=f"rename the folder to {str(component)!r}, or save the split anew",
                    )
                if component in found:
                    raise ConfigurationError(
                        f"two {component}s were given: {found[component].folder} and {folder}",
                        hint="name each component once",
                    )
                found[component] = saved
        return cls(user_path(directories[0]), {name: found[name] for name in sorted(found, key=place_of)})

    def mismatches(self) -> list[str]:
        """Say why the components do not belong together."""
        return origin_mismatches([saved.manifest.origin for saved in self.components.values()])


def as_path(given: Any, what: str) -> Path:
    """Take a path from a caller; raises ConfigurationError where it is none."""
    if not isinstance(given, str | os.PathLike) or not os.fspath(given):
        raise ConfigurationError(f"{what} is {given!r}", hint="give the path of a directory")
    return user_path(given)


def is_split_directory(path: Path) -> bool:
    """Say whether a directory holds saved components and nothing else."""
    if not path.is_dir() or path.is_symlink():
        return False
    entries = list(path.iterdir())
    return bool(entries) and all(is_component_name(entry.name) and (entry / MANIFEST).is_file() for entry in entries)


def file_problems(saved: SavedComponent) -> list[str]:
    """Hold the files that are there against the manifest, without reading them."""
    problems = []
    for name, record in saved.manifest.files.items():
        path = saved.folder / name
        try:
            found = path.lstat()
        except FileNotFoundError:
            problems.append(f"{path} is missing")
            continue
        if not stat.S_ISREG(found.st_mode):
            problems.append(f"{path} is no plain file")
        elif found.st_size != record.size:
            problems.append(f"{path} has {found.st_size} bytes, and had {record.size} when it was saved")
    # A weight file that nobody recorded would be read in the place of one that was.
    weights = (".safetensors", ".safetensors.index.json")
    strange = {
        entry.name for entry in saved.folder.iterdir() if entry.name.endswith(weights)
    } - saved.manifest.files.keys()
    return problems + [f"{saved.folder / name} is not in the manifest" for name in sorted(strange)]


def _folders_in(directory: Path) -> list[Path]:
    """Return the folders in a directory that are called as a component and have a manifest, in the model's order."""
    if not directory.is_dir():
        return []
    names = [entry.name for entry in directory.iterdir() if is_component_name(entry.name)]
    return [directory / name for name in sorted(names, key=place_of) if (directory / name / MANIFEST).is_file()]


def _component_folders(directory: Path) -> list[Path]:
    if (directory / MANIFEST).is_file():
        return [directory]
    folders = _folders_in(directory)
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
