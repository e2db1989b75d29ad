"""What the shell holds for one generation: everything that is not a decision."""

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
    """One generation: who waits for it, what its worker says, and what came of it."""

    config: ModelConfig
    placeholder: LoadingPlaceholder
    #: Result: None when ready, or why not. Never an exception, so that nobody has to retrieve it.
    resolved: asyncio.Future[FailureInfo | None]
    #: Who waits for an unload. Result: a report, the leases that stood in the way, or why it could not be freed.
    unloads: list[asyncio.Future[UnloadReport | int | FailureInfo]] = field(default_factory=list)
    #: Written by the worker's thread, read by the tick.
    progress: Progress = field(default_factory=lambda: Progress("queued"))
    #: Read by the worker's thread at each report: not empty means stop, and says why.
    stop: str = ""
    #: When the worker's thread last let others have the interpreter.
    breathed: float = 0.0
    worker: Worker | None = None
    #: All threads that worked for it; one that has answered may still be on its last steps.
    workers: list[Worker] = field(default_factory=list)
    #: The manager's ``_activity`` when the worker began alone; None where it did not.
    measuring: int | None = None
    plan: LoadPlan | None = None
    loaded: LoadedModel | None = None
    model: AsyncManagedModel | None = None
    gate: CallGate | None = None
    broken_leases: int = 0
    freed: int | None = None


_T = TypeVar("_T")

#: Seconds of a worker's work after which it lets others have the interpreter, alone and beside others, and for how
#: long. Two are more than twice as hard on an event loop as one, for they hand the interpreter to each other.
_BREATHE_ALONE, _BREATHE_EVERY, _BREATH = 0.004, 0.002, 0.00005

#: Seconds that a thread has between its answer and its end, where somebody waits for that.
LAST_STEPS = 1.0


class Stopped:
    """A worker's answer that it was told to stop, and has."""


class Jobs:
    """The jobs of one manager.

    Args:
        loader: What knows how to load.
        resources: What knows how much memory there is.
        at_work: Tells, from any thread, how many workers there are at this moment.
    """

    def __init__(self, loader: ModelLoader, resources: ResourceManager, at_work: Callable[[], int]) -> None:
        self._loader = loader
        self._resources = resources
        self._at_work = at_work

    def plan(self, slot: Slot) -> Any:
        """Answer with the plan of a load, and the memory there is for it."""

        def work(report: Callable[[Progress], None]) -> tuple[LoadPlan, MemorySample]:
            report(Progress("resolving"))
            plan = _answer_of(self._loader.plan(slot.config, report), LoadPlan, "plan", self._loader)
            return plan, self._resources.sample()

        return self._guarded(slot, work)

    def load(self, slot: Slot) -> Any:
        """Answer with the loaded model, the anonymous memory by which the process grew, and what is left."""

        def work(report: Callable[[Progress], None]) -> tuple[LoadedModel, int, MemorySample]:
            if slot.plan is None:
                raise InternalError("nothing was planned", hint="please report this")
            before = anonymous_memory()
            answer = self._loader.load(slot.config, slot.plan, report)
            loaded = _answer_of(answer, LoadedModel, "load", self._loader)
            return loaded, anonymous_memory() - before, self._resources.sample()

        return self._guarded(slot, work)

    def warm_up(self, slot: Slot) -> Any:
        """Run forward passes; answer with nothing."""

        def work(report: Callable[[Progress], None]) -> None:
            report(Progress("warming up"))
            if slot.loaded is not None:
                self._loader.warm_up(slot.config, slot.loaded, report)

        return self._guarded(slot, work)

    def free(self, box: list[Any], workers: Iterable[Worker]) -> tuple[int, MemorySample]:
        """Forget what is in the box; answer with the anonymous memory that came back, and what there is."""
        for worker in workers:
            # Its frames know the model that it brought, until it has ended.
            worker.join(LAST_STEPS)
        before = anonymous_memory()
        box.clear()
        self._resources.release_unused()
        return before - anonymous_memory(), self._resources.sample()

    def sample(self) -> MemorySample:
        """Answer with the memory there is."""
        return self._resources.sample()

    def _guarded(self, slot: Slot, work: Callable[[Callable[[Progress], None]], Any]) -> Any:
        try:
            return work(self._report_of(slot))
        except LoadCancelledError:
            return Stopped()
        except BaseException as error:  # noqa: BLE001  # plugins raise what they like, and the loop waits for an answer
            return record(error, slot.progress.stage)

    def _report_of(self, slot: Slot) -> Callable[[Progress], None]:
        def report(progress: Progress) -> None:
            if slot.stop:
                raise LoadCancelledError(f"loading {slot.config.model_id!r} was told to stop: {slot.stop}")
            slot.progress = progress
            worked = time.monotonic() - slot.breathed
            if worked >= _BREATHE_EVERY and (worked >= _BREATHE_ALONE or self._at_work() > 1):
                # A thread that computes in Python keeps the interpreter for 5 ms once it has it. While
                # this one sleeps, the event loop gets its turn.
                time.sleep(_BREATH)
                slot.breathed = time.monotonic()

        return report


def _answer_of(answer: Any, kind: type[_T], method: str, loader: ModelLoader) -> _T:
    """Refuse, in the worker, what a loader of somebody else's may return."""
    if not isinstance(answer, kind):
        raise ConfigurationError(
            f"{type(loader).__name__}.{method} returned {type(answer).__name__}, not {kind.__name__}",
            hint="splitlearn_core.manager.loaders.loader.ModelLoader says what each method returns",
        )
    return answer
