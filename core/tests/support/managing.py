"""What tests of the manager need: a loader that stands still where a test says, and waiting for what comes of it."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable, Coroutine, Generator, Mapping
from typing import Any

import torch

from splitlearn_core.manager.config import ModelConfig
from splitlearn_core.manager.loaders.loadable import HOST, MAPPED, LoadedModel, LoadPlan, ReportProgress
from splitlearn_core.manager.loaders.loader import ModelLoader
from splitlearn_core.manager.manager import AsyncModelManager
from splitlearn_core.manager.resources import MemorySample, ResourceManager
from splitlearn_core.manager.status import ModelStatus
from splitlearn_core.testing.managing import (
    LIMIT,
    Gate,
    charges,
    check_closed,
    check_sound,
    closing,
    outcome_of,
    run,
    splitlearn_threads,
)
from splitlearn_core.types import Progress

__all__ = [
    "LIMIT", "CancelAt", "Doubler", "FixedMemory", "Gate", "GatedLoader", "StepsClock", "charges", "check_closed",
    "check_sound", "closing", "outcome_of", "picture", "reached", "resting", "run", "seen", "splitlearn_threads",
    "status_of", "until",
]  # fmt: skip
#: Seconds between two looks at what no event tells of.
_LOOK_EVERY = 0.002


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
        """Do nothing but wait at the requested gates."""
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


async def seen(manager: AsyncModelManager, met: Callable[[], object]) -> None:
    """Wait until a condition is met; it is looked at after each change of a model's status."""
    stream = manager.events()
    while not met():
        await anext(stream)


async def until(met: Callable[[], object]) -> None:
    """Wait for a condition that no event reports."""
    while not met():
        await asyncio.to_thread(threading.Event().wait, _LOOK_EVERY)


async def reached(manager: AsyncModelManager, model_id: str, *statuses: ModelStatus | None) -> None:
    """Wait until a model has one of these statuses; None for gone."""
    await seen(manager, lambda: status_of(manager, model_id) in statuses)


def status_of(manager: AsyncModelManager, model_id: str) -> ModelStatus | None:
    """Return the status that a list shows; None where it shows no such model."""
    return next((info.status for info in manager.list_models() if info.model_id == model_id), None)


async def resting(manager: AsyncModelManager) -> None:
    """Wait until nothing is on its way in or out."""
    moving = set(ModelStatus) - {ModelStatus.READY, ModelStatus.FAILED, ModelStatus.STUCK}
    await seen(manager, lambda: not manager._shell.machine.keys(*moving))  # a list shows one generation of two


def picture(manager: AsyncModelManager) -> tuple[Any, ...]:
    """Return all that a refused request must not change."""
    statistics = manager.get_statistics()
    counted = (statistics.loads_started, statistics.leases, statistics.unloads, statistics.evictions)
    return manager.list_models(), charges(manager), counted, manager.health()


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
