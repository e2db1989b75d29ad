"""The state of one generation in the shell, and the jobs that worker threads do for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from splitlearn_core.errors import ConfigurationError, InternalError, LoadCancelledError
from splitlearn_core.manager.config import ModelConfig
from splitlearn_core.manager.handles import AsyncManagedModel, CallGate, LoadingPlaceholder
from splitlearn_core.manager.loaders.loadable import LoadedModel, LoadPlan
from splitlearn_core.manager.loaders.loader import ModelLoader
from splitlearn_core.manager.resources import MemorySample, ResourceManager
from splitlearn_core.manager.status import FailureInfo, UnloadReport, record
from splitlearn_core.manager.threads import Worker
from splitlearn_core.system_memory import anonymous_memory
from splitlearn_core.types import Progress


@dataclass(slots=True, eq=False)
class Slot:
    """One generation: its waiters, its worker's progress, and its result."""

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
    #: All threads that worked for it; one that has answered may not have ended yet.
    workers: list[Worker] = field(default_factory=list)
    #: The manager's ``_activity`` when the worker started alone; None if it did not.
    measuring: int | None = None
    plan: LoadPlan | None = None
    loaded: LoadedModel | None = None
    model: AsyncManagedModel | None = None
    gate: CallGate | None = None
    broken_leases: int = 0
    freed: int | None = None


_T = TypeVar("_T")

#: Seconds of work after which a worker releases the GIL, alone and with other workers, and for how long. Two
#: workers delay an event loop more than twice as much as one, for they pass the GIL to each other.
_GIL_HOLD_ALONE, _GIL_HOLD, _GIL_RELEASE = 0.004, 0.002, 0.00005

#: Seconds to wait for a thread that has answered to end.
EXIT_TIMEOUT = 1.0


class Stopped:
    """A worker's answer that it has stopped, as requested."""


class Jobs:
    """The jobs of one manager.

    Args:
        loader: Loads the models.
        resources: Measures the memory.
        at_work: Returns, from any thread, how many workers there are at this moment.
    """

    def __init__(self, loader: ModelLoader, resources: ResourceManager, at_work: Callable[[], int]) -> None:
        self._loader = loader
        self._resources = resources
        self._at_work = at_work

    def plan(self, slot: Slot) -> Any:
        """Return the plan of a load, and the memory available for it."""

        def work(report: Callable[[Progress], None]) -> tuple[LoadPlan, MemorySample]:
            report(Progress("resolving"))
            plan = _answer_of(self._loader.plan(slot.config, report), LoadPlan, "plan", self._loader)
            return plan, self._resources.sample()

        return self._guarded(slot, work)

    def load(self, slot: Slot) -> Any:
        """Return the loaded model, the anonymous memory by which the process grew, and the memory left."""

        def work(report: Callable[[Progress], None]) -> tuple[LoadedModel, int, MemorySample]:
            if slot.plan is None:
                raise InternalError("nothing was planned", hint="please report this")
            before = anonymous_memory()
            answer = self._loader.load(slot.config, slot.plan, report)
            loaded = _answer_of(answer, LoadedModel, "load", self._loader)
            return loaded, anonymous_memory() - before, self._resources.sample()

        return self._guarded(slot, work)

    def warm_up(self, slot: Slot) -> Any:
        """Run forward passes; return None."""

        def work(report: Callable[[Progress], None]) -> None:
            report(Progress("warming up"))
            if slot.loaded is not None:
                self._loader.warm_up(slot.config, slot.loaded, report)

        return self._guarded(slot, work)

    def free(self, box: list[Any], workers: Iterable[Worker]) -> tuple[int, MemorySample]:
        """Drop the contents of the box; return the anonymous memory that was freed, and the memory available."""
        for worker in workers:
            # Until it has ended, its frames refer to the model that it loaded.
            worker.join(EXIT_TIMEOUT)
        before = anonymous_memory()
        box.clear()
        self._resources.release_unused()
        return before - anonymous_memory(), self._resources.sample()

    def sample(self) -> MemorySample:
        """Return the memory available."""
        return self._resources.sample()

    def _guarded(self, slot: Slot, work: Callable[[Callable[[Progress], None]], Any]) -> Any:
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
            return work(report)
        except LoadCancelledError:
            return Stopped()
        except BaseException as error:  # noqa: BLE001  # plugins may raise anything, and the loop waits for an answer
            return record(error, slot.progress.stage)


def _answer_of(answer: Any, kind: type[_T], method: str, loader: ModelLoader) -> _T:
    """Check, in the worker, the type of what a foreign loader returned."""
    if not isinstance(answer, kind):
        raise ConfigurationError(
            f"{type(loader).__name__}.{method} returned {type(answer).__name__}, not {kind.__name__}",
            hint="splitlearn_core.manager.loaders.loader.ModelLoader documents what each method returns",
        )
    return answer
