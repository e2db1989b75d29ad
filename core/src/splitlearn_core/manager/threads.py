"""Threads that work for the manager, and never keep the process from ending.

``concurrent.futures`` joins its threads when the interpreter ends, so a thread in a read that never
returns would keep the process alive. These are daemons: whoever starts them waits as long as it
likes, and then goes.
"""

from __future__ import annotations

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

#: Called in the worker's thread with what the function returned, or with the exception it raised.
OnDone = Callable[[Any], object]

_TORCH_THREADS_LOCK = threading.Lock()


class Worker:
    """A daemon thread that can say where it stands."""

    def __init__(self, name: str, run: Callable[[], None]) -> None:
        self.name = name
        self._thread = threading.Thread(target=run, name=name, daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def stack(self) -> str:
        """Return the Python stack on which the thread stands, innermost call last; empty once it has ended."""
        # The dictionary of frames is the documented way, whatever its name looks like.
        frame = sys._current_frames().get(self._thread.ident or 0) if self.is_alive else None  # noqa: SLF001
        return "".join(traceback.format_stack(frame)) if frame is not None else ""

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the end, and say whether it came."""
        self._thread.join(timeout)
        return not self.is_alive


def run_in_thread(
    name: str, function: Callable[[], Any], on_done: OnDone, *, torch_threads: int | None = None
) -> Worker:
    """Run a function in a thread of its own.

    Args:
        name: The thread's name.
        function: What to run.
        on_done: Told how it ended, in that thread, whatever ``function`` raised.
        torch_threads: How many threads torch may use for it; None for the process's default.
    """

    def run() -> None:
        _tell(on_done, _outcome_of(_with_torch_threads(function, torch_threads)))

    return Worker(name, run)


class CallPool:
    """A few lasting threads for calls.

    They last because each new thread that computes makes a new team of OpenMP threads.
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
        """Queue a function; ``on_done`` is told how it ended, in the thread that ran it.

        Raises:
            ManagerClosedError: The pool is closed.
        """
        with self._lock:
            if self._closed:
                raise _refusal()
            self._jobs.put((function, on_done))
            if not self._idle.acquire(blocking=False) and len(self._workers) < self._limit:
                self._workers.append(Worker(f"{self._name}-{len(self._workers)}", self._serve))

    def close(self, timeout: float | None = None) -> bool:
        """Take no more calls, fail those that nobody has begun, and wait for the others.

        Returns:
            Whether all threads have ended in time. Those that have not, end with their call.
        """
        with self._lock:
            self._closed = True
            waiting = self._take_all()
            for _ in self._workers:
                self._jobs.put(None)
        for _, on_done in waiting:
            _tell(on_done, _outcome_of(_refusal))
        deadline = None if timeout is None else time.monotonic() + timeout
        ended = [w.join(None if deadline is None else max(0.0, deadline - time.monotonic())) for w in self._workers]
        return all(ended)

    def _take_all(self) -> list[tuple[Callable[[], Any], OnDone]]:
        taken: list[tuple[Callable[[], Any], OnDone]] = []
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return taken
            if job is not None:
                taken.append(job)

    def _serve(self) -> None:
        fresh = self._torch_threads
        while (job := self._take()) is not None:
            outcome = _outcome_of(_with_torch_threads(job[0], fresh))
            on_done, fresh = job[1], None
            # Before anybody is told: the model may be freed at once, and must not live on in here.
            del job
            _tell(on_done, outcome)
            # A thread that waits for its next call must not keep the tensors of the last one.
            del outcome, on_done

    def _take(self) -> tuple[Callable[[], Any], OnDone] | None:
        try:
            return self._jobs.get_nowait()
        except queue.Empty:
            self._idle.release()
            return self._jobs.get()


def own_torch_threads(count: int) -> None:
    """Let torch use so many threads for the calling thread, and change it for no other.

    ``torch.set_num_threads`` does two things: it sets the calling thread's number, and the one that
    threads begin with which have not used torch yet. A helper puts the second back.
    """
    import torch

    with _TORCH_THREADS_LOCK:
        ready, done = threading.Event(), threading.Event()

        def keep() -> None:
            # This thread is new to torch, so what it has is what new threads get.
            default = torch.get_num_threads()
            ready.set()
            done.wait()
            torch.set_num_threads(default)

        keeper = Worker("splitlearn-torch-threads", keep)
        ready.wait()
        # A thread takes on the default when it first uses torch, whatever it was told before.
        torch.get_num_threads()
        try:
            torch.set_num_threads(count)
        finally:
            done.set()
            keeper.join()


def _with_torch_threads(function: Callable[[], Any], count: int | None) -> Callable[[], Any]:
    """Prefix a function with the setting of its thread."""
    if count is None:
        return function

    def run() -> Any:
        own_torch_threads(count)
        return function()

    return run


def answering(loop: asyncio.AbstractEventLoop, callback: OnDone) -> OnDone:
    """Return what tells a callback of a loop, from any thread; a loop that has ended has nobody who waits."""

    def answer(outcome: Any) -> None:
        try:
            loop.call_soon_threadsafe(callback, outcome)
        except RuntimeError:
            if not loop.is_closed():
                raise

    return answer


def _refusal() -> ManagerClosedError:
    return ManagerClosedError("the manager is closed and takes no more calls")


def _outcome_of(function: Callable[[], Any]) -> Any:
    """Run a function, and return what it returned or raised: nobody would see what gets out of a thread."""
    try:
        return function()
    except BaseException as error:  # noqa: BLE001  # SystemExit too: the other side waits for an answer
        return error
    finally:
        # An error knows this frame by its traceback, and the frame must not know what the work was about.
        del function


def _tell(on_done: OnDone, outcome: Any) -> None:
    """Tell how work ended."""
    try:
        on_done(outcome)
    except Exception:
        # An event loop that has closed meanwhile, for one.
        log.exception("%s could not tell how its work ended", threading.current_thread().name)
