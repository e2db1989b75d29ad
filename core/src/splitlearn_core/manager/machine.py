"""The life of every model as a state machine: an event goes in, effects come out.

Every decision about a status is made here, and nothing here uses a clock, a thread, asyncio or torch:
time arrives in events, and work is requested by effects. An event that is not allowed raises and changes
nothing.

A model (an id) has at most one generation that serves and one that is on its way; a reload makes a
new generation next to the one that serves. Their statuses are drawn in ``attempt``.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import singledispatchmethod
from typing import ClassVar

from splitlearn_core.errors import (
    DuplicateModelError,
    InsufficientMemoryError,
    InternalError,
    LoadCancelledError,
    LoadStalledError,
    ManagerClosedError,
    ModelGoneError,
    ModelNotReadyError,
    SplitLearnError,
    UnknownModelError,
    WaitTimeoutError,
)
from splitlearn_core.manager import messages as m
from splitlearn_core.manager.admission import (
    BUDGET,
    NAMED,
    PLACES,
    Evict,
    Idle,
    Refuse,
    Room,
    Tenant,
    Wait,
    decide,
    has_any,
    lacks_even_without,
)
from splitlearn_core.manager.attempt import CHARGED, RESERVED, TRANSITIONS, WORKING, Generation, Model
from splitlearn_core.manager.loaders.loadable import HOST, MAPPED
from splitlearn_core.manager.status import FailureInfo, LedgerInfo, ModelInfo, ModelStatus

_S = ModelStatus
#: Entries of the list of expiries that may be obsolete before they are removed.
_MAX_OBSOLETE = 64
#: How often the wait before a restart is doubled: from 1 second to 256.
_MAX_DOUBLINGS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits of the manager; durations in seconds, None for no limit."""

    max_models: int | None = None
    max_memory: int | None = None
    max_workers: int = 2
    #: Stuck workers that are not counted against ``max_workers``.
    max_stuck: int = 4
    when_full: str = "wait"
    wait_timeout: float | None = 600.0
    stall_after: float = 10.0
    stall_timeout: float | None = 300.0
    cancel_grace: float = 10.0
    min_residency: float = 5.0
    #: How many failed models stay listed: the newest ones.
    max_failed: int = 100
    #: Seconds before the first restart of a model whose host has died, doubled for each further one; and the
    #: seconds that it has to be ready before the count starts at zero again.
    restart_backoff: float = 1.0
    restart_reset: float = 60.0


@dataclass(slots=True)
class Counters:
    """Counts of events since the manager was made."""

    loads_started: int = 0
    loads_succeeded: int = 0
    loads_failed: int = 0
    loads_cancelled: int = 0
    joined: int = 0
    unloads: int = 0
    evictions: int = 0
    expirations: int = 0
    failures_forgotten: int = 0
    leases: int = 0
    hosts_died: int = 0
    restarts: int = 0


class Machine:
    """All models of one manager. Events enter through :meth:`handle` alone, and only its effects leave.

    Args:
        limits: The limits.
        epoch: Added to the times of events to make seconds since 1970, for snapshots.
    """

    def __init__(self, limits: Limits, epoch: float = 0.0) -> None:
        self.limits = limits
        self.counters = Counters()
        self.closed = False
        self._epoch = epoch
        self._now = 0.0
        self._models: dict[str, Model] = {}
        self._numbers = 0
        self._by_status: dict[ModelStatus, dict[m.Key, Generation]] = {status: {} for status in ModelStatus}
        #: The same mappings for the statuses that occupy a worker, and for those that are neither failed nor stuck.
        self._working = tuple(self._by_status[status] for status in WORKING)
        self._unquiet = tuple(self._by_status[status] for status in ModelStatus if status not in (_S.FAILED, _S.STUCK))
        #: (deadline, key) of idle generations; obsolete entries are skipped when they are due.
        self._expiries: list[tuple[float, m.Key]] = []
        self._charged: dict[str, int] = {}
        self._reserved: dict[str, int] = {}
        self._held_models = 0
        #: Ready generations without leases that are not pinned, least recently used first, and their
        #: bytes together: with a thousand models, a decision must not look at each of them.
        self._idle: dict[m.Key, Generation] = {}
        self._idle_held: dict[str, int] = {}
        #: Ledger -> bytes that all models together may take. Empty until memory was sampled.
        self._capacity: dict[str, int] = {}
        self._total: dict[str, int] = {}
        #: The ledgers, or PLACES, that loads wait for.
        self._short: set[str] = set()
        self._effects: list[m.Effect] = []

    # --- events ---------------------------------------------------------------------------------

    def handle(self, event: m.Event) -> list[m.Effect]:
        """Process an event and return the effects to carry out, in order.

        Raises:
            ManagerError: The request is invalid in this state; the state is unchanged.
            InternalError: A worker's event does not match the state; the state is unchanged.
        """
        now, self._now = self._now, max(self._now, event.now)
        try:
            self._process(event)
        except SplitLearnError:
            self._now = now
            raise
        effects, self._effects = self._effects, []
        return effects

    # --- reading --------------------------------------------------------------------------------

    def infos(self) -> tuple[ModelInfo, ...]:
        """Return a snapshot of each model, in the order of their first requests."""
        return tuple([model.info or self._picture(model) for model in self._models.values()])

    def info(self, model_id: str) -> ModelInfo:
        """Return a snapshot of one model; UnknownModelError if there is none."""
        model = self._model(model_id)
        return model.info or self._picture(model)

    def visible(self, model_id: str) -> Generation:
        """Return the generation that a list shows; UnknownModelError if there is none."""
        return self._model(model_id).visible

    def coming(self, model_id: str) -> Generation | None:
        """Return the generation that is on its way, if any."""
        model = self._models.get(model_id)
        return model.coming if model else None

    def wanted(self, model_id: str, *, reload: bool) -> Generation:
        """Return the generation that a request refers to: the one that serves, or the one on its way."""
        shown = self.visible(model_id)
        serves = shown.status is _S.READY and not reload
        return shown if serves else self.coming(model_id) or shown

    def at_work(self) -> int:
        """Count the generations that occupy a worker; may be called from any thread."""
        return sum(map(len, self._working))

    def knows(self, model_id: str) -> bool:
        """Return whether a model has any generation."""
        return model_id in self._models

    def find(self, key: m.Key) -> Generation | None:
        """Return a generation unless it is gone."""
        model = self._models.get(key[0])
        return next((g for g in model.generations if g.number == key[1]), None) if model else None

    def generations(self) -> tuple[Generation, ...]:
        """Return every generation that is not gone."""
        return tuple(g for model in self._models.values() for g in model.generations)

    @property
    def is_quiet(self) -> bool:
        """Whether nothing is loaded, loading or being freed; some may have failed or be stuck."""
        return not any(self._unquiet)

    def picture(self, generation: Generation) -> ModelInfo:
        """Return a snapshot of one generation, whether a list shows it or not."""
        return generation.snapshot(self._now, self._epoch, self.limits.min_residency, reloading=False)

    def keys(self, *statuses: ModelStatus) -> tuple[m.Key, ...]:
        """Return the generations in any of these statuses."""
        return tuple(key for status in statuses for key in self._by_status[status])

    def charged(self, ledger: str) -> int:
        return self._charged.get(ledger, 0)

    def ledgers(self) -> dict[str, LedgerInfo]:
        """Return the budgets of memory that were sampled or are in use."""
        names = sorted({*self._capacity, *self._charged, *self._reserved})
        return {
            name: LedgerInfo(self._capacity.get(name, 0), self._charged.get(name, 0), self._reserved.get(name, 0))
            for name in names
        }

    def counts(self) -> dict[str, int]:
        """Count the models by status."""
        return dict(Counter(str(info.status) for info in self.infos()))

    def violations(self) -> list[str]:
        """Return the invariants that do not hold: none unless there is a bug. For tests and debuggers."""
        return [problem for problem in self._problems() if problem]

    def _model(self, model_id: str) -> Model:
        model = self._models.get(model_id)
        if model is None:
            known = ", ".join(sorted(self._models)[:8]) or "none"
            raise UnknownModelError(f"there is no model {model_id!r} here", hint=f"these are here: {known}")
        return model

    def _picture(self, model: Model) -> ModelInfo:
        reloading = model.serving is not None and model.coming is not None
        model.info = model.visible.snapshot(self._now, self._epoch, self.limits.min_residency, reloading=reloading)
        return model.info

    @singledispatchmethod
    def _process(self, event: m.Event) -> None:
        """Process an event of one class."""
        raise InternalError(f"there are no events of class {type(event).__name__}", hint="please report this")

    # --- requests -------------------------------------------------------------------------------

    @_process.register
    def _load_requested(self, event: m.LoadRequested) -> None:
        self._refuse_if_closed()
        model = self._models.get(event.model_id)
        current = (model.serving or model.coming) if model else None
        if event.reload:
            self._check_reload(event.model_id)
        elif current is not None:
            self._join(event, current)
            return
        if self._is_crowded():
            stuck = self._by_status[_S.STUCK]
            raise ModelNotReadyError(
                f"{len(stuck)} workers are stuck and no load can start ({', '.join(key[0] for key in stuck)})",
                hint="get_statistics().stuck shows their stacks; restart the process",
            )
        if model is not None:
            model.restarts = 0
        self._begin(event.model_id, event.request)
        self._schedule()

    def _check_reload(self, model_id: str) -> None:
        shown = self._model(model_id).visible
        if self.coming(model_id) is not None:
            raise DuplicateModelError(
                f"model {model_id!r} is loading already", hint="wait for it, or cancel_load() it first"
            )
        if shown.status not in (_S.READY, _S.FAILED):
            raise ModelNotReadyError(
                f"model {model_id!r} is {shown.status} and cannot be reloaded",
                hint="load_model() it once it is gone",
            )

    def _join(self, event: m.LoadRequested, current: Generation) -> None:
        if not event.join:
            raise DuplicateModelError(
                f"model {event.model_id!r} is {'loading' if current.is_loading else 'loaded'} already",
                hint="use ensure_model() to take it as it is, or reload_model() to load it again",
            )
        if current.request.fingerprint != event.request.fingerprint:
            raise DuplicateModelError(
                f"model {event.model_id!r} is {current.status} with another configuration",
                hint="give this configuration another model_id, or reload_model(id, config) to replace it",
            )
        if current.is_loading:
            current.waiters += 1
            self.counters.joined += 1
            self._touch(current)

    def _begin(self, model_id: str, request: m.LoadRequest, *, is_restart: bool = False) -> None:
        model = self._models.setdefault(model_id, Model())
        self._numbers += 1
        generation = Generation(
            model_id,
            self._numbers,
            request,
            requested_at=self._now,
            order=self._numbers,
            since=self._now,
            active_at=self._now,
            waiters=0 if is_restart else 1,
            waiting_for=self._no_worker(),
            is_restart=is_restart,
            restarts=model.restarts,
        )
        for failed in [g for g in model.generations if g.status is _S.FAILED]:
            if failed.has_heritage:
                generation.has_heritage = True
                # Before the other is gone.
                self._effects.append(m.Succeeds(generation.key, failed.key))
            self._go(failed, None, "tried again")
        # The end of its last generation has removed it.
        self._models[model_id] = model
        model.generations.append(generation)
        self._by_status[_S.QUEUED][generation.key] = generation
        self.counters.loads_started += 1
        self._touch(generation)
        self._effects.append(m.Changed(generation.key, None, _S.QUEUED, "requested"))

    @_process.register
    def _waiter_joined(self, event: m.WaiterJoined) -> None:
        generation = self._expect(event.key, "is waited for")
        if not generation.resolved:
            generation.waiters += 1
            self._touch(generation)

    @_process.register
    def _waiter_gone(self, event: m.WaiterGone) -> None:
        generation = self.find(event.key)
        if generation is not None and not generation.resolved and generation.waiters:
            generation.waiters -= 1
            self._touch(generation)

    @_process.register
    def _cancel_requested(self, event: m.CancelRequested) -> None:
        model = self._model(event.model_id)
        generation = model.coming
        if generation is None:
            raise ModelNotReadyError(
                f"model {event.model_id!r} is {model.visible.status}, so there is no load to cancel",
                hint="unload_model() frees a ready model",
            )
        self._cancel(generation, None, "cancelled")
        self._schedule()

    def _cancel(self, generation: Generation, verdict: FailureInfo | None, cause: str) -> None:
        """Stop an attempt; with a verdict it ends as a failure, otherwise it is gone."""
        if generation.status in WORKING:
            generation.verdict = verdict
            self._go(generation, _S.CANCELLING, cause)
            self._effects.append(m.StopWorker(generation.key, cause))
        elif verdict is not None:
            self._fail(generation, verdict)
        else:
            self._end_cancelled(generation, cause)

    # --- workers --------------------------------------------------------------------------------

    @_process.register
    def _planned(self, event: m.Planned) -> None:
        generation = self._answered(event.key, "has been planned", _S.PLANNING)
        if generation is not None:
            # A load that takes no memory is a holder too, and the manager's own limit is one more ledger.
            budget = {} if self.limits.max_memory is None else {BUDGET: sum(event.needs.values())}
            generation.needs, generation.keeps = {HOST: 0, **event.needs, **budget}, dict(event.keeps)
            generation.location, generation.dtype = event.location, event.dtype
            self._go(generation, _S.WAITING, "planned")
        self._schedule()

    @_process.register
    def _loaded(self, event: m.Loaded) -> None:
        generation = self._answered(event.key, "has been loaded", _S.LOADING)
        if generation is not None:
            generation.measured, generation.pid = event.measured, event.pid
            if generation.request.warmup:
                self._go(generation, _S.WARMING, "loaded")
                self._effects.append(m.StartWorker(generation.key, m.Job.WARM_UP))
            else:
                self._ready(generation)
        self._schedule()

    @_process.register
    def _warmed_up(self, event: m.WarmedUp) -> None:
        generation = self._answered(event.key, "has been warmed up", _S.WARMING)
        if generation is not None:
            self._ready(generation)
        self._schedule()

    @_process.register
    def _worker_failed(self, event: m.WorkerFailed) -> None:
        generation = self._answered(event.key, "has failed", *WORKING)
        if generation is not None:
            self._effects.append(m.Discard(generation.key))
            self._fail(generation, event.failure)
        self._schedule()

    @_process.register
    def _worker_stopped(self, event: m.WorkerStopped) -> None:
        generation = self._answered(event.key, "has stopped", *WORKING)
        if generation is not None:
            self._effects.append(m.Discard(generation.key))
            # A loader may give up by itself with the error that cancelling raises.
            self._fail(generation, _failure_of(LoadCancelledError("the loader cancelled itself"), generation))
        self._schedule()

    def _answered(self, key: m.Key, what: str, *statuses: ModelStatus) -> Generation | None:
        """Return the generation whose worker has answered; None if it was cancelled before, which ends it now."""
        generation = self._expect(key, what, *statuses, _S.CANCELLING, _S.STUCK)
        if generation.status not in (_S.CANCELLING, _S.STUCK):
            return generation
        # From here on the worker holds nothing.
        self._effects.append(m.Discard(key))
        if generation.status is _S.STUCK:
            self._go(generation, None, "its worker came back")
        elif generation.verdict is not None:
            self._fail(generation, generation.verdict)
        else:
            self._end_cancelled(generation, "cancelled")
        return None

    def _end_cancelled(self, generation: Generation, cause: str) -> None:
        self._resolve(generation, _cancelled(generation))
        self.counters.loads_cancelled += 1
        self._go(generation, None, cause)

    def _ready(self, generation: Generation) -> None:
        if generation.host_failure is not None:
            self._effects.append(m.Discard(generation.key))
            self._fail(generation, generation.host_failure)
            return
        model = self._models[generation.model_id]
        replaced = model.serving
        generation.ready_at = self._now
        # The last report may be older than the last bytes.
        generation.progress = replace(generation.progress, bytes_done=generation.progress.bytes_total)
        model.failures, generation.failure = 0, None
        if replaced is not None:
            # The old one stops serving first, so that two never serve at the same time.
            replaced.drain_deadline = None
            self._drain(replaced, "replaced by a newer generation")
        self._go(generation, _S.READY, "loaded" if generation.status is _S.LOADING else "warm")
        self.counters.loads_succeeded += 1
        self._resolve(generation, None)
        self._watch_expiry(generation)

    def _fail(self, generation: Generation, failure: FailureInfo) -> None:
        failure = self._note_failure(generation, failure)
        self._go(generation, _S.FAILED, failure.message)
        self._resolve(generation, failure)
        model = self._models[generation.model_id]
        if generation is not model.generations[-1]:
            self._go(generation, None, "a newer generation took its place")
        elif model.serving is not None:
            self._go(generation, None, "the older generation serves on")
        elif generation.is_restart:
            self._plan_restart(generation)
        self._forget_oldest_failures()

    def _forget_oldest_failures(self) -> None:
        """Keep the newest failures; of older ones, those of models that are not required are dropped first."""
        failed = self._by_status[_S.FAILED]
        while len(failed) > self.limits.max_failed:
            oldest = min(failed.values(), key=lambda g: (g.request.required, g.restarts_at is not None))
            self.counters.failures_forgotten += 1
            self._effects.append(m.Forgotten(oldest.model_id))
            self._go(oldest, None, f"the newest {self.limits.max_failed} failures are kept")

    def _note_failure(self, generation: Generation, failure: FailureInfo) -> FailureInfo:
        """Count a failed attempt, and record its reason for snapshots."""
        model = self._models[generation.model_id]
        newest = generation is model.generations[-1]
        # The failure of an attempt that is not the newest does not describe the present state of the model.
        model.failures += newest
        stage = failure.stage or generation.stage
        consecutive = max(1, model.failures)
        failure = replace(failure, stage=stage, consecutive=consecutive, at=self._now + self._epoch)
        generation.failure = failure
        self.counters.loads_failed += 1
        serving = model.serving
        if serving is not None and newest:
            # A failed reload changes nothing for holders of the old generation; they see why it failed.
            serving.failure = failure
            self._touch(serving)
        return failure

    # --- hosts ----------------------------------------------------------------------------------

    @_process.register
    def _host_died(self, event: m.HostDied) -> None:
        generation = self.find(event.key)
        if generation is None:
            return
        if generation.status in (_S.LOADING, _S.WARMING):
            # Its worker has yet to answer.
            generation.host_failure = event.failure
        elif generation.status is _S.DRAINING:
            self.counters.hosts_died += 1
            self._unload(generation, event.failure.message)
        elif generation.status is _S.READY:
            self.counters.hosts_died += 1
            self._lose(generation, event)
        self._schedule()

    def _lose(self, generation: Generation, event: m.HostDied) -> None:
        """End a serving generation whose host has ended, which freed its memory."""
        model, request = self._models[generation.model_id], generation.request
        broken, generation.leases = generation.leases, 0
        if generation.ready_at is not None and self._now - generation.ready_at >= self.limits.restart_reset:
            model.restarts = 0
        at = self._now + self._epoch
        generation.failure = replace(event.failure, stage=str(_S.READY), consecutive=model.restarts + 1, at=at)
        generation.pid, generation.has_heritage = None, True
        self._go(generation, _S.FAILED, event.failure.message)
        self._effects.append(m.HostLost(generation.key, generation.failure, broken))
        newest = model.generations[-1]
        is_wanted = request.pinned or request.required or broken > 0 or event.has_sessions
        if newest is not generation:
            # A waiting reload takes over, and is retried if a restart was due; one that is being cancelled
            # only leaves the reason.
            newest.has_heritage, newest.is_restart = True, newest.is_restart or is_wanted
            if newest.status is _S.CANCELLING and newest.verdict is None:
                newest.verdict = generation.failure
            self._effects.append(m.Succeeds(newest.key, generation.key))
            self._go(generation, None, "a newer generation took its place")
        elif is_wanted:
            self._plan_restart(generation)
        self._forget_oldest_failures()

    def _plan_restart(self, generation: Generation) -> None:
        """Decide whether and when a model whose host has died is restarted."""
        model, failure = self._models[generation.model_id], generation.failure
        if self.closed or failure is None or not failure.retryable:
            return
        if model.restarts >= generation.request.restart_limit:
            tried = f"it was started again {model.restarts} times in a row; " if model.restarts else ""
            generation.failure = replace(failure, hint=f"{tried}load it again with ensure_model(); {failure.hint}")
        else:
            delay = self.limits.restart_backoff * 2.0 ** min(model.restarts, _MAX_DOUBLINGS)
            generation.restarts_at = self._now + delay
        self._touch(generation)

    def _watch_failed(self, generation: Generation) -> None:
        if generation.restarts_at is None or self._now < generation.restarts_at or self._is_crowded():
            return
        self._models[generation.model_id].restarts += 1
        self.counters.restarts += 1
        self._begin(generation.model_id, generation.request, is_restart=True)

    def _is_crowded(self) -> bool:
        """Whether so many workers are stuck that no load can start."""
        return len(self._by_status[_S.STUCK]) >= self.limits.max_stuck + self.limits.max_workers

    def _expect(self, key: m.Key, what: str, *statuses: ModelStatus) -> Generation:
        generation = self.find(key)
        if generation is None or (statuses and generation.status not in statuses):
            status = generation.status if generation else "gone"
            raise InternalError(f"generation {key[1]} of {key[0]!r} {what}, but it is {status}")
        return generation

    # --- leases ---------------------------------------------------------------------------------

    @_process.register
    def _lease_taken(self, event: m.LeaseTaken) -> None:
        self._refuse_if_closed()
        model = self._model(event.model_id)
        if model.serving is None:
            status, failure = model.visible.status, model.visible.failure
            if status is _S.FAILED and failure is not None:
                was_ready, restart = model.visible.ready_at is not None, model.visible.restarts_at
                hint = failure.hint or "load it again with load_model() or ensure_model()"
                raise ModelNotReadyError(
                    f"model {event.model_id!r} failed{'' if was_ready else ' to load'}: {failure.message}",
                    hint=hint if restart is None else f"it is started again in {restart - self._now:.1f} s; {hint}",
                )
            going = status in (_S.DRAINING, _S.UNLOADING, _S.STUCK, _S.CANCELLING)
            raise ModelNotReadyError(
                f"model {event.model_id!r} is {status}",
                hint="load it again with ensure_model()" if going else "await ensure_model(config) first",
            )
        self._lend(model.serving)
        self.counters.leases += 1

    @_process.register
    def _call_started(self, event: m.CallStarted) -> None:
        generation = self.find(event.key)
        in_use = generation is not None and generation.status is _S.DRAINING and generation.leases > 0
        if generation is None or not (generation.status is _S.READY or in_use):
            raise ModelGoneError(
                f"this generation of model {event.key[0]!r} is gone",
                hint="take a new lease; unload_model(..., force=True) and reload_model() end old ones",
            )
        self._lend(generation)

    def _lend(self, generation: Generation) -> None:
        self._set_idle(generation, idle=False)
        generation.leases += 1
        self._touch(generation)

    @_process.register
    def _lease_released(self, event: m.LeaseReleased) -> None:
        generation = self.find(event.key)
        if generation is None or generation.status not in (_S.READY, _S.DRAINING) or not generation.leases:
            return
        generation.leases -= 1
        generation.last_used_at = self._now
        self._touch(generation)
        if generation.leases:
            return
        if generation.status is _S.DRAINING:
            self._unload(generation, "the last lease was given back")
        else:
            self._set_idle(generation, idle=True)
            self._watch_expiry(generation)
        # Not at each call of each model: other calls cannot help waiting loads.
        if has_any(generation.held, self._short):
            self._schedule()

    # --- unloading ------------------------------------------------------------------------------

    @_process.register
    def _unload_requested(self, event: m.UnloadRequested) -> None:
        model = self._model(event.model_id)
        generation = model.visible
        status = generation.status
        if status is _S.FAILED:
            self._go(generation, None, "forgotten")
            return
        if model.coming is not None:
            raise ModelNotReadyError(
                f"model {event.model_id!r} is {'reloading' if model.serving else 'loading'}",
                hint="cancel_load() it first",
            )
        if status is _S.DRAINING and event.force:
            self._unload(generation, "unload forced")
            return
        if status is not _S.READY:
            already = status in (_S.DRAINING, _S.UNLOADING)
            raise ModelNotReadyError(
                f"model {event.model_id!r} is {'being unloaded already' if already else status}",
                hint="wait until it is gone"
                if already or status is _S.CANCELLING
                else "its worker does not stop, and its memory stays taken until the process ends",
            )
        generation.drain_deadline = None if event.drain_timeout is None else self._now + event.drain_timeout
        self._drain(generation, "unload requested", force=event.force)

    def _drain(self, generation: Generation, cause: str, *, force: bool = False) -> None:
        if generation.leases and not force:
            self._go(generation, _S.DRAINING, cause)
        else:
            self._unload(generation, cause)

    def _unload(self, generation: Generation, cause: str) -> None:
        broken, generation.leases = generation.leases, 0
        self._go(generation, _S.UNLOADING, cause)
        self._effects.append(m.StartUnload(generation.key, broken))

    @_process.register
    def _unloaded(self, event: m.Unloaded) -> None:
        generation = self._expect(event.key, "has been unloaded", _S.UNLOADING)
        self.counters.unloads += 1
        self._go(generation, None, "freed")
        self._schedule()

    @_process.register
    def _unload_failed(self, event: m.UnloadFailed) -> None:
        generation = self._expect(event.key, "could not be unloaded", _S.UNLOADING)
        at = self._now + self._epoch
        generation.failure = FailureInfo(
            "InternalError", event.reason, "restart the process", "unloading", False, at=at
        )
        self._go(generation, _S.STUCK, event.reason)

    @_process.register
    def _close_requested(self, event: m.CloseRequested) -> None:
        self.closed = True
        for generation in self.generations():
            if generation.is_loading:
                self._cancel(generation, None, "the manager is closing")
            elif generation.status is _S.READY:
                generation.drain_deadline = None
                self._drain(generation, "the manager is closing", force=event.force)
            elif generation.status is _S.DRAINING:
                generation.drain_deadline = None
                if event.force:
                    self._unload(generation, "the manager is closing")
            elif generation.status is _S.FAILED:
                self._go(generation, None, "the manager is closing")

    def _refuse_if_closed(self) -> None:
        if self.closed:
            raise ManagerClosedError("the manager is closed", hint="make a new AsyncModelManager")

    # --- time and memory ------------------------------------------------------------------------

    @_process.register
    def _memory_sampled(self, event: m.MemorySampled) -> None:
        # Free memory excludes the loaded models; the mapped ledger includes them already.
        own = {name: 0 if name == MAPPED else self._charged.get(name, 0) for name in event.free}
        self._capacity = {name: free + own[name] for name, free in event.free.items()}
        self._total = dict(event.total)
        if self.limits.max_memory is not None:
            self._capacity[BUDGET] = self._total[BUDGET] = self.limits.max_memory
        self._schedule()

    @_process.register
    def _tick(self, event: m.Tick) -> None:
        for key, progress in event.progress.items():
            generation = self.find(key)
            if generation is not None and generation.status in WORKING and generation.advance(self._now, progress):
                self._touch(generation)
        for status, watch in self._WATCHES.items():
            for generation in tuple(self._by_status[status].values()):
                watch(self, generation)
        self._expire()
        self._schedule()

    def _watch_waiting(self, generation: Generation) -> None:
        limit = self.limits.wait_timeout
        waited = generation.waited + self._now - generation.since
        if limit is None or waited < limit:
            return
        why = generation.waiting_for or f"no worker of {self.limits.max_workers} was free"
        error = WaitTimeoutError(
            f"model {generation.model_id!r} waited {waited:.0f} s and may wait {limit:.0f} s: {why}",
            hint="unload something, raise wait_timeout, or try again later",
        )
        self._cancel(generation, _failure_of(error, generation, retryable=True), "waited too long")

    def _watch_worker(self, generation: Generation) -> None:
        # The rate and the time left change at every tick.
        self._touch(generation)
        still = self._now - generation.active_at
        generation.stalled = still >= self.limits.stall_after
        limit = self.limits.stall_timeout
        if limit is None or still < limit:
            return
        at = generation.progress
        where = f" of {at.file}" if at.file else ""
        error = LoadStalledError(
            f"loading model {generation.model_id!r} made no progress for {still:.0f} s, "
            f"{at.stage or generation.status}{where}, after {at.bytes_done} of {at.bytes_total} bytes",
            hint="check the disk and the network; raise stall_timeout if they are only slow",
        )
        self._cancel(generation, _failure_of(error, generation, retryable=True), "stalled")

    def _watch_cancelling(self, generation: Generation) -> None:
        if self._now - generation.since < self.limits.cancel_grace:
            return
        hint = "its memory stays taken until the worker comes back; get_statistics().stuck shows its stack"
        if generation.verdict is None:
            failure = _cancelled(generation)
            self.counters.loads_cancelled += 1
        else:
            failure = self._note_failure(generation, generation.verdict)
        generation.failure = replace(failure, hint=hint, at=self._now + self._epoch)
        self._go(generation, _S.STUCK, "its worker did not stop in time")
        self._resolve(generation, failure)

    def _watch_draining(self, generation: Generation) -> None:
        if generation.drain_deadline is None or self._now < generation.drain_deadline:
            return
        generation.drain_deadline = None
        newer = [g for g in self._models[generation.model_id].generations if g.number > generation.number]
        # If a newer generation serves, or did, this one keeps draining.
        if not any(g.status in (_S.READY, _S.DRAINING, _S.UNLOADING) for g in newer):
            self._go(generation, _S.READY, "holders did not give it back in time")
            for failed in [g for g in newer if g.status is _S.FAILED]:
                generation.failure = failed.failure
                self._go(failed, None, "the older generation serves on")
        self._effects.append(m.DrainEnded(generation.key, generation.leases))

    def _watch_expiry(self, generation: Generation) -> None:
        moment = generation.expires_at(self.limits.min_residency)
        # One entry for each generation: use only moves the deadline.
        if moment is not None and not generation.watched:
            generation.watched = True
            heapq.heappush(self._expiries, (moment, generation.key))
            if len(self._expiries) > 2 * len(self._models) + _MAX_OBSOLETE:
                # Drop the entries of models that are gone, which would only be skipped once they are due.
                self._expiries = [entry for entry in self._expiries if self.find(entry[1])]
                heapq.heapify(self._expiries)

    def _expire(self) -> None:
        due: list[Generation] = []
        while self._expiries and self._expiries[0][0] <= self._now:
            generation = self.find(heapq.heappop(self._expiries)[1])
            if generation is not None:
                generation.watched = False
                due.append(generation)
        for generation in due:
            moment = generation.expires_at(self.limits.min_residency)
            # While it is reloaded it keeps serving, idle or not.
            if moment is not None and moment <= self._now and self.coming(generation.model_id) is None:
                self.counters.expirations += 1
                self._unload(generation, "it was not used for its keep_alive")
            else:
                self._watch_expiry(generation)

    # --- admission ------------------------------------------------------------------------------

    def _schedule(self) -> None:
        """Start the loads that can start: first planned ones that have room, then queued ones."""
        short: set[str] = set()
        ahead: dict[str, int] = {}
        waiting = self._by_status[_S.WAITING]
        if waiting:
            self._resolve_deadlocks()
        for generation in sorted(waiting.values(), key=lambda g: g.rank) if waiting else ():
            self._consider(generation, short, ahead)
        self._short = short
        # In order of arrival: nothing enters this status a second time.
        for generation in tuple(self._by_status[_S.QUEUED].values()):
            if not self._has_free_worker():
                return
            self._go(generation, _S.PLANNING, "a worker is free")
            self._effects.append(m.StartWorker(generation.key, m.Job.PLAN))

    def _resolve_deadlocks(self) -> None:
        """Ensure that no load waits for memory that only loads behind it could release.

        A generation that is to be replaced serves until its reload is ready, or, if it may be evicted, until
        a load before the reload needs its memory. A pinned generation cannot be evicted, so its reload goes before
        the loads that need its memory. If all such reloads need the memory of each other, the last is refused.
        """
        waiting = self._by_status[_S.WAITING]
        for generation in waiting.values():
            generation.goes_before = None
        if not self._capacity:
            return
        while reloads := [g for g in waiting.values() if (old := self._serving_of(g)) and old.request.pinned]:
            if any(not self._waits_for_a_reload(g, reloads, for_good=True) for g in reloads):
                break
            last = max(reloads, key=lambda g: g.order)
            others = ", ".join(sorted(g.model_id for g in reloads if g is not last)[:NAMED])
            reason = f"it needs memory of pinned models that wait for their own reload: {others}"
            self._refuse(last, reason, retryable=True)
        behind = [g for g in waiting.values() if reloads and self._waits_for_a_reload(g, reloads)]
        place = min((g.order for g in behind), default=math.inf)
        for generation in reloads:
            if generation not in behind and place < generation.order:
                generation.goes_before = int(place)

    def _waits_for_a_reload(
        self, generation: Generation, reloads: Iterable[Generation], *, for_good: bool = False
    ) -> bool:
        """Return whether a load cannot fit until a waiting reload of another model has replaced a pinned generation.

        Args:
            generation: The load.
            reloads: The waiting reloads of pinned models.
            for_good: Whether the memory of stuck workers and of other processes counts as free, as it may become.
        """
        own = self._serving_of(generation)
        others = [old for g in reloads if g is not generation and (old := self._serving_of(g))]
        # Pinned models that are loading will hold what they keep; the generations that they replace will be freed.
        coming = [g for s in (_S.LOADING, _S.WARMING) for g in self._by_status[s].values() if g.request.pinned]
        replaced = [self._serving_of(g) for g in coming]
        ready = [g for g in self._by_status[_S.READY].values() if g.request.pinned and g not in replaced]
        staying = [g.held for g in ready if g is not own] + [g.held_in(_S.READY) for g in coming]
        if own is not None:
            staying.append(own.held)
        if not for_good:
            staying += [g.held for g in self._by_status[_S.STUCK].values() if g.held]
        most = self._total if for_good else self._capacity
        paging = generation.request.allow_paging
        short = lacks_even_without(generation.needs, most, staying, allow_paging=paging)
        no_place = own is None and self.limits.max_models is not None and len(staying) >= self.limits.max_models
        return bool(others) and (no_place or any(old.held.get(name) for old in others for name in short))

    def _serving_of(self, generation: Generation) -> Generation | None:
        """Return the generation that serves until this one is ready, if any."""
        return self._models[generation.model_id].serving

    def _consider(self, generation: Generation, short: set[str], ahead: dict[str, int]) -> None:
        """Admit a planned generation, or record why it waits.

        ``short`` collects the ledgers, or PLACES, that an earlier load waits for: later loads must not take
        from them, or a large load would starve while small ones pass it. ``ahead`` collects what earlier
        loads will take of the other ledgers: later loads may have the rest.
        """
        needs = generation.needs
        if not self._capacity:
            self._set_waiting_for(generation, "memory has not been measured yet")
            return
        if short & {PLACES, *(name for name, count in needs.items() if count)}:
            self._set_waiting_for(generation, "earlier loads wait for memory too")
            _add(ahead, needs)
            return
        verdict = decide(
            needs,
            self._room(generation, ahead),
            (Tenant(g.key, g.held) for g in self._by_status[_S.UNLOADING].values()),
            Idle(self._evictable(generation), len(self._idle), self._idle_held),
            self._holders,
            allow_paging=generation.request.allow_paging,
        )
        full = isinstance(verdict, Wait) and not verdict.soon and self.limits.when_full == "refuse"
        if isinstance(verdict, Refuse) or (isinstance(verdict, Wait) and full):
            self._refuse(generation, verdict.reason, retryable=isinstance(verdict, Wait))
            return
        if isinstance(verdict, Evict):
            for key in verdict.victims:
                victim = self._expect(key, "is to be evicted", _S.READY)
                self.counters.evictions += 1
                self._unload(victim, f"evicted for {generation.model_id}")
            names = ", ".join(key[0] for key in verdict.victims)
            verdict = Wait(f"waiting for {names} to be freed", verdict.short)
        if isinstance(verdict, Wait):
            short |= verdict.short
            _add(ahead, needs)
            self._set_waiting_for(generation, verdict.reason)
        elif not self._has_free_worker():
            _add(ahead, needs)
            self._set_waiting_for(generation, self._no_worker())
        else:
            self._go(generation, _S.LOADING, "admitted")
            self._effects.append(m.StartWorker(generation.key, m.Job.LOAD))

    # A decision iterates these only as far as it has to: there may be a thousand models.

    def _evictable(self, gainer: Generation) -> Iterator[Tenant]:
        """Yield the generations that may be evicted: idle, past min_residency, and not protected by a reload."""
        for generation in self._idle.values():
            if generation.ready_at is None or self._now - generation.ready_at < self.limits.min_residency:
                continue
            reload = self._reload_of(generation)
            # A reload that waits behind the gainer cannot go first, so waiting for it gains nothing.
            if reload is None or (reload.status is _S.WAITING and reload.rank > gainer.rank):
                yield Tenant(generation.key, generation.held, reloading=reload is not None)

    def _holders(self, short: Collection[str]) -> Iterator[Tenant]:
        """Yield the holders of what is short that are not being freed, for messages."""
        for status in (_S.DRAINING, _S.READY, _S.LOADING, _S.WARMING, _S.CANCELLING, _S.STUCK):
            for g in self._by_status[status].values():
                if has_any(g.held, short):
                    reloading = status is _S.READY and self._reload_of(g) is not None
                    yield Tenant(
                        g.key,
                        g.held,
                        leases=g.leases,
                        pinned=g.request.pinned,
                        loading=status in RESERVED,
                        reloading=reloading,
                        stuck=status is _S.STUCK,
                    )

    def _room(self, generation: Generation, ahead: Mapping[str, int]) -> Room:
        available = {
            name: capacity - self._charged.get(name, 0) - self._reserved.get(name, 0) - ahead.get(name, 0)
            for name, capacity in self._capacity.items()
        }
        limit = self.limits.max_models
        # A reload is not an additional model: it takes the place of the generation that serves until then.
        replaced = self._models[generation.model_id].serving
        places = None if limit is None else limit - self._held_models + (replaced is not None)
        # The generation that it replaces stays until it is ready, so the two must fit together.
        kept = {} if replaced is None else replaced.held
        total = {name: count - kept.get(name, 0) for name, count in self._total.items()}
        return Room(total, available, places)

    def _reload_of(self, generation: Generation) -> Generation | None:
        """Return the load that is to replace a generation that serves, if any."""
        model = self._models[generation.model_id]
        return model.coming if len(model.generations) > 1 else None

    def _refuse(self, generation: Generation, reason: str, *, retryable: bool) -> None:
        reloads = self._models[generation.model_id].serving is not None
        also = " next to the generation that serves until then" if reloads and not retryable else ""
        if retryable:
            hint = "unload something, or try again later"
        elif reloads:
            hint = "unload_model() it first, then load it again"
        elif generation.needs.get(BUDGET, 0) > self._total.get(BUDGET, math.inf):
            hint = "raise the manager's max_memory_mb, or ask for fewer layers or a smaller dtype"
        else:
            hint = "ask for fewer layers, a smaller dtype, or a machine with more memory"
        error = InsufficientMemoryError(f"model {generation.model_id!r} does not fit{also}: {reason}", hint=hint)
        self._fail(generation, _failure_of(error, generation, retryable=retryable))

    def _has_free_worker(self) -> bool:
        stuck = len(self._by_status[_S.STUCK])
        return self.at_work() + max(0, stuck - self.limits.max_stuck) < self.limits.max_workers

    def _no_worker(self) -> str:
        return f"waiting for a worker, {self.limits.max_workers} are at work"

    def _set_waiting_for(self, generation: Generation, reason: str) -> None:
        if generation.waiting_for != reason:
            generation.waiting_for = reason
            self._touch(generation)

    # --- bookkeeping ----------------------------------------------------------------------------

    def _go(self, generation: Generation, after: ModelStatus | None, cause: str) -> None:
        """Change a status, the ledgers and the index together; statuses change nowhere else."""
        before = generation.status
        if after not in TRANSITIONS[before]:
            raise InternalError(f"generation {generation.number} of {generation.model_id!r}: {before} to {after}")
        if before is _S.READY:
            self._set_idle(generation, idle=False)
        self._account(generation, -1)
        if before is _S.QUEUED or before is _S.WAITING:
            generation.waited += self._now - generation.since
        generation.since = generation.active_at = self._now
        generation.stalled = False
        if after is None:
            self._remove(generation)
        else:
            del self._by_status[before][generation.key]
            self._by_status[after][generation.key] = generation
            generation.status = after
            generation.held = generation.held_in(after)
            self._account(generation, +1)
            if after is _S.READY and not generation.leases:
                self._set_idle(generation, idle=True)
        if after is not _S.WAITING:
            generation.waiting_for = ""
        self._touch(generation)
        self._effects.append(m.Changed(generation.key, before, after, cause))

    def _remove(self, generation: Generation) -> None:
        model = self._models[generation.model_id]
        model.generations.remove(generation)
        del self._by_status[generation.status][generation.key]
        if model.generations:
            self._touch(model.visible)
        else:
            del self._models[generation.model_id]
        released = {name: count for name, count in generation.held.items() if count and name != BUDGET}
        generation.held = {}
        self._effects.append(m.Gone(generation.key, released))

    def _account(self, generation: Generation, sign: int) -> None:
        if not generation.held:
            return
        ledger = self._charged if generation.status in CHARGED else self._reserved
        self._held_models += sign
        _add(ledger, generation.held, sign)

    def _set_idle(self, generation: Generation, *, idle: bool) -> None:
        """Mark a generation as idle or not; one that is marked again becomes the most recently used."""
        if self._idle.pop(generation.key, None) is not None:
            _add(self._idle_held, generation.held, -1)
        if idle and not generation.request.pinned:
            self._idle[generation.key] = generation
            _add(self._idle_held, generation.held)

    def _resolve(self, generation: Generation, failure: FailureInfo | None) -> None:
        if not generation.resolved:
            generation.resolved, generation.waiters = True, 0
            self._touch(generation)
            self._effects.append(m.Resolve(generation.key, failure))

    def _touch(self, generation: Generation) -> None:
        """Discard the snapshot of the model."""
        model = self._models.get(generation.model_id)
        if model is not None:
            model.info = None

    def _problems(self) -> Iterable[str]:
        idle = [g for g in self.generations() if g.status is _S.READY and not g.leases and not g.request.pinned]
        yield "the set of idle models is wrong" if {g.key for g in idle} != self._idle.keys() else ""
        together: dict[str, int] = {}
        for g in idle:
            _add(together, g.held)
        wrong = {n for n in {*together, *self._idle_held} if together.get(n, 0) != self._idle_held.get(n, 0)}
        yield f"the memory of idle models is wrong: {sorted(wrong)}" if wrong else ""
        charged: dict[str, int] = {}
        reserved: dict[str, int] = {}
        for model_id, model in self._models.items():
            yield f"{model_id} has no generation" if not model.generations else ""
            yield f"{model_id} has two that serve" if sum(g.status is _S.READY for g in model.generations) > 1 else ""
            yield f"{model_id} has two loads on their way" if sum(g.is_loading for g in model.generations) > 1 else ""
            numbers = [g.number for g in model.generations]
            yield f"{model_id} has generations out of order" if numbers != sorted(set(numbers)) else ""
            stale = any(g.status is _S.FAILED and (model.serving or g.number < numbers[-1]) for g in model.generations)
            yield f"{model_id} has a failed generation next to a newer or serving one" if stale else ""
            for g in model.generations:
                yield from (f"{model_id}/{g.number} ({g.status}): {problem}" for problem in g.violations() if problem)
                ledger = charged if g.status in CHARGED else reserved
                for name, count in g.held.items():
                    ledger[name] = ledger.get(name, 0) + count
        for title, counted, kept in (("charged", charged, self._charged), ("reserved", reserved, self._reserved)):
            differ = {n for n in {*counted, *kept} if counted.get(n, 0) != kept.get(n, 0)}
            yield f"{title} {sorted(differ)}: {kept} kept, {counted} counted" if differ else ""

    _WATCHES: ClassVar[Mapping[ModelStatus, Callable[[Machine, Generation], None]]] = {
        _S.QUEUED: _watch_waiting,
        _S.WAITING: _watch_waiting,
        _S.PLANNING: _watch_worker,
        _S.LOADING: _watch_worker,
        _S.WARMING: _watch_worker,
        _S.CANCELLING: _watch_cancelling,
        _S.DRAINING: _watch_draining,
        _S.FAILED: _watch_failed,
    }


def _cancelled(generation: Generation) -> FailureInfo:
    error = LoadCancelledError(f"loading model {generation.model_id!r} was cancelled", hint="load it again")
    return _failure_of(error, generation, retryable=True)


def _failure_of(error: SplitLearnError, generation: Generation, *, retryable: bool = False) -> FailureInfo:
    return FailureInfo(type(error).__name__, error.message, error.hint, generation.stage, retryable)


def _add(ledger: dict[str, int], bytes_of: Mapping[str, int], sign: int = 1) -> None:
    for name, count in bytes_of.items():
        ledger[name] = ledger.get(name, 0) + sign * count
