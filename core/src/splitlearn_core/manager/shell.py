"""The asyncio shell: passes events to the machine and carries out its effects; it makes no decisions.

Everything here runs on the event loop; the jobs of worker threads are in ``workers``. A worker's result
comes back as an event. There is no ``await`` between an event and the end of its effects, so that every
other task sees the manager either before or after them.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import Callable, Iterable
from functools import partial, singledispatchmethod
from typing import Any

from splitlearn_core.errors import (
    ConfigurationError,
    InternalError,
    LoadCancelledError,
    ManagerClosedError,
    ModelGoneError,
    UnknownModelError,
)
from splitlearn_core.manager import messages as m
from splitlearn_core.manager.attempt import WORKING
from splitlearn_core.manager.config import ModelConfig
from splitlearn_core.manager.handles import (
    AsyncManagedModel,
    CallGate,
    History,
    LoadingPlaceholder,
    lost_error,
    unloaded_error,
)
from splitlearn_core.manager.loaders.loader import ModelLoader
from splitlearn_core.manager.machine import Limits, Machine
from splitlearn_core.manager.resources import MemorySample, ResourceManager
from splitlearn_core.manager.status import FailureInfo, ModelInfo, ModelStatus, UnloadReport, fresh, record
from splitlearn_core.manager.workers import (
    EXIT_TIMEOUT,
    CallPool,
    Jobs,
    ModeWatch,
    Slot,
    Stopped,
    Worker,
    answering,
    run_in_thread,
)

log = logging.getLogger(__name__)

#: Seconds between two checks of the clock and of the workers.
_TICK = 0.1
#: Ticks between two samples of memory, while a load waits for memory.
_SAMPLE_EVERY = 5
#: Fraction of the close timeout in which holders may return their leases.
_DRAIN_FRACTION = 0.8
#: Logged as warnings.
_FAILURES = (ModelStatus.FAILED, ModelStatus.STUCK)


class Shell:
    """One manager's machine, and the resources of its generations.

    Args:
        limits: The limits of the machine.
        loader: Loads the models.
        resources: Measures the memory.
        pool: The threads that run models.
        call_limits: Calls of one model at once, and how many more may wait.
        load_threads: Threads that torch may use in a load; None for its default.
        clock: Returns seconds, monotonically.
    """

    def __init__(
        self,
        limits: Limits,
        loader: ModelLoader,
        resources: ResourceManager,
        pool: CallPool,
        *,
        call_limits: tuple[int, int],
        load_threads: int | None,
        clock: Callable[[], float],
    ) -> None:
        self.clock = clock
        self.started = clock()
        self._epoch = time.time() - self.started
        self.machine = Machine(limits, self._epoch)
        self.slots: dict[m.Key, Slot] = {}
        self.history = History()
        #: Models without which the manager is not ready.
        self.required: set[str] = set()
        #: The part of them that was passed to the manager's constructor.
        self.always_required: frozenset[str] = frozenset()
        self.jobs = Jobs(loader, resources, self.machine.at_work)
        self._pool, self._call_limits, self._load_threads = pool, call_limits, load_threads
        #: Grows with everything that changes memory: a measurement during which it grew is invalid.
        self._activity = 0
        self.calls = self.calls_failed = self.calls_rejected = 0
        self._calls_running = 0
        #: Threads that were alive when the newest of them started; without the pool's threads of calls.
        self._workers: list[Worker] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ticker: asyncio.Task[None] | None = None
        #: Set while nothing is loaded, loading or being freed.
        self._quiet: asyncio.Event | None = None
        self._modes: ModeWatch | None = None

    def bind(self, *, closed_too: bool = False) -> None:
        """Bind the manager to the running loop, on its first use."""
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
            self._quiet = asyncio.Event()
            self._quiet.set()
            self._modes = ModeWatch()
            self._ticker = loop.create_task(self._tick_for_ever(), name="splitlearn-tick")
        elif self._loop is not loop:
            raise ConfigurationError(
                "this manager belongs to another event loop", hint="make one manager for each event loop"
            )
        if self.machine.closed and not closed_too:
            raise ManagerClosedError("the manager is closed", hint="make a new AsyncModelManager")

    @property
    def has_stopped_ticking(self) -> bool:
        """Whether the ticker has ended, so that nothing expires, stalls or gets stuck any more."""
        return self._ticker is not None and self._ticker.done()

    # --- events and effects ---------------------------------------------------------------------

    def dispatch(self, event: m.Event, between: Callable[[], object] | None = None) -> None:
        """Pass an event to the machine, and carry out its effects: the critical section.

        Args:
            event: What happened.
            between: Called after the machine's decision and before its effects, to prepare for them.

        Raises:
            ManagerError: The machine refuses; nothing has changed, and ``between`` was not called.
        """
        # A garbage collection runs finalizers, and they may call the manager in the middle of a change.
        collecting = gc.isenabled()
        if collecting:
            gc.disable()
        try:
            effects = self.machine.handle(event)
            if between is not None:
                between()
            self._carry_out(effects)
        finally:
            if collecting:
                gc.enable()

    def _carry_out(self, effects: Iterable[m.Effect]) -> None:
        for effect in effects:
            self._apply(effect)
        if self._quiet is not None:
            if self.machine.is_quiet:
                self._quiet.set()
            else:
                self._quiet.clear()

    @singledispatchmethod
    def _apply(self, effect: m.Effect) -> None:
        """Carry out an effect of one class."""
        raise InternalError(f"there are no effects of class {type(effect).__name__}", hint="please report this")

    @_apply.register
    def _changed(self, effect: m.Changed) -> None:
        level, hint = logging.INFO, ""
        if effect.after in _FAILURES:
            generation = self.machine.find(effect.key)
            level, hint = logging.WARNING, f"; {generation.failure.hint}" if generation and generation.failure else ""
        if log.isEnabledFor(level):
            (model_id, number), after = effect.key, effect.after or "gone"
            log.log(
                level, "%s (generation %d): %s -> %s (%s%s)", model_id, number, effect.before, after, effect.cause, hint
            )
        self.history.add(effect, self.clock() + self._epoch)

    @_apply.register
    def _start_worker(self, effect: m.StartWorker) -> None:
        # Starting a thread waits until it runs, which must not happen in the critical section.
        asyncio.get_running_loop().call_soon(self._launch, effect.key, effect.job)

    def _launch(self, key: m.Key, job: m.Job) -> None:
        slot = self.slots.get(key)
        if slot is None:
            return
        slot.measuring = self._begin_measuring(slot.worker)
        slot.worker = self._start_thread(
            f"splitlearn-{job.name.lower()}-{key[0]}",
            partial(self.jobs.run, job, slot),
            partial(self._worker_done, key, job),
            torch_threads=slot.config.load_threads or self._load_threads if job is not m.Job.PLAN else None,
        )
        if slot.worker is not None:
            slot.workers.append(slot.worker)

    def _begin_measuring(self, own: Worker | None) -> int | None:
        """Record that memory is about to change; None if other work would be measured too."""
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
        """Run a function in a thread, and report its outcome on the loop, even if no thread can be started."""
        loop = asyncio.get_running_loop()
        try:
            worker = run_in_thread(name, function, answering(loop, on_done), torch_threads=torch_threads)
        except RuntimeError as error:
            # The system has no more threads, or no memory for their stacks.
            loop.call_soon(on_done, error)
            return None
        self._workers = [other for other in self._workers if other.is_alive]
        self._workers.append(worker)
        return worker

    @_apply.register
    def _stop_worker(self, effect: m.StopWorker) -> None:
        # Read by the worker at its next report.
        self.slots[effect.key].stop = effect.reason

    @_apply.register
    def _start_unload(self, effect: m.StartUnload) -> None:
        slot = self.slots[effect.key]
        slot.broken_leases = effect.broken_leases
        if slot.gate is not None:
            slot.gate.fail_waiting(lambda: unloaded_error(effect.key))
        # From this moment on no call can start. A running call cannot be stopped, and its model stays
        # in memory until it ends.
        box = [slot.model.take() if slot.model else None, slot.loaded]
        is_elsewhere = slot.loaded is not None and slot.loaded.host is not None
        slot.loaded = None
        free = partial(asyncio.get_running_loop().call_soon, self._free, effect.key, box)
        if slot.gate is None or is_elsewhere:
            # When its process ends, so do the calls in it.
            free()
        else:
            slot.gate.when_idle(free)

    def _free(self, key: m.Key, box: list[Any]) -> None:
        done = partial(self._unloaded, key, self._begin_measuring(None))
        job = partial(self.jobs.free, box, self.slots[key].workers)
        self._start_thread(f"splitlearn-unload-{key[0]}", job, done)

    @_apply.register
    def _host_lost(self, effect: m.HostLost) -> None:
        slot = self.slots[effect.key]
        slot.died, slot.broken_leases = effect.failure, effect.broken_leases
        slot.heritage = slot.loaded.host if slot.loaded is not None else None
        slot.loaded = None
        if slot.model is not None:
            slot.model.take(effect.failure)
        if slot.gate is not None:
            slot.gate.fail_waiting(lambda: lost_error(effect.failure))

    @_apply.register
    def _succeeds(self, effect: m.Succeeds) -> None:
        before = self.slots[effect.before]
        if effect.key not in self.slots:
            # No caller requested it.
            self.add_slot(effect.key, before.config)
        slot = self.slots[effect.key]
        if slot.config.fingerprint == before.config.fingerprint:
            slot.heritage = before.heritage

    @_apply.register
    def _discard(self, effect: m.Discard) -> None:
        slot = self.slots.get(effect.key)
        if slot is None or slot.loaded is None:
            return
        job = partial(self.jobs.free, [slot.model.take() if slot.model else None, slot.loaded], slot.workers)
        slot.loaded = slot.model = None
        name = f"splitlearn-discard-{effect.key[0]}"
        asyncio.get_running_loop().call_soon(self._start_thread, name, job, lambda outcome: None)

    @_apply.register
    def _resolve(self, effect: m.Resolve) -> None:
        slot = self.slots[effect.key]
        if not slot.resolved.done():
            slot.resolved.set_result(effect.failure)

    @_apply.register
    def _drain_ended(self, effect: m.DrainEnded) -> None:
        self._answer_unloads(self.slots[effect.key], effect.leases)

    @_apply.register
    def _gone(self, effect: m.Gone) -> None:
        slot = self.slots.pop(effect.key)
        report = UnloadReport(effect.key[0], effect.released, slot.freed, slot.broken_leases)
        # Here, because the caller that waits for the unload may have been cancelled.
        if slot.unloads and not self.machine.knows(effect.key[0]):
            self.required.discard(effect.key[0])
        self._answer_unloads(slot, report)
        # A stuck worker that has ended at last.
        if not slot.resolved.done():
            slot.resolved.set_result(record(LoadCancelledError("the load was given up"), slot.progress.stage))

    @_apply.register
    def _forgotten(self, effect: m.Forgotten) -> None:
        # One of the newer failures still keeps the manager from being ready.
        if effect.model_id not in self.always_required:
            self.required.discard(effect.model_id)

    def _answer_unloads(self, slot: Slot, outcome: UnloadReport | int | FailureInfo) -> None:
        for ended in slot.unloads:
            if not ended.done():
                ended.set_result(outcome)
        slot.unloads.clear()

    # --- results of workers ---------------------------------------------------------------------

    def _worker_done(self, key: m.Key, job: m.Job, outcome: Any) -> None:
        slot = self.slots[key]
        now = self.clock()
        alone = slot.measuring == self._activity
        self._activity += 1
        if isinstance(outcome, BaseException):
            outcome = record(outcome, slot.progress.stage)
        if isinstance(outcome, FailureInfo):
            log.log(logging.DEBUG, "%s failed:\n%s", key[0], outcome.traceback)
            self.dispatch(m.WorkerFailed(now, key, outcome))
        elif isinstance(outcome, Stopped):
            self.dispatch(m.WorkerStopped(now, key))
        elif job is m.Job.PLAN:
            slot.plan, sample = outcome
            self._sampled(sample)
            plan = slot.plan
            self.dispatch(m.Planned(now, key, plan.needs, plan.keeps, plan.location, plan.dtype))
        elif job is m.Job.LOAD:
            loaded, grown, sample = outcome
            slot.loaded, slot.model = loaded, AsyncManagedModel(key, slot.config, loaded.module, self)
            slot.gate = CallGate(key[0], self._pool, *self._call_limits)
            is_known = alone or loaded.host is not None
            pid = loaded.host.pid if loaded.host is not None else None
            self.dispatch(m.Loaded(now, key, max(0, grown) if is_known else None, pid))
            self._sampled(sample)
            if loaded.host is not None:
                loaded.host.ended.add_done_callback(
                    answering(asyncio.get_running_loop(), lambda _: self._look_at_host(key))
                )
        else:
            self.dispatch(m.WarmedUp(now, key))

    def _look_at_host(self, key: m.Key) -> None:
        """Report the host of a generation if it has ended unexpectedly."""
        slot = self.slots.get(key)
        host = slot.loaded.host if slot is not None and slot.loaded is not None else None
        if slot is None or host is None or slot.died is not None or not host.ended.done():
            return
        slot.died = record(host.death(), str(ModelStatus.READY))
        self.dispatch(m.HostDied(self.clock(), key, slot.died, host.has_sessions))

    def _unloaded(self, key: m.Key, activity: int | None, outcome: Any) -> None:
        if isinstance(outcome, BaseException):
            reason = f"its memory could not be freed: {outcome!r}"
            self.dispatch(m.UnloadFailed(self.clock(), key, reason))
            error = InternalError(f"model {key[0]!r}: {reason}", hint="it is shown as stuck; restart the process")
            self._answer_unloads(self.slots[key], record(error, "unloading"))
            return
        freed, sample = outcome
        self.slots[key].freed = freed if activity == self._activity else None
        self.dispatch(m.Unloaded(self.clock(), key))
        self._sampled(sample)

    def _sampled(self, sample: MemorySample) -> None:
        self.dispatch(m.MemorySampled(self.clock(), sample.total, sample.free))

    # --- waiting and calling --------------------------------------------------------------------

    def add_slot(self, key: m.Key, config: ModelConfig) -> None:
        """Create the slot of a new generation."""
        loop = asyncio.get_running_loop()
        self.slots[key] = Slot(config, LoadingPlaceholder(key, config, self), loop.create_future())

    async def wait(self, key: m.Key) -> AsyncManagedModel:
        """Wait for a load; the caller is already counted as a waiter."""
        slot = self.slots[key]
        try:
            failure = await asyncio.shield(slot.resolved)
        except asyncio.CancelledError:
            self.dispatch(m.WaiterGone(self.clock(), key))
            raise
        if failure is not None:
            raise fresh(failure)
        if slot.died is not None:
            raise lost_error(slot.died)
        if slot.model is None or slot.model.is_gone:
            raise ModelGoneError(
                f"model {key[0]!r} was loaded and has been unloaded since",
                hint="pin it, or raise min_residency or max_models",
            )
        return slot.model

    async def wait_for(self, key: m.Key) -> AsyncManagedModel:
        """Wait for one generation, for :meth:`LoadingPlaceholder.wait`."""
        slot = self.slots.get(key)
        if slot is None:
            raise UnknownModelError(
                f"load number {key[1]} of model {key[0]!r} has ended and is no longer recorded",
                hint="see get_model_info(id), or load it again",
            )
        self.dispatch(m.WaiterJoined(self.clock(), key))
        return await self.wait(key)

    async def call(self, key: m.Key, function: Callable[[], Any]) -> Any:
        """Run a function in the call pool under a lease of the generation, for a call of its model."""
        gate = self.slots[key].gate if key in self.slots else None
        if gate is None:
            raise unloaded_error(key)
        try:
            gate.refuse_if_full()
        except Exception:
            self.calls_rejected += 1
            raise
        self.dispatch(m.CallStarted(self.clock(), key))
        self.calls += 1
        self._calls_running += 1
        self._activity += 1
        future = gate.submit(function, partial(self._call_over, key))
        try:
            return await future
        except Exception:
            self.calls_failed += 1
            raise
        finally:
            # The error refers to this frame by its traceback, and the future to the error: a cycle
            # would keep the model alive after both are dropped.
            del future, function

    def _call_over(self, key: m.Key) -> None:
        self._calls_running -= 1
        # Before the lease is over, so that the model counts as one in use.
        self._look_at_host(key)
        self.dispatch(m.LeaseReleased(self.clock(), key))

    def info_of(self, key: m.Key) -> ModelInfo:
        """Return the snapshot of one generation."""
        generation = self.machine.find(key)
        if generation is None:
            raise UnknownModelError(f"generation {key[1]} of model {key[0]!r} is gone", hint="call get_model(id) again")
        if self.machine.visible(key[0]) is generation:
            return self.machine.info(key[0])
        return self.machine.picture(generation)

    def model_of(self, key: m.Key) -> AsyncManagedModel:
        """Return the model of a loaded generation; ModelGoneError if it is not loaded."""
        model = self.slots[key].model
        if model is None:
            raise unloaded_error(key)
        return model

    def stuck_stacks(self) -> dict[str, str]:
        """Return the stacks of the workers that were requested to stop and have not ended."""
        stacks = {}
        for key in self.machine.keys(ModelStatus.STUCK, ModelStatus.CANCELLING):
            worker = self.slots[key].worker
            stacks[f"{key[0]} (generation {key[1]})"] = worker.stack() if worker else ""
        return stacks

    # --- time -----------------------------------------------------------------------------------

    async def _tick_for_ever(self) -> None:
        count = 0
        while True:
            await asyncio.sleep(_TICK)
            self._look_at_mode()
            working = self.machine.keys(*WORKING)
            progress = {key: self.slots[key].progress for key in working if key in self.slots}
            self.dispatch(m.Tick(self.clock(), progress))
            count += 1
            if count % _SAMPLE_EVERY == 0 and self.machine.keys(ModelStatus.WAITING):
                try:
                    sample = await self.in_thread("splitlearn-memory", self.jobs.sample)
                except Exception:
                    # The ticker must go on: without it nothing expires, stalls or gets stuck.
                    log.exception("the memory could not be measured; the last measurement stays in use")
                else:
                    self._sampled(sample)

    def _look_at_mode(self) -> None:
        """Warn once if the loop's thread is in a mode of torch; called by the manager's own tasks."""
        if self._modes is not None and (problem := self._modes.look()):
            log.warning("%s", problem)

    async def in_thread(self, name: str, function: Callable[[], Any]) -> Any:
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

    # --- closing --------------------------------------------------------------------------------

    async def close(self, limit: float) -> None:
        """End everything within ``limit`` seconds; see :meth:`AsyncModelManager.close`."""
        try:
            await self._close_in_order(limit)
        finally:
            # Also if the loop ends first and cancels this task: it does not wait.
            self._abandon()

    async def _close_in_order(self, limit: float) -> None:
        started = self.clock()
        self._look_at_mode()
        self.dispatch(m.CloseRequested(started))
        if not await self._quiet_within(limit * _DRAIN_FRACTION):
            self.dispatch(m.CloseRequested(self.clock(), force=True))
            await self._quiet_within(max(0.0, started + limit - self.clock()))
        for key, stack in self.stuck_stacks().items():
            log.warning("%s: its worker did not stop; its stack is:\n%s", key, stack)
        if self._ticker is not None:
            self._ticker.cancel()
            await asyncio.gather(self._ticker, return_exceptions=True)
        left = max(0.0, started + limit - self.clock())
        if not await self.in_thread("splitlearn-close", partial(self._end_threads, self._ending_workers(), left)):
            log.warning("a call still runs; its thread ends with it")
        for worker in self._ending_workers():
            # This is only the thread that waited for the others: it has reported, and is about to end.
            worker.join(EXIT_TIMEOUT)

    def _abandon(self) -> None:
        """End whatever has not ended, and answer its waiters, without waiting for it."""
        if not self.machine.is_quiet:
            self.dispatch(m.CloseRequested(self.clock(), force=True))
        if self._ticker is not None:
            self._ticker.cancel()
        self._pool.close(0.0)
        self.history.end()
        for slot in self.slots.values():
            if not slot.resolved.done():
                error = ManagerClosedError("the manager was closed before the load ended")
                slot.resolved.set_result(record(error, slot.progress.stage))
            self._answer_unloads(slot, UnloadReport(slot.config.model_id, {}, None, slot.broken_leases))

    def _ending_workers(self) -> list[Worker]:
        """Return the threads that are alive and not stuck."""
        stuck = [self.slots[key].worker for key in self.machine.keys(ModelStatus.STUCK, ModelStatus.CANCELLING)]
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
