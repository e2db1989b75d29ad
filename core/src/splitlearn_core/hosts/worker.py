"""A host on a stream socket: a thread for each connection, and the sessions of one component."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from splitlearn_core.build.component import ComponentModel
from splitlearn_core.errors import ConfigurationError, ProtocolError
from splitlearn_core.hosts.carriers import receive_frame, send_frame
from splitlearn_core.hosts.sessions import SessionTable, error_frame
from splitlearn_core.quoting import reason

log = logging.getLogger(__name__)

#: Connections at a time; further ones wait in the listener's queue.
_MAX_CONNECTIONS = 512
#: Seconds for a client to receive its reply.
_SEND_TIMEOUT = 60.0


@contextlib.contextmanager
def serve_socket(component: ComponentModel, path: str | os.PathLike[str]) -> Iterator[str]:
    """Serve a trunk that runs here to other processes of the same user, on a Unix socket.

    Yields the URL for :func:`connect`. Other users cannot connect, and there are no tokens. When the block ends, so do
    its sessions, and the socket is removed.

    Args:
        component: A trunk that runs in this process.
        path: Where the socket is made. One that an ended process has left there is replaced.

    Raises:
        ConfigurationError: The component is not a trunk, or runs elsewhere; or no socket can be made there.
    """
    table, place = SessionTable(component), Path(path).absolute()
    with contextlib.ExitStack() as made:
        listener = made.enter_context(socket.socket(socket.AF_UNIX))
        try:
            if place.is_socket():
                with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(ConnectionRefusedError):
                    client.connect(str(place))
                    raise FileExistsError("another process serves there")
                place.unlink()
            listener.bind(str(place))
            # Nothing can connect before it listens.
            place.chmod(0o600)
            listener.listen()
        except OSError as error:
            raise ConfigurationError(
                f"no socket can be made at {place}: {reason(error)}",
                hint="give a path of at most 100 characters, in a folder of yours, where nothing is yet",
            ) from error
        made.pop_all()
    worker = Worker(table, listener)
    worker.start()
    try:
        yield f"unix://{quote(str(place))}"
    finally:
        worker.close()
        place.unlink(missing_ok=True)


class Worker:
    """Serves the sessions of one component on a listening stream socket, with a thread for each connection.

    Args:
        table: The sessions.
        listener: A listening socket; :meth:`close` closes it.
    """

    def __init__(self, table: SessionTable, listener: socket.socket) -> None:
        self._table = table
        self._listener = listener
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._room = threading.Semaphore(_MAX_CONNECTIONS)
        self._is_closed = False
        self._thread = threading.Thread(target=self._accept, name="accept connections", daemon=True)

    def start(self) -> None:
        """Start to accept connections."""
        self._thread.start()

    def close(self) -> None:
        """End all connections and sessions."""
        with self._lock:
            self._is_closed = True
            connections = list(self._connections)
        for stream in (self._listener, *connections):
            # This wakes threads that are blocked in accept or recv.
            with contextlib.suppress(OSError):
                stream.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._table.close()
        self._thread.join()

    def _accept(self) -> None:
        while True:
            self._room.acquire()
            try:
                stream, _ = self._listener.accept()
            except OSError as error:
                if not self._is_closed:
                    log.error("A host accepts no more connections: %s", error)
                return
            with self._lock:
                if self._is_closed:
                    stream.close()
                    return
                self._connections.add(stream)
            threading.Thread(target=self._serve, args=(stream,), name="serve a connection", daemon=True).start()

    def _serve(self, stream: socket.socket) -> None:
        try:
            with stream:
                self._answer(stream)
        except OSError as error:
            log.debug("A connection ended: %s", error)
        finally:
            with self._lock:
                self._connections.discard(stream)
            self._room.release()

    def _answer(self, stream: socket.socket) -> None:
        """Answer requests until the client disconnects, or sends something that is not a frame."""
        while True:
            try:
                request = receive_frame(stream, self._table.limits.max_payload)
            except ProtocolError as error:
                # It is unknown where the next frame would begin.
                send_frame(stream, error_frame(error))
                return
            if request is None:
                return
            reply = self._table.handle(request)
            stream.settimeout(_SEND_TIMEOUT)
            send_frame(stream, reply)
            stream.settimeout(None)
