"""The manager never blocks its loop: proven without a clock."""

from __future__ import annotations

import ast
import asyncio
import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from splitlearn_core import AsyncModelManager, ModelConfig, Progress
from splitlearn_core.errors import UnknownModelError
from splitlearn_core.manager import handles, manager, shell
from splitlearn_core.manager.loaders.loadable import LoadedModel, LoadPlan, ReportProgress
from splitlearn_core.manager.loaders.loader import ModelLoader
from splitlearn_core.manager.status import ModelStatus
from support.managing import GatedLoader, closing, reached, run

pytestmark = pytest.mark.usefixtures("llama")

S = ModelStatus


def part(folder: Path, model_id: str = "a", **options: Any) -> ModelConfig:
    fields = {"model_type": "llama", "component": "trunk", "split_points": (2, 4), "model_path": str(folder)}
    return ModelConfig(model_id=model_id, **{**fields, **options})


class NeedsTheLoop(ModelLoader):
    """Loads real models, but each stage continues only once the loop has run a callback."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.answers = 0

    def plan(self, config: ModelConfig, report: ReportProgress) -> LoadPlan:
        """Ask, plan, and ask."""
        self._ask()
        plan = super().plan(config, report)
        self._ask()
        return plan

    def load(self, config: ModelConfig, plan: LoadPlan, report: ReportProgress) -> LoadedModel:
        """Ask at every report as well."""

        def asking(progress: Progress) -> None:
            self._ask()
            report(progress)

        loaded = super().load(config, plan, asking)
        self._ask()
        return loaded

    def warm_up(self, config: ModelConfig, loaded: LoadedModel, report: ReportProgress) -> None:
        """Ask before and after."""
        self._ask()
        super().warm_up(config, loaded, report)
        self._ask()

    def _ask(self) -> None:
        answered = threading.Event()
        self._loop.call_soon_threadsafe(answered.set)
        if not answered.wait(30):
            raise AssertionError("the loop does not turn")
        self.answers += 1


@pytest.mark.parametrize("method", ["load_model", "ensure_model", "reload_model", "lease"])
def test_a_load_that_needs_the_loop_to_turn_ends(single: Path, method: str) -> None:
    """It would stand still for ever if anything of the manager waited for it on the loop."""

    async def main() -> None:
        loader = NeedsTheLoop(asyncio.get_running_loop())
        async with closing(AsyncModelManager(loader=loader)) as models:
            config = part(single, warmup=True)
            if method == "lease":
                load = asyncio.create_task(models.load_model(config))
                await asyncio.sleep(0)
                async with models.lease("a") as model:
                    assert model is await load
            elif method == "reload_model":
                await models.load_model(config)
                await models.reload_model("a")
            else:
                await getattr(models, method)(config)
            assert loader.answers >= 8
            await models.unload_model("a")

    run(main())


def test_a_call_that_needs_the_loop_to_turn_ends(single: Path) -> None:
    """Models run off the loop."""

    async def main() -> None:
        loop = asyncio.get_running_loop()

        def needy(module: torch.nn.Module) -> bool:
            answered = threading.Event()
            loop.call_soon_threadsafe(answered.set)
            return answered.wait(30)

        async with closing(AsyncModelManager()) as models:
            model = await models.load_model(part(single))
            assert await asyncio.gather(*(model.run(needy) for _ in range(5))) == [True] * 5

    run(main())


def test_memory_is_freed_off_the_loop(single: Path) -> None:
    """Unloading and discarding happen in threads of their own: they may need the loop too."""
    loops: list[asyncio.AbstractEventLoop] = []
    seen: list[str] = []

    class Needy(GatedLoader):
        pass

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        loader = Needy()

        def ask() -> None:
            answered = threading.Event()
            loops[0].call_soon_threadsafe(answered.set)
            assert answered.wait(30)
            seen.append(threading.current_thread().name)

        loader.memory.release_unused = ask  # type: ignore[method-assign]
        async with closing(AsyncModelManager(loader=loader, resources=loader.memory)) as models:
            await models.load_model(part(single))
            await models.unload_model("a")
            gate = loader.hold("b", "warm_up")
            task = asyncio.create_task(models.load_model(part(single, "b", warmup=True)))
            await gate.arrival()
            await models.cancel_load("b")
            await asyncio.gather(task, return_exceptions=True)

    run(main())
    assert seen == ["splitlearn-unload-a", "splitlearn-discard-b"]


def test_everything_answers_while_a_load_stands_still() -> None:
    """With a thousand models registered, each look is made between two turns of the loop."""

    async def main() -> None:
        loader = GatedLoader(dict.fromkeys(map(str, range(1000)), 1))
        async with closing(AsyncModelManager(loader=loader, resources=loader.memory, max_workers=8)) as models:
            loader.memory.size = 10**6
            await asyncio.gather(*(models.load_model(part(Path("/x"), str(number))) for number in range(999)))
            gate = loader.hold("999", deaf=True)
            task = asyncio.create_task(models.load_model(part(Path("/x"), "999")))
            await gate.arrival()

            # No await from here on: all of it within one turn, while the worker cannot go on.
            infos = models.list_models()
            assert len(infos) == 1000
            assert infos[999].status is S.LOADING
            assert models.get_model_info("999") == infos[999]
            assert models.get_statistics().models == {"ready": 999, "loading": 1}
            assert models.health().live
            assert models.get_model("5").status is S.READY
            assert models.story("999")[-1].after is S.LOADING
            assert models.list_models()[5] is infos[5]
            assert not task.done()

            async with models.lease("7") as model:
                assert float(await model(torch.ones(1))) == 2.0
            await models.unload_model("8")
            await models.load_model(part(Path("/x"), "8"))
            assert not task.done()
            gate.open()
            await task

    run(main())


def test_one_load_does_not_hold_up_another() -> None:
    """While one stands still, another begins and ends."""

    async def main() -> None:
        loader = GatedLoader()
        gate = loader.hold("a", deaf=True)
        async with closing(AsyncModelManager(loader=loader, resources=loader.memory)) as models:
            first = asyncio.create_task(models.load_model(part(Path("/x"))))
            await gate.arrival()
            await models.load_model(part(Path("/x"), "b"))
            assert not first.done()
            gate.open()
            await first
            await reached(models, "a", S.READY)

    run(main())


# --- the text of the shell ----------------------------------------------------------------------


def _functions(module: Any) -> dict[str, ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(Path(module.__file__).read_text())
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def _calls(node: ast.AST, name: str) -> list[ast.Call]:
    return [
        call
        for call in ast.walk(node)
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == name
    ]


def effects_of_the_shell() -> dict[type, Callable[..., None]]:
    """Return the class of each effect, with the method that carries it out."""
    registered = vars(shell.Shell)["_apply"].dispatcher.registry
    return {kind: function for kind, function in registered.items() if kind is not object}


def _waits(node: ast.AST) -> list[int]:
    waits = ast.Await | ast.AsyncWith | ast.AsyncFor
    return [found.lineno for found in ast.walk(node) if isinstance(found, waits)]


def test_events_enter_the_machine_in_one_function_without_await() -> None:
    """Between an event and the end of its effects no other task runs: all of it happens in one plain function."""
    callers = [
        name
        for module in (manager, shell)
        for name, function in _functions(module).items()
        if _calls(function, "handle")
    ]
    assert callers == ["dispatch"]
    assert isinstance(_functions(shell)["dispatch"], ast.FunctionDef)
    assert _calls(_functions(shell)["dispatch"], "_carry_out")


def test_effects_and_answers_are_carried_out_by_plain_functions() -> None:
    """None of them could wait if it wanted to."""
    functions = _functions(shell)
    effects = [function.__name__ for function in effects_of_the_shell().values()]
    for name in [*effects, "dispatch", "_carry_out", "_worker_done", "_unloaded", "_sampled", "_launch"]:
        assert isinstance(functions[name], ast.FunctionDef), name
        assert not _waits(functions[name])


def test_no_finalizer_runs_in_the_middle_of_a_change() -> None:
    """Garbage that is due for collection may ask the manager; it sees it before a change or after, never half-way."""
    seen: list[tuple[bool, list[str]]] = []

    class Nosy:
        """In a cycle, so that only a collection ends it."""

        def __init__(self, manager: AsyncModelManager) -> None:
            self.manager, self.itself = manager, self

        def __del__(self) -> None:
            seen.append((inside, self.manager._shell.machine.violations()))

    inside = False

    async def scenario() -> None:
        nonlocal inside
        async with AsyncModelManager(loader=GatedLoader()) as manager:
            carry_out, threshold = manager._shell._carry_out, gc.get_threshold()

            def watched(effects: Any) -> None:
                nonlocal inside
                inside = True
                Nosy(manager)
                # Enough to make a collection due, were they allowed.
                garbage = [[number] for number in range(64)]
                carry_out(effects)
                del garbage
                inside = False

            manager._shell._carry_out = watched  # type: ignore[method-assign]
            gc.set_threshold(16)
            try:
                await manager.load_model(part(Path("anywhere")))
            finally:
                gc.set_threshold(*threshold)
                del manager._shell._carry_out
            assert gc.isenabled()
            gc.collect()

    run(scenario())
    assert seen
    assert not any(during or problems for during, problems in seen)


def test_an_event_that_is_refused_leaves_collections_on() -> None:
    """An error leaves the section as well."""

    async def scenario() -> None:
        async with AsyncModelManager(loader=GatedLoader()) as manager:
            with pytest.raises(UnknownModelError):
                await manager.cancel_load("nobody")
            assert gc.isenabled()

    run(scenario())


def test_every_effect_of_the_machine_is_carried_out() -> None:
    """An effect that the shell does not know would fail in the middle of a change."""
    from splitlearn_core.manager import messages

    classes = [value for name, value in vars(messages).items() if isinstance(value, type) and name[0] != "_"]
    assert set(effects_of_the_shell()) == {kind for kind in classes if messages.Effect in kind.__mro__[1:]}


def test_nothing_of_the_shell_locks_or_sleeps_on_the_loop() -> None:
    """No lock is held across an await because there is none; time passes in the ticker alone."""
    for module in (manager, shell, handles):
        source = Path(module.__file__).read_text()
        assert "Lock(" not in source
    assert {name for name, node in _functions(shell).items() if _calls(node, "sleep")} == {"_tick_for_ever"}
    assert not any(_calls(node, "sleep") for node in _functions(manager).values())
