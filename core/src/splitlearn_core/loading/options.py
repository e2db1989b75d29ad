"""How components are loaded, and whether this machine can do it: devices, strategies, memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from splitlearn_core.checkpoint.checkpoint import MLX
from splitlearn_core.checkpoint.files import ADAPTER_CONFIG, CONFIG
from splitlearn_core.errors import CheckpointError, ConfigurationError, InsufficientMemoryError
from splitlearn_core.loading.opening import OpenModel
from splitlearn_core.loading.planning import parts_without_layers, tensors_of_config, without_garbage_collection
from splitlearn_core.loading_strategy import LoadingStrategy, ReadPlan, WholeModel
from splitlearn_core.plan.placement import AUTO, check_fit, place
from splitlearn_core.plan.splitplan import MemoryNeeds, PlannedTensor, SplitPlan, loaded_nbytes
from splitlearn_core.plugins.registry import registry
from splitlearn_core.readers.mapped import WholeStrategy
from splitlearn_core.readers.selection import BUILT_IN, check_strategy, choose_strategy, passing_bytes, predicted_bytes
from splitlearn_core.system_memory import available_memory
from splitlearn_core.types import SAFETENSORS, Progress, ProgressCallback

#: The part of a GPU's free memory that weights may take if no limit is set.
_USABLE = 0.9


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How to load the planned components."""

    #: The device of components, unless ``device_map`` gives another.
    device: str = "cpu"
    strategy: str = "auto"
    attn_implementation: str | None = None
    #: The device of each, or ``auto`` to choose it; see :mod:`splitlearn_core.plan.placement`.
    device_map: Mapping[str, str] | str | None = None
    #: Device -> bytes that may be used of it; empty for no limits.
    max_memory: Mapping[str, int] = field(default_factory=dict)
    #: Refuse tensors that the model has no place for; otherwise they are a warning.
    strict: bool = False
    #: Called before each layer is built; it may raise to stop the load.
    on_layer: Callable[[], None] = lambda: None


def check_options(model: OpenModel, options: LoadOptions) -> None:
    """Refuse a device or strategy that does not exist, before anything is fetched or read for it.

    Raises:
        ConfigurationError: There is no such device or strategy, or this machine does not have the device.
    """
    check_strategy(options.strategy, registry().strategies(model.family, options.strategy))
    if model.checkpoint.has_adapter and find_spec("peft") is None:
        raise ConfigurationError(
            f"there is an adapter next to the weights of {model.name} ({ADAPTER_CONFIG}); applying it needs peft",
            hint=f'pip install "splitlearn-core[peft]"; or move {ADAPTER_CONFIG} away for the model without it',
        )
    if model.checkpoint.is_opaque or (model.checkpoint.quantization and options.strategy == WholeStrategy.name):
        if model.checkpoint.quantization == MLX:
            raise CheckpointError(
                f"{model.name} is quantised as {MLX} does it (group_size, bits in {CONFIG}), and packed for it alone",
                hint="write plain weights: mlx_lm.convert --hf-path DIR --mlx-path OUT --dequantize; "
                "or use the original checkpoint",
            )
        from splitlearn_core.build.configuration import check_quantization

        check_quantization(model.name, model.checkpoint.quantization, model.checkpoint.config["quantization_config"])
    requested = options.device_map.values() if isinstance(options.device_map, Mapping) else [options.device]
    check_devices(dict.fromkeys((*requested, *options.max_memory)))


def check_devices(devices: Iterable[str]) -> None:
    """Refuse devices that this machine does not have; raises ConfigurationError, naming all of them."""
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
    """Refuse a device that this machine does not have.

    Raises:
        ConfigurationError: There is no such device.
    """
    if device == "cpu":
        return
    import torch

    try:
        torch_device = torch.device(device)
        if torch_device.type == "meta":
            raise ConfigurationError("on the meta device nothing would be loaded", hint="use plan_split to look ahead")
        torch.empty(0, device=torch_device)
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        # The first sentence: the rest is about torch's own dispatcher.
        reason = str(error).splitlines()[0].partition(". ")[0][:200]
        gpus = torch.cuda.device_count()
        raise ConfigurationError(
            f"device {device!r} cannot be used: {reason}",
            hint=f"this machine has cpu{f' and {gpus} CUDA devices' if gpus else ', and no CUDA device'}",
        ) from error


def choose_devices(plan: SplitPlan, options: LoadOptions) -> dict[str, str]:
    """Return the device of each planned component.

    Raises:
        InsufficientMemoryError: The limits that the caller set do not allow it.
    """
    if options.device_map == AUTO:
        return place(plan.components, options.max_memory or _free_devices())
    device_map = options.device_map if isinstance(options.device_map, Mapping) else {}
    devices = {part.component: device_map.get(part.component, options.device) for part in plan.components}
    check_fit(plan.components, devices, options.max_memory)
    return devices


def _free_devices() -> dict[str, int | None]:
    """Return the free memory of each GPU, less a tenth for activations and caches; that of the CPU is checked later."""
    import torch

    gpus = range(torch.cuda.device_count())
    free = {f"cuda:{gpu}": int(torch.cuda.mem_get_info(gpu)[0] * _USABLE) for gpu in gpus}
    return {**free, "cpu": None}


def read_plans(
    plan: SplitPlan, paths: Mapping[str, Path], devices: Mapping[str, str], whole: WholeModel
) -> dict[str, ReadPlan]:
    """Return what each component reads; a tied tensor is read once for each device and dtype."""
    planned: set[tuple[str, str, str]] = set()
    reads = {}
    for part in plan.components:
        device = devices[part.component]
        # Also a tensor that one component has under two names.
        once = {tensor.info.key: tensor for tensor in reversed(part.tensors)}
        fresh = tuple(
            tensor
            for tensor in part.tensors
            if once[tensor.info.key] is tensor and (tensor.info.key, device, part.dtype) not in planned
        )
        planned.update((tensor.info.key, device, part.dtype) for tensor in fresh)
        reads[part.component] = ReadPlan(fresh, paths, device, part.dtype, whole, made=part.made)
    return reads


def choose_strategies(
    model: OpenModel, options: LoadOptions, reads: Mapping[str, ReadPlan]
) -> dict[str, LoadingStrategy]:
    """Choose how each component is read: one may go to a GPU while another stays mapped."""
    added = registry().strategies(model.family, options.strategy)
    preferred = model.family.preferred_strategy
    return {component: choose_strategy(options.strategy, [read], added, preferred) for component, read in reads.items()}


def whole_model(model: OpenModel, plan: SplitPlan, progress: ProgressCallback) -> WholeModel:
    """Return how to load the whole model, for the strategy that copies components out of it; nothing is loaded yet."""
    checkpoint, dtypes = model.checkpoint, {part.dtype for part in plan.components}
    # Wide enough for every component: casting to a narrower dtype later gives the same values.
    dtype = min(dtypes) if len(dtypes) == 1 else "float64" if "float64" in dtypes else "float32"

    def measure() -> int:
        infos = {info.key: info for info in plan.infos}
        if model.family.text_config and plan.source == "headers":
            # The other models in it are loaded as well.
            infos = checkpoint.tensors(checkpoint.weight_map)
        elif checkpoint.quantization or not plan.is_whole:
            infos = tensors_of_config(model)
        plain = sum(loaded_nbytes(PlannedTensor(key, info), dtype) for key, info in infos.items())
        if not checkpoint.quantization:
            return plain
        # Quantised and dequantised weights are in memory at the same time.
        sizes = checkpoint.source.files()
        return plain + sum(sizes.get(name, 0) for name in checkpoint.weight_files())

    def load() -> Mapping[str, Any]:
        from splitlearn_core.build.configuration import load_whole

        with _without_adapter(checkpoint.folder) as folder:
            return load_whole(
                model.family,
                model.name,
                str(folder),
                dtype,
                values=checkpoint.config,
                safetensors=checkpoint.format == SAFETENSORS,
                waiting=lambda: progress(Progress("reading")),
            )

    return WholeModel(measure, load, lambda: _missing(model, plan))


@contextmanager
def _without_adapter(directory: Path) -> Iterator[Path]:
    """Yield a folder without the adapter, which ``from_pretrained`` would apply: components get it last."""
    if not (directory / ADAPTER_CONFIG).is_file():
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="splitlearn-") as folder:
        for path in directory.iterdir():
            if path.name != ADAPTER_CONFIG:
                (Path(folder) / path.name).symlink_to(path.resolve())
        yield Path(folder)


def _missing(model: OpenModel, plan: SplitPlan) -> str:
    """Return why there is no whole model: transformers would initialise missing layers randomly."""
    if plan.source != "headers" or not model.checkpoint.is_describable:
        return ""
    absent = parts_without_layers(model, plan.split_points)
    present = [str(component) for component in plan.names if component not in absent]
    return f"{model.name} holds {', '.join(present) or 'no component'} only, no whole model" if absent else ""


def memory_needed(model: OpenModel, plan: SplitPlan, options: LoadOptions, paths: Mapping[str, Path]) -> MemoryNeeds:
    """Predict the memory of this machine that a load takes.

    Args:
        model: The opened checkpoint.
        plan: The components to load.
        options: How to load them.
        paths: The paths of the planned shards.

    Raises:
        ConfigurationError: No strategy of the requested name can do it.
        BrokenPluginError: The prediction of a strategy fails.
    """
    reads = read_plans(plan, paths, choose_devices(plan, options), whole_model(model, plan, lambda _: None))
    strategies = choose_strategies(model, options, reads)
    return _needs(strategies, reads)


@without_garbage_collection()
def memory_by_strategy(model: OpenModel, plan: SplitPlan, device: str = "cpu") -> dict[str, MemoryNeeds]:
    """Predict what each of core's own strategies would take to load all of a plan; those that cannot are omitted.

    So is ``whole`` unless all components are planned: it would need the headers of the others.

    Args:
        model: The opened checkpoint.
        plan: The components.
        device: The device of all of them.
    """
    here = {
        shard: model.checkpoint.source.path(shard) for shard in plan.shards if model.checkpoint.source.is_here(shard)
    }
    reads = read_plans(
        plan,
        here,
        dict.fromkeys([part.component for part in plan.components], device),
        whole_model(model, plan, lambda _: None),
    )
    partial = not plan.is_whole
    able = [
        strategy
        for strategy in BUILT_IN
        if not (partial and isinstance(strategy, WholeStrategy)) and not any(map(strategy.refusal, reads.values()))
    ]
    return {strategy.name: _needs(dict.fromkeys(reads, strategy), reads) for strategy in able}


def check_memory(name: str, strategies: Mapping[str, LoadingStrategy], reads: Mapping[str, ReadPlan]) -> None:
    kept, passing = _own_memory(strategies, reads)
    needed = sum(kept.values()) + passing
    free = available_memory()
    if needed > free:
        raise InsufficientMemoryError(
            f"loading {name} takes {needed / 2**30:.2f} GiB of memory ({_names(strategies)}); "
            f"{free / 2**30:.2f} GiB are available",
            hint="ask for fewer parts or layers, a smaller dtype, or dtype='auto' on the CPU, which maps the file",
        )


def _needs(strategies: Mapping[str, LoadingStrategy], reads: Mapping[str, ReadPlan]) -> MemoryNeeds:
    kept, passing = _own_memory(strategies, reads)
    here = [(component, read) for component, read in reads.items() if read.device == "cpu"]
    loaded = sum(read.host_bytes for _, read in here)
    mapped = loaded - sum(kept[component] for component, _ in here)
    return MemoryNeeds(sum(kept.values()) + passing, sum(kept.values()), max(0, mapped))


def _own_memory(strategies: Mapping[str, LoadingStrategy], reads: Mapping[str, ReadPlan]) -> tuple[dict[str, int], int]:
    """Return the memory that each component keeps, and the most additional memory that reading one takes."""
    passing = {component: passing_bytes(strategies[component], read) for component, read in reads.items()}
    taken = {component: predicted_bytes(strategies[component], read) for component, read in reads.items()}
    # Components are read one after the other.
    return {component: taken[component] - passing[component] for component in reads}, max(passing.values(), default=0)


def _names(strategies: Mapping[str, LoadingStrategy]) -> str:
    return ", ".join(dict.fromkeys(strategy.name for strategy in strategies.values()))
