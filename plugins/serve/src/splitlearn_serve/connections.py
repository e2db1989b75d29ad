"""Limits of connections: their number, the time a client may take, and the lack of file descriptors.

uvicorn and asyncio limit none of these: a connection without a request is kept forever, and an accept loop
without descriptors retries and logs all the time. Here

- a client has a limited time to send a request, counted from its connection or its last answer, however
  it spreads the bytes, and a limited time to read an answer;
- at the limit of connections, the one that has been idle for longest is closed; a connection is idle while
  the client has to send a request or to read;
- only a part of the connections may have a request at the same time, so that there is always an idle one
  to close, and health checks are always answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

log = logging.getLogger(__name__)

#: Seconds in which a request's headers must arrive, from the connection or the last answer on.
REQUEST_TIMEOUT = 10.0
#: Seconds in which a client must read pending data.
READING_TIMEOUT = 20.0
#: Seconds for open connections to end at shutdown.
GOODBYE = 2.0

#: Upper and lower bound of the limit of connections, whatever the number of descriptors.
_MOST, _FEWEST = 512, 16
#: Descriptors reserved for files and downloads, at least.
_RESERVE = 64
#: Fraction of the connections that may have a request at the same time.
_BUSY_PART = 0.75
#: Seconds until the next attempt to accept a connection, and between two log lines about it.
_RETRY, _LOG_EVERY = 0.1, 60.0
#: Attempts to make room before a new connection is closed.
_TRIES = 10


def connection_limit() -> int:
    """Return how many connections this process can hold and still load models."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return _MOST
    try:
        in_use = len(list(Path("/dev/fd").iterdir()))
    except OSError:
        in_use = _RESERVE
    return max(_FEWEST, min(_MOST, limit - in_use - max(_RESERVE, limit // 4)))


class Pool:
    """The open connections of a server, and which are closed at the limit.

    Args:
        limit: The most connections; by default :func:`connection_limit`.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = connection_limit() if limit is None else limit
        self._busy_limit = max(1, int(self.limit * _BUSY_PART))
        self._busy: set[Connection] = set()
        #: In the order in which they became idle.
        self._idle: dict[Connection, None] = {}
        self._logged_at = float("-inf")

    def __len__(self) -> int:
        return len(self._busy) + len(self._idle)

    @property
    def is_full(self) -> bool:
        """Whether so many connections have a request that further ones are refused."""
        return len(self._busy) > self._busy_limit

    def note(self, connection: Connection, *, idle: bool) -> None:
        """Record that a connection is idle or busy; a connection that stays idle keeps its position."""
        if not idle:
            self._idle.pop(connection, None)
            self._busy.add(connection)
        elif connection not in self._idle:
            self._busy.discard(connection)
            self._idle[connection] = None

    def forget(self, connection: Connection) -> None:
        """Remove a connection."""
        self._busy.discard(connection)
        self._idle.pop(connection, None)

    async def make_room(self) -> bool:
        """Return whether one more connection fits, after closing the longest idle one if necessary."""
        for _ in range(_TRIES):
            if len(self) < self.limit:
                return True
            if self.close_idlest(f"{self.limit} connections are open, the most there may be"):
                return True
            # A client that sends requests without a pause is never idle.
            for connection in self._busy:
                connection.end_after_answer()
            await asyncio.sleep(_RETRY)
        return False

    def close_idlest(self, why: str) -> bool:
        """Close the connection that has been idle for longest; False if none is idle."""
        if time.monotonic() - self._logged_at > _LOG_EVERY:
            self._logged_at = time.monotonic()
            log.warning("%s: those that have been idle for longest are closed", why)
        connection = next(iter(self._idle), None)
        if connection is None:
            return False
        self.forget(connection)
        connection.abort()
        return True

    def abort(self) -> None:
        """Close all connections immediately."""
        for connection in (*self._idle, *self._busy):
            connection.abort()


class Connection(H11Protocol):
    """A connection, closed if its client does not send or read in time."""

    def __init__(
        self, pool: Pool, config: uvicorn.Config, server_state: ServerState, app_state: dict[str, Any]
    ) -> None:
        super().__init__(config=config, server_state=server_state, app_state=app_state)
        self._pool = pool
        #: Timers of the next request, and of pending data to be read.
        self._request_due: asyncio.TimerHandle | None = None
        self._reading_due: asyncio.TimerHandle | None = None

    def abort(self) -> None:
        """Close it immediately, without sending pending data."""
        self.transport.abort()

    def end_after_answer(self) -> None:
        """Accept no further request after the current one."""
        if self.cycle is not None:
            self.cycle.keep_alive = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self._review()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.resume_writing()
        self._stop_waiting()
        self._pool.forget(self)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._review()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._review()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._reading_due is None:
            self._reading_due = self.loop.call_later(READING_TIMEOUT, self.abort)
        self._review()

    def resume_writing(self) -> None:
        if self._reading_due is not None:
            self._reading_due.cancel()
            self._reading_due = None
        super().resume_writing()
        self._review()

    def shutdown(self) -> None:
        try:
            super().shutdown()
        except h11.LocalProtocolError:
            # The client did not speak HTTP, so there is no orderly end.
            self.abort()

    def _review(self) -> None:
        """Update the pool and the timers: the client has to send or to read, or the server has to answer."""
        awaits_request = self.cycle is None or self.cycle.response_complete
        self._pool.note(self, idle=awaits_request or self._reading_due is not None)
        if not awaits_request:
            self._stop_waiting()
        elif self._request_due is None:
            # Not restarted with each byte.
            self._request_due = self.loop.call_later(REQUEST_TIMEOUT, self.abort)

    def _stop_waiting(self) -> None:
        if self._request_due is not None:
            self._request_due.cancel()
            self._request_due = None


class Server(uvicorn.Server):
    """uvicorn without its signal handlers, and with its own way to accept and to end connections."""

    def __init__(self, config: uvicorn.Config, pool: Pool) -> None:
        super().__init__(config)
        self.answering = asyncio.Event()
        self._pool = pool
        self._accepting: list[asyncio.Task[None]] = []

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to accept connections; replaces uvicorn's method, which passes the sockets to asyncio."""
        await self.lifespan.startup()
        self.servers = []
        self._accepting = [
            asyncio.create_task(self._accept(listener), name="accept connections") for listener in sockets or ()
        ]
        self.started = True
        self.answering.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting, and end the connections: after a grace period, by force."""
        for task in self._accepting:
            task.cancel()
        await asyncio.gather(*self._accepting, return_exceptions=True)
        # Before uvicorn's own limit, which cancels requests and logs their tracebacks.
        abort = asyncio.get_running_loop().call_later(GOODBYE, self._pool.abort)
        await super().shutdown(sockets)
        abort.cancel()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        while True:
            try:
                accepted, _ = await loop.sock_accept(listener)
            except OSError as error:
                # Usually no descriptor is free, or the client has left. Neither may end the loop or keep it busy.
                has_closed = self._pool.close_idlest(f"No connection can be accepted ({error.strerror})")
                await asyncio.sleep(0 if has_closed else _RETRY)
                continue
            if not await self._pool.make_room():
                accepted.close()
                continue
            await loop.connect_accepted_socket(self._connection, accepted)

    def _connection(self) -> Connection:
        return Connection(self._pool, self.config, self.server_state, self.lifespan.state)


def uvicorn_config(app: Any) -> uvicorn.Config:
    """Configure uvicorn as a plain HTTP/1.1 server without logging and extra headers."""
    return uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        # Its warnings are about what clients send, a line each.
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=2 * int(GOODBYE),
    )
