"""The asyncio shell: it carries events to the machine and the machine's effects out, and decides nothing.

Everything here runs on the event loop but what is named ``*_job``, which runs in a worker thread.
A worker's answer comes back as an event. No ``await`` stands between an event and the end of its
effects, so that every other task sees the manager as it was before or as it is after.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, ClassVar, Literal, Self, TypeVar

from splitlearn_core.errors import (
    ConfigurationError,
    DrainTimeoutError,
    InternalError,
    LoadCancelledError,
    LoadStalledError,
    ManagerClosedError,
    ModelGoneError,
    UnknownModelError,
)
from splitlearn_core.manager import messages as m
from splitlearn_core.manager.config import ModelConfig, show
from splitlearn_core.manager.generation import WORKING
from splitlearn_core.manager.lending import AsyncManagedModel, CallGate, LoadingPlaceholder
from splitlearn_core.manager.limits import is_amount, limit_problems
from splitlearn_core.manager.loader import ModelLoader
from splitlearn_core.manager.machine import Limits, Machine
from splitlearn_core.manager.records import fresh, record
from splitlearn_core.manager.resources import MemorySample, ResourceManager
from splitlearn_core.manager.status import (
    FailureInfo,
    Health,
    ManagerEvent,
    ManagerStatistics,
    ModelInfo,
    ModelStatus,
    UnloadReport,
)
from splitlearn_core.manager.stream import EventStream
from splitlearn_core.manager.threads import CallPool, Worker, run_in_thread
from splitlearn_core.manager.work import LoadedModel, LoadPlan
from splitlearn_core.memory import anonymous_memory
from splitlearn_core.plugins.registry import registry
from splitlearn_core.types import Progress
from splitlearn_core.units import MEGABYTE

log = logging.getLogger(__name__)
_T = TypeVar("_T")

#: Seconds between two looks at the clock and at the workers.
_TICK = 0.1
#: Looks between two samples of memory, while somebody waits for it.
_SAMPLE_EVERY = 5
#: Seconds of a worker's work after which it lets others have the interpreter, and for how long.
_BREATHE_EVERY, _BREATH = 0.002, 0.00005
#: Changes that are remembered for :meth:`AsyncModelManager.story`.
_REMEMBERED = 4096
#: Share of the time to close that holders have to give back what they borrowed.
_PATIENCE = 0.8
#: Seconds that a thread has between its answer and its end, where somebody waits for that.
_LAST_STEPS = 1.0
#: What a log is read for.
_ENDED_BADLY = (ModelStatus.FAILED, ModelStatus.STUCK)


@dataclass(slots=True, eq=False)
class _Slot:
    """What the shell holds for one generation: everything that is not a decision."""

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


class AsyncModelManager:
    """Loads, watches, lends and frees whatever the installed plugins can load.

    ::

        async with AsyncModelManager(max_memory_mb=8000) as manager:
            await manager.load_model(ModelConfig(
                model_id="trunk", model_type="gpt2", model_path="bundled:gpt2",
                component="trunk", split_points=(1, 5),
            ))
            async with manager.lease("trunk") as trunk:
                hidden = await trunk(hidden_states=hidden)

    Use it from one event loop. Importing torch and transformers stalls a loop wherever it happens:
    call :func:`splitlearn_core.manager.imports.preload` before the loop serves anybody.

    Args:
        max_models: Models that are loaded or loading at once; None for no limit.
        max_memory_mb: What all of them together may take, mapped files and devices included, in
            units of 2**20 bytes; None for what the machine has.
        headroom_mb: Memory of the machine that is left alone.
        max_workers: Loads at once.
        call_workers: Threads that run models.
        calls_per_model: Calls of one model at once.
        call_queue: Calls of one model that may wait; one more raises BusyError.
        load_threads: Threads that torch may use in a load; None for torch's default.
        call_threads: The same for each thread that runs models.
        when_full: What to do with a load that does not fit although idle models go: ``wait``, or
            ``refuse`` it with the numbers.
        wait_timeout: Seconds that a load may wait for a worker and for room; None for ever.
        stall_after: Seconds without progress after which a load is shown as stalled.
        stall_timeout: Seconds without progress after which it is given up; None for never.
        cancel_grace: Seconds that a worker has to stop before it counts as stuck.
        drain_timeout: Seconds that an unload waits for holders; None for ever.
        close_timeout: Seconds in which :meth:`close` ends.
        keep_alive: Seconds of idleness after which a model is unloaded, unless its configuration
            says otherwise; None for never.
        min_residency: Seconds that a model stays, idle or not, once it is loaded.
        required: Models without which the manager is not ready, beside those whose configuration
            says so.
        loader, resources: Replacements for the usual ones.
        clock: Seconds that only grow.

    Raises:
        ConfigurationError: Limits that cannot be kept; all of them are listed.
    """

    def __init__(
        self,
        *,
        max_models: int | None = None,
        max_memory_mb: float | None = None,
        headroom_mb: float = 512,
        max_workers: int = 2,
        call_workers: int = 2,
        calls_per_model: int = 1,
        call_queue: int = 64,
        load_threads: int | None = None,
        call_threads: int | None = None,
        when_full: Literal["wait", "refuse"] = "wait",
        wait_timeout: float | None = 600.0,
        stall_after: float = 10.0,
        stall_timeout: float | None = 300.0,
        cancel_grace: float = 10.0,
        drain_timeout: float | None = 30.0,
        close_timeout: float = 30.0,
        keep_alive: float | None = None,
        min_residency: float = 5.0,
        required: Iterable[str] = (),
        loader: ModelLoader | None = None,
        resources: ResourceManager | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        _refuse_limits(
            {
                "max_models": max_models,
                "max_memory_mb": max_memory_mb,
                "headroom_mb": headroom_mb,
                "max_workers": max_workers,
                "call_workers": call_workers,
                "calls_per_model": calls_per_model,
                "call_queue": call_queue,
                "load_threads": load_threads,
                "call_threads": call_threads,
                "when_full": when_full,
                "wait_timeout": wait_timeout,
                "stall_after": stall_after,
                "stall_timeout": stall_timeout,
                "cancel_grace": cancel_grace,
                "drain_timeout": drain_timeout,
                "close_timeout": close_timeout,
                "keep_alive": keep_alive,
                "min_residency": min_residency,
                "required": required,
            }
        )
        limits = Limits(
            max_models=max_models,
            max_memory=None if max_memory_mb is None else int(max_memory_mb * MEGABYTE),
            max_workers=max_workers,
            max_stuck=2 * max_workers,
            when_full=when_full,
            wait_timeout=wait_timeout,
            stall_after=stall_after,
            stall_timeout=stall_timeout,
            cancel_grace=cancel_grace,
            min_residency=min_residency,
        )
        self._clock = clock
        self._started = clock()
        self._epoch = time.time() - self._started
        self._machine = Machine(limits, self._epoch)
        self._loader = loader or ModelLoader()
        self._resources = resources or ResourceManager(headroom=int(headroom_mb * MEGABYTE))
        self._pool = CallPool(call_workers, call_threads)
        self._calls_per_model, self._call_queue = calls_per_model, call_queue
        self._load_threads = load_threads
        self._drain_timeout, self._close_timeout = drain_timeout, close_timeout
        self._keep_alive = keep_alive
        self._required = set(required)
        self._slots: dict[m.Key, _Slot] = {}
        self._streams: weakref.WeakSet[EventStream] = weakref.WeakSet()
        self._story: deque[ManagerEvent] = deque(maxlen=_REMEMBERED)
        self._sequence = 0
        #: Grows with whatever changes memory: a measurement during which it grew says nothing.
        self._activity = 0
        self._calls = self._calls_running = self._calls_failed = self._calls_rejected = 0
        #: Threads that were started and had not ended when the last one was; those of calls are the pool's.
        self._workers: list[Worker] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ticker: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        #: Set whenever nothing is loaded, loading or being freed any more.
        self._quiet: asyncio.Event | None = None

    # --- loading --------------------------------------------------------------------------------

    async def load_model(self, config: ModelConfig) -> AsyncManagedModel:
        """Load a model, and return it once it is ready.

        It is listed from the moment of the call. Cancelling the caller does not cancel the load:
        :meth:`cancel_load` does.

        Raises:
            DuplicateModelError: The id is loaded or loading (a ValueError); nothing has changed.
            UnknownModelTypeError: No plugin provides the model type (a KeyError).
            ManagerClosedError: The manager is closed.
            SplitLearnError: What the load failed with; the model is then listed as failed.
        """
        return await self._load(config, join=False)

    async def ensure_model(self, config: ModelConfig) -> AsyncManagedModel:
        """Return the model if it is ready, wait for it if it is loading, load it otherwise.

        However many callers ask, one load is made; each can be cancelled without disturbing the others.

        Raises:
            DuplicateModelError: The id belongs to another configuration (a ValueError).
            SplitLearnError: As :meth:`load_model`; each caller gets an exception of its own.
        """
        return await self._load(config, join=True)

    async def reload_model(self, model_id: str, config: ModelConfig | None = None) -> AsyncManagedModel:
        """Load a model anew, the old one serving until the new one is ready.

        Leases of the old one go on; new ones get the new one. If loading fails, the old one serves
        on, and its ``info.error`` says why.

        Args:
            model_id: A model that is ready, or failed.
            config: What to load it as; by default as before.

        Raises:
            UnknownModelError: There is no such model (a KeyError).
            DuplicateModelError: It is loading already.
            ModelNotReadyError: It is on its way out.
        """
        shown = self._machine.visible(model_id)
        config = config or self._slots[shown.key].config
        if config.model_id != model_id:
            raise ConfigurationError(
                f"the configuration is of model {config.model_id!r}, not of {model_id!r}",
                hint="a reload keeps the id",
            )
        return await self._load(config, reload=True)

    async def cancel_load(self, model_id: str) -> None:
        """Stop a load, and return once its worker has given everything back.

        Raises:
            UnknownModelError: There is no such model.
            ModelNotReadyError: It is not loading.
            LoadStalledError: The worker did not stop in time (a TimeoutError): the model is shown
                as stuck, and its memory counts as taken until the worker comes back.
        """
        coming = self._machine.coming(model_id)
        self._handle(m.CancelRequested(self._clock(), model_id))
        if coming is None or (slot := self._slots.get(coming.key)) is None:
            return
        await asyncio.shield(slot.resolved)
        # A closing manager does not wait for it to be stuck.
        if self._machine.find(coming.key) and coming.status in (ModelStatus.STUCK, ModelStatus.CANCELLING):
            raise LoadStalledError(
                f"the worker that loads {model_id!r} does not stop",
                hint="get_statistics().stuck shows where it stands; its memory stays taken until it comes back",
            )

    async def _load(self, config: ModelConfig, *, join: bool = False, reload: bool = False) -> AsyncManagedModel:
        self._bind()
        if not isinstance(config, ModelConfig):
            raise ConfigurationError(
                f"a {type(config).__name__} was given for a ModelConfig",
                hint="ModelConfig.from_dict(mapping) makes one",
            )
        # Before anything is held: no plugin for the model type is the caller's to mend.
        config.check_installed()
        request = self._request_of(config)
        event = m.LoadRequested(self._clock(), config.model_id, request, join=join, reload=reload)
        effects = self._machine.handle(event)
        generation = self._machine.visible(config.model_id)
        if generation.status is not ModelStatus.READY or reload:
            # Who asks for a model that serves does not wait for the reload that may be going on beside it.
            generation = self._machine.coming(config.model_id) or generation
        if generation.key not in self._slots:
            self._slots[generation.key] = self._new_slot(generation.key, config)
            if config.required:
                self._required.add(config.model_id)
        self._carry_out(effects)
        if generation.status is ModelStatus.READY and not reload:
            return self._model_of(generation.key)
        return await self._wait(generation.key)

    def _new_slot(self, key: m.Key, config: ModelConfig) -> _Slot:
        loop = asyncio.get_running_loop()
        return _Slot(config, LoadingPlaceholder(key, config, self), loop.create_future())

    def _request_of(self, config: ModelConfig) -> m.LoadRequest:
        keep = self._keep_alive if config.keep_alive is None else config.keep_alive
        return m.LoadRequest(
            model_type=config.model_type,
            component=config.component,
            device=config.device,
            fingerprint=config.fingerprint,
            keep_alive=None if keep is None or math.isinf(keep) else keep,
            pinned=config.pinned,
            required=config.required or config.model_id in self._required,
            allow_paging=config.allow_paging,
            warmup=config.warmup,
        )

    async def _wait(self, key: m.Key) -> AsyncManagedModel:
        """Wait for a load that this caller is counted for already."""
        slot = self._slots[key]
        try:
            failure = await asyncio.shield(slot.resolved)
        except asyncio.CancelledError:
            self._handle(m.WaiterGone(self._clock(), key))
            raise
        if failure is not None:
            raise fresh(failure)
        if slot.model is None or slot.model.is_gone:
            raise ModelGoneError(
                f"model {key[0]!r} was loaded and is gone again", hint="pin it, or raise min_residency or max_models"
            )
        return slot.model

    # --- letting go -----------------------------------------------------------------------------

    async def unload_model(self, model_id: str, *, force: bool = False, timeout: float | None = None) -> UnloadReport:  # noqa: ASYNC109  # a limit on the drain, not on the call
        """Free a model once nobody has it, and say what came back; forget one that failed.

        Args:
            model_id: The model.
            force: Do not wait for holders: their next call raises ModelGoneError. A call that runs
                cannot be stopped; the unload is over when it is.
            timeout: Seconds to wait for holders, or by force for calls; by default the manager's
                ``drain_timeout``.

        Raises:
            UnknownModelError: There is no such model (a KeyError).
            ModelNotReadyError: It is loading (see :meth:`cancel_load`), or being unloaded already.
            DrainTimeoutError: Holders kept it (a TimeoutError); it serves on. By force: a call still
                runs, and the memory is freed when it ends.
            SplitLearnError: Its memory could not be freed: it is shown as stuck.
        """
        self._bind(closed_too=True)
        slot = self._slots.get(self._machine.visible(model_id).key)
        if timeout is not None and not is_amount(timeout):
            raise ConfigurationError(f"timeout is {show(timeout)}; a number of seconds from 0 is needed")
        limit = self._drain_timeout if timeout is None else timeout
        ended: asyncio.Future[UnloadReport | int | FailureInfo] = asyncio.get_running_loop().create_future()
        event = m.UnloadRequested(self._clock(), model_id, force, limit)
        effects = self._machine.handle(event)
        if slot is not None:
            slot.unloads.append(ended)
        self._carry_out(effects)
        try:
            # A drain has the machine's own limit; a call that runs has none.
            async with asyncio.timeout(limit if force else None):
                outcome = await asyncio.shield(ended)
        except TimeoutError:
            raise DrainTimeoutError(
                f"model {model_id!r} is lent no more, but a call still runs after {limit:g} s",
                hint="its memory is taken until the call ends",
            ) from None
        if isinstance(outcome, int):
            raise DrainTimeoutError(
                f"model {model_id!r} still has {outcome} lease{'s' * (outcome != 1)} after {limit:g} s, and serves on",
                hint="unload_model(id, force=True) does not wait for holders",
            )
        if isinstance(outcome, FailureInfo):
            raise fresh(outcome)
        return outcome

    async def close(self, timeout: float | None = None) -> None:  # noqa: ASYNC109  # it ends within it, done or not
        """Take no more work, cancel what is loading, free what is loaded, and end within the limit.

        May be called again, and concurrently: all callers wait for the same end. Holders have four
        fifths of the time to give back what they borrowed. Workers that do not stop are logged with
        the place where they stand; they are daemon threads, and do not keep the process from ending.

        Args:
            timeout: Seconds; by default the manager's ``close_timeout``.
        """
        self._bind(closed_too=True)
        if self._closing is None:
            limit = self._close_timeout if timeout is None else timeout
            self._closing = asyncio.get_running_loop().create_task(self._close(limit), name="splitlearn-close")
        await asyncio.shield(self._closing)

    async def _close(self, limit: float) -> None:
        started = self._clock()
        self._handle(m.CloseRequested(started))
        if not await self._quiet_within(limit * _PATIENCE):
            self._handle(m.CloseRequested(self._clock(), force=True))
            await self._quiet_within(max(0.0, started + limit - self._clock()))
        for key, stack in self._stuck_stacks().items():
            log.warning("%s: its worker did not stop, and stands here:\n%s", key, stack)
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.gather(self._ticker, return_exceptions=True)
        left = max(0.0, started + limit - self._clock())
        if not await self._in_thread("splitlearn-close", partial(self._end_threads, self._ending_workers(), left)):
            log.warning("a call still runs; its thread ends with it")
        for worker in self._ending_workers():
            # Only the thread that waited for the others: it has answered, and is about to go.
            worker.join(_LAST_STEPS)
        for stream in tuple(self._streams):
            stream.end()
        for slot in self._slots.values():
            self._resolve_for_good(slot)

    def _ending_workers(self) -> list[Worker]:
        """Return the threads that are alive and have no reason to stay."""
        stuck = [self._slots[key].worker for key in self._machine.keys(ModelStatus.STUCK, ModelStatus.CANCELLING)]
        return [worker for worker in self._workers if worker.is_alive and worker not in stuck]

    def _end_threads(self, workers: Iterable[Worker], timeout: float) -> bool:
        deadline = time.monotonic() + timeout
        calls_ended = self._pool.close(timeout)
        for worker in workers:
            worker.join(max(0.0, deadline - time.monotonic()))
        return calls_ended

    async def _quiet_within(self, seconds: float) -> bool:
        quiet = self._quiet
        if quiet is None:
            return True
        try:
            async with asyncio.timeout(seconds):
                await quiet.wait()
        except TimeoutError:
            return False
        return True

    def _resolve_for_good(self, slot: _Slot) -> None:
        """Let nobody wait for a worker that does not come back."""
        if not slot.resolved.done():
            error = ManagerClosedError("the manager was closed before the load ended")
            slot.resolved.set_result(record(error, slot.progress.stage))
        for ended in slot.unloads:
            if not ended.done():
                ended.set_result(UnloadReport(slot.config.model_id, {}, None, slot.broken_leases))

    async def __aenter__(self) -> Self:
        self._bind()
        # The first look at what is installed takes as long as dozens of files to read.
        await self._in_thread("splitlearn-plugins", lambda: registry().model_types())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # --- lending --------------------------------------------------------------------------------

    @asynccontextmanager
    async def lease(self, model_id: str) -> AsyncIterator[AsyncManagedModel]:
        """Borrow a model: it is neither freed nor evicted before the block ends.

        A model that is loading is waited for.

        Raises:
            UnknownModelError: There is no such model (a KeyError).
            ModelNotReadyError: It has failed, or is going away.
            SplitLearnError: What the load that was waited for failed with.
        """
        key = await self._borrow(model_id)
        try:
            yield self._model_of(key)
        finally:
            self._handle(m.LeaseReleased(self._clock(), key))

    async def _borrow(self, model_id: str) -> m.Key:
        self._bind()
        while True:
            generation = self._machine.visible(model_id)
            if not generation.is_loading:
                self._handle(m.LeaseTaken(self._clock(), model_id))
                return generation.key
            # Between the end of the load and this task's turn it may be gone again: look anew.
            await self.wait_for(generation.key)

    async def wait_for(self, key: m.Key) -> AsyncManagedModel:
        """Wait for one generation; what :meth:`LoadingPlaceholder.wait` does."""
        slot = self._slots.get(key)
        if slot is None:
            raise UnknownModelError(
                f"the load number {key[1]} of model {key[0]!r} is over and forgotten",
                hint="look at get_model_info(id), or load it again",
            )
        self._handle(m.WaiterJoined(self._clock(), key))
        return await self._wait(key)

    async def call(self, key: m.Key, function: Callable[[], Any]) -> Any:
        """Run a function in the call pool while the generation is lent; what a model's call does."""
        gate = self._slots[key].gate if key in self._slots else None
        if gate is None:
            raise ModelGoneError(f"model {key[0]!r} was unloaded", hint="take a new lease")
        try:
            gate.refuse_if_full()
        except Exception:
            self._calls_rejected += 1
            raise
        self._handle(m.CallStarted(self._clock(), key))
        self._calls += 1
        self._calls_running += 1
        self._activity += 1
        future = gate.submit(function, partial(self._call_over, key))
        try:
            return await future
        except Exception:
            self._calls_failed += 1
            raise
        finally:
            # The error knows this frame by its traceback, and the future knows the error: a cycle
            # would keep the model after both are forgotten.
            del future, function

    def _call_over(self, key: m.Key) -> None:
        self._calls_running -= 1
        self._handle(m.LeaseReleased(self._clock(), key))

    # --- answering at once ----------------------------------------------------------------------

    def get_model(self, model_id: str) -> AsyncManagedModel | LoadingPlaceholder:
        """Return a model if it is there, or the placeholder of one that is not; see :meth:`lease` to use it.

        Raises:
            UnknownModelError: There is no such model (a KeyError).
        """
        slot = self._slots[self._machine.visible(model_id).key]
        return slot.model or slot.placeholder

    def list_models(self) -> tuple[ModelInfo, ...]:
        """Return a snapshot of every model that is loaded, loading, failed or on its way out."""
        return self._machine.infos()

    def get_model_info(self, model_id: str) -> ModelInfo:
        """Return the snapshot of one model; UnknownModelError (a KeyError) where there is none."""
        return self._machine.info(model_id)

    def get_statistics(self) -> ManagerStatistics:
        """Return what the manager holds and has counted."""
        counters = self._machine.counters
        return ManagerStatistics(
            models=self._machine.counts(),
            ledgers=self._machine.ledgers(),
            loads_started=counters.loads_started,
            loads_succeeded=counters.loads_succeeded,
            loads_failed=counters.loads_failed,
            loads_cancelled=counters.loads_cancelled,
            joined=counters.joined,
            unloads=counters.unloads,
            evictions=counters.evictions,
            expirations=counters.expirations,
            leases=counters.leases,
            calls=self._calls,
            calls_failed=self._calls_failed,
            calls_rejected=self._calls_rejected,
            stuck=self._stuck_stacks(),
            uptime=self._clock() - self._started,
        )

    def health(self) -> Health:
        """Say whether the process is alive, which no load can change, and whether the required models are ready."""
        dead = self._ticker is not None and self._ticker.done()
        reason = "the manager is closed" if self._machine.closed else "its ticker has ended" if dead else ""
        missing = {model_id: why for model_id in sorted(self._required) if (why := self._why_missing(model_id))}
        return Health(live=not reason, ready=not reason and not missing, missing=missing, reason=reason)

    def events(self) -> EventStream:
        """Follow the changes from now on: ``async for event in manager.events()``. Ends with the manager.

        A reader that falls more than 1024 events behind misses the oldest; ``event.sequence`` then
        has a gap. One that is forgotten is dropped by itself.
        """
        stream = EventStream()
        self._streams.add(stream)
        if self._closing is not None and self._closing.done():
            stream.end()
        return stream

    def story(self, model_id: str) -> tuple[ManagerEvent, ...]:
        """Return the last changes of one model, oldest first; some are remembered after it is gone."""
        return tuple(event for event in self._story if event.model_id == model_id)

    def info_of(self, key: m.Key) -> ModelInfo:
        """Return the snapshot of one generation."""
        generation = self._machine.find(key)
        if generation is None:
            raise UnknownModelError(f"generation {key[1]} of model {key[0]!r} is gone", hint="get_model(id) anew")
        if self._machine.visible(key[0]) is generation:
            return self._machine.info(key[0])
        return self._machine.picture(generation)

    def _why_missing(self, model_id: str) -> str:
        try:
            info = self.get_model_info(model_id)
        except UnknownModelError:
            return "not loaded"
        if info.status is ModelStatus.READY:
            return ""
        return f"{info.status}: {info.error.message}" if info.error else str(info.status)

    def _stuck_stacks(self) -> dict[str, str]:
        stacks = {}
        for key in self._machine.keys(ModelStatus.STUCK, ModelStatus.CANCELLING):
            worker = self._slots[key].worker
            stacks[f"{key[0]} (generation {key[1]})"] = worker.stack() if worker else ""
        return stacks

    def _model_of(self, key: m.Key) -> AsyncManagedModel:
        model = self._slots[key].model
        if model is None:
            raise ModelGoneError(f"model {key[0]!r} was unloaded", hint="load it again")
        return model

    # --- events and effects ---------------------------------------------------------------------

    def _bind(self, *, closed_too: bool = False) -> None:
        """Tie the manager to the running loop, the first time it is used."""
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
            self._quiet = asyncio.Event()
            self._quiet.set()
            self._ticker = loop.create_task(self._tick_for_ever(), name="splitlearn-tick")
        elif self._loop is not loop:
            raise ConfigurationError(
                "this manager belongs to another event loop", hint="make one manager for each event loop"
            )
        if self._machine.closed and not closed_too:
            raise ManagerClosedError("the manager is closed", hint="make a new AsyncModelManager")

    def _handle(self, event: m.Event) -> None:
        self._carry_out(self._machine.handle(event))

    def _carry_out(self, effects: Iterable[m.Effect]) -> None:
        for effect in effects:
            self._EFFECTS[type(effect)](self, effect)
        if self._quiet is not None:
            if self._machine.is_quiet:
                self._quiet.set()
            else:
                self._quiet.clear()

    def _changed(self, effect: m.Changed) -> None:
        self._sequence += 1
        (model_id, number), cause = effect.key, effect.cause
        level, hint = logging.INFO, ""
        if effect.after in _ENDED_BADLY:
            generation = self._machine.find(effect.key)
            level, hint = logging.WARNING, f"; {generation.failure.hint}" if generation and generation.failure else ""
        after = effect.after or "gone"
        log.log(level, "%s (generation %d): %s -> %s (%s%s)", model_id, number, effect.before, after, cause, hint)
        now = self._clock() + self._epoch
        event = ManagerEvent(self._sequence, now, model_id, number, effect.before, effect.after, cause)
        self._story.append(event)
        for stream in tuple(self._streams):
            stream.put(event)

    def _start_worker(self, effect: m.StartWorker) -> None:
        # Starting a thread waits for it to run, which is not for a moment in which the manager is changing.
        asyncio.get_running_loop().call_soon(self._launch, effect.key, effect.job)

    def _launch(self, key: m.Key, job: m.Job) -> None:
        slot = self._slots.get(key)
        if slot is None:
            return
        slot.measuring = self._begin_measuring(slot.worker)
        slot.worker = self._start_thread(
            f"splitlearn-{job.name.lower()}-{key[0]}",
            partial(self._JOBS[job], self, slot),
            partial(self._worker_done, key, job),
            torch_threads=slot.config.load_threads or self._load_threads if job is not m.Job.PLAN else None,
        )
        if slot.worker is not None:
            slot.workers.append(slot.worker)

    def _begin_measuring(self, own: Worker | None) -> int | None:
        """Note that memory is about to change; None where something else is at work, which would be measured too."""
        self._activity += 1
        others = any(worker.is_alive and worker is not own for worker in self._workers)
        return None if others or self._calls_running else self._activity

    def _start_thread(
        self,
        name: str,
        function: Callable[[], Any],
        on_done: Callable[[Any], None],
        *,
        torch_threads: int | None = None,
    ) -> Worker | None:
        """Run a function in a thread, and tell on the loop how it ended, also where no thread can be had."""
        loop = asyncio.get_running_loop()

        def answer(outcome: Any) -> None:
            loop.call_soon_threadsafe(on_done, outcome)

        try:
            worker = run_in_thread(name, function, answer, torch_threads=torch_threads)
        except RuntimeError as error:
            # The system's limit of threads or of memory for their stacks.
            loop.call_soon(on_done, error)
            return None
        self._workers = [other for other in self._workers if other.is_alive]
        self._workers.append(worker)
        return worker

    def _stop_worker(self, effect: m.StopWorker) -> None:
        self._slots[effect.key].stop = effect.reason

    def _start_unload(self, effect: m.StartUnload) -> None:
        slot = self._slots[effect.key]
        slot.broken_leases = effect.broken_leases
        if slot.gate is not None:
            key = effect.key
            slot.gate.fail_waiting(lambda: ModelGoneError(f"model {key[0]!r} was unloaded", hint="take a new lease"))
        # From this moment on nobody can begin a call. One that runs cannot be stopped, and what it
        # works on is taken until it ends.
        box = [slot.model.take() if slot.model else None]
        slot.loaded = None
        free = partial(asyncio.get_running_loop().call_soon, self._free, effect.key, box)
        if slot.gate is None:
            free()
        else:
            slot.gate.when_idle(free)

    def _free(self, key: m.Key, box: list[Any]) -> None:
        done = partial(self._unloaded, key, self._begin_measuring(None))
        job = partial(self._free_job, box, self._slots[key].workers)
        self._start_thread(f"splitlearn-unload-{key[0]}", job, done)

    def _discard(self, effect: m.Discard) -> None:
        slot = self._slots.get(effect.key)
        if slot is None or slot.loaded is None:
            return
        job = partial(self._free_job, [slot.model.take() if slot.model else None, slot.loaded], slot.workers)
        slot.loaded = slot.model = None
        asyncio.get_running_loop().call_soon(self._start_thread, f"splitlearn-discard-{effect.key[0]}", job, _ignore)

    def _resolve(self, effect: m.Resolve) -> None:
        slot = self._slots[effect.key]
        if not slot.resolved.done():
            slot.resolved.set_result(effect.failure)

    def _drain_ended(self, effect: m.DrainEnded) -> None:
        self._answer_unloads(self._slots[effect.key], effect.leases)

    def _gone(self, effect: m.Gone) -> None:
        slot = self._slots.pop(effect.key)
        report = UnloadReport(effect.key[0], effect.released, slot.freed, slot.broken_leases)
        # Here and not where it is waited for: whoever asked may have gone, and the unload went on.
        if slot.unloads and not self._machine.knows(effect.key[0]):
            self._required.discard(effect.key[0])
        self._answer_unloads(slot, report)
        # A worker that came back late: nobody waits for it any more, whatever it brings.
        if not slot.resolved.done():
            slot.resolved.set_result(record(LoadCancelledError("the load was given up"), slot.progress.stage))

    def _answer_unloads(self, slot: _Slot, outcome: UnloadReport | int | FailureInfo) -> None:
        for ended in slot.unloads:
            if not ended.done():
                ended.set_result(outcome)
        slot.unloads.clear()

    # --- what workers do, in their threads ------------------------------------------------------

    def _report_of(self, slot: _Slot) -> Callable[[Progress], None]:
        def report(progress: Progress) -> None:
            if slot.stop:
                raise LoadCancelledError(f"loading {slot.config.model_id!r} was told to stop: {slot.stop}")
            slot.progress = progress
            now = time.monotonic()
            if now - slot.breathed >= _BREATHE_EVERY:
                # A thread that computes in Python keeps the interpreter for 5 ms once it has it. While
                # this one sleeps, the event loop gets its turn.
                time.sleep(_BREATH)
                slot.breathed = time.monotonic()

        return report

    def _plan_job(self, slot: _Slot) -> Any:
        def work(report: Callable[[Progress], None]) -> tuple[LoadPlan, MemorySample]:
            report(Progress("resolving"))
            plan = _answer_of(self._loader.plan(slot.config, report), LoadPlan, "plan", self._loader)
            return plan, self._resources.sample()

        return self._guarded(slot, work)

    def _load_job(self, slot: _Slot) -> Any:
        def work(report: Callable[[Progress], None]) -> tuple[LoadedModel, int | None, MemorySample]:
            if slot.plan is None:
                raise InternalError("nothing was planned", hint="please report this")
            before = anonymous_memory()
            answer = self._loader.load(slot.config, slot.plan, report)
            loaded = _answer_of(answer, LoadedModel, "load", self._loader)
            grown = anonymous_memory() - before
            measured = max(0, grown) if slot.measuring == self._activity else None
            return loaded, measured, self._resources.sample()

        return self._guarded(slot, work)

    def _warm_up_job(self, slot: _Slot) -> Any:
        def work(report: Callable[[Progress], None]) -> None:
            report(Progress("warming up"))
            if slot.loaded is not None:
                self._loader.warm_up(slot.config, slot.loaded, report)

        return self._guarded(slot, work)

    def _guarded(self, slot: _Slot, work: Callable[[Callable[[Progress], None]], Any]) -> Any:
        """Run a job; an error comes out as a record, because an exception would keep what it touched."""
        try:
            return work(self._report_of(slot))
        except LoadCancelledError:
            return _Stopped()
        except BaseException as error:  # noqa: BLE001  # plugins raise what they like, and the loop waits for an answer
            return record(error, slot.progress.stage)

    def _free_job(self, box: list[Any], workers: Iterable[Worker]) -> tuple[int, MemorySample]:
        for worker in workers:
            # Its frames know the model that it brought, until it has ended.
            worker.join(_LAST_STEPS)
        before = anonymous_memory()
        box.clear()
        self._resources.release_unused()
        return before - anonymous_memory(), self._resources.sample()

    # --- what workers answer, back on the loop --------------------------------------------------

    def _worker_done(self, key: m.Key, job: m.Job, outcome: Any) -> None:
        slot = self._slots[key]
        now = self._clock()
        self._activity += 1
        if isinstance(outcome, BaseException):
            outcome = record(outcome, slot.progress.stage)
        if isinstance(outcome, FailureInfo):
            log.log(logging.DEBUG, "%s failed:\n%s", key[0], outcome.traceback)
            self._handle(m.WorkerFailed(now, key, outcome))
        elif isinstance(outcome, _Stopped):
            self._handle(m.WorkerStopped(now, key))
        elif job is m.Job.PLAN:
            slot.plan, sample = outcome
            self._sampled(sample)
            plan = slot.plan
            self._handle(m.Planned(now, key, plan.needs, plan.keeps, plan.location, plan.dtype))
        elif job is m.Job.LOAD:
            slot.loaded, measured, sample = outcome
            self._take_in(key, slot)
            self._handle(m.Loaded(now, key, measured))
            self._sampled(sample)
        else:
            self._handle(m.WarmedUp(now, key))

    def _take_in(self, key: m.Key, slot: _Slot) -> None:
        loaded = slot.loaded
        if loaded is not None:
            slot.model = AsyncManagedModel(key, slot.config, loaded.module, self)
            slot.gate = CallGate(key[0], self._pool, self._calls_per_model, self._call_queue)

    def _unloaded(self, key: m.Key, activity: int | None, outcome: Any) -> None:
        if isinstance(outcome, BaseException):
            reason = f"its memory could not be freed: {outcome!r}"
            self._handle(m.UnloadFailed(self._clock(), key, reason))
            error = InternalError(f"model {key[0]!r}: {reason}", hint="it is shown as stuck; restart the process")
            self._answer_unloads(self._slots[key], record(error, "unloading"))
            return
        freed, sample = outcome
        self._slots[key].freed = freed if activity == self._activity else None
        self._handle(m.Unloaded(self._clock(), key))
        self._sampled(sample)

    def _sampled(self, sample: MemorySample) -> None:
        self._handle(m.MemorySampled(self._clock(), sample.total, sample.free))

    # --- time -----------------------------------------------------------------------------------

    async def _tick_for_ever(self) -> None:
        count = 0
        while True:
            await asyncio.sleep(_TICK)
            working = self._machine.keys(*WORKING)
            progress = {key: self._slots[key].progress for key in working if key in self._slots}
            self._handle(m.Tick(self._clock(), progress))
            count += 1
            if count % _SAMPLE_EVERY == 0 and self._machine.keys(ModelStatus.WAITING):
                await self._sample()

    async def _sample(self) -> None:
        try:
            sample = await self._in_thread("splitlearn-memory", self._resources.sample)
        except Exception:
            # Time must go on: without it nothing expires, stalls or gets stuck.
            log.exception("the memory could not be measured; the last measurement stands")
        else:
            self._sampled(sample)

    async def _in_thread(self, name: str, function: Callable[[], Any]) -> Any:
        """Run a short function in a thread of its own, and wait for it."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def done(outcome: Any) -> None:
            if future.done():
                return
            if isinstance(outcome, BaseException):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

        self._start_thread(name, function, done)
        return await future

    _JOBS: ClassVar[Mapping[m.Job, Callable[[AsyncModelManager, _Slot], Any]]] = {
        m.Job.PLAN: _plan_job,
        m.Job.LOAD: _load_job,
        m.Job.WARM_UP: _warm_up_job,
    }

    _EFFECTS: ClassVar[Mapping[type, Callable[[AsyncModelManager, Any], None]]] = {
        m.StartWorker: _start_worker,
        m.StopWorker: _stop_worker,
        m.StartUnload: _start_unload,
        m.Discard: _discard,
        m.Resolve: _resolve,
        m.DrainEnded: _drain_ended,
        m.Gone: _gone,
        m.Changed: _changed,
    }


class _Stopped:
    """A worker's answer that it was told to stop, and has."""


def _answer_of(answer: Any, kind: type[_T], method: str, loader: ModelLoader) -> _T:
    """Refuse, in the worker, what a loader of somebody else's may return."""
    if not isinstance(answer, kind):
        raise ConfigurationError(
            f"{type(loader).__name__}.{method} returned {type(answer).__name__}, not {kind.__name__}",
            hint="splitlearn_core.manager.loader.ModelLoader says what each method returns",
        )
    return answer


def _ignore(outcome: Any) -> None:
    """Take no notice of how something ended."""


def _refuse_limits(settings: Mapping[str, Any]) -> None:
    problems = limit_problems(settings)
    if problems:
        raise ConfigurationError(
            "a manager cannot keep to these limits:\n  " + "\n  ".join(problems),
            hint="each is documented in splitlearn_core.AsyncModelManager",
        )
