"""The built-in loading strategies, and which of them is used."""

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


def check_strategy(asked: str, added: Iterable[LoadingStrategy] = ()) -> dict[str, LoadingStrategy]:
    """Return the known strategies by name, refusing a name that is none of them.

    Raises:
        ConfigurationError: No strategy of that name.
    """
    known = {strategy.name: strategy for strategy in (*BUILT_IN, *added)}
    if asked not in (AUTO, *known):
        raise ConfigurationError(
            f"there is no loading strategy {asked!r}", hint=f"choose from {', '.join((AUTO, *known))}"
        )
    return known


def choose_strategy(
    asked: str, plans: Sequence[ReadPlan], added: Iterable[LoadingStrategy] = (), preferred: str = ""
) -> LoadingStrategy:
    """Choose how to read: what the caller asked, else what the family prefers, else the cheapest.

    Raises:
        ConfigurationError: No strategy of that name, or it refuses the plan; the reason is given.
    """
    known = check_strategy(asked, added)
    if asked != AUTO:
        refusal = next(filter(None, map(known[asked].refusal, plans)), "")
        if refusal:
            raise ConfigurationError(f"loading strategy {asked!r} cannot do this: {refusal}", hint=f"try {AUTO!r}")
        return known[asked]
    candidates = [known[preferred]] if preferred in known else []
    # Last of all those that others added, for files that core cannot read.
    others = [strategy for strategy in known.values() if strategy not in BUILT_IN]
    for strategy in (*candidates, *_by_price(plans), *others):
        if not any(strategy.refusal(plan) for plan in plans):
            return strategy
    raise ConfigurationError("no loading strategy can read this plan")


def _by_price(plans: Sequence[ReadPlan]) -> list[LoadingStrategy]:
    """Order core's own strategies by what they cost: views of what has to be converted spare nothing."""
    converted = sum(t.info.nbytes for plan in plans for t in plan.tensors if plan.needs_conversion(t))
    mostly = 2 * converted > sum(plan.nbytes for plan in plans)
    return sorted(BUILT_IN, key=lambda strategy: mostly and isinstance(strategy, MappedStrategy))
