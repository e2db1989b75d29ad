"""A pytest plugin: sweeps run as a seeded sample, and whole where ``LONG_TESTS`` is set (``make test-long``).

Four kinds of sweep are sampled, each the same way in every run:

- ``@pytest.mark.sample(n)``: of the cases of a parametrised test, ``n``.
- Checks of the conformance kit that are spread over dtypes, attention implementations and cuts: in each variant two
  combinations; of :data:`LONGEST`, or with ``SHORT_TESTS``, as the checks run them a second time with other libraries,
  one. Checks in :data:`IN_TURN` take one other parameter in turn.
- Numbers of random cases in one test: :func:`cases`.
- With ``SHORT_TESTS=N``, of every other parametrised test, and of a marked one, ``N`` at most: most of its cases differ
  in paths of our own code, which run with the newest libraries.

What is chosen next is what has values that were chosen least: each value of each parameter is tried as far as the
number of cases goes, of the kit's checks over all variants.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from random import Random

import pytest

#: Parameters of the kit's checks of which each combination would be run.
SPREAD = ("attention", "cut", "dtype")
#: Checks that take long, and the parameter of which one value is enough each time.
IN_TURN = {
    "test_forward_argument": "attention",
    "test_plan_is_deterministic": "variant",
    "test_trainer": "variant",
}
#: Checks that take longest, and of which one combination in each variant is enough each time.
LONGEST = {"test_cache", "test_generate"}
#: Whether everything is run.
LONG = bool(os.environ.get("LONG_TESTS"))
#: How many cases of a parametrised test are run where the tests run with other libraries as well.
SHORT_CASES = int(os.environ.get("SHORT_TESTS") or 0)
#: Whether they do.
SHORT = SHORT_CASES > 0


def cases(long: int, sample: int) -> int:
    """Return how many cases to run: all, or a sample of them."""
    return long if LONG else sample


# First, so that an order of the tests is one of those that stay.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not in the sample, unless the test is named on the command line."""
    named = any("[" in argument for argument in config.args)
    if LONG or named:
        return
    #: Test -> what of it may take turns -> the cases, and how many of them to run.
    groups: dict[str, dict[str, tuple[list[pytest.Item], int]]] = defaultdict(dict)
    # Sorted, for the order of the items may be a random one.
    for item in sorted(items, key=lambda item: item.nodeid):
        parameters = dict(item.callspec.params) if hasattr(item, "callspec") else {}
        name = getattr(item, "originalname", "")
        if (marker := item.get_closest_marker("sample")) is not None and parameters:
            turn, number = "", min(marker.args[0], SHORT_CASES) if SHORT else marker.args[0]
        elif parameters.keys() >= {"variant", *SPREAD}:
            turn, number = _without(parameters, *SPREAD), 1 if SHORT or name in LONGEST else 2
        elif SHORT and parameters:
            turn, number = "", SHORT_CASES
        elif "variant" in parameters and name in IN_TURN:
            turn, number = _without(parameters, IN_TURN[name]), 1
        else:
            continue
        groups[item.nodeid.partition("[")[0]].setdefault(turn, ([], number))[0].append(item)
    left_out: set[pytest.Item] = set()
    for test, turns in groups.items():
        random, times = Random(test), Counter[tuple[str, str]]()
        for same, number in turns.values():
            left_out.update(set(same) - set(_balanced(random.sample(same, len(same)), number, times)))
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def _balanced(items: list[pytest.Item], number: int, times: Counter[tuple[str, str]]) -> list[pytest.Item]:
    """Choose cases with the values of parameters that were chosen least often, and count those."""
    chosen: list[pytest.Item] = []
    for _ in range(min(number, len(items))):
        rarest = min(
            (item for item in items if item not in chosen), key=lambda item: sum(times[v] for v in _values(item))
        )
        times.update(_values(rarest))
        chosen.append(rarest)
    return chosen


def _values(item: pytest.Item) -> list[tuple[str, str]]:
    callspec = item.callspec  # type: ignore[attr-defined]
    values = []
    for name, value in callspec.params.items():
        try:
            values.append((name, str(value)))
        except ValueError:  # Python writes no numbers of thousands of digits
            values.append((name, f"number {callspec.indices[name]}"))
    return values


def _without(parameters: dict[str, object], *names: str) -> str:
    return str({name: value for name, value in parameters.items() if name not in names})
