"""A new interpreter that runs one of our functions and writes its results to stdout."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import TextIO

#: With the module search path of this process, whatever the environment says.
_CODE = (
    "import sys; sys.path[:] = {path!r}; sys.dont_write_bytecode = {no_bytecode!r}; "
    "from {module} import {function}; {function}(*sys.argv[1:])"
)


def command_for(function: Callable[..., None], *arguments: str) -> list[str]:
    """Return the command that calls a function of a module in a new interpreter."""
    code = _CODE.format(
        path=sys.path, no_bytecode=sys.dont_write_bytecode, module=function.__module__, function=function.__qualname__
    )
    return [sys.executable, "-c", code, *arguments]


def reserve_stdout() -> TextIO:
    """Return stdout for results, and redirect to stderr what libraries and plugins print from now on."""
    results = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return results


def ending(return_code: int) -> str:
    """Describe how a process ended."""
    if return_code < 0:
        return f"ended its process by signal {signal.Signals(-return_code).name}"
    return f"ended its process with exit code {return_code}"
