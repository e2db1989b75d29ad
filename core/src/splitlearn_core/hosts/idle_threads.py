"""The threads with which torch computes, while another process has its turn.

A host and its user compute in turns, often on the same processors. libgomp, which torch uses on Linux, lets its threads
look for work for some 10 ms after each forward, and so keep a processor from the other process. Once they have ended,
the next forward starts them again, which takes tens of microseconds for each.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

#: Seconds of computing for each thread, from which on the time for starting them is of no importance.
_WORTHWHILE = 2e-3
#: What omp.h calls omp_pause_soft: settings are kept.
_SOFT = 1
#: The thread that has called fork to start this process. What libgomp knows of its threads are those of the parent.
_forked_in: int | None = None


def end_idle_threads(computed: float, other_threads: int | None = None) -> None:
    """End the threads that torch has started from this thread, if the other process may need their processors.

    Args:
        computed: Seconds for which something was computed since the last call. Too little is not worth it.
        other_threads: The threads of the other process; by default, as many as here.
    """
    threads = torch.get_num_threads()
    if threads < 2 or computed < threads * _WORTHWHILE or _forked_in == threading.get_ident():  # noqa: PLR2004  # itself
        return
    pause = _pause()
    if pause is not None and threads + (other_threads or threads) > len(os.sched_getaffinity(0)):
        # It fails within a computation alone, which none is.
        pause(_SOFT)


class ComputingLock:
    """Lets one thread compute at a time, and ends its idle threads afterwards."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._began_at = 0.0

    def __enter__(self) -> None:
        self._lock.acquire()
        self._began_at = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        computed = time.perf_counter() - self._began_at
        self._lock.release()
        end_idle_threads(computed)


@cache
def _pause() -> Callable[[int], Any] | None:
    """Return libgomp's ``omp_pause_resource_all``; None where torch computes with another library."""
    if sys.platform != "linux":
        return None
    # It is looked for in what torch is linked to: other libraries of this name may be loaded, too.
    torch_itself = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        library = ctypes.CDLL(str(torch_itself), os.RTLD_NOLOAD | os.RTLD_LAZY)
        pause = library.omp_pause_resource_all
    except (OSError, AttributeError):  # another build of torch, or a libgomp from before GCC 9
        return None
    return None if hasattr(library, "kmp_get_blocktime") else pause  # Intel's


def _after_fork() -> None:
    global _forked_in  # noqa: PLW0603  # a fact of this process
    _forked_in = threading.get_ident()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
