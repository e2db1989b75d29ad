"""From a name to components: the stages of a load, one function each, in the order of the data."""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitlearn_core.checkpoint.checkpoint import Checkpoint
from splitlearn_core.checkpoint.readahead import read_ahead
from splitlearn_core.checkpoint.source import open_source
from splitlearn_core.checkpoint.strategy import (
    BUILT_IN,
    LoadingStrategy,
    ReadPlan,
    WeightReader,
    WholeModel,
    WholeStrategy,
    check_strategy,
    choose_strategy,
    passing_bytes,
    predicted_bytes,
    read_checked,
)
from splitlearn_core.errors import (
    ConfigurationError,
    InsufficientMemoryError,
    InvalidCheckpointError,
    MissingFileError,
    TensorMismatchError,
)
from splitlearn_core.family import ModelFamily
from splitlearn_core.memory import available_memory
from splitlearn_core.origin import Origin, fingerprint
from splitlearn_core.plan.names import KeyTable, map_keys, place_keys
from splitlearn_core.plan.placement import AUTO, check_fit, parse_dtypes, place
from splitlearn_core.plan.split import split_layers
from splitlearn_core.plan.splitplan import (
    ComponentPlan,
    MemoryNeeds,
    PlannedTensor,
    SplitPlan,
    common_dtype,
    cut_bytes,
    layers_without_tensors,
    loaded_nbytes,
    plan_components,
    resolve_dtype,
)
from splitlearn_core.plugins.registry import registry
from splitlearn_core.progress import logging_downloads, passing_through
from splitlearn_core.storage.directory import read_manifest
from splitlearn_core.storage.manifest import MANIFEST
from splitlearn_core.types import OPAQUE, SAFETENSORS, Component, LayerRange, Progress, ProgressCallback, TensorInfo
from splitlearn_core.units import human_bytes

if TYPE_CHECKING:
    from splitlearn_core.build.component import ComponentModel
    from splitlearn_core.pipeline import SplitCausalLM

log = logging.getLogger(__name__)

#: Prefix of a model name that means the checkpoint which the plugin of a model type carries.
BUNDLED = "bundled:"
#: The part of a GPU's free memory that weights may take where nobody set a limit.
_USABLE = 0.9


@dataclass(frozen=True, slots=True)
class OpenModel:
    """A checkpoint whose family is known; nothing of its weights was read."""

    #: The directory or repository, as the caller named it.
    name: str
    checkpoint: Checkpoint
    family: ModelFamily
    #: ``config.json``, without what it says of quantisation: components have plain weights.
    config: Mapping[str, Any]


def open_model(
    model_name_or_path: str | os.PathLike[str] | None, model_type: str | None = None, **hub: Any
) -> OpenModel:
    """Find a checkpoint and the family that it belongs to.

    Args:
        model_name_or_path: A directory, a Hub repository, or ``bundled:MODEL_TYPE`` for the small
            model that a plugin carries; None for the family's default.
        model_type: What the caller says it is; None to believe ``config.json``.
        hub: ``cache_dir``, ``revision``, ``token`` and ``local_files_only``.

    Raises:
        ConfigurationError: Nothing is named, or ``config.json`` contradicts the model type.
        UnknownModelTypeError: No plugin provides the model type.
        MissingFileError: There is no such checkpoint.
    """
    if model_name_or_path is None:
        if model_type is None:
            raise ConfigurationError(
                "neither a model nor a model type was named", hint="give model_name_or_path: a directory or a Hub id"
            )
        model_name_or_path = registry().family(model_type).default_model
        if not model_name_or_path:
            raise ConfigurationError(
                f"the family {model_type!r} names no default model", hint="give model_name_or_path as well"
            )
    log.info("Resolving %s", model_name_or_path)
    source = open_source(_unbundled(model_name_or_path), readable_suffixes=_readable_suffixes, **hub)
    checkpoint = Checkpoint(source, _readers)
    config = checkpoint.config
    stated = config["model_type"]
    if model_type is not None and model_type != stated:
        raise ConfigurationError(
            f"model_type {model_type!r} was asked for, but config.json of {model_name_or_path} says {stated!r}",
            hint=f"pass model_type={stated!r}, or None to take what config.json says",
        )
    commit = checkpoint.source.commit
    log.info("Found a %s model in %s%s", stated, checkpoint.source.model, f" at {commit}" if commit else "")
    plain = {name: value for name, value in config.items() if name != "quantization_config"}
    return OpenModel(os.fspath(model_name_or_path), checkpoint, registry().family(stated), plain)


def _readers(model_type: str | None) -> list[WeightReader]:
    """Return the readers of files that core cannot describe, those of the model type's own plugin too."""
    family = registry().family(model_type) if model_type is not None else None
    return [strategy for strategy in registry().strategies(family) if isinstance(strategy, WeightReader)]


def _readable_suffixes() -> tuple[str, ...]:
    return tuple(suffix for reader in _readers(None) for suffix in reader.suffixes)


def bundled_checkpoint(family: ModelFamily) -> Path:
    """Return the folder of the checkpoint that a plugin carries.

    Raises:
        MissingFileError: The plugin carries none.
    """
    package, _, folder = family.bundled_checkpoint.partition(":")
    if not package:
        raise MissingFileError(
            f"the plugin of {family.model_type!r} carries no model", hint=f"splitlearn-gpt2 does: {BUNDLED}gpt2"
        )
    return Path(str(resources.files(package) / folder))


def _unbundled(model: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Resolve ``bundled:MODEL_TYPE``, a name that no directory or repository usually has."""
    if isinstance(model, str) and model.startswith(BUNDLED):
        return bundled_checkpoint(registry().family(model.removeprefix(BUNDLED)))
    return model


def make_plan(
    model: OpenModel,
    split_points: Sequence[int],
    parts: Iterable[Component],
    dtype: str | Mapping[Any, str],
    *,
    fetch: ProgressCallback | None = None,
) -> tuple[SplitPlan, KeyTable]:
    """Plan the asked components from the headers of the shards they need, and of no other.

    Args:
        model: The opened checkpoint.
        split_points: Where to cut.
        parts: The components to plan.
        dtype: The dtype that is wanted, or one for each component.
        fetch: To plan a load: fetch what is planned, too, reporting here. By default headers alone
            are read, even on the Hub.

    Raises:
        InvalidSplitError: The split points do not cut this model.
        CheckpointError: Files are missing or contradict themselves.
    """
    family, config, checkpoint = model.family, model.config, model.checkpoint
    ranges = split_layers(family, config, split_points)
    wishes = parse_dtypes(dtype, tuple(parts))
    # A load wants weights: without any, asking for the weight map below says what is missing.
    by_config = fetch is None and not (checkpoint.has_weights and checkpoint.is_describable)
    described = _tensors_of_config(model) if by_config or checkpoint.quantization else None
    told = None if fetch is None or checkpoint.quantization else logging_downloads(model.name, fetch)
    if told is not None:
        checkpoint.fetch_undescribed(told)
    keys = sorted(checkpoint.weight_map if described is None else described)
    table = _place(model, keys, ranges)
    wanted = sorted({key for component in wishes for key in table.sources[component].values()})
    if told is not None:
        log.info("Planning %s of %s, cut at %d and %d", ", ".join(wishes), model.name, *split_points)
        if checkpoint.format != SAFETENSORS:
            # They have no headers that could be had alone.
            checkpoint.fetch(checkpoint.shards(wanted), told)
    tensors = checkpoint.tensors(wanted) if described is None else described
    if told is not None:
        checkpoint.fetch_tensors(tensors.values(), told)
    dtypes = {component: resolve_dtype(wish, config, tensors.values()) for component, wish in wishes.items()}
    plan = SplitPlan(
        model=model.name,
        commit=checkpoint.source.commit,
        model_type=family.model_type,
        split_points=(ranges[Component.TRUNK].start, ranges[Component.TRUNK].end),
        num_layers=ranges[Component.TOP].total,
        dtype=common_dtype(dtypes.values()),
        source="headers" if described is None else "config",
        components=plan_components(family, config, table, ranges, tensors, dtypes),
        tied=table.tied,
        cut_bytes_per_token=cut_bytes(family, config, dtypes.values()),
    )
    return plan, table


def wanted_keys(model: OpenModel, split_points: Sequence[int], parts: Iterable[Component]) -> list[str]:
    """Return the checkpoint keys that components need, by the weight map alone."""
    table = _place(model, sorted(model.checkpoint.weight_map), split_layers(model.family, model.config, split_points))
    return sorted({key for component in parts for key in table.sources[component].values()})


def _place(model: OpenModel, keys: Sequence[str], ranges: Mapping[Component, LayerRange]) -> KeyTable:
    mapping = registry().map_weight_keys(model.family, model.config, keys) or map_keys(model.family, keys)
    return place_keys(model.family, model.config, mapping, ranges)


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How the planned components are wanted."""

    #: Where they go, where ``device_map`` does not say otherwise.
    device: str = "cpu"
    strategy: str = "auto"
    attn_implementation: str | None = None
    #: Where each goes, or ``auto`` to work it out; see :mod:`splitlearn_core.plan.placement`.
    device_map: Mapping[Component, str] | str | None = None
    #: Device -> bytes that may be used of it; empty for no limits.
    max_memory: Mapping[str, int] = field(default_factory=dict)
    #: Called before each layer is built; it may raise to stop the load.
    on_layer: Callable[[], None] = lambda: None


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
    origins = origins_of(model, plan, table)
    paths = model.checkpoint.fetch_tensors(plan.infos, logging_downloads(model.name, progress))
    read_ahead((info for info in plan.infos if info.format == SAFETENSORS), paths)
    progress(Progress("importing"))
    import_builders(model.family)
    from splitlearn_core.build.component import build_component, hf_config

    reads = _read_plans(plan, paths, devices, _whole_model(model, plan, progress))
    strategies = _strategies(model, options, reads)
    _check_memory(model.name, strategies, reads)
    if any(isinstance(strategy, WholeStrategy) for strategy in strategies.values()):
        model.checkpoint.fetch(model.checkpoint.weight_files(), logging_downloads(model.name, progress))
    built: dict[Component, ComponentModel] = {}
    for part in plan.components:
        log.info("Building %s, layers %s, of %s", part.component, part.layers, model.name)
        progress(Progress("building", part.component))
        config = hf_config(model.family, model.config, model.name, part.dtype, options.attn_implementation)
        built[part.component] = build_component(
            model.family, config, part.component, part.layers, on_layer=options.on_layer
        )
    _check_all(model, plan.components, table, built)
    _attach_generation_config(model, built.get(Component.TOP))
    for component, origin in origins.items():
        built[component].origin = origin
    with passing_through(progress) as tell:
        _read_all(plan, reads, built, strategies, tell)
    _tie_if_equal(built, table)
    total = sum(read.nbytes for read in reads.values())
    _log_ready(model.name, plan, devices, total, time.perf_counter() - started)
    progress(Progress("ready", None, total, total))
    return built


def memory_needed(model: OpenModel, plan: SplitPlan, options: LoadOptions, paths: Mapping[str, Path]) -> MemoryNeeds:
    """Predict what a load takes of this machine.

    Args:
        model: The opened checkpoint.
        plan: What is to be loaded.
        options: How.
        paths: Where the planned shards are.

    Raises:
        ConfigurationError: No strategy of the asked name can do it.
        BrokenPluginError: A strategy cannot say.
    """
    reads = _read_plans(plan, paths, choose_devices(plan, options), _whole_model(model, plan, lambda _: None))
    strategies = _strategies(model, options, reads)
    return _needs(strategies, reads)


def memory_by_strategy(model: OpenModel, plan: SplitPlan, device: str = "cpu") -> dict[str, MemoryNeeds]:
    """Predict what each of core's own strategies would take to load all of a plan; those that cannot are left out.

    So is ``whole`` for some of the components: the headers of the others say how large it is.

    Args:
        model: The opened checkpoint.
        plan: What might be loaded.
        device: Where all of it would go.
    """
    here = {
        shard: model.checkpoint.source.path(shard) for shard in plan.shards if model.checkpoint.source.is_here(shard)
    }
    reads = _read_plans(
        plan,
        here,
        dict.fromkeys([part.component for part in plan.components], device),
        _whole_model(model, plan, lambda _: None),
    )
    partial = len(plan.components) < len(Component)
    able = [
        strategy
        for strategy in BUILT_IN
        if not (partial and isinstance(strategy, WholeStrategy)) and not any(map(strategy.refusal, reads.values()))
    ]
    return {strategy.name: _needs(dict.fromkeys(reads, strategy), reads) for strategy in able}


def _needs(strategies: Mapping[Component, LoadingStrategy], reads: Mapping[Component, ReadPlan]) -> MemoryNeeds:
    kept, passing = _own_memory(strategies, reads)
    here = [(component, read) for component, read in reads.items() if read.device == "cpu"]
    loaded = sum(loaded_nbytes(tensor, read.dtype) for _, read in here for tensor in read.tensors)
    mapped = loaded - sum(kept[component] for component, _ in here)
    return MemoryNeeds(sum(kept.values()) + passing, sum(kept.values()), max(0, mapped))


def _own_memory(
    strategies: Mapping[Component, LoadingStrategy], reads: Mapping[Component, ReadPlan]
) -> tuple[dict[Component, int], int]:
    """Return the memory that each component keeps, and the most that reading one takes besides."""
    passing = {component: passing_bytes(strategies[component], read) for component, read in reads.items()}
    taken = {component: predicted_bytes(strategies[component], read) for component, read in reads.items()}
    # Components are read one after the other.
    return {component: taken[component] - passing[component] for component in reads}, max(passing.values(), default=0)


def choose_devices(plan: SplitPlan, options: LoadOptions) -> dict[Component, str]:
    """Say where each planned component goes.

    Raises:
        InsufficientMemoryError: The limits that the caller set do not bear it.
    """
    if options.device_map == AUTO:
        return place(plan.components, options.max_memory or _free_devices())
    given = options.device_map if isinstance(options.device_map, Mapping) else {}
    devices = {part.component: given.get(part.component, options.device) for part in plan.components}
    check_fit(plan.components, devices, options.max_memory)
    return devices


def _free_devices() -> dict[str, int | None]:
    """Return what of each GPU is free, less a tenth for activations and caches; and the CPU, which a load checks."""
    import torch

    gpus = range(torch.cuda.device_count())
    free = {f"cuda:{gpu}": int(torch.cuda.mem_get_info(gpu)[0] * _USABLE) for gpu in gpus}
    return {**free, "cpu": None}


def origins_of(model: OpenModel, plan: SplitPlan, table: KeyTable) -> dict[Component, Origin]:
    """Say where the planned components come from: from the model, or, of a saved component, from its source."""
    path = model.checkpoint.optional_file(MANIFEST)
    if path is not None:
        saved = read_manifest(path.parent).origin
        _check_saved(saved, plan, path)
        return {saved.component: replace(saved, keys=table.sources[saved.component], config=model.config)}
    entry = registry().plugin(plan.model_type).entry
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
            config=model.config,
        )
        for part in plan.components
    }


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


def _log_ready(name: str, plan: SplitPlan, devices: Mapping[Component, str], nbytes: int, seconds: float) -> None:
    parts = ", ".join(f"{part.component} on {devices[part.component]} in {part.dtype}" for part in plan.components)
    log.info("Ready: %s of %s; %s in %.2f s", parts, name, human_bytes(nbytes), seconds)


def _strategies(
    model: OpenModel, options: LoadOptions, reads: Mapping[Component, ReadPlan]
) -> dict[Component, LoadingStrategy]:
    """Choose how each component is read: one goes to a GPU, and another stays pages of the file."""
    added = registry().strategies(model.family, options.strategy)
    preferred = model.family.preferred_strategy
    return {component: choose_strategy(options.strategy, [read], added, preferred) for component, read in reads.items()}


def import_builders(family: ModelFamily) -> None:
    """Import torch, and of transformers what the family needs; takes seconds the first time."""
    with collection_paused():
        from splitlearn_core.build.component import architecture_class

        architecture_class(family)


@contextmanager
def collection_paused() -> Iterator[None]:
    """Import without looking for garbage: a tenth of the time of importing transformers goes there."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


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


def check_options(model: OpenModel, options: LoadOptions) -> None:
    """Refuse a device or strategy that does not exist, before anything is fetched or read for it.

    Raises:
        ConfigurationError: The name is no device or strategy, or this machine has no such device.
    """
    check_strategy(options.strategy, registry().strategies(model.family, options.strategy))
    if model.checkpoint.quantization:
        from splitlearn_core.build.whole import check_quantization

        check_quantization(model.name, model.checkpoint.quantization, model.checkpoint.config["quantization_config"])
    given = options.device_map.values() if isinstance(options.device_map, Mapping) else [options.device]
    check_devices(dict.fromkeys((*given, *options.max_memory)))


def check_devices(devices: Iterable[str]) -> None:
    """Refuse devices that this machine has not; raises ConfigurationError, naming all of them."""
    refusals = []
    for device in devices:
        try:
            check_device(device)
        except ConfigurationError as error:
            refusals.append(error)
    if len(refusals) > 1:
        raise ConfigurationError("; ".join(error.message for error in refusals), hint=refusals[0].hint)
    if refusals:
        raise refusals[0]


def check_device(device: str) -> None:
    """Refuse a device that this machine has not.

    Raises:
        ConfigurationError: There is no such device.
    """
    if device == "cpu":
        return
    import torch

    try:
        wanted = torch.device(device)
        if wanted.type == "meta":
            raise ConfigurationError("on the meta device nothing would be loaded", hint="use plan_split to look ahead")
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        # The first sentence: torch goes on about its own dispatcher.
        reason = str(error).splitlines()[0].partition(". ")[0][:200]
        gpus = torch.cuda.device_count()
        raise ConfigurationError(
            f"device {device!r} cannot be used: {reason}",
            hint=f"this machine has cpu{f' and {gpus} CUDA devices' if gpus else ', and no CUDA device'}",
        ) from error


def _tensors_of_config(model: OpenModel) -> dict[str, TensorInfo]:
    """Describe the tensors that ``config.json`` implies, for a checkpoint without weights."""
    from splitlearn_core.build.describe import describe_tensors

    infos = describe_tensors(model.family, dict(model.config), model.name, resolve_dtype("auto", model.config, ()))
    if not model.checkpoint.quantization:
        return infos
    return {key: replace(info, format=OPAQUE) for key, info in infos.items()}


def _check_memory(
    name: str, strategies: Mapping[Component, LoadingStrategy], reads: Mapping[Component, ReadPlan]
) -> None:
    kept, passing = _own_memory(strategies, reads)
    needed = sum(kept.values()) + passing
    free = available_memory()
    if needed > free:
        raise InsufficientMemoryError(
            f"loading {name} takes {needed / 2**30:.2f} GiB of memory ({_names(strategies)}); "
            f"{free / 2**30:.2f} GiB are available",
            hint="ask for fewer parts or layers, a smaller dtype, or dtype='auto' on the CPU, which maps the file",
        )


def _names(strategies: Mapping[Component, LoadingStrategy]) -> str:
    return ", ".join(dict.fromkeys(strategy.name for strategy in strategies.values()))


def _check_all(
    model: OpenModel, parts: Iterable[ComponentPlan], table: KeyTable, built: Mapping[Component, ComponentModel]
) -> None:
    """Report at once all that is wrong with the tensors of the asked components."""
    from splitlearn_core.build.assemble import tensor_problems

    problems = list(table.problems)
    for part in parts:
        planned = {tensor.module_key: tensor.info for tensor in part.tensors}
        problems += [f"{problem} ({part.component})" for problem in tensor_problems(built[part.component], planned)]
    if problems:
        raise _mismatch(model, problems)


def refuse_misfit(model: OpenModel, plan: SplitPlan, table: KeyTable) -> None:
    """Refuse to plan a checkpoint with tensors that have no place, or layers that have no tensors.

    Raises:
        TensorMismatchError: There are such tensors or layers; all are listed.
    """
    empty = layers_without_tensors(model.family, plan.components)
    problems = [*table.problems, *(f"missing: every tensor of layer {layer}" for layer in empty)]
    if problems:
        raise _mismatch(model, problems)


def _mismatch(model: OpenModel, problems: Sequence[str]) -> TensorMismatchError:
    return TensorMismatchError(
        f"the tensors of {model.name} are not those of a {model.family.model_type} model; "
        f"{len(problems)} are wrong:\n  " + "\n  ".join(problems),
        hint='do config.json and the weights belong together, and is it a causal model (see its "architectures")?',
    )


def _attach_generation_config(model: OpenModel, top: ComponentModel | None) -> None:
    """Give the top the generation settings that ``from_pretrained`` would read."""
    path = model.checkpoint.optional_file("generation_config.json") if top is not None else None
    if top is None or path is None:
        return
    from transformers import GenerationConfig

    try:
        top.generation_config = GenerationConfig.from_pretrained(path.parent, local_files_only=True)
    # Its values are checked by transformers' own code, which raises whatever comes of them.
    except Exception as error:
        raise InvalidCheckpointError(
            f"{path} is no sound generation configuration: {error}", hint="mend it, or remove it for the defaults"
        ) from error


def _whole_model(model: OpenModel, plan: SplitPlan, progress: ProgressCallback) -> WholeModel:
    """Say how the whole model is loaded, for the strategy that takes components out of it; nothing is loaded yet."""
    checkpoint, dtypes = model.checkpoint, {part.dtype for part in plan.components}
    # Wide enough for every component: from there to a narrower one is what it would be at once.
    dtype = min(dtypes) if len(dtypes) == 1 else "float64" if "float64" in dtypes else "float32"

    def measure() -> int:
        infos = {info.key: info for info in plan.infos}
        if len(plan.components) < len(Component):
            infos = _tensors_of_config(model)
        plain = sum(loaded_nbytes(PlannedTensor(key, info), dtype) for key, info in infos.items())
        if not checkpoint.quantization:
            return plain
        # What is dequantised is there twice for a while.
        sizes = checkpoint.source.files()
        return plain + sum(sizes.get(name, 0) for name in checkpoint.weight_files())

    def load() -> Mapping[str, Any]:
        from splitlearn_core.build.whole import load_whole

        return load_whole(
            model.family,
            model.name,
            str(checkpoint.folder),
            dtype,
            safetensors=checkpoint.format == SAFETENSORS,
            waiting=lambda: progress(Progress("reading")),
        )

    return WholeModel(measure, load)


def _read_plans(
    plan: SplitPlan, paths: Mapping[str, Path], devices: Mapping[Component, str], whole: WholeModel
) -> dict[Component, ReadPlan]:
    """Say what each component reads; a tied tensor is read once for all that want it as it is."""
    seen: set[tuple[str, str, str]] = set()
    reads = {}
    for part in plan.components:
        device = devices[part.component]
        fresh = tuple(tensor for tensor in part.tensors if (tensor.info.key, device, part.dtype) not in seen)
        seen.update((tensor.info.key, device, part.dtype) for tensor in fresh)
        reads[part.component] = ReadPlan(fresh, paths, device, part.dtype, whole)
    return reads


def _read_all(
    plan: SplitPlan,
    reads: Mapping[Component, ReadPlan],
    built: Mapping[Component, ComponentModel],
    strategies: Mapping[Component, LoadingStrategy],
    progress: ProgressCallback,
) -> None:
    from splitlearn_core.build.assemble import assign_tensor, finish

    count = _Count(progress, sum(read.nbytes for read in reads.values()))
    held: dict[tuple[str, str, str], Any] = {}
    for part in plan.components:
        component, read, strategy = part.component, reads[part.component], strategies[part.component]
        own = {planned.module_key for planned in read.tensors}
        where = ", ".join(sorted({str(path.parent) for path in read.paths.values()}))
        files, size = len(read.by_shard()), human_bytes(read.nbytes)
        log.info("Loading weights of %s: %s of %d files in %s (%s)", component, size, files, where, strategy.name)
        modules = dict(built[component].named_modules())
        count.begin(component, read)
        for planned, tensor in read_checked(strategy, replace(read, on_bytes=count.chunk)):
            held[planned.info.key, read.device, read.dtype] = assign_tensor(modules, planned.module_key, tensor)
            count.tensor(planned.info)
        for planned in part.tensors:
            if planned.module_key not in own:
                assign_tensor(modules, planned.module_key, held[planned.info.key, read.device, read.dtype])
        finish(built[component], read.device)


class _Count:
    """Bytes read so far, told by tensors and, within large ones, by chunks. It never goes back."""

    def __init__(self, progress: ProgressCallback, total: int) -> None:
        self._progress = progress
        self._total = total
        self._component: Component | None = None
        #: Shards of the tensors that are still to come, in the order of the files.
        self._coming: Iterator[str] = iter(())
        self._shard = ""
        #: Bytes of whole tensors, bytes of the one at work, and what was told last.
        self._whole = self._part = self._told = 0

    def begin(self, component: Component, read: ReadPlan) -> None:
        self._component = component
        self._coming = iter([shard for shard, tensors in read.by_shard().items() for _ in tensors])
        self._shard = next(self._coming, "")

    def chunk(self, nbytes: int) -> None:
        self._part += nbytes
        self._tell(self._shard)

    def tensor(self, info: TensorInfo) -> None:
        # Chunks of tensors that are still to come stay counted.
        self._whole, self._part = self._whole + info.nbytes, max(0, self._part - info.nbytes)
        self._shard = next(self._coming, info.shard)
        self._tell(info.shard)

    def _tell(self, shard: str) -> None:
        # A strategy that reads ahead counts chunks of tensors to come.
        self._told = max(self._told, min(self._whole + self._part, self._total))
        self._progress(Progress("reading", self._component, self._told, self._total, shard))


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
