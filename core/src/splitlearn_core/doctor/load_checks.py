"""Plugins and models, used as a load uses them: what a plugin provides, whether a model opens, is cut and loads."""

from __future__ import annotations

import contextlib
import io
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TextIO

from splitlearn_core.checkpoint.files import CONFIG
from splitlearn_core.doctor.report import Finding, Level, failure, is_blocked, left_out, note, ok, wrong
from splitlearn_core.environment_errors import cause_of
from splitlearn_core.errors import ConfigurationError, InvalidSplitError, PluginError, SplitLearnError
from splitlearn_core.generation import has_tokenizer
from splitlearn_core.loading.load import import_builders, load_components
from splitlearn_core.loading.opening import BUNDLED, OpenModel, bundled_checkpoint, open_model
from splitlearn_core.loading.options import LoadOptions, memory_by_strategy, read_plans, whole_model
from splitlearn_core.loading.planning import fetch, make_plan, refuse_misfit
from splitlearn_core.loading_strategy import reserved_names
from splitlearn_core.plan.split_points import count_layers, impossible_cuts
from splitlearn_core.plan.splitplan import MemoryNeeds, SplitPlan
from splitlearn_core.plugins.host import LoadedPlugin
from splitlearn_core.plugins.metadata import FAMILY, STRATEGY, PluginEntry
from splitlearn_core.plugins.registry import PluginStatus, registry
from splitlearn_core.readers.mapped import MappedStrategy
from splitlearn_core.readers.selection import BUILT_IN
from splitlearn_core.system_memory import available_memory
from splitlearn_core.types import SAFETENSORS, human_bytes
from splitlearn_core.verification import verify_split

_LEVELS = {"ready": Level.OK, "blocked": Level.NOTE}


def check_plugin(kind: str, name: str, distribution: str) -> Iterator[Finding]:
    """Use a plugin as a load would.

    Args:
        kind: ``family`` or ``strategy``.
        name: The name of its entry point.
        distribution: Its package.
    """
    (entry,) = (e for e in registry().entries if (e.kind, e.name, e.distribution) == (kind, name, distribution))
    output, before = _Tee(sys.stdout), set(sys.modules)
    with contextlib.redirect_stdout(output):
        status = registry().status(entry, check=True)
    yield _status_finding(status)
    if status.status != "ready":
        return
    if printed := output.getvalue():
        what = f"{entry.label} prints when its hooks are called: {printed.strip()[:60]!r}"
        yield note(what, entry.module, "stdout is for the data of commands: print nothing, or use logging")
    if heavy := [name for name in ("torch", "transformers") if name in sys.modules.keys() - before]:
        what = f"{entry.label} imports {' and '.join(heavy)} when its hooks are called, which takes seconds"
        yield note(what, entry.module, "import them in the functions that use them")
    if kind == FAMILY:
        yield from broken_promises(registry().use(entry), registry().entries)


class _Tee(io.StringIO):
    """Keeps what is printed, and also prints it: a plugin may end the process before it is read here."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(text)
        return super().write(text)

    def flush(self) -> None:
        self._stream.flush()


def _status_finding(status: PluginStatus) -> Finding:
    """Return the finding on a plugin; if it is broken because a library is, the finding is about the library."""
    entry = status.entry
    hooks = ", ".join(hook.removeprefix("splitlearn_") for hook in status.hooks)
    what = status.error or f"{entry.what}: {entry.label}" + (f", with {hooks}" if hooks else "")
    if entry.label not in what:
        what = f"{entry.what} ({entry.label}): {what}"
    # The packages in a conflict share one finding.
    where = "" if status.status == "conflict" else entry.origin or entry.module
    finding = Finding("", _LEVELS.get(status.status, Level.WRONG), what, where, status.hint)
    if status.status != "broken":
        return finding
    try:
        registry().use(entry)
    except PluginError as error:
        cause = cause_of(error)
        if cause is not None and is_blocked(cause.library):
            return left_out(cause.library, f"{entry.what} ({entry.label})")
        if cause is not None and cause.library:
            return replace(finding, fix=cause.hint)
    return finding


def broken_promises(loaded: LoadedPlugin, entries: Sequence[PluginEntry]) -> Iterator[Finding]:
    """Find families without an entry point, and strategies and checkpoints that do not exist."""
    entry = loaded.entry
    named = {other.name for other in entries if (other.kind, other.distribution) == (FAMILY, entry.distribution)}
    for name in sorted(loaded.families.keys() - named):
        what = f"{entry.label} provides the family {name!r}, but no entry point names it: it is never used"
        yield wrong(what, entry.module, f'add {name} = "{entry.module}" to its entry points, and install it again')
    strategies = {*reserved_names(), *(strategy.name for strategy in loaded.strategies)}
    strategies |= {other.name for other in entries if other.kind == STRATEGY}
    for name, family in loaded.families.items():
        preferred = family.preferred_strategy
        if preferred and preferred not in strategies:
            what = f"the family {name!r} prefers the loading strategy {preferred!r}, which no plugin provides"
            yield wrong(what, entry.module, f"choose one of {', '.join(sorted(strategies))}")
        if family.bundled_checkpoint and not (bundled_checkpoint(family) / CONFIG).is_file():
            what = f"the family {name!r} names a bundled checkpoint that does not exist"
            yield wrong(what, str(bundled_checkpoint(family)), f"reinstall {entry.distribution}")


def check_self() -> Iterator[Finding]:
    """Split the first model that is bundled with a plugin, and compare it with the unsplit one."""
    for model_type in registry().model_types():
        # A broken plugin has a finding already.
        with contextlib.suppress(PluginError):
            family = registry().family(model_type)
            if family.bundled_checkpoint:
                break
    else:
        fix = "pip install splitlearn-gpt2, which has one; or verify your own: splitlearn verify MODEL --split A B"
        yield note("left out: no usable plugin has a bundled model", fix=fix)
        return
    model = open_model(BUNDLED + family.model_type)
    layers = count_layers(family, model.config)
    a, b = max(1, layers // 3), max(2, 2 * layers // 3)
    import_builders(family)
    started = time.perf_counter()
    proof = verify_split(model, (a, b), "auto", LoadOptions(), lambda _: None)
    seconds = time.perf_counter() - started
    if proof.equal:
        yield ok(f"{model.name} cut at {a} and {b} equals the unsplit model to the last bit ({seconds:.1f} s)")
    else:
        unequal = ", ".join(name for name, equal in proof.checks.items() if not equal)
        what = f"{model.name} cut differs from the unsplit model by up to {proof.max_difference:.3g} in {unequal}"
        yield wrong(what, str(model.checkpoint.folder), "report it, with splitlearn doctor --json")


def check_model(name: str, load: bool) -> list[Finding]:
    """Do what precedes a load, and then load the model if that costs next to nothing.

    Args:
        name: A directory, a repository on the Hub, or ``bundled:MODEL_TYPE``.
        load: Whether to load it, which imports torch and transformers.
    """
    findings: list[Finding] = []
    try:
        # Keeps the findings before an error.
        findings.extend(_model_findings(name, load))
    except (SplitLearnError, ImportError, OSError) as error:
        findings.append(failure(error, f"looking at {name}", "report it", name))
    return findings


def _model_findings(name: str, load: bool) -> Iterator[Finding]:
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
        what = f"loading it was not tried: {obstacle}"
        yield note(what, fix=f"splitlearn verify {shlex.quote(model.name)} --split {shown}")
    else:
        # Mapped weights read next to nothing.
        options = LoadOptions("cpu", MappedStrategy.name)
        load_components(model, fetch(model, planned, lambda _: None), options, lambda _: None)
        yield ok(f"{', '.join(plan.names[:-1])} and {plan.names[-1]} load")


def description(model: OpenModel) -> Iterator[Finding]:
    """Describe the checkpoint: its type, quantization and tokenizer."""
    family, checkpoint = model.family, model.checkpoint
    commit = f" at {checkpoint.source.commit[:12]}" if checkpoint.source.commit else ""
    owner = registry().plugin(family.model_type).entry.label
    layers = count_layers(family, model.config)
    yield ok(f"{model.name}{commit} is of type {family.model_type}, which {owner} provides; {layers} layers")
    if checkpoint.quantization and not checkpoint.is_opaque:
        yield ok(f"the weights are quantised ({checkpoint.quantization}): those of a component are dequantised")
    elif checkpoint.quantization:
        how = "transformers dequantises the whole model, if it can"
        what = f"the weights are quantised ({checkpoint.quantization}): {how}"
        yield note(what, fix="use a checkpoint with plain weights, which are mapped instead")
    if not has_tokenizer(model) and checkpoint.pretrained_arguments() is None:
        what = "it has no tokenizer: generate cannot be used, load and verify can"
        yield note(what, fix="save it next to the weights: AutoTokenizer.from_pretrained(...).save_pretrained(DIR)")


def possible_cuts(model: OpenModel) -> tuple[int, ...]:
    """Return split points that the family allows, near thirds of the model; a single one if only one is possible.

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
    """Report which strategies can read the model, why others cannot, and whether the memory suffices.

    Raises:
        ConfigurationError: None can.
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
    """Return why a model is not loaded for a check; empty if it can be."""
    checkpoint = model.checkpoint
    if checkpoint.is_opaque:
        return "its weights are quantised, and all of them would be dequantised"
    if checkpoint.format != SAFETENSORS:
        return f"weights in the format {checkpoint.format} are read as a whole"
    if not all(file.is_here for file in checkpoint.source.plan_fetch(checkpoint.wanted(plan.infos))):
        return "its weights are not all here"
    needed, free = memory_by_strategy(model, plan)[MappedStrategy.name].peak, available_memory()
    return f"it takes {human_bytes(needed)}, and {human_bytes(free)} are free" if needed > free else ""


def memory_needed(needs: Mapping[str, MemoryNeeds], free: int) -> Iterator[Finding]:
    """Report whether the memory suffices for the strategy that needs least.

    Args:
        needs: The memory that each strategy needs, by its name.
        free: Bytes that are available.
    """
    for name, need in sorted(needs.items(), key=lambda item: item[1].peak)[:1]:
        what = f"loading all of it takes {human_bytes(need.peak)} of memory of its own ({name}); "
        what += f"{human_bytes(free)} are free"
        fix = "load fewer components, or a smaller dtype; splitlearn plan MODEL --split A B --json has each one's bytes"
        yield wrong(what, fix=fix) if need.peak > free else ok(what)
