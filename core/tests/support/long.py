"""A pytest plugin: sweeps run as a seeded sample, and whole where ``LONG_TESTS`` is set (``make test-long``).

Three kinds of sweep are sampled, each the same way in every run:

- ``@pytest.mark.sample(n)``: of the cases of a parametrised test, ``n``.
- Checks of the conformance kit that are spread over dtypes, attention implementations and cuts: each dtype with each
  implementation, under one cut, which is another one for the next. With ``SHORT_TESTS``, as the checks run them
  a second time with other libraries, each variant has one combination of all three, in turn.
- Numbers of random cases in one test: :func:`cases`.
"""

from __future__ import annotations

import os
from collections import defaultdict
from random import Random

import pytest

#: Parameters of the kit's checks of which each combination would be run.
SPREAD = {"variant", "dtype", "attention", "cut"}
#: Whether everything is run.
LONG = bool(os.environ.get("LONG_TESTS"))
#: Of these parameters each value comes in turn, where the others are combined.
TURNS = ("cut", "dtype", "attention") if os.environ.get("SHORT_TESTS") else ("cut",)


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
    sampled: dict[tuple[str, int], list[pytest.Item]] = defaultdict(list)
    turns: dict[str, dict[str, list[pytest.Item]]] = defaultdict(lambda: defaultdict(list))
    # Sorted, for the order of the items may be a random one.
    for item in sorted(items, key=lambda item: item.nodeid):
        parameters = dict(item.callspec.params) if hasattr(item, "callspec") else {}
        test = item.nodeid.partition("[")[0]
        if (marker := item.get_closest_marker("sample")) is not None and parameters:
            sampled[test, marker.args[0]].append(item)
        elif parameters.keys() >= SPREAD:
            for name in TURNS:
                del parameters[name]
            turns[test][str(parameters)].append(item)
    left_out: set[pytest.Item] = set()
    for (test, number), same in sampled.items():
        left_out.update(set(same) - set(Random(test).sample(same, min(number, len(same)))))
    for test, groups in turns.items():
        first = Random(test).randrange(12)
        for number, same in enumerate(groups.values(), first):
            # Five has no divisor in common with how many there are, and so comes to each of them.
            left_out.update(set(same) - {same[5 * number % len(same)]})
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]
