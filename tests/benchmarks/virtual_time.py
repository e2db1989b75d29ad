"""Time that passes when nothing else is left to do: an event loop, and functions in threads that wait in it.

One thread runs at a time, and always the same one next: a run depends on nothing but its inputs.
"""

from __future__ import annotations

import asyncio
import random
import selectors
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from splitlearn_core.hosts.clock import Clock

#: Bytes of a thread's stack: there is one for each actor.
_STACK = 2**20
_CURRENT: ContextVar[Actor] = ContextVar("actor")


class _Selector(selectors.SelectSelector):
    """Waits for nothing: time jumps to the moment at which the next thing is due."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("everything waits, and nothing is left that could happen")
        self.loop.now += max(0.0, timeout)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time is a number; it starts at 0, and knows no files or sockets."""

    def __init__(self) -> None:
        selector = _Selector()
        super().__init__(selector)
        selector.loop = self
        self.now = 0.0

    def time(self) -> float:
        return self.now

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        """Run a function at once, instead of in another thread."""
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001  # raised where its end is awaited
            future.set_exception(error)
        return future

    def _write_to_self(self) -> None:
        """Do nothing: nobody sleeps who would have to be woken."""


class Actor:
    """A function in a thread of its own, which runs only while the loop stands still.

    Args:
        loop: The loop in which it waits.
        function: What it does.
    """

    def __init__(self, loop: VirtualLoop, function: Callable[[], None]) -> None:
        self._loop = loop
        self._function = function
        self._go, self._parked = threading.Semaphore(0), threading.Semaphore(0)
        self._request: Callable[[Callable[[Any], None]], object] | None = None
        self._answer: Any = None
        self.failure: BaseException | None = None
        #: Set at its end, in the loop.
        self.ended = loop.create_future()
        before = threading.stack_size(_STACK)
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._thread.start()
        threading.stack_size(before)
        loop.call_soon(self._resume, None)

    @staticmethod
    def current() -> Actor:
        """Return the actor whose thread this is."""
        return _CURRENT.get()

    def wait(self, request: Callable[[Callable[[Any], None]], object]) -> Any:
        """Let the loop go on, and return its answer, or raise it.

        Args:
            request: Called in the loop, with a function that takes the answer.
        """
        self._request = request
        self._parked.release()
        self._go.acquire()
        answer, self._answer = self._answer, None
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def pause(self, seconds: float) -> None:
        self.wait(lambda answer: self._loop.call_later(max(0.0, seconds), answer, None))

    def _main(self) -> None:
        _CURRENT.set(self)
        self._go.acquire()
        try:
            self._function()
        except BaseException as error:  # noqa: BLE001  # the loop's side reports it
            self.failure = error
        self._request = None
        self._parked.release()

    def _resume(self, answer: Any) -> None:
        """Run its thread until it waits again, or has ended."""
        self._answer = answer
        self._go.release()
        self._parked.acquire()
        request, self._request = self._request, None
        if request is None:
            self._thread.join()
            self.ended.set_result(self.failure)
        else:
            request(lambda value: self._loop.call_soon(self._resume, value))


class ActorClock(Clock):
    """The time of clients that are actors."""

    def __init__(self, loop: VirtualLoop, chance: random.Random) -> None:
        self._loop = loop
        self._chance = chance

    def now(self) -> float:
        return self._loop.time()

    def pause(self, seconds: float) -> None:
        Actor.current().pause(seconds)

    def spread(self, seconds: float) -> float:
        return seconds * self._chance.uniform(0.5, 1.0)
