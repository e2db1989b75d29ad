"""torch's gradient modes and the event loop: the mode of a lent model's calls, and a watch on the loop's thread.

A mode belongs to a thread, and all tasks of a loop share one thread. A task that keeps a mode over an ``await`` keeps
it for every other task too, and two that leave a mode in another order than they entered it leave the thread in it
for good.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

_T = TypeVar("_T")


def in_mode(function: Callable[[], _T], *, gradients: bool) -> Callable[[], _T]:
    """Return a function that runs with or without gradients, whatever the mode of the thread that runs it.

    Without them the mode is ``no_grad``: tensors from ``inference_mode`` could never enter autograd again, as the
    hidden states of a lent trunk do when a client trains its own top.
    """

    def run() -> _T:
        with recording(gradients=gradients):
            return function()

    return run


@contextmanager
def recording(*, gradients: bool) -> Iterator[None]:
    """Set both of torch's modes of this thread, for a block without ``await``."""
    import torch

    with torch.inference_mode(False), torch.set_grad_enabled(gradients):
        yield


def present_mode() -> str:
    """Return the name of the gradient-free mode of the calling thread; empty if there is none."""
    torch = sys.modules.get("torch")
    # Another thread may be importing it at this moment.
    if torch is None or not hasattr(torch, "is_inference_mode_enabled"):
        return ""
    if torch.is_inference_mode_enabled():
        return "torch.inference_mode"
    return "" if torch.is_grad_enabled() else "torch.no_grad"


class ModeWatch:
    """Reports, once, that the loop's thread is in a mode in which it was not when the manager was first used.

    A program that turns gradients off for good before that gets no warning.
    """

    def __init__(self) -> None:
        self._known = {"", present_mode()}

    def look(self) -> str:
        """Return a warning the first time that a new mode is seen; empty otherwise."""
        mode = present_mode()
        if mode in self._known:
            return ""
        self._known |= {"torch.inference_mode", "torch.no_grad"}
        return (
            f"{mode} is in force in the event loop's thread between tasks, so for every task: one keeps it over an "
            "await, or two left it in another order than they entered it. Lent models are called without gradients "
            f"anyway: leave {mode} out around awaits, and use it in functions without any; "
            "lease(id, gradients=True) records gradients"
        )
