"""A pytest plugin: sweeps run as a seeded sample, and whole where ``LONG_TESTS`` is set (``make test-long``).

Three kinds of sweep are sampled, each the same way in every run:

- ``@pytest.mark.sample(n)``: of the cases of a parametrised test, ``n``.
- Checks of the conformance kit that are spread over dtypes, attention implementations and cuts: in each variant one
  combination for each dtype, another one for the next variant. Checks in :data:`IN_TURN` take one other parameter in
  turn.
- Numbers of random cases in one test: :func:`cases`.

With ``SHORT_TESTS``, as the checks run them a second time with other libraries, it is one combination of the kit's for
each variant, and of every parametrised test :data:`SHORT_CASES` at most. Most cases of a test differ in paths of our
own code, which run with the newest libraries; all of them with the oldest take ``LONG_TESTS``.
"""

from __future__ import annotations

import os
from collections import defaultdict
from random import Random

import pytest

#: Parameters of the kit's checks of which each combination would be run.
SPREAD = ("attention", "cut", "dtype")
#: Checks that take long, and the parameter of which one value is enough each time.
IN_TURN = {"test_forward_argument": "attention", "test_trainer": "variant"}
#: Whether everything is run.
LONG = bool(os.environ.get("LONG_TESTS"))
#: Whether the tests run with other libraries as well.
SHORT = bool(os.environ.get("SHORT_TESTS"))
#: How many cases of a parametrised test are run then.
SHORT_CASES = 4


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
        elif parameters.keys() >= {"variant", *SPREAD}:
            turns[test][_without(parameters, *SPREAD)].append(item)
        elif "variant" in parameters and getattr(item, "originalname", "") in IN_TURN:
            turns[test][_without(parameters, IN_TURN[item.originalname])].append(item)  # type: ignore[attr-defined]
    left_out: set[pytest.Item] = set()
    for (test, number), same in sampled.items():
        left_out.update(set(same) - set(Random(test).sample(same, min(number, len(same)))))
    for test, groups in turns.items():
        first = Random(test).randrange(12)
        for number, same in enumerate(groups.values(), first):
            # Five has no divisor in common with how many there are, and so comes to each of them.
            chosen = {same[5 * number % len(same)]}
            if not SHORT and len(same) > len(SPREAD):
                # Half of them on is the other dtype.
                chosen.add(same[(5 * number + len(same) // 2 + 1) % len(same)])
            left_out.update(set(same) - chosen)
    if SHORT:
        left_out.update(_surplus([item for item in items if item not in left_out]))
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def _surplus(items: list[pytest.Item]) -> set[pytest.Item]:
    """Return what is more than :data:`SHORT_CASES` of one test."""
    tests: dict[str, list[pytest.Item]] = defaultdict(list)
    for item in sorted(items, key=lambda item: item.nodeid):
        if hasattr(item, "callspec"):
            tests[item.nodeid.partition("[")[0]].append(item)
    surplus: set[pytest.Item] = set()
    for test, same in tests.items():
        surplus.update(set(same) - set(Random(test).sample(same, min(SHORT_CASES, len(same)))))
    return surplus


def _without(parameters: dict[str, object], *names: str) -> str:
    return str({name: value for name, value in parameters.items() if name not in names})
