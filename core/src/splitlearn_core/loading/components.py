"""Carrying a plan out: the stages of a load, in the order of the data."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from splitlearn_core.adapters import apply_adapter
from splitlearn_core.checkpoint.adapter import adapter_in
from splitlearn_core.checkpoint.config import MAX_CONFIG_BYTES
from splitlearn_core.checkpoint.jsonfile import read_object
from splitlearn_core.checkpoint.readahead import read_ahead
from splitlearn_core.checkpoint.strategy import (
    WholeStrategy,
)
from splitlearn_core.errors import (
    InvalidCheckpointError,
)
from splitlearn_core.loading.importing import import_builders
from splitlearn_core.loading.opening import OpenModel
from splitlearn_core.loading.options import LoadOptions, check_options, choose_devices
from splitlearn_core.loading.origins import origins_of
from splitlearn_core.loading.planning import make_plan, mismatch
from splitlearn_core.loading.reading import read_all
from splitlearn_core.loading.reads import check_memory, choose_strategies, read_plans, whole_model
from splitlearn_core.plan.bounds import check_numbers
from splitlearn_core.plan.misfit import alters_weights, unexpected_words, unread_words
from splitlearn_core.plan.names import KeyTable
from splitlearn_core.plan.splitplan import SplitPlan
from splitlearn_core.progress import logging_downloads, passing_through
from splitlearn_core.quoting import reason
from splitlearn_core.types import SAFETENSORS, Component, Progress, ProgressCallback
from splitlearn_core.units import human_bytes

if TYPE_CHECKING:
    from splitlearn_core.build.component import ComponentModel
    from splitlearn_core.pipeline import SplitCausalLM

log = logging.getLogger(__name__)


def load_components(
    model: OpenModel, plan: SplitPlan, table: KeyTable, options: LoadOptions, progress: ProgressCallback
) -> dict[Component, ComponentModel]:
    """Carry a plan out: fetch, build, check, read, assign, tie. All or nothing is returned.

    Raises:
        CheckpointError: There are no weights, or they do not fit the model.
        ConfigurationError: A device or strategy that does not exist.
        InsufficientMemoryError: The planned bytes do not fit into memory.
    """
    started = time.perf_counter()
    devices = choose_devices(plan, options)
    paths = model.checkpoint.fetch_tensors(plan.infos, logging_downloads(model.name, progress))
    origins = origins_of(model, plan, table, paths)
    read_ahead((info for info in plan.infos if info.format == SAFETENSORS), paths)
    progress(Progress("importing"))
    import_builders(model.family)
    from splitlearn_core.build.component import build_component, hf_config
    from splitlearn_core.build.modes import own_modes

    reads = read_plans(plan, paths, devices, whole_model(model, plan, progress))
    strategies = choose_strategies(model, options, reads)
    check_memory(model.name, strategies, reads)
    if any(isinstance(strategy, WholeStrategy) for strategy in strategies.values()):
        model.checkpoint.fetch(model.checkpoint.weight_files(), logging_downloads(model.name, progress))
    built: dict[Component, ComponentModel] = {}
    # As from_pretrained: what is loaded can be trained, and has the same values, wherever the call stands.
    with own_modes(gradients=True):
        for part in plan.components:
            log.info("Building %s, layers %s, of %s", part.component, part.layers, model.name)
            progress(Progress("building", part.component))
            values = _without_cross_attention(model.config, table)
            config = hf_config(model.family, values, model.name, part.dtype, options.attn_implementation)
            built[part.component] = build_component(
                model.family, config, part.component, part.layers, on_layer=options.on_layer
            )
        unread = _check_all(model, plan, table, built, strict=options.strict)
        if unread:
            plan, table = _without(plan, table, unread)
            reads = read_plans(plan, paths, devices, whole_model(model, plan, progress))
            origins = origins_of(model, plan, table, paths)
        _attach_generation_config(model, built.get(Component.TOP))
        for component, origin in origins.items():
            built[component].origin = origin
        with passing_through(progress) as tell:
            read_all(plan, reads, built, strategies, tell)
        _tie_if_equal(built, table)
        if model.checkpoint.has_adapter:
            log.info("Applying the adapter that lies with the weights of %s", model.name)
            apply_adapter(list(built.values()), adapter_in(model.checkpoint.source), widen=False)
    total = sum(read.nbytes for read in reads.values())
    _log_ready(model.name, plan, devices, total, time.perf_counter() - started)
    progress(Progress("ready", None, total, total))
    return built


def load_all(
    model: OpenModel,
    split_points: Sequence[int],
    dtype: str | Mapping[Any, str],
    options: LoadOptions,
    progress: ProgressCallback,
) -> SplitCausalLM:
    """Load all three components as one generation model; raises like :func:`load_components`."""
    check_options(model, options)
    plan, table = make_plan(model, split_points, tuple(Component), dtype, fetch=progress)
    parts = load_components(model, plan, table, options, progress)
    from splitlearn_core.pipeline import SplitCausalLM

    return SplitCausalLM(*(parts[component] for component in Component), mixed_dtypes=isinstance(dtype, Mapping))


def _without_cross_attention(config: Mapping[str, Any], table: KeyTable) -> Mapping[str, Any]:
    """Leave out cross-attention that the checkpoint has no tensors for: a decoder alone never computes it."""
    held = any("cross" in name for names in table.sources.values() for name in names)
    return {**config, "add_cross_attention": False} if config.get("add_cross_attention") and not held else config


def _check_all(
    model: OpenModel, plan: SplitPlan, table: KeyTable, built: Mapping[Component, ComponentModel], *, strict: bool
) -> dict[Component, set[str]]:
    """Report at once all that is wrong with the tensors of the asked components.

    Tensors that the model has no place for are a warning, as in ``from_pretrained``, unless ``strict``.

    Returns:
        The module keys of planned tensors that the components have no place for.
    """
    from splitlearn_core.build.assemble import tensor_problems, unexpected_names

    problems, surplus = list(table.problems), unexpected_words(table.unexpected)
    unread: dict[Component, set[str]] = {}
    keys = set(table.unexpected)
    for part in plan.components:
        planned = {tensor.module_key: tensor.info for tensor in part.tensors}
        names = unexpected_names(built[part.component], planned)
        wanted = {name: info for name, info in planned.items() if name not in names}
        problems += [f"{problem} ({part.component})" for problem in tensor_problems(built[part.component], wanted)]
        surplus += [f"unexpected: {name} {list(planned[name].shape)} ({part.component})" for name in sorted(names)]
        keys.update(planned[name].key for name in names)
        unread |= {part.component: names} if names else {}
    if problems or (surplus and (strict or any(map(alters_weights, keys)))):
        raise mismatch(model, problems + surplus, plan)
    if keys:
        log.warning("%s", unread_words(model.name, model.family.model_type, sorted(keys)))
    return unread


def _without(plan: SplitPlan, table: KeyTable, unread: Mapping[Component, set[str]]) -> tuple[SplitPlan, KeyTable]:
    """Leave tensors out of what is planned, by their module keys."""
    parts = tuple(
        replace(
            part,
            tensors=tuple(t for t in part.tensors if t.module_key not in unread.get(part.component, ())),
        )
        for part in plan.components
    )
    sources = {
        component: {name: key for name, key in held.items() if name not in unread.get(component, ())}
        for component, held in table.sources.items()
    }
    return replace(plan, components=parts), replace(table, sources=sources)


def _attach_generation_config(model: OpenModel, top: ComponentModel | None) -> None:
    """Give the top the generation settings that ``from_pretrained`` would read."""
    path = model.checkpoint.optional_file("generation_config.json") if top is not None else None
    if top is None or path is None:
        return
    check_numbers(read_object(path, MAX_CONFIG_BYTES), str(path))
    from transformers import GenerationConfig

    try:
        top.generation_config = GenerationConfig.from_pretrained(path.parent, local_files_only=True)
    # Its values are checked by transformers' own code, which raises whatever comes of them.
    except Exception as error:
        raise InvalidCheckpointError(
            f"{path} is no sound generation configuration: {reason(error)}",
            hint="correct it, or remove it for the defaults",
        ) from error


def _tie_if_equal(built: Mapping[Component, ComponentModel], table: KeyTable) -> None:
    """Tie embedding and head that config ties but the file holds apart, as transformers does."""
    if table.apart is None or not {Component.BOTTOM, Component.TOP} <= built.keys():
        return
    from splitlearn_core.build.assemble import tie_if_equal

    bottom, top = built[Component.BOTTOM], built[Component.TOP]
    if (bottom.device, bottom.dtype) != (top.device, top.dtype):
        return  # One parameter has one device and one dtype.
    if not tie_if_equal(bottom, table.apart[0], top, table.apart[1]):
        log.warning("%s and %s are tied by config.json but differ in the checkpoint; both are kept", *table.apart)


def _log_ready(name: str, plan: SplitPlan, devices: Mapping[Component, str], nbytes: int, seconds: float) -> None:
    parts = ", ".join(f"{part.component} on {devices[part.component]} in {part.dtype}" for part in plan.components)
    log.info("Ready: %s of %s; %s in %.2f s", parts, name, human_bytes(nbytes), seconds)
