"""Support for checks of the manager: loads that wait at a gate, and checks for leaks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from splitlearn_core.manager.loaders.loadable import ReportProgress
from splitlearn_core.manager.manager import AsyncModelManager
from splitlearn_core.types import Progress

_T = TypeVar("_T")
#: Seconds after which a test fails; generous, for busy machines.
LIMIT = 120.0
#: Seconds between two reports of a waiting load.
_REPORT_EVERY = 0.002


class Gate:
    """A point at which a load waits until the gate is opened."""

    def __init__(self, *, deaf: bool = False, progress: Progress | None = None) -> None:
        """Create a closed gate.

        Args:
            deaf: Whether the load sends no reports while it waits, so that it does not notice a cancellation.
            progress: The progress that it reports.
        """
        self.reached = threading.Event()
        self._opened = threading.Event()
        self._deaf = deaf
        self.progress = progress or Progress("reading")
        self._error: BaseException | None = None

    def open(self) -> None:
        """Let the load continue."""
        self._opened.set()

    def fail(self, error: BaseException) -> None:
        """Let the load fail with an error."""
        self._error = error
        self._opened.set()

    async def arrival(self) -> None:
        """Wait until the load has reached the gate, without blocking the event loop."""
        if not await asyncio.to_thread(self.reached.wait, LIMIT):
            raise AssertionError("the load did not reach the gate")

    def enter(self, report: ReportProgress) -> None:
        """Wait until the gate is opened; called by the load."""
        self.reached.set()
        if self._deaf:
            self._opened.wait(LIMIT)
        else:
            while not self._opened.wait(_REPORT_EVERY):
                report(self.progress)
        if self._error is not None:
            raise self._error


def run(main: Coroutine[Any, Any, _T], *, limit: float = LIMIT) -> _T:
    """Run a test's coroutine in a new event loop; fails on errors that only the loop's exception handler has seen."""
    unhandled: list[dict[str, Any]] = []

    async def watched() -> _T:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
        async with asyncio.timeout(limit):
            return await main

    result = asyncio.run(watched(), debug=False)
    if unhandled:
        raise AssertionError(f"errors that nothing handled: {unhandled}")
    return result


def charges(manager: AsyncModelManager) -> dict[str, int]:
    """Return the bytes charged and reserved, by ledger, without ledgers that are empty."""
    ledgers = manager.get_statistics().ledgers
    return {name: both for name, ledger in ledgers.items() if (both := ledger.charged + ledger.reserved)}


def check_sound(manager: AsyncModelManager) -> None:
    """Fail on a manager whose state violates its invariants."""
    problems = manager._shell.machine.violations()  # noqa: SLF001  # the machine checks its own invariants
    slots = set(manager._shell.slots)  # noqa: SLF001  # compared with the machine
    generations = {generation.key for generation in manager._shell.machine.generations()}  # noqa: SLF001  # likewise
    if slots != generations:
        problems.append(f"the shell holds {slots}, the machine {generations}")
    if problems:
        raise AssertionError("\n".join(problems))


def check_closed(manager: AsyncModelManager) -> None:
    """Fail if a closed manager has left memory, models, tasks or threads behind."""
    check_sound(manager)
    left: list[object] = [*charges(manager).items(), *manager.list_models()]
    left += [task for task in asyncio.all_tasks() if task.get_name().startswith("splitlearn")]
    left += splitlearn_threads()
    if left:
        raise AssertionError(f"left over: {left}")


def splitlearn_threads() -> list[str]:
    """Return the names of the live threads of splitlearn."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("splitlearn")]


@asynccontextmanager
async def closing(manager: AsyncModelManager) -> AsyncIterator[AsyncModelManager]:
    """Run a block with a manager, then check its invariants, close it, and check for leaks."""
    async with manager:
        yield manager
        check_sound(manager)
    check_closed(manager)


async def outcome_of(work: Awaitable[Any]) -> Any:
    """Return what an awaitable returns, or the exception that it raises."""
    return (await asyncio.gather(work, return_exceptions=True))[0]
