"""The built-in loading strategies: the choice of one, and reading with it, compared with the plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING

from splitlearn_core.errors import BrokenPluginError, ConfigurationError, translate
from splitlearn_core.loading_strategy import AUTO, BUILT_IN_NAMES, LoadingStrategy, ReadPlan, torch_dtype
from splitlearn_core.plan.splitplan import PlannedTensor
from splitlearn_core.quoting import said
from splitlearn_core.readers.copied import CopiedStrategy
from splitlearn_core.readers.dequantising import dequantising_bytes
from splitlearn_core.readers.made_tensors import MadeTensors, result_dtype
from splitlearn_core.readers.mapped import IncrementalStrategy, MappedStrategy, WholeStrategy
from splitlearn_core.types import stored_dtype

if TYPE_CHECKING:
    import torch

#: Core's own, in the order in which ``auto`` tries them.
BUILT_IN: tuple[LoadingStrategy, ...] = (
    MappedStrategy(),
    CopiedStrategy(),
    IncrementalStrategy(),
    WholeStrategy(),
)


def check_strategy(name: str, added: Iterable[LoadingStrategy] = ()) -> dict[str, LoadingStrategy]:
    """Return the known strategies by name, and check that a requested name is one of them.

    Raises:
        ConfigurationError: There is no strategy of that name.
    """
    known = {strategy.name: strategy for strategy in (*BUILT_IN, *added)}
    if name not in (AUTO, *known):
        raise ConfigurationError(
            f"there is no loading strategy {name!r}", hint=f"choose from {', '.join((AUTO, *known))}"
        )
    return known


def choose_strategy(
    name: str, plans: Sequence[ReadPlan], added: Iterable[LoadingStrategy] = (), preferred: str = ""
) -> LoadingStrategy:
    """Choose a strategy: the requested one, else the one that the family prefers, else the cheapest.

    Raises:
        ConfigurationError: There is no strategy of that name, or it refuses the plan; the reason is given.
    """
    known = check_strategy(name, added)
    if name != AUTO:
        refusal = next(filter(None, map(known[name].refusal, plans)), "")
        if refusal:
            raise ConfigurationError(f"loading strategy {name!r} cannot do this: {refusal}", hint=f"try {AUTO!r}")
        return known[name]
    candidates = [known[preferred]] if preferred in known else []
    # Views save nothing where most bytes have to be converted.
    converted = sum(t.info.nbytes for plan in plans for t in plan.tensors if plan.needs_conversion(t))
    mostly_converted = 2 * converted > sum(plan.nbytes for plan in plans)
    own = sorted(BUILT_IN, key=lambda strategy: mostly_converted and isinstance(strategy, MappedStrategy))
    # Added strategies come last, for files that core cannot read.
    added_last = [strategy for strategy in known.values() if strategy not in BUILT_IN]
    for strategy in (*candidates, *own, *added_last):
        if not any(strategy.refusal(plan) for plan in plans):
            return strategy
    raise ConfigurationError("no loading strategy can read this plan")


def predicted_bytes(strategy: LoadingStrategy, plan: ReadPlan) -> int:
    """Return the memory in bytes that a strategy predicts for a read; raises BrokenPluginError if that fails."""
    with _strategy_errors(strategy):
        return int(strategy.anonymous_bytes(plan)) + dequantising_bytes(plan.tensors, plan.dtype)


def passing_bytes(strategy: LoadingStrategy, plan: ReadPlan) -> int:
    """Return how many bytes of :func:`predicted_bytes` a strategy frees after the read.

    It is the result of its method ``passing_bytes(plan)``, or 0 without one.
    """
    method = getattr(strategy, "passing_bytes", None)
    own = dequantising_bytes(plan.tensors, plan.dtype)
    if method is None:
        return own
    with _strategy_errors(strategy):
        return int(method(plan)) + own


def read_checked(strategy: LoadingStrategy, plan: ReadPlan) -> Iterator[tuple[PlannedTensor, torch.Tensor]]:
    """Read with a strategy, compare each tensor that it yields with the plan, and make others of those with places.

    Yields the tensors of the module.

    Raises:
        BrokenPluginError: It raised, or yielded other tensors than were planned.
        CheckpointError: A file is invalid, or was changed.
    """
    import torch

    wanted = {planned.module_key: planned for planned in plan.tensors}
    made = MadeTensors(plan)
    device = torch.device(plan.device).type
    with _strategy_errors(strategy):
        for given, tensor in strategy.read(replace(plan, region=made.region)):
            planned = wanted.pop(given.module_key, None)
            if planned is None:
                raise _broken(strategy, f"it yielded {given.module_key}, which is not or no longer wanted")
            if not isinstance(tensor, torch.Tensor):
                raise _broken(strategy, f"it yielded {type(tensor).__name__} for {planned.module_key}, no tensor")
            dtype = plan.loaded_dtype(planned) if plan.is_floating(planned) else tensor.dtype
            if planned.kept_dtype and tensor.dtype == torch_dtype(plan.dtype):
                # A strategy that knows no exceptions.
                tensor = tensor.to(dtype)  # noqa: PLW2901  # the one that is passed on
            expected = (planned.info.shape, dtype)
            as_in_file = planned.places and tensor.dtype == stored_dtype(planned.info.dtype)
            dequantised = (planned.shape, result_dtype(plan, planned)) if planned.quantised is not None else expected
            matches = (tuple(tensor.shape), tensor.dtype) in (expected, dequantised)
            if not matches and not (as_in_file and tensor.shape == expected[0]):
                actual = f"{tensor.dtype} of shape {list(tensor.shape)}"
                raise _broken(strategy, f"it yielded {actual} for {planned.module_key}, not {plan.dtype} as planned")
            if tensor.device.type != device and not as_in_file:
                raise _broken(strategy, f"it yielded {planned.module_key} on {tensor.device}, not on {plan.device}")
            if planned.places:
                yield from made.put(planned, tensor)
            else:
                yield planned, tensor
    if wanted:
        raise _broken(strategy, f"it left out {len(wanted)} tensors: {', '.join(sorted(wanted)[:5])}")


def _strategy_errors(strategy: LoadingStrategy) -> AbstractContextManager[None]:
    """Translate what a plugin's strategy raises into an error that names it; core's own raise their errors."""
    is_own = strategy.name in BUILT_IN_NAMES
    return translate(lambda error: None if is_own else _broken(strategy, f"it raised {said(error)}"))


def _broken(strategy: LoadingStrategy, why: str) -> BrokenPluginError:
    return BrokenPluginError(
        f"loading strategy {strategy.name!r} ({type(strategy).__module__}) is broken: {why}",
        hint="report it to its authors; strategy='mapped' or 'copied' does without it",
    )
