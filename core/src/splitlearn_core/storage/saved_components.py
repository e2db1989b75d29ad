"""Load saved components: one, or all of a directory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, cast

from splitlearn_core.arguments import accept_foreign_names
from splitlearn_core.errors import ConfigurationError, InvalidCheckpointError, MissingFileError
from splitlearn_core.quoting import SENTENCE, listed
from splitlearn_core.storage.directory import SavedComponent, SplitDirectory, file_problems
from splitlearn_core.types import Component, ProgressCallback, component_names

if TYPE_CHECKING:
    import torch

    from splitlearn_core.build.component import ComponentModel
    from splitlearn_core.split_model import SplitModel


@accept_foreign_names
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
        directory: The output of :func:`save_split`, or the folder of one component in it.
        component: Its name, ``bottom``, ``trunk`` or ``top`` say; optional if there is only one.
        device, strategy, attn_implementation, progress: As in :func:`load_split_model`.
        dtype: ``auto`` for what the source loads as.
        verify: Read all files first and compare their hashes with the manifest.

    Raises:
        MissingFileError: There is no such component.
        InvalidCheckpointError: The files are not those that were saved.
    """
    split = SplitDirectory.open(directory)
    present = ", ".join(split.components)
    if component is None:
        if len(split.components) > 1:
            raise ConfigurationError(f"{split.path} holds {present}", hint="say which component is meant")
        component = next(iter(split.components))
    if component not in split.names:
        raise ConfigurationError(f"there is no component {component!r}", hint=f"choose from {listed(split.names)}")
    if component not in split.components:
        raise MissingFileError(
            f"{split.path} holds {present}, and no {component}", hint="name the folder that holds it"
        )
    saved = split.components[component]
    return load_saved([saved], device, dtype, strategy, attn_implementation, verify=verify, progress=progress)[
        saved.manifest.component
    ]


@accept_foreign_names
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
    """Load all saved components of a directory; a missing one is None.

    Args:
        directory: The output of :func:`save_split`, or the folder of one component.
        others: Further ones, if the components are in different directories.
        device, dtype, strategy, attn_implementation, verify, progress: As in :func:`load_component`.

    Raises:
        ConfigurationError: The components do not belong together; both sides are named.
        CheckpointError: As in :func:`load_component`.
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
    from splitlearn_core.split_model import split_model

    return cast("SplitModel", split_model(split.names, loaded))


def _tie(bottom: ComponentModel, top: ComponentModel) -> None:
    """Make embedding and head one parameter if the configuration ties them, as loading both at once does."""
    from splitlearn_core.build.assemble import tie_if_equal

    family, origin = bottom.family, bottom.origin
    if (bottom.device, bottom.dtype) != (top.device, top.dtype):
        return  # One parameter has one device and one dtype.
    if origin is not None and family.config_value(origin.config, "tie_word_embeddings"):
        embedding = f"{family.base}.{family.embedding}.weight"
        equal = tie_if_equal(bottom, embedding, top, f"{family.head}.weight")
        # A checkpoint may store two tensors although its configuration ties them; if it stores one, they are equal.
        if not equal and top.origin is not None and origin.keys.get(embedding) in {*origin.ties} & {*top.origin.ties}:
            raise ConfigurationError(
                f"{origin.keys[embedding]} is one tensor for bottom and top, and they hold different values of it",
                hint="give ends that were saved together, or load each alone with load_component",
            )


def load_saved(
    components: list[SavedComponent],
    device: str | torch.device | Mapping[str, str] = "cpu",
    dtype: str | torch.dtype | Mapping[str, str] = "auto",
    strategy: str = "auto",
    attn_implementation: str | None = None,
    *,
    verify: bool = False,
    progress: ProgressCallback | Literal[False] | None = None,
) -> dict[str, ComponentModel]:
    """Load saved components, each with ``load_split_model``: its folder is a partial checkpoint.

    Device and dtype are the same for all, or a mapping by component.
    """
    from splitlearn_core.api import load_split_model
    from splitlearn_core.plan.placement import parse_dtypes
    from splitlearn_core.storage.integrity import hash_problems

    problems = [problem for saved in components for problem in file_problems(saved)]
    if verify and not problems:
        problems = [problem for saved in components for problem in hash_problems(saved)]
    if problems:
        raise InvalidCheckpointError(
            f"{len(problems)} files are not as they were saved: {listed(problems, '; ', limit=SENTENCE)}",
            hint="copy the component again, or save it again",
        )
    loaded = {}
    for saved in components:
        origin = saved.manifest.origin
        all_names = component_names(len(origin.split_points) + 1)
        own_dtype = parse_dtypes(dtype, (origin.component,), all_names)[origin.component]
        parts = load_split_model(
            origin.model_type,
            origin.split_points,
            saved.folder,
            parts=(origin.component,),
            device=device[origin.component] if isinstance(device, Mapping) else device,
            dtype=origin.dtype if own_dtype == "auto" else own_dtype,
            strategy=strategy,
            attn_implementation=attn_implementation,
            progress=progress,
        )
        model: Any = getattr(parts, origin.component)
        loaded[origin.component] = model
    if {Component.BOTTOM, Component.TOP} <= loaded.keys():
        _tie(loaded[Component.BOTTOM], loaded[Component.TOP])
    return loaded


def _choose(split: SplitDirectory, component: str | None) -> SavedComponent:
    if component is None and len(split.components) == 1:
        return next(iter(split.components.values()))
    present = ", ".join(split.components)
    if component is None:
        raise ConfigurationError(f"{split.path} holds {present}", hint="say which component is meant")
    if component not in split.names:
        raise ConfigurationError(f"there is no component {component!r}", hint=f"choose from {listed(split.names)}")
    if component not in split.components:
        raise MissingFileError(
            f"{split.path} holds {present}, and no {component}", hint="name the folder that holds it"
        )
    return split.components[component]
