"""Server-sent events: every change of status as it happens, and a picture of everything as it moves."""

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

#: Seconds between two pictures, while something moves and while nothing does.
_MOVING, _RESTING = 0.5, 2.0
#: Seconds after which silence is broken, so that proxies and clients know that the line is alive.
_HEARTBEAT = 10.0
#: Seconds for which a burst of events is gathered.
_BURST = 0.03
#: Events that are kept for a client that does not read.
_BACKLOG = 1000
#: How many may watch at once.
_LIMIT = 64


class WatchRoute:
    """The ASGI application behind ``GET /api/events``.

    It sends ``event: snapshot`` with what ``GET /api/models`` answers: at once, after every change
    and, where it has changed, every half second while something loads. It sends ``event: change``
    with each change of status, whose ``id`` is its sequence number: a gap tells what was missed.
    It ends when the client leaves, when the manager closes and when the server does.
    """

    def __init__(self, control: Control) -> None:
        self._control = control
        self._watchers = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one watcher."""
        if self._watchers >= _LIMIT:
            refusal = RequestError(
                503, "too many watch already", hint="poll /api/models instead", headers={"Retry-After": "10"}
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
                # Asked before the rest is taken, so that the last change is told, too.
                over = changes.over or any(end.done() for end in ends)
                happened = changes.take()
                picture = self._control.snapshot(fresh=bool(happened))
                block = b"".join(_frame(b"change", encode(event.to_dict()), event.sequence) for event in happened)
                if picture.content != sent:
                    block += _frame(b"snapshot", picture.document)
                    sent = picture.content
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
    """The manager's events, gathered until somebody takes them."""

    def __init__(self, events: AsyncIterator[ManagerEvent]) -> None:
        # A client that does not read must not fill the memory; the numbers show what it has missed.
        self._seen: deque[ManagerEvent] = deque(maxlen=_BACKLOG)
        self._news = asyncio.Event()
        self._listener = asyncio.create_task(self._listen(events), name="listen to the manager")

    @property
    def over(self) -> bool:
        """Whether the manager will say nothing more, and everything was taken."""
        return self._listener.done() and not self._seen

    def take(self) -> list[ManagerEvent]:
        """Return what has happened since the last time."""
        seen = list(self._seen)
        self._seen.clear()
        self._news.clear()
        return seen

    async def wait(self, ends: set[asyncio.Future[Any]], limit: float) -> None:
        """Wait until something happened, something ended or the time is up."""
        news = asyncio.ensure_future(self._news.wait())
        try:
            await asyncio.wait([*ends, self._listener, news], timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        finally:
            news.cancel()
        if news.done() and not news.cancelled():
            # Events come in bursts; one picture will do for all of them.
            await asyncio.wait(ends, timeout=_BURST, return_when=asyncio.FIRST_COMPLETED)

    async def close(self) -> None:
        """Stop listening."""
        self._listener.cancel()
        await asyncio.gather(self._listener, return_exceptions=True)

    async def _listen(self, events: AsyncIterator[ManagerEvent]) -> None:
        async for event in events:
            self._seen.append(event)
            self._news.set()


async def client_left(receive: Receive) -> None:
    """Wait until the client is gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def _start() -> Message:
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no")]
    return {"type": "http.response.start", "status": 200, "headers": headers}


def _frame(kind: bytes, data: bytes, number: int | None = None) -> bytes:
    # The data is JSON on one line, so it cannot end the frame early.
    mark = b"" if number is None else b"id: %d\n" % number
    return mark + b"event: " + kind + b"\ndata: " + data + b"\n\n"
