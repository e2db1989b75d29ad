"""Threads of the manager: they report their outcome and their stack, and do not change torch for other threads."""

from __future__ import annotations

import gc
import subprocess
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import pytest
import torch

from splitlearn_core.errors import ManagerClosedError
from splitlearn_core.manager.workers import CallPool, own_torch_threads, run_in_thread

LONG = 60.0


def outcome_of(start: Callable[[Callable[[Any], None]], Any]) -> Any:
    """Start a function that reports its outcome, and wait for the outcome."""
    outcomes: SimpleQueue[Any] = SimpleQueue()
    start(outcomes.put)
    return outcomes.get(timeout=LONG)


def in_new_thread(function: Callable[[], Any], **options: Any) -> Any:
    return outcome_of(lambda done: run_in_thread("test", function, done, **options))


class Stop:
    """A function that waits until it is let go."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self) -> str:
        self.begun.set()
        self.go.wait(LONG)
        return "went on"


def test_a_result_is_reported_in_the_worker() -> None:
    """With the thread's name, and as a daemon."""
    thread = in_new_thread(threading.current_thread)

    assert thread is not threading.current_thread()
    assert thread.name == "test"
    assert thread.daemon


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(3), KeyboardInterrupt(), MemoryError()])
def test_every_exception_is_reported(error: BaseException) -> None:
    """A waiting caller gets every exception, even one that would end the interpreter."""

    def fail() -> None:
        raise error

    assert in_new_thread(fail) is error


def test_a_failing_listener_does_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    """An event loop that has closed meanwhile; it is logged."""

    def deaf(_: Any) -> None:
        raise RuntimeError("Event loop is closed")

    assert run_in_thread("deaf", int, deaf).join(LONG)

    assert "could not report" in caplog.text


def test_a_worker_says_where_it_stands() -> None:
    """The stack names the function; afterwards there is none."""
    stop = Stop()
    worker = run_in_thread("stands", stop, lambda _: None)
    assert stop.begun.wait(LONG)

    assert worker.is_alive
    assert "self.go.wait" in worker.stack()
    assert not worker.join(0)

    stop.go.set()
    assert worker.join(LONG)
    assert not worker.is_alive
    assert worker.stack() == ""


def test_nothing_is_kept_of_a_failed_function() -> None:
    """An error knows the frames it went through, and they must not know it: no garbage collection is needed."""

    class Weights:
        pass

    seen: list[weakref.ref[Weights]] = []

    def fail() -> None:
        weights = Weights()
        seen.append(weakref.ref(weights))
        raise ValueError("no")

    gc.collect()
    gc.disable()
    try:
        assert run_in_thread("fails", fail, lambda _: None).join(LONG)
        pool = CallPool(1)
        outcome_of(lambda done: pool.submit(fail, lambda error: done(str(error))))
        outcome_of(lambda done: pool.submit(int, done))
        assert [ref() for ref in seen] == [None, None]
    finally:
        gc.enable()
    assert pool.close(LONG)


def test_a_pool_keeps_its_threads() -> None:
    """One call after the other runs in the same thread, and no more threads are made than are needed."""
    pool = CallPool(3)
    threads = {outcome_of(lambda done: pool.submit(threading.get_ident, done)) for _ in range(20)}

    assert len(pool.workers) == len(threads) == 1
    # Nor do those that were needed once take turns.
    stops, outcomes = [Stop(), Stop()], SimpleQueue[Any]()
    for stop in stops:
        pool.submit(stop, outcomes.put)
        assert stop.begun.wait(LONG)
    for stop in stops:
        stop.go.set()
        outcomes.get(timeout=LONG)
    assert len({outcome_of(lambda done: pool.submit(threading.get_ident, done)) for _ in range(20)}) == 1
    assert len(pool.workers) == 2
    assert pool.close(LONG)


def test_a_pool_runs_as_many_calls_at_once_as_it_has_threads() -> None:
    """And the next one when one of them is done."""
    pool = CallPool(2)
    stops = [Stop() for _ in range(3)]
    outcomes: SimpleQueue[Any] = SimpleQueue()
    for stop in stops:
        pool.submit(stop, outcomes.put)

    assert stops[0].begun.wait(LONG)
    assert stops[1].begun.wait(LONG)
    assert not stops[2].begun.is_set()
    stops[0].go.set()
    assert stops[2].begun.wait(LONG)
    for stop in stops:
        stop.go.set()

    assert [outcomes.get(timeout=LONG) for _ in stops] == ["went on"] * 3
    assert len(pool.workers) == 2
    assert pool.close(LONG)


def test_a_closed_pool_fails_calls_that_have_not_started() -> None:
    """The running call ends by itself; the waiting one and later ones are refused."""
    pool = CallPool(1)
    stop = Stop()
    outcomes: SimpleQueue[Any] = SimpleQueue()
    pool.submit(stop, outcomes.put)
    assert stop.begun.wait(LONG)
    pool.submit(lambda: "late", outcomes.put)

    assert not pool.close(0)

    assert isinstance(outcomes.get(timeout=LONG), ManagerClosedError)
    with pytest.raises(ManagerClosedError):
        pool.submit(lambda: "later", outcomes.put)
    stop.go.set()
    assert outcomes.get(timeout=LONG) == "went on"
    assert pool.close(LONG)
    assert not any(worker.is_alive for worker in pool.workers)


def test_a_pool_that_was_never_used_closes() -> None:
    """There is nothing to wait for."""
    assert CallPool(4).close(0)


def test_a_thread_that_never_returns_does_not_keep_the_process(world: Any) -> None:
    """Of either kind; ``concurrent.futures`` would join them."""
    code = (
        "import threading\nfrom splitlearn_core.manager.workers import CallPool, run_in_thread\n"
        "begun = threading.Semaphore(0)\n"
        "def hang():\n    begun.release()\n    threading.Event().wait()\n"
        "run_in_thread('hangs', hang, print)\npool = CallPool(1)\npool.submit(hang, print)\n"
        "begun.acquire(); begun.acquire(); pool.close(0.01)\nprint('end')"
    )
    try:
        done = world.python("-c", code)
    except subprocess.TimeoutExpired:  # pragma: no cover
        pytest.fail("the process did not end")
    assert (done.returncode, done.stdout.strip()) == (0, "end"), done.stderr


@pytest.fixture
def default_threads() -> Any:
    """How many threads torch gives to a thread that begins now; and afterwards the same."""
    before = torch.get_num_threads()
    yield in_new_thread(torch.get_num_threads)
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_torch_threads_are_the_workers_alone(default_threads: int, count: int) -> None:
    """Neither this thread nor one that begins later has another number than before."""
    here = torch.get_num_threads()

    assert in_new_thread(torch.get_num_threads, torch_threads=count) == count

    assert torch.get_num_threads() == here
    assert in_new_thread(torch.get_num_threads) == default_threads


def test_torch_threads_of_the_user_are_kept(default_threads: int) -> None:
    """A number that the user has set is the default of later threads, before and after."""
    torch.set_num_threads(default_threads + 2)

    assert in_new_thread(torch.get_num_threads, torch_threads=1) == 1

    assert torch.get_num_threads() == default_threads + 2
    assert in_new_thread(torch.get_num_threads) == default_threads + 2


def test_a_pools_threads_have_their_number(default_threads: int) -> None:
    """At their first call and at later ones; the computation is the same."""
    pool = CallPool(1, torch_threads=3)
    counts = [outcome_of(lambda done: pool.submit(torch.get_num_threads, done)) for _ in range(3)]
    matrix = torch.randn(200, 200, generator=torch.Generator().manual_seed(0))
    product = outcome_of(lambda done: pool.submit(lambda: matrix @ matrix, done))

    assert counts == [3, 3, 3]
    assert torch.allclose(product, matrix @ matrix)
    assert in_new_thread(torch.get_num_threads) == default_threads
    assert pool.close(LONG)


def test_many_workers_at_once_leave_the_default(default_threads: int) -> None:
    """Each has its own number, whatever the others do meanwhile."""
    outcomes: SimpleQueue[Any] = SimpleQueue()
    for count in range(1, 25):
        run_in_thread("many", lambda c=count: (c, torch.get_num_threads()), outcomes.put, torch_threads=count)

    assert all(requested == actual for requested, actual in (outcomes.get(timeout=LONG) for _ in range(24)))
    assert in_new_thread(torch.get_num_threads) == default_threads


def test_a_thread_count_that_torch_refuses_is_reported(default_threads: int) -> None:
    """The function does not run, and the default is kept."""
    assert isinstance(in_new_thread(lambda: "ran", torch_threads=0), RuntimeError)
    assert in_new_thread(torch.get_num_threads) == default_threads

    with pytest.raises(RuntimeError):
        own_torch_threads(-1)
