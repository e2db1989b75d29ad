"""What ``host_options`` may say for the host ``ray``."""

from __future__ import annotations

from typing import Any

import pytest

from splitlearn_core import ConfigurationError
from splitlearn_ray.options import RayOptions


def test_resources_are_those_of_the_plan_unless_they_are_given() -> None:
    """Ray chooses a machine with the memory that the plan says."""
    assert RayOptions.of(None).bundle(3_000_000) == {"CPU": 1, "memory": 3_000_000}
    given = RayOptions.of({"num_cpus": 0.5, "num_gpus": 1, "memory_mb": 2, "resources": {"fast": 1, "none": 0}})
    assert given.bundle(3_000_000) == {"CPU": 0.5, "GPU": 1, "memory": 2 * 2**20, "fast": 1}
    assert RayOptions.of({"memory_mb": 0}).bundle(3_000_000) == {"CPU": 1}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_cpu": 1}, "num_cpu: unknown option; did you mean 'num_cpus'?"),
        ({"num_cpus": True}, "num_cpus: True is not a number from 0"),
        ({"num_gpus": -1}, "num_gpus: -1 is not a number from 0"),
        ({"memory_mb": float("nan")}, "memory_mb: nan is not a number from 0"),
        ({"resources": {"CPU": 1}}, "CPU has the option num_cpus"),
        ({"resources": [1]}, "is not a table of numbers"),
        ({"group": "a", "group_size": 0}, "group_size: 0 is not a whole number from 1"),
        ({"group": "a", "group_strategy": "spread"}, "one of PACK, SPREAD"),
        ({"group_size": 4}, "group_size: has no meaning without group"),
        ({"address": "ray://head:10001"}, "address: 'ray://head:10001' is not HOST:PORT of the cluster's head"),
        ({"namespace": ""}, "namespace: '' is not a text"),
        ({"prepared": 1}, "prepared: 1 is not true or false"),
    ],
)
def test_what_is_wrong_is_refused(values: dict[str, Any], words: str) -> None:
    """Each with what would be valid."""
    with pytest.raises(ConfigurationError) as error:
        RayOptions.of(values)
    assert words in error.value.message
