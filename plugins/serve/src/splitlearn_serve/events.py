"""Server-sent events: every change of status, and snapshots of everything."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from splitlearn_core import ManagerEvent
from splitlearn_serve.answers import RequestError, encode, error_answer
from splitlearn_serve.control import Control

#: Seconds between two snapshots, while a model loads and otherwise.
_MOVING, _RESTING = 0.5, 2.0
#: Seconds of silence after which a comment is sent, so that proxies keep the connection.
_HEARTBEAT = 10.0
#: Seconds for which a burst of events is collected.
_BURST = 0.03
#: Events kept for a client that does not read.
_BACKLOG = 1000
#: The most clients at the same time.
_LIMIT = 64


class WatchRoute:
    """The ASGI application behind ``GET /api/events``.

    It sends ``event: snapshot`` with the answer of ``GET /api/models``: at once, after every change
    and, if it has changed, every half second while something loads. It sends ``event: change``
    with each change of status, whose ``id`` is its sequence number: a gap shows missed events.
    It ends when the client leaves, when the manager closes and when the server does.
    """

    def __init__(self, control: Control) -> None:
        self._control = control
        self._watchers = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one client."""
        if self._watchers >= _LIMIT:
            refusal = RequestError(
                503,
                "too many clients read the events already",
                hint="poll /api/models instead",
                headers={"Retry-After": "10"},
            )
            await error_answer(refusal)(scope, receive, send)
            return
        self._watchers += 1
        events = self._control.manager.events()
        waits: set[asyncio.Future[Any]] = {
            asyncio.ensure_future(client_left(receive)),
            asyncio.ensure_future(self._control.ended.wait()),
        }
        try:
            await self._serve(send, events, waits)
        finally:
            self._watchers -= 1
            for task in waits:
                task.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    async def _serve(self, send: Send, events: AsyncIterator[ManagerEvent], ends: set[asyncio.Future[Any]]) -> None:
        await send(_start())
        changes = _Changes(events)
        sent, sent_at = b"", time.monotonic()
        try:
            over = False
            while not over:
                # Before the events are taken, so that the last change is sent, too.
                over = changes.over or any(end.done() for end in ends)
                new_events = changes.take()
                snapshot = self._control.snapshot(fresh=bool(new_events))
                block = b"".join(_frame(b"change", encode(event.to_dict()), event.sequence) for event in new_events)
                if snapshot.content != sent:
                    block += _frame(b"snapshot", snapshot.document)
                    sent = snapshot.content
                elif not block and time.monotonic() - sent_at >= _HEARTBEAT:
                    block = b": still here\n\n"
                if block:
                    await send({"type": "http.response.body", "body": block, "more_body": True})
                    sent_at = time.monotonic()
                if not over:
                    await changes.wait(ends, _MOVING if self._control.is_moving() else _RESTING)
        finally:
            await changes.close()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class _Changes:
    """The manager's events, buffered until they are taken."""

    def __init__(self, events: AsyncIterator[ManagerEvent]) -> None:
        # Bounded: a client that does not read must not fill the memory; gaps in the numbers show what it missed.
        self._pending: deque[ManagerEvent] = deque(maxlen=_BACKLOG)
        self._arrived = asyncio.Event()
        self._listener = asyncio.create_task(self._listen(events), name="listen to the manager")

    @property
    def over(self) -> bool:
        """Whether the manager sends no more events, and all were taken."""
        return self._listener.done() and not self._pending

    def take(self) -> list[ManagerEvent]:
        """Return the events since the last call."""
        events = list(self._pending)
        self._pending.clear()
        self._arrived.clear()
        return events

    async def wait(self, ends: set[asyncio.Future[Any]], limit: float) -> None:
        """Wait until an event arrives, one of ``ends`` is done, or the time is up."""
        arrived = asyncio.ensure_future(self._arrived.wait())
        try:
            await asyncio.wait([*ends, self._listener, arrived], timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        finally:
            arrived.cancel()
        if arrived.done() and not arrived.cancelled():
            # Events come in bursts; one snapshot is enough for all of them.
            await asyncio.wait(ends, timeout=_BURST, return_when=asyncio.FIRST_COMPLETED)

    async def close(self) -> None:
        """Stop listening."""
        self._listener.cancel()
        await asyncio.gather(self._listener, return_exceptions=True)

    async def _listen(self, events: AsyncIterator[ManagerEvent]) -> None:
        async for event in events:
            self._pending.append(event)
            self._arrived.set()


async def client_left(receive: Receive) -> None:
    """Wait until the client disconnects."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _start() -> Message:
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
    return {"type": "http.response.start", "status": 200, "headers": headers}


def _frame(kind: bytes, data: bytes, number: int | None = None) -> bytes:
    # The data is JSON on one line, so it cannot end the frame early.
    event_id = b"" if number is None else b"id: %d\n" % number
    return event_id + b"event: " + kind + b"\ndata: " + data + b"\n\n"
