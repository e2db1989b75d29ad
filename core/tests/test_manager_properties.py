"""The machine against a small reference of its own, over random lives of four models.

The reference sees only events and effects, and keeps its own account of them. I1 to I33 are the invariants of
the design.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from random import Random
from types import ModuleType
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    INVARIANT_MARKER,
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from splitlearn_core import errors
from splitlearn_core.errors import SplitLearnError
from splitlearn_core.manager import machine as real_machine
from splitlearn_core.manager import messages as m
from splitlearn_core.manager.status import FailureInfo, ModelStatus
from splitlearn_core.types import Progress
from support.long import cases

IDS = ("a", "b", "c", "d")
TOTAL = {"host": 10, "mapped": 12, "cuda:0": 6}
FAILURE = FailureInfo("MemoryError", "no memory", "", "reading", retryable=True)

#: What may follow what, written down a second time.
TABLE = {
    None: {"queued"},
    "queued": {"planning", "failed", None},
    "planning": {"waiting", "failed", "cancelling"},
    "waiting": {"loading", "failed", None},
    "loading": {"warming", "ready", "failed", "cancelling"},
    "warming": {"ready", "failed", "cancelling"},
    "cancelling": {"failed", "stuck", None},
    "ready": {"draining", "unloading", "failed"},
    "draining": {"ready", "unloading"},
    "unloading": {"stuck", None},
    "failed": {None},
    "stuck": {None},
}
COMING = ("queued", "planning", "waiting", "loading", "warming")
AT_WORK = ("planning", "loading", "warming", "cancelling")
PROMISED = ("loading", "warming", "cancelling")

#: Lives that Hypothesis leads, and lives of pure chance.
EXAMPLES, LIVES = cases(450, 40), cases(400, 40)

SETTINGS = settings(
    max_examples=EXAMPLES,
    stateful_step_count=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@dataclasses.dataclass(eq=False)
class Life:
    """What the reference knows of one generation."""

    request: m.LoadRequest
    #: None once it is gone.
    status: str | None = None
    since: float = 0.0
    active: float = 0.0
    waited: float = 0.0
    waiters: int = 1
    outcomes: list[FailureInfo | None] = dataclasses.field(default_factory=list)
    #: What a worker was started for and has not answered yet.
    job: m.Job | None = None
    stop_requested: bool = False
    freeing: bool = False
    #: Loans that somebody has in hand, and those of them that count.
    loans: int = 0
    leases: int = 0
    ready_at: float | None = None
    released_at: float | None = None
    deadline: float | None = None
    needs: Mapping[str, int] = dataclasses.field(default_factory=dict)
    keeps: Mapping[str, int] = dataclasses.field(default_factory=dict)
    held: Mapping[str, int] | None = None
    progress: Progress = dataclasses.field(default_factory=lambda: Progress(""))
    #: Whether its host has died before its worker has answered.
    host_failed: bool = False
    #: Whether it is tried again by itself where it fails, and when that is.
    is_restart: bool = False
    due: float | None = None
    #: Models that go for this one, as long as nothing else has changed what there is.
    victims: set[m.Key] = dataclasses.field(default_factory=set)

    def idle_until(self, min_residency: float) -> float | None:
        """I18: idleness counts from the last release, or from ready."""
        keep = self.request.keep_alive
        if self.status != "ready" or self.leases or self.request.pinned or keep is None or self.ready_at is None:
            return None
        since = self.ready_at if self.released_at is None else self.released_at
        return max(since + keep, self.ready_at + min_residency)


class Reference:
    """An account of everything, kept from the outside."""

    def __init__(self, limits: Any) -> None:
        self.limits = limits
        self.now = 0.0
        self.closed = False
        self.lives: dict[m.Key, Life] = {}
        self.capacity: dict[str, int] = {}
        #: Model -> starts in a row by the restart policy.
        self.restarts: dict[str, int] = {}
        #: Generation -> the request of the one before it, whose host has died.
        self.inherited: dict[m.Key, m.LoadRequest] = {}

    # --- reading

    def there(self, model_id: str | None = None) -> dict[m.Key, Life]:
        return {
            key: life
            for key, life in self.lives.items()
            if life.status is not None and model_id in (None, key[0])
        }  # fmt: skip

    def serving(self, model_id: str) -> m.Key | None:
        return next((key for key, life in self.there(model_id).items() if life.status == "ready"), None)

    def coming(self, model_id: str) -> m.Key | None:
        return next((key for key, life in self.there(model_id).items() if life.status in COMING), None)

    def visible(self, model_id: str) -> m.Key | None:
        return self.serving(model_id) or max(self.there(model_id), default=None, key=lambda key: key[1])

    def used(self, ledger: str, *, promised: bool | None = None) -> int:
        return sum(
            (life.held or {}).get(ledger, 0)
            for life in self.lives.values()
            if promised in (None, life.status in PROMISED)
        )

    def holders(self) -> int:
        return sum(life.held is not None for life in self.lives.values())

    def stuck(self) -> int:
        return sum(life.status == "stuck" for life in self.lives.values())

    # --- what must be refused

    def refusal(self, event: m.Event) -> type[SplitLearnError] | None:
        """Say with which error an event is refused."""
        check = getattr(self, f"_refusal_of_{type(event).__name__}", None)
        return check(event) if check else None

    def _refusal_of_LoadRequested(self, event: m.LoadRequested) -> type[SplitLearnError] | None:  # noqa: N802
        shown, coming, serving = self.visible(event.model_id), self.coming(event.model_id), self.serving(event.model_id)
        crowded = self.stuck() >= self.limits.max_stuck + self.limits.max_workers
        if self.closed:
            return errors.ManagerClosedError
        if event.reload:
            if shown is None:
                return errors.UnknownModelError
            if coming:
                return errors.DuplicateModelError
            return errors.ModelNotReadyError if crowded or self.lives[shown].status not in ("ready", "failed") else None
        if serving or coming:
            same = self.lives[serving or coming].request.fingerprint == event.request.fingerprint
            return None if event.join and same else errors.DuplicateModelError
        return errors.ModelNotReadyError if crowded else None

    def _refusal_of_CancelRequested(self, event: m.CancelRequested) -> type[SplitLearnError] | None:  # noqa: N802
        if self.visible(event.model_id) is None:
            return errors.UnknownModelError
        return None if self.coming(event.model_id) else errors.ModelNotReadyError

    def _refusal_of_LeaseTaken(self, event: m.LeaseTaken) -> type[SplitLearnError] | None:  # noqa: N802
        if self.closed:
            return errors.ManagerClosedError
        if self.visible(event.model_id) is None:
            return errors.UnknownModelError
        return None if self.serving(event.model_id) else errors.ModelNotReadyError

    def _refusal_of_CallStarted(self, event: m.CallStarted) -> type[SplitLearnError] | None:  # noqa: N802
        return None if self.lives[event.key].status in ("ready", "draining") else errors.ModelGoneError

    def _refusal_of_UnloadRequested(self, event: m.UnloadRequested) -> type[SplitLearnError] | None:  # noqa: N802
        shown = self.visible(event.model_id)
        if shown is None:
            return errors.UnknownModelError
        status = self.lives[shown].status
        if status == "failed" or (status == "draining" and event.force):
            return None
        return None if status == "ready" and not self.coming(event.model_id) else errors.ModelNotReadyError

    def _refusal_of_WaiterJoined(self, event: m.WaiterJoined) -> type[SplitLearnError] | None:  # noqa: N802
        return None if self.lives[event.key].status else errors.InternalError

    # --- taking in

    def take(self, event: m.Event, effects: Iterable[m.Effect]) -> None:
        """Record an event and its effects, and fail on effects that are not allowed."""
        self.now = max(self.now, event.now)
        note = getattr(self, f"_note_{type(event).__name__}", None)
        if note:
            note(event)
        admitted: list[m.Key] = []
        evicted: list[tuple[m.Key, str]] = []
        waiting = {key for key, life in self.lives.items() if life.status == "waiting"}
        waiting |= {event.key} if isinstance(event, m.Planned) else set()
        for effect in effects:
            if isinstance(effect, m.Changed):
                self._changed(event, effect, evicted)
                if effect.after is ModelStatus.LOADING:
                    admitted.append(effect.key)
            else:
                getattr(self, f"_effect_{type(effect).__name__}")(event, effect)
        if admitted:
            for life in self.lives.values():
                life.victims.clear()
            self._check_admitted(admitted)
        self._check_evicted(evicted, alone=len(waiting) <= 1)

    def _note_LoadRequested(self, event: m.LoadRequested) -> None:  # noqa: N802
        coming = self.coming(event.model_id)
        if not event.reload and not self.serving(event.model_id) and coming:
            self.lives[coming].waiters += 1

    def _note_WaiterJoined(self, event: m.WaiterJoined) -> None:  # noqa: N802
        life = self.lives[event.key]
        life.waiters += not life.outcomes

    def _note_WaiterGone(self, event: m.WaiterGone) -> None:  # noqa: N802
        life = self.lives[event.key]
        life.waiters -= not life.outcomes

    def _note_Planned(self, event: m.Planned) -> None:  # noqa: N802
        life = self.lives[event.key]
        life.needs, life.keeps, life.job = self._with_budget(event.needs), self._with_budget(event.keeps), None

    def _note_answer(self, event: Any) -> None:
        self.lives[event.key].job = None

    _note_Loaded = _note_WarmedUp = _note_WorkerFailed = _note_WorkerStopped = _note_answer  # noqa: N815

    def _note_LeaseTaken(self, event: m.LeaseTaken) -> None:  # noqa: N802
        self._lend(self.lives[self.serving(event.model_id)])

    def _note_CallStarted(self, event: m.CallStarted) -> None:  # noqa: N802
        self._lend(self.lives[event.key])

    def _lend(self, life: Life) -> None:
        life.loans += 1
        life.leases += 1

    def _note_LeaseReleased(self, event: m.LeaseReleased) -> None:  # noqa: N802
        life = self.lives[event.key]
        life.loans -= 1
        if life.status in ("ready", "draining") and life.leases:
            life.leases -= 1
            life.released_at = self.now

    def _note_UnloadRequested(self, event: m.UnloadRequested) -> None:  # noqa: N802
        life = self.lives[self.visible(event.model_id)]
        life.deadline = None if event.drain_timeout is None else self.now + event.drain_timeout

    def _note_unloaded(self, event: Any) -> None:
        self.lives[event.key].freeing = False

    _note_Unloaded = _note_unloaded  # noqa: N815

    def _note_UnloadFailed(self, event: m.UnloadFailed) -> None:  # noqa: N802
        self._note_unloaded(event)
        # Whatever was counted on, it does not come.
        for life in self.lives.values():
            life.victims.clear()

    def _note_CloseRequested(self, event: m.CloseRequested) -> None:  # noqa: N802
        self.closed = True
        for life in self.lives.values():
            life.deadline = None

    def _note_MemorySampled(self, event: m.MemorySampled) -> None:  # noqa: N802
        own = {name: 0 if name == "mapped" else self.used(name, promised=False) for name in event.free}
        self.capacity = {name: free + own[name] for name, free in event.free.items()}
        if self.limits.max_memory is not None:
            self.capacity["budget"] = self.limits.max_memory
        for life in self.lives.values():
            life.victims.clear()

    def _note_Tick(self, event: m.Tick) -> None:  # noqa: N802
        for key, progress in event.progress.items():
            life = self.lives[key]
            if life.status in AT_WORK and progress != life.progress:
                life.progress, life.active = progress, self.now

    def _with_budget(self, counts: Mapping[str, int]) -> dict[str, int]:
        return {**counts, **({"budget": sum(counts.values())} if self.limits.max_memory is not None else {})}

    # --- effects

    def _changed(self, event: m.Event, effect: m.Changed, evicted: list[tuple[m.Key, str]]) -> None:
        """I3, I4: each change follows the table and the one before; generations only grow."""
        key, after = effect.key, None if effect.after is None else str(effect.after)
        assert effect.cause, effect
        if effect.before is None:
            assert all(key[1] > other[1] for other in self.lives), f"{key} is not the newest"
            if isinstance(event, m.LoadRequested):
                self.restarts[key[0]] = 0
                self.lives[key] = Life(event.request)
            else:
                assert isinstance(event, m.Tick)
                self.restarts[key[0]] += 1
                self.lives[key] = Life(self.inherited.pop(key), waiters=0, is_restart=True)
                assert self.restarts[key[0]] <= self.lives[key].request.restart_limit, f"{key} is one restart too many"
        life = self.lives[key]
        assert life.status == (None if effect.before is None else str(effect.before)), effect
        assert after in TABLE[life.status], effect
        if after == "unloading" and effect.cause.startswith("evicted for "):
            evicted.append((key, effect.cause.removeprefix("evicted for ")))
            self._check_victim(key, self.coming(effect.cause.removeprefix("evicted for ")))
        if after == "unloading" and "keep_alive" in effect.cause:
            moment = life.idle_until(self.limits.min_residency)
            assert moment is not None, f"{key} expired although it may not"
            assert moment <= self.now, f"{key} expired too early"
        assert after != "ready" or life.status == "draining" or not life.host_failed, f"{key} is ready without a host"
        if (life.status, after) == ("draining", "ready"):
            assert life.deadline is not None, f"{key} came back from draining"
            assert life.deadline <= self.now, f"{key} came back too early"
        self._enter(life, after)

    def _enter(self, life: Life, after: str | None) -> None:
        if life.status in ("queued", "waiting"):
            life.waited += self.now - life.since
        if after == "loading":
            life.held = life.needs
        elif after == "ready" and life.status != "draining":
            life.held, life.ready_at = life.keeps, self.now
        elif after in (None, "failed"):
            life.held = None
        life.status, life.since, life.active = after, self.now, self.now

    def _effect_StartWorker(self, event: m.Event, effect: m.StartWorker) -> None:  # noqa: N802
        life = self.lives[effect.key]
        assert life.job is None, f"{effect.key} has two workers"
        assert life.status == {m.Job.PLAN: "planning", m.Job.LOAD: "loading", m.Job.WARM_UP: "warming"}[effect.job]
        life.job = effect.job
        working = sum(other.status in AT_WORK for other in self.lives.values())
        assert working + max(0, self.stuck() - self.limits.max_stuck) <= self.limits.max_workers, "too many workers"

    def _effect_StopWorker(self, event: m.Event, effect: m.StopWorker) -> None:  # noqa: N802
        life = self.lives[effect.key]
        assert life.job is not None, f"no worker works for {effect.key}"
        assert not life.stop_requested, f"{effect.key} was requested to stop twice"
        life.stop_requested = True

    def _effect_StartUnload(self, event: m.Event, effect: m.StartUnload) -> None:  # noqa: N802
        """I15: a model that is freed is not leased, unless by force."""
        life = self.lives[effect.key]
        assert effect.broken_leases == life.leases, f"{effect.key} is freed under {life.leases} leases"
        broken = getattr(event, "force", False) or isinstance(event, m.HostDied)
        assert not life.leases or broken, f"{effect.key} is freed while it is lent"
        life.leases, life.freeing = 0, True

    def _effect_Discard(self, event: m.Event, effect: m.Discard) -> None:  # noqa: N802
        assert self.lives[effect.key].status not in ("ready", "draining", "unloading"), f"{effect.key} is discarded"

    def _effect_HostLost(self, event: m.Event, effect: m.HostLost) -> None:  # noqa: N802
        """I33: the end of a host breaks the leases of its model, and restarts it if somebody needs it."""
        assert isinstance(event, m.HostDied)
        key, life = effect.key, self.lives[effect.key]
        assert life.status == "failed"
        assert effect.broken_leases == life.leases
        wanted = life.request.pinned or life.request.required or life.leases > 0 or event.has_sessions
        life.leases = 0
        assert life.ready_at is not None
        if self.now - life.ready_at >= self.limits.restart_reset:
            self.restarts[key[0]] = 0
        newest = self.lives[max(self.there(key[0]), key=lambda other: other[1])]
        if newest is not life:
            newest.is_restart |= wanted
        elif wanted:
            self._expect_restart(key)

    def _expect_restart(self, key: m.Key) -> None:
        life, count = self.lives[key], self.restarts[key[0]]
        if count < life.request.restart_limit and not self.closed:
            life.due = self.now + self.limits.restart_backoff * 2**count

    def _effect_Succeeds(self, event: m.Event, effect: m.Succeeds) -> None:  # noqa: N802
        before = self.lives[effect.before]
        assert before.status == "failed"
        if isinstance(event, m.Tick):
            assert before.due is not None, f"{effect.before} is started again by itself"
            assert before.due <= self.now, f"{effect.before} is started again too early"
            self.inherited[effect.key] = before.request

    def _effect_Resolve(self, event: m.Event, effect: m.Resolve) -> None:  # noqa: N802
        """I2: each load is resolved once; I20: each limit has its own error, and is not early."""
        life = self.lives[effect.key]
        assert not life.outcomes, f"{effect.key} is resolved twice"
        life.outcomes.append(effect.failure)
        life.waiters = 0
        if effect.failure is None:
            assert life.status == "ready", f"{effect.key} is called ready"
            return
        assert effect.failure.message
        newest = max(self.there(effect.key[0]), key=lambda other: other[1]) == effect.key
        tried_again = life.is_restart and effect.failure.retryable and newest and not self.serving(effect.key[0])
        if life.status == "failed" and tried_again:
            self._expect_restart(effect.key)
        kind = effect.failure.type
        if kind == "WaitTimeoutError":
            assert life.waited >= self.limits.wait_timeout, f"{effect.key} waited {life.waited} s"
        if kind == "InsufficientMemoryError":
            knotted = self._is_knotted(effect.key)
            assert not effect.failure.retryable or self.limits.when_full == "refuse" or knotted
            still_going = [key for key in life.victims if self.lives[key].status == "unloading"]
            assert not still_going, f"{effect.key} is refused, and {still_going} went for it (I13)"

    def _effect_Forgotten(self, event: m.Event, effect: m.Forgotten) -> None:  # noqa: N802
        """I32: only what failed is forgotten, once more have failed than are kept; what is required last."""
        failed = {key: life for key, life in self.lives.items() if life.status == "failed"}
        (key,) = (key for key in failed if key[0] == effect.model_id)
        assert len(failed) > self.limits.max_failed
        assert not failed[key].request.required or all(life.request.required for life in failed.values())

    def _effect_DrainEnded(self, event: m.Event, effect: m.DrainEnded) -> None:  # noqa: N802
        life = self.lives[effect.key]
        assert effect.leases == life.leases > 0
        assert life.deadline is not None
        life.deadline = None

    def _effect_Gone(self, event: m.Event, effect: m.Gone) -> None:  # noqa: N802
        life = self.lives[effect.key]
        expected = {name: count for name, count in (life.held or {}).items() if count and name != "budget"}
        assert effect.released == expected, effect
        assert len(life.outcomes) == 1, f"{effect.key} is gone, and was resolved {len(life.outcomes)} times"

    # --- admission

    def _wanted(self, life: Life) -> dict[str, int]:
        paged = "mapped" if life.request.allow_paging else ""
        return {name: count for name, count in life.needs.items() if count and name != paged}

    def _free(self, name: str) -> int:
        return self.capacity.get(name, 0) - self.used(name)

    def _check_admitted(self, admitted: list[m.Key]) -> None:
        """I10: what is admitted fits. I30: it takes nothing that an earlier one waits for."""
        limit = self.limits.max_models
        reloads = any(self.serving(key[0]) for key in admitted)
        assert limit is None or self.holders() <= limit + reloads, "more models than places"
        earlier = [(key, life) for key, life in self.lives.items() if life.status == "waiting"]
        # Mapped weights of those that may page come on top, for all who were admitted with them.
        paged = {"mapped"} if any(self.lives[key].request.allow_paging for key in admitted) else set()
        for key in admitted:
            for name in self._wanted(self.lives[key]).keys() - paged:
                assert self._free(name) >= 0, f"{key} was admitted, and {name} is short of {-self._free(name)}"
                for other, life in earlier:
                    # Where only the reload of a pinned model can help an earlier load, it goes first.
                    if other[1] < key[1] and not self._may_pass(key, other):
                        assert self._free(name) >= life.needs.get(name, 0), f"{key} took {name} of {other}"

    def _check_victim(self, key: m.Key, gainer: m.Key | None) -> None:
        """I16: which models are never victims. A model being reloaded is evicted only for loads before the reload."""
        life = self.lives[key]
        assert life.status == "ready", f"{key} is {life.status}, and was evicted"
        assert not life.leases, f"{key} was evicted while it was lent"
        assert not life.request.pinned, f"{key} was evicted although it is pinned"
        assert life.ready_at is not None
        assert self.now - life.ready_at >= self.limits.min_residency, f"{key} was evicted at once"
        reload = self.coming(key[0])
        if reload is not None:
            assert gainer is not None
            behind = reload[1] > gainer[1] or self._reloads_pinned(gainer)
            assert self.lives[reload].status == "waiting", f"{key} was evicted while it was reloaded"
            assert behind, f"{key} was evicted for {gainer}, and its reload {reload} came first"

    def _check_evicted(self, evicted: list[tuple[m.Key, str]], *, alone: bool) -> None:
        """I13: victims suffice, and none is needless."""
        for model_id in {model_id for _, model_id in evicted}:
            victims = {key for key, other in evicted if other == model_id}
            key = self.coming(model_id)
            assert key is not None
            life = self.lives[key]
            assert life.status == "waiting", f"{victims} went for {key}, which is {life.status}"
            life.victims |= victims
            assert self._would_fit(key, set()), f"{victims} went for {key}, and do not suffice"
            for victim in victims if alone else ():
                assert not self._would_fit(key, {victim}), f"{victim} went for {key} needlessly"

    def check_waits(self) -> None:
        """I31: at rest, no load waits for memory that only other waiting loads could release.

        What the machine can do by itself is done by then: leases are back, workers have answered, idle models may go.
        """
        waiting = {key: life for key, life in self.lives.items() if life.status == "waiting"}
        outside = {key for key in waiting if self._waits_for_others_than_waiters(key)}
        for key in waiting:
            before = {other for other in outside if other[1] <= key[1] or self._reloads_pinned(other)}
            assert before, f"{key} waits for what only waiters hold: {waiting}"

    def _waits_for_others_than_waiters(self, key: m.Key) -> bool:
        """Whether something stays in the way of a load, even if each model that may go and each other reload went."""
        life, own = self.lives[key], self.serving(key[0])
        stays = [
            other.held
            for k, other in self.lives.items()
            if other.held is not None
            if k == own or other.status != "ready" or (other.request.pinned and self.coming(k[0]) is None)
        ]
        short = any(
            count > self.capacity.get(name, 0) - sum(held.get(name, 0) for held in stays)
            for name, count in self._wanted(life).items()
        )
        limit = self.limits.max_models
        return short or (limit is not None and len(stays) - (own is not None) >= limit)

    def _may_pass(self, key: m.Key, other: m.Key) -> bool:
        """Whether the reload of a pinned model goes before an earlier load that waits for it, or for such a one."""
        waiting = [k for k, life in self.lives.items() if life.status == "waiting" and k[1] <= other[1]]
        return self._reloads_pinned(key) and any(self._needs_pinned(k) for k in waiting)

    def _is_knotted(self, key: m.Key) -> bool:
        """Whether the reload of a pinned model needs the room of another whose reload waits."""
        others = [k for k, life in self.lives.items() if life.status == "waiting" and k != key]
        return self._reloads_pinned(key) and self._needs_pinned(key) and any(map(self._reloads_pinned, others))

    def _needs_pinned(self, key: m.Key) -> bool:
        """Whether a load fits only once some pinned model has gone."""
        life, own = self.lives[key], self.serving(key[0])
        pinned = [
            other.held or {}
            for k, other in self.lives.items()
            if k == own
            or other.status == "stuck"
            or (other.request.pinned and other.status in ("ready", "loading", "warming"))
        ]
        short = any(
            count > self.capacity.get(name, 0) - sum(held.get(name, 0) for held in pinned)
            for name, count in self._wanted(life).items()
        )
        limit = self.limits.max_models
        return short or (limit is not None and own is None and len(pinned) >= limit)

    def _reloads_pinned(self, key: m.Key) -> bool:
        """Whether a load is to replace a pinned model, which nothing else can make go."""
        serving = self.serving(key[0])
        return serving is not None and self.lives[serving].request.pinned

    def _would_fit(self, key: m.Key, staying: set[m.Key]) -> bool:
        life = self.lives[key]
        leaving = [other for k, other in self.lives.items() if other.status == "unloading" and k not in staying]
        fits = all(
            self._free(name) + sum((other.held or {}).get(name, 0) for other in leaving) >= count
            for name, count in self._wanted(life).items()
        )
        limit = self.limits.max_models
        replaces = self.serving(key[0]) is not None
        return fits and (limit is None or self.holders() - len(leaving) - replaces < limit)


_WHICH = range(10)
#: What may happen, and what each argument may be. Values that are there twice come twice as often.
CHOICES: dict[str, dict[str, Sequence[Any]]] = {
    "begin": {
        "max_failed": [1, 2, 100],
        "max_models": [None, 1, 2],
        "max_memory": [None, None, 14],
        "max_workers": [1, 2],
        "when_full": ["wait", "wait", "refuse"],
        "wait_timeout": [None, 20.0, 60.0],
        "stall_timeout": [None, 30.0],
        "cancel_grace": [0.0, 10.0],
        "min_residency": [0.0, 5.0],
        "sampled": [True, True, False],
    },
    "load": {
        "model_id": IDS,
        "way": ["load", "join", "join", "reload"],
        "fingerprint": [1, 1, 1, 2],
        "keep_alive": [None, None, 0.0, 20.0],
        "pinned": [False, False, False, True],
        "required": [False, True],
        "allow_paging": [False, True],
        "warmup": [False, True],
        "restart_limit": [0, 1, 3],
    },
    "load_at_once": {
        "which": _WHICH,
        "reload": [False, False, True],
        "host": [1, 2, 3, 4, 6, 8],
        "mapped": range(9),
        "pinned": [False, False, False, True],
        "keep_alive": [None, 0.0, 20.0],
        "restart_limit": [0, 3],
        "answers": [1, 2, 2],
        "lent": [0, 0, 1, 2],
    },
    "answer": {
        "which": _WHICH,
        "outcome": ["done", "done", "done", "done", "failed", "stopped"],
        "share": [0.5, 1.0],
        "host": range(TOTAL["host"] // 2 + 2),
        "mapped": range(TOTAL["mapped"] // 2 + 2),
        "cuda": range(TOTAL["cuda:0"] // 2 + 2),
    },
    "answer_wrongly": {"which": _WHICH, "wrong": [m.Planned, m.Loaded, m.WarmedUp, m.WorkerStopped, m.Unloaded]},
    "waiter": {"which": _WHICH, "gone": [False, True]},
    "cancel": {"which": _WHICH},
    "lease": {"which": _WHICH},
    "ask_in_vain": {"model_id": [*IDS, "unknown"], "what": [m.LeaseTaken, m.CancelRequested]},
    "call": {"which": _WHICH},
    "release": {"which": _WHICH},
    "unload": {"which": _WHICH, "force": [False, False, True], "timeout": [None, 0.0, 5.0, 20.0]},
    "drain": {"which": _WHICH, "timeout": [5.0, 20.0]},
    "unloaded": {"which": _WHICH, "well": [True, True, True, False]},
    "host_dies": {"which": _WHICH, "has_sessions": [False, False, True], "wait": [0.0, 0.0, 1.0, 4.0, 61.0]},
    "sample": {"outside": range(6)},
    "tick": {"seconds": [0.0, 1.0, 5.0, 11.0, 31.0], "moving": range(8), "step": range(1, 6)},
    "close": {"sure": [False] * 29 + [True], "force": [False, True]},
    "come_to_rest": {},
}


def choices(name: str) -> dict[str, Any]:
    return {argument: st.sampled_from(values) for argument, values in CHOICES[name].items()}


class Lives(RuleBasedStateMachine):
    """Random lives of four models; answers of workers come in any order, and as late as they like."""

    #: The module under test; a mutant of it in other tests.
    source: ClassVar[ModuleType] = real_machine
    #: How many steps were taken in all.
    steps: ClassVar[list[int]] = [0]

    @initialize(**choices("begin"))
    def begin(self, *, sampled: bool, **limits: Any) -> None:
        self.limits = self.source.Limits(max_stuck=1, **limits)
        self.machine = self.source.Machine(self.limits, epoch=1000.0)
        self.reference = Reference(self.limits)
        self.now = 0.0
        self.outside = 0
        if sampled:
            self.sample(0)

    # --- events

    def send(self, event: m.Event) -> list[m.Effect]:
        """Send an event, which must be refused exactly where the reference says so, without a trace."""
        self.steps[0] += 1
        refusal = self.reference.refusal(event)
        if refusal is None:
            effects = self.machine.handle(event)
            self.reference.take(event, effects)
            return effects
        self.send_wrong(event, refusal)
        return []

    def send_wrong(self, event: m.Event, refusal: type[SplitLearnError]) -> None:
        before = observe(self.machine)
        with pytest.raises(refusal) as caught:
            self.machine.handle(event)
        assert caught.type is refusal
        assert caught.value.message
        assert observe(self.machine) == before, f"{event} was refused, and changed something"

    @rule(**choices("load"))
    def load(self, model_id: str, way: str, fingerprint: int, **wishes: Any) -> None:
        """I1, I6: accepted or refused by what is there; listed from then on."""
        request = m.LoadRequest(model_type="llama", fingerprint=fingerprint, **wishes)
        event = m.LoadRequested(self.now, model_id, request, join=way == "join", reload=way == "reload")
        self.send(event)

    @rule(**choices("load_at_once"))
    def load_at_once(self, which: int, reload: bool, host: int, mapped: int, answers: int, lent: int, **wishes) -> None:
        """Load a model as far as it goes, so that what comes afterwards has something to meet."""
        request = m.LoadRequest(model_type="llama", fingerprint=1, **wishes)
        model_id = self._one_of(which, "ready", "failed") if reload else IDS[which % len(IDS)]
        self.send(m.LoadRequested(self.now, model_id, request, join=not reload, reload=reload))
        for _ in range(answers):
            key = self.reference.coming(model_id)
            if key is not None and self.reference.lives[key].job is not None:
                self._answer(key, "done", {"host": host, "mapped": mapped}, {"host": host - 1, "mapped": mapped})
        for _ in range(lent):
            self.send(m.LeaseTaken(self.now, model_id))

    @rule(**choices("answer"))
    def answer(self, which: int, outcome: str, share: float, **needs: int) -> None:
        """Any worker answers; also one that was requested to stop long ago."""
        working = [key for key, life in self.reference.lives.items() if life.job is not None]
        if working:
            needs = {name.replace("cuda", "cuda:0"): count for name, count in needs.items()}
            keeps = {name: int(count * share) for name, count in needs.items()}
            self._answer(working[which % len(working)], outcome, needs, keeps)

    def _answer(self, key: m.Key, outcome: str, needs: dict[str, int], keeps: dict[str, int]) -> None:
        job = self.reference.lives[key].job
        others = {k: life.status for k, life in self.reference.there().items() if k != key}
        if outcome == "failed":
            self.send(m.WorkerFailed(self.now, key, FAILURE))
            # I23: no other load fails with it. A load that waits may be refused, for reasons of its own.
            assert all(
                after == before or before not in ("planning", "loading", "warming", "ready", "draining")
                for k, before in others.items()
                if (after := self.reference.lives[k].status) != "unloading"
            )
        elif outcome == "stopped":
            self.send(m.WorkerStopped(self.now, key))
        elif job is m.Job.PLAN:
            self.send(m.Planned(self.now, key, needs, keeps))
        else:
            self.send((m.Loaded if job is m.Job.LOAD else m.WarmedUp)(self.now, key))

    @rule(**choices("answer_wrongly"))
    def answer_wrongly(self, which: int, wrong: Any) -> None:
        """I4: an answer that was not requested, or is obsolete, changes nothing."""
        right = {m.Planned: "planning", m.Loaded: "loading", m.WarmedUp: "warming", m.Unloaded: "unloading"}
        keys = [
            key
            for key, life in self.reference.lives.items()
            if life.status not in (right.get(wrong), "cancelling", "stuck")
            and not (wrong is m.WorkerStopped and life.status in AT_WORK)
        ]
        if keys:
            key = keys[which % len(keys)]
            event = wrong(self.now, key, {}, {}) if wrong is m.Planned else wrong(self.now, key)
            self.send_wrong(event, errors.InternalError)

    @rule(**choices("waiter"))
    def waiter(self, which: int, gone: bool) -> None:
        """I7: a caller that starts or stops waiting changes nothing for others."""
        lives = self.reference.lives
        keys = [key for key, life in lives.items() if life.waiters or life.outcomes or not gone]
        if keys:
            key = keys[which % len(keys)]
            assert self.send((m.WaiterGone if gone else m.WaiterJoined)(self.now, key)) == []

    def _one_of(self, which: int, *statuses: str) -> str:
        """Choose a model that has a generation in one of these statuses, if there is any."""
        there = self.reference.there().items()
        ids = sorted({key[0] for key, life in there if life.status in statuses}) or [*IDS, "unknown"]
        return ids[which % len(ids)]

    @rule(**choices("cancel"))
    def cancel(self, which: int) -> None:
        """I8: a worker that was requested to stop keeps its memory until it answers."""
        self.send(m.CancelRequested(self.now, self._one_of(which, *COMING)))

    @rule(**choices("lease"))
    def lease(self, which: int) -> None:
        self.send(m.LeaseTaken(self.now, self._one_of(which, "ready")))

    @rule(**choices("ask_in_vain"))
    def ask_in_vain(self, model_id: str, what: Any) -> None:
        """I17: a model that is missing or being unloaded is not leased, and refusals change nothing."""
        self.send(what(self.now, model_id))

    @rule(**choices("call"))
    def call(self, which: int) -> None:
        keys = [key for key, life in self.reference.lives.items() if life.ready_at is not None]
        if keys:
            self.send(m.CallStarted(self.now, keys[which % len(keys)]))

    @rule(**choices("release"))
    def release(self, which: int) -> None:
        """I15: a lease ends, also one that was broken."""
        keys = [key for key, life in self.reference.lives.items() if life.loans]
        if keys:
            self.send(m.LeaseReleased(self.now, keys[which % len(keys)]))

    @rule(**choices("unload"))
    def unload(self, which: int, force: bool, timeout: float | None) -> None:
        self.send(m.UnloadRequested(self.now, self._one_of(which, "ready", "draining", "failed"), force, timeout))

    @rule(**choices("drain"))
    def drain(self, which: int, timeout: float) -> None:
        """One caller leases a model, and another one unloads it."""
        model_id = self._one_of(which, "ready")
        self.send(m.LeaseTaken(self.now, model_id))
        self.send(m.UnloadRequested(self.now, model_id, drain_timeout=timeout))

    @rule(**choices("unloaded"))
    def unloaded(self, which: int, well: bool) -> None:
        """I24: what could not be freed is still there, and still counts."""
        keys = [key for key, life in self.reference.lives.items() if life.freeing]
        if not keys:
            return
        key = keys[which % len(keys)]
        self.send(m.Unloaded(self.now, key) if well else m.UnloadFailed(self.now, key, "it is used"))
        assert self.reference.lives[key].status == (None if well else "stuck")

    @rule(**choices("host_dies"))
    def host_dies(self, which: int, has_sessions: bool, wait: float) -> None:
        """I33: the process of a model ends, at any time, also when it is no more; others are not touched."""
        keys = [key for key, life in self.reference.lives.items() if life.ready_at is not None]
        keys += [key for key, life in self.reference.lives.items() if life.status in ("loading", "warming")]
        keys += [key for key in keys if self.reference.lives[key].status == "ready"] * 2
        if not keys:
            return
        key = keys[which % len(keys)]
        life = self.reference.lives[key]
        self.now += wait if life.status == "ready" else 0.0
        others = {k: other.status for k, other in self.reference.there().items() if k != key}
        status = life.status
        life.host_failed = status in ("loading", "warming")
        self.send(m.HostDied(self.now, key, FAILURE, has_sessions))
        after = {"ready": ("failed", None), "draining": ("unloading",)}.get(str(status), (status,))
        assert life.status in after
        assert all(
            self.reference.lives[k].status == before or before not in ("planning", "loading", "warming", "draining")
            for k, before in others.items()
        )

    @rule(**choices("sample"))
    def sample(self, outside: int) -> None:
        """Somebody else takes some of the memory."""
        self.outside = outside
        own = {name: 0 if name == "mapped" else self.reference.used(name, promised=False) for name in TOTAL}
        free = {name: total - outside - own[name] for name, total in TOTAL.items()}
        self.send(m.MemorySampled(self.now, TOTAL, free))

    @rule(**choices("tick"))
    def tick(self, seconds: float, moving: int, step: int) -> None:
        """Time passes; some workers get on, some do not."""
        self.now += seconds
        progress = {}
        for place, (key, life) in enumerate(self.reference.lives.items()):
            if life.job is not None and moving >> place % 3 & 1:
                old = life.progress if life.progress.stage == life.job else Progress(life.job, bytes_total=10)
                progress[key] = dataclasses.replace(old, bytes_done=min(10, old.bytes_done + step))
        self.send(m.Tick(self.now, progress))
        self._check_limits()

    def _check_limits(self) -> None:
        """I18, I20: after a look at the clock nothing is overdue."""
        limits = self.limits
        for key, life in self.reference.there().items():
            since = self.now - life.since
            if life.status in ("queued", "waiting") and limits.wait_timeout is not None:
                assert life.waited + since < limits.wait_timeout, f"{key} waits too long"
            if life.status in COMING and life.job and limits.stall_timeout is not None:
                assert self.now - life.active < limits.stall_timeout, f"{key} stalls"
            if life.status == "cancelling":
                assert since < limits.cancel_grace, f"{key} does not stop"
            if life.status == "draining" and life.deadline is not None:
                assert self.now < life.deadline, f"{key} drains too long"
            crowded = self.reference.stuck() >= limits.max_stuck + limits.max_workers
            assert life.due is None or self.now < life.due or crowded, f"{key} should have been started again"
            moment = life.idle_until(limits.min_residency)
            assert moment is None or self.now < moment or self.reference.coming(key[0]), f"{key} should have expired"

    @rule(**choices("close"))
    def close(self, sure: bool, force: bool) -> None:
        """I26: it may be closed at any moment, and more than once."""
        if sure:
            self.send(m.CloseRequested(self.now, force))
            assert not force or not any(life.leases for life in self.reference.lives.values()), "waits for holders"

    # --- what holds at any moment

    @invariant()
    def it_is_consistent(self) -> None:
        if hasattr(self, "machine"):
            assert self.machine.violations() == []

    @invariant()
    def the_reference_agrees(self) -> None:
        """I3, I7, I11, I15: statuses, waiters, leases and sums are what the events and effects say."""
        if not hasattr(self, "machine"):
            return
        there = self.reference.there()
        generations = {g.key: g for g in self.machine.generations()}
        assert {key: str(g.status) for key, g in generations.items()} == {k: life.status for k, life in there.items()}
        for key, life in there.items():
            assert generations[key].waiters == (0 if life.outcomes else life.waiters), f"waiters of {key}"
            assert generations[key].leases == life.leases, f"leases of {key}"
            assert sum(other.status == "failed" for other in there.values()) <= self.limits.max_failed
            assert bool(life.outcomes) == (life.status not in (*COMING, "cancelling")), f"{key} is {life.status}"
            assert life.held is not None or life.status not in ("ready", "draining", "unloading")
            assert life.stop_requested or life.status != "cancelling", f"the worker of {key} was not requested to stop"
        ledgers = self.machine.ledgers()
        for name, ledger in ledgers.items():
            assert ledger.charged == self.reference.used(name, promised=False), f"{name} is charged {ledger.charged}"
            assert ledger.reserved == self.reference.used(name, promised=True), f"{name} is reserved {ledger.reserved}"
            assert ledger.capacity == self.reference.capacity.get(name, 0)
        assert self.machine.closed == self.reference.closed

    @invariant()
    def one_record_each(self) -> None:
        """I1, I5, I19: each model is listed once, as it is now."""
        if not hasattr(self, "machine"):
            return
        infos = self.machine.infos()
        assert len({info.model_id for info in infos}) == len(infos)
        assert {info.model_id for info in infos} == {key[0] for key in self.reference.there()}
        for info in infos:
            key = (info.model_id, info.generation)
            life = self.reference.lives[key]
            assert key == self.reference.visible(info.model_id)
            assert info == self.machine.info(info.model_id)
            assert info.reloading == (life.status == "ready" and self.reference.coming(info.model_id) is not None)
            assert (str(info.status), info.leases) == (life.status, life.leases)
            assert info.bytes_done <= info.bytes_total
            assert info.bytes_done >= life.progress.bytes_done
            assert info.bytes_done == info.bytes_total or not info.ready
            assert info.eta is None or (info.rate and info.eta > 0)
            assert bool(info.waiting_for) == (life.status in ("queued", "waiting")), info
            assert info.restarts_at == (None if life.due is None else life.due + 1000.0), info
            assert info.error is None or info.error.message
            assert info.error is not None or life.status != "failed"
            assert info.error is None or life.status not in COMING

    @invariant()
    def the_counters_add_up(self) -> None:
        """I2: each load that was started ended once, or is on its way."""
        if not hasattr(self, "machine"):
            return
        counters, lives = self.machine.counters, self.reference.lives.values()
        assert counters.loads_started == len(self.reference.lives)
        ended = [life.outcomes[0] for life in lives if life.outcomes]
        cancelled = [failure for failure in ended if failure is not None and failure.type == "LoadCancelledError"]
        assert counters.loads_succeeded == ended.count(None)
        assert counters.loads_succeeded + counters.loads_failed + counters.loads_cancelled == len(ended)
        assert counters.loads_cancelled <= len(cancelled)

    # --- the end

    def teardown(self) -> None:
        """I2, I12, I26, I30: every waiter is answered; once closed, it comes to rest and holds nothing."""
        if not hasattr(self, "machine"):
            return
        if not self.reference.closed:
            self.come_to_rest()
            self._let_all_finish()
        self.send(m.CloseRequested(self.now))
        self._settle()
        self.send(m.CloseRequested(self.now, force=True))
        self._settle()
        assert self.machine.is_quiet
        assert all(len(life.outcomes) == 1 for life in self.reference.lives.values())
        kept = [life for life in self.reference.there().values() if life.status not in ("failed", "stuck")]
        assert not kept
        stuck = [life.held for life in self.reference.there().values() if life.status == "stuck"]
        for name, ledger in self.machine.ledgers().items():
            assert ledger.reserved == 0
            assert ledger.charged == sum((held or {}).get(name, 0) for held in stuck)
        self.it_is_consistent()
        self.the_reference_agrees()
        self.the_counters_add_up()

    @rule()
    def come_to_rest(self) -> None:
        """I31: all but those that wait for memory do their part; then no wait is left that only waiters could end."""
        if self.reference.closed:
            return
        before, after = None, self._statuses()
        while before != after:
            self._settle()
            self.sample(0)
            # Longer than any model has to stay, and not long enough for most waits to end by their limit.
            self.tick(self.limits.min_residency, 7, 1)
            before, after = after, self._statuses()
        without_workers = self.reference.stuck() - self.limits.max_stuck >= self.limits.max_workers
        assert without_workers or not any(life.job for life in self.reference.lives.values())
        if not without_workers:
            self.reference.check_waits()

    def _let_all_finish(self) -> None:
        """If all workers answer and all leases end, no load that could fit waits forever."""
        for _ in range(40):
            if not any(life.status in (*COMING, "cancelling") for life in self.reference.lives.values()):
                return
            self._settle()
            self.sample(0)
            for model_id in IDS:
                key = self.reference.serving(model_id)
                if key and (self.reference.lives[key].request.pinned or self.reference.coming(model_id)):
                    # A pinned one goes by hand, and so does one whose reload has no room beside it.
                    self._give_up(model_id)
            self._settle()
            self.tick(6.0, 7, 1)
        waiting = {key: life.status for key, life in self.reference.there().items() if life.status in COMING}
        hopeless = self.reference.stuck() > self.limits.max_stuck or self._stuck_in_the_way()
        assert hopeless or not waiting, f"{waiting} wait for ever (I30)"

    def _statuses(self) -> dict[m.Key, str | None]:
        return {key: life.status for key, life in self.reference.lives.items()}

    def _give_up(self, model_id: str) -> None:
        if self.reference.coming(model_id):
            self.send(m.CancelRequested(self.now, model_id))
            self._settle()
        if self.reference.serving(model_id):
            self.send(m.UnloadRequested(self.now, model_id))

    def _stuck_in_the_way(self) -> bool:
        return any(life.status == "stuck" and life.held is not None for life in self.reference.lives.values())

    def _settle(self) -> None:
        """Workers answer, loans come back, and memory is freed."""
        for _ in range(3):
            for key, life in list(self.reference.lives.items()):
                if life.job is not None:
                    stop = life.stop_requested
                    self._answer(key, "stopped" if stop else "done", {"host": 1, "mapped": 1}, {"host": 1})
                while life.loans:
                    self.send(m.LeaseReleased(self.now, key))
                if life.freeing:
                    self.send(m.Unloaded(self.now, key))


def wander(kind: type[Lives], seed: int, steps: int = 100) -> None:
    """Lead one random life without Hypothesis: the same whichever version of it is installed."""
    random = Random(seed)
    lives = kind()
    always = [getattr(lives, name) for name in dir(Lives) if hasattr(getattr(Lives, name), INVARIANT_MARKER)]
    lives.begin(**{argument: random.choice(values) for argument, values in CHOICES["begin"].items()})
    # Less of what is mostly refused, more of what leads on.
    often = {"load_at_once": 5, "answer": 3, "unloaded": 3, "tick": 2}
    names = [name for name in CHOICES if name != "begin" for _ in range(often.get(name, 1))]
    for _ in range(steps):
        name = random.choice(names)
        getattr(lives, name)(**{argument: random.choice(values) for argument, values in CHOICES[name].items()})
        for check in always:
            check()
    lives.teardown()


def observe(machine: Any) -> Any:
    """Everything that can be seen of a machine, and what it keeps to itself."""
    return (
        {g.key: {f.name: copy_of(getattr(g, f.name)) for f in dataclasses.fields(g)} for g in machine.generations()},
        machine.infos(),
        machine.ledgers(),
        dataclasses.astuple(machine.counters),
        machine.closed,
        {status: tuple(generations) for status, generations in machine._by_status.items()},
        tuple(machine._expiries),
        {
            model_id: (len(model.generations), model.failures, model.restarts)
            for model_id, model in machine._models.items()
        },
        (machine._now, machine._numbers, machine._held_models, tuple(machine._effects)),
    )


def copy_of(value: Any) -> Any:
    """Keep what may be changed in place."""
    if isinstance(value, Mapping):
        return dict(value)
    return tuple(value) if hasattr(value, "popleft") else value


def test_machine_keeps_its_invariants_in_any_order_of_events():
    Lives.steps[0] = 0
    run_state_machine_as_test(Lives, settings=SETTINGS)
    assert Lives.steps[0] >= 20 * EXAMPLES


@pytest.mark.parametrize("seed", range(0, LIVES, LIVES // 4))
def test_machine_keeps_its_invariants_in_lives_of_pure_chance(seed):
    for life in range(seed, seed + LIVES // 4):
        wander(Lives, life)
