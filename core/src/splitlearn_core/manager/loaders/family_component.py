"""Loading one component of a family's model, through the plugin of the family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitlearn_core.errors import ConfigurationError
from splitlearn_core.loading.load import import_builders, load_components
from splitlearn_core.loading.opening import OpenModel, open_model
from splitlearn_core.loading.options import LoadOptions, check_options, memory_needed
from splitlearn_core.loading.planning import PlannedLoad, fetch, plan_and_fetch
from splitlearn_core.manager.config import ModelConfig
from splitlearn_core.manager.loaders.loadable import (
    HOST,
    MAPPED,
    LoadPlan,
    ReportProgress,
    Version,
    refuse_changes,
    versions,
)
from splitlearn_core.manager.resources import ledger_of
from splitlearn_core.plan.split_points import names_of_parts
from splitlearn_core.plan.splitplan import parse_parts
from splitlearn_core.types import Progress

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class _Details:
    model: OpenModel
    planned: PlannedLoad
    options: LoadOptions
    files: Mapping[Path, Version]


def plan(config: ModelConfig, report: ReportProgress) -> LoadPlan:
    """Find the files, download missing ones, and compute the memory that loading takes."""
    report(Progress("resolving"))
    if config.component is None or config.split_points is None:
        raise ConfigurationError(
            f"{config.model_id} has no component or no split points", hint="a family's model is loaded in components"
        )
    (component,) = parse_parts(config.component, names_of_parts(config.split_points))
    model = open_model(config.model_path, config.model_type, **hub_options(config))
    options = LoadOptions(config.device, config.strategy, config.attn_implementation, strict=config.strict)
    check_options(model, options)
    fetched = plan_and_fetch(model, config.split_points, (component,), config.dtype, report)
    split = fetched.split
    memory = memory_needed(model, split, options, fetched.paths)
    needs, keeps = {HOST: memory.peak, MAPPED: memory.mapped}, {HOST: memory.kept, MAPPED: memory.mapped}
    if config.device != "cpu":
        ledger, loaded = ledger_of(config.device), split.component(component).loaded_bytes(split.dtype)
        for charge in (needs, keeps):
            charge[ledger] = charge.get(ledger, 0) + loaded
    location = model.checkpoint.folder
    details = _Details(model, fetched, options, versions(fetched.paths.values()))
    return LoadPlan(needs, keeps, str(location), split.dtype, config.device, details)


def load(config: ModelConfig, plan: LoadPlan, report: ReportProgress) -> torch.nn.Module:
    """Build the component and read its weights, completely or not at all."""
    details: _Details = plan.details
    refuse_changes(details.files)

    def report_until_ready(progress: Progress) -> None:
        # It is ready only once it is verified, below.
        if progress.stage != "ready":
            report(progress)

    # Before any bytes are expected, so that importing does not count as stalled reading.
    report(Progress("importing"))
    import_builders(details.model.family)
    (part,) = details.planned.split.components
    options = replace(details.options, on_layer=partial(report, Progress("building", part.component)))
    # A shard may have left the cache since it was planned.
    fetched = fetch(details.model, details.planned, report_until_ready)
    module = load_components(details.model, fetched, options, report_until_ready)[part.component]
    report(Progress("verifying", part.component, part.nbytes, part.nbytes))
    refuse_changes(details.files)
    return module


def hub_options(config: ModelConfig) -> dict[str, Any]:
    """Return the configuration's arguments for the Hub."""
    return {
        "cache_dir": config.cache_dir,
        "revision": config.revision,
        "token": config.token,
        "local_files_only": config.local_files_only,
    }
