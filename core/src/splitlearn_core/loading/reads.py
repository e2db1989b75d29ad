"""How each component is read, and the memory that this takes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from splitlearn_core.checkpoint.config import ADAPTER_CONFIG
from splitlearn_core.checkpoint.strategy import (
    BUILT_IN,
    LoadingStrategy,
    ReadPlan,
    WholeModel,
    WholeStrategy,
    choose_strategy,
    passing_bytes,
    predicted_bytes,
)
from splitlearn_core.errors import (
    InsufficientMemoryError,
)
from splitlearn_core.loading.opening import OpenModel
from splitlearn_core.loading.options import LoadOptions, choose_devices
from splitlearn_core.loading.planning import parts_without_layers, tensors_of_config
from splitlearn_core.memory import available_memory
from splitlearn_core.plan.splitplan import (
    MemoryNeeds,
    PlannedTensor,
    SplitPlan,
    loaded_nbytes,
)
from splitlearn_core.plugins.registry import registry
from splitlearn_core.types import SAFETENSORS, Component, Progress, ProgressCallback


def read_plans(
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


def choose_strategies(
    model: OpenModel, options: LoadOptions, reads: Mapping[Component, ReadPlan]
) -> dict[Component, LoadingStrategy]:
    """Choose how each component is read: one goes to a GPU, and another stays pages of the file."""
    added = registry().strategies(model.family, options.strategy)
    preferred = model.family.preferred_strategy
    return {component: choose_strategy(options.strategy, [read], added, preferred) for component, read in reads.items()}


def whole_model(model: OpenModel, plan: SplitPlan, progress: ProgressCallback) -> WholeModel:
    """Say how the whole model is loaded, for the strategy that takes components out of it; nothing is loaded yet."""
    checkpoint, dtypes = model.checkpoint, {part.dtype for part in plan.components}
    # Wide enough for every component: from there to a narrower one is what it would be at once.
    dtype = min(dtypes) if len(dtypes) == 1 else "float64" if "float64" in dtypes else "float32"

    def measure() -> int:
        infos = {info.key: info for info in plan.infos}
        if len(plan.components) < len(Component):
            infos = tensors_of_config(model)
        plain = sum(loaded_nbytes(PlannedTensor(key, info), dtype) for key, info in infos.items())
        if not checkpoint.quantization:
            return plain
        # What is dequantised is there twice for a while.
        sizes = checkpoint.source.files()
        return plain + sum(sizes.get(name, 0) for name in checkpoint.weight_files())

    def load() -> Mapping[str, Any]:
        from splitlearn_core.build.whole import load_whole

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
    """Give a folder without the adapter that ``from_pretrained`` would put onto the weights: components get it last."""
    if not (directory / ADAPTER_CONFIG).is_file():
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="splitlearn-") as folder:
        for path in directory.iterdir():
            if path.name != ADAPTER_CONFIG:
                (Path(folder) / path.name).symlink_to(path.resolve())
        yield Path(folder)


def _missing(model: OpenModel, plan: SplitPlan) -> str:
    """Say which parts a checkpoint has no layers of, so that transformers would make them up."""
    if plan.source != "headers" or not model.checkpoint.is_describable:
        return ""
    absent = parts_without_layers(model, plan.split_points)
    held = [str(component) for component in Component if component not in absent]
    return f"{model.name} holds {', '.join(held) or 'no component'} only, no whole model" if absent else ""


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
    reads = read_plans(plan, paths, choose_devices(plan, options), whole_model(model, plan, lambda _: None))
    strategies = choose_strategies(model, options, reads)
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
    reads = read_plans(
        plan,
        here,
        dict.fromkeys([part.component for part in plan.components], device),
        whole_model(model, plan, lambda _: None),
    )
    partial = len(plan.components) < len(Component)
    able = [
        strategy
        for strategy in BUILT_IN
        if not (partial and isinstance(strategy, WholeStrategy)) and not any(map(strategy.refusal, reads.values()))
    ]
    return {strategy.name: _needs(dict.fromkeys(reads, strategy), reads) for strategy in able}


def check_memory(
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


def _names(strategies: Mapping[Component, LoadingStrategy]) -> str:
    return ", ".join(dict.fromkeys(strategy.name for strategy in strategies.values()))
