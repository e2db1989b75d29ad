"""The manager as its users see it: what every method does, returns and refuses."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from splitlearn_core import (
    AsyncModelManager,
    ConfigurationError,
    InsufficientMemoryError,
    InvalidSplitError,
    MissingFileError,
    ModelConfig,
    SplitLearnError,
    UnknownModelTypeError,
)
from splitlearn_core.errors import (
    BusyError,
    DrainTimeoutError,
    DuplicateModelError,
    InternalError,
    LoadCancelledError,
    LoadFailedError,
    LoadStalledError,
    ManagerClosedError,
    ModelGoneError,
    ModelNotReadyError,
    UnknownModelError,
    WaitTimeoutError,
)
from splitlearn_core.manager import messages as m
from splitlearn_core.manager.handles import AsyncManagedModel, LoadingPlaceholder
from splitlearn_core.manager.status import ModelStatus
from splitlearn_core.types import Progress
from support.managing import (
    FixedMemory,
    Gate,
    GatedLoader,
    StepsClock,
    charges,
    check_closed,
    check_sound,
    closing,
    outcome_of,
    picture,
    reached,
    resting,
    run,
    seen,
    splitlearn_threads,
    status_of,
    until,
)

pytestmark = pytest.mark.usefixtures("llama")

S = ModelStatus
CUTS = (2, 4)
IDS = torch.tensor([[5, 17, 42, 99, 3, 8, 64], [1, 2, 3, 4, 5, 6, 7]])
NAMES = ("bottom", "trunk", "top")


def part(folder: Path, name: str = "trunk", model_id: str | None = None, **options: Any) -> ModelConfig:
    fields = {"model_type": "llama", "component": name, "split_points": CUTS, "model_path": str(folder), **options}
    return ModelConfig(model_id=model_id or name, **fields)


def fake(model_id: str = "a", **options: Any) -> ModelConfig:
    """Return a configuration for the loader that reads no files."""
    return part(Path("/nowhere"), "trunk", model_id, **options)


def manager(loader: GatedLoader, **options: Any) -> AsyncModelManager:
    fields: dict[str, Any] = {"min_residency": 0, "resources": loader.memory, "headroom_mb": 0, **options}
    return AsyncModelManager(loader=loader, **fields)


def tick(models: AsyncModelManager) -> None:
    """Let the manager look at its clock now rather than within a tenth of a second."""
    models._shell.dispatch(m.Tick(models._shell.clock(), {}))


# --- loading ------------------------------------------------------------------------------------


def test_three_loaded_components_give_the_whole_models_logits(single: Path, whole: Any) -> None:
    """Loaded side by side and called one after the other, to the last bit."""

    async def main() -> torch.Tensor:
        async with closing(AsyncModelManager()) as models:
            await asyncio.gather(*(models.load_model(part(single, name, warmup=name == "top")) for name in NAMES))
            async with models.lease("bottom") as bottom, models.lease("trunk") as trunk, models.lease("top") as top:
                hidden = await trunk(hidden_states=await bottom(input_ids=IDS))
                logits: torch.Tensor = (await top(hidden_states=hidden)).logits
            return logits

    with torch.inference_mode():
        expected = whole(input_ids=IDS, use_cache=False).logits
    assert torch.equal(run(main()), expected)


def test_a_cache_goes_through_calls(single: Path, whole: Any) -> None:
    """A prompt in two pieces gives what it gives in one."""

    async def main() -> torch.Tensor:
        async with closing(AsyncModelManager()) as models:
            parts = [await models.load_model(part(single, name)) for name in NAMES]
            caches = [one.new_cache() for one in parts]
            pieces = []
            for piece in (IDS[:, :4], IDS[:, 4:]):
                state: Any = piece
                for one, cache in zip(parts, caches, strict=True):
                    state = await one(state, past_key_values=cache)
                pieces.append(state.logits)
            return torch.cat(pieces, 1)

    with torch.inference_mode():
        expected = whole(input_ids=IDS, use_cache=False).logits
    torch.testing.assert_close(run(main()), expected)


@pytest.mark.parametrize("method", ["load_model", "ensure_model"])
def test_a_load_is_listed_before_its_caller_has_waited_at_all(method: str) -> None:
    """At the first suspension of the call the placeholder exists, with its waiters and its status."""

    async def main() -> None:
        loader = GatedLoader()
        gate = loader.hold("a")
        async with closing(manager(loader)) as models:
            call = getattr(models, method)(fake())
            waits_for = call.send(None)
            waits_for._asyncio_future_blocking = False

            placeholder = models.get_model("a")
            assert isinstance(placeholder, LoadingPlaceholder)
            (info,) = models.list_models()
            assert (info.model_id, info.status, info.waiters) == ("a", S.PLANNING, 1)
            assert (placeholder.model_id, placeholder.status, placeholder.info) == ("a", S.PLANNING, info)
            assert "a" in repr(placeholder)
            call.close()

            await gate.arrival()
            gate.open()
            assert await placeholder.wait() is models.get_model("a")

    run(main())


def test_a_load_tells_its_stage_and_bytes(single: Path) -> None:
    """What the worker reports is in the snapshot."""

    async def main() -> None:
        loader = GatedLoader()
        gate = loader.hold("a", progress=Progress("reading", None, 40, 100, "model.safetensors"))
        async with closing(manager(loader)) as models:
            task = asyncio.create_task(models.load_model(fake()))
            await gate.arrival()
            while not (info := models.get_model_info("a")).bytes_done:
                await asyncio.wait([task], timeout=0.01)
            assert (info.status, info.stage, info.bytes_done, info.bytes_total, info.file) == (
                S.LOADING, "reading", 40, 100, "model.safetensors",
            )  # fmt: skip
            assert info.predicted == {"host": 1000, "mapped": 10}
            assert charges(models) == {"host": 1000, "mapped": 10}
            gate.open()
            model = await task
            assert model.info.load_seconds is not None
            assert model.info.waiters == 0

    run(main())


def test_many_callers_of_ensure_make_one_load() -> None:
    """A hundred callers get the same model, and the loader was called once."""

    async def main() -> None:
        loader = GatedLoader()
        gate = loader.hold("a")
        async with closing(manager(loader)) as models:
            tasks = [asyncio.create_task(models.ensure_model(fake())) for _ in range(100)]
            await gate.arrival()
            assert models.get_model_info("a").waiters == 100
            gate.open()
            assert len({id(model) for model in await asyncio.gather(*tasks)}) == 1
            assert await models.ensure_model(fake(keep_alive=5)) is tasks[0].result()
            assert loader.begun == [("a", "plan"), ("a", "load")]
            assert (models.get_statistics().loads_started, models.get_statistics().joined) == (1, 99)

    run(main())


@pytest.mark.parametrize("cancelled", [0, 1, 2], ids=["first", "second", "third"])
def test_one_callers_cancellation_does_not_affect_others(cancelled: int) -> None:
    """The first caller may leave; the others get the model."""

    async def main() -> None:
        loader = GatedLoader()
        gate = loader.hold("a")
        async with closing(manager(loader)) as models:
            tasks = [asyncio.create_task(models.ensure_model(fake())) for _ in range(3)]
            await gate.arrival()
            tasks[cancelled].cancel()
            assert isinstance(await outcome_of(tasks[cancelled]), asyncio.CancelledError)
            assert models.get_model_info("a").waiters == 2
            gate.open()
            others = [await task for task in tasks if task is not tasks[cancelled]]
            assert others == [models.get_model("a")] * 2

    run(main())


def test_a_load_goes_on_without_callers() -> None:
    """When all have left, it is loaded nevertheless."""

    async def main() -> None:
        loader = GatedLoader()
        gate = loader.hold("a")
        async with closing(manager(loader)) as models:
            task = asyncio.create_task(models.load_model(fake()))
            await gate.arrival()
            task.cancel()
            await outcome_of(task)
            assert models.get_model_info("a").waiters == 0
            gate.open()
            await reached(models, "a", S.READY)

    run(main())


def test_each_caller_gets_its_own_error_and_the_next_call_retries(single: Path) -> None:
    """Each waiter has an exception of its own, of the class the loader raised; the next call succeeds."""

    async def main() -> None:
        weights = single / "model.safetensors"
        weights.rename(single / "aside")
        async with closing(AsyncModelManager()) as models:
            errors = await asyncio.gather(
                *(models.ensure_model(part(single)) for _ in range(5)), return_exceptions=True
            )
            assert {type(error) for error in errors} == {MissingFileError}
            assert len({id(error) for error in errors}) == 5
            assert len({str(error) for error in errors}) == 1
            assert all(error.hint for error in errors if isinstance(error, SplitLearnError))
            info = models.get_model_info("trunk")
            assert (info.status, info.error and info.error.type) == (S.FAILED, "MissingFileError")
            assert charges(models) == {}
            with pytest.raises(ModelNotReadyError, match="failed to load") as refusal:
                await models.lease("trunk").__aenter__()
            assert refusal.value.hint

            (single / "aside").rename(weights)
            model = await models.ensure_model(part(single))
            assert (model.status, model.info.error, model.generation) == (S.READY, None, 2)

    run(main())


class StrangeError(Exception):
    """Nobody's we know."""


@pytest.mark.parametrize(
    "error", [StrangeError("odd"), SystemExit(3), KeyboardInterrupt(), StopIteration(), ValueError()]
)
@pytest.mark.parametrize("stage", ["plan", "load", "warm_up"])
def test_an_error_of_somebody_elses_becomes_load_failed(error: BaseException, stage: str) -> None:
    """Whatever a loader raises; its traceback is kept as text, and nothing of it as an object."""

    async def main() -> None:
        loader = GatedLoader()
        loader.hold("a", stage).fail(error)
        async with closing(manager(loader)) as models:
            with pytest.raises(LoadFailedError, match=type(error).__name__) as failure:
                await models.load_model(fake(warmup=True))
            assert failure.value.hint
            kept = models.get_model_info("a").error
            assert kept is not None
            assert type(error).__name__ in kept.traceback
            assert charges(models) == {}
            loader.release("a", stage)
            await models.load_model(fake())

    run(main())


def test_failures_in_a_row_are_counted() -> None:
    """And a success resets the count."""

    async def main() -> None:
        loader = GatedLoader()
        async with closing(manager(loader)) as models:
            for count in (1, 2, 3):
                loader.hold("a").fail(ValueError("no"))
                await outcome_of(models.load_model(fake()))
                error = models.get_model_info("a").error
                assert error is not None
                assert error.consecutive == count
            loader.release("a")
            model = await models.load_model(fake())
            assert model.info.error is None
            assert models.get_statistics().loads_failed == 3

    run(main())


@pytest.mark.parametrize("method", ["plan", "load"])
def test_a_loader_that_returns_nonsense_is_reported(method: str) -> None:
    """None instead of a plan or a model is a failed load, not a load without an end."""

    class Nonsense(GatedLoader):
        pass

    setattr(Nonsense, method, lambda *_: None)

    async def main() -> None:
        async with closing(manager(Nonsense())) as models:
            with pytest.raises(ConfigurationError, match=f"Nonsense.{method} returned NoneType"):
                await models.load_model(fake())
            assert charges(models) == {}

    run(main())


# --- what is refused, and changes nothing -------------------------------------------------------


def _configuration_error(**fields: Any) -> Callable[[AsyncModelManager, Path], Any]:
    async def call(models: AsyncModelManager, folder: Path) -> None:
        await models.load_model(part(folder, **{"model_id": "x", **fields}))

    return call


REFUSED: dict[str, tuple[Callable[[AsyncModelManager, Path], Any], type[SplitLearnError], type[Exception]]] = {
    "load what is loaded": (lambda mm, f: mm.load_model(part(f)), DuplicateModelError, ValueError),
    "ensure another configuration": (
        lambda mm, f: mm.ensure_model(part(f, dtype="float16")), DuplicateModelError, ValueError,
    ),
    "unknown id": (lambda mm, _: mm.unload_model("x"), UnknownModelError, KeyError),
    "lease of an unknown id": (lambda mm, _: mm.lease("x").__aenter__(), UnknownModelError, KeyError),
    "reload of an unknown id": (lambda mm, _: mm.reload_model("x"), UnknownModelError, KeyError),
    "reload as another id": (lambda mm, f: mm.reload_model("trunk", part(f, "top")), ConfigurationError, ValueError),
    "cancel of an unknown id": (lambda mm, _: mm.cancel_load("x"), UnknownModelError, KeyError),
    "cancel of a loaded one": (lambda mm, _: mm.cancel_load("trunk"), ModelNotReadyError, SplitLearnError),
    "family that is not installed": (_configuration_error(model_type="nosuch"), UnknownModelTypeError, KeyError),
    "an id that is a path": (_configuration_error(model_id="../x"), ConfigurationError, ValueError),
    "a component that does not exist": (_configuration_error(name="middle"), ConfigurationError, ValueError),
    "a negative limit": (_configuration_error(max_memory_mb=-1), ConfigurationError, ValueError),
    "five mistakes": (
        _configuration_error(name="x", split_points=(4, 2), dtype="int3", device="gpu 1", load_threads=0),
        ConfigurationError, ValueError,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_is_refused_changes_nothing(single: Path, case: str) -> None:
    """A typed error with a hint, and the manager as it was."""
    call, kind, base = REFUSED[case]

    async def main() -> None:
        async with closing(AsyncModelManager()) as models:
            await models.load_model(part(single))
            before = picture(models)
            with pytest.raises(kind) as refusal:
                await call(models, single)
            assert isinstance(refusal.value, base)
            assert refusal.value.hint
            assert picture(models) == before

    run(main())


def test_get_of_an_unknown_id_names_those_that_are_there(single: Path) -> None:
    """Both answers at once refuse it the same way."""

    async def main() -> None:
        async with closing(AsyncModelManager()) as models:
            await models.load_model(part(single))
            for get in (models.get_model, models.get_model_info):
                with pytest.raises(UnknownModelError) as refusal:
                    get("x")
                assert "trunk" in refusal.value.hint
            assert models.story("x") == ()

    run(main())


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({"split_points": (2, 40)}, InvalidSplitError),
        ({"device": "cuda:7"}, SplitLearnError),
        ({"device": "nodevice"}, SplitLearnError),
        ({"max_memory_mb": 0.001}, InsufficientMemoryError),
        ({"strategy": "nosuch"}, SplitLearnError),
        ({"attn_implementation": "nosuch"}, SplitLearnError),
        ({"model_path": "/nowhere/at/all"}, MissingFileError),
    ],
    ids=str,
)
def test_what_only_a_load_can_tell_is_a_failed_model(single: Path, options: Any, kind: type[SplitLearnError]) -> None:
    """The others are as before, nothing is charged for it, and it can be forgotten."""

    async def main() -> None:
        async with closing(AsyncModelManager()) as models:
            await models.load_model(part(single))
            before = charges(models)
            with pytest.raises(kind) as failure:
                await models.load_model(part(single, model_id="x", **options))
            assert failure.value.hint
            info = models.get_model_info("x")
            assert (info.status, info.error and info.error.message) == (S.FAILED, failure.value.message)
            assert charges(models) == before
            assert await models.unload_model("x") is not None
            assert [info.model_id for info in models.list_models()] == ["trunk"]

    run(main())


@pytest.mark.parametrize(
    "limits",
    [
        {"max_models": 0}, {"max_models": True}, {"max_models": 1.5}, {"max_workers": None}, {"max_workers": -1},
        {"headroom_mb": -1}, {"headroom_mb": None}, {"call_queue": float("nan")}, {"wait_timeout": float("inf")},
        {"max_memory_mb": 10**400}, {"stall_timeout": "1"}, {"close_timeout": None}, {"keep_alive": -3},
        {"when_full": "panic"}, {"required": "trunk"}, {"max_memory_mb": 10**5000},
    ],
    ids=lambda limits: next(iter(limits)),
)  # fmt: skip
def test_limits_that_cannot_be_kept_are_refused(limits: dict[str, Any]) -> None:
    """Each is named."""
    with pytest.raises(ConfigurationError, match=next(iter(limits))) as refusal:
        AsyncModelManager(**limits)
    assert refusal.value.hint


def test_all_limits_are_refused_at_once() -> None:
    """Three mistakes are three lines."""
    with pytest.raises(ConfigurationError) as refusal:
        AsyncModelManager(max_models=0, headroom_mb=-2, when_full="x")  # type: ignore[arg-type]
    assert all(name in str(refusal.value) for name in ("max_models", "headroom_mb", "when_full"))


def test_a_second_loop_is_refused() -> None:
    """A manager belongs to the loop that used it first."""
    models = manager(GatedLoader())

    async def use() -> None:
        await models.load_model(fake())

    async def use_elsewhere() -> None:
        with pytest.raises(ConfigurationError, match="another event loop") as refusal:
            await models.load_model(fake("b"))
        assert refusal.value.hint

    asyncio.run(use())
    asyncio.run(use_elsewhere())


# --- unloading ----------------------------------------------------------------------------------


def test_unload_says_what_came_back(single: Path) -> None:
    """The bytes that were charged are those of the report, and then nothing is charged."""

    async def main() -> None:
        async with closing(AsyncModelManager()) as models:
            model = await models.load_model(part(single, strategy="copied"))
            held = charges(models)
            assert held["host"] > 0
            report = await models.unload_model("trunk")
            assert (report.model_id, report.broken_leases) == ("trunk", 0)
            assert dict(report.released) == held
            assert (charges(models), models.list_models()) == ({}, ())
            with pytest.raises(UnknownModelError):
                await models.unload_model("trunk")
            for use in (lambda: model.model, lambda: model.info):
                with pytest.raises(ModelGoneError):
                    use()
            with pytest.raises(ModelGoneError) as gone:
                await model(hidden_states=torch.zeros(1, 1, 32))
            assert gone.value.hint
            assert "unloading" in repr(model)

    run(main())


def test_two_unloads_at_once() -> None:
    """The second is refused; the first ends well."""

    async def main() -> None:
        async with closing(manager(GatedLoader())) as models:
            await models.load_model(fake())
            first, second = await asyncio.gather(
                models.unload_model("a"), models.unload_model("a"), return_exceptions=True
            )
            assert not isinstance(first, BaseException)
            assert isinstance(second, ModelNotReadyError)
            assert second.hint

    run(main())


def test_unload_waits_for_holders_and_lends_no_more() -> None:
    """It ends with the last lease; until then there are no new leases."""

    async def main() -> None:
        async with closing(manager(GatedLoader())) as models:
            await models.load_model(fake())
            async with models.lease("a") as model:
                unload = asyncio.create_task(models.unload_model("a"))
                await reached(models, "a", S.DRAINING)
                with pytest.raises(ModelNotReadyError, match="draining"):
                    await models.lease("a").__aenter__()
                assert torch.equal(await model(torch.ones(1)), torch.tensor([2.0]))
                assert not unload.done()
            assert (await unload).released == {"host": 1000, "mapped": 10}

    run(main())


def test_a_drain_that_takes_too_long_leaves_it_serving() -> None:
    """The error says how many have it."""

    async def main() -> None:
        async with closing(manager(GatedLoader())) as models:
            await models.load_model(fake())
            async with models.lease("a"), models.lease("a"):
                with pytest.raises(DrainTimeoutError, match="2 leases") as refusal:
                    await models.unload_model("a", timeout=0)
                assert isinstance(refusal.value, TimeoutError)
                assert "force" in refusal.value.hint
                assert status_of(models, "a") is S.READY
            async with models.lease("a"):
                pass

    run(main())


def test_a_forced_unload_breaks_leases() -> None:
    """Holders get ModelGoneError at their next call, and giving back is no error."""

    async def main() -> None:
        async with closing(manager(GatedLoader())) as models:
            await models.load_model(fake())
            async with models.lease("a") as model:
                report = await models.unload_model("a", force=True)
                assert (report.broken_leases, charges(models)) == (1, {})
                with pytest.raises(ModelGoneError):
                    await model(torch.ones(1))
                assert model.status is S.UNLOADING
            check_sound(models)

    run(main())


def test_a_forced_unload_lets_a_running_call_end_and_fails_those_that_wait() -> None:
    """Its memory counts until the running call ends; waiting calls fail because the model is gone."""

    async def main() -> None:
        async with closing(manager(GatedLoader())) as models:
            model = await models.load_model(fake())
            model.model.gate = gate = Gate(deaf=True)
            running, waiting = [asyncio.create_task(model(torch.ones(1))) for _ in range(2)]
            await gate.arrival()
            held = charges(models)
            with pytest.raises(DrainTimeoutError, match="a call still runs"):
                await models.unload_model("a", force=True, timeout=0)
            assert isinstance(await outcome_of(waiting), ModelGoneError)
            assert (status_of(models, "a"), charges(models)) == (S.UNLOADING, held)
            gate.open()
            assert torch.equal(await running, torch.tensor([2.0]))
            await resting(models)
            assert (status_of(models, "a"), charges(models)) == (None, {})

    run(main())


def test_a_forced_unload_reports_when_the_call_that_runs_has_ended() -> None:
    """And not before: until then nothing has come back."""

    async def main() -> None:
        async with closing(manager(GatedLoader())) as models:
            model = await models.load_model(fake())
            model.model.gate = gate = Gate(deaf=True)
            running = asyncio.create_task(model(torch.ones(1)))
            await gate.arrival()
            unload = asyncio.create_task(models.unload_model("a", force=True))
            await reached(models, "a", S.UNLOADING)
            gate.open()
            assert (await unload).broken_leases == 1
            assert running.done()

    run(main())


@pytest.mark.parametrize("timeout", [-1, float("nan"), "5"])
def test_a_limit_of_an_unload_is_a_number_from_0(timeout: Any) -> None:
    """Anything else is refused, and the model serves on."""

    async def main() -> None:
        async with closing(manager(GatedLoader())) as models:
            await models.load_model(fake())
            with pytest.raises(ConfigurationError, match="timeout is"):
                await models.unload_model("a", timeout=timeout)
            assert status_of(models, "a") is S.READY

    run(main())


def test_a_mapping_is_no_configuration() -> None:
    """The hint says how to make one of it."""

    async def main() -> None:
        async with closing(manager(GatedLoader())) as models:
            with pytest.raises(ConfigurationError) as refusal:
                await models.load_model({"model_id": "a"})
            assert "from_dict" in refusal.value.hint

    run(main())


def test_failures_are_warnings_with_the_way_out(caplog: pytest.LogCaptureFixture) -> None:
    """Failures are logged, with what to do."""

    async def main() -> None:
        loader = GatedLoader()
        loader.hold("a").fail(MissingFileError("gone", hint="look for it"))
        async with closing(manager(loader)) as models:
            await outcome_of(models.load_model(fake()))

    with caplog.at_level("WARNING", logger="splitlearn_core.manager.shell"):
        run(main())
    (line,) = [line.getMessage() for line in caplog.records]
    assert "failed (gone; look for it)" in line


def test_memory_is_measured_alone_or_not_at_all() -> None:
    """Two loads at once would each be charged with both."""

    async def main() -> None:
        loader = GatedLoader()
        async with closing(manager(loader)) as models:
            gate = loader.hold("a")
            first = asyncio.create_task(models.load_model(fake("a")))
            await gate.arrival()
            second = await models.load_model(fake("b"))
            gate.open()
            await first
            assert (second.info.measured, models.get_model_info("a").measured) == (None, None)
            assert (await models.load_model(fake("c"))).info.measured is not None

    run(main())


def test_force_ends_a_drain_that_waits() -> None:
    """Both callers get the report."""

    async def main() -> None:
        async with closing(manager(GatedLoader())) as models:
            await models.load_model(fake())
            async with models.lease("a"):
                patient = asyncio.create_task(models.unload_model("a"))
                await reached(models, "a", S.DRAINING)
                forced = await models.unload_model("a", force=True)
                assert await patient == forced

    run(main())


def test_memory_that_cannot_be_freed_is_an_error_and_stays_charged() -> None:
    """The caller of the unload gets the error, and the model is shown as stuck."""

    class Broken(FixedMemory):
        def release_unused(self) -> None:
            raise OSError("the device is lost")

    async def main() -> None:
        async with manager(GatedLoader(memory=Broken())) as models:
            await models.load_model(fake())
            with pytest.raises(InternalError, match="the device is lost") as refusal:
                await models.unload_model("a")
            assert refusal.value.hint
            assert status_of(models, "a") is S.STUCK
            assert charges(models) == {"host": 1000, "mapped": 10}
            check_sound(models)
        assert splitlearn_threads() == []

    run(main())


def test_unloading_while_it_loads_is_refused() -> None:
    """That is what cancelling is for."""

    async def main() -> None:
        loader = GatedLoader()
        gate = loader.hold("a")
        async with closing(manager(loader)) as models:
            task = asyncio.create_task(models.load_model(fake()))
            await gate.arrival()
            with pytest.raises(ModelNotReadyError, match="loading") as refusal:
                await models.unload_model("a", force=True)
            assert "cancel_load" in refusal.value.hint
            gate.open()
            await task

    run(main())


# --- cancelling ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["plan", "load", "warm_up"])
def test_cancel_load_gives_everything_back(stage: str) -> None:
    """Once it returns, the worker has ended and nothing is charged; the waiters know."""

    async def main() -> None:
        loader = GatedLoader()
        gate = loader.hold("a", stage)
        async with closing(manager(loader)) as models:
            tasks = [asyncio.create_task(models.ensure_model(fake(warmup=True))) for _ in range(2)]
            await gate.arrival()
            await models.cancel_load("a")
            assert (models.list_models(), charges(models)) == ((), {})
            errors = [await outcome_of(task) for task in tasks]
            assert [type(error) for error in errors] == [LoadCancelledError] * 2
            assert models.get_statistics().loads_cancelled == 1
            loader.release("a", stage)
            await models.load_model(fake())

    run(main())


def test_cancel_of_what_is_queued() -> None:
    """No worker has it, so it is gone at once."""

    async def main() -> None:
        loader = GatedLoader()
        gate = loader.hold("a")
        async with closing(manager(loader, max_workers=1)) as models:
            first = asyncio.create_task(models.load_model(fake()))
            await gate.arrival()
            second = asyncio.create_task(models.load_model(fake("b")))
            await reached(models, "b", S.QUEUED)
            assert "waiting for a worker" in models.get_model_info("b").waiting_for
            await models.cancel_load("b")
            assert isinstance(await outcome_of(second), LoadCancelledError)
            gate.open()
            await first

    run(main())


@pytest.mark.parametrize("stage", ["plan", "load", "warm_up"])
@pytest.mark.parametrize("comes_back_with", ["result", "error"])
def test_a_worker_that_does_not_stop_is_stuck_until_it_comes_back(stage: str, comes_back_with: str) -> None:
    """Its memory is charged and its stack is shown; another load of the id works; later it is gone."""

    async def main() -> None:
        loader = GatedLoader()
        gate = loader.hold("a", stage, deaf=True)
        async with closing(manager(loader, cancel_grace=0)) as models:
            task = asyncio.create_task(models.load_model(fake(warmup=True)))
            await gate.arrival()
            with pytest.raises(LoadStalledError) as refusal:
                await models.cancel_load("a")
            assert refusal.value.hint
            assert isinstance(await outcome_of(task), LoadCancelledError)
            assert status_of(models, "a") is S.STUCK
            (stack,) = models.get_statistics().stuck.values()
            assert "_opened.wait" in stack
            assert charges(models) == ({} if stage == "plan" else {"host": 1000, "mapped": 10})
            assert models.health().live
            with pytest.raises(ModelNotReadyError, match="stuck"):
                await models.unload_model("a")

            loader.release("a", stage)
            newer = await models.load_model(fake())
            if comes_back_with == "error":
                gate.fail(ValueError("too late"))
            else:
                gate.open()
            await seen(models, lambda: not models.get_statistics().stuck)
            assert charges(models) == {"host": 1000, "mapped": 10}
            assert models.get_model("a") is newer

    run(main())


def test_a_stalled_load_is_shown_and_given_up() -> None:
    """First it is shown as stalled, then it fails, saying where it stood."""

    async def main() -> None:
        clock, loader = StepsClock(), GatedLoader()
        gate = loader.hold("a", progress=Progress("reading", None, 4, 9, "f.safetensors"))
        async with closing(manager(loader, clock=clock, stall_after=10, stall_timeout=60)) as models:
            task = asyncio.create_task(models.load_model(fake()))
            await gate.arrival()
            await until(lambda: models.get_model_info("a").bytes_done == 4)
            clock.advance(20)
            tick(models)
            assert models.get_model_info("a").stalled_for == 20
            clock.advance(60)
            with pytest.raises(LoadStalledError, match=r"f\.safetensors, after 4 of 9") as failure:
                await task
            assert failure.value.hint
            error = models.get_model_info("a").error
            assert error is not None
            assert error.retryable

    run(main())


# --- reloading ----------------------------------------------------------------------------------


def test_reload_keeps_the_old_one_serving(single: Path, sharded: Path) -> None:
    """Leases of the old one go on; once the new one is ready, new leases get that."""

    async def main() -> None:
        loader = GatedLoader()
        async with closing(manager(loader)) as models:
            old = await models.load_model(fake())
            gate = loader.hold("a")
            task = asyncio.create_task(models.reload_model("a", fake(dtype="float16")))
            await gate.arrival()
            info = models.get_model_info("a")
            assert (info.status, info.generation, info.reloading) == (S.READY, 1, True)
            with pytest.raises(DuplicateModelError):
                await models.reload_model("a")
            with pytest.raises(ModelNotReadyError, match="reloading"):
                await models.unload_model("a")
            lease = models.lease("a")
            assert await lease.__aenter__() is old
            gate.open()
            new = await task
            assert (new.generation, new.config.dtype, models.get_model("a")) == (2, "float16", new)
            assert torch.equal(await old(torch.ones(1)), torch.tensor([2.0]))
            assert charges(models) == {"host": 2000, "mapped": 20}
            async with models.lease("a") as lent:
                assert lent is new
            await lease.__aexit__(None, None, None)
            await resting(models)
            assert charges(models) == {"host": 1000, "mapped": 10}
            with pytest.raises(ModelGoneError):
                await old(torch.ones(1))

    run(main())


def test_a_failed_reload_keeps_the_old_one_and_shows_why() -> None:
    """It serves on as if nothing had been, but for the error."""

    async def main() -> None:
        loader = GatedLoader()
        async with closing(manager(loader)) as models:
            old = await models.load_model(fake())
            before = charges(models)
            loader.hold("a").fail(MissingFileError("gone", hint="look for it"))
            with pytest.raises(MissingFileError, match="gone"):
                await models.reload_model("a")
            info = models.get_model_info("a")
            assert (info.status, info.generation, info.reloading) == (S.READY, 1, False)
            assert info.error is not None
            assert (info.error.message, info.error.hint) == ("gone", "look for it")
            assert (models.get_model("a"), charges(models)) == (old, before)
            assert torch.equal(await old(torch.ones(1)), torch.tensor([2.0]))
            loader.release("a")
            newer = await models.reload_model("a")
            assert newer.info.error is None

    run(main())


def test_the_newest_failures_stay_listed_and_the_others_are_counted() -> None:
    """Each caller gets its error; nothing of a forgotten one is kept, but its last events for a while."""

    async def main() -> None:
        loader = GatedLoader()
        async with closing(manager(loader, max_failed=3, required=["r"])) as models:
            for model_id in ("r", *map(str, range(20))):
                loader.hold(model_id).fail(ValueError(model_id))
                error = await outcome_of(models.load_model(fake(model_id, required=model_id in ("r", "4"))))
                assert isinstance(error, LoadFailedError)
            assert [info.model_id for info in models.list_models()] == ["r", "4", "19"]
            assert models.get_statistics().failures_forgotten == 18
            assert set(models._shell.slots) == {(info.model_id, info.generation) for info in models.list_models()}
            assert models.health().missing.keys() == {"r", "4"}
            with pytest.raises(UnknownModelError):
                models.get_model_info("18")
            assert [event.cause for event in models.story("18")][-1] == "the newest 3 failures are kept"

    run(main())


def test_readiness_does_not_collect_the_ids_of_failures_without_bound() -> None:
    """Those that were named when the manager was made stay."""

    async def main() -> None:
        loader = GatedLoader()
        async with closing(manager(loader, max_failed=2, required=["r"])) as models:
            for model_id in ("r", *map(str, range(5))):
                loader.hold(model_id).fail(ValueError(model_id))
                await outcome_of(models.load_model(fake(model_id, required=True)))
            assert models.health().missing.keys() == {"r", "3", "4"}
            assert models.health().missing["r"] == "not loaded"

    run(main())


def test_reload_of_a_failed_model_loads_it() -> None:
    """With the configuration that failed, by default."""

    async def main() -> None:
        loader = GatedLoader()
        loader.hold("a").fail(ValueError("no"))
        async with closing(manager(loader)) as models:
            await outcome_of(models.load_model(fake()))
            loader.release("a")
            assert (await models.reload_model("a")).status is S.READY

    run(main())


def test_who_asks_for_a_model_does_not_wait_for_its_reload() -> None:
    """``ensure_model`` gives the one that serves, and adds no waiter to the reload."""

    async def main() -> None:
        loader = GatedLoader()
        async with closing(manager(loader)) as models:
            old = await models.load_model(fake())
            gate = loader.hold("a")
            reload = asyncio.create_task(models.reload_model("a"))
            await gate.arrival()
            assert await models.ensure_model(fake()) is old
            gate.fail(ValueError("no"))
            assert isinstance(await outcome_of(reload), LoadFailedError)

    run(main())


def test_cancelling_a_reload_leaves_the_old_one() -> None:
    """As it was."""

    async def main() -> None:
        loader = GatedLoader()
        async with closing(manager(loader)) as models:
            old = await models.load_model(fake())
            gate = loader.hold("a")
            task = asyncio.create_task(models.reload_model("a"))
            await gate.arrival()
            await models.cancel_load("a")
            assert isinstance(await outcome_of(task), LoadCancelledError)
            assert (models.get_model("a"), old.status, old.info.error) == (old, S.READY, None)

    run(main())


# --- lending and calling ------------------------------------------------------------------------


def test_a_lease_waits_for_a_load_and_counts() -> None:
    """Callers that lease during the load get the model; the snapshot counts their leases."""

    async def main() -> None:
        loader = GatedLoader()
        gate = loader.hold("a")
        async with closing(manager(loader)) as models:
            load = asyncio.create_task(models.load_model(fake()))
            await gate.arrival()

            async def hold() -> AsyncManagedModel:
                async with models.lease("a") as model:
                    return model

            tasks = [asyncio.create_task(hold()) for _ in range(3)]
            await until(lambda: models.get_model_info("a").waiters == 4)
            gate.open()
            assert set(await asyncio.gather(*tasks)) == {await load}
            async with models.lease("a"), models.lease("a") as model:
                assert (model.info.leases, model.status) == (2, S.READY)
            assert model.info.leases == 0
            assert model.info.last_used_at is not None

    run(main())


def test_a_lease_of_a_load_that_fails_raises_what_the_load_raised() -> None:
    """Not something about leases."""

    async def main() -> None:
        loader = GatedLoader()
        gate = loader.hold("a")
        async with closing(manager(loader)) as models:
            load = asyncio.create_task(models.load_model(fake()))
            await gate.arrival()
            lease = asyncio.create_task(models.lease("a").__aenter__())
            await until(lambda: models.get_model_info("a").waiters == 2)
            gate.fail(MissingFileError("gone", hint="h"))
            assert [type(await outcome_of(task)) for task in (load, lease)] == [MissingFileError] * 2

    run(main())


def test_a_body_that_raises_gives_the_lease_back() -> None:
    """And its error is its own."""

    async def main() -> None:
        async with closing(manager(GatedLoader())) as models:
            await models.load_model(fake())
            with pytest.raises(ZeroDivisionError):
                async with models.lease("a"):
                    raise ZeroDivisionError
            assert models.get_model_info("a").leases == 0

    run(main())


def test_a_call_runs_off_the_loop() -> None:
    """In a thread of the pool, in the caller's context."""
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable")

    async def main() -> None:
        async with closing(manager(GatedLoader())) as models:
            model = await models.load_model(fake())
            variable.set("the caller's")
            assert await model.run(lambda _: (variable.get(), threading.current_thread().name)) == (
                "the caller's",
                "splitlearn-call-0",
            )
            await model(torch.ones(1))
            assert all(name.startswith("splitlearn-call") for name in model.model.threads)

    run(main())


def test_a_calls_error_is_its_callers_and_it_is_counted() -> None:
    """The model is none the worse."""

    async def main() -> None:
        async with closing(manager(GatedLoader())) as models:
            model = await models.load_model(fake())
            with pytest.raises(TypeError):
                await model(nonsense=1)
            with pytest.raises(ZeroDivisionError):
                await model.run(lambda module: 1 / 0)
            for strange in (StopIteration("x"), SystemExit(1), KeyboardInterrupt(), asyncio.CancelledError()):
                with pytest.raises(RuntimeError, match=type(strange).__name__):
                    await model.run(_raiser(strange))
            statistics = models.get_statistics()
            assert (statistics.calls, statistics.calls_failed) == (6, 6)
            assert model.info.leases == 0
            assert torch.equal(await model(torch.ones(1)), torch.tensor([2.0]))

    run(main())


def _raiser(error: BaseException) -> Callable[[Any], Any]:
    def function(module: Any) -> None:
        raise error

    return function


@pytest.mark.parametrize("limit", [1, 2])
def test_calls_per_model_is_kept(limit: int) -> None:
    """No more run at once, though more threads are there."""

    async def main() -> None:
        running, most, lock = 0, 0, threading.Lock()
        full = threading.Event()

        def work(module: Any) -> None:
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
                if running == limit:
                    full.set()
            full.wait(60)
            with lock:
                running -= 1

        async with closing(manager(GatedLoader(), call_workers=4, calls_per_model=limit)) as models:
            model = await models.load_model(fake())
            await asyncio.gather(*(model.run(work) for _ in range(20)))
        assert most == limit

    run(main())


def test_a_full_queue_is_busy() -> None:
    """One more than runs and waits is refused with a hint, and the others end well."""

    async def main() -> None:
        async with closing(manager(GatedLoader(), call_queue=2)) as models:
            model = await models.load_model(fake())
            model.model.gate = gate = Gate(deaf=True)
            tasks = [asyncio.create_task(model(torch.ones(1))) for _ in range(3)]
            await gate.arrival()
            assert models.get_model_info("a").leases == 3
            with pytest.raises(BusyError, match="queue takes 2") as refusal:
                await model(torch.ones(1))
            assert refusal.value.hint
            # A caller that leaves makes room.
            tasks[2].cancel()
            await outcome_of(tasks[2])
            assert models.get_model_info("a").leases == 2
            tasks[2] = asyncio.create_task(model(torch.ones(1)))
            gate.open()
            assert [float(value) for value in await asyncio.gather(*tasks)] == [2.0] * 3
            assert models.get_statistics().calls_rejected == 1

    run(main())


def test_a_call_keeps_the_model_without_a_lease() -> None:
    """While it runs, an unload waits for it."""

    async def main() -> None:
        async with closing(manager(GatedLoader())) as models:
            model = await models.load_model(fake())
            model.model.gate = gate = Gate(deaf=True)
            call = asyncio.create_task(model(torch.ones(1)))
            await gate.arrival()
            call.cancel()
            await outcome_of(call)
            # The thread still has the module.
            assert model.info.leases == 1
            unload = asyncio.create_task(models.unload_model("a"))
            await reached(models, "a", S.DRAINING)
            gate.open()
            assert (await unload).broken_leases == 0

    run(main())


# --- room ---------------------------------------------------------------------------------------


def test_the_least_recently_used_goes() -> None:
    """Not the oldest, and none that is pinned or leased."""

    async def main() -> None:
        clock = StepsClock()
        async with closing(manager(GatedLoader(), max_models=4, clock=clock)) as models:
            for name in ("pinned", "lent", "used", "idle"):
                clock.advance(1)
                await models.load_model(fake(name, pinned=name == "pinned"))
            clock.advance(1)
            async with models.lease("lent"):
                async with models.lease("used"):
                    clock.advance(1)
                clock.advance(1)
                await models.load_model(fake("new"))
                assert {info.model_id for info in models.list_models()} == {"pinned", "lent", "used", "new"}
                await models.load_model(fake("newer"))
                assert {info.model_id for info in models.list_models()} == {"pinned", "lent", "new", "newer"}
            assert models.get_statistics().evictions == 2

    run(main())


def test_a_model_that_has_just_come_does_not_go() -> None:
    """A load waits, saying for whom, until the other has been there long enough."""

    async def main() -> None:
        clock = StepsClock()
        async with closing(manager(GatedLoader(), max_models=1, clock=clock, min_residency=5)) as models:
            await models.load_model(fake())
            task = asyncio.create_task(models.load_model(fake("b")))
            await until(lambda: "just been loaded" in _why(models, "b"))
            assert status_of(models, "b") is S.WAITING
            clock.advance(6)
            await task
            assert status_of(models, "a") is None

    run(main())


def _why(models: AsyncModelManager, model_id: str) -> str:
    return next((info.waiting_for for info in models.list_models() if info.model_id == model_id), "")


def test_a_load_waits_for_a_lease_and_says_so() -> None:
    """And continues when the lease is released."""

    async def main() -> None:
        async with closing(manager(GatedLoader({"a": 9000, "b": 9000}))) as models:
            await models.load_model(fake())
            async with models.lease("a"):
                task = asyncio.create_task(models.load_model(fake("b")))
                await until(lambda: "1 lease on a" in _why(models, "b"))
                assert models.get_statistics().evictions == 0
            await task
            assert status_of(models, "a") is None

    run(main())


def test_waiting_has_an_end() -> None:
    """With the reason for which it waited."""

    async def main() -> None:
        clock = StepsClock()
        loader = GatedLoader({"a": 9000, "b": 9000})
        async with closing(manager(loader, clock=clock, wait_timeout=30)) as models:
            await models.load_model(fake(pinned=True))
            task = asyncio.create_task(models.load_model(fake("b")))
            await until(lambda: "pinned" in _why(models, "b"))
            clock.advance(31)
            with pytest.raises(WaitTimeoutError, match="waited 31 s") as failure:
                await task
            assert isinstance(failure.value, TimeoutError)
            assert failure.value.hint
            assert charges(models) == {"host": 9000, "mapped": 10}

    run(main())


@pytest.mark.parametrize("size", [5000, 20_000], ids=["no room now", "too large ever"])
def test_what_does_not_fit_is_refused_with_the_numbers(size: int) -> None:
    """Without evicting any model."""

    async def main() -> None:
        loader = GatedLoader({"a": 6000, "b": size, "c": 100})
        async with closing(manager(loader, when_full="refuse")) as models:
            await models.load_model(fake(pinned=True))
            await models.load_model(fake("c"))
            with pytest.raises(InsufficientMemoryError, match="needs") as failure:
                await models.load_model(fake("b"))
            assert failure.value.hint
            error = models.get_model_info("b").error
            assert error is not None
            assert error.retryable is (size < 10_000)
            assert (status_of(models, "c"), models.get_statistics().evictions) == (S.READY, 0)

    run(main())


def test_max_memory_mb_is_over_everything(single: Path) -> None:
    """Mapped files count too."""

    async def main() -> None:
        async with closing(AsyncModelManager(max_memory_mb=0.05, when_full="refuse")) as models:
            with pytest.raises(InsufficientMemoryError, match="max_memory_mb"):
                await models.load_model(part(single))
            assert charges(models) == {}

    run(main())


def test_an_idle_model_expires_and_a_pinned_or_used_one_does_not() -> None:
    """Seconds count from when it was given back."""

    async def main() -> None:
        clock = StepsClock()
        async with closing(manager(GatedLoader(), clock=clock, keep_alive=60)) as models:
            for name, options in {
                "idle": {},
                "used": {},
                "pinned": {"pinned": True},
                "own": {"keep_alive": -1},
            }.items():
                await models.load_model(fake(name, **options))
            assert models.get_model_info("own").expires_at is None
            async with models.lease("used"):
                clock.advance(61)
                await reached(models, "idle", None)
            assert {info.model_id for info in models.list_models()} == {"used", "pinned", "own"}
            clock.advance(61)
            await reached(models, "used", None)
            assert models.get_statistics().expirations == 2

    run(main())


def test_keep_alive_of_nothing_unloads_as_soon_as_it_is_idle() -> None:
    """The waiter of the load still gets it in time to lease it."""

    async def main() -> None:
        async with closing(manager(GatedLoader())) as models:
            await models.load_model(fake(keep_alive=0))
            async with models.lease("a") as model:
                assert float(await model(torch.ones(1))) == 2.0
            await reached(models, "a", None)

    run(main())


def test_a_model_that_is_gone_is_not_handed_out() -> None:
    """Evicted between the end of its load and its caller's turn, it is an error and not a dead model."""

    async def main() -> None:
        loader = GatedLoader()
        gate = loader.hold("a")
        async with closing(manager(loader, max_models=1)) as models:
            first = asyncio.create_task(models.load_model(fake()))
            await gate.arrival()
            second = asyncio.create_task(models.load_model(fake("b")))
            await reached(models, "b", S.WAITING)
            gate.open()
            assert isinstance(await outcome_of(first), ModelGoneError)
            assert (await second).status is S.READY

    run(main())


def test_a_measurement_that_fails_stops_no_clock() -> None:
    """The last one stands, and the manager lives."""

    class Failing(FixedMemory):
        fails = False
        failed = threading.Event()

        def sample(self) -> Any:
            if self.fails:
                self.failed.set()
                raise OSError("no /proc")
            return super().sample()

    async def main() -> None:
        memory = Failing()
        loader = GatedLoader({"a": 9000, "b": 9000}, memory=memory)
        async with closing(manager(loader)) as models:
            await models.load_model(fake())
            lease = models.lease("a")
            await lease.__aenter__()
            task = asyncio.create_task(models.load_model(fake("b")))
            await reached(models, "b", S.WAITING)
            memory.fails = True
            await asyncio.to_thread(memory.failed.wait, 60)
            memory.fails = False
            await lease.__aexit__(None, None, None)
            await task
            assert models.health().live

    run(main())


# --- health, statistics, events, log ------------------------------------------------------------


def test_readiness_is_of_the_required_models() -> None:
    """Ready without any; not while one is missing, loading or failed; alive throughout."""

    async def main() -> None:
        loader = GatedLoader()
        async with closing(manager(loader, required=["b"])) as models:
            assert (models.health().live, models.health().ready) == (True, False)
            assert models.health().missing == {"b": "not loaded"}
            await models.load_model(fake("b"))
            assert models.health().ready
            gate = loader.hold("a")
            task = asyncio.create_task(models.load_model(fake(required=True)))
            await gate.arrival()
            assert models.health().missing == {"a": "loading"}
            gate.fail(ValueError("broken"))
            await outcome_of(task)
            health = models.health()
            assert (health.live, health.ready) == (True, False)
            assert "broken" in health.missing["a"]
            assert models.get_model_info("a").required
            await models.unload_model("a")
            assert models.health().ready
        assert models.health().live is False
        assert "closed" in models.health().reason

    run(main())


def test_a_cancelled_unload_of_a_required_model_unloads_it_nevertheless() -> None:
    """And then it is required no more, as if its caller had waited."""

    async def main() -> None:
        async with closing(manager(GatedLoader())) as models:
            await models.load_model(fake(required=True))
            async with models.lease("a"):
                unload = asyncio.create_task(models.unload_model("a"))
                await reached(models, "a", S.DRAINING)
                unload.cancel()
                await outcome_of(unload)
            await reached(models, "a", None)
            assert models.health().ready

    run(main())


def test_statistics_count() -> None:
    """One of each."""

    async def main() -> None:
        loader = GatedLoader()
        async with closing(manager(loader)) as models:
            model = await models.load_model(fake())
            await models.ensure_model(fake())
            async with models.lease("a"):
                await model(torch.ones(1))
            loader.hold("b").fail(ValueError("no"))
            await outcome_of(models.load_model(fake("b")))
            statistics = models.get_statistics()
            assert statistics.models == {"ready": 1, "failed": 1}
            assert (statistics.loads_started, statistics.loads_succeeded, statistics.loads_failed) == (2, 1, 1)
            assert (statistics.leases, statistics.calls, statistics.joined) == (1, 1, 0)
            assert (statistics.ledgers["host"].charged, statistics.ledgers["host"].reserved) == (1000, 0)
            assert statistics.stuck == {}
            assert statistics.uptime >= 0
            assert isinstance(statistics.to_dict()["ledgers"]["host"], dict)

    run(main())


def test_events_tell_the_whole_life_once(caplog: pytest.LogCaptureFixture) -> None:
    """In order, without a gap, the same to every follower; the log has one line for each."""
    caplog.set_level(logging.INFO, logger="splitlearn_core.manager")

    async def main() -> None:
        models = manager(GatedLoader())
        async with models:
            streams = [models.events(), models.events()]
            await models.load_model(fake(warmup=True))
            async with models.lease("a"):
                unload = asyncio.create_task(models.unload_model("a"))
                await reached(models, "a", S.DRAINING)
            await unload
            story = models.story("a")
        first, second = [[event async for event in stream] for stream in streams]
        assert first == second
        assert tuple(first) == story
        assert [event.sequence for event in first] == list(range(1, len(first) + 1))
        path = [S.QUEUED, S.PLANNING, S.WAITING, S.LOADING, S.WARMING, S.READY, S.DRAINING, S.UNLOADING, None]
        assert [event.after for event in first] == path
        assert [event.before for event in first] == [None, *path[:-1]]
        assert all(event.cause for event in first)
        assert [event async for event in models.events()] == []
        check_closed(models)

    run(main())
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("splitlearn_core.manager")]
    assert len(lines) == 9
    assert all(line.count("\n") == 0 and "a (generation 1)" in line for line in lines)


# --- closing ------------------------------------------------------------------------------------


def test_close_ends_everything_and_refuses_what_comes_later() -> None:
    """Loads are cancelled, leases are waited for, and closing twice is one close."""

    async def main() -> None:
        loader = GatedLoader()
        gate = loader.hold("b")
        models = manager(loader)
        async with models:
            await models.load_model(fake())
            load = asyncio.create_task(models.load_model(fake("b")))
            await gate.arrival()
            lease = models.lease("a")
            model = await lease.__aenter__()
            closes = [asyncio.create_task(models.close()) for _ in range(3)]
            assert isinstance(await outcome_of(load), LoadCancelledError)
            for refused in (
                models.load_model(fake("c")), models.ensure_model(fake("c")), models.lease("a").__aenter__(),
            ):  # fmt: skip
                with pytest.raises(ManagerClosedError) as refusal:
                    await refused
                assert refusal.value.hint
            # Who has it may go on until it gives it back.
            assert float(await model(torch.ones(1))) == 2.0
            await lease.__aexit__(None, None, None)
            await asyncio.gather(*closes)
        check_closed(models)
        await models.close()
        with pytest.raises(ModelGoneError):
            await model(torch.ones(1))

    run(main())


def test_close_does_not_wait_for_ever_for_holders() -> None:
    """Within its limit, leases are broken."""

    async def main() -> None:
        models = manager(GatedLoader())
        async with models:
            await models.load_model(fake())
            lease = models.lease("a")
            model = await lease.__aenter__()
            await models.close(timeout=0.05)
            check_closed(models)
            with pytest.raises(ModelGoneError):
                await model(torch.ones(1))
            await lease.__aexit__(None, None, None)

    run(main())


def test_close_of_an_unused_manager() -> None:
    """Never used, never entered."""

    async def main() -> None:
        models = manager(GatedLoader())
        assert models.list_models() == ()
        await models.close()
        check_closed(models)
        assert models.get_statistics().models == {}

    run(main())


def test_close_with_a_stuck_worker_is_bounded() -> None:
    """It returns, the waiter gets an error, and the stack of the worker is in the log."""

    async def main() -> None:
        loader = GatedLoader()
        gate = loader.hold("a", deaf=True)
        models = manager(loader)
        async with models:
            task = asyncio.create_task(models.load_model(fake()))
            await gate.arrival()
            cancel = asyncio.create_task(models.cancel_load("a"))
            await reached(models, "a", S.CANCELLING)
            await models.close(timeout=0.1)
            assert isinstance(await outcome_of(task), ManagerClosedError)
            assert isinstance(await outcome_of(cancel), LoadStalledError)
            assert charges(models) == {"host": 1000, "mapped": 10}
            assert splitlearn_threads() == ["splitlearn-load-a"]
            gate.open()
            await until(lambda: not models.list_models())
        check_sound(models)

    run(main())


def test_close_with_a_call_that_does_not_end_is_bounded() -> None:
    """The call's caller still gets its answer when it does."""

    async def main() -> None:
        models = manager(GatedLoader())
        async with models:
            model = await models.load_model(fake())
            model.model.gate = gate = Gate(deaf=True)
            call = asyncio.create_task(model(torch.ones(1)))
            await gate.arrival()
            await models.close(timeout=0.1)
            # What the call works on is still there.
            assert charges(models) != {}
            gate.open()
            assert float(await call) == 2.0
            await until(lambda: charges(models) == {})

    run(main())


def test_a_thread_that_cannot_start_fails_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's limit of threads is a failed load, not one without an end."""

    async def main() -> None:
        async with closing(manager(GatedLoader())) as models:
            with monkeypatch.context() as patch:
                patch.setattr("splitlearn_core.manager.shell.run_in_thread", _no_thread)
                with pytest.raises(LoadFailedError, match="start new thread"):
                    await models.load_model(fake())
            await models.load_model(fake())

    run(main())


def _no_thread(*_: Any, **__: Any) -> None:
    raise RuntimeError("can't start new thread")
