"""The machine, one behaviour at a time; in any order it is in test_manager_properties.py."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping

import pytest

from splitlearn_core import errors
from splitlearn_core.manager import messages as m
from splitlearn_core.manager.machine import TRANSITIONS, Limits, Machine
from splitlearn_core.manager.messages import Job
from splitlearn_core.manager.status import FailureInfo, ModelStatus
from splitlearn_core.types import Progress

pytestmark = pytest.mark.light

S = ModelStatus
FAILURE = FailureInfo("MemoryError", "no memory", "", "reading", retryable=True)


class Desk:
    """A machine at a time, with short words for what happens; keeps every effect."""

    def __init__(self, *, total: Mapping[str, int] | None = None, **limits) -> None:
        self.machine = Machine(Limits(**{"min_residency": 0.0, "max_workers": 4, **limits}), epoch=1000.0)
        self.now = 10.0
        self.effects: list[m.Effect] = []
        self.total = dict(total or {"host": 10, "mapped": 10})
        self.sample()

    def send(self, event: m.Event) -> list[m.Effect]:
        effects = self.machine.handle(event)
        self.effects += effects
        assert self.machine.violations() == []
        return effects

    def sample(self, **less: int) -> list[m.Effect]:
        free = {
            name: total - less.get(name, 0) - (0 if name == "mapped" else self.machine.charged(name))
            for name, total in self.total.items()
        }
        return self.send(m.MemorySampled(self.now, self.total, free))

    def ask(self, model_id: str = "a", *, join: bool = False, reload: bool = False, **wishes) -> m.Key:
        request = m.LoadRequest(model_type="llama", **{"fingerprint": 1, **wishes})
        self.send(m.LoadRequested(self.now, model_id, request, join, reload))
        return (self.machine.coming(model_id) or self.machine.visible(model_id)).key

    def plan(self, key: m.Key, needs: int = 4, keeps: int | None = None, **more: int) -> list[m.Effect]:
        kept = needs if keeps is None else keeps
        return self.send(m.Planned(self.now, key, {"host": needs, **more}, {"host": kept, **more}, "/models", "f32"))

    def load(self, model_id: str = "a", needs: int = 4, keeps: int | None = None, **wishes) -> m.Key:
        """Bring a model to READY."""
        key = self.ask(model_id, **wishes)
        self.plan(key, needs, keeps)
        self.send(m.Loaded(self.now, key))
        assert self.status(key) is S.READY
        return key

    def status(self, key: m.Key) -> ModelStatus | None:
        generation = self.machine.find(key)
        return generation.status if generation else None

    def tick(self, seconds: float = 0.0, **progress: Progress) -> list[m.Effect]:
        self.now += seconds
        coming = {self.machine.coming(model_id).key: value for model_id, value in progress.items()}
        return self.send(m.Tick(self.now, coming))

    def free(self, *keys: m.Key) -> None:
        for key in keys:
            self.send(m.Unloaded(self.now, key))

    def outcomes(self, key: m.Key) -> list[FailureInfo | None]:
        return [e.failure for e in self.effects if isinstance(e, m.Resolve) and e.key == key]

    def outcome(self, key: m.Key) -> FailureInfo:
        (failure,) = self.outcomes(key)
        assert failure is not None
        return failure

    def path(self, key: m.Key) -> list[ModelStatus | None]:
        return [e.after for e in self.effects if isinstance(e, m.Changed) and e.key == key]


def seen(machine: Machine):
    """Everything that can be seen of a machine."""
    generations = {
        g.key: {f.name: copy.copy(getattr(g, f.name)) for f in dataclasses.fields(g)} for g in machine.generations()
    }
    return generations, machine.infos(), machine.ledgers(), dataclasses.astuple(machine.counters), machine.closed


# --- the way through ------------------------------------------------------------------------------


def test_a_load_runs_through_its_statuses_and_ends_freed():
    desk = Desk()
    key = desk.ask(warmup=True)
    assert desk.effects[-1] == m.StartWorker(key, Job.PLAN)
    assert desk.plan(key, 6, 4)[-1] == m.StartWorker(key, Job.LOAD)
    assert desk.machine.ledgers()["host"].reserved == 6
    assert desk.send(m.Loaded(desk.now, key, measured=5))[-1] == m.StartWorker(key, Job.WARM_UP)
    desk.send(m.WarmedUp(desk.now, key))
    assert desk.outcomes(key) == [None]
    ledger = desk.machine.ledgers()["host"]
    assert (ledger.charged, ledger.reserved) == (4, 0)
    info = desk.machine.info("a")
    assert (info.location, info.dtype, info.measured, info.predicted) == ("/models", "f32", 5, {"host": 4})
    assert (info.requested_at, info.ready_at, info.load_seconds) == (1010.0, 1010.0, 0.0)
    assert m.StartUnload(key, 0) in desk.send(m.UnloadRequested(desk.now, "a"))
    assert m.Gone(key, {"host": 4}) in desk.send(m.Unloaded(desk.now, key))
    assert desk.path(key) == [
        S.QUEUED, S.PLANNING, S.WAITING, S.LOADING, S.WARMING, S.READY, S.UNLOADING, None,
    ]  # fmt: skip
    assert desk.machine.is_quiet
    assert not any(ledger.charged or ledger.reserved for ledger in desk.machine.ledgers().values())


def test_every_status_has_its_ways_out():
    assert set(TRANSITIONS) == set(ModelStatus)
    reached = {after for ways in TRANSITIONS.values() for after in ways}
    assert reached == {*ModelStatus, None} - {S.QUEUED}


def test_a_generation_waits_until_memory_was_measured():
    machine = Machine(Limits())
    machine.handle(m.LoadRequested(0.0, "a", m.LoadRequest(model_type="llama")))
    machine.handle(m.Planned(0.0, ("a", 1), {"host": 1}, {"host": 1}))
    assert machine.info("a").waiting_for == "memory has not been measured yet"
    effects = machine.handle(m.MemorySampled(0.0, {"host": 9}, {"host": 9}))
    assert m.StartWorker(("a", 1), Job.LOAD) in effects


def test_time_never_goes_back():
    desk = Desk()
    desk.tick(50)
    desk.now = 20.0
    desk.ask()
    assert desk.machine.info("a").requested_at == 1060.0


# --- waiters, joins, fingerprints ------------------------------------------------------------------


def test_joins_wait_for_one_load_and_come_and_go_alone():
    desk = Desk()
    key = desk.ask(join=True)
    assert desk.ask(join=True) == desk.ask(join=True) == key
    assert desk.machine.info("a").waiters == 3
    assert desk.send(m.WaiterGone(desk.now, key)) == []
    assert desk.send(m.WaiterJoined(desk.now, key)) == []
    assert desk.machine.info("a").waiters == 3
    for _ in range(3):
        desk.send(m.WaiterGone(desk.now, key))
    assert desk.status(key) is S.PLANNING, "it goes on without waiters"
    desk.plan(key)
    desk.send(m.Loaded(desk.now, key))
    assert desk.ask(join=True) == key
    assert (desk.machine.info("a").waiters, desk.machine.counters.joined) == (0, 2)
    desk.send(m.WaiterGone(desk.now, key))
    assert desk.machine.info("a").waiters == 0


def test_who_waits_for_a_load_that_is_cancelled_is_counted_too():
    desk = Desk()
    key = desk.ask()
    desk.send(m.CancelRequested(desk.now, "a"))
    desk.send(m.WaiterJoined(desk.now, key))
    desk.send(m.WaiterGone(desk.now, key))
    assert desk.machine.info("a").waiters == 1


@pytest.mark.parametrize("ready", [False, True])
@pytest.mark.parametrize(("join", "fingerprint"), [(False, 1), (False, 2), (True, 2)])
def test_an_id_that_is_taken_is_refused(ready, join, fingerprint):
    desk = Desk()
    desk.load() if ready else desk.ask()
    with pytest.raises(errors.DuplicateModelError) as caught:
        desk.ask(join=join, fingerprint=fingerprint)
    assert caught.value.hint


# --- refusals change nothing ------------------------------------------------------------------------

_REQUEST = m.LoadRequest(model_type="llama", fingerprint=1)
_ILLEGAL = {
    "unknown lease": (m.LeaseTaken(99.0, "x"), errors.UnknownModelError),
    "unknown cancel": (m.CancelRequested(99.0, "x"), errors.UnknownModelError),
    "unknown unload": (m.UnloadRequested(99.0, "x"), errors.UnknownModelError),
    "unknown reload": (m.LoadRequested(99.0, "x", _REQUEST, reload=True), errors.UnknownModelError),
    "load of a ready one": (m.LoadRequested(99.0, "ready", _REQUEST), errors.DuplicateModelError),
    "load of a loading one": (m.LoadRequested(99.0, "loading", _REQUEST), errors.DuplicateModelError),
    "reload of a loading one": (m.LoadRequested(99.0, "loading", _REQUEST, reload=True), errors.DuplicateModelError),
    "reload of a draining one": (m.LoadRequested(99.0, "draining", _REQUEST, reload=True), errors.ModelNotReadyError),
    "lease of a failed one": (m.LeaseTaken(99.0, "failed"), errors.ModelNotReadyError),
    "lease of a loading one": (m.LeaseTaken(99.0, "loading"), errors.ModelNotReadyError),
    "lease of a draining one": (m.LeaseTaken(99.0, "draining"), errors.ModelNotReadyError),
    "lease of an unloading one": (m.LeaseTaken(99.0, "unloading"), errors.ModelNotReadyError),
    "call of an unloading one": (m.CallStarted(99.0, ("unloading", 4)), errors.ModelGoneError),
    "call of one that is gone": (m.CallStarted(99.0, ("gone", 77)), errors.ModelGoneError),
    "cancel of a ready one": (m.CancelRequested(99.0, "ready"), errors.ModelNotReadyError),
    "cancel of a cancelled one": (m.CancelRequested(99.0, "cancelling"), errors.ModelNotReadyError),
    "unload of a loading one": (m.UnloadRequested(99.0, "loading"), errors.ModelNotReadyError),
    "unload of a cancelled one": (m.UnloadRequested(99.0, "cancelling", force=True), errors.ModelNotReadyError),
    "second unload": (m.UnloadRequested(99.0, "draining"), errors.ModelNotReadyError),
    "unload while unloading": (m.UnloadRequested(99.0, "unloading", force=True), errors.ModelNotReadyError),
    "plan of a loading one": (m.Planned(99.0, ("loading", 2), {}, {}), errors.InternalError),
    "load of a ready one comes again": (m.Loaded(99.0, ("ready", 1)), errors.InternalError),
    "warmed up without a request": (m.WarmedUp(99.0, ("loading", 2)), errors.InternalError),
    "failure of a ready one": (m.WorkerFailed(99.0, ("ready", 1), FAILURE), errors.InternalError),
    "worker of one that is gone": (m.WorkerStopped(99.0, ("gone", 77)), errors.InternalError),
    "freed although ready": (m.Unloaded(99.0, ("ready", 1)), errors.InternalError),
    "not freed although ready": (m.UnloadFailed(99.0, ("ready", 1), "x"), errors.InternalError),
    "waiting for one that is gone": (m.WaiterJoined(99.0, ("gone", 77)), errors.InternalError),
}


@pytest.mark.parametrize(("event", "error"), _ILLEGAL.values(), ids=_ILLEGAL)
def test_what_is_refused_changes_nothing(event, error):
    desk = Desk(total={"host": 100}, max_workers=9)
    desk.load("ready")
    desk.plan(desk.ask("loading"))
    desk.load("draining")
    desk.load("unloading")
    desk.send(m.LeaseTaken(desk.now, "draining"))
    desk.send(m.UnloadRequested(desk.now, "draining"))
    desk.send(m.UnloadRequested(desk.now, "unloading"))
    desk.ask("cancelling")
    desk.send(m.CancelRequested(desk.now, "cancelling"))
    desk.send(m.WorkerFailed(desk.now, desk.ask("failed"), FAILURE))
    before = seen(desk.machine)
    with pytest.raises(error) as caught:
        desk.send(event)
    assert caught.type is error
    assert caught.value.message
    assert error is errors.InternalError or caught.value.hint
    assert seen(desk.machine) == before
    assert desk.tick() == []


# --- reload -----------------------------------------------------------------------------------------


def test_a_reload_serves_the_old_one_until_the_new_one_is_ready():
    desk = Desk()
    old = desk.load()
    desk.send(m.LeaseTaken(desk.now, "a"))
    new = desk.ask(reload=True, fingerprint=2)
    assert desk.machine.info("a").reloading
    desk.plan(new)
    desk.send(m.LeaseTaken(desk.now, "a"))
    assert desk.machine.find(old).leases == 2
    desk.send(m.Loaded(desk.now, new))
    assert (desk.status(old), desk.status(new)) == (S.DRAINING, S.READY)
    assert desk.machine.info("a").generation == new[1]
    desk.send(m.CallStarted(desk.now, old))
    for _ in range(3):
        desk.send(m.LeaseReleased(desk.now, old))
    assert desk.status(old) is S.UNLOADING
    desk.free(old)
    assert desk.machine.generations() == (desk.machine.find(new),)


def test_a_failed_reload_leaves_the_old_one_and_says_why():
    desk = Desk()
    old = desk.load()
    new = desk.ask(reload=True)
    desk.send(m.WorkerFailed(desk.now, new, FAILURE))
    info = desk.machine.info("a")
    assert (info.status, info.generation, info.error.message) == (S.READY, old[1], "no memory")
    assert desk.outcome(new).consecutive == 1
    again = desk.ask(reload=True)
    desk.plan(again)
    desk.send(m.Loaded(desk.now, again))
    assert desk.machine.info("a").error is None


def test_a_reload_neither_evicts_what_it_replaces_nor_needs_a_second_place():
    desk = Desk(max_models=1, wait_timeout=20.0)
    old = desk.load(needs=6)
    new = desk.ask(reload=True)
    desk.plan(new, 6)
    # The old one goes only when the new one is there: this one could wait for ever.
    assert (desk.status(old), desk.status(new)) == (S.READY, None)
    assert desk.outcome(new).type == "InsufficientMemoryError"
    assert "unload_model() it first" in desk.outcome(new).hint
    small = desk.ask(reload=True)
    desk.plan(small, 4)
    assert desk.status(small) is S.LOADING
    desk.send(m.Loaded(desk.now, small))
    assert desk.status(old) is S.UNLOADING


def reload_all(desk: Desk, *model_ids: str, needs: int = 4) -> list[m.Key]:
    """Ask for reloads, and plan them all."""
    keys = [desk.ask(model_id, reload=True) for model_id in model_ids]
    for key in keys:
        desk.plan(key, needs)
    return keys


def finish(desk: Desk) -> None:
    """Let workers load and memory come back until nothing moves; time stands still."""
    while moving := desk.machine.keys(S.LOADING, S.UNLOADING):
        for key in moving:
            desk.send((m.Loaded if desk.status(key) is S.LOADING else m.Unloaded)(desk.now, key))


@pytest.mark.parametrize("count", [2, 3, 4])
def test_reloads_at_once_do_not_wait_for_each_other(count):
    """Room for each model and half of one more: each new generation needs room of another's old one."""
    desk = Desk(total={"host": 4 * count + 2})
    ids = "abcd"[:count]
    old = [desk.load(model_id) for model_id in ids]
    new = reload_all(desk, *ids)
    # The first goes at the cost of one that would wait behind it; the others serve until their reloads.
    assert [desk.status(key) for key in old].count(S.UNLOADING) == 1
    assert desk.status(old[0]) is S.READY
    finish(desk)
    assert [desk.outcomes(key) for key in new] == [[None]] * count


def test_a_reload_does_not_keep_an_earlier_load_from_what_it_waits_for_itself():
    desk = Desk(total={"host": 9}, max_workers=8)
    old = desk.load("a")
    kept = desk.load("b")
    desk.send(m.LeaseTaken(desk.now, "a"))
    desk.send(m.LeaseTaken(desk.now, "b"))
    first = desk.ask("c")
    desk.plan(first)
    new = desk.ask("a", reload=True)
    desk.plan(new)
    assert desk.machine.find(new).waiting_for == "earlier loads wait for memory too"
    desk.send(m.LeaseReleased(desk.now, old))
    assert desk.status(old) is S.UNLOADING
    finish(desk)
    desk.send(m.LeaseReleased(desk.now, kept))
    finish(desk)
    assert (desk.outcomes(first), desk.outcomes(new)) == ([None], [None])


def test_what_is_to_be_reloaded_goes_last():
    """Also where it was used least recently: it serves as long as others suffice."""
    desk = Desk(min_residency=5.0)
    reloaded, plain = desk.load("a"), desk.load("b")
    gainer = desk.ask("c")
    desk.plan(gainer)
    (new,) = reload_all(desk, "a")
    assert [desk.status(key) for key in (reloaded, plain, gainer, new)] == [S.READY, S.READY, S.WAITING, S.WAITING]
    desk.tick(6.0)
    assert (desk.status(plain), desk.status(reloaded)) == (S.UNLOADING, S.READY)


def test_an_earlier_reload_is_not_evicted_for_a_later_load():
    desk = Desk(total={"host": 10, "cuda:0": 4})
    old, other = desk.load("a"), desk.load("b")
    desk.send(m.LeaseTaken(desk.now, "b"))
    (new,) = reload_all(desk, "a")
    later = desk.ask("c")
    desk.plan(later)
    assert (desk.status(old), desk.status(new), desk.status(later)) == (S.READY, S.WAITING, S.WAITING)
    desk.send(m.LeaseReleased(desk.now, other))
    finish(desk)
    assert (desk.outcomes(new), desk.outcomes(later)) == ([None], [None])


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_the_reload_of_a_pinned_model_goes_before_those_who_need_its_room(order):
    """Whichever came first: the pinned one cannot be evicted, and its reload is the one way on."""
    desk = Desk()
    old = {"a": desk.load("a"), "b": desk.load("b", pinned=True)}
    new = reload_all(desk, *order)
    assert desk.status(old["a"]) is S.UNLOADING
    assert desk.status(old["b"]) is S.READY
    finish(desk)
    assert [desk.outcomes(key) for key in new] == [[None], [None]]


def test_the_last_of_reloads_of_pinned_models_that_need_each_others_room_is_refused():
    """Both would wait forever, whatever else happens; the old ones keep serving, and one can be unloaded by hand."""
    desk = Desk()
    old = [desk.load("a", pinned=True), desk.load("b", pinned=True)]
    new = reload_all(desk, "a", "b")
    assert [desk.status(key) for key in (*old, *new)] == [S.READY, S.READY, S.WAITING, None]
    failure = desk.outcome(new[1])
    assert (failure.type, failure.retryable) == ("InsufficientMemoryError", True)
    assert "pinned models that wait for their own reload: a" in failure.message
    assert desk.machine.find(new[0]).waiting_for.endswith(
        "waiting for a, which serves until it is reloaded, b, which is pinned"
    )
    desk.send(m.UnloadRequested(desk.now, "b"))
    finish(desk)
    assert desk.outcomes(new[0]) == [None]


def test_a_small_reload_of_a_pinned_model_passes_the_large_one_that_waits_for_it():
    desk = Desk(total={"host": 11})
    old = [desk.load("a", pinned=True), desk.load("b", pinned=True)]
    large = desk.ask("a", reload=True)
    desk.plan(large, 4)
    small = desk.ask("b", reload=True)
    desk.plan(small, 2)
    assert desk.status(small) is S.LOADING
    finish(desk)
    assert (desk.outcomes(small), desk.outcomes(large)) == ([None], [None])
    assert [desk.status(key) for key in old] == [None, None]


def test_a_reload_whose_old_generation_was_evicted_is_an_ordinary_load():
    desk = Desk(max_models=2)
    desk.load("a")
    lost = desk.load("b")
    first, second = reload_all(desk, "a", "b")
    assert desk.status(lost) is S.UNLOADING
    desk.free(lost)
    assert desk.machine.info("b").status is S.WAITING
    desk.send(m.WorkerFailed(desk.now, first, FAILURE))
    # The failed one's old generation serves on, and makes room like any other idle model.
    assert desk.machine.info("a").error.message == "no memory"
    finish(desk)
    assert desk.outcomes(second) == [None]


def test_a_reload_keeps_an_idle_one_from_expiring():
    desk = Desk()
    old = desk.load(keep_alive=5.0)
    new = desk.ask(reload=True)
    desk.tick(9)
    assert desk.status(old) is S.READY
    desk.send(m.WorkerFailed(desk.now, new, FAILURE))
    desk.tick()
    assert desk.status(old) is S.UNLOADING


def test_an_attempt_that_was_overtaken_leaves_nothing_behind():
    desk = Desk(stall_timeout=5.0, stall_after=1.0)
    first = desk.ask()
    desk.tick(5)
    assert desk.status(first) is S.CANCELLING
    second = desk.ask()
    desk.send(m.WorkerStopped(desk.now, first))
    assert desk.outcome(first).type == "LoadStalledError"
    assert desk.path(first)[-2:] == [S.FAILED, None]
    desk.plan(second)
    desk.send(m.Loaded(desk.now, second))
    assert desk.machine.info("a").error is None
    assert len(desk.machine.generations()) == 1


# --- failing and cancelling --------------------------------------------------------------------------


def test_failures_are_kept_counted_and_forgotten():
    desk = Desk()
    for count in (1, 2):
        key = desk.ask()
        desk.send(m.WorkerFailed(desk.now, key, FAILURE))
        info = desk.machine.info("a")
        assert (info.status, info.error.consecutive, info.error.at) == (S.FAILED, count, 1010.0)
    desk.load()
    desk.send(m.UnloadRequested(desk.now, "a"))
    desk.free(desk.machine.visible("a").key)
    desk.send(m.WorkerFailed(desk.now, desk.ask(), FAILURE))
    assert desk.machine.info("a").error.consecutive == 1
    desk.send(m.UnloadRequested(desk.now, "a"))
    assert desk.machine.infos() == ()


def test_a_failing_load_touches_no_other():
    desk = Desk()
    other = desk.load("b")
    before = desk.machine.info("b")
    desk.send(m.WorkerFailed(desk.now, desk.ask("a"), FAILURE))
    assert desk.machine.info("b") == before
    assert desk.status(other) is S.READY


@pytest.mark.parametrize("status", [S.QUEUED, S.PLANNING, S.WAITING, S.LOADING, S.WARMING])
def test_cancel_in_each_status(status):
    desk = Desk(max_workers=1)
    if status is S.QUEUED:
        desk.ask("b")
    key = desk.ask(warmup=True)
    if status in (S.WAITING, S.LOADING, S.WARMING):
        desk.sample(host=9 if status is S.WAITING else 0)
        desk.plan(key)
    if status is S.WARMING:
        desk.send(m.Loaded(desk.now, key))
    assert desk.status(key) is status
    effects = desk.send(m.CancelRequested(desk.now, "a"))
    if status in (S.QUEUED, S.WAITING):
        assert desk.status(key) is None
    else:
        assert m.StopWorker(key, "cancelled") in effects
        assert desk.status(key) is S.CANCELLING
        assert desk.outcomes(key) == []
        reserved = desk.machine.ledgers()["host"].reserved
        assert reserved == (0 if status is S.PLANNING else 4), "taken until the worker says so"
        assert m.Discard(key) in desk.send(m.WorkerStopped(desk.now, key))
    assert desk.outcome(key).type == "LoadCancelledError"
    assert desk.machine.counters.loads_cancelled == 1
    assert desk.machine.ledgers()["host"].reserved == 0
    assert all(info.model_id != "a" for info in desk.machine.infos())


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("job", list(Job))
@pytest.mark.parametrize("ending", ["done", "failed", "stopped"])
def test_whatever_a_cancelled_worker_answers_and_however_late(job, ending, late):
    desk = Desk(cancel_grace=5.0)
    key = desk.ask(warmup=True)
    if job is not Job.PLAN:
        desk.plan(key)
    if job is Job.WARM_UP:
        desk.send(m.Loaded(desk.now, key))
    desk.send(m.CancelRequested(desk.now, "a"))
    if late:
        desk.tick(5)
        assert desk.status(key) is S.STUCK
        assert desk.machine.charged("host") == (0 if job is Job.PLAN else 4)
        assert "until the worker comes back" in desk.machine.info("a").error.hint
        assert desk.machine.is_quiet
    done = {
        Job.PLAN: m.Planned(desk.now, key, {"host": 4}, {"host": 4}),
        Job.LOAD: m.Loaded(desk.now, key),
        Job.WARM_UP: m.WarmedUp(desk.now, key),
    }[job]
    answer = {"done": done, "failed": m.WorkerFailed(desk.now, key, FAILURE), "stopped": m.WorkerStopped(desk.now, key)}
    effects = desk.send(answer[ending])
    assert m.Discard(key) in effects
    assert desk.status(key) is None
    assert [failure.type for failure in desk.outcomes(key)] == ["LoadCancelledError"]
    assert desk.machine.charged("host") == desk.machine.ledgers()["host"].reserved == 0
    assert desk.machine.counters.loads_cancelled == 1


def test_a_loader_that_gives_up_by_itself_has_failed():
    desk = Desk()
    key = desk.ask()
    desk.send(m.WorkerStopped(desk.now, key))
    assert desk.status(key) is S.FAILED
    assert desk.outcome(key).type == "LoadCancelledError"


def test_stuck_workers_cost_their_place_beyond_a_number_and_then_all():
    desk = Desk(max_workers=1, max_stuck=1, cancel_grace=0.0)
    for name in ("a", "b"):
        desk.ask(name)
        desk.send(m.CancelRequested(desk.now, name))
        desk.tick()
    waiting = desk.machine
    with pytest.raises(errors.ModelNotReadyError, match="2 workers are stuck"):
        desk.ask("c")
    desk.send(m.WorkerStopped(desk.now, ("a", 1)))
    key = desk.ask("c")
    assert desk.status(key) is S.PLANNING
    assert waiting.counts() == {"stuck": 1, "planning": 1}


# --- limits ------------------------------------------------------------------------------------------


def test_waiting_and_stalling_have_separate_limits():
    desk = Desk(max_workers=1, wait_timeout=20.0, stall_after=5.0, stall_timeout=30.0)
    first, second = desk.ask("a"), desk.ask("b")
    desk.tick(15)
    assert desk.machine.info("a").stalled_for == 15
    desk.plan(first)
    desk.send(m.Loaded(desk.now, first))
    desk.sample(host=9)
    desk.tick(29)
    desk.plan(second, 9)
    assert desk.status(second) is S.WAITING, "29 s of work are no waiting"
    desk.tick(4)
    assert desk.status(second) is S.WAITING
    desk.tick(1)
    failure = desk.outcome(second)
    assert (failure.type, failure.stage, failure.retryable) == ("WaitTimeoutError", "waiting", True)
    assert "waited 20 s and may wait 20 s" in failure.message


def test_a_stalled_load_is_distinguished_from_a_slow_one():
    desk = Desk(stall_after=5.0, stall_timeout=30.0)
    key = desk.ask()
    desk.plan(key)
    for done in range(1, 9):
        desk.tick(25, a=Progress("reading", None, done, 100, "x.safetensors"))
        assert desk.machine.info("a").stalled_for is None
    desk.tick(29.0)
    info = desk.machine.info("a")
    assert (info.stalled_for, info.rate, info.eta) == (29.0, None, None)
    desk.tick(1)
    assert desk.status(key) is S.CANCELLING
    desk.send(m.WorkerStopped(desk.now, key))
    failure = desk.outcome(key)
    assert failure.type == "LoadStalledError"
    assert "reading of x.safetensors, after 8 of 100 bytes" in failure.message
    assert desk.status(key) is S.FAILED


def test_the_limit_of_a_stall_may_be_below_what_is_shown_as_one():
    desk = Desk(stall_after=10.0, stall_timeout=2.0)
    key = desk.ask()
    desk.tick(2)
    assert desk.status(key) is S.CANCELLING


def test_no_limits_wait_for_ever():
    desk = Desk(max_workers=1, wait_timeout=None, stall_timeout=None)
    first, second = desk.ask("a"), desk.ask("b")
    desk.tick(1e9)
    assert (desk.status(first), desk.status(second)) == (S.PLANNING, S.QUEUED)
    assert desk.machine.info("b").waiting_for == "waiting for a worker, 1 are at work"


# --- leases and letting go ----------------------------------------------------------------------------


def test_an_unload_waits_for_leases_and_calls():
    desk = Desk()
    key = desk.load()
    desk.send(m.LeaseTaken(desk.now, "a"))
    desk.send(m.CallStarted(desk.now, key))
    desk.send(m.UnloadRequested(desk.now, "a"))
    assert desk.status(key) is S.DRAINING
    desk.tick(1e6)
    desk.send(m.LeaseReleased(desk.now, key))
    assert desk.status(key) is S.DRAINING
    assert m.StartUnload(key, 0) in desk.send(m.LeaseReleased(desk.now, key))
    assert desk.send(m.LeaseReleased(desk.now, key)) == []


def test_a_drain_that_takes_too_long_ends_ready():
    desk = Desk()
    key = desk.load()
    desk.send(m.LeaseTaken(desk.now, "a"))
    desk.send(m.UnloadRequested(desk.now, "a", drain_timeout=5.0))
    assert desk.tick(4.9) == []
    assert m.DrainEnded(key, 1) in desk.tick(0.1)
    assert desk.status(key) is S.READY
    desk.send(m.LeaseTaken(desk.now, "a"))
    assert desk.machine.info("a").leases == 2


def test_a_drain_ends_ready_and_absorbs_a_failed_reload():
    desk = Desk()
    key = desk.load()
    desk.send(m.LeaseTaken(desk.now, "a"))
    desk.send(m.UnloadRequested(desk.now, "a", drain_timeout=5.0))
    desk.send(m.WorkerFailed(desk.now, desk.ask(), FAILURE))
    assert desk.machine.info("a").status is S.FAILED
    desk.tick(5)
    info = desk.machine.info("a")
    assert (info.status, info.generation, info.error.message) == (S.READY, key[1], "no memory")
    assert len(desk.machine.generations()) == 1


def test_a_draining_generation_does_not_return_next_to_a_newer_one():
    desk = Desk()
    old = desk.load(needs=2)
    desk.send(m.LeaseTaken(desk.now, "a"))
    desk.send(m.UnloadRequested(desk.now, "a", drain_timeout=5.0))
    new = desk.load(needs=2)
    desk.send(m.LeaseTaken(desk.now, "a"))
    desk.send(m.UnloadRequested(desk.now, "a", drain_timeout=9.0))
    assert m.DrainEnded(old, 1) in desk.tick(5)
    assert (desk.status(old), desk.status(new)) == (S.DRAINING, S.DRAINING)
    desk.tick(4)
    assert (desk.status(old), desk.status(new)) == (S.DRAINING, S.READY)


@pytest.mark.parametrize("draining", [False, True])
def test_a_forced_unload_breaks_leases(draining):
    desk = Desk()
    key = desk.load()
    desk.send(m.LeaseTaken(desk.now, "a"))
    if draining:
        desk.send(m.UnloadRequested(desk.now, "a"))
    assert m.StartUnload(key, 1) in desk.send(m.UnloadRequested(desk.now, "a", force=True))
    with pytest.raises(errors.ModelGoneError):
        desk.send(m.CallStarted(desk.now, key))
    assert desk.send(m.LeaseReleased(desk.now, key)) == []
    assert desk.machine.charged("host") == 4, "until it is free"


def test_what_cannot_be_freed_stays_and_counts():
    desk = Desk()
    key = desk.load()
    desk.send(m.UnloadRequested(desk.now, "a"))
    desk.send(m.UnloadFailed(desk.now, key, "no"))
    info = desk.machine.info("a")
    assert (info.status, info.error.message, info.error.at) == (S.STUCK, "no", 1010.0)
    assert desk.machine.charged("host") == 4
    assert desk.status(desk.ask()) is S.PLANNING


# --- closing ------------------------------------------------------------------------------------------


def test_close_cancels_drains_frees_and_forgets():
    desk = Desk(total={"host": 100}, max_workers=2)
    ready, lent = desk.load("ready"), desk.load("lent")
    desk.send(m.LeaseTaken(desk.now, "lent"))
    desk.send(m.WorkerFailed(desk.now, desk.ask("failed"), FAILURE))
    loading, planning, queued = desk.ask("loading"), desk.ask("planning"), desk.ask("queued")
    desk.plan(loading)
    desk.send(m.CloseRequested(desk.now))
    assert [desk.status(key) for key in (ready, lent, loading, planning, queued)] == [
        S.UNLOADING, S.DRAINING, S.CANCELLING, S.CANCELLING, None,
    ]  # fmt: skip
    assert desk.send(m.CloseRequested(desk.now)) == []
    for refused in (lambda: desk.ask("new"), lambda: desk.send(m.LeaseTaken(desk.now, "lent"))):
        with pytest.raises(errors.ManagerClosedError):
            refused()
    desk.send(m.CallStarted(desk.now, lent))
    assert m.StartUnload(lent, 2) in desk.send(m.CloseRequested(desk.now, force=True))
    desk.send(m.Loaded(desk.now, loading))
    desk.tick(10)
    assert desk.status(planning) is S.STUCK
    desk.free(ready, lent)
    assert desk.machine.is_quiet
    assert {len(desk.outcomes(key)) for key in (ready, lent, loading, planning, queued)} == {1}


# --- idleness -----------------------------------------------------------------------------------------


def test_idleness_counts_from_the_last_release():
    desk = Desk(min_residency=3.0)
    key = desk.load(keep_alive=5.0)
    assert desk.machine.info("a").expires_at == 1015.0
    desk.tick(4)
    desk.send(m.LeaseTaken(desk.now, "a"))
    assert desk.machine.info("a").expires_at is None
    desk.tick(100)
    desk.send(m.LeaseReleased(desk.now, key))
    assert desk.machine.info("a").expires_at == desk.now + 1005
    desk.tick(4.9)
    assert desk.status(key) is S.READY
    desk.tick(0.1)
    assert (desk.status(key), desk.machine.counters.expirations) == (S.UNLOADING, 1)


def test_a_keep_alive_of_0_ends_with_the_minimum_of_residency():
    desk = Desk(min_residency=3.0)
    key = desk.load(keep_alive=0.0)
    desk.tick(2.9)
    assert desk.status(key) is S.READY
    desk.tick(0.1)
    assert desk.status(key) is S.UNLOADING
    at_once = Desk()
    key = at_once.load(keep_alive=0.0)
    at_once.tick()
    assert at_once.status(key) is S.UNLOADING


def test_pinned_models_never_expire_and_none_expires_while_it_loads():
    desk = Desk()
    pinned = desk.load("p", keep_alive=0.0, pinned=True)
    loading = desk.ask("l", keep_alive=0.0)
    desk.plan(loading)
    desk.tick(100)
    assert (desk.status(pinned), desk.status(loading)) == (S.READY, S.LOADING)


def test_use_does_not_pile_up_entries():
    desk = Desk()
    key = desk.load(keep_alive=1e6)
    for _ in range(100):
        desk.send(m.LeaseTaken(desk.now, "a"))
        desk.send(m.LeaseReleased(desk.now, key))
    assert len(desk.machine._expiries) == 1


# --- room ---------------------------------------------------------------------------------------------


def test_the_least_recently_used_goes_and_is_waited_for():
    desk = Desk()
    old, new = desk.load("old"), desk.load("new")
    desk.tick(1)
    desk.send(m.LeaseTaken(desk.now, "old"))
    desk.send(m.LeaseReleased(desk.now, old))
    key = desk.ask("c")
    desk.plan(key, 5)
    assert (desk.status(old), desk.status(new), desk.status(key)) == (S.READY, S.UNLOADING, S.WAITING)
    assert desk.machine.info("c").waiting_for == "waiting for new to be freed"
    desk.tick()
    assert desk.status(old) is S.READY, "one goes, once"
    desk.free(new)
    assert desk.status(key) is S.LOADING
    assert desk.machine.counters.evictions == 1


def test_nothing_is_evicted_if_that_does_not_suffice():
    desk = Desk()
    idle = desk.load("idle")
    lent = desk.load("lent")
    desk.send(m.LeaseTaken(desk.now, "lent"))
    key = desk.ask("c")
    desk.plan(key, 8)
    assert desk.status(idle) is S.READY
    assert "1 lease on lent" in desk.machine.info("c").waiting_for
    desk.send(m.LeaseReleased(desk.now, lent))
    assert {desk.status(idle), desk.status(lent)} == {S.UNLOADING}


def test_a_model_stays_for_the_minimum_of_residency_also_at_time_0():
    desk = Desk(min_residency=5.0)
    desk.machine, desk.now = Machine(desk.machine.limits), 0.0
    desk.sample()
    first = desk.load("a", 8)
    second = desk.ask("b")
    desk.plan(second, 8)
    assert "a, which has just been loaded" in desk.machine.info("b").waiting_for
    desk.tick(4.9)
    assert desk.status(first) is S.READY
    desk.tick(0.1)
    assert desk.status(first) is S.UNLOADING


def test_max_models_counts_what_is_loaded_or_loading():
    desk = Desk(max_models=2, total={"host": 100})
    first = desk.load("a")
    desk.plan(desk.ask("b"))
    third = desk.ask("c")
    desk.plan(third)
    assert desk.status(first) is S.UNLOADING
    desk.free(first)
    assert desk.status(third) is S.LOADING
    fourth = desk.ask("d")
    desk.plan(fourth)
    assert "all places for models are taken" in desk.machine.info("d").waiting_for


def test_the_managers_own_limit():
    desk = Desk(max_memory=7, total={"host": 100, "mapped": 100})
    key = desk.ask()
    desk.plan(key, 5, 4, mapped=2)
    assert desk.machine.ledgers()["budget"].reserved == 7
    desk.send(m.Loaded(desk.now, key))
    assert desk.machine.charged("budget") == 6
    too_large = desk.ask("b")
    desk.plan(too_large, 5, mapped=3)
    assert "the manager's max_memory_mb" in desk.outcome(too_large).message


def test_full_may_mean_refused_but_not_while_others_go_for_it():
    desk = Desk(when_full="refuse")
    old = desk.load("a", 6)
    key = desk.ask("b")
    desk.plan(key, 6)
    desk.tick(1)
    assert (desk.status(old), desk.status(key)) == (S.UNLOADING, S.WAITING)
    desk.free(old)
    assert desk.status(key) is S.LOADING
    refused = desk.ask("c")
    desk.plan(refused, 6)
    failure = desk.outcome(refused)
    assert (failure.type, failure.retryable) == ("InsufficientMemoryError", True)
    assert "b, which is loading" in failure.message
    assert desk.machine.counters.evictions == 1


def test_what_can_never_fit_is_refused_for_good():
    desk = Desk()
    other = desk.load("a")
    key = desk.ask("b")
    desk.plan(key, 11)
    failure = desk.outcome(key)
    assert (failure.retryable, failure.stage) == (False, "waiting")
    assert "10 B is all that this machine can give" in failure.message
    assert desk.status(other) is S.READY


def test_small_loads_do_not_pass_a_large_one_that_waits_for_the_same_memory():
    desk = Desk(total={"host": 10, "cuda:0": 10})
    holder = desk.load("holder", 6)
    desk.send(m.LeaseTaken(desk.now, "holder"))
    large, small, other = desk.ask("large"), desk.ask("small"), desk.ask("other")
    desk.plan(large, 8)
    desk.plan(small, 2)
    desk.send(m.Planned(desk.now, other, {"cuda:0": 5}, {"cuda:0": 5}))
    assert (desk.status(large), desk.status(small), desk.status(other)) == (S.WAITING, S.WAITING, S.LOADING)
    assert desk.machine.info("small").waiting_for == "earlier loads wait for memory too"
    desk.send(m.LeaseReleased(desk.now, holder))
    desk.free(holder)
    assert (desk.status(large), desk.status(small)) == (S.LOADING, S.LOADING)


def test_later_loads_leave_all_that_an_earlier_load_needs():
    desk = Desk(total={"host": 10, "cuda:0": 10})
    desk.load("holder", 6)
    desk.send(m.LeaseTaken(desk.now, "holder"))
    first, second = desk.ask("first"), desk.ask("second")
    desk.plan(first, 8, **{"cuda:0": 6})
    desk.send(m.Planned(desk.now, second, {"cuda:0": 5}, {"cuda:0": 5}))
    assert (desk.status(first), desk.status(second)) == (S.WAITING, S.WAITING)
    third = desk.ask("third")
    desk.send(m.CancelRequested(desk.now, "second"))
    desk.send(m.Planned(desk.now, third, {"cuda:0": 4}, {"cuda:0": 4}))
    assert desk.status(third) is S.LOADING


# --- snapshots ----------------------------------------------------------------------------------------


def test_a_snapshot_shows_the_rate_only_while_it_is_true():
    desk = Desk()
    key = desk.ask()
    desk.plan(key)
    for step in range(5):
        desk.tick(1.0, a=Progress("reading", None, 10 * step, 100, "f"))
    info = desk.machine.info("a")
    assert (info.stage, info.file, info.bytes_done, info.rate, info.eta) == ("reading", "f", 40, 10.0, 6.0)
    desk.tick(4.0)
    assert desk.machine.info("a").rate == 5.0, "nothing came for 4 s"
    desk.tick(2.0)
    assert (desk.machine.info("a").rate, desk.machine.info("a").eta) == (None, None)
    desk.tick(1.0, a=Progress("verifying", None, 0, 50))
    assert (desk.machine.info("a").rate, desk.machine.info("a").eta) == (None, None)
    desk.tick(1.0, a=Progress("verifying", None, 50, 50))
    assert (desk.machine.info("a").rate, desk.machine.info("a").eta) == (50.0, None)
    desk.tick(1.0, a=Progress("verifying", None, 5, 50))
    assert desk.machine.info("a").rate is None, "the rate starts again"
    desk.send(m.Loaded(desk.now, key))
    info = desk.machine.info("a")
    assert (info.bytes_done, info.bytes_total, info.stage, info.file, info.rate) == (50, 50, "", "", None)


def test_one_record_each_and_a_snapshot_is_made_once():
    desk = Desk()
    desk.load("a")
    desk.ask("a", reload=True)
    desk.ask("b")
    infos = desk.machine.infos()
    assert [info.model_id for info in infos] == ["a", "b"]
    assert desk.machine.infos()[0] is infos[0]
    assert desk.machine.counts() == {"ready": 1, "planning": 1}
    with pytest.raises(dataclasses.FrozenInstanceError):
        infos[0].status = S.FAILED


def test_late_progress_of_what_is_ready_changes_nothing():
    desk = Desk()
    key = desk.load()
    info = desk.machine.info("a")
    desk.send(m.Tick(desk.now, {key: Progress("reading", None, 1, 9), ("gone", 7): Progress("reading")}))
    assert desk.machine.info("a") == info


# --- hosts that die -------------------------------------------------------------------------------

DEATH = FailureInfo("HostDiedError", "its process was killed by SIGKILL", "look at dmesg", "", retryable=True)


def lost(desk: Desk, key: m.Key, **details: bool) -> list[m.Effect]:
    return desk.send(m.HostDied(desk.now, key, DEATH, **details))


def restart(desk: Desk, model_id: str = "a") -> m.Key:
    """Bring a model that is started again to READY."""
    key = desk.machine.coming(model_id).key
    desk.plan(key)
    desk.send(m.Loaded(desk.now, key, pid=7))
    return key


def test_the_death_of_a_host_fails_its_model_alone():
    desk = Desk()
    key, other = desk.load("a", restart_limit=3), desk.load("b")
    desk.send(m.LeaseTaken(desk.now, "b"))
    effects = lost(desk, key)
    assert effects == [m.Changed(key, S.READY, S.FAILED, DEATH.message), m.HostLost(key, effects[1].failure, 0)]
    info = desk.machine.info("a")
    assert (info.error.message, info.error.stage, info.error.at) == (DEATH.message, "ready", 1010.0)
    # It was idle, and is loaded again when it is next wanted.
    assert info.restarts_at is None
    assert desk.machine.ledgers()["host"].charged == 4
    assert (desk.status(other), desk.machine.info("b").leases) == (S.READY, 1)
    with pytest.raises(errors.ModelNotReadyError, match=f"model 'a' failed: {DEATH.message}"):
        desk.send(m.LeaseTaken(desk.now, "a"))
    desk.ask("a", join=True)
    assert m.Succeeds(desk.machine.coming("a").key, key) in desk.effects


@pytest.mark.parametrize("reason", ["pinned", "required", "lease", "call", "session"])
def test_what_is_needed_is_started_again(reason):
    desk = Desk()
    wishes = {reason: True} if reason in ("pinned", "required") else {}
    key = desk.load(restart_limit=3, **wishes)
    if reason == "lease":
        desk.send(m.LeaseTaken(desk.now, "a"))
    if reason == "call":
        desk.send(m.CallStarted(desk.now, key))
    (gone,) = [e for e in lost(desk, key, has_sessions=reason == "session") if isinstance(e, m.HostLost)]
    assert gone.broken_leases == (reason in ("lease", "call"))
    assert desk.machine.info("a").restarts_at == 1011.0
    assert desk.send(m.LeaseReleased(desk.now, key)) == []
    with pytest.raises(errors.ModelNotReadyError) as refusal:
        desk.send(m.LeaseTaken(desk.now, "a"))
    assert refusal.value.hint == "it is started again in 1.0 s; look at dmesg"
    desk.tick(0.9)
    assert desk.status(key) is S.FAILED
    desk.tick(0.1)
    assert desk.status(key) is None
    new = restart(desk)
    info = desk.machine.info("a")
    assert (info.status, info.pid, info.restarts) == (S.READY, 7, 1)
    assert [e for e in desk.effects if isinstance(e, m.Succeeds)] == [m.Succeeds(new, key)]
    assert (desk.machine.counters.hosts_died, desk.machine.counters.restarts) == (1, 1)


def test_restarts_wait_twice_as_long_each_time_until_their_limit():
    desk = Desk()
    key = desk.load(pinned=True, restart_limit=3)
    for delay in (1.0, 2.0, 4.0):
        lost(desk, key)
        assert desk.machine.info("a").restarts_at == 1000 + desk.now + delay
        desk.tick(delay)
        key = restart(desk)
    lost(desk, key)
    info = desk.machine.info("a")
    assert (info.status, info.restarts, info.restarts_at, info.error.consecutive) == (S.FAILED, 3, None, 4)
    assert info.error.hint.startswith("it was started again 3 times in a row; load it again with ensure_model()")
    desk.tick(1000)
    assert desk.status(key) is S.FAILED
    # A caller's own wish begins the count again.
    desk.ask(pinned=True, restart_limit=3)
    key = restart(desk)
    lost(desk, key)
    assert desk.machine.info("a").restarts_at is not None


@pytest.mark.parametrize("seconds", [59.0, 60.0])
def test_a_minute_of_service_begins_the_count_again(seconds):
    desk = Desk()
    lost(desk, desk.load(pinned=True, restart_limit=3))
    desk.tick(1)
    key = restart(desk)
    desk.now += seconds
    lost(desk, key)
    assert desk.machine.info("a").restarts_at == 1000 + desk.now + (1 if seconds == 60 else 2)


def test_a_restart_that_fails_is_one_of_them_unless_trying_again_cannot_help():
    desk = Desk()
    lost(desk, desk.load(pinned=True, restart_limit=3))
    desk.tick(1)
    key = desk.machine.coming("a").key
    desk.send(m.WorkerFailed(desk.now, key, DEATH))
    assert desk.machine.info("a").restarts_at == 1000 + desk.now + 2
    desk.tick(2)
    key = desk.machine.coming("a").key
    desk.send(m.WorkerFailed(desk.now, key, dataclasses.replace(FAILURE, retryable=False)))
    assert (desk.status(key), desk.machine.info("a").restarts_at) == (S.FAILED, None)


def test_a_load_whose_host_dies_is_not_started_again():
    desk = Desk()
    key = desk.ask(pinned=True, warmup=True, restart_limit=3)
    desk.plan(key)
    desk.send(m.Loaded(desk.now, key))
    assert lost(desk, key) == []
    assert m.Discard(key) in desk.send(m.WarmedUp(desk.now, key))
    assert desk.outcome(key).message == DEATH.message
    assert desk.machine.info("a").restarts_at is None


def test_a_host_that_dies_while_it_drains_ends_the_drain():
    desk = Desk()
    key = desk.load(pinned=True, restart_limit=3)
    desk.send(m.LeaseTaken(desk.now, "a"))
    desk.send(m.UnloadRequested(desk.now, "a"))
    assert lost(desk, key)[-1] == m.StartUnload(key, 1)
    desk.free(key)
    assert desk.machine.infos() == ()
    assert lost(desk, key) == []


@pytest.mark.parametrize("ends", ["ready", "failed", "cancelled"])
def test_a_host_that_dies_while_it_is_reloaded_leaves_the_place_to_the_reload(ends):
    desk = Desk()
    old = desk.load(pinned=True, restart_limit=3)
    new = desk.ask(pinned=True, restart_limit=3, reload=True)
    desk.plan(new)
    if ends == "cancelled":
        desk.send(m.CancelRequested(desk.now, "a"))
    lost(desk, old)
    assert desk.status(old) is None
    assert m.Succeeds(new, old) in desk.effects
    if ends == "ready":
        desk.send(m.Loaded(desk.now, new))
        assert desk.status(new) is S.READY
        return
    desk.send(m.WorkerFailed(desk.now, new, FAILURE) if ends == "failed" else m.WorkerStopped(desk.now, new))
    info = desk.machine.info("a")
    assert (info.status, info.restarts_at) == (S.FAILED, 1000 + desk.now + 1)
    assert info.error.message == (FAILURE if ends == "failed" else DEATH).message


@pytest.mark.parametrize("way", ["unload", "close"])
def test_who_unloads_what_has_died_ends_its_restarts(way):
    desk = Desk()
    lost(desk, desk.load(pinned=True, restart_limit=3))
    desk.send(m.UnloadRequested(desk.now, "a") if way == "unload" else m.CloseRequested(desk.now))
    assert desk.tick(100) == []
    assert desk.machine.infos() == ()


def test_stuck_workers_put_restarts_off():
    desk = Desk(max_workers=1, max_stuck=0)
    lost(desk, desk.load(pinned=True, restart_limit=3))
    stuck = desk.ask("b")
    desk.send(m.CancelRequested(desk.now, "b"))
    desk.tick(11)
    assert desk.status(stuck) is S.STUCK
    desk.tick(1)
    assert desk.machine.info("a").status is S.FAILED
    desk.send(m.WorkerStopped(desk.now, stuck))
    desk.tick(1)
    assert desk.machine.coming("a") is not None
