"""The manager's events, for whoever follows them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator

from splitlearn_core.manager.status import ManagerEvent

#: Events that a slow reader may be behind before it misses the oldest.
_BACKLOG = 1024


class EventStream(AsyncIterator[ManagerEvent]):
    """Yields events from the moment it was made, until the manager is closed.

    A reader that is more than 1024 events behind misses the oldest: ``sequence`` then has a gap.
    """

    def __init__(self) -> None:
        self._events: deque[ManagerEvent] = deque(maxlen=_BACKLOG)
        self._news = asyncio.Event()
        self._ended = False

    def put(self, event: ManagerEvent) -> None:
        self._events.append(event)
        self._news.set()

    def end(self) -> None:
        self._ended = True
        self._news.set()

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> ManagerEvent:
        while not self._events:
            if self._ended:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._events.popleft()
