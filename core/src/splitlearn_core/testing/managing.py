"""What tests of the manager need: a loader that stands still where a test says, and a look at what is left over."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import torch

from splitlearn_core.manager.config import ModelConfig
from splitlearn_core.manager.loaders.loadable import HOST, MAPPED, LoadedModel, LoadPlan, ReportProgress
from splitlearn_core.manager.loaders.loader import ModelLoader
from splitlearn_core.manager.manager import AsyncModelManager
from splitlearn_core.manager.resources import MemorySample, ResourceManager
from splitlearn_core.manager.status import ModelStatus
from splitlearn_core.types import Progress

_T = TypeVar("_T")
#: Seconds after which a test has failed rather than been slow, on a busy machine too.
LIMIT = 120.0
#: Seconds between two reports of a load that stands still.
_REPORT_EVERY = 0.002


class Gate:
    """A place at which a load stands still until it is opened."""

    def __init__(self, *, deaf: bool = False, progress: Progress | None = None) -> None:
        """Make one.

        Args:
            deaf: The load does not report while it stands still, so that it does not hear that it is to stop.
            progress: What it reports.
        """
        self.reached = threading.Event()
        self._opened = threading.Event()
        self._deaf = deaf
        self.progress = progress or Progress("reading")
        self._error: BaseException | None = None

    def open(self) -> None:
        """Let it go on."""
        self._opened.set()

    def fail(self, error: BaseException) -> None:
        """Let it end with an error."""
        self._error = error
        self._opened.set()

    async def arrival(self) -> None:
        """Wait until the load stands here, without blocking the loop."""
        if not await asyncio.to_thread(self.reached.wait, LIMIT):
            raise AssertionError("the load did not come to the gate")

    def enter(self, report: ReportProgress) -> None:
        """Stand still; called by the load."""
        self.reached.set()
        if self._deaf:
            self._opened.wait(LIMIT)
        else:
            while not self._opened.wait(_REPORT_EVERY):
                report(self.progress)
        if self._error is not None:
            raise self._error


class Doubler(torch.nn.Module):
    """The model that a :class:`GatedLoader` loads; it counts its calls, and can be made to stand still in one."""

    def __init__(self) -> None:
        super().__init__()
        self.gate: Gate | None = None
        self.threads: list[str] = []

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """Return twice the value."""
        self.threads.append(threading.current_thread().name)
        if self.gate is not None:
            self.gate.enter(lambda _: None)
        return value * 2


class FixedMemory(ResourceManager):
    """A machine of which all is known: what it has, and what the models that are alive take of it."""

    def __init__(self, size: int = 10_000) -> None:
        """Make one of so many bytes."""
        super().__init__()
        self.size = size
        self._taken: dict[int, int] = {}

    def take(self, count: int, module: torch.nn.Module) -> None:
        """Let a module take bytes until it dies."""
        self._taken[id(module)] = count
        weakref.finalize(module, self._taken.pop, id(module))

    def sample(self) -> MemorySample:
        """Say what there is."""
        free = self.size - sum(tuple(self._taken.values()))
        return MemorySample({HOST: self.size, MAPPED: self.size}, {HOST: free, MAPPED: self.size})

    def release_unused(self) -> None:
        """Do nothing; modules have died by now."""


class GatedLoader(ModelLoader):
    """A loader without files, whose stages (``plan``, ``load``, ``warm_up``) stand still where a test says."""

    def __init__(self, sizes: Mapping[str, int] | None = None, *, memory: FixedMemory | None = None) -> None:
        """Make one.

        Args:
            sizes: Model id -> bytes that it takes; models without a size take 1000.
            memory: The machine on which they take it.
        """
        self._sizes = dict(sizes or {})
        self.memory = memory or FixedMemory()
        self._gates: dict[tuple[str, str], Gate] = {}
        #: Stages that were begun: (model id, stage).
        self.begun: list[tuple[str, str]] = []

    def hold(self, model_id: str, stage: str = "load", *, deaf: bool = False, progress: Progress | None = None) -> Gate:
        """Let a stage of a model stand still, from its next beginning on."""
        self._gates[model_id, stage] = gate = Gate(deaf=deaf, progress=progress)
        return gate

    def release(self, model_id: str, stage: str = "load") -> None:
        """Hold later beginnings of it no more."""
        del self._gates[model_id, stage]

    def plan(self, config: ModelConfig, report: ReportProgress) -> LoadPlan:
        """Plan the size that the test has said."""
        self._pass(config, "plan", report)
        needs = {HOST: self._sizes.get(config.model_id, 1000), MAPPED: 10}
        return LoadPlan(needs, needs, "nowhere", "float32", config.device)

    def load(self, config: ModelConfig, plan: LoadPlan, report: ReportProgress) -> LoadedModel:
        """Make a model that doubles."""
        self._pass(config, "load", report)
        module = Doubler()
        self.memory.take(plan.needs[HOST], module)
        return LoadedModel(module, plan.location, plan.dtype, plan.device)

    def warm_up(self, config: ModelConfig, loaded: LoadedModel, report: ReportProgress) -> None:
        """Do nothing but stand still where told to."""
        self._pass(config, "warm_up", report)

    def _pass(self, config: ModelConfig, stage: str, report: ReportProgress) -> None:
        self.begun.append((config.model_id, stage))
        report(Progress(stage))
        gate = self._gates.get((config.model_id, stage))
        if gate is not None:
            gate.enter(report)


class StepsClock:
    """A clock that stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


def run(main: Coroutine[Any, Any, _T], *, limit: float = LIMIT) -> _T:
    """Run a test's coroutine in a loop of its own, and refuse what it leaves behind or lets fail unseen."""
    unseen: list[dict[str, Any]] = []

    async def watched() -> _T:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unseen.append(context))
        async with asyncio.timeout(limit):
            return await main

    result = asyncio.run(watched(), debug=False)
    if unseen:
        raise AssertionError(f"the loop was told of {unseen}")
    return result


async def seen(manager: AsyncModelManager, met: Callable[[], object]) -> None:
    """Wait until a condition is met; it is looked at after each change of a model's status."""
    stream = manager.events()
    while not met():
        await anext(stream)


async def until(met: Callable[[], object]) -> None:
    """Wait until something is so that no event tells of."""
    while not met():
        await asyncio.to_thread(threading.Event().wait, _REPORT_EVERY)


async def reached(manager: AsyncModelManager, model_id: str, *statuses: ModelStatus | None) -> None:
    """Wait until a model has one of these statuses; None for gone."""
    await seen(manager, lambda: status_of(manager, model_id) in statuses)


def status_of(manager: AsyncModelManager, model_id: str) -> ModelStatus | None:
    """Return the status that a list shows; None where it shows no such model."""
    return next((info.status for info in manager.list_models() if info.model_id == model_id), None)


async def resting(manager: AsyncModelManager) -> None:
    """Wait until nothing is on its way in or out."""
    moving = set(ModelStatus) - {ModelStatus.READY, ModelStatus.FAILED, ModelStatus.STUCK}
    await seen(manager, lambda: not manager._shell.machine.keys(*moving))  # noqa: SLF001  # a list shows one generation of two


def charges(manager: AsyncModelManager) -> dict[str, int]:
    """Return what is charged and promised, by ledger; empty where nothing is."""
    ledgers = manager.get_statistics().ledgers
    return {name: both for name, ledger in ledgers.items() if (both := ledger.charged + ledger.reserved)}


def picture(manager: AsyncModelManager) -> tuple[Any, ...]:
    """Return all that a refused request must not change."""
    statistics = manager.get_statistics()
    counted = (statistics.loads_started, statistics.leases, statistics.unloads, statistics.evictions)
    return manager.list_models(), charges(manager), counted, manager.health()


def check_sound(manager: AsyncModelManager) -> None:
    """Refuse a manager that contradicts itself."""
    problems = manager._shell.machine.violations()  # noqa: SLF001  # the machine says of itself what must hold
    slots = set(manager._shell.slots)  # noqa: SLF001  # what is left inside is what it looks at
    generations = {generation.key for generation in manager._shell.machine.generations()}  # noqa: SLF001  # likewise
    if slots != generations:
        problems.append(f"the shell holds {slots}, the machine {generations}")
    if problems:
        raise AssertionError("\n".join(problems))


def check_closed(manager: AsyncModelManager) -> None:
    """Refuse a closed manager that has left anything: memory, models, tasks or threads."""
    check_sound(manager)
    left: list[object] = [*charges(manager).items(), *manager.list_models()]
    left += [task for task in asyncio.all_tasks() if task.get_name().startswith("splitlearn")]
    left += splitlearn_threads()
    if left:
        raise AssertionError(f"left over: {left}")


def splitlearn_threads() -> list[str]:
    """Return the names of our threads that are alive."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("splitlearn")]


@asynccontextmanager
async def closing(manager: AsyncModelManager) -> AsyncIterator[AsyncModelManager]:
    """Use a manager, check it, close it, and check that nothing is left."""
    async with manager:
        yield manager
        check_sound(manager)
    check_closed(manager)


class CancelAt:
    """Awaits a coroutine and cancels the task that does so, once, at one of its suspensions.

    With ``late``, the task is cancelled when what it waits for has just come, and it has not seen it yet.
    """

    def __init__(self, main: Coroutine[Any, Any, Any], number: int, *, late: bool = False) -> None:
        self._main = main
        self._number = number
        self._late = late
        self.suspensions = 0

    @property
    def happened(self) -> bool:
        """Whether there were as many suspensions."""
        return self.suspensions >= self._number

    def __await__(self) -> Generator[Any, Any, Any]:
        send: Callable[[], Any] = lambda: self._main.send(None)  # noqa: E731  # replaced by a throw below
        while True:
            try:
                waits_for = send()
            except StopIteration as end:
                return end.value
            self.suspensions += 1
            if self.suspensions == self._number:
                self._cancel(waits_for)
            try:
                yield waits_for
            except BaseException as error:  # noqa: BLE001  # passed on as it is
                send = _thrower(self._main, error)
            else:
                send = lambda: self._main.send(None)  # noqa: E731  # as above

    def _cancel(self, waits_for: Any) -> None:
        task = asyncio.current_task()
        if task is None:
            raise AssertionError("there is no task to cancel")
        if self._late and waits_for is not None:
            waits_for.add_done_callback(lambda _: task.cancel())
        else:
            task.cancel()


def _thrower(main: Coroutine[Any, Any, Any], error: BaseException) -> Callable[[], Any]:
    return lambda: main.throw(error)


async def outcome_of(work: Awaitable[Any]) -> Any:
    """Return what an awaitable returns, or the exception that it raises."""
    return (await asyncio.gather(work, return_exceptions=True))[0]
