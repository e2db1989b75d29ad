"""What a manager's settings may be. Pure, and used before there is a manager, too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from splitlearn_core.manager.config import show

#: Settings that count from 1; those of the second line may be None, for no limit.
_COUNTS = frozenset({"max_workers", "call_workers", "calls_per_model", "max_failed"})
_COUNTS_OR_NONE = frozenset({"max_models", "load_threads", "call_threads"})
#: Settings that are a number from 0.
_AMOUNTS = frozenset({"headroom_mb", "call_queue", "stall_after", "cancel_grace", "close_timeout", "min_residency"})
_AMOUNTS_OR_NONE = frozenset({"max_memory_mb", "wait_timeout", "stall_timeout", "drain_timeout", "keep_alive"})
#: More than any machine has, and longer than any process lives.
_MOST = 2.0**43


def limit_problems(settings: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with the settings that are given, each with what would do."""
    problems = []
    for name, value in settings.items():
        optional = name in _COUNTS_OR_NONE | _AMOUNTS_OR_NONE
        none = " (or none, for no limit)" if optional else ""
        if value is None and optional:
            continue
        if name in _COUNTS | _COUNTS_OR_NONE and (type(value) is not int or not 1 <= value < _MOST):
            problems.append(f"{name} is {show(value)}; a whole number from 1 is needed{none}")
        elif name in _AMOUNTS | _AMOUNTS_OR_NONE and not is_amount(value):
            problems.append(f"{name} is {show(value)}; a number from 0 to {_MOST:g} is needed{none}")
        elif name == "when_full" and value not in ("wait", "refuse"):
            problems.append(f"when_full is {show(value)}; it may be 'wait' or 'refuse'")
        elif name == "required" and isinstance(value, str):
            problems.append(f"required is the text {show(value)}; a list of model ids is needed")
    return problems


def is_amount(value: Any) -> bool:
    """Say whether a value is a number from 0 that is not beyond belief."""
    # Compared rather than converted: an integer may be larger than any float.
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < _MOST
