"""A host on a stream socket: a thread for each connection, and the sessions of one component."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading

from splitlearn_core.errors import ProtocolError
from splitlearn_core.hosts.carriers import receive_frame, send_frame
from splitlearn_core.hosts.sessions import SessionTable, error_frame

log = logging.getLogger(__name__)

#: Connections at a time; further ones wait in the listener's queue.
_MAX_CONNECTIONS = 512
#: Seconds for a client to receive its reply.
_SEND_TIMEOUT = 60.0


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
