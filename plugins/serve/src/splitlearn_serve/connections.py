"""Connections: how many there may be, how long a client may take, and what happens where descriptors run out.

uvicorn and asyncio bound neither: a connection that never makes a request is kept for ever, and an
accept loop without descriptors tries again and again and logs each time. Here

- a client has so many seconds to make a request, from its connection or its last answer on, however
  it spreads the bytes; and so many to read what was sent;
- where one connection more would be too many, the one that has been idle for longest is closed, and
  one is idle where it is the client's turn, to ask or to read;
- no more than a part of the connections may have a request at once, so that there always is an idle
  one to close, and health checks are answered whatever the others do.
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

#: Seconds in which a request's headers must have come, from the connection or the last answer on.
REQUEST_TIMEOUT = 10.0
#: Seconds in which a client must have read what waits for it.
READING_TIMEOUT = 20.0
#: Seconds that open connections have to end once everything else is over.
GOODBYE = 2.0

#: Connections at most, however many descriptors there are, and at least.
_MOST, _FEWEST = 512, 16
#: Descriptors that are left for files and downloads, at least.
_RESERVE = 64
#: Of the connections, the part that may have a request at once.
_BUSY_PART = 0.75
#: Seconds until the next try where no connection can be accepted, and between two lines about it in the log.
_RETRY, _LOG_EVERY = 0.1, 60.0
#: How often room is looked for before a new connection is closed.
_TRIES = 10


def connection_limit() -> int:
    """Return how many connections this process can bear, and still load models."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return _MOST
    try:
        taken = len(list(Path("/dev/fd").iterdir()))
    except OSError:
        taken = _RESERVE
    return max(_FEWEST, min(_MOST, limit - taken - max(_RESERVE, limit // 4)))


class Pool:
    """The open connections of a server, and who has to go where there are too many.

    Args:
        limit: How many there may be; by default what the process can bear.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = connection_limit() if limit is None else limit
        self._busy_limit = max(1, int(self.limit * _BUSY_PART))
        self._busy: set[Connection] = set()
        #: The one that has been idle for longest comes first.
        self._idle: dict[Connection, None] = {}
        self._logged_at = float("-inf")

    def __len__(self) -> int:
        return len(self._busy) + len(self._idle)

    @property
    def is_full(self) -> bool:
        """Whether so many have a request that another one is to be refused."""
        return len(self._busy) > self._busy_limit

    def note(self, connection: Connection, *, idle: bool) -> None:
        """Take a connection for idle, from now on if it was not, or for busy."""
        if not idle:
            self._idle.pop(connection, None)
            self._busy.add(connection)
        elif connection not in self._idle:
            self._busy.discard(connection)
            self._idle[connection] = None

    def forget(self, connection: Connection) -> None:
        """Count a connection no longer."""
        self._busy.discard(connection)
        self._idle.pop(connection, None)

    async def make_room(self) -> bool:
        """Say whether there is room for one more, closing the one that has been idle for longest if need be."""
        for _ in range(_TRIES):
            if len(self) < self.limit:
                return True
            if self.close_idlest(f"{self.limit} connections are open, the most there may be"):
                return True
            # Most requests take no time, but a client that sends them one after the other is never idle.
            for connection in self._busy:
                connection.end_after_answer()
            await asyncio.sleep(_RETRY)
        return False

    def close_idlest(self, why: str) -> bool:
        """Close the connection that has been idle for longest; False where none is."""
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
        """Close all of them at once."""
        for connection in (*self._idle, *self._busy):
            connection.abort()


class Connection(H11Protocol):
    """One connection, which is closed where its client does not do its part in time."""

    def __init__(
        self, pool: Pool, config: uvicorn.Config, server_state: ServerState, app_state: dict[str, Any]
    ) -> None:
        super().__init__(config=config, server_state=server_state, app_state=app_state)
        self._pool = pool
        #: By when a request must have been made, and what was sent must have been read.
        self._request_due: asyncio.TimerHandle | None = None
        self._reading_due: asyncio.TimerHandle | None = None

    def abort(self) -> None:
        """Close it at once, whatever is still to be sent."""
        self.transport.abort()

    def end_after_answer(self) -> None:
        """Take no further request after the one that is being answered."""
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
            # It was not speaking HTTP, and there is no orderly way to end that.
            self.abort()

    def _review(self) -> None:
        """See whether it is the client's turn, to make a request or to read, or ours, to answer."""
        is_to_ask = self.cycle is None or self.cycle.response_complete
        self._pool.note(self, idle=is_to_ask or self._reading_due is not None)
        if not is_to_ask:
            self._stop_waiting()
        elif self._request_due is None:
            # Not begun again with each byte that comes.
            self._request_due = self.loop.call_later(REQUEST_TIMEOUT, self.abort)

    def _stop_waiting(self) -> None:
        if self._request_due is not None:
            self._request_due.cancel()
            self._request_due = None


class Server(uvicorn.Server):
    """uvicorn, but for its signals, which would end the process, and for how it accepts and ends connections."""

    def __init__(self, config: uvicorn.Config, pool: Pool) -> None:
        super().__init__(config)
        self.answering = asyncio.Event()
        self._pool = pool
        self._accepting: list[asyncio.Task[None]] = []

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept; instead of uvicorn's, which hands the sockets to asyncio."""
        await self.lifespan.startup()
        self.servers = []
        self._accepting = [
            asyncio.create_task(self._accept(listener), name="accept connections") for listener in sockets or ()
        ]
        self.started = True
        self.answering.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more, and end the connections: those that do not end by themselves, after a while."""
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
                # No descriptor is free, mostly; or the client has gone. Neither may end the loop, or keep it busy.
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
    """Set uvicorn up as a plain server of HTTP/1.1 that leaves logging and headers to us."""
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
