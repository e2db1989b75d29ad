"""Limits of connections: their number, the time a client may take, and the lack of file descriptors.

uvicorn and asyncio limit none of these: a connection without a request is kept forever, and an accept loop
without descriptors retries and logs all the time. Here

- a client has a limited time to send a request, counted from its connection or its last answer, however
  it spreads the bytes, and a limited time to read an answer;
- at the limit of connections, the one that has been idle for longest is closed; a connection is idle while
  the client has to send a request or to read;
- only a part of the connections may have a request at the same time, so that there is always an idle one
  to close, and health checks are always answered;
- a connection that has become a WebSocket still counts. It may be idle for as long as its application lets
  it, but a message that has begun must arrive, and a reply be read, at a minimum rate. A message larger than
  allowed is answered with an error before it has arrived.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import socket
import ssl
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, cast

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState
from websockets.frames import CloseCode
from websockets.http11 import Request
from websockets.protocol import State

from splitlearn_core import ProtocolError
from splitlearn_core.extension import (
    HEADER_BYTES,
    MAX_META_BYTES,
    MAX_PAYLOAD_BYTES,
    MessageStream,
    message_head,
)
from splitlearn_serve.sessions import refusal_frame

log = logging.getLogger(__name__)

#: Seconds in which a request's headers must arrive, from the connection or the last answer on.
REQUEST_TIMEOUT = 10.0
#: Seconds in which a client must read pending data.
READING_TIMEOUT = 20.0
#: Seconds in which a message of a WebSocket must arrive, besides the time that it takes at the slowest rate allowed,
#: in bytes per second.
MESSAGE_TIMEOUT, SLOWEST = 10.0, 64 * 1024
#: Seconds for a TLS handshake, and for a client to answer the end of TLS: one that waits between two steps does not
#: read. Less than GOODBYE: asyncio cannot abort a TLS connection that was closed twice.
HANDSHAKE_TIMEOUT, TLS_END_TIMEOUT = 10.0, 1.0
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
#: The size of one read from a WebSocket, which fits into the processor's cache.
_READ_BYTES = 128 * 1024
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


class Member(Protocol):
    """The interface of a connection for its pool."""

    def abort(self) -> None:
        """Close it immediately, without sending pending data."""

    def end_after_answer(self) -> None:
        """Accept no further request after the current one."""


class Pool:
    """The open connections of a server; it decides which are closed at the limit.

    Args:
        limit: The maximum number of connections; by default :func:`connection_limit`.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = connection_limit() if limit is None else limit
        self._busy_limit = max(1, int(self.limit * _BUSY_PART))
        self._busy: set[Member] = set()
        #: In the order in which they became idle.
        self._idle: dict[Member, None] = {}
        #: Connections before the end of their TLS handshake.
        self.joining = 0
        self._logged_at = float("-inf")
        #: A shared buffer for received data; each WebSocket consumes it before the next one is served.
        self.arrived = memoryview(bytearray(_READ_BYTES))

    def __len__(self) -> int:
        return len(self._busy) + len(self._idle) + self.joining

    @property
    def is_full(self) -> bool:
        """Whether so many connections have a request that further ones are refused."""
        return len(self._busy) > self._busy_limit

    def note(self, connection: Member, *, idle: bool) -> None:
        """Record that a connection is idle or busy; a connection that stays idle keeps its position."""
        if not idle:
            self._idle.pop(connection, None)
            self._busy.add(connection)
        elif connection not in self._idle:
            self._busy.discard(connection)
            self._idle[connection] = None

    def forget(self, connection: Member) -> None:
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
        self._is_upgraded = False
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

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """Hand the connection and its request over to a WebSocket; as in uvicorn, but with the pool."""
        self._is_upgraded = True
        self._stop_waiting()
        self._pool.forget(self)
        self.connections.discard(self)
        lines = [b"%s: %s" % header for header in self.headers]
        request = b"\r\n".join([b"%s %s HTTP/1.1" % (event.method, event.target), *lines, b"", b""])
        socket_connection = SocketConnection(self._pool, self.config, self.server_state, self.app_state)
        socket_connection.connection_made(self.transport)
        self.transport.set_protocol(socket_connection)
        socket_connection.data_received(request)

    def _review(self) -> None:
        """Update the pool and the timers: the client has to send or to read, or the server has to answer."""
        if self._is_upgraded:
            return
        awaits_request = self.cycle is None or self.cycle.response_complete
        self._pool.note(self, idle=awaits_request or self._reading_due is not None)
        if not awaits_request:
            self._stop_waiting()
        elif self._request_due is None:
            # The timer is not restarted with each byte.
            self._request_due = self.loop.call_later(REQUEST_TIMEOUT, self.abort)

    def _stop_waiting(self) -> None:
        if self._request_due is not None:
            self._request_due.cancel()
            self._request_due = None


class _Inbox:
    """A queue of events with one reader, which takes less time than one for several readers."""

    def __init__(self) -> None:
        self._events: deque[Any] = deque()
        self._arrival: asyncio.Future[None] | None = None

    def empty(self) -> bool:
        return not self._events

    def put_nowait(self, event: Any) -> None:
        self._events.append(event)
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    async def get(self) -> Any:
        while not self._events:
            self._arrival = asyncio.get_running_loop().create_future()
            await self._arrival
        return self._events.popleft()


class SocketConnection(WebSocketsSansIOProtocol, asyncio.BufferedProtocol):
    """A WebSocket, closed if its client does not send or read fast enough.

    Binary messages are read and written here; uvicorn and ``websockets`` do the rest.
    """

    def __init__(
        self, pool: Pool, config: uvicorn.Config, server_state: ServerState, app_state: dict[str, Any]
    ) -> None:
        super().__init__(config=config, server_state=server_state, app_state=app_state)
        self._pool = pool
        self.queue = cast("asyncio.Queue[Any]", _Inbox())
        #: Timers of a message that arrives, and of pending data to be read.
        self._message_due: asyncio.TimerHandle | None = None
        self._reading_due: asyncio.TimerHandle | None = None
        self._began_at = 0.0
        self._arrived = 0
        #: Whether the last data ended something: the handshake, a message, or a control frame.
        self._is_whole = False
        self._is_refused = False
        self._ends_after_answer = False
        #: Whether the application waits for a message.
        self._is_awaited = False
        self._stream = MessageStream(self.conn, config.ws_max_size, self._take_message, self._take_other)

    def abort(self) -> None:
        """Close it immediately, without sending pending data."""
        self.transport.abort()

    def end_after_answer(self) -> None:
        """Close it after the reply to the current request."""
        self._ends_after_answer = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._pool.note(self, idle=False)

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.forget(self)
        self._stop_timers()
        super().connection_lost(exc)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._pool.arrived

    def buffer_updated(self, nbytes: int) -> None:
        if self._is_refused:
            # The rest of a message that was too large. The connection stays open for now, since a client that is still
            # sending when it is closed may lose the answer.
            return
        self._is_whole = False
        self._stream.feed(self._pool.arrived[:nbytes])
        if self.transport.is_closing() or (self._is_whole and not self.frames):
            self._end_message()
        elif self._message_due is None:
            self._began_at, self._arrived = self.loop.time(), nbytes
            self._message_due = self.loop.call_at(self._due(), self._review_message)
        else:
            # The timer is not moved for each piece: when it is due, it checks how much has arrived.
            self._arrived += nbytes

    def _take_message(self, message: bytes | bytearray) -> None:
        if self._is_awaited and not self.close_sent:
            # No other message is queued behind it, so reading need not pause until it is taken.
            self._is_awaited, self._is_whole = False, True
            self._pool.note(self, idle=False)
            self.queue.put_nowait({"type": "websocket.receive", "bytes": cast("bytes", message)})
        else:
            self.curr_msg_data_type, self.frames = "bytes", [cast("bytes", message)]
            self.send_receive_event_to_app()

    def _take_other(self, data: bytes) -> None:
        if not self._is_refused and not self.transport.is_closing():
            self.data_received(data)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._reading_due is None:
            seconds = READING_TIMEOUT + self.transport.get_write_buffer_size() / SLOWEST
            self._reading_due = self.loop.call_later(seconds, self.abort)

    def resume_writing(self) -> None:
        if self._reading_due is not None:
            self._reading_due.cancel()
            self._reading_due = None
        super().resume_writing()

    def handle_connect(self, event: Request) -> None:
        self._is_whole = True
        super().handle_connect(event)

    def handle_ping(self) -> None:
        self._is_whole = True
        super().handle_ping()

    def send_receive_event_to_app(self) -> None:
        self._is_whole = True
        self._pool.note(self, idle=False)
        super().send_receive_event_to_app()

    def handle_parser_exception(self) -> None:
        """Answer a message that is too large, before it has arrived, with an error that a client understands."""
        closing = self.conn.close_sent
        if closing is not None and closing.code == CloseCode.MESSAGE_TOO_BIG:
            error = ProtocolError(
                f"a message is larger than the {self.config.ws_max_size:,} bytes that this server allows",
                code="too_large",
                hint="send fewer tokens in one step",
            )
            refusal = refusal_frame(error)
            self.transport.write(message_head(len(refusal)) + refusal)
            self.transport.write(b"".join(self.conn.data_to_send()))
            self._is_refused = self.close_sent = True
            self._end_message()
            self._pool.note(self, idle=True)
            self.queue.put_nowait({"type": "websocket.disconnect", "code": closing.code, "reason": closing.reason})
            self.close_timer = self.loop.call_later(READING_TIMEOUT, self.abort)
            return
        super().handle_parser_exception()

    async def receive(self) -> Any:
        self._is_awaited = self.queue.empty()
        return await super().receive()

    async def send(self, message: Any) -> None:
        data = message.get("bytes")
        if data is not None:
            await self.writable.wait()
        if data is not None and self.conn.state is State.OPEN and not self.disconnected:
            self.transport.write(memoryview(b"".join((message_head(len(data)), data))))
        else:
            await super().send(message)
        if message["type"] in ("websocket.accept", "websocket.send"):
            if not self.transport.is_closing():
                self._pool.note(self, idle=True)
            if self._ends_after_answer:
                self.shutdown()
        elif message["type"] == "websocket.http.response.body" and self.close_sent:
            # A refusal ends the handshake, too; uvicorn would report an application without an answer.
            self.handshake_complete = True

    def _due(self) -> float:
        return self._began_at + MESSAGE_TIMEOUT + self._arrived / SLOWEST

    def _review_message(self) -> None:
        if self.loop.time() >= self._due():
            self.abort()
        else:
            self._message_due = self.loop.call_at(self._due(), self._review_message)

    def _end_message(self) -> None:
        if self._message_due is not None:
            self._message_due.cancel()
            self._message_due = None

    def _stop_timers(self) -> None:
        self._end_message()
        if self._reading_due is not None:
            self._reading_due.cancel()
            self._reading_due = None


class Server(uvicorn.Server):
    """uvicorn without its signal handlers, and with its own way to accept and to end connections.

    Args:
        config: The result of :func:`uvicorn_config`.
        pool: Its connections.
        tls: If given, every connection must begin with a TLS handshake.
    """

    def __init__(self, config: uvicorn.Config, pool: Pool, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(config)
        self._tls = tls
        self._handshakes: set[asyncio.Task[None]] = set()
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
        tasks = [*self._accepting, *self._handshakes]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
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
            # The system detects a client that has vanished without closing its connection.
            with contextlib.suppress(OSError):
                accepted.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if self._tls is None:
                await loop.connect_accepted_socket(self._connection, accepted)
            else:
                # Not awaited here: a slow handshake must not keep others waiting.
                handshake = asyncio.create_task(self._shake_hands(accepted), name="TLS handshake")
                self._handshakes.add(handshake)
                handshake.add_done_callback(self._handshakes.discard)

    async def _shake_hands(self, accepted: socket.socket) -> None:
        self._pool.joining += 1
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                self._connection,
                accepted,
                ssl=self._tls,
                ssl_handshake_timeout=HANDSHAKE_TIMEOUT,
                ssl_shutdown_timeout=TLS_END_TIMEOUT,
            )
        except OSError as error:
            # A port scan, a client without TLS, or one that does not trust the certificate.
            log.debug("A TLS handshake failed: %s", error)
        finally:
            self._pool.joining -= 1

    def _connection(self) -> Connection:
        return Connection(self._pool, self.config, self.server_state, self.lifespan.state)


def uvicorn_config(app: Any, max_payload: int = MAX_PAYLOAD_BYTES) -> uvicorn.Config:
    """Configure uvicorn as an HTTP/1.1 server with WebSockets, without logging and extra headers.

    Args:
        app: The ASGI application.
        max_payload: Bytes of the payload of one frame.
    """
    return uvicorn.Config(
        app,
        http="h11",
        ws="websockets-sansio",
        ws_max_size=HEADER_BYTES + MAX_META_BYTES + max_payload,
        # Hidden states do not become smaller.
        ws_per_message_deflate=False,
        # A client reads only while it waits for a reply, so that it does not answer pings between its steps.
        ws_ping_interval=None,
        lifespan="off",
        log_config=None,
        # Its warnings are about what clients send, a line each.
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=2 * int(GOODBYE),
    )
