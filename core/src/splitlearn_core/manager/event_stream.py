"""The manager's history of events, and streams of new ones."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import AsyncIterator

from splitlearn_core.manager.messages import Changed
from splitlearn_core.manager.status import ManagerEvent

#: Events that a slow reader may be behind before it misses the oldest.
_BACKLOG = 1024
#: Changes that are kept for :meth:`History.of`.
_KEPT = 4096


class EventStream(AsyncIterator[ManagerEvent]):
    """Yields the events from its creation until the manager is closed.

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


class History:
    """The changes of a manager's models: keeps the last ones, and passes each to all streams."""

    def __init__(self) -> None:
        self._streams: weakref.WeakSet[EventStream] = weakref.WeakSet()
        self._story: deque[ManagerEvent] = deque(maxlen=_KEPT)
        self._sequence = 0
        self._ended = False

    def add(self, change: Changed, at: float) -> None:
        """Record a change, ``at`` in seconds since 1970."""
        self._sequence += 1
        (model_id, number), before, after = change.key, change.before, change.after
        event = ManagerEvent(self._sequence, at, model_id, number, before, after, change.cause)
        self._story.append(event)
        # Usually there is no stream, and iterating over a weak set costs more than the rest of this method.
        for stream in tuple(self._streams) if len(self._streams) else ():
            stream.put(event)

    def of(self, model_id: str) -> tuple[ManagerEvent, ...]:
        """Return the recorded changes of one model, oldest first."""
        return tuple(event for event in self._story if event.model_id == model_id)

    def follow(self) -> EventStream:
        """Return a stream of the changes from now on."""
        stream = EventStream()
        self._streams.add(stream)
        if self._ended:
            stream.end()
        return stream

    def end(self) -> None:
        """End all streams: there will be no more changes."""
        self._ended = True
        for stream in tuple(self._streams):
            stream.end()
