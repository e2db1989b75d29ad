"""One model: can it be opened, whose is it, how can it be cut, who reads it, does it fit, and does it load?"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping

from splitlearn_core.doctor.report import Finding, Level, failed
from splitlearn_core.errors import ConfigurationError, InvalidSplitError, SplitLearnError
from splitlearn_core.generation import has_tokenizer
from splitlearn_core.loading.load import load_components
from splitlearn_core.loading.opening import OpenModel, open_model
from splitlearn_core.loading.options import LoadOptions, memory_by_strategy, read_plans, whole_model
from splitlearn_core.loading.planning import make_plan, refuse_misfit
from splitlearn_core.plan.keys import KeyTable
from splitlearn_core.plan.split_points import count_layers, impossible_cuts
from splitlearn_core.plan.splitplan import MemoryNeeds, SplitPlan
from splitlearn_core.plugins.registry import registry
from splitlearn_core.readers.mapped import MappedStrategy
from splitlearn_core.readers.selection import BUILT_IN
from splitlearn_core.system_memory import available_memory
from splitlearn_core.types import SAFETENSORS, human_bytes

_NAME = "model"


def check_model(name: str, load: bool) -> list[Finding]:
    """Do all that comes before a load, and then load, where that costs next to nothing.

    Args:
        name: A directory, a repository on the Hub, or ``bundled:MODEL_TYPE``.
        load: Whether to load it, which imports torch and transformers.
    """
    found: list[Finding] = []
    try:
        model = open_model(name)
        found += opened(model)
        points = cuts(model)
        found.append(_ok(f"it can be cut, for example with --split {' '.join(map(str, points))}"))
        model.checkpoint.require_weights()
        if model.checkpoint.is_describable:
            model.checkpoint.source.require(model.checkpoint.weight_files())
        plan, table = make_plan(model, points, None, "auto")
        refuse_misfit(model, plan, table)
        files = f"{len(plan.shards)} files" if len(plan.shards) > 1 else "one file"
        found.append(_ok(f"{human_bytes(plan.nbytes)} in {files}, loads as {plan.dtype}"))
        found += readers(model, plan)
        if load:
            found.append(loaded(model, plan, table))
    except (SplitLearnError, ImportError, OSError) as error:
        found.append(failed(_NAME, error, f"looking at {name}", "report it", name))
    return found


def opened(model: OpenModel) -> Iterator[Finding]:
    """Say what was found under the name."""
    family, checkpoint = model.family, model.checkpoint
    commit = f" at {checkpoint.source.commit[:12]}" if checkpoint.source.commit else ""
    owner = registry().plugin(family.model_type).entry.label
    layers = count_layers(family, model.config)
    yield _ok(f"{model.name}{commit} is of type {family.model_type}, which {owner} provides; {layers} layers")
    if checkpoint.quantization:
        what = f"the weights are quantised ({checkpoint.quantization}): the whole model is loaded to take parts of it"
        yield Finding(_NAME, Level.NOTE, what, mend="a checkpoint with plain weights is mapped instead")
    if not has_tokenizer(model) and checkpoint.pretrained_arguments() is None:
        what = "it has no tokenizer: generate cannot be used, load and verify can"
        mend = "save it beside the weights: AutoTokenizer.from_pretrained(...).save_pretrained(DIR)"
        yield Finding(_NAME, Level.NOTE, what, mend=mend)


def cuts(model: OpenModel) -> tuple[int, ...]:
    """Return split points near the thirds of a model that its family allows; the only one where there is one.

    Raises:
        InvalidSplitError: There are none.
    """
    layers = count_layers(model.family, model.config)
    impossible = impossible_cuts(model.family, model.config)
    possible = [point for point in range(1, layers) if point not in impossible]
    if len(possible) == 1:
        return tuple(possible)
    if not possible:
        raise InvalidSplitError(
            f"{model.name} has {layers} layers and bears no cut; two components need one",
            hint="it can only be loaded whole: a model of the manager with model_type 'huggingface'",
        )
    first = min(possible[:-1], key=lambda point: abs(point - layers / 3))
    second = min((point for point in possible if point > first), key=lambda point: abs(point - 2 * layers / 3))
    return first, second


def readers(model: OpenModel, plan: SplitPlan) -> Iterator[Finding]:
    """Say which strategies read the model, why others do not, and whether there is the memory for it."""
    source = model.checkpoint.source
    here = {shard: source.path(shard) for shard in plan.shards if source.is_here(shard)}
    devices = dict.fromkeys(plan.names, "cpu")
    reads = read_plans(plan, here, devices, whole_model(model, plan, lambda _: None))
    able: list[str] = []
    for strategy in (*BUILT_IN, *registry().strategies(model.family)):
        refusal = next(filter(None, map(strategy.refusal, reads.values())), "")
        if refusal:
            yield _ok(f"not read by {strategy.name}: {refusal}")
        else:
            able.append(strategy.name)
    if not able:
        raise ConfigurationError(
            "no loading strategy can read it", hint="splitlearn plugins --strategies lists what each reads"
        )
    needs = memory_by_strategy(model, plan)
    shown = [f"{name} ({human_bytes(needs[name].peak)})" if name in needs else name for name in able]
    yield _ok(f"read by {', '.join(shown)}")
    yield from room(needs, available_memory())


def loaded(model: OpenModel, plan: SplitPlan, table: KeyTable) -> Finding:
    """Load all components as views of the mapped file, which reads next to nothing, or say why not.

    Raises:
        SplitLearnError: They do not load.
    """
    refusal = not_loaded(model, plan)
    if refusal:
        points = " ".join(map(str, plan.split_points))
        what = f"whether its tensors are those of the model was not tried: {refusal}"
        return Finding(_NAME, Level.NOTE, what, mend=f"splitlearn verify {shlex.quote(model.name)} --split {points}")
    load_components(model, plan, table, LoadOptions("cpu", MappedStrategy.name), lambda _: None)
    return _ok(f"{', '.join(plan.names[:-1])} and {plan.names[-1]} load")


def not_loaded(model: OpenModel, plan: SplitPlan) -> str:
    """Say why a model is not loaded for a check; empty where it can be."""
    checkpoint = model.checkpoint
    if checkpoint.quantization:
        return "its weights are quantised, and all of them would be dequantised"
    if checkpoint.format != SAFETENSORS:
        return f"weights in the format {checkpoint.format} are read as a whole"
    if not all(file.is_here for file in checkpoint.source.plan_fetch(checkpoint.wanted(plan.infos))):
        return "its weights are not all here"
    takes, free = memory_by_strategy(model, plan)[MappedStrategy.name].peak, available_memory()
    return f"it takes {human_bytes(takes)}, and {human_bytes(free)} are free" if takes > free else ""


def room(needs: Mapping[str, MemoryNeeds], free: int) -> Iterator[Finding]:
    """Say whether any strategy finds the memory that it takes.

    Args:
        needs: What each takes, by its name.
        free: Bytes that can be had.
    """
    if not needs:
        return
    least = min(needs, key=lambda name: needs[name].peak)
    took = f"{human_bytes(needs[least].peak)} of memory of its own ({least})"
    what = f"loading all of it takes {took}; {human_bytes(free)} are free"
    if needs[least].peak > free:
        mend = (
            "load fewer components, or a smaller dtype; splitlearn plan MODEL --split A B --json has each one's bytes"
        )
        yield Finding(_NAME, Level.WRONG, what, mend=mend)
    else:
        yield _ok(what)


def _ok(what: str) -> Finding:
    return Finding(_NAME, Level.OK, what)
