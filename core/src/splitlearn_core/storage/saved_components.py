"""Load saved components: one, all of a directory, or a split that a directory caches."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from splitlearn_core.arguments import accept_foreign_names, user_path
from splitlearn_core.checkpoint.manifest import holds_components
from splitlearn_core.errors import ConfigurationError, InvalidCheckpointError, MissingFileError
from splitlearn_core.plan.placement import parse_dtypes
from splitlearn_core.plan.splitplan import parse_parts
from splitlearn_core.plugins.registry import registry
from splitlearn_core.quoting import SENTENCE, listed
from splitlearn_core.storage.directory import SavedComponent, SplitDirectory, file_problems, hash_problems
from splitlearn_core.types import THREE, Component, ProgressCallback, component_names

if TYPE_CHECKING:
    import torch

    from splitlearn_core.build.component import ComponentModel
    from splitlearn_core.loading.options import LoadOptions
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
        component: Its name, such as ``bottom``, ``trunk`` or ``top``; optional if there is only one.
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


log = logging.getLogger(__name__)


def create_cached(
    directory: Path,
    model_type: str | None,
    model: str | os.PathLike[str] | None,
    split_points: tuple[int, int],
    parts: Sequence[str],
    loading: Mapping[str, Any],
    hub: Mapping[str, Any],
    *,
    save: bool,
) -> SplitModel:
    """Load a split from a cache directory, or else from its source; then save it there if requested.

    Args:
        directory: The cache directory.
        model_type, model, split_points, parts: As in :func:`load_split_model`.
        loading: All its arguments on how to load.
        hub: Its arguments for the Hub.
        save: Save a split that had to be loaded from the source.

    Raises:
        ConfigurationError: The directory to save into holds another split, or something else.
        SplitLearnError: As :func:`load_split_model` and :func:`save_split`.
    """
    from splitlearn_core.api import load_options, load_split_model
    from splitlearn_core.split_model import SplitModel
    from splitlearn_core.storage.saving import check_target, save_split

    remaining = dict(loading)
    requested, progress = parse_parts(parts), remaining.pop("progress")
    dtypes = parse_dtypes(remaining.pop("dtype"), requested)
    options = load_options(requested, **remaining)
    name = model if model is not None or model_type is None else registry().packaged_family(model_type).default_model
    cached, reason = find_cached(directory, model_type, name or "", hub["revision"], split_points, requested)
    if cached is not None:
        log.info("Loading from %s, where this split of %s is kept", directory, name)
        components = load_cached(cached, dtypes, options, progress)
        return SplitModel(*(components.get(component) for component in THREE))
    if save and holds_components(directory):
        raise ConfigurationError(
            f"{directory} holds another split than the one to be saved there: {reason}",
            hint="choose another storage_path, or remove its contents",
        )
    if save:
        check_target(directory, overwrite=False)
    elif directory.exists():
        log.warning("%s does not hold this split: %s. It is loaded from its source", directory, reason)
    loaded: SplitModel = load_split_model(model_type, split_points, model, parts=parts, **loading, **hub)
    if save:
        log.info("Saving %s of %s to %s", ", ".join(requested), name, directory)
        save_split(
            name or "", directory, split_points, parts=requested, model_type=model_type, progress=progress, **hub
        )
    return loaded


def find_cached(
    directory: Path,
    model_type: str | None,
    model: str | os.PathLike[str],
    revision: str | None,
    split_points: tuple[int, int],
    parts: Sequence[str],
) -> tuple[SplitDirectory | None, str]:
    """Look a split up in its cache directory, without access to the source.

    A split is identified by the name of its source, by the commit if ``revision`` is one, and by its
    split points. Another kind of revision, such as a branch, may have moved on and never matches.

    Returns:
        The split, of the requested parts only, or None and the reason why it does not match.
    """
    if not directory.is_dir() or not holds_components(directory):
        return None, "it holds no saved components"
    cached, name = SplitDirectory.open(directory), os.fspath(model)
    missing = [str(part) for part in parts if part not in cached.components]
    reasons = [f"it has no {', '.join(missing)}"] if missing else []
    for saved in cached.components.values():
        origin = saved.manifest.origin
        same_name = origin.model == name or (
            user_path(name).is_dir() and user_path(origin.model).absolute() == user_path(name).absolute()
        )
        if not same_name or revision not in (None, origin.commit):
            commit = f"@{origin.commit}" if origin.commit else ""
            reasons.append(f"its {origin.component} is that of {origin.model}{commit}")
        if model_type not in (None, origin.model_type):
            reasons.append(f"its {origin.component} is a {origin.model_type}")
        if origin.split_points != split_points:
            reasons.append(f"its {origin.component} was cut at {origin.split_points}")
        if saved.manifest.own_values:
            reasons.append(f"its {origin.component} has values of its own, not the source's")
    reasons += cached.mismatches()
    if reasons:
        return None, "; ".join(reasons)
    return replace(cached, components={part: cached.components[part] for part in parts}), ""


def load_cached(
    cached: SplitDirectory,
    dtypes: Mapping[str, str],
    options: LoadOptions,
    progress: ProgressCallback | Literal[False] | None,
) -> dict[str, ComponentModel]:
    """Load a cached split, each component on its device and in its dtype; raises as a load from the source."""
    from splitlearn_core.api import plan_split
    from splitlearn_core.loading.options import choose_devices

    plans = []
    for component, saved in cached.components.items():
        origin = saved.manifest.origin
        dtype: Any = dtypes[component]
        plans.append(
            plan_split(
                saved.folder,
                origin.split_points,
                model_type=origin.model_type,
                parts=(component,),
                dtype=origin.dtype if dtype == "auto" else dtype,
            )
        )
    devices = choose_devices(replace(plans[0], components=tuple(plan.components[0] for plan in plans)), options)
    return load_saved(
        list(cached.components.values()),
        devices,
        dtypes,
        options.strategy,
        options.attn_implementation,
        progress=progress,
    )
