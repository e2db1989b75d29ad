"""The manager: what the event loop feels of its loads, how long it holds the loop itself, and how fast it lets go.

The garbage collector runs as users have it, and everything is imported before a clock starts.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from checkpoints import Checkpoint, gemma, qwen2
from loaders import Job, from_pretrained
from measuring import MeasurementError, Session, anonymous_mb, drop, in_fresh_process, interleave, read_through, sample
from report import Row, within

NAME = "manager"
AT_ONCE = 4
_REGISTERED = 1000
_WAVES = {"warm": 10, "cold": 1}
_LAG_LIMITS = {"warm": {"p99": 5, "max": 15}, "cold": {"p99": None, "max": 30}}
_HOLD_LIMITS = {"p99": 100, "max": 1000}
_LIST_LIMIT, _OVERHEAD, _CANCEL_LIMIT = 1, (5, 0.01), 100
_STILL_COLD = 0.01
_PROBE = 0.001
_IDLE = 1.0
_PAIRS = 20
_SLOW = 0.05
_PAUSE = 0.2
_COUNTED = 5_000_000
_MIDDLE = 0.3
_MEGABYTE = 2**20
_ROOM_MB = 256
_TITLES = {
    "manager": "manager",
    "whole": "from_pretrained in a thread",
    "thread": "the same load in a thread",
    "count": "one thread that counts",
}


def run(session: Session) -> None:
    (small,) = session.models((qwen2,))
    read_through(small.files)
    for measure in (_lag_warm, _lag_cold, _crowd, _overhead):
        try:
            measure(session, small)
        except MeasurementError as error:
            session.add(Row(NAME, measure.__name__.strip("_"), note=str(error)))
    (large,) = session.models((gemma,))
    try:
        _cancel(session, large)
    except MeasurementError as error:
        session.add(Row(NAME, "cancel", note=str(error)))


def _job(what: str, checkpoint: Checkpoint, **more: Any) -> dict[str, Any]:
    recipe = checkpoint.recipe
    job = {
        "what": what,
        "directory": str(checkpoint.directory),
        "model_type": recipe.config["model_type"],
        "cut": recipe.cut,
    }
    return {**job, **more}


def _lag_warm(session: Session, checkpoint: Checkpoint) -> None:
    _lag(session, checkpoint, "warm")


def _lag_cold(session: Session, checkpoint: Checkpoint) -> None:
    _lag(session, checkpoint, "cold")
    read_through(checkpoint.files)


def _lag(session: Session, checkpoint: Checkpoint, cache: str) -> None:
    def measurement(how: str) -> Callable[[], dict[str, Any]]:
        def measure() -> dict[str, Any]:
            held = drop(checkpoint.files) if cache == "cold" else 0.0
            return {**in_fresh_process(NAME, _job("lag", checkpoint, how=how, waves=_WAVES[cache])), "held": held}

        return measure

    answers, failures = interleave(
        session.runs, {how: measurement(how) for how in _TITLES}, discarded=int(cache == "warm")
    )
    if "manager" not in answers:
        session.add(Row(NAME, f"loop lag, {cache}", note=failures["manager"]))
        return
    for key, limit in _LAG_LIMITS[cache].items():
        what = f"loop lag in {AT_ONCE} loads, {cache}, {key}"
        ours = sample(answers["manager"], key, "ms", 1000)
        for how in ("whole", "thread", "count"):
            if how not in answers:
                session.add(Row(NAME, what, ours, _TITLES[how], note=failures[how]))
                continue
            theirs = sample(answers[how], key, "ms", 1000)
            judged = how == "whole"
            note = _lag_note(answers[how], answers["manager"]) if judged else ""
            session.add(within(NAME, what, ours, limit if judged else None, _TITLES[how], theirs, note=note))
        idle = sample(answers["manager"], f"idle_{key}", "ms", 1000)
        session.add(within(NAME, what, ours, None, "a loop that does nothing", idle))
    if cache == "warm":
        unloading = sample(answers["manager"], "unload_max", "ms", 1000)
        session.add(Row(NAME, f"loop lag in {AT_ONCE} unloads, max", unloading))


def _lag_note(theirs: Sequence[dict[str, Any]], ours: Sequence[dict[str, Any]]) -> str:
    notes = []
    failed = sum(answer["failed"] for answer in theirs)
    if failed:
        notes.append(f"{failed} loads of from_pretrained failed: it is not made for threads")
    held = max(answer["held"] for answer in (*theirs, *ours))
    if held > _STILL_COLD:
        notes.append(f"not cold: {held:.0%} of the pages stayed")
    return "; ".join(notes)


def _crowd(session: Session, checkpoint: Checkpoint) -> None:
    count = 50 if session.quick else _REGISTERED
    for what, full in ("room for all", False), ("a load waits for room", True):
        job = _job("crowd", checkpoint, count=count, full=full, waves=_WAVES["warm"])
        answers = [in_fresh_process(NAME, job) for _ in range(session.runs)]
        there = f"{count} models, {what}"
        note = f"{sum(answer['sections'] for answer in answers)} sections"
        for key, limit in _HOLD_LIMITS.items():
            hold = sample(answers, f"hold_{key}", "us", 1e6)
            session.add(within(NAME, f"critical section, {there}, {key}", hold, limit, note=note))
        held = sample(answers, "hold_cpu_max", "us", 1e6)
        session.add(Row(NAME, f"critical section, {there}, max of CPU time", held))
        lists = sample(answers, "list_p99", "ms", 1000)
        session.add(within(NAME, f"list_models, {there}, p99", lists, _LIST_LIMIT))
        session.add(Row(NAME, f"loop lag, {there}, max", sample(answers, "lag_max", "ms", 1000)))


def _overhead(session: Session, checkpoint: Checkpoint) -> None:
    answers = [in_fresh_process(NAME, _job("overhead", checkpoint)) for _ in range(session.runs)]
    ours, theirs = sample(answers, "manager", "ms", 1000), sample(answers, "bare", "ms", 1000)
    more, share = _OVERHEAD
    session.add(
        Row(
            NAME,
            "load to ready",
            ours,
            "load_from_config",
            theirs,
            ours.median / theirs.median,
            f"<= theirs + {more} ms + {share:.0%}",
            ours.median <= theirs.median * (1 + share) + more,
        )
    )


def _cancel(session: Session, checkpoint: Checkpoint) -> None:
    for cache in ("warm", "cold"):
        answers = []
        for _ in range(session.runs):
            read_through(checkpoint.files)
            held = drop(checkpoint.files) if cache == "cold" else 0.0
            answers.append({**in_fresh_process(NAME, _job("cancel", checkpoint)), "held": held})
        note = f"{statistics.median(a['done_mb'] for a in answers):.0f} of {answers[0]['total_mb']:.0f} MB were read"
        kept = max(answer["kept_mb"] for answer in answers)
        note += f"; at most {kept:.1f} MB more than before the load were left"
        if max(answer["held"] for answer in answers) > _STILL_COLD:
            note += "; not cold"
        took = sample(answers, "cancel", "ms", 1000)
        session.add(within(NAME, f"cancel to freed, {cache}", took, _CANCEL_LIMIT, note=note))


# --- in the fresh process ------------------------------------------------------------------------


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Measure one thing in this process, everything imported before."""
    from splitlearn_core import preload

    preload([job["model_type"], "huggingface"], serving=True)
    measures = {"lag": _measure_lag, "crowd": _measure_crowd, "overhead": _measure_overhead, "cancel": _measure_cancel}
    return asyncio.run(measures[job["what"]](job))


class _Probe:
    """Looks every millisecond how much later than asked the loop gives it its turn."""

    def __init__(self) -> None:
        self.lags: list[float] = []

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self._watch())
        await asyncio.sleep(0)
        try:
            yield
        finally:
            # The turn that is due, and late if the last thing that happened held the loop.
            await asyncio.sleep(2 * _PROBE)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _watch(self) -> None:
        while True:
            asked = time.perf_counter()
            await asyncio.sleep(_PROBE)
            self.lags.append(time.perf_counter() - asked - _PROBE)


def _p99(values: Iterable[float]) -> float:
    ordered = sorted(values)
    return ordered[math.ceil(0.99 * len(ordered)) - 1]


def _config(job: dict[str, Any], model_id: str, component: str = "trunk", **more: Any) -> Any:
    from splitlearn_core import ModelConfig

    return ModelConfig(
        model_id=model_id,
        model_type=job["model_type"],
        model_path=job["directory"],
        component=component,
        split_points=tuple(job["cut"]),
        **more,
    )


def _wave(job: dict[str, Any]) -> list[Any]:
    """All components, and the largest of them once more."""
    components = ("bottom", "trunk", "top", "trunk")
    return [_config(job, f"real-{number}", component) for number, component in enumerate(components)]


async def _measure_lag(job: dict[str, Any]) -> dict[str, Any]:
    from splitlearn_core import AsyncModelManager, ModelLoader

    async with AsyncModelManager(max_workers=AT_ONCE, min_residency=0) as manager:
        loads: dict[str, Callable[[Any], Awaitable[Any]]] = {
            "manager": manager.load_model,
            "thread": lambda config: asyncio.to_thread(ModelLoader.load_from_config, config),
            "whole": lambda config: asyncio.to_thread(from_pretrained, Job(config.model_path, config.split_points)),
            # What any thread that runs Python does to a loop: the floor on this machine.
            "count": lambda config: asyncio.to_thread(_count, _COUNTED if config.model_id == "real-0" else 0),
        }
        load = loads[job["how"]]
        idle, loading, unloading = _Probe(), _Probe(), _Probe()
        async with idle.watching():
            await asyncio.sleep(_IDLE)
        failed = 0
        for _ in range(job["waves"]):
            async with loading.watching():
                found = await asyncio.gather(*(load(config) for config in _wave(job)), return_exceptions=True)
            failed += sum(isinstance(one, BaseException) for one in found)
            if failed and job["how"] == "manager":
                raise next(one for one in found if isinstance(one, BaseException))
            del found
            async with unloading.watching():
                await asyncio.gather(*(manager.unload_model(info.model_id) for info in manager.list_models()))
    return {
        "p99": _p99(loading.lags),
        "max": max(loading.lags),
        "idle_p99": _p99(idle.lags),
        "idle_max": max(idle.lags),
        "unload_max": max(unloading.lags),
        "turns": len(loading.lags),
        "failed": failed,
    }


def _count(to: int) -> None:
    for _ in range(to):
        pass


class _Sections:
    """Times from an event's way into the machine to the end of its effects: nobody else gets a turn meanwhile."""

    def __init__(self, manager: Any) -> None:
        self.walls: list[float] = []
        self.cpus: list[float] = []
        self._begun: list[tuple[float, float]] = []
        shell = manager._shell
        self._handle, self._carry_out = shell.machine.handle, shell._carry_out
        shell.machine.handle, shell._carry_out = self._timed_handle, self._timed_carry_out

    def _timed_handle(self, event: Any) -> Any:
        self._begun.append((time.perf_counter(), time.thread_time()))
        try:
            return self._handle(event)
        except BaseException:
            self._end()
            raise

    def _timed_carry_out(self, effects: Any) -> None:
        try:
            self._carry_out(effects)
        finally:
            self._end()

    def _end(self) -> None:
        wall, cpu = self._begun.pop()
        self.walls.append(time.perf_counter() - wall)
        self.cpus.append(time.thread_time() - cpu)


def _loader_with_fakes(needs: Mapping[str, int]) -> Any:
    """Make a loader for which models named ``KIND-*`` need so much and cost nothing; ``slow-*`` last until stopped."""
    import torch

    from splitlearn_core import ModelLoader
    from splitlearn_core.manager.loaders.loadable import LoadedModel, LoadPlan
    from splitlearn_core.types import Progress

    class Loader(ModelLoader):
        def plan(self, config: Any, report: Any) -> Any:
            kind, _, _ = config.model_id.partition("-")
            if kind not in needs:
                return super().plan(config, report)
            return LoadPlan({"host": needs[kind]}, {"host": needs[kind]}, "", "float32", "cpu")

        def load(self, config: Any, plan: Any, report: Any) -> Any:
            kind, _, _ = config.model_id.partition("-")
            if kind not in needs:
                return super().load(config, plan, report)
            while kind == "slow":
                report(Progress("reading"))
                time.sleep(_PROBE)
            return LoadedModel(torch.nn.Identity(), "", "float32", "cpu")

    return Loader()


async def _measure_crowd(job: dict[str, Any]) -> dict[str, Any]:
    """Lend, call, list, load, cancel and unload beside many models that are there."""
    from splitlearn_core import AsyncModelManager

    count, full = job["count"], job["full"]
    budget = (count + _ROOM_MB) * _MEGABYTE
    loader = _loader_with_fakes({"fake": _MEGABYTE, "slow": _MEGABYTE, "large": budget})
    limit = budget / _MEGABYTE if full else None
    async with AsyncModelManager(max_workers=AT_ONCE, min_residency=0, loader=loader, max_memory_mb=limit) as manager:
        names = [f"fake-{number}" for number in range(count)]
        # Every second one could go, but that would not make room enough for the one that waits.
        fakes = (_config(job, name, pinned=bool(number % 2)) for number, name in enumerate(names))
        await asyncio.gather(*(manager.load_model(config) for config in fakes))
        waiting = [asyncio.create_task(manager.load_model(_config(job, "large-0")))] if full else []
        sections, probe = _Sections(manager), _Probe()
        lists: list[float] = []
        async with probe.watching():
            others = [
                asyncio.create_task(_lend_for_ever(manager, names)),
                asyncio.create_task(_list_for_ever(manager, lists)),
                asyncio.create_task(_cancel_for_ever(manager, job)),
            ]
            # Whatever comes after the one that waits for room waits as well.
            for _ in range(job["waves"]):
                await (asyncio.sleep(_PAUSE) if full else _come_and_go(manager, job))
            failed = [task.exception() for task in others if task.done()]
            await _end(others)
        await _end(waiting)
        if failed:
            raise MeasurementError(f"{failed[0]!r}")
        return {
            "hold_p99": _p99(sections.walls),
            "hold_max": max(sections.walls),
            "hold_cpu_max": max(sections.cpus),
            "sections": len(sections.walls),
            "list_p99": _p99(lists),
            "lag_max": max(probe.lags),
        }


async def _come_and_go(manager: Any, job: dict[str, Any]) -> None:
    """Load real models and some that cost nothing, all at once, and unload them."""
    configs = [*_wave(job), *(_config(job, f"fake-new-{number}") for number in range(AT_ONCE))]
    await asyncio.gather(*(manager.load_model(config) for config in configs))
    await asyncio.gather(*(manager.unload_model(config.model_id) for config in configs))


async def _lend_for_ever(manager: Any, names: Sequence[str]) -> None:
    order = random.Random(0)
    while True:
        async with manager.lease(order.choice(names)) as model:
            await model.run(lambda module: None)
        await asyncio.sleep(0)


async def _list_for_ever(manager: Any, took: list[float]) -> None:
    while True:
        begin = time.perf_counter()
        manager.list_models()
        took.append(time.perf_counter() - begin)
        await asyncio.sleep(_PROBE)


async def _cancel_for_ever(manager: Any, job: dict[str, Any]) -> None:
    for number in itertools.count():
        load = asyncio.create_task(manager.load_model(_config(job, f"slow-{number}")))
        await asyncio.sleep(_SLOW)
        await manager.cancel_load(f"slow-{number}")
        await asyncio.gather(load, return_exceptions=True)


async def _end(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _measure_overhead(job: dict[str, Any]) -> dict[str, Any]:
    """Load the same trunk by turns with the manager and without, and leave out the first of each."""
    from splitlearn_core import AsyncModelManager, ModelLoader

    config = _config(job, "trunk")
    managed, bare = [], []
    async with AsyncModelManager(min_residency=0) as manager:
        for _ in range(_PAIRS + 1):
            begin = time.perf_counter()
            ModelLoader.load_from_config(config)
            bare.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            await manager.load_model(config)
            managed.append(time.perf_counter() - begin)
            await manager.unload_model("trunk")
    return {"manager": statistics.median(managed[1:]), "bare": statistics.median(bare[1:])}


async def _measure_cancel(job: dict[str, Any]) -> dict[str, Any]:
    """Cancel the copy of a component in the middle, and see how soon its memory is there again."""
    from splitlearn_core import AsyncModelManager, LoadCancelledError

    config = _config(job, "bottom", "bottom", strategy="copied")
    async with AsyncModelManager(min_residency=0) as manager:
        before = anonymous_mb()
        load = asyncio.create_task(manager.load_model(config))
        await asyncio.sleep(0)
        info = manager.get_model_info("bottom")
        while not load.done() and info.bytes_done <= _MIDDLE * info.bytes_total:
            # Nothing is told of progress within a status: one looks.
            await asyncio.sleep(_PROBE)
            info = manager.get_model_info("bottom")
        if load.done():
            raise MeasurementError("the load ended before it could be cancelled")
        begin = time.perf_counter()
        await manager.cancel_load("bottom")
        took = time.perf_counter() - begin
        kept = anonymous_mb() - before
        (outcome,) = await asyncio.gather(load, return_exceptions=True)
    if not isinstance(outcome, LoadCancelledError):
        raise MeasurementError(f"the load was not cancelled: {outcome!r}")
    return {"cancel": took, "kept_mb": kept, "done_mb": info.bytes_done / 1e6, "total_mb": info.bytes_total / 1e6}
