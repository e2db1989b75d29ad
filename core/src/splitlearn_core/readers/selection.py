"""The built-in loading strategies, and the choice of one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from splitlearn_core.errors import ConfigurationError
from splitlearn_core.loading_strategy import AUTO, LoadingStrategy, ReadPlan
from splitlearn_core.readers.copied import CopiedStrategy
from splitlearn_core.readers.incremental import IncrementalStrategy
from splitlearn_core.readers.mapped import MappedStrategy
from splitlearn_core.readers.whole import WholeStrategy

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
