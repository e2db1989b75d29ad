"""From an open model to a plan: which tensors, which bytes, for which component."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from splitlearn_core.checkpoint.checkpoint import Checkpoint
from splitlearn_core.checkpoint.manifest import MANIFEST, read_manifest
from splitlearn_core.errors import ConfigurationError, InvalidCheckpointError, TensorMismatchError
from splitlearn_core.loading.opening import OpenModel
from splitlearn_core.plan.keys import KeyTable, map_keys, place_keys, uneven_layers
from splitlearn_core.plan.mismatch import alters_weights, cause_in_names, folded, likely_cause, unexpected_words
from splitlearn_core.plan.placement import AUTO, parse_dtypes
from splitlearn_core.plan.split_points import cut_words, split_layers
from splitlearn_core.plan.splitplan import (
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
from splitlearn_core.types import OPAQUE, SAFETENSORS, Component, LayerRange, Progress, ProgressCallback, TensorInfo

log = logging.getLogger(__name__)


def make_plan(
    model: OpenModel,
    split_points: Sequence[int],
    parts: Iterable[str] | None,
    dtype: str | Mapping[Any, str],
    *,
    fetch: ProgressCallback | None = None,
) -> tuple[SplitPlan, KeyTable]:
    """Plan the asked components from the headers of the shards they need, and of no other.

    Args:
        model: The opened checkpoint.
        split_points: Where to cut.
        parts: The components to plan; None for all.
        dtype: The dtype that is wanted, or one for each component.
        fetch: To plan a load: fetch what is planned, too, reporting here. By default headers alone
            are read, even on the Hub.

    Raises:
        InvalidSplitError: The split points do not cut this model.
        CheckpointError: Files are missing or contradict themselves.
    """
    family, config, checkpoint = model.family, model.config, model.checkpoint
    with _naming(model):
        ranges = split_layers(family, config, split_points)
    names = tuple(ranges)
    wishes = parse_dtypes(dtype, names if parts is None else tuple(parts), names)
    # A load wants weights: without any, asking for the weight map below says what is missing.
    by_config = fetch is None and not (checkpoint.has_weights and checkpoint.is_describable)
    described = tensors_of_config(model) if by_config or checkpoint.quantization else None
    told = None if fetch is None or checkpoint.quantization else logging_downloads(model.name, fetch)
    if told is not None:
        told(Progress("planning"))
        checkpoint.fetch_undescribed(told)
    keys = sorted(checkpoint.weight_map if described is None else described)
    table = _place(model, keys, ranges)
    wanted = sorted({key for component in wishes for key in table.sources[component].values()})
    if told is not None:
        log.info("Planning %s of %s, cut at %s", ", ".join(wishes), model.name, cut_words(split_points))
        if checkpoint.format != SAFETENSORS:
            # They have no headers that could be had alone.
            decides = [] if states_dtype(config) or AUTO not in wishes.values() else [checkpoint.deciding_shard]
            checkpoint.fetch({*checkpoint.shards(wanted), *decides}, told)
    tensors = checkpoint.tensors(wanted) if described is None else described
    if told is not None:
        checkpoint.fetch_tensors(tensors.values(), told)
    dtypes = {
        component: wish if wish != AUTO else default_dtype(checkpoint, config, known=described is None)
        for component, wish in wishes.items()
    }
    with _naming(model):
        plan = SplitPlan(
            model=model.name,
            commit=checkpoint.source.commit,
            model_type=family.model_type,
            split_points=tuple(owned.start for owned in ranges.values())[1:],
            num_layers=ranges[names[0]].total,
            dtype=common_dtype(dtypes.values()),
            source="headers" if described is None else "config",
            components=plan_components(family, config, table, ranges, tensors, dtypes),
            tied=table.tied,
            cut_bytes_per_token=cut_bytes(family, config, dtypes.values()),
            # Of all layers, those of components that were not asked for too: one alone has no neighbours.
            warnings=uneven_layers(
                f"{family.base}.{family.layers}.", (k for held in table.sources.values() for k in held)
            ),
            unexpected=tuple(table.unexpected),
        )
    return plan, table


@contextmanager
def _naming(model: OpenModel) -> Iterator[None]:
    """Name the model in what is said of its numbers by those who know but the numbers."""
    try:
        yield
    except ConfigurationError as error:
        raise type(error)(f"{model.name}: {error.message}", hint=error.hint) from error


def wanted_keys(model: OpenModel, split_points: Sequence[int], parts: Iterable[str] | None) -> list[str]:
    """Return the checkpoint keys that components need, by the weight map alone."""
    table = _place(model, sorted(model.checkpoint.weight_map), split_layers(model.family, model.config, split_points))
    wanted = table.sources if parts is None else parts
    return sorted({key for component in wanted for key in table.sources[component].values()})


def parts_without_layers(model: OpenModel, split_points: Sequence[int]) -> list[str]:
    """Return the components none of whose layers has a tensor in the checkpoint, by the weight map alone."""
    table = _place(model, sorted(model.checkpoint.weight_map), split_layers(model.family, model.config, split_points))
    prefix = f"{model.family.base}.{model.family.layers}."
    return [part for part, held in table.sources.items() if not any(key.startswith(prefix) for key in held)]


def default_dtype(checkpoint: Checkpoint, config: Mapping[str, Any], *, known: bool = True) -> str:
    """Return the dtype that ``from_pretrained`` gives all of a model, however little of it is loaded.

    That is what ``config.json`` states; else what the index states; else the first floating dtype in the
    first weight file.

    Args:
        checkpoint: The weights.
        config: ``config.json``.
        known: Whether the weights can be looked at.
    """
    if states_dtype(config) or not known:
        return resolve_dtype("auto", config, ())
    return resolve_dtype(checkpoint.index_dtype or "auto", config, checkpoint.deciding_tensors())


def refuse_misfit(model: OpenModel, plan: SplitPlan, table: KeyTable, *, strict: bool = False) -> None:
    """Refuse to plan a checkpoint with layers that have no tensors.

    Args:
        model, plan, table: What is planned.
        strict: Refuse tensors too that the model has no place for.

    Raises:
        TensorMismatchError: There are such; all are listed, with the tensors that have no place.
        InvalidCheckpointError: It is one saved component, and others were asked for.
    """
    empty = layers_without_tensors(model.family, plan.components)
    problems = [*table.problems, *(f"missing: every tensor of layer {layer}" for layer in empty)]
    head, top = f"{model.family.head}.", Component.TOP
    if top in (part.component for part in plan.components) and not any(
        name.startswith(head) for name in table.sources[top]
    ):
        problems.append(f"missing: {head}weight ({top})")
    if problems or strict or any(map(alters_weights, table.unexpected)):
        problems += unexpected_words(table.unexpected)
    if problems:
        _refuse_saved(model, plan)
        raise mismatch(model, problems, plan)


def _refuse_saved(model: OpenModel, plan: SplitPlan) -> None:
    """Say that a folder holds one saved component, where others were asked for; raises InvalidCheckpointError."""
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
    from splitlearn_core.build.pretrained import describe_tensors

    infos = describe_tensors(model.family, dict(model.config), model.name, resolve_dtype("auto", model.config, ()))
    if not model.checkpoint.quantization:
        return infos
    return {key: replace(info, format=OPAQUE) for key, info in infos.items()}


def _place(model: OpenModel, keys: Sequence[str], ranges: Mapping[str, LayerRange]) -> KeyTable:
    mapping = registry().map_weight_keys(model.family, model.config, keys) or map_keys(model.family, keys)
    return place_keys(model.family, model.config, mapping, ranges)
