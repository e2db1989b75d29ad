"""Attempts to load a model, each from its request until its memory is free again, and their statuses.

An attempt is called a generation of the model. Generations pass through::

    QUEUED -> PLANNING -> WAITING -> LOADING -> [WARMING] -> READY -> DRAINING -> UNLOADING -> (gone)
       |         |           |          |           |          ^ |       |
       |         +-----------+----------+-----------+          +-|-------+  holders kept it
       |         |  failed: FAILED    cancelled or stalled: CANCELLING -> (gone) or FAILED
       +---------+                    no answer: STUCK -> (gone) |
                                                                 +--> FAILED  its host died

``held`` of LOADING, WARMING and CANCELLING generations is reserved memory; of READY, DRAINING, UNLOADING and
STUCK ones it is filled memory. No other generation holds anything.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from splitlearn_core.manager.admission import BUDGET
from splitlearn_core.manager.loaders.loadable import HOST
from splitlearn_core.manager.messages import Key, LoadRequest
from splitlearn_core.manager.status import FailureInfo, ModelInfo, ModelStatus
from splitlearn_core.types import Progress

_S = ModelStatus

#: The statuses that may follow each status; None is a generation that no longer exists.
TRANSITIONS: Mapping[ModelStatus, frozenset[ModelStatus | None]] = {
    _S.QUEUED: frozenset({_S.PLANNING, _S.FAILED, None}),
    _S.PLANNING: frozenset({_S.WAITING, _S.FAILED, _S.CANCELLING}),
    _S.WAITING: frozenset({_S.LOADING, _S.FAILED, None}),
    _S.LOADING: frozenset({_S.WARMING, _S.READY, _S.FAILED, _S.CANCELLING}),
    _S.WARMING: frozenset({_S.READY, _S.FAILED, _S.CANCELLING}),
    _S.CANCELLING: frozenset({_S.FAILED, _S.STUCK, None}),
    _S.READY: frozenset({_S.DRAINING, _S.UNLOADING, _S.FAILED}),
    _S.DRAINING: frozenset({_S.READY, _S.UNLOADING}),
    _S.UNLOADING: frozenset({_S.STUCK, None}),
    _S.FAILED: frozenset({None}),
    _S.STUCK: frozenset({None}),
}
#: Statuses in which memory is reserved for a generation, but not filled for good.
RESERVED = frozenset({_S.LOADING, _S.WARMING, _S.CANCELLING})
#: Statuses in which a generation's memory is filled.
CHARGED = frozenset({_S.READY, _S.DRAINING, _S.UNLOADING, _S.STUCK})
#: Statuses in which a worker is at work for it.
WORKING = frozenset({_S.PLANNING, _S.LOADING, _S.WARMING, _S.CANCELLING})

#: Seconds over which the rate is taken.
_RATE_WINDOW = 5.0
#: A rate over less time than this is meaningless.
_RATE_MINIMUM = 0.2


@dataclass(slots=True, eq=False)
class Generation:
    """The state of one attempt. Only the machine changes it."""

    model_id: str
    number: int
    request: LoadRequest
    requested_at: float
    #: Position in the queue.
    order: int
    status: ModelStatus = _S.QUEUED
    #: When it entered its status.
    since: float = 0.0
    #: Ledger -> bytes. Reserved while loading (the peak), filled once loaded (what is kept).
    held: Mapping[str, int] = field(default_factory=dict)
    #: Ledger -> bytes of the plan: at the peak, and once loaded.
    needs: Mapping[str, int] = field(default_factory=dict)
    keeps: Mapping[str, int] = field(default_factory=dict)
    #: Callers that wait for it to be ready. None are left once it is resolved.
    waiters: int = 0
    resolved: bool = False
    #: Never below 0; above 0 only while READY or DRAINING.
    leases: int = 0
    progress: Progress = field(default_factory=lambda: Progress(""))
    #: When bytes, stage or file last changed.
    active_at: float = 0.0
    stalled: bool = False
    waiting_for: str = ""
    #: The order of the earlier load before which it is considered, since that load waits for its end.
    goes_before: int | None = None
    #: Seconds spent waiting for a worker or for room, before the present wait.
    waited: float = 0.0
    location: str = ""
    dtype: str = ""
    measured: int | None = None
    #: When it became ready, and when its last lease was released.
    ready_at: float | None = None
    last_used_at: float | None = None
    #: When draining is given up; None for never.
    drain_deadline: float | None = None
    #: The failure that a cancelled attempt ends with; None where the cancellation was requested.
    verdict: FailureInfo | None = None
    #: Why it failed, or, on a generation that serves, why its reload failed.
    failure: FailureInfo | None = None
    #: The process that it runs in; None where that is this one.
    pid: int | None = None
    #: Why its host has died before its worker has answered.
    host_failure: FailureInfo | None = None
    #: Whether it was started by the restart policy, not by a caller; and how many such starts there were in a row.
    is_restart: bool = False
    restarts: int = 0
    #: When, having failed, it is tried again by itself; None for never.
    restarts_at: float | None = None
    #: Whether its host, or an earlier generation's, has died and left sessions to a later generation.
    has_heritage: bool = False
    rates: deque[tuple[float, int]] = field(default_factory=deque)
    #: Whether its expiry is scheduled.
    watched: bool = False
    #: Model and number of the attempt. Stored, since every step needs it.
    key: Key = field(init=False)

    def __post_init__(self) -> None:
        self.key = self.model_id, self.number

    @property
    def is_loading(self) -> bool:
        return self.status.is_loading

    @property
    def rank(self) -> tuple[int, bool, int]:
        """Position among the loads that wait for memory."""
        own = self.goes_before is None
        return self.order if self.goes_before is None else self.goes_before, own, self.order

    @property
    def stage(self) -> str:
        """The stage that its worker reports, or else the status."""
        return (self.progress.stage if self.status in WORKING else "") or str(self.status)

    def held_in(self, status: ModelStatus) -> Mapping[str, int]:
        """Return the memory that it holds after entering a status now."""
        if status is _S.LOADING:
            return self.needs
        if status is _S.READY:
            budget = {BUDGET: sum(self.keeps.values())} if BUDGET in self.needs else {}
            return {HOST: 0, **self.keeps, **budget}
        return self.held if status in RESERVED | CHARGED else {}

    def advance(self, now: float, progress: Progress) -> bool:
        """Store the progress of the worker; return whether there was any."""
        before = self.progress
        if progress == before:
            return False
        restarted = progress.bytes_done < before.bytes_done
        if restarted or (progress.stage, progress.component) != (before.stage, before.component):
            self.rates.clear()
        self.progress = progress
        self.active_at, self.stalled = now, False
        self.rates.append((now, progress.bytes_done))
        while now - self.rates[0][0] > _RATE_WINDOW:
            self.rates.popleft()
        return True

    def rate(self, now: float) -> float | None:
        """Return bytes per second over the last seconds; None after too few reports."""
        if len(self.rates) < 2 or now - self.rates[-1][0] > _RATE_WINDOW:  # noqa: PLR2004  # a difference takes two
            return None
        (begin, first), last = self.rates[0], self.rates[-1][1]
        return (last - first) / (now - begin) if now - begin >= _RATE_MINIMUM and last > first else None

    def expires_at(self, min_residency: float) -> float | None:
        """Return when it expires if it stays idle; None for never, or while it is leased."""
        keep = self.request.keep_alive
        if self.status is not _S.READY or self.leases or self.request.pinned or keep is None:
            return None
        ready = self.ready_at or 0.0
        return max((self.last_used_at or ready) + keep, ready + min_residency)

    def snapshot(self, now: float, epoch: float, min_residency: float, *, reloading: bool) -> ModelInfo:
        """Make a frozen snapshot. ``epoch`` is added to the machine's times to make seconds since 1970."""
        progress, rate = self.progress, self.rate(now) if self.is_loading else None
        left = progress.bytes_total - progress.bytes_done
        working = self.status in WORKING

        def wall(moment: float | None) -> float | None:
            return None if moment is None else moment + epoch

        return ModelInfo(
            model_id=self.model_id,
            status=self.status,
            generation=self.number,
            model_type=self.request.model_type,
            component=self.request.component,
            stage=progress.stage if working else "",
            bytes_done=progress.bytes_done,
            bytes_total=progress.bytes_total,
            rate=rate,
            eta=left / rate if rate and left > 0 else None,
            file=progress.file if working else "",
            waiting_for=self.waiting_for,
            stalled_for=now - self.active_at if self.stalled and working else None,
            waiters=self.waiters,
            leases=self.leases,
            reloading=reloading,
            pinned=self.request.pinned,
            required=self.request.required,
            device=self.request.device,
            dtype=self.dtype,
            location=self.location,
            predicted=dict(self.keeps),
            measured=self.measured,
            host=self.request.host,
            pid=self.pid,
            restarts=self.restarts,
            restarts_at=wall(self.restarts_at),
            requested_at=wall(self.requested_at),
            ready_at=wall(self.ready_at),
            last_used_at=wall(self.last_used_at),
            expires_at=wall(self.expires_at(min_residency)),
            load_seconds=None if self.ready_at is None else self.ready_at - self.requested_at,
            error=self.failure,
        )

    def violations(self) -> Iterator[str]:
        """Yield the invariants that do not hold; an empty text for each that does."""
        yield "leases below 0" if self.leases < 0 else ""
        yield "leased" if self.leases and self.status not in (_S.READY, _S.DRAINING) else ""
        yield "draining without a lease" if self.status is _S.DRAINING and not self.leases else ""
        yield "holds memory" if self.held and self.status not in RESERVED | CHARGED else ""
        yield "holds no memory" if not self.held and self.status in CHARGED - {_S.STUCK} else ""
        yield (
            "failed without a reason"
            if self.status is _S.FAILED and not (self.failure and self.failure.message)
            else ""
        )
        yield (
            "started again although it has not failed"
            if self.restarts_at is not None and self.status is not _S.FAILED
            else ""
        )
        yield "more restarts than allowed" if self.restarts > self.request.restart_limit else ""
        yield "unresolved" if not self.resolved and not (self.is_loading or self.status is _S.CANCELLING) else ""
        yield "waiters after it was resolved" if self.resolved and self.waiters else ""
        yield "more bytes done than in total" if self.progress.bytes_done > self.progress.bytes_total else ""


@dataclass(slots=True)
class Model:
    """An id, and its generations that are not gone, oldest first."""

    generations: list[Generation] = field(default_factory=list)
    #: Attempts that failed in a row.
    failures: int = 0
    #: Restarts in a row after the death of a host.
    restarts: int = 0
    #: The snapshot that a list shows, until something changes.
    info: ModelInfo | None = None

    @property
    def serving(self) -> Generation | None:
        return next((g for g in self.generations if g.status is _S.READY), None)

    @property
    def coming(self) -> Generation | None:
        return next((g for g in self.generations if g.is_loading), None)

    @property
    def visible(self) -> Generation:
        """The generation that a list shows: the one that serves, or else the newest."""
        return self.serving or self.generations[-1]
