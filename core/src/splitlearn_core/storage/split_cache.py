"""A directory as the cache of one split of one model: checked, then loaded instead of the model."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from splitlearn_core.arguments import user_path
from splitlearn_core.checkpoint.manifest import holds_components
from splitlearn_core.errors import ConfigurationError
from splitlearn_core.plan.placement import parse_dtypes
from splitlearn_core.plan.splitplan import parse_parts
from splitlearn_core.plugins.registry import registry
from splitlearn_core.storage.directory import SplitDirectory
from splitlearn_core.storage.saved_components import load_saved
from splitlearn_core.types import THREE, ProgressCallback

if TYPE_CHECKING:
    from splitlearn_core.build.component import ComponentModel
    from splitlearn_core.loading.options import LoadOptions
    from splitlearn_core.split_model import SplitModel

log = logging.getLogger(__name__)


def create_kept(
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
    name = model if model is not None or model_type is None else registry().family(model_type).default_model
    cached, reason = find_kept(directory, model_type, name or "", hub["revision"], split_points, requested)
    if cached is not None:
        log.info("Loading from %s, where this split of %s is kept", directory, name)
        components = load_kept(cached, dtypes, options, progress)
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


def find_kept(
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


def load_kept(
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
