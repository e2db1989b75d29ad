"""Every point at which an operation of the manager waits is cancelled once: nothing is ever left half-done.

Each operation runs again and again, cancelled at its first suspension, its second, and so on, until
it ends without having been suspended so often. It is cancelled as it begins to wait, and as what it
waits for has just come.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import torch

from splitlearn_core import AsyncModelManager, ConfigurationError, ModelConfig, SplitLearnError
from splitlearn_core.errors import ManagerClosedError
from splitlearn_core.manager import manager as manager_module
from splitlearn_core.manager.status import ModelStatus
from support.managing import (
    LIMIT,
    CancelAt,
    Gate,
    GatedLoader,
    charges,
    check_closed,
    check_sound,
    outcome_of,
    resting,
    run,
    seen,
    status_of,
    until,
)

pytestmark = pytest.mark.usefixtures("llama")

S = ModelStatus
HIDDEN = torch.ones(1, 3, 32)
#: More suspensions than any operation has.
MANY = 40


def part(folder: Path, model_id: str = "a", **options: Any) -> ModelConfig:
    fields = {"model_type": "llama", "component": "trunk", "split_points": (2, 4), "model_path": str(folder)}
    return ModelConfig(model_id=model_id, **{**fields, **options})


class Scene:
    """A manager of real models, and what an operation needs that is to be cancelled."""

    def __init__(self, folder: Path) -> None:
        self.models = AsyncModelManager(min_residency=0, close_timeout=20)
        self.folder = folder
        self.others: list[asyncio.Task[Any]] = []

    def config(self, model_id: str = "a", **options: Any) -> ModelConfig:
        return part(self.folder, model_id, **options)

    def beside(self, work: Coroutine[Any, Any, Any]) -> None:
        """Let something else go on meanwhile."""
        self.others.append(asyncio.create_task(work))


async def load(scene: Scene) -> None:
    await scene.models.load_model(scene.config(warmup=True))


async def ensure(scene: Scene) -> None:
    await scene.models.ensure_model(scene.config())


async def join(scene: Scene) -> None:
    scene.beside(scene.models.ensure_model(scene.config()))
    await asyncio.sleep(0)
    await scene.models.ensure_model(scene.config())


async def wait_on_placeholder(scene: Scene) -> None:
    scene.beside(scene.models.ensure_model(scene.config()))
    await asyncio.sleep(0)
    await scene.models.get_model("a").wait()  # type: ignore[union-attr]


async def lease_of_ready(scene: Scene) -> None:
    async with scene.models.lease("ready"):
        await asyncio.sleep(0)


async def lease_of_loading(scene: Scene) -> None:
    scene.beside(scene.models.ensure_model(scene.config()))
    await asyncio.sleep(0)
    async with scene.models.lease("a") as model:
        await model(hidden_states=HIDDEN)


async def call(scene: Scene) -> None:
    await scene.models.get_model("ready")(hidden_states=HIDDEN)  # type: ignore[operator]


async def calls_in_a_queue(scene: Scene) -> None:
    model: Any = scene.models.get_model("ready")
    scene.beside(model(hidden_states=HIDDEN))
    scene.beside(model(hidden_states=HIDDEN))
    await asyncio.sleep(0)
    await model(hidden_states=HIDDEN)


async def unload(scene: Scene) -> None:
    await scene.models.unload_model("ready")


async def unload_of_lent(scene: Scene) -> None:
    async with scene.models.lease("ready"):
        scene.beside(scene.models.unload_model("ready"))
        await asyncio.sleep(0)
    await seen(scene.models, lambda: status_of(scene.models, "ready") is None)


async def unload_by_force(scene: Scene) -> None:
    async with scene.models.lease("ready"):
        await scene.models.unload_model("ready", force=True)


async def reload(scene: Scene) -> None:
    await scene.models.reload_model("ready", scene.config("ready", dtype="float64"))


async def reload_of_lent(scene: Scene) -> None:
    async with scene.models.lease("ready") as model:
        await scene.models.reload_model("ready")
        await model(hidden_states=HIDDEN)


async def cancel_load(scene: Scene) -> None:
    scene.beside(scene.models.load_model(scene.config()))
    await asyncio.sleep(0)
    await scene.models.cancel_load("a")


async def failing_load(scene: Scene) -> None:
    await scene.models.load_model(scene.config(model_path="/nowhere"))


async def close(scene: Scene) -> None:
    scene.beside(scene.models.load_model(scene.config()))
    await asyncio.sleep(0)
    await scene.models.close()


async def close_while_lent(scene: Scene) -> None:
    async with scene.models.lease("ready") as model:
        scene.beside(model(hidden_states=HIDDEN))
        await scene.models.close(timeout=0.1)


async def whole_block(scene: Scene) -> None:
    async with scene.models as models:
        model = await models.ensure_model(scene.config())
        await model(hidden_states=HIDDEN)


async def two_components(scene: Scene) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(scene.models.ensure_model(scene.config()))
        group.create_task(scene.models.ensure_model(scene.config("b")))


OPERATIONS = (
    load, ensure, join, wait_on_placeholder, lease_of_ready, lease_of_loading, call, calls_in_a_queue, unload,
    unload_of_lent, unload_by_force, reload, reload_of_lent, cancel_load, failing_load, close, close_while_lent,
    whole_block, two_components,
)  # fmt: skip
#: After these there is nothing that could work on.
CLOSING = (close, close_while_lent, whole_block)


@pytest.mark.parametrize("late", [False, True], ids=["as it waits", "as it has come"])
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_cancelled_at_every_suspension(single: Path, operation: Callable[[Scene], Any], late: bool) -> None:
    """The ledgers agree, everything comes to rest, the manager works on, and closing leaves nothing."""
    count = 0
    while run(_cancelled_at(Scene(single), operation, count + 1, late)):
        count += 1
        assert count < MANY

    assert count >= 1


async def _cancelled_at(scene: Scene, operation: Callable[[Scene], Any], number: int, late: bool) -> bool:
    """Cancel it at one suspension, and say whether there was such a one."""
    models = scene.models
    await models.load_model(scene.config("ready"))
    cancelled = CancelAt(operation(scene), number, late=late)
    try:
        await _check(scene, operation, cancelled)
    finally:
        await models.close()
    check_closed(models)
    return cancelled.happened


async def _check(scene: Scene, operation: Callable[[Scene], Any], cancelled: CancelAt) -> None:
    models = scene.models

    async def body() -> None:
        await cancelled

    outcome = await outcome_of(asyncio.create_task(body()))
    check_sound(models)
    if not cancelled.happened:
        assert outcome is None or isinstance(outcome, SplitLearnError)
    else:
        assert isinstance(outcome, asyncio.CancelledError | SplitLearnError | BaseExceptionGroup | None)

    for other in await asyncio.gather(*scene.others, return_exceptions=True):
        assert not isinstance(other, BaseException) or isinstance(other, SplitLearnError)
    if operation not in CLOSING:
        await resting(models)
        check_sound(models)
        await _works(scene)


async def _works(scene: Scene) -> None:
    """Nothing is leased; only ready models are charged; another load and a call succeed."""
    models = scene.models
    # A call whose caller has left keeps the model until its thread is done with it.
    await until(lambda: not any(info.leases for info in models.list_models()))
    infos = models.list_models()
    assert {info.status for info in infos} <= {S.READY, S.FAILED}
    assert [info.waiters for info in infos] == [0] * len(infos)
    assert charges(models).get("mapped", 0) == sum(info.predicted["mapped"] for info in infos if info.ready)
    model = await models.load_model(scene.config("another"))
    assert (await model(hidden_states=HIDDEN)).shape == HIDDEN.shape
    for info in models.list_models():
        await models.unload_model(info.model_id)
    assert (models.list_models(), charges(models)) == ((), {})


async def _enter(models: AsyncModelManager) -> None:
    async with models:
        raise AssertionError("it was cancelled before")


def descriptors() -> int:
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.is_dir() else 0


@pytest.mark.parametrize("late", [False, True], ids=["as it waits", "as it has come"])
def test_a_cancelled_entry_leaves_nothing(late: bool) -> None:
    """A manager that could not be entered leaves no task, thread or descriptor, although it is never closed."""

    async def main() -> None:
        models = AsyncModelManager()
        cancelled = CancelAt(_enter(models), 1, late=late)

        async def body() -> None:
            await cancelled

        before = descriptors()
        assert isinstance(await outcome_of(asyncio.create_task(body())), asyncio.CancelledError)
        check_closed(models)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert descriptors() == before
        with pytest.raises(ManagerClosedError):
            await models.__aenter__()
        check_closed(models)

    run(main())


def test_an_entry_that_is_cancelled_twice_still_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second cancellation does not wait for the close, which continues and completes."""
    gate = Gate(deaf=True)
    monkeypatch.setattr(manager_module, "registry", lambda: gate.enter(lambda _: None))

    async def main() -> None:
        models = AsyncModelManager()
        task = asyncio.create_task(_enter(models))
        await gate.arrival()
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        assert isinstance(await outcome_of(task), asyncio.CancelledError)
        gate.open()
        await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})
        check_closed(models)

    run(main())


def test_an_entry_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking at what is installed may raise anything."""

    def raising() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(manager_module, "registry", raising)

    async def main() -> None:
        models = AsyncModelManager()
        with pytest.raises(ZeroDivisionError):
            await _enter(models)
        check_closed(models)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(main())


def test_a_manager_is_entered_once_and_in_one_loop() -> None:
    """A second entry is refused, and neither closes the manager of the first nor starts anything."""
    models = AsyncModelManager(loader=GatedLoader())

    async def main() -> None:
        async with models:
            before = asyncio.all_tasks()
            with pytest.raises(ConfigurationError, match="already entered"):
                await _enter(models)
            assert asyncio.all_tasks() == before
            assert not models._shell.machine.closed
        with pytest.raises(ManagerClosedError):
            await _enter(models)
        check_closed(models)

    async def elsewhere() -> None:
        with pytest.raises(ConfigurationError, match="another event loop"):
            await _enter(models)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run(main())
    run(elsewhere())


@pytest.mark.parametrize("times", [1, 2])
def test_a_cancelled_exit_still_ends(times: int) -> None:
    """The block is cancelled, and then its exit: the remaining work ends by itself."""

    async def main() -> None:
        loader = GatedLoader()
        gate = loader.hold("a", deaf=True)
        models = AsyncModelManager(loader=loader, resources=loader.memory)

        async def block() -> None:
            async with models:
                await models.load_model(part(Path("/x")))

        task = asyncio.create_task(block())
        await gate.arrival()
        for _ in range(times):
            task.cancel()
            await asyncio.sleep(0)
        gate.open()
        assert isinstance(await outcome_of(task), asyncio.CancelledError)
        await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})
        check_closed(models)

    run(main())


def test_a_loop_that_ends_before_the_manager_leaves_no_thread(caplog: pytest.LogCaptureFixture) -> None:
    """Waiting callers get an answer, and the threads end after their current work."""
    loader = GatedLoader()
    models = AsyncModelManager(loader=loader, resources=loader.memory)
    gate = Gate(deaf=True)

    async def main() -> None:
        model: Any = await models.load_model(part(Path("/x")))
        module = model.model
        await model(torch.ones(1))
        module.gate = gate
        call = asyncio.create_task(model(torch.ones(1)))
        await gate.arrival()
        closing = asyncio.create_task(models.close())
        await asyncio.sleep(0)
        closing.cancel()
        await outcome_of(closing)
        assert not call.done()

    asyncio.run(main())
    gate.open()
    for worker in models._shell._pool.workers:
        assert worker.join(LIMIT)
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.parametrize("stage", ["plan", "load", "warm_up"])
@pytest.mark.parametrize("late", [False, True], ids=["as it waits", "as it has come"])
def test_a_cancelled_cancel_still_cancels(stage: str, late: bool) -> None:
    """Its caller may be cancelled: the worker is stopped nevertheless."""

    async def main() -> None:
        loader = GatedLoader()
        gate = loader.hold("a", stage)
        models = AsyncModelManager(loader=loader, resources=loader.memory)
        load_task = asyncio.create_task(models.load_model(part(Path("/x"), warmup=True)))
        await gate.arrival()
        cancelled = CancelAt(models.cancel_load("a"), 1, late=late)

        async def body() -> None:
            await cancelled

        assert isinstance(await outcome_of(asyncio.create_task(body())), asyncio.CancelledError)
        assert cancelled.happened
        assert isinstance(await outcome_of(load_task), SplitLearnError)
        await resting(models)
        assert (models.list_models(), charges(models)) == ((), {})
        await models.close()
        check_closed(models)

    run(main())


@pytest.mark.parametrize("order", ["call first", "lease first"])
def test_a_call_and_its_lease_are_cancelled_together(order: str) -> None:
    """In either order; the thread that runs keeps the model until it is done, and nothing longer."""

    async def main() -> None:
        loader = GatedLoader()
        models = AsyncModelManager(loader=loader, resources=loader.memory)
        model = await models.load_model(part(Path("/x")))
        module: Any = model.model
        module.gate = gate = Gate(deaf=True)

        async def hold() -> None:
            async with models.lease("a") as lent:
                call = asyncio.ensure_future(lent(torch.ones(1)))
                await (asyncio.shield(call) if order == "lease first" else call)

        task = asyncio.create_task(hold())
        await gate.arrival()
        assert model.info.leases == 2
        task.cancel()
        await outcome_of(task)
        assert model.info.leases == 1
        unload_task = asyncio.create_task(models.unload_model("a"))
        gate.open()
        assert (await unload_task).broken_leases == 0
        await models.close()
        check_closed(models)

    run(main())
