"""A pytest plugin: sweeps run as a seeded sample, and whole where ``LONG_TESTS`` is set (``make test-long``).

Three kinds of sweep are sampled, each the same way in every run:

- ``@pytest.mark.sample(n)``: of the cases of a parametrised test, ``n``: first those with values of parameters that no
  other has had, so that each value is tried as far as ``n`` goes.
- Checks of the conformance kit that are spread over dtypes, attention implementations and cuts: in each variant one
  combination for each dtype, another one for the next variant. With ``SHORT_TESTS``, as the checks run them a second
  time with other libraries, one combination alone; of :data:`LONGEST`, always. Checks in :data:`IN_TURN` take one other
  parameter in turn.
- Numbers of random cases in one test: :func:`cases`.
"""

from __future__ import annotations

import os
from collections import defaultdict
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
#: Whether the tests run with other libraries as well.
SHORT = bool(os.environ.get("SHORT_TESTS"))


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
        left_out.update(set(same) - set(_covering(Random(test).sample(same, len(same)))[:number]))
    for test, groups in turns.items():
        first = Random(test).randrange(12)
        for number, same in enumerate(groups.values(), first):
            # Five has no divisor in common with how many there are, and so comes to each of them.
            chosen = {same[5 * number % len(same)]}
            longest = getattr(same[0], "originalname", "") in LONGEST
            if not SHORT and not longest and len(same) > len(SPREAD):
                # Half of them on is the other dtype.
                chosen.add(same[(5 * number + len(same) // 2 + 1) % len(same)])
            left_out.update(set(same) - chosen)
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = [item for item in items if item not in left_out]


def _covering(items: list[pytest.Item]) -> list[pytest.Item]:
    """Sort those to the front that have a value of a parameter which none before them has."""
    tried: set[tuple[str, str]] = set()
    first, others = [], []
    for item in items:
        values = {(name, str(value)) for name, value in item.callspec.params.items()}  # type: ignore[attr-defined]
        (others if values <= tried else first).append(item)
        tried |= values
    return first + others


def _without(parameters: dict[str, object], *names: str) -> str:
    return str({name: value for name, value in parameters.items() if name not in names})
