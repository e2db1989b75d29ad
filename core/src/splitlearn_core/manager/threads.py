"""Daemon threads of the manager, which never keep the process from ending.

``concurrent.futures`` joins its threads when the interpreter ends, so a thread in a read that never
returns would keep the process alive. The caller of these daemon threads decides how long to wait for them.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from splitlearn_core.errors import ManagerClosedError

if TYPE_CHECKING:
    import asyncio

log = logging.getLogger(__name__)

#: Called in the worker's thread with the result of the function, or with the exception it raised.
OnDone = Callable[[Any], object]

_TORCH_THREADS_LOCK = threading.Lock()


class Worker:
    """A daemon thread whose present stack can be read."""

    def __init__(self, name: str, run: Callable[[], None]) -> None:
        self.name = name
        self._thread = threading.Thread(target=run, name=name, daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def stack(self) -> str:
        """Return the thread's Python stack, innermost call last; empty once it has ended."""
        # Documented despite its name.
        frame = sys._current_frames().get(self._thread.ident or 0) if self.is_alive else None  # noqa: SLF001
        return "".join(traceback.format_stack(frame)) if frame is not None else ""

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the thread to end, and return whether it has."""
        self._thread.join(timeout)
        return not self.is_alive


def run_in_thread(
    name: str, function: Callable[[], Any], on_done: OnDone, *, torch_threads: int | None = None
) -> Worker:
    """Run a function in a thread of its own.

    Args:
        name: The thread's name.
        function: What to run.
        on_done: Called in that thread with the result, or with whatever ``function`` raised.
        torch_threads: How many threads torch may use for it; None for the process's default.
    """

    def run() -> None:
        _notify(on_done, _outcome_of(_with_torch_threads(function, torch_threads)))

    return Worker(name, run)


class CallPool:
    """A few permanent threads for calls.

    They are reused because each new thread that computes creates a new team of OpenMP threads.
    """

    def __init__(self, workers: int, torch_threads: int | None = None, name: str = "splitlearn-call") -> None:
        self._limit = workers
        self._torch_threads = torch_threads
        self._name = name
        self._lock = threading.Lock()
        self._closed = False
        #: Counts the threads that wait for a job.
        self._idle = threading.Semaphore(0)
        self._workers: list[Worker] = []
        self._jobs: queue.SimpleQueue[tuple[Callable[[], Any], OnDone] | None] = queue.SimpleQueue()

    @property
    def workers(self) -> tuple[Worker, ...]:
        return tuple(self._workers)

    def submit(self, function: Callable[[], Any], on_done: OnDone) -> None:
        """Queue a function; ``on_done`` is called with its outcome, in the thread that ran it.

        Raises:
            ManagerClosedError: The pool is closed.
        """
        with self._lock:
            if self._closed:
                raise _closed_error()
            self._jobs.put((function, on_done))
            if not self._idle.acquire(blocking=False) and len(self._workers) < self._limit:
                self._workers.append(Worker(f"{self._name}-{len(self._workers)}", self._serve))

    def close(self, timeout: float | None = None) -> bool:
        """Accept no more calls, fail those that have not started, and wait for the others.

        Returns:
            Whether all threads have ended in time. The others end with their call.
        """
        waiting: list[tuple[Callable[[], Any], OnDone]] = []
        with self._lock:
            self._closed = True
            with contextlib.suppress(queue.Empty):
                while True:
                    if (job := self._jobs.get_nowait()) is not None:
                        waiting.append(job)
            for _ in self._workers:
                self._jobs.put(None)
        for _, on_done in waiting:
            _notify(on_done, _outcome_of(_closed_error))
        deadline = None if timeout is None else time.monotonic() + timeout
        ended = [w.join(None if deadline is None else max(0.0, deadline - time.monotonic())) for w in self._workers]
        return all(ended)

    def _serve(self) -> None:
        # Set for this thread with its first call.
        torch_threads = self._torch_threads
        while (job := self._take()) is not None:
            outcome = _outcome_of(_with_torch_threads(job[0], torch_threads))
            on_done, torch_threads = job[1], None
            # Before the notification: the model may be freed at once, and must not be referenced here.
            del job
            _notify(on_done, outcome)
            # A thread that waits for its next call must not keep the tensors of the last one.
            del outcome, on_done

    def _take(self) -> tuple[Callable[[], Any], OnDone] | None:
        try:
            return self._jobs.get_nowait()
        except queue.Empty:
            self._idle.release()
            return self._jobs.get()


def own_torch_threads(count: int) -> None:
    """Set torch's number of threads for the calling thread only.

    ``torch.set_num_threads`` sets both the calling thread's number and the default of threads that have
    not used torch yet. A helper thread restores the default.
    """
    import torch

    with _TORCH_THREADS_LOCK:
        ready, done = threading.Event(), threading.Event()

        def keep() -> None:
            # This thread has not used torch yet, so its number is the default.
            default = torch.get_num_threads()
            ready.set()
            done.wait()
            torch.set_num_threads(default)

        keeper = Worker("splitlearn-torch-threads", keep)
        ready.wait()
        # At its first use of torch, a thread takes the default, which would override the setting.
        torch.get_num_threads()
        try:
            torch.set_num_threads(count)
        finally:
            done.set()
            keeper.join()


def _with_torch_threads(function: Callable[[], Any], count: int | None) -> Callable[[], Any]:
    """Set the thread's number of torch threads before a function runs."""
    if count is None:
        return function

    def run() -> Any:
        own_torch_threads(count)
        return function()

    return run


def answering(loop: asyncio.AbstractEventLoop, callback: OnDone) -> OnDone:
    """Return a function that calls a callback on a loop, from any thread; with a closed loop it does nothing."""

    def answer(outcome: Any) -> None:
        try:
            loop.call_soon_threadsafe(callback, outcome)
        except RuntimeError:
            if not loop.is_closed():
                raise

    return answer


def _closed_error() -> ManagerClosedError:
    return ManagerClosedError("the manager is closed and takes no more calls")


def _outcome_of(function: Callable[[], Any]) -> Any:
    """Run a function, and return its result or its exception, which would be lost if it left the thread."""
    try:
        return function()
    except BaseException as error:  # noqa: BLE001  # SystemExit too: the caller waits for an answer
        return error
    finally:
        # The traceback of an error keeps this frame alive, and the frame must not keep the function alive.
        del function


def _notify(on_done: OnDone, outcome: Any) -> None:
    try:
        on_done(outcome)
    except Exception:
        # For example, the event loop has closed in the meantime.
        log.exception("%s could not report the outcome of its work", threading.current_thread().name)
