"""What a hook implementation has to look like, in one place for source code and for live modules."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable

from splitlearn_core import hookspecs

PREFIX = "splitlearn_"


def _specifications() -> dict[str, tuple[str, ...]]:
    return {
        name: tuple(inspect.signature(function).parameters)
        for name, function in vars(hookspecs).items()
        if name.startswith(PREFIX) and callable(function)
    }


#: Hook name -> names of its arguments.
HOOKS = _specifications()


def signature_problem(hook: str, arguments: list[str], defaulted: list[str]) -> str:
    """Say what is wrong with an implementation, or nothing.

    Args:
        hook: The function's name.
        arguments: Names of its arguments, in order.
        defaulted: Those that have a default value; pluggy would never pass them.
    """
    if hook not in HOOKS:
        close = difflib.get_close_matches(hook, HOOKS, n=1)
        return f"there is no hook {hook}" + (f"; did you mean {close[0]}?" if close else f" (hooks: {_list(HOOKS)})")
    foreign = [name for name in arguments if name not in HOOKS[hook]]
    if foreign:
        return f"hook {hook} has no argument {_list(foreign)}; it may take ({_list(HOOKS[hook])})"
    if defaulted:
        return f"hook {hook}: argument {_list(defaulted)} has a default value and would never be passed; drop it"
    return ""


def _list(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"
