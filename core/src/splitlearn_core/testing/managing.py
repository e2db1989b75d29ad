"""What the kit's checks of the manager need: a load that stands still at a gate, and a look at what is left over."""

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
#: Seconds after which a test has failed rather than been slow, on a busy machine too.
LIMIT = 120.0
#: Seconds between two reports of a load that stands still.
_REPORT_EVERY = 0.002


class Gate:
    """A place at which a load stands still until it is opened."""

    def __init__(self, *, deaf: bool = False, progress: Progress | None = None) -> None:
        """Make one.

        Args:
            deaf: The load does not report while it stands still, so that it does not hear that it is to stop.
            progress: What it reports.
        """
        self.reached = threading.Event()
        self._opened = threading.Event()
        self._deaf = deaf
        self.progress = progress or Progress("reading")
        self._error: BaseException | None = None

    def open(self) -> None:
        """Let it go on."""
        self._opened.set()

    def fail(self, error: BaseException) -> None:
        """Let it end with an error."""
        self._error = error
        self._opened.set()

    async def arrival(self) -> None:
        """Wait until the load stands here, without blocking the loop."""
        if not await asyncio.to_thread(self.reached.wait, LIMIT):
            raise AssertionError("the load did not come to the gate")

    def enter(self, report: ReportProgress) -> None:
        """Stand still; called by the load."""
        self.reached.set()
        if self._deaf:
            self._opened.wait(LIMIT)
        else:
            while not self._opened.wait(_REPORT_EVERY):
                report(self.progress)
        if self._error is not None:
            raise self._error


def run(main: Coroutine[Any, Any, _T], *, limit: float = LIMIT) -> _T:
    """Run a test's coroutine in a loop of its own, and refuse what it leaves behind or lets fail unseen."""
    unseen: list[dict[str, Any]] = []

    async def watched() -> _T:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unseen.append(context))
        async with asyncio.timeout(limit):
            return await main

    result = asyncio.run(watched(), debug=False)
    if unseen:
        raise AssertionError(f"the loop was told of {unseen}")
    return result


def charges(manager: AsyncModelManager) -> dict[str, int]:
    """Return what is charged and promised, by ledger; empty where nothing is."""
    ledgers = manager.get_statistics().ledgers
    return {name: both for name, ledger in ledgers.items() if (both := ledger.charged + ledger.reserved)}


def check_sound(manager: AsyncModelManager) -> None:
    """Refuse a manager that contradicts itself."""
    problems = manager._shell.machine.violations()  # noqa: SLF001  # the machine says of itself what must hold
    slots = set(manager._shell.slots)  # noqa: SLF001  # what is left inside is what it looks at
    generations = {generation.key for generation in manager._shell.machine.generations()}  # noqa: SLF001  # likewise
    if slots != generations:
        problems.append(f"the shell holds {slots}, the machine {generations}")
    if problems:
        raise AssertionError("\n".join(problems))


def check_closed(manager: AsyncModelManager) -> None:
    """Refuse a closed manager that has left anything: memory, models, tasks or threads."""
    check_sound(manager)
    left: list[object] = [*charges(manager).items(), *manager.list_models()]
    left += [task for task in asyncio.all_tasks() if task.get_name().startswith("splitlearn")]
    left += splitlearn_threads()
    if left:
        raise AssertionError(f"left over: {left}")


def splitlearn_threads() -> list[str]:
    """Return the names of our threads that are alive."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("splitlearn")]


@asynccontextmanager
async def closing(manager: AsyncModelManager) -> AsyncIterator[AsyncModelManager]:
    """Use a manager, check it, close it, and check that nothing is left."""
    async with manager:
        yield manager
        check_sound(manager)
    check_closed(manager)


async def outcome_of(work: Awaitable[Any]) -> Any:
    """Return what an awaitable returns, or the exception that it raises."""
    return (await asyncio.gather(work, return_exceptions=True))[0]
