"""A bad network on loopback: a proxy that sees the messages of WebSockets, and may change how they arrive."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

#: What comes of a message: the bytes that are sent on, piece by piece. None ends the connection at this place.
Pieces = Iterable[bytes | None]
#: Called with the direction (``"request"`` or ``"reply"``), the number of the message in it, and its bytes.
Fate = Callable[[str, int, bytes], Pieces]

_LENGTHS = {126: 2, 127: 8}


def as_it_is(direction: str, number: int, message: bytes) -> Pieces:
    """Send a message on."""
    return [message]


class Proxy:
    """Passes connections on to a port of loopback, message by message, while the context lasts.

    Attributes:
        fate: Decides about each message. Numbers count from 1 over all connections, in each direction.
    """

    def __init__(self, port: int, fate: Fate = as_it_is) -> None:
        self._target = port
        self.fate = fate
        self.count: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in (self._listener, *self._sockets):
            _end(each)
        for thread in self._threads:
            thread.join()
        for each in (self._listener, *self._sockets):
            each.close()

    def _start(self, function: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=function, args=arguments, name="proxy", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:  # the proxy ends, or the server is away
                return
            for each in (client, server):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets += [client, server]
            self._start(self._pass_on, "request", client, server)
            self._start(self._pass_on, "reply", server, client)

    def _pass_on(self, direction: str, source: socket.socket, target: socket.socket) -> None:
        stream = source.makefile("rb")
        with stream, contextlib.suppress(OSError):
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                line = stream.readline()
                if not line:
                    break
                head += line
            target.sendall(head)
            while message := _message(stream.read):
                if message[0] & 0x0F > 2:  # a ping, a pong or the end
                    target.sendall(message)
                    continue
                with self._lock:
                    self.count[direction] += 1
                    number = self.count[direction]
                for piece in self.fate(direction, number, message):
                    if piece is None:
                        break
                    target.sendall(piece)
                else:
                    continue
                break
        for each in (source, target):
            _end(each)


def _end(each: socket.socket) -> None:
    with contextlib.suppress(OSError):
        each.shutdown(socket.SHUT_RDWR)


def _message(read: Callable[[int], bytes]) -> bytes:
    """Read a message of one WebSocket frame; empty at the end."""
    head = read(2)
    if len(head) < 2:
        return b""
    length = head[1] & 0x7F
    if length in _LENGTHS:
        extended = read(_LENGTHS[length])
        head, length = head + extended, int.from_bytes(extended, "big")
    mask = read(4) if head[1] & 0x80 else b""
    body = read(length)
    return head + mask + body if len(body) == length else b""


def offset_of_frame(message: bytes) -> int:
    """Return where, in the bytes of a message, the frame of splitlearn begins."""
    return 2 + _LENGTHS.get(message[1] & 0x7F, 0) + 4 * (message[1] >> 7)
