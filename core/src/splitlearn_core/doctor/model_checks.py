"""One model: can it be opened, what type is it, how can it be cut, which strategies read it, and does it load?"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping

from splitlearn_core.doctor.report import Finding, failure, note, ok, wrong
from splitlearn_core.errors import ConfigurationError, InvalidSplitError, SplitLearnError
from splitlearn_core.generation import has_tokenizer
from splitlearn_core.loading.load import load_components
from splitlearn_core.loading.opening import OpenModel, open_model
from splitlearn_core.loading.options import LoadOptions, memory_by_strategy, read_plans, whole_model
from splitlearn_core.loading.planning import fetch, make_plan, refuse_misfit
from splitlearn_core.plan.split_points import count_layers, impossible_cuts
from splitlearn_core.plan.splitplan import MemoryNeeds, SplitPlan
from splitlearn_core.plugins.registry import registry
from splitlearn_core.readers.mapped import MappedStrategy
from splitlearn_core.readers.selection import BUILT_IN
from splitlearn_core.system_memory import available_memory
from splitlearn_core.types import SAFETENSORS, human_bytes


def check_model(name: str, load: bool) -> list[Finding]:
    """Do all that precedes a load, and then load, where that costs next to nothing.

    Args:
        name: A directory, a repository on the Hub, or ``bundled:MODEL_TYPE``.
        load: Whether to load it, which imports torch and transformers.
    """
    findings: list[Finding] = []
    try:
        # One by one: what precedes an error is reported, too.
        for finding in _examined(name, load):
            findings.append(finding)  # noqa: PERF402
    except (SplitLearnError, ImportError, OSError) as error:
        findings.append(failure(error, f"looking at {name}", "report it", name))
    return findings


def _examined(name: str, load: bool) -> Iterator[Finding]:
    model = open_model(name)
    checkpoint = model.checkpoint
    yield from description(model)
    points = possible_cuts(model)
    shown = " ".join(map(str, points))
    yield ok(f"it can be cut, for example with --split {shown}")
    checkpoint.require_weights()
    if checkpoint.is_describable:
        checkpoint.source.require(checkpoint.weight_files())
    planned = make_plan(model, points, None, "auto")
    refuse_misfit(model, planned)
    plan = planned.split
    files = f"{len(plan.shards)} files" if len(plan.shards) > 1 else "one file"
    yield ok(f"{human_bytes(plan.nbytes)} in {files}, loads as {plan.dtype}")
    yield from usable_strategies(model, plan)
    if not load:
        return
    if obstacle := load_obstacle(model, plan):
        what = f"whether its tensors are those of the model was not tried: {obstacle}"
        yield note(what, fix=f"splitlearn verify {shlex.quote(model.name)} --split {shown}")
    else:
        # Views of the mapped file, which read next to nothing.
        options = LoadOptions("cpu", MappedStrategy.name)
        load_components(model, fetch(model, planned, lambda _: None), options, lambda _: None)
        yield ok(f"{', '.join(plan.names[:-1])} and {plan.names[-1]} load")


def description(model: OpenModel) -> Iterator[Finding]:
    """Describe the checkpoint that was found under the name."""
    family, checkpoint = model.family, model.checkpoint
    commit = f" at {checkpoint.source.commit[:12]}" if checkpoint.source.commit else ""
    owner = registry().plugin(family.model_type).entry.label
    layers = count_layers(family, model.config)
    yield ok(f"{model.name}{commit} is of type {family.model_type}, which {owner} provides; {layers} layers")
    if checkpoint.quantization:
        what = f"the weights are quantised ({checkpoint.quantization}): the whole model is loaded to take parts of it"
        yield note(what, fix="a checkpoint with plain weights is mapped instead")
    if not has_tokenizer(model) and checkpoint.pretrained_arguments() is None:
        what = "it has no tokenizer: generate cannot be used, load and verify can"
        yield note(what, fix="save it beside the weights: AutoTokenizer.from_pretrained(...).save_pretrained(DIR)")


def possible_cuts(model: OpenModel) -> tuple[int, ...]:
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
            f"{model.name} has {layers} layers and no possible cut; two components need one",
            hint="it can only be loaded whole: a model of the manager with model_type 'huggingface'",
        )
    first = min(possible[:-1], key=lambda point: abs(point - layers / 3))
    second = min((point for point in possible if point > first), key=lambda point: abs(point - 2 * layers / 3))
    return first, second


def usable_strategies(model: OpenModel, plan: SplitPlan) -> Iterator[Finding]:
    """Say which strategies read the model, why others do not, and whether the memory suffices.

    Raises:
        ConfigurationError: None does.
    """
    source = model.checkpoint.source
    paths = {shard: source.path(shard) for shard in plan.shards if source.is_here(shard)}
    reads = read_plans(plan, paths, dict.fromkeys(plan.names, "cpu"), whole_model(model, plan, lambda _: None))
    names: list[str] = []
    for strategy in (*BUILT_IN, *registry().strategies(model.family)):
        refusal = next(filter(None, map(strategy.refusal, reads.values())), "")
        if refusal:
            yield ok(f"not read by {strategy.name}: {refusal}")
        else:
            names.append(strategy.name)
    if not names:
        raise ConfigurationError(
            "no loading strategy can read it", hint="splitlearn plugins --strategies lists what each reads"
        )
    needs = memory_by_strategy(model, plan)
    shown = [f"{name} ({human_bytes(needs[name].peak)})" if name in needs else name for name in names]
    yield ok(f"read by {', '.join(shown)}")
    yield from memory_needed(needs, available_memory())


def load_obstacle(model: OpenModel, plan: SplitPlan) -> str:
    """Say why a model is not loaded for a check; empty where it can be."""
    checkpoint = model.checkpoint
    if checkpoint.quantization:
        return "its weights are quantised, and all of them would be dequantised"
    if checkpoint.format != SAFETENSORS:
        return f"weights in the format {checkpoint.format} are read as a whole"
    if not all(file.is_here for file in checkpoint.source.plan_fetch(checkpoint.wanted(plan.infos))):
        return "its weights are not all here"
    needed, free = memory_by_strategy(model, plan)[MappedStrategy.name].peak, available_memory()
    return f"it takes {human_bytes(needed)}, and {human_bytes(free)} are free" if needed > free else ""


def memory_needed(needs: Mapping[str, MemoryNeeds], free: int) -> Iterator[Finding]:
    """Say whether the memory suffices for the strategy that needs least.

    Args:
        needs: The memory that each strategy needs, by its name.
        free: Bytes that are available.
    """
    if not needs:
        return
    least = min(needs, key=lambda name: needs[name].peak)
    needed = needs[least].peak
    what = f"loading all of it takes {human_bytes(needed)} of memory of its own ({least}); {human_bytes(free)} are free"
    fix = "load fewer components, or a smaller dtype; splitlearn plan MODEL --split A B --json has each one's bytes"
    yield wrong(what, fix=fix) if needed > free else ok(what)
