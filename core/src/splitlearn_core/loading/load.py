"""Load a fetched plan: build, check, read, assign and tie, in the order of the data."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitlearn_core.adapters.adapter_files import adapter_in
from splitlearn_core.adapters.peft_models import apply_adapter
from splitlearn_core.checkpoint.config_json import MAX_CONFIG_BYTES, read_object
from splitlearn_core.checkpoint.files import GENERATION_CONFIG
from splitlearn_core.checkpoint.hub.partial_file import grows
from splitlearn_core.checkpoint.manifest import MANIFEST, read_manifest
from splitlearn_core.checkpoint.origin import Origin, fingerprint, sample_values
from splitlearn_core.checkpoint.prefetch import read_ahead
from splitlearn_core.errors import InvalidCheckpointError
from splitlearn_core.family import ModelFamily
from splitlearn_core.loading.opening import OpenModel
from splitlearn_core.loading.options import (
    LoadOptions,
    check_memory,
    choose_devices,
    choose_strategies,
    read_plans,
    whole_model,
)
from splitlearn_core.loading.planning import FetchedLoad, PlannedLoad, mismatch
from splitlearn_core.loading_strategy import LoadingStrategy, ReadPlan
from splitlearn_core.plan.bounds import check_numbers
from splitlearn_core.plan.keys import KeyTable
from splitlearn_core.plan.mismatch import alters_weights, unexpected_keys_message, unread_keys_message
from splitlearn_core.plan.splitplan import ComponentPlan, SplitPlan
from splitlearn_core.plugins.registry import registry
from splitlearn_core.progress import logging_downloads, passing_through
from splitlearn_core.quoting import reason
from splitlearn_core.readers.mapped import WholeStrategy
from splitlearn_core.readers.selection import read_checked
from splitlearn_core.types import SAFETENSORS, Component, Progress, ProgressCallback, TensorInfo, human_bytes

if TYPE_CHECKING:
    from splitlearn_core.build.component import ComponentModel

log = logging.getLogger(__name__)


def import_builders(family: ModelFamily) -> None:
    """Import torch, and of transformers what the family needs; takes seconds the first time."""
    with collection_paused():
        from splitlearn_core.build.configuration import architecture_class

        architecture_class(family)


@contextmanager
def collection_paused() -> Iterator[None]:
    """Disable the cyclic garbage collector: it takes a tenth of the time of importing transformers."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def origins_of(model: OpenModel, planned: PlannedLoad, paths: Mapping[str, Path]) -> dict[str, Origin]:
    """Return the origin of each planned component: the model, or the source of a saved component.

    Args:
        model, planned: The model, and the planned load.
        paths: The paths of its shards.
    """
    plan, table = planned.split, planned.table
    path = model.checkpoint.optional_file(MANIFEST)
    if path is not None:
        saved = read_manifest(path.parent).origin
        _check_saved(saved, plan, path)
        return {saved.component: replace(saved, keys=table.sources[saved.component], config=model.config)}
    entry = registry().plugin(plan.model_type).entry
    samples: dict[str, str] = {}
    for name in sorted({info.shard for info in plan.infos} & paths.keys()):
        # A partial file cannot be sampled; its commit identifies it.
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
            samples={
                name: samples[name] for name in sorted({tensor.info.shard for tensor in part.tensors} & samples.keys())
            },
            config=model.config,
        )
        for part in plan.components
    }


def _check_saved(saved: Origin, plan: SplitPlan, path: Path) -> None:
    """Refuse to load a saved component as another one."""
    requested = ", ".join(part.component for part in plan.components)
    if (requested, plan.split_points, plan.num_layers, plan.model_type) != (
        saved.component,
        saved.split_points,
        saved.num_layers,
        saved.model_type,
    ):
        raise InvalidCheckpointError(
            f"{path.parent} holds the {saved.component} of a {saved.model_type} model of {saved.num_layers} layers, "
            f"cut at {saved.split_points}; requested was the {requested} of a {plan.model_type} model of "
            f"{plan.num_layers} layers, cut at {plan.split_points}",
            hint="load it with load_component, which takes what is there",
        )


def read_all(
    plan: SplitPlan,
    reads: Mapping[str, ReadPlan],
    built: Mapping[str, ComponentModel],
    strategies: Mapping[str, LoadingStrategy],
    progress: ProgressCallback,
) -> None:
    from splitlearn_core.build.assemble import assign_tensor, finish

    count = _Count(progress, sum(read.nbytes for read in reads.values()))
    assigned: dict[tuple[str, str, str], Any] = {}
    for part in plan.components:
        component, read, strategy = part.component, reads[part.component], strategies[part.component]
        own = {planned.module_key for planned in read.tensors}
        where = ", ".join(sorted({str(path.parent) for path in read.paths.values()}))
        files, size = len(read.by_shard()), human_bytes(read.nbytes)
        log.info("Loading weights of %s: %s of %d files in %s (%s)", component, size, files, where, strategy.name)
        modules = dict(built[component].named_modules())
        count.begin(component, read)
        for planned, tensor in read_checked(strategy, replace(read, on_bytes=count.chunk)):
            assigned[planned.info.key, read.device, read.dtype] = assign_tensor(modules, planned.module_key, tensor)
            count.tensor(planned.info)
        for planned in part.tensors:
            if planned.module_key not in own:
                assign_tensor(modules, planned.module_key, assigned[planned.info.key, read.device, read.dtype])
        finish(built[component], read.device)


class _Count:
    """Bytes read so far, reported by tensor and, within large ones, by chunk. The count never decreases."""

    def __init__(self, progress: ProgressCallback, total: int) -> None:
        self._progress = progress
        self._total = total
        self._component: str | None = None
        #: Shards of the tensors that are not read yet, in the order of the files.
        self._coming: Iterator[str] = iter(())
        self._shard = ""
        #: Bytes of complete tensors, bytes of the current one, and what was reported last.
        self._whole = self._part = self._reported = 0

    def begin(self, component: str, read: ReadPlan) -> None:
        self._component = component
        self._coming = iter([shard for shard, tensors in read.by_shard().items() for _ in tensors])
        self._shard = next(self._coming, "")

    def chunk(self, nbytes: int) -> None:
        self._part += nbytes
        self._report(self._shard)

    def tensor(self, info: TensorInfo) -> None:
        # Chunks of tensors that are not complete yet stay counted.
        self._whole, self._part = self._whole + info.nbytes, max(0, self._part - info.nbytes)
        self._shard = next(self._coming, info.shard)
        self._report(info.shard)

    def _report(self, shard: str) -> None:
        # A strategy that reads ahead counts chunks of later tensors.
        self._reported = max(self._reported, min(self._whole + self._part, self._total))
        self._progress(Progress("reading", self._component, self._reported, self._total, shard))


def load_components(
    model: OpenModel, fetched: FetchedLoad, options: LoadOptions, progress: ProgressCallback
) -> dict[str, ComponentModel]:
    """Load fetched components: build, check, read, assign, tie. All or none are returned.

    Raises:
        CheckpointError: There are no weights, or they do not fit the model.
        ConfigurationError: A device or strategy that does not exist.
        InsufficientMemoryError: The planned bytes do not fit into memory.
    """
    started = time.perf_counter()
    plan, paths = fetched.split, fetched.paths
    devices = choose_devices(plan, options)
    origins = origins_of(model, fetched, paths)
    read_ahead((info for info in plan.infos if info.format == SAFETENSORS), paths)
    progress(Progress("importing"))
    import_builders(model.family)
    from splitlearn_core.build.configuration import hf_config
    from splitlearn_core.build.construction import build_component
    from splitlearn_core.build.torch_state import own_modes

    reads = read_plans(plan, paths, devices, whole_model(model, plan, progress))
    strategies = choose_strategies(model, options, reads)
    check_memory(model.name, strategies, reads)
    if any(isinstance(strategy, WholeStrategy) for strategy in strategies.values()):
        model.checkpoint.fetch(model.checkpoint.weight_files(), logging_downloads(model.name, progress))
    built: dict[str, ComponentModel] = {}
    # As in from_pretrained: the result can be trained, and has the same values, whatever modes torch is in.
    with own_modes(gradients=True):
        for part in plan.components:
            log.info("Building %s, layers %s, of %s", part.component, part.layers, model.name)
            progress(Progress("building", part.component))
            values = _without_cross_attention(model.config, fetched.table)
            # Not as the caller named it: PEFT writes the name into adapter_config.json, and other programs do not know
            # bundled: names.
            name = model.checkpoint.source.model
            config = hf_config(model.family, values, name, part.dtype, options.attn_implementation)
            built[part.component] = build_component(
                model.family, config, part.component, part.layers, on_layer=options.on_layer
            )
        unread = _check_all(model, fetched, built, strict=options.strict)
        if unread:
            fetched = _without(fetched, unread)
            plan = fetched.split
            reads = read_plans(plan, paths, devices, whole_model(model, plan, progress))
            origins = origins_of(model, fetched, paths)
        _attach_generation_config(model, built.get(Component.TOP))
        for component, origin in origins.items():
            built[component].origin = origin
            built[component].parted = tuple(
                plain for t in plan.component(component).tensors if t.places and (plain := t.as_plain) is not None
            )
        with passing_through(progress) as report:
            read_all(plan, reads, built, strategies, report)
        _tie_if_equal(built, fetched.table)
        if model.checkpoint.has_adapter:
            log.info("Applying the adapter next to the weights of %s", model.name)
            apply_adapter(list(built.values()), adapter_in(model.checkpoint.source), widen=False)
    total = sum(read.nbytes for read in reads.values())
    _log_ready(model.name, plan, devices, total, time.perf_counter() - started)
    progress(Progress("ready", None, total, total))
    return built


def _without_cross_attention(config: Mapping[str, Any], table: KeyTable) -> Mapping[str, Any]:
    """Omit cross-attention for which the checkpoint has no tensors: a decoder without an encoder never runs it."""
    has_tensors = any("cross" in name for names in table.sources.values() for name in names)
    return {**config, "add_cross_attention": False} if config.get("add_cross_attention") and not has_tensors else config


def _check_all(
    model: OpenModel, load: PlannedLoad, built: Mapping[str, ComponentModel], *, strict: bool
) -> dict[str, set[str]]:
    """Report together all problems of the tensors of the requested components.

    Tensors that the model has no place for are a warning, as in ``from_pretrained``, unless ``strict``.

    Returns:
        The module keys of planned tensors that the components have no place for.
    """
    from splitlearn_core.build.assemble import ignored_names, tensor_problems, unexpected_names

    plan, table = load.split, load.table
    problems, surplus = list(table.problems), unexpected_keys_message(table.unexpected)
    unread: dict[str, set[str]] = {}
    keys = set(table.unexpected)
    for part in plan.components:
        planned = part.results
        names = unexpected_names(built[part.component], planned)
        placed = {name: info for name, info in planned.items() if name not in names}
        problems += [f"{problem} ({part.component})" for problem in tensor_problems(built[part.component], placed)]
        reported = names - ignored_names(built[part.component], names)
        surplus += [f"unexpected: {name} {list(planned[name].shape)} ({part.component})" for name in sorted(reported)]
        keys.update(key for name in reported for key in _keys_of(part, name))
        unread |= {part.component: names} if names else {}
    if problems or (surplus and (strict or any(map(alters_weights, keys)))):
        raise mismatch(model, problems + surplus, plan)
    if keys:
        log.warning("%s", unread_keys_message(model.name, model.family.model_type, sorted(keys)))
    return unread


def _keys_of(part: ComponentPlan, name: str) -> list[str]:
    """Return the checkpoint keys of the tensors that a tensor of the module is, or is made of."""
    return [
        tensor.info.key
        for tensor in part.tensors
        if name in ([place.target for place in tensor.places] or [tensor.module_key])
    ]


def _without(fetched: FetchedLoad, unread: Mapping[str, set[str]]) -> FetchedLoad:
    """Remove tensors from the plan, by their module keys."""
    parts = tuple(
        replace(
            part,
            tensors=tuple(
                tensor
                for tensor in part.tensors
                if not unread.get(part.component, set()).issuperset(
                    [place.target for place in tensor.places] or [tensor.module_key]
                )
            ),
            made={name: info for name, info in part.made.items() if name not in unread.get(part.component, ())},
        )
        for part in fetched.split.components
    )
    sources = {
        component: {name: key for name, key in names.items() if name not in unread.get(component, ())}
        for component, names in fetched.table.sources.items()
    }
    split, table = replace(fetched.split, components=parts), replace(fetched.table, sources=sources)
    return replace(fetched, split=split, table=table)


def _attach_generation_config(model: OpenModel, top: ComponentModel | None) -> None:
    """Give the top the generation settings that ``from_pretrained`` would read."""
    path = model.checkpoint.optional_file(GENERATION_CONFIG) if top is not None else None
    if top is None or path is None:
        return
    check_numbers(read_object(path, MAX_CONFIG_BYTES), str(path))
    from transformers import GenerationConfig

    try:
        top.generation_config = GenerationConfig.from_pretrained(path.parent, local_files_only=True)
    # Its values are checked by transformers' own code, which may raise anything.
    except Exception as error:
        raise InvalidCheckpointError(
            f"{path} is not a valid generation configuration: {reason(error)}",
            hint="correct it, or remove it for the defaults",
        ) from error


def _tie_if_equal(built: Mapping[str, ComponentModel], table: KeyTable) -> None:
    """Tie embedding and head that config ties but the file holds separately, as transformers does."""
    if table.separate_ends is None or not {Component.BOTTOM, Component.TOP} <= built.keys():
        return
    from splitlearn_core.build.assemble import tie_if_equal

    bottom, top = built[Component.BOTTOM], built[Component.TOP]
    if (bottom.device, bottom.dtype) != (top.device, top.dtype):
        return  # One parameter has one device and one dtype.
    embedding, head = table.separate_ends
    if not tie_if_equal(bottom, embedding, top, head):
        log.warning("%s and %s are tied by config.json but differ in the checkpoint; both are kept", embedding, head)


def _log_ready(name: str, plan: SplitPlan, devices: Mapping[str, str], nbytes: int, seconds: float) -> None:
    parts = ", ".join(f"{part.component} on {devices[part.component]} in {part.dtype}" for part in plan.components)
    log.info("Ready: %s of %s; %s in %.2f s", parts, name, human_bytes(nbytes), seconds)
