"""From an open model to a plan: which tensors, which bytes, for which component."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from splitlearn_core.checkpoint.checkpoint import Checkpoint
from splitlearn_core.checkpoint.manifest import MANIFEST, read_manifest
from splitlearn_core.errors import ConfigurationError, InvalidCheckpointError, TensorMismatchError
from splitlearn_core.family import ModelFamily
from splitlearn_core.loading.opening import OpenModel
from splitlearn_core.plan.conversions import stored_targets
from splitlearn_core.plan.keys import KeyTable, KeyTarget, map_keys, place_keys, uneven_layers
from splitlearn_core.plan.mismatch import alters_weights, cause_in_names, folded, likely_cause, unexpected_keys_message
from splitlearn_core.plan.placement import AUTO, parse_dtypes
from splitlearn_core.plan.quantised import plain_keys
from splitlearn_core.plan.split_points import describe_cuts, split_layers
from splitlearn_core.plan.splitplan import (
    CacheSize,
    SplitPlan,
    common_dtype,
    cut_bytes,
    layers_without_tensors,
    plan_components,
    resolve_dtype,
    states_dtype,
)
from splitlearn_core.plugins.registry import registry
from splitlearn_core.progress import logging_downloads
from splitlearn_core.quoting import SENTENCE, listed
from splitlearn_core.types import OPAQUE, Component, LayerRange, Progress, ProgressCallback, TensorInfo

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PlannedLoad:
    """A planned load, none of whose files need to be on this machine yet."""

    split: SplitPlan
    #: The component and module of each tensor of the checkpoint.
    table: KeyTable


@dataclass(frozen=True, slots=True)
class FetchedLoad(PlannedLoad):
    """A planned load whose tensors are on this machine."""

    #: Shard -> its path.
    paths: Mapping[str, Path]


def make_plan(
    model: OpenModel, split_points: Sequence[int], parts: Iterable[str] | None, dtype: str | Mapping[Any, str]
) -> PlannedLoad:
    """Plan components from the headers of the shards they need, and of no others; no weights are fetched.

    If the headers cannot be read, or there are no weights, the tensors are derived from ``config.json``.

    Args:
        model: The opened checkpoint.
        split_points: The first layer of each component but the first.
        parts: The components to plan; None for all.
        dtype: The requested dtype, or one for each component.

    Raises:
        InvalidSplitError: The split points do not cut this model.
        CheckpointError: Files are missing or contradict themselves.
    """
    ranges, dtypes = _ranges_and_dtypes(model, split_points, parts, dtype)
    checkpoint = model.checkpoint
    from_headers = checkpoint.has_weights and checkpoint.is_describable and not checkpoint.is_opaque
    return _plan(model, ranges, dtypes, from_headers=from_headers)


def plan_and_fetch(
    model: OpenModel,
    split_points: Sequence[int],
    parts: Iterable[str] | None,
    dtype: str | Mapping[Any, str],
    progress: ProgressCallback,
) -> FetchedLoad:
    """Take the steps from an open model to what can be loaded: :func:`fetch_headerless`, plan, :func:`fetch`.

    Raises:
        InvalidSplitError, CheckpointError: As :func:`make_plan`; and there are no weights.
    """
    ranges, dtypes = _ranges_and_dtypes(model, split_points, parts, dtype)
    opaque = model.checkpoint.is_opaque
    if not opaque:
        progress(Progress("planning"))
        fetch_headerless(model, ranges, dtypes, progress)
        log.info("Planning %s of %s, cut at %s", ", ".join(dtypes), model.name, describe_cuts(split_points))
    # Without any weights, the weight map says what is missing.
    return fetch(model, _plan(model, ranges, dtypes, from_headers=not opaque), progress)


def fetch_headerless(
    model: OpenModel, ranges: Mapping[str, LayerRange], dtypes: Mapping[str, str], progress: ProgressCallback
) -> None:
    """Fetch the weight files that planning must read completely: those whose headers cannot be fetched alone."""
    checkpoint = model.checkpoint
    if not checkpoint.has_weights or checkpoint.headers_are_served:
        return
    report = logging_downloads(model.name, progress)
    checkpoint.fetch_headerless_files(report)
    table = _place(model, sorted(checkpoint.weight_map), ranges)
    decides_dtype = AUTO in dtypes.values() and not states_dtype(model.config)
    shards = checkpoint.shards(_keys(table, dtypes))
    checkpoint.fetch({*shards, *([checkpoint.deciding_shard] if decides_dtype else [])}, report)


def fetch(model: OpenModel, plan: PlannedLoad, progress: ProgressCallback) -> FetchedLoad:
    """Fetch the planned tensors that are not on this machine.

    Raises:
        CheckpointError: They cannot be fetched.
    """
    paths = model.checkpoint.fetch_tensors(plan.split.infos, logging_downloads(model.name, progress))
    return FetchedLoad(plan.split, plan.table, paths)


def _ranges_and_dtypes(
    model: OpenModel, split_points: Sequence[int], parts: Iterable[str] | None, dtype: str | Mapping[Any, str]
) -> tuple[dict[str, LayerRange], dict[str, str]]:
    """Return the layers of every component, and the requested dtype of each that is to be planned."""
    with _naming(model):
        ranges = split_layers(model.family, model.config, split_points)
    names = tuple(ranges)
    return ranges, parse_dtypes(dtype, names if parts is None else tuple(parts), names)


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Collect no garbage meanwhile: a plan of tens of thousands of tensors makes many objects, and none in cycles."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@without_garbage_collection()
def _plan(
    model: OpenModel, ranges: Mapping[str, LayerRange], requested: Mapping[str, str], *, from_headers: bool
) -> PlannedLoad:
    family, config, checkpoint = model.family, model.config, model.checkpoint
    described = None if from_headers else tensors_of_config(model)
    table = _place(model, sorted(checkpoint.weight_map if described is None else described), ranges)
    tensors = checkpoint.tensors(_keys(table, requested)) if described is None else described
    known = from_headers and not checkpoint.quantization
    dtypes = {
        component: dtype if dtype != AUTO else default_dtype(checkpoint, config, known=known)
        for component, dtype in requested.items()
    }
    with _naming(model):
        split = SplitPlan(
            model=model.name,
            commit=checkpoint.source.commit,
            model_type=family.model_type,
            split_points=tuple(layers.start for layers in ranges.values())[1:],
            num_layers=next(iter(ranges.values())).total,
            dtype=common_dtype(dtypes.values()),
            source="headers" if from_headers else "config",
            components=plan_components(
                family,
                config,
                table,
                ranges,
                tensors,
                dtypes,
                _in_float32(family, config),
                _cache_sizes(family, config),
            ),
            tied=table.tied,
            cut_bytes_per_token=cut_bytes(family, config, dtypes.values(), ranges.values()),
            # Of all layers, also those of components that are not planned: one alone has no neighbours.
            warnings=uneven_layers(
                f"{family.base}.{family.layers}.",
                # Without the part after "#", which names a source of the tensor.
                (name.partition("#")[0] for sources in table.sources.values() for name in sources),
            ),
            unexpected=tuple(table.unexpected),
        )
    return PlannedLoad(split, table)


def _in_float32(family: ModelFamily, config: Mapping[str, Any]) -> Callable[[str, Collection[str]], Container[str]]:
    """Return a function to the module keys that transformers keeps in float32 in a model of a narrower dtype."""
    if not family.transformers_tables:
        return lambda dtype, names: ()

    def kept(dtype: str, names: Collection[str]) -> Container[str]:
        from splitlearn_core.build.conversion_tables import names_in_float32

        return names_in_float32(family, config, dtype, names)

    return kept


def _cache_sizes(family: ModelFamily, config: Mapping[str, Any]) -> Callable[[str], Sequence[CacheSize]] | None:
    """Return a function to the sizes of each layer's cache in a dtype, where ``config.json`` does not give them."""
    if not family.measured_cache:
        return None

    def sizes(dtype: str) -> Sequence[CacheSize]:
        from splitlearn_core.build.cache_sizes import layer_cache_sizes

        return layer_cache_sizes(family, config, dtype)

    return sizes


@contextmanager
def _naming(model: OpenModel) -> Iterator[None]:
    """Name the model in errors of functions that know only its configuration."""
    try:
        yield
    except (ConfigurationError, TensorMismatchError) as error:
        raise type(error)(f"{model.name}: {error.message}", hint=error.hint) from error


def wanted_keys(model: OpenModel, split_points: Sequence[int], parts: Iterable[str] | None) -> list[str]:
    """Return the checkpoint keys that components need, by the weight map alone."""
    table = _place(model, sorted(model.checkpoint.weight_map), split_layers(model.family, model.config, split_points))
    return _keys(table, table.sources if parts is None else parts)


def _keys(table: KeyTable, components: Iterable[str]) -> list[str]:
    return sorted({key for component in components for key in table.sources[component].values()})


def parts_without_layers(model: OpenModel, split_points: Sequence[int]) -> list[str]:
    """Return the components none of whose layers has a tensor in the checkpoint, by the weight map alone."""
    table = _place(model, sorted(model.checkpoint.weight_map), split_layers(model.family, model.config, split_points))
    prefix = f"{model.family.base}.{model.family.layers}."
    return [part for part, names in table.sources.items() if not any(name.startswith(prefix) for name in names)]


def default_dtype(checkpoint: Checkpoint, config: Mapping[str, Any], *, known: bool = True) -> str:
    """Return the dtype that ``from_pretrained`` gives the whole model, even if only a part is loaded.

    That is what ``config.json`` states; else what the index states; else the first floating dtype in the
    first weight file.

    Args:
        checkpoint: The weights.
        config: ``config.json``.
        known: Whether the weights can be read.
    """
    if states_dtype(config) or not known:
        return resolve_dtype("auto", config, ())
    return resolve_dtype(checkpoint.index_dtype or "auto", config, checkpoint.deciding_tensors())


def refuse_misfit(model: OpenModel, planned: PlannedLoad, *, strict: bool = False) -> None:
    """Refuse a checkpoint with layers that have no tensors.

    Args:
        model, planned: What is planned.
        strict: Also refuse tensors that the model has no place for.

    Raises:
        TensorMismatchError: All of them are listed, with the tensors that have no place.
        InvalidCheckpointError: It is one saved component, and others were requested.
    """
    plan, table = planned.split, planned.table
    empty = layers_without_tensors(model.family, plan.components)
    problems = [*table.problems, *(f"missing: every tensor of layer {layer}" for layer in empty)]
    head, top = f"{model.family.head}.", Component.TOP
    if top in (part.component for part in plan.components) and not any(
        name.startswith(head) for name in table.sources[top]
    ):
        problems.append(f"missing: {head}weight ({top})")
    if problems or strict or any(map(alters_weights, table.unexpected)):
        problems += unexpected_keys_message(table.unexpected)
    if problems:
        _refuse_saved(model, plan)
        raise mismatch(model, problems, plan)


def _refuse_saved(model: OpenModel, plan: SplitPlan) -> None:
    """Raise InvalidCheckpointError if the folder holds one saved component, and others were requested."""
    path = model.checkpoint.optional_file(MANIFEST)
    if path is None:
        return
    saved = read_manifest(path.parent).component
    if tuple(part.component for part in plan.components) != (saved,):
        raise InvalidCheckpointError(
            f"{path.parent} is a saved {saved}, and not a whole model",
            hint=f"ask for the {saved} alone, or load it with load_component; splitlearn verify checks it",
        )


def mismatch(model: OpenModel, problems: Sequence[str], plan: SplitPlan) -> TensorMismatchError:
    keys = model.checkpoint.weight_map if plan.source == "headers" else ()
    return TensorMismatchError(
        f"the tensors of {model.name} are not those of a {model.family.model_type} model; "
        f"{len(problems)} are wrong:\n  " + listed(folded(problems), "\n  ", most=20, limit=SENTENCE),
        hint=cause_in_names(model.family, keys, plan.infos)
        or likely_cause(problems, model.family.model_type, model.family.head),
    )


def tensors_of_config(model: OpenModel) -> dict[str, TensorInfo]:
    """Describe the tensors that ``config.json`` implies, for a checkpoint without weights."""
    from splitlearn_core.build.configuration import describe_tensors

    infos = describe_tensors(model.family, dict(model.config), model.name, resolve_dtype("auto", model.config, ()))
    if not model.checkpoint.is_opaque:
        return infos
    return {key: replace(info, format=OPAQUE) for key, info in infos.items()}


def _place(model: OpenModel, keys: Sequence[str], ranges: Mapping[str, LayerRange]) -> KeyTable:
    quantised = model.checkpoint.quantised_tensors
    mapping = key_targets(model.family, model.config, plain_keys(keys, quantised))
    return place_keys(model.family, model.config, stored_targets(mapping, quantised) if quantised else mapping, ranges)


def key_targets(family: ModelFamily, config: Mapping[str, Any], keys: Sequence[str]) -> Mapping[str, KeyTarget]:
    """Return where each key of a checkpoint goes: as the plugin says, or transformers' table, or core's rules."""
    mapping: Mapping[str, KeyTarget] | None = registry().map_weight_keys(family, config, keys)
    if mapping is None and family.transformers_tables:
        from splitlearn_core.build.conversion_tables import targets_by_tables

        mapping = targets_by_tables(family, config, keys)
    return mapping or map_keys(family, keys)
