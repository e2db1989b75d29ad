"""Saved components on the disk: found, and loaded by the ordinary path."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from splitlearn_core.arguments import naming_foreign
from splitlearn_core.checkpoint.regular import open_regular
from splitlearn_core.errors import ConfigurationError, InvalidCheckpointError, MissingFileError
from splitlearn_core.origin import origin_mismatches
from splitlearn_core.paths import user_path
from splitlearn_core.quoting import SENTENCE, listed
from splitlearn_core.storage.manifest import MANIFEST, MAX_MANIFEST_BYTES, Manifest, parse_manifest
from splitlearn_core.types import Component, ProgressCallback

if TYPE_CHECKING:
    import torch

    from splitlearn_core.build.component import ComponentModel
    from splitlearn_core.loading import LoadOptions, OpenModel
    from splitlearn_core.pipeline import SplitCausalLM
    from splitlearn_core.quickstart import SplitModel


@dataclass(frozen=True, slots=True)
class SavedComponent:
    """One saved component: its folder, and what its manifest says."""

    folder: Path
    manifest: Manifest


@dataclass(frozen=True, slots=True)
class SplitDirectory:
    """Saved components, by name."""

    path: Path
    components: Mapping[Component, SavedComponent]

    @classmethod
    def open(cls, *directories: str | os.PathLike[str]) -> SplitDirectory:
        """Read the manifests of a directory of components, of one component, or of several such.

        Raises:
            MissingFileError: There is no manifest.
            InvalidCheckpointError: A manifest is not sound, or lies about its folder.
            ConfigurationError: Two directories hold the same component.
        """
        found: dict[Component, SavedComponent] = {}
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
        ordered = {component: found[component] for component in Component if component in found}
        return cls(user_path(directories[0]), ordered)

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
    return bool(entries) and all(entry.name in set(Component) and (entry / MANIFEST).is_file() for entry in entries)


def holds_components(path: str | os.PathLike[str]) -> bool:
    """Say whether a path is a directory of saved components, or of one."""
    folder = user_path(path)
    return any((each / MANIFEST).is_file() for each in (folder, *(folder / name for name in Component)))


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of one saved component; raises like :meth:`SplitDirectory.open`."""
    path = folder / MANIFEST
    if not stat.S_ISREG(path.lstat().st_mode):
        raise InvalidCheckpointError(f"{path} is no plain file", hint="copy the component itself, not a link to it")
    with open_regular(path) as file:
        return parse_manifest(file.read(MAX_MANIFEST_BYTES + 1), str(path))


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


@naming_foreign
def load_component(
    directory: str | os.PathLike[str],
    component: str | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    strategy: str = "auto",
    attn_implementation: str | None = None,
    verify: bool = False,
    progress: ProgressCallback | Literal[False] | None = None,
) -> ComponentModel:
    """Load a saved component; bit-equal to what :func:`load_split_model` makes of the source.

    Args:
        directory: What :func:`save_split` made, or the folder of one component in it.
        component: ``bottom``, ``trunk`` or ``top``; may be left out where there is only one.
        device, strategy, attn_implementation, progress: As in :func:`load_split_model`.
        dtype: ``auto`` for what the source loads as.
        verify: Read all files first and compare their hashes with the manifest.

    Raises:
        MissingFileError: There is no such component.
        InvalidCheckpointError: The files are not those that were saved.
    """
    saved = _choose(SplitDirectory.open(directory), component)
    return load_saved([saved], device, dtype, strategy, attn_implementation, verify=verify, progress=progress)[
        saved.manifest.component
    ]


@naming_foreign
def load_split_directory(
    directory: str | os.PathLike[str],
    *others: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    strategy: str = "auto",
    attn_implementation: str | None = None,
    verify: bool = False,
    progress: ProgressCallback | Literal[False] | None = None,
) -> SplitModel:
    """Load all saved components that are there; a part that is not is None.

    Args:
        directory: What :func:`save_split` made, or the folder of one component.
        others: Further ones, where the components lie apart.
        device, dtype, strategy, attn_implementation, verify, progress: As in :func:`load_component`.

    Raises:
        ConfigurationError: They do not belong together; both sides are named.
        CheckpointError: As there.
    """
    split = SplitDirectory.open(directory, *others)
    problems = split.mismatches()
    if problems:
        raise ConfigurationError(
            f"these components do not belong together: {listed(problems, '; ', limit=SENTENCE)}",
            hint="load components of one source and one split",
        )
    loaded = load_saved(
        list(split.components.values()),
        device,
        dtype,
        strategy,
        attn_implementation,
        verify=verify,
        progress=progress,
    )
    from splitlearn_core.quickstart import SplitModel

    return SplitModel(*(loaded.get(component) for component in Component))


def load_pipeline(
    directory: str | os.PathLike[str], dtype: str | Mapping[str, str], options: LoadOptions
) -> tuple[SplitCausalLM, OpenModel]:
    """Load all three saved components as one generation model, and open the folder that has the tokenizer.

    Raises:
        ConfigurationError: Components are missing, or an option is for checkpoints alone.
    """
    from splitlearn_core.loading import open_model
    from splitlearn_core.pipeline import SplitCausalLM

    split = SplitDirectory.open(directory)
    missing = [str(component) for component in Component if component not in split.components]
    problems = [f"the {name} is missing" for name in missing]
    if not isinstance(dtype, str) or options.device_map is not None or options.max_memory:
        problems.append("saved components take one dtype and one device here")
    if problems:
        raise ConfigurationError(
            f"{directory} cannot be run as one model: {listed(problems, '; ', limit=SENTENCE)}",
            hint="give a directory with bottom, trunk and top, or load each with load_component",
        )
    parts = load_split_directory(
        directory,
        device=options.device,
        dtype=str(dtype),
        strategy=options.strategy,
        attn_implementation=options.attn_implementation,
    )
    components: tuple[Any, ...] = parts
    return SplitCausalLM(*components), open_model(split.components[Component.BOTTOM].folder)


def _tie(bottom: ComponentModel, top: ComponentModel) -> None:
    """Let embedding and head be one parameter where the configuration ties them, as one load would."""
    from splitlearn_core.build.assemble import tie_if_equal

    family, origin = bottom.family, bottom.origin
    if (bottom.device, bottom.dtype) != (top.device, top.dtype):
        return  # One parameter has one device and one dtype.
    if origin is not None and family.config_value(origin.config, "tie_word_embeddings"):
        embedding = f"{family.base}.{family.embedding}.weight"
        equal = tie_if_equal(bottom, embedding, top, f"{family.head}.weight")
        # A checkpoint may hold both apart, whatever it says; one that holds one tensor for both has one value.
        if not equal and top.origin is not None and origin.keys.get(embedding) in {*origin.ties} & {*top.origin.ties}:
            raise ConfigurationError(
                f"{origin.keys[embedding]} is one tensor for bottom and top, and they hold different values of it",
                hint="give ends that were saved together, or load each alone with load_component",
            )


def load_saved(
    components: list[SavedComponent],
    device: str | torch.device | Mapping[Component, str] = "cpu",
    dtype: str | torch.dtype | Mapping[Component, str] = "auto",
    strategy: str = "auto",
    attn_implementation: str | None = None,
    *,
    verify: bool = False,
    progress: ProgressCallback | Literal[False] | None = None,
) -> dict[Component, ComponentModel]:
    """Load saved components, each by the ordinary path: its folder is a checkpoint that holds a part.

    Device and dtype are one for all, or a mapping that has each component's.
    """
    from splitlearn_core.plan.placement import parse_dtypes
    from splitlearn_core.quickstart import load_split_model
    from splitlearn_core.storage.checking import hash_problems

    problems = [problem for saved in components for problem in file_problems(saved)]
    if verify and not problems:
        problems = [problem for saved in components for problem in hash_problems(saved)]
    if problems:
        raise InvalidCheckpointError(
            f"{len(problems)} files are not as they were saved: {listed(problems, '; ', limit=SENTENCE)}",
            hint="copy the component anew, or save it again",
        )
    loaded = {}
    for saved in components:
        origin = saved.manifest.origin
        named = parse_dtypes(dtype, (origin.component,))[origin.component]
        parts = load_split_model(
            origin.model_type,
            origin.split_points,
            saved.folder,
            parts=(origin.component,),
            device=device[origin.component] if isinstance(device, Mapping) else device,
            dtype=origin.dtype if named == "auto" else named,
            strategy=strategy,
            attn_implementation=attn_implementation,
            progress=progress,
        )
        model: Any = getattr(parts, origin.component)
        loaded[origin.component] = model
    if {Component.BOTTOM, Component.TOP} <= loaded.keys():
        _tie(loaded[Component.BOTTOM], loaded[Component.TOP])
    return loaded


def _component_folders(directory: Path) -> list[Path]:
    if (directory / MANIFEST).is_file():
        return [directory]
    folders = [directory / name for name in Component if (directory / name / MANIFEST).is_file()]
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


def _choose(found: SplitDirectory, component: str | None) -> SavedComponent:
    if component is None and len(found.components) == 1:
        return next(iter(found.components.values()))
    there = ", ".join(found.components)
    if component is None:
        raise ConfigurationError(f"{found.path} holds {there}", hint="say which component is meant")
    if component not in set(Component):
        raise ConfigurationError(f"there is no component {component!r}", hint=f"choose from {', '.join(Component)}")
    if component not in found.components:
        raise MissingFileError(f"{found.path} holds {there}, and no {component}", hint="name the folder that holds it")
    return found.components[Component(component)]
