"""Bit-exact comparison of a split checkpoint with the unsplit one."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from splitlearn_core.errors import CheckpointError, ConfigurationError, translate
from splitlearn_core.generation import has_tokenizer, load_tokenizer
from splitlearn_core.loading.load import import_builders, load_components
from splitlearn_core.loading.opening import OpenModel
from splitlearn_core.loading.options import LoadOptions, check_options
from splitlearn_core.loading.planning import plan_and_fetch
from splitlearn_core.quoting import reason, said
from splitlearn_core.system_memory import anonymous_memory
from splitlearn_core.types import ProgressCallback

if TYPE_CHECKING:
    import torch

    from splitlearn_core.build.component import ComponentModel
    from splitlearn_core.hosts.remote import RemoteComponent

PROMPT = "It was a bright cold day, and the people of the town were at their work."
_NEW_TOKENS = 16
_RANDOM_TOKENS = 24


@dataclass(frozen=True, slots=True)
class ComponentCost:
    """Time and memory of one component."""

    component: str
    layers: tuple[int, int]
    #: Bytes of its tensors.
    bytes: int
    #: Anonymous memory that its load allocated.
    anonymous_bytes: int
    load_seconds: float
    forward_seconds: float


@dataclass(frozen=True, slots=True)
class LinkCost:
    """The traffic of the comparison with a component that runs elsewhere."""

    component: str
    url: str
    round_trips: int
    #: Bytes of hidden states, masks and positions, both ways, for each token of each sequence.
    bytes_per_token: float


@dataclass(frozen=True, slots=True)
class Verification:
    """The comparison of a split model with the unsplit one."""

    model: str
    split_points: tuple[int, ...]
    dtype: str
    #: The input: ``prompt``, or ``random tokens`` if there is no tokenizer.
    input: str
    #: Comparison -> whether it is equal to the last bit.
    checks: dict[str, bool]
    #: Largest absolute difference of two logits, over all comparisons.
    max_difference: float
    components: tuple[ComponentCost, ...]
    unsplit_load_seconds: float
    unsplit_forward_seconds: float
    #: The traffic of each component that runs elsewhere.
    links: tuple[LinkCost, ...] = ()

    @property
    def equal(self) -> bool:
        return all(self.checks.values())

    def to_dict(self) -> dict[str, Any]:
        return {"equal": self.equal, **asdict(self)}


def verify_split(
    model: OpenModel,
    split_points: Sequence[int],
    dtype: str | Mapping[Any, str],
    options: LoadOptions,
    progress: ProgressCallback,
    remote: Mapping[str, RemoteComponent] = {},
) -> Verification:
    """Load a checkpoint split and unsplit, and compare logits, cached decoding and generated tokens.

    Args:
        model: The checkpoint.
        split_points: Where it is cut.
        dtype: The dtype of all components.
        options: How to load them.
        progress: Called during loads.
        remote: Components that run elsewhere, by name.

    Raises:
        SplitLearnError: As :func:`load_split_model`.
        ConfigurationError: The components have different dtypes or devices, which the unsplit model cannot have.
        CheckpointError: transformers fails on the unsplit model, or its logits are NaN, so that there is nothing to
            compare with.
    """
    dtype = single_dtype(model, dtype, options)
    check_options(model, options)
    import_builders(model.family)
    from splitlearn_core.build.torch_state import own_state

    with own_state(gradients=False):
        return _verify(model, split_points, dtype, options, progress, remote)


def single_dtype(model: OpenModel, dtype: str | Mapping[Any, str], options: LoadOptions) -> str:
    """Return the dtype of all components; refuse several dtypes or devices, which the unsplit model cannot have."""
    if isinstance(dtype, str) and options.device_map is None:
        return dtype
    raise ConfigurationError(
        f"the unsplit model of {model.name}, which the components are compared with, has one dtype and one device",
        hint="give one for all components",
    )


def _verify(
    model: OpenModel,
    split_points: Sequence[int],
    dtype: str,
    options: LoadOptions,
    progress: ProgressCallback,
    remote: Mapping[str, RemoteComponent],
) -> Verification:
    from splitlearn_core.build.configuration import decoder_config
    from splitlearn_core.pipeline import SplitCausalLM

    plan = plan_and_fetch(model, split_points, None, dtype, progress).split
    parts: dict[str, Any] = {}
    loads = {}
    for component in plan.names:
        if component in remote:
            parts[component], loads[component] = remote[component], (0.0, 0)
            continue
        before, started = anonymous_memory(), time.perf_counter()
        fetched = plan_and_fetch(model, split_points, (component,), dtype, progress)
        parts.update(load_components(model, fetched, options, progress))
        loads[component] = (time.perf_counter() - started, max(0, anonymous_memory() - before))
    split = SplitCausalLM(*parts.values())
    started = time.perf_counter()
    with _transformers_errors(model):
        unsplit = load_unsplit(model, plan.dtype, options)
    unsplit_load = time.perf_counter() - started
    ids, mask = _inputs(model, decoder_config(model.family, unsplit.config).vocab_size)
    ids, mask = ids.to(options.device), mask.to(options.device)
    with _transformers_errors(model):
        expected = _run(unsplit, ids, mask)
    if bool(expected.logits.isnan().any()):
        raise CheckpointError(
            f"the unsplit model of {model.name} computes NaN, so that there is nothing to compare with",
            hint="its weights contain values that are not numbers"
            + ("" if plan.dtype == "float32" else f", or {plan.dtype} is too narrow: try --dtype float32"),
        )
    before_run = {name: _traffic(part) for name, part in remote.items()}
    checks, difference = _compare(expected, _run(split, ids, mask))
    # One forward of all tokens, and a generation, whose last token never enters the model.
    tokens = len(ids) * (2 * ids.shape[1] + _NEW_TOKENS - 1)
    links = tuple(
        LinkCost(name, part.url, trips - before_run[name][0], (size - before_run[name][1]) / tokens)
        for name, part in remote.items()
        for trips, size in [_traffic(part)]
    )
    unsplit_forward, forwards = _time_forwards(unsplit, parts, ids, mask)
    costs = tuple(
        ComponentCost(
            part.component,
            (part.layers.start, part.layers.end),
            0 if part.component in remote else part.nbytes,
            loads[part.component][1],
            loads[part.component][0],
            forwards[part.component],
        )
        for part in plan.components
    )
    kind_of_input = "prompt" if has_tokenizer(model) else "random tokens"
    return Verification(
        model.name,
        plan.split_points,
        plan.dtype,
        kind_of_input,
        checks,
        difference,
        costs,
        unsplit_load,
        unsplit_forward,
        links,
    )


def _traffic(part: RemoteComponent) -> tuple[int, int]:
    return part.host.round_trips, part.host.bytes_sent + part.host.bytes_received


def load_unsplit(model: OpenModel, dtype: str, options: LoadOptions) -> Any:
    """Load the whole model with ``from_pretrained``; its weight files are downloaded first.

    Raises:
        CheckpointError: transformers cannot read the checkpoint.
    """
    from splitlearn_core.build.configuration import architecture_class, hf_config
    from splitlearn_core.build.torch_state import BUILD_LOCK

    checkpoint = model.checkpoint
    paths = checkpoint.fetch(set(checkpoint.weight_map.values()), lambda _: None)
    directory = next(iter(paths.values())).parent
    arguments = checkpoint.pretrained_arguments()
    files = checkpoint.weight_files()
    if arguments is not None and len(files) > 1:
        raise CheckpointError(
            f"transformers itself reads no model in {len(files)} {checkpoint.format} files, so there is nothing "
            f"to compare {model.name} with",
            hint="to compare, join the files with the tools of their format; the split model works without that",
        )
    if arguments is not None:
        # Without it, transformers takes the configuration from the weight file and ignores config.json.
        config = hf_config(model.family, model.config, model.name, dtype, options.attn_implementation)
        arguments = {**arguments, "config": config}

    def failure(error: BaseException) -> CheckpointError | None:
        if arguments is None:
            return None
        return CheckpointError(
            f"transformers itself cannot read {model.name}, so that there is nothing to compare with: {reason(error)}",
            hint="pip install accelerate, if it is missing; the split model may be right nevertheless",
        )

    with translate(failure, (ImportError, ValueError, NotImplementedError)), BUILD_LOCK, _bars_on_terminals():
        whole = architecture_class(model.family).from_pretrained(
            directory,
            dtype=dtype,
            attn_implementation=options.attn_implementation,
            local_files_only=True,
            **(arguments or {}),
        )
    return whole.to(options.device)


@contextmanager
def _bars_on_terminals() -> Iterator[None]:
    """Show the progress bars of transformers only on a terminal."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _inputs(model: OpenModel, vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two sequences, the second shorter and padded on the left."""
    import torch

    if has_tokenizer(model):
        row = load_tokenizer(model)(PROMPT, return_tensors="pt")["input_ids"][0]
    else:
        row = torch.randint(0, vocabulary, (_RANDOM_TOKENS,), generator=torch.Generator().manual_seed(0))
    padding = len(row) // 3
    ids, mask = torch.stack([row, row]), torch.ones(2, len(row), dtype=torch.long)
    ids[1, padding:] = row[: len(row) - padding]
    ids[1, :padding], mask[1, :padding] = row[0], 0
    return ids, mask


def _transformers_errors(model: OpenModel) -> AbstractContextManager[None]:
    """Raise any error of the unsplit model, which a wrong configuration can cause, as a CheckpointError."""
    return translate(
        lambda error: CheckpointError(
            f"the unsplit model of {model.name} fails in transformers, so that there is nothing to compare with: "
            f"{said(error)}",
            hint="check the values of config.json: a model that from_pretrained of transformers loads fails likewise",
        )
    )


@dataclass(frozen=True, slots=True)
class _Output:
    """The output of one model."""

    logits: torch.Tensor
    #: The logits of each token that is generated with a cache.
    steps: tuple[torch.Tensor, ...]
    generated: torch.Tensor


def _run(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> _Output:
    import torch

    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=_NEW_TOKENS,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return _Output(logits, output.logits, output.sequences)


def _compare(expected: _Output, actual: _Output) -> tuple[dict[str, bool], float]:
    import torch

    steps = list(zip(expected.steps, actual.steps, strict=False))
    checks = {
        "logits": torch.equal(expected.logits, actual.logits),
        "decoding with a cache": all(torch.equal(a, b) for a, b in steps),
        "generated tokens": torch.equal(expected.generated, actual.generated),
    }
    return checks, max(float((a - b).abs().max()) for a, b in [(expected.logits, actual.logits), *steps])


def _time_forwards(
    unsplit: Any, parts: dict[str, ComponentModel], ids: torch.Tensor, mask: torch.Tensor
) -> tuple[float, dict[str, float]]:
    import torch

    seconds: dict[str, float] = {}
    with torch.inference_mode():
        started = time.perf_counter()
        unsplit(input_ids=ids, attention_mask=mask, use_cache=False)
        whole = time.perf_counter() - started
        state: Any = ids
        for component, part in parts.items():
            started = time.perf_counter()
            state = part(state, attention_mask=mask)
            seconds[component] = time.perf_counter() - started
    return whole, seconds
