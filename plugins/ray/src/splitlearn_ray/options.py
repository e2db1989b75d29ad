"""What ``host_options`` may say, and the resources that it means. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from splitlearn_core import ConfigurationError
from splitlearn_core.extension import show, unknown_name

STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
#: Resources that have options of their own.
_OWN = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory_mb"}
_MEGABYTE = 2**20
_HINT = "the options of the host ray are in the README of splitlearn-ray"


@dataclass(frozen=True, slots=True, kw_only=True)
class RayOptions:
    """The options of the host ``ray``."""

    #: The cluster: ``HOST:PORT`` of its head; by default ``RAY_ADDRESS``, or the cluster that runs on this machine.
    address: str = "auto"
    namespace: str = "splitlearn"
    #: What Ray reserves for the actor. ``memory_mb`` is by default what the plan of the load says; 0 reserves none.
    num_cpus: float = 1
    num_gpus: float = 0
    memory_mb: float | None = None
    resources: Mapping[str, float] = field(default_factory=dict)
    #: The trunks with the same group share one placement group of ``group_size`` places, which Ray reserves at once.
    group: str | None = None
    group_size: int = 1
    group_strategy: str = "SPREAD"
    #: Keep an actor on each machine that has imported what a load needs, and takes no resources: the next trunk there
    #: is ready seconds earlier. Trunks with GPUs cannot use one.
    prepared: bool = True
    #: Seconds to wait for free resources.
    wait: float = 60

    @classmethod
    def of(cls, values: Mapping[str, Any] | None) -> RayOptions:
        """Check the options of a configuration.

        Raises:
            ConfigurationError: Unknown options or invalid values; all are listed.
        """
        values = values or {}
        known = [item.name for item in fields(cls)]
        problems = [unknown_name(name, known, "option") for name in values if name not in known]
        problems += [
            f"{name}: {show(values[name])} is not {meaning}"
            for name, (is_valid, meaning) in _CHECKS.items()
            if name in values and not is_valid(values[name])
        ]
        if not problems and "group" not in values:
            problems += [f"{name}: has no meaning without group" for name in _OF_GROUPS if name in values]
        if problems:
            raise ConfigurationError("host_options for ray:\n  " + "\n  ".join(problems), hint=_HINT)
        return cls(**values)

    def bundle(self, planned_bytes: int) -> dict[str, float]:
        """Return the resources of one actor, as Ray names them.

        Args:
            planned_bytes: The memory that the plan of the load says.
        """
        memory = planned_bytes if self.memory_mb is None else int(self.memory_mb * _MEGABYTE)
        amounts = {"CPU": self.num_cpus, "GPU": self.num_gpus, "memory": memory, **self.resources}
        return {name: amount for name, amount in amounts.items() if amount}


def _is_amount(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value) and value.isprintable()


def _are_resources(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        _is_text(name) and name not in _OWN and _is_amount(amount) for name, amount in value.items()
    )


def _is_address(value: Any) -> bool:
    return isinstance(value, str) and (value == "auto" or _ADDRESS.fullmatch(value) is not None)


_ADDRESS = re.compile(r"[^\s/]+:[0-9]{1,5}")
_AMOUNT = (_is_amount, "a number from 0")
_TEXT = (_is_text, "a text")
_OF_GROUPS = ("group_size", "group_strategy")
_CHECKS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "address": (_is_address, "HOST:PORT of the cluster's head, or auto"),
    "namespace": _TEXT,
    "num_cpus": _AMOUNT,
    "num_gpus": _AMOUNT,
    "memory_mb": _AMOUNT,
    "resources": (
        _are_resources,
        f"a table of numbers from 0 by name; {', '.join(f'{name} has the option {own}' for name, own in _OWN.items())}",
    ),
    "group": _TEXT,
    "group_size": (lambda value: type(value) is int and 0 < value <= 10_000, "a whole number from 1"),  # noqa: PLR2004  # none is larger
    "group_strategy": (lambda value: value in STRATEGIES, f"one of {', '.join(STRATEGIES)}"),
    "prepared": (lambda value: isinstance(value, bool), "true or false"),
    "wait": _AMOUNT,
}
