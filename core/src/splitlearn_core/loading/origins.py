"""Where components come from, so that they can be told from those of another model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from splitlearn_core.checkpoint.partial import grows
from splitlearn_core.checkpoint.sample import sample_values
from splitlearn_core.errors import (
    InvalidCheckpointError,
)
from splitlearn_core.loading.opening import OpenModel
from splitlearn_core.origin import Origin, fingerprint
from splitlearn_core.plan.names import KeyTable
from splitlearn_core.plan.splitplan import (
    ComponentPlan,
    SplitPlan,
)
from splitlearn_core.plugins.registry import registry
from splitlearn_core.storage.directory import read_manifest
from splitlearn_core.storage.manifest import MANIFEST
from splitlearn_core.types import Component


def origins_of(
    model: OpenModel, plan: SplitPlan, table: KeyTable, paths: Mapping[str, Path]
) -> dict[Component, Origin]:
    """Say where the planned components come from: from the model, or, of a saved component, from its source.

    Args:
        model, plan, table: What is loaded.
        paths: Where its shards are.
    """
    path = model.checkpoint.optional_file(MANIFEST)
    if path is not None:
        saved = read_manifest(path.parent).origin
        _check_saved(saved, plan, path)
        return {saved.component: replace(saved, keys=table.sources[saved.component], config=model.config)}
    entry = registry().plugin(plan.model_type).entry
    samples: dict[str, str] = {}
    for name in sorted({info.shard for info in plan.infos} & paths.keys()):
        # Of a file that is here in parts, nothing but its commit tells.
        if not grows(paths[name]):
            samples[name] = sample_values(paths[name])
    return {
        part.component: Origin(
            model=model.checkpoint.source.model,
            commit=plan.commit,
            fingerprint=fingerprint(model.config, model.checkpoint.weight_map),
            model_type=plan.model_type,
            plugin=entry.distribution,
            plugin_version=entry.version,
            split_points=plan.split_points,
            num_layers=plan.num_layers,
            component=part.component,
            layers=(part.layers.start, part.layers.end),
            dtype=part.dtype,
            ties=tuple(key for key in table.tied if key in table.sources[part.component].values()),
            keys=table.sources[part.component],
            samples={name: samples[name] for name in sorted(_shards(part) & samples.keys())},
            config=model.config,
        )
        for part in plan.components
    }


def _shards(part: ComponentPlan) -> set[str]:
    return {tensor.info.shard for tensor in part.tensors}


def _check_saved(saved: Origin, plan: SplitPlan, path: Path) -> None:
    """Refuse to take from a saved component what it is not."""
    asked = ", ".join(part.component for part in plan.components)
    found = (asked, plan.split_points, plan.num_layers, plan.model_type)
    if found != (saved.component, saved.split_points, saved.num_layers, saved.model_type):
        raise InvalidCheckpointError(
            f"{path.parent} holds the {saved.component} of a {saved.model_type} model of {saved.num_layers} layers, "
            f"cut at {saved.split_points}; asked for was the {asked} of a {plan.model_type} model of "
            f"{plan.num_layers} layers, cut at {plan.split_points}",
            hint="load it with load_component, which asks for what is there",
        )
