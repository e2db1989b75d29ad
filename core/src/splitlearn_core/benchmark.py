"""Measure how a checkpoint loads and runs, split and unsplit, in new processes that take turns."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from splitlearn_core.child_process import command_for, ending, reserve_stdout
from splitlearn_core.errors import ConfigurationError, SplitLearnError
from splitlearn_core.family import STATES
from splitlearn_core.loading.load import import_builders, load_components
from splitlearn_core.loading.opening import OpenModel, open_model
from splitlearn_core.loading.options import LoadOptions, check_options
from splitlearn_core.loading.planning import plan_and_fetch
from splitlearn_core.plan.split_points import names_of_parts
from splitlearn_core.plan.splitplan import parse_parts
from splitlearn_core.system_memory import anonymous_memory
from splitlearn_core.types import Component, ProgressCallback
from splitlearn_core.verification import load_unsplit, single_dtype

if TYPE_CHECKING:
    import torch

#: Tokens of the prompt and generated tokens, if the model has that many positions.
_PROMPT_TOKENS, _NEW_TOKENS = 32, 32
#: Seconds between two readings of a process's memory.
_SAMPLING_INTERVAL = 0.002

#: Modules that a load or a first call of either side imports; they are imported before the clock starts.
_IMPORTS = (
    "splitlearn_core.build.assemble",
    "splitlearn_core.pipeline",
    "transformers.generation",
    "transformers.modeling_utils",
)

#: The two sides that are measured besides the chosen parts.
_ALL, _PEER = "all", "from_pretrained"


@dataclass(frozen=True, slots=True)
class Run:
    """The measurements of one process."""

    load_seconds: float
    #: From the start of the load to the end of the first forward, in which mapped weights are read.
    first_forward_seconds: float
    tokens_per_second: float | None
    #: Peak of anonymous memory above that of the imports; None if it cannot be read.
    peak_bytes: int | None
    #: Peak of allocated memory on a CUDA device; None on any other.
    device_peak_bytes: int | None
    tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Sample:
    """One quantity, measured once in each round."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return median(self.values)

    @property
    def summary(self) -> tuple[float, ...]:
        """The median, the minimum and the maximum; for one measurement, only its value."""
        return (self.median, min(self.values), max(self.values)) if len(self.values) > 1 else self.values

    def to_dict(self) -> dict[str, Any]:
        return {"median": self.median, "values": list(self.values)}


@dataclass(frozen=True, slots=True)
class Metric:
    """A quantity that is compared."""

    name: str
    #: The field of :class:`Run`.
    field: str
    unit: str
    higher_is_better: bool = False


METRICS = (
    Metric("load", "load_seconds", "s"),
    Metric("load + first forward", "first_forward_seconds", "s"),
    Metric("generation", "tokens_per_second", "tokens/s", higher_is_better=True),
    Metric("peak memory", "peak_bytes", "B"),
    Metric("peak device memory", "device_peak_bytes", "B"),
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One quantity of some components, compared with that of the whole model."""

    #: The components: ``trunk``, ``bottom,top``, or ``all``.
    parts: str
    metric: Metric
    split: Sample
    unsplit: Sample | None
    #: How many times better the split side is in each round; None if a value is zero.
    ratio: Sample | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "parts": self.parts,
            "metric": self.metric.name,
            "unit": self.metric.unit,
            "splitlearn": self.split.to_dict(),
            "from_pretrained": self.unsplit and self.unsplit.to_dict(),
            "ratio": self.ratio and self.ratio.to_dict(),
        }


@dataclass(frozen=True, slots=True)
class Failure:
    """Why one side could not be measured."""

    message: str
    hint: str = ""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """All measurements of one checkpoint and split."""

    model: str
    split_points: tuple[int, ...]
    dtype: str
    device: str
    runs: int
    comparisons: tuple[Comparison, ...]
    #: Name of a side -> why it could not be measured.
    failures: Mapping[str, Failure]
    #: Whether split and unsplit generated the same tokens; None if one of them could not be measured.
    equal_tokens: bool | None

    @property
    def succeeded(self) -> bool:
        """Whether everything was measured, and both models compute the same."""
        return not self.failures and self.equal_tokens is not False

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "split_points": list(self.split_points),
            "dtype": self.dtype,
            "device": self.device,
            "runs": self.runs,
            "comparisons": [comparison.to_dict() for comparison in self.comparisons],
            "failures": {name: asdict(failure) for name, failure in self.failures.items()},
            "equal_tokens": self.equal_tokens,
        }


@dataclass(frozen=True, slots=True)
class Target:
    """The checkpoint, and how it is loaded; only strings and numbers, because it is passed to another process."""

    model: str
    hub: Mapping[str, Any]
    split_points: tuple[int, ...]
    dtype: str
    device: str
    strategy: str
    attn_implementation: str | None
    max_memory: Mapping[str, int]
    strict: bool

    def open(self) -> OpenModel:
        return open_model(self.model, **{**self.hub, "local_files_only": True})

    def options(self) -> LoadOptions:
        return LoadOptions(
            self.device, self.strategy, self.attn_implementation, max_memory=self.max_memory, strict=self.strict
        )


def run_benchmark(
    model: OpenModel,
    split_points: Sequence[int],
    dtype: str | Mapping[Any, str],
    options: LoadOptions,
    parts: Sequence[str] = (Component.TRUNK,),
    *,
    runs: int = 3,
    hub: Mapping[str, Any] | None = None,
    progress: ProgressCallback = lambda _: None,
    report: Callable[[str], None] = lambda _: None,
) -> Benchmark:
    """Measure some components, all of them, and ``from_pretrained`` of the whole model.

    Args:
        model: The checkpoint; all of it is fetched before anything is measured.
        split_points: Where to cut.
        dtype: The dtype of all components.
        options: How they are loaded; one device for all.
        parts: The components that are measured on their own.
        runs: How often each side is measured, each time in a new process.
        hub: ``cache_dir`` and ``revision``, with which the model was opened.
        progress: Called while weights are fetched.
        report: Called with a line about the next measurement.

    Raises:
        SplitLearnError: As :func:`load_split_model`, if the checkpoint cannot be planned or fetched.
        ConfigurationError: The components have different dtypes or devices, which the unsplit model cannot have.
    """
    dtype = single_dtype(model, dtype, options)
    if runs < 1:
        raise ConfigurationError(f"{runs} runs measure nothing", hint="give at least one")
    check_options(model, options)
    plan = plan_and_fetch(model, split_points, None, dtype, progress).split
    model.checkpoint.fetch(set(model.checkpoint.weight_map.values()), progress)
    target = Target(
        model.name,
        hub or {},
        plan.split_points,
        # Not "auto", which transformers resolves by other rules.
        plan.dtype,
        options.device,
        options.strategy,
        options.attn_implementation,
        dict(options.max_memory),
        options.strict,
    )
    names = ["" if set(parts) == set(plan.names) else ",".join(parts), _ALL, _PEER]
    runs_of, failures = _measure_in_turns(target, list(filter(None, names)), runs, report)
    unsplit = runs_of.pop(_PEER, [])
    comparisons = [comparison for name, split in runs_of.items() for comparison in _compare(name, split, unsplit)]
    tokens = {run.tokens for run in (*runs_of.get(_ALL, ()), *unsplit)}
    return Benchmark(
        model.name,
        plan.split_points,
        plan.dtype,
        options.device,
        runs,
        tuple(comparisons),
        failures,
        len(tokens) == 1 if unsplit and _ALL in runs_of else None,
    )


def _measure_in_turns(
    target: Target, names: Sequence[str], runs: int, report: Callable[[str], None]
) -> tuple[dict[str, list[Run]], dict[str, Failure]]:
    """Measure A B C, C B A, ..., so that a drift of the machine affects all sides alike.

    A first round of only the whole model is not counted: it brings weights and libraries into the page cache.
    """
    runs_of: dict[str, list[Run]] = {name: [] for name in names}
    failures: dict[str, Failure] = {}
    rounds = [(f"run {number + 1} of {runs}", names[:: -1 if number % 2 else 1]) for number in range(runs)]
    for number, (label, order) in enumerate([("warm-up", [_PEER]), *rounds]):
        for name in order:
            if name in failures:
                continue
            report(f"{label}: {name}")
            result = _measure(target, name)
            if isinstance(result, Failure):
                failures[name] = result
            elif number > 0:
                runs_of[name].append(result)
    return {name: results for name, results in runs_of.items() if name not in failures}, failures


def _compare(parts: str, split: Sequence[Run], unsplit: Sequence[Run]) -> Iterator[Comparison]:
    for metric in METRICS:
        ours, theirs = ([getattr(run, metric.field) for run in runs] for runs in (split, unsplit))
        if None in ours:
            continue
        pairs = [(a, b) if metric.higher_is_better else (b, a) for a, b in zip(ours, theirs, strict=bool(theirs))]
        is_comparable = bool(pairs) and all(a and b for a, b in pairs)
        yield Comparison(
            parts,
            metric,
            Sample(tuple(ours)),
            Sample(tuple(theirs)) if theirs else None,
            Sample(tuple(a / b for a, b in pairs)) if is_comparable else None,
        )


def _measure(target: Target, name: str) -> Run | Failure:
    """Measure one side in a new process."""
    process = subprocess.Popen(  # noqa: S603  # this interpreter, and a function of ours
        command_for(print_measurements, json.dumps(asdict(target)), name),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    readings: list[tuple[float, int]] = []
    is_over = threading.Event()
    if sys.platform == "linux":
        threading.Thread(target=_read_memory, args=(process.pid, readings, is_over), daemon=True).start()
    try:
        output, errors = process.communicate()
    finally:
        is_over.set()
        process.kill()
        process.wait()
    if process.returncode:
        lines = [line.strip() for line in errors.splitlines() if line.strip()]
        how_it_ended = ending(process.returncode)
        hint = "perhaps there was not enough memory" if how_it_ended.endswith("SIGKILL") else ""
        return Failure(f"{how_it_ended}{f': {lines[-1]}' if lines else ''}", hint)
    measured: dict[str, Any] = json.loads(output)
    if "message" in measured:
        return Failure(**measured)
    begin, end, before, after = (measured.pop(key) for key in ("begin", "end", "memory_before", "memory_after"))
    if sys.platform == "linux":
        peak = max([after, *(size for moment, size in readings if begin <= moment <= end)])
        measured["peak_bytes"] = max(0, peak - before)
    return Run(**{"peak_bytes": None, **measured, "tokens": tuple(measured["tokens"])})


def _read_memory(pid: int, readings: list[tuple[float, int]], is_over: threading.Event) -> None:
    """Follow the memory of a process from outside, which does not slow its threads."""
    while not is_over.wait(_SAMPLING_INTERVAL):
        try:
            readings.append((time.monotonic(), anonymous_memory(pid)))
        except (OSError, KeyError):
            return  # the process has ended


def print_measurements(target: str, name: str) -> None:
    """Measure one side in this process, and print the result as JSON.

    Args:
        target: A :class:`Target` as JSON.
        name: ``from_pretrained``, ``all``, or names of components.
    """
    answers = reserve_stdout()
    fields = json.loads(target)
    try:
        measured = _measure_here(Target(**{**fields, "split_points": tuple(fields["split_points"])}), name)
    except SplitLearnError as error:
        measured = {"message": error.message, "hint": error.hint}
    with answers:
        json.dump(measured, answers)


def _measure_here(target: Target, name: str) -> dict[str, Any]:
    model = target.open()
    import_builders(model.family)
    for module in _IMPORTS:
        importlib.import_module(module)
    import torch

    from splitlearn_core.build.configuration import decoder_config
    from splitlearn_core.build.torch_state import own_state

    is_cuda = torch.device(target.device).type == "cuda"
    finish: Callable[[], None] = torch.cuda.synchronize if is_cuda else lambda: None
    if is_cuda:
        torch.zeros(1, device=target.device)  # creates the CUDA context, which takes a second
    tokens: tuple[int, ...] = ()
    tokens_per_second = None
    with own_state(gradients=False):
        memory_before, begin = anonymous_memory(), time.monotonic()
        loaded = _load(target, model, name)
        finish()
        loaded_at = time.monotonic()
        config = decoder_config(model.family, next(iter(loaded.values())).config)
        length = min(_PROMPT_TOKENS, (getattr(config, "max_position_embeddings", None) or 2 * _PROMPT_TOKENS) // 2)
        ids = torch.randint(0, config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
        ids = ids.to(target.device)
        for part, module in loaded.items():
            _forward(part, module, ids)
        finish()
        end, memory_after = time.monotonic(), anonymous_memory()
        if name in (_ALL, _PEER):
            tokens, tokens_per_second = _generate(loaded[name], ids)
    return {
        "begin": begin,
        "end": end,
        "memory_before": memory_before,
        "memory_after": memory_after,
        "load_seconds": loaded_at - begin,
        "first_forward_seconds": end - begin,
        "tokens_per_second": tokens_per_second,
        "tokens": tokens,
        "device_peak_bytes": torch.cuda.max_memory_allocated(target.device) if is_cuda else None,
    }


def _load(target: Target, model: OpenModel, name: str) -> dict[str, Any]:
    """Load one side; the split side opens and plans the checkpoint again, as its users do."""
    if name == _PEER:
        return {_PEER: load_unsplit(model, target.dtype, target.options())}
    model = target.open()
    if name == _ALL:
        from splitlearn_core.assembly import load_all

        return {_ALL: load_all(model, target.split_points, target.dtype, target.options(), lambda _: None)}
    requested = parse_parts(name.split(","), names_of_parts(target.split_points))
    fetched = plan_and_fetch(model, target.split_points, requested, target.dtype, lambda _: None)
    components = load_components(model, fetched, target.options(), lambda _: None)
    return {str(component): module for component, module in components.items()}


def _forward(part: str, module: Any, ids: torch.Tensor) -> None:
    import torch

    if part in (_ALL, _PEER):
        module(input_ids=ids, use_cache=False)
    elif part == Component.BOTTOM:
        module(input_ids=ids)
    else:
        left = module.layer_range.total - module.layer_range.start
        shapes = {name: tensor.shape(left) for name, tensor in module.crossing.items()}
        generator = torch.Generator().manual_seed(0)
        crossing = {
            name: torch.randn(*ids.shape, *shape, generator=generator).to(ids.device, module.weights_dtype)
            for name, shape in (shapes or {STATES: (module.decoder_config.hidden_size,)}).items()
        }
        module(**crossing)


def _generate(module: Any, ids: torch.Tensor) -> tuple[tuple[int, ...], float]:
    """Generate greedily, and return the tokens and their number per second."""
    import torch

    begin = time.monotonic()
    output = module.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=min(_NEW_TOKENS, ids.shape[1]),
        max_new_tokens=min(_NEW_TOKENS, ids.shape[1]),
        pad_token_id=0,
    )
    # Waits for the device, which may still be computing the tokens.
    tokens = tuple(output[0, ids.shape[1] :].tolist())
    return tokens, len(tokens) / (time.monotonic() - begin)
