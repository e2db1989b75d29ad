"""Threads of torch that end while another process computes, and are started again."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from splitlearn_core.hosts import idle_threads
from splitlearn_core.hosts.idle_threads import ComputingLock, end_idle_threads

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="libgomp is what torch uses on Linux"),
    pytest.mark.skipif("OpenMP" not in torch.__config__.parallel_info(), reason="torch was built without it"),
]

TASKS = Path("/proc/self/task")
VALUES = torch.arange(2**20, dtype=torch.float32)


@pytest.fixture(autouse=True)
def one_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})


def in_a_thread(work: Callable[[], None]) -> None:
    """Run it in a new thread, from which torch has started none, with two threads for a computation."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(2,)) as pool:
        result = pool.submit(work)
    torch.set_num_threads(threads)
    result.result()


def computed() -> tuple[torch.Tensor, set[Path]]:
    """Return a result, and the threads that were started for it."""
    before = set(TASKS.iterdir())
    result = VALUES.sin()
    return result, set(TASKS.iterdir()) - before


def wait_for_the_end_of(tasks: set[Path]) -> None:
    while any(task.exists() for task in tasks):
        os.sched_yield()


def test_they_end_and_are_started_again() -> None:
    """With the same result, as often as there are computations."""

    def work() -> None:
        for _ in range(3):
            result, tasks = computed()
            assert len(tasks) == 1
            assert torch.equal(result, VALUES.sin())
            end_idle_threads(1.0)
            wait_for_the_end_of(tasks)

    in_a_thread(work)


def test_they_end_when_a_lock_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lock under which a host computes; after an error, too."""
    monkeypatch.setattr(idle_threads, "_WORTHWHILE", 0.0)

    def work() -> None:
        lock = ComputingLock()
        with lock:
            _, tasks = computed()
        wait_for_the_end_of(tasks)
        with contextlib.suppress(KeyError), lock:
            _, tasks = computed()
            raise KeyError
        wait_for_the_end_of(tasks)

    in_a_thread(work)


def test_they_stay_where_they_stand_in_nobody_s_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a short computation, or with a processor for each thread of both sides."""

    def work() -> None:
        _, tasks = computed()
        end_idle_threads(1e-6)
        assert computed()[1] == set()
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(5)))
        end_idle_threads(1.0, other_threads=3)
        assert computed()[1] == set()
        end_idle_threads(1.0, other_threads=4)
        wait_for_the_end_of(tasks)

    in_a_thread(work)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_fork_does_not_wait_for_the_threads_of_its_parent() -> None:
    """They are not there: it would wait forever."""

    def work() -> None:
        computed()
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(60)
            end_idle_threads(1.0)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0

    in_a_thread(work)
