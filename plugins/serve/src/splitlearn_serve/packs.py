"""Steps of packed sessions on one generation of a model: all that wait share the next forward."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from splitlearn_core import AsyncManagedModel
from splitlearn_core.extension import Frame, encode

if TYPE_CHECKING:
    from splitlearn_core.extension import PendingStep, SessionLimits, Sessions

#: How long to wait for further steps of the sessions in the last forwards: a share of the time of the last one, and at
#: least so many seconds. After a wait in vain, so many forwards begin without one.
_WINDOW_PART, _WINDOW_LEAST, _FORWARDS_WITHOUT = 0.1, 0.002, 8


@dataclass(slots=True, eq=False)
class _Waiting:
    step: PendingStep
    #: The reply, and the same as bytes.
    reply: asyncio.Future[tuple[Frame, bytes]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


class Packs:
    """Runs steps of packed sessions together. It is used in the manager's event loop.

    Args:
        model: The generation of the model.
        table: Its sessions.
        clock: Returns seconds, monotonically.
    """

    def __init__(self, model: AsyncManagedModel, table: Sessions, clock: Callable[[], float] = time.monotonic) -> None:
        self._model = model
        self._table = table
        self._clock = clock
        self._waiting: list[_Waiting] = []
        self._task: asyncio.Task[None] | None = None
        #: The sessions in the last forward, and those in the one before; the seconds that the last one took.
        self._latest: tuple[frozenset[int], frozenset[int]] = (frozenset(), frozenset())
        self._seconds = 0.0
        self._without_wait = 0
        self._arrived = asyncio.Event()

    def step_of(self, frame: Frame, owner: str, limits: SessionLimits) -> PendingStep | None:
        """Return the step that a frame brings, if its session is packed."""
        return self._table.pending_step(frame, owner, limits)

    async def run(self, step: PendingStep) -> tuple[Frame, bytes]:
        """Run a step to its end, together with others; return the reply, and the same as bytes."""
        waiting = _Waiting(step)
        self._waiting.append(waiting)
        self._arrived.set()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="run packs")
        try:
            return await asyncio.shield(waiting.reply)
        except asyncio.CancelledError:
            step.is_abandoned = True
            # Nothing else may use its session until that is restored.
            await asyncio.wait([waiting.reply])
            raise

    async def _run(self) -> None:
        try:
            await self._run_all()
        except asyncio.CancelledError:
            # A thread may still compute: its sessions stay locked, and end with the table.
            for waiting in self._waiting:
                waiting.reply.cancel()
            raise

    async def _run_all(self) -> None:
        while self._waiting:
            await self._gather()
            pack = list(self._waiting)
            self._latest = frozenset(waiting.step.frame.session for waiting in pack), self._latest[0]
            begin = self._clock()
            try:
                replies = await self._model.run(partial(self._forward, pack))
            except Exception as error:  # noqa: BLE001  # each of those that wait raises it
                for waiting in pack:
                    # What has its reply has released its session.
                    if waiting.step.begun is not None and waiting.step.reply is None:
                        waiting.step.begun.fail(None)
                    _settle(waiting, error)
                self._waiting = [waiting for waiting in self._waiting if waiting not in pack]
                continue
            self._seconds = self._clock() - begin
            for waiting, reply in replies.items():
                self._waiting.remove(waiting)
                _settle(waiting, reply)
                # One reply in each turn of the loop, which does other things between them.
                await asyncio.sleep(0)

    async def _gather(self) -> None:
        """Wait a little for sessions that took part in the last forwards: their owners are about to go on."""
        if self._without_wait:
            self._without_wait -= 1
            return
        expected = self._latest[0] | self._latest[1]
        try:
            async with asyncio.timeout(max(_WINDOW_LEAST, _WINDOW_PART * self._seconds)):
                while expected - {waiting.step.frame.session for waiting in self._waiting}:
                    self._arrived.clear()
                    await self._arrived.wait()
        except TimeoutError:
            self._without_wait = _FORWARDS_WITHOUT

    def _forward(self, pack: list[_Waiting], _: Any) -> dict[_Waiting, tuple[Frame, bytes]]:
        self._table.run_pack([waiting.step for waiting in pack])
        return {
            waiting: (waiting.step.reply, b"".join(encode(waiting.step.reply)))
            for waiting in pack
            if waiting.step.reply is not None
        }


def _settle(waiting: _Waiting, outcome: Any) -> None:
    if isinstance(outcome, Exception):
        waiting.reply.set_exception(outcome)
        if waiting.step.is_abandoned:
            # Otherwise it is reported as never retrieved.
            waiting.reply.exception()
    else:
        waiting.reply.set_result(outcome)
