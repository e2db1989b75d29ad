"""Threads of the manager: daemon threads, the pool for calls, the jobs of workers, and torch's modes in them.

``concurrent.futures`` joins its threads when the interpreter ends, so a thread in a read that never returns would
keep the process alive. The caller of these daemon threads decides how long to wait for them.
"""

from __future__ import annotations

import dataclasses
import logging
import queue
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from splitlearn_core.errors import ConfigurationError, InternalError, LoadCancelledError, ManagerClosedError
from splitlearn_core.manager.loaders.loadable import LoadedModel, LoadPlan, ModelHost, ReportProgress
from splitlearn_core.manager.messages import Job
from splitlearn_core.manager.status import FailureInfo, UnloadReport, record
from splitlearn_core.system_memory import anonymous_memory
from splitlearn_core.types import Progress

if TYPE_CHECKING:
    import asyncio

    from splitlearn_core.manager.config import ModelConfig
    from splitlearn_core.manager.handles import AsyncManagedModel, CallGate, LoadingPlaceholder
    from splitlearn_core.manager.loaders.loader import ModelLoader
    from splitlearn_core.manager.resources import MemorySample, ResourceManager

log = logging.getLogger(__name__)

_T = TypeVar("_T")
#: Called in the worker's thread with the result of the function, or with the exception it raised.
OnDone = Callable[[Any], object]
_CallJob = tuple[Callable[[], Any], OnDone]

#: Seconds of work after which a worker releases the GIL, alone and with other workers, and for how long. Two
#: workers delay an event loop more than twice as much as one, for they pass the GIL to each other.
_GIL_HOLD_ALONE, _GIL_HOLD, _GIL_RELEASE = 0.004, 0.002, 0.00005

#: Seconds to wait for the end of a thread that has returned its result.
EXIT_TIMEOUT = 1.0

_TORCH_THREADS_LOCK = threading.Lock()


# --- threads ----------------------------------------------------------------------------------


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
        on_done: Called in that thread with the result, or with the exception that ``function`` raised.
        torch_threads: How many threads torch may use for it; None for the process's default.
    """
    return Worker(name, lambda: _notify(on_done, _outcome_of(function, torch_threads)))


class CallPool:
    """A few permanent threads for calls.

    Each thread that computes creates a team of OpenMP threads, which spin for some milliseconds after each call. So
    threads are reused, and the one that was used last comes first: calls one after the other run in one thread.
    """

    def __init__(self, workers: int, torch_threads: int | None = None, name: str = "splitlearn-call") -> None:
        self._limit = workers
        self._torch_threads = torch_threads
        self._name = name
        self._lock = threading.Lock()
        self._closed = False
        self._workers: list[Worker] = []
        self._jobs: deque[_CallJob] = deque()
        #: Where threads without a call get their next one; that of the thread that was used last is the last.
        self._idle: list[queue.SimpleQueue[_CallJob | None]] = []

    @property
    def workers(self) -> tuple[Worker, ...]:
        return tuple(self._workers)

    def submit(self, function: Callable[[], Any], on_done: OnDone) -> None:
        """Queue a function; ``on_done`` is called with its outcome, in the thread that ran it, and returns at once.

        Raises:
            ManagerClosedError: The pool is closed.
        """
        with self._lock:
            if self._closed:
                raise _closed_error()
            if self._idle:
                self._idle.pop().put((function, on_done))
            elif len(self._workers) < self._limit:
                inbox: queue.SimpleQueue[_CallJob | None] = queue.SimpleQueue()
                inbox.put((function, on_done))
                self._workers.append(Worker(f"{self._name}-{len(self._workers)}", partial(self._serve, inbox)))
            else:
                self._jobs.append((function, on_done))

    def close(self, timeout: float | None = None) -> bool:
        """Accept no more calls, fail those that have not started, and wait for the others.

        Returns:
            Whether all threads have ended in time. The others end with their call.
        """
        with self._lock:
            self._closed = True
            waiting = [on_done for _, on_done in self._jobs]
            self._jobs.clear()
            while self._idle:
                self._idle.pop().put(None)
        for on_done in waiting:
            _notify(on_done, _closed_error())
        deadline = None if timeout is None else time.monotonic() + timeout
        ended = [w.join(None if deadline is None else max(0.0, deadline - time.monotonic())) for w in self._workers]
        return all(ended)

    def _serve(self, inbox: queue.SimpleQueue[_CallJob | None]) -> None:
        # Set for this thread with its first call.
        torch_threads = self._torch_threads
        while (job := inbox.get()) is not None:
            outcome = _outcome_of(job[0], torch_threads)
            on_done, torch_threads = job[1], None
            # Before the notification: the model may be freed at once, and must not be referenced here.
            del job
            # Before it, too: the call that follows this one is to find this thread idle.
            self._take(inbox)
            _notify(on_done, outcome)
            # A thread that waits for its next call must not keep the tensors of the last one.
            del outcome, on_done

    def _take(self, inbox: queue.SimpleQueue[_CallJob | None]) -> None:
        """Get the next call, or the end, or wait for one of them."""
        with self._lock:
            if self._jobs:
                inbox.put(self._jobs.popleft())
            elif self._closed:
                inbox.put(None)
            else:
                self._idle.append(inbox)


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


def _outcome_of(function: Callable[[], Any], torch_threads: int | None) -> Any:
    """Run a function, and return its result or its exception, which would be lost if it left the thread."""
    try:
        if torch_threads is not None:
            own_torch_threads(torch_threads)
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


# --- torch in threads -------------------------------------------------------------------------


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


def default_torch_threads() -> int:
    """Return with how many threads torch computes in a thread that sets no number of its own."""
    import torch

    counts: list[int] = []
    with _TORCH_THREADS_LOCK:
        Worker("splitlearn-torch-threads", lambda: counts.append(torch.get_num_threads())).join()
    return counts[0]


def in_mode(function: Callable[[], _T], *, gradients: bool) -> Callable[[], _T]:
    """Return a function that runs with or without gradients, whatever the mode of the thread that runs it.

    Without them the mode is ``no_grad``: tensors from ``inference_mode`` could never enter autograd again, as the
    hidden states of a leased trunk do when a client trains its own top.
    """

    def run() -> _T:
        from splitlearn_core.build.torch_state import own_modes

        with own_modes(gradients=gradients):
            return function()

    return run


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
    """Reports, once, that the loop's thread is in a torch mode that was not set when the manager was first used.

    A mode belongs to a thread, and all tasks of a loop share one thread. A task that keeps a mode over an ``await``
    keeps it for every other task too, and two that leave a mode in another order than they entered it leave the
    thread in it for good. A program that turns gradients off for good before the first use gets no warning.
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
            "await, or two left it in another order than they entered it. Leased models are called without gradients "
            f"anyway: leave {mode} out around awaits, and use it in functions without any; "
            "lease(id, gradients=True) records gradients"
        )


# --- jobs of workers --------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Slot:
    """The state of one generation outside the machine: its waiters, its worker's progress, and its result."""

    config: ModelConfig
    placeholder: LoadingPlaceholder
    #: Result: None when ready, else the failure. Never an exception, so that it need not be retrieved.
    resolved: asyncio.Future[FailureInfo | None]
    #: Waiters for an unload. Result: a report, the number of leases that remain, or why it could not be freed.
    unloads: list[asyncio.Future[UnloadReport | int | FailureInfo]] = field(default_factory=list)
    #: Written by the worker's thread, read by the tick.
    progress: Progress = field(default_factory=lambda: Progress("queued"))
    #: Read by the worker's thread at each report: the reason to stop; empty to go on.
    stop: str = ""
    #: When the worker's thread last released the GIL.
    gil_released: float = 0.0
    worker: Worker | None = None
    #: All threads that worked for it; one that has returned its result may not have ended yet.
    workers: list[Worker] = field(default_factory=list)
    #: The shell's count of activities when the worker started alone; None if it did not.
    measuring: int | None = None
    plan: LoadPlan | None = None
    loaded: LoadedModel | None = None
    model: AsyncManagedModel | None = None
    gate: CallGate | None = None
    #: Why its host has died; and the earlier generation's dead host, whose sessions this one continues.
    died: FailureInfo | None = None
    heritage: ModelHost | None = None
    broken_leases: int = 0
    freed: int | None = None


class Stopped:
    """A worker's result if it has stopped as requested."""


class Jobs:
    """The jobs of one manager, each run in a worker's thread.

    Args:
        loader: Loads the models.
        resources: Measures the memory.
        at_work: Returns, from any thread, how many workers there are at this moment.
    """

    def __init__(self, loader: ModelLoader, resources: ResourceManager, at_work: Callable[[], int]) -> None:
        self._loader = loader
        self._resources = resources
        self._at_work = at_work

    def run(self, job: Job, slot: Slot) -> Any:
        """Do a job; return its result, Stopped, or a FailureInfo."""

        def report(progress: Progress) -> None:
            if slot.stop:
                raise LoadCancelledError(f"loading {slot.config.model_id!r} was stopped: {slot.stop}")
            slot.progress = progress
            worked = time.monotonic() - slot.gil_released
            if worked >= _GIL_HOLD and (worked >= _GIL_HOLD_ALONE or self._at_work() > 1):
                # A thread that computes in Python holds the GIL for 5 ms at a time. While this one
                # sleeps, the event loop gets its turn.
                time.sleep(_GIL_RELEASE)
                slot.gil_released = time.monotonic()

        try:
            return {Job.PLAN: self._plan, Job.LOAD: self._load, Job.WARM_UP: self._warm_up}[job](slot, report)
        except LoadCancelledError:
            return Stopped()
        except BaseException as error:  # noqa: BLE001  # plugins may raise anything, and the loop waits for an answer
            return record(error, slot.progress.stage)

    def _plan(self, slot: Slot, report: ReportProgress) -> tuple[LoadPlan, MemorySample]:
        """Return the plan of a load, and the memory available for it."""
        report(Progress("resolving"))
        plan = self._checked(self._loader.plan(slot.config, report), LoadPlan, "plan")
        return plan, self._resources.sample()

    def _load(self, slot: Slot, report: ReportProgress) -> tuple[LoadedModel, int, MemorySample]:
        """Return the loaded model, the anonymous memory by which the process grew, and the memory available."""
        if slot.plan is None:
            raise InternalError("nothing was planned", hint="please report this")
        before = anonymous_memory()
        plan = slot.plan if slot.heritage is None else dataclasses.replace(slot.plan, after=slot.heritage)
        loaded = self._checked(self._loader.load(slot.config, plan, report), LoadedModel, "load")
        grown = anonymous_memory() - before if loaded.host is None else loaded.host.private_memory()
        return loaded, grown, self._resources.sample()

    def _warm_up(self, slot: Slot, report: ReportProgress) -> None:
        """Run forward passes."""
        report(Progress("warming up"))
        if slot.loaded is not None:
            self._loader.warm_up(slot.config, slot.loaded, report)

    def free(self, box: list[Any], workers: Iterable[Worker]) -> tuple[int, MemorySample]:
        """Drop the contents of the box, and end hosts; return the anonymous memory that was freed, and that available.

        Raises:
            HostDiedError: A process does not end.
        """
        hosts = [item.host for item in box if isinstance(item, LoadedModel) and item.host is not None]
        private = sum(host.private_memory() for host in hosts)
        for host in hosts:
            host.end()
        for worker in workers:
            # Until it has ended, its frames refer to the model that it loaded.
            worker.join(EXIT_TIMEOUT)
        before = anonymous_memory()
        box.clear()
        self._resources.release_unused()
        return private + before - anonymous_memory(), self._resources.sample()

    def sample(self) -> MemorySample:
        """Return the memory available."""
        return self._resources.sample()

    def _checked(self, result: Any, kind: type[_T], method: str) -> _T:
        """Check, in the worker, the type of what a user's loader returned."""
        if not isinstance(result, kind):
            raise ConfigurationError(
                f"{type(self._loader).__name__}.{method} returned {type(result).__name__}, not {kind.__name__}",
                hint="splitlearn_core.ModelLoader documents what each method returns",
            )
        return result
