"""How frames get to a host: over a WebSocket, or over a Unix socket on the same machine.

A connection is used by one thread at a time: a request goes out, and its reply comes back.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import socket
import ssl
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote, unquote, urlsplit

from splitlearn_core.errors import (
    AccessRefusedError,
    ConfigurationError,
    ConnectionLostError,
    RemoteBusyError,
    RemoteError,
    translate,
)
from splitlearn_core.hosts.protocol import (
    HEADER_BYTES,
    MAX_META_BYTES,
    SUBPROTOCOL,
    Frame,
    decode,
    decode_body,
    decode_header,
    encode,
)
from splitlearn_core.quoting import reason

if TYPE_CHECKING:
    from websockets.http11 import Response

log = logging.getLogger(__name__)

#: The scheme of a URL -> that of the WebSocket.
_WEBSOCKET_SCHEMES = {"http": "ws", "https": "wss", "ws": "ws", "wss": "wss"}
_DEFAULT_PORTS = {"ws": 80, "wss": 443}
_UNIX = "unix"
_EXAMPLE = "for example http://127.0.0.1:8710/trunk or https://HOST/trunk"
_UNAUTHORIZED, _FORBIDDEN, _NOT_FOUND, _TOO_MANY, _UNAVAILABLE = 401, 403, 404, 429, 503
_READ_BYTES = 256 * 1024
_TOKEN = re.compile(r"[\x21-\x7e]+")
#: Seconds without a reply after which that is reported.
_SILENCE = 10.0


class Connection(Protocol):
    """A connection to a host."""

    def send(self, request: Frame) -> None:
        """Send a request.

        Raises:
            ConnectionLostError: The connection ended.
        """

    def receive(self) -> Frame:
        """Return the reply to the request that was sent.

        Raises:
            ConnectionLostError: The connection ended, or there was no reply in time.
            ProtocolError: The reply is not a valid frame.
        """

    def exchange(self, request: Frame) -> Frame:
        """Send a request and return its reply; raises like both."""
        self.send(request)
        return self.receive()

    def close(self) -> None:
        """End the connection."""


class Address(Protocol):
    """Where a host is, and how to get there."""

    @property
    def url(self) -> str:
        """The name for it in messages."""

    def check(self) -> None:
        """Refuse an invalid address."""

    def open(self) -> Connection:
        """Connect."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The address of a host, and how to get there."""

    url: str
    token: str | None = None
    #: A file of certificates to trust, in place of the system's.
    ca_file: str | None = None
    #: Seconds for a connection, and for the reply to a request.
    connect_timeout: float = 10.0
    reply_timeout: float = 300.0
    max_payload: int = 2**32

    @property
    def silence(self) -> float:
        """Seconds without a reply after which that is reported, or nothing more is expected."""
        return min(_SILENCE, self.reply_timeout)

    def check(self) -> None:
        """Refuse an invalid address.

        Raises:
            ConfigurationError: It is not the URL of a host.
        """
        if self.token is not None and not _TOKEN.fullmatch(self.token):
            raise ConfigurationError(
                f"the token for {self.url} is empty, or has spaces or other characters that a header cannot hold",
                hint="a token consists of ASCII letters, digits and punctuation",
            )
        if self.ca_file is not None and not os.path.isfile(self.ca_file):  # noqa: PTH113  # a path of the caller's
            raise ConfigurationError(
                f"there is no certificate file {self.ca_file!r}",
                hint="give the PEM file of the authority that signed the server's certificate",
            )
        try:
            parts = urlsplit(self.url)
            parts.port  # noqa: B018  # reading it is what checks it
        except ValueError as error:
            raise ConfigurationError(f"{self.url!r} is not a URL: {reason(error)}", hint=_EXAMPLE) from error
        if parts.scheme == _UNIX and parts.path.startswith("/") and not parts.netloc:
            return
        if parts.scheme not in _WEBSOCKET_SCHEMES or not parts.hostname:
            raise ConfigurationError(f"{self.url!r} is not the address of a host", hint=_EXAMPLE)
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ConfigurationError(
                f"the address of a host has no user, query or fragment: {parts.scheme}://{parts.hostname}{parts.path}",
                hint="give a token with token=..., or in SPLITLEARN_TOKEN",
            )
        if not parts.path.strip("/"):
            raise ConfigurationError(
                f"{self.url!r} names no model", hint=f"put its id at the end: {self.url.rstrip('/')}/trunk"
            )

    def open(self) -> Connection:
        """Connect.

        Raises:
            ConnectionLostError: Nothing answers at this address.
            AccessRefusedError: The token is missing or wrong.
            RemoteError: The host refuses for another reason.
        """
        parts = urlsplit(self.url)
        if parts.scheme == _UNIX:
            return _StreamConnection(_unix_socket(unquote(parts.path), self), self)
        return _WebSocketConnection(self)


class _StreamConnection(Connection):
    """Frames one after the other on a stream socket."""

    def __init__(self, stream: socket.socket, endpoint: Endpoint) -> None:
        self._socket = stream
        self._endpoint = endpoint

    def send(self, request: Frame) -> None:
        with _connection_errors(self._endpoint.url):
            for buffer in encode(request):
                _send_all(self._socket, buffer, self._endpoint)

    def receive(self) -> Frame:
        with _connection_errors(self._endpoint.url):
            reply = receive_frame(
                self._socket, self._endpoint.max_payload, lambda memory: _read(self._socket, memory, self._endpoint)
            )
        if reply is None:
            raise ConnectionLostError(f"{self._endpoint.url} ended the connection", code="connection")
        return reply

    def close(self) -> None:
        self._socket.close()


# The timeout of a connected socket is that of silence: setting another one first would take longer than to read.


def _read(stream: socket.socket, memory: memoryview, endpoint: Endpoint) -> int:
    """Wait for bytes of a reply, and log a warning if they take longer than :data:`_SILENCE`; return their number."""
    try:
        return stream.recv_into(memory)
    except TimeoutError:
        if endpoint.reply_timeout <= _SILENCE:
            raise
    log.warning(
        "%s has not answered for %.0f s; waiting up to %.0f s for its reply",
        endpoint.url,
        _SILENCE,
        endpoint.reply_timeout,
    )
    with _timeout(stream, endpoint.reply_timeout - _SILENCE, endpoint):
        return stream.recv_into(memory)


def _send_all(stream: socket.socket, data: bytes | memoryview, endpoint: Endpoint) -> None:
    """Send bytes, within the time for a reply."""
    try:
        sent = stream.send(data)
    except TimeoutError:
        sent = 0
    if sent < len(data):
        with _timeout(stream, endpoint.reply_timeout, endpoint):
            stream.sendall(memoryview(data)[sent:])


@contextmanager
def _timeout(stream: socket.socket, seconds: float, endpoint: Endpoint) -> Iterator[None]:
    """Allow a socket another time than that of silence."""
    stream.settimeout(seconds)
    try:
        yield
    finally:
        stream.settimeout(endpoint.silence)


def send_frame(stream: socket.socket, frame: Frame) -> None:
    """Send a frame on a stream socket."""
    for buffer in encode(frame):
        stream.sendall(buffer)


def receive_frame(
    stream: socket.socket, max_payload: int, read: Callable[[memoryview], int] | None = None
) -> Frame | None:
    """Receive a frame from a stream socket; None if the other side has ended between two frames.

    Args:
        stream: The socket.
        max_payload: The most bytes of a payload.
        read: Reads from it into memory, in place of ``recv_into``.

    Raises:
        ProtocolError: It is not valid, or too large; the stream cannot be used any further.
        OSError: The connection broke.
    """
    read = read or stream.recv_into
    head = memoryview(bytearray(HEADER_BYTES))
    count = read(head)
    if count == 0:
        return None
    _fill(read, head[count:])
    header = decode_header(head, max_payload)
    body = memoryview(bytearray(header.rest))
    _fill(read, body)
    return decode_body(header, body)


def _fill(read: Callable[[memoryview], int], view: memoryview) -> None:
    while view:
        count = read(view)
        if count == 0:
            raise ConnectionResetError("the connection ended within a frame")
        view = view[count:]


def _unix_socket(path: str, endpoint: Endpoint) -> socket.socket:
    stream = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _connection_errors(endpoint.url):
            stream.settimeout(endpoint.connect_timeout)
            stream.connect(path)
            stream.settimeout(endpoint.silence)
    except BaseException:
        stream.close()
        raise
    return stream


class _WebSocketConnection(Connection):
    """A frame in each binary message of a WebSocket.

    The protocol is that of ``websockets``, without its threads: the caller's thread reads its own reply.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        from websockets.client import ClientProtocol
        from websockets.typing import Subprotocol
        from websockets.uri import parse_uri

        from splitlearn_core.hosts.websocket import PIECE_BYTES, MessageStream

        self._endpoint = endpoint
        parts = urlsplit(endpoint.url)
        scheme = _WEBSOCKET_SCHEMES[parts.scheme]
        path = quote(unquote(parts.path).strip("/"), safe="")
        max_size = HEADER_BYTES + MAX_META_BYTES + endpoint.max_payload
        self._protocol = ClientProtocol(
            parse_uri(f"{scheme}://{parts.netloc}/{path}"),
            subprotocols=[Subprotocol(SUBPROTOCOL)],
            max_size=max_size,
        )
        self._messages: deque[bytes | bytearray] = deque()
        #: The fragments of a message so far.
        self._parts: list[bytes] = []
        self._stream = MessageStream(self._protocol, max_size, self._messages.append, self._take_other)
        self._scratch = memoryview(bytearray(PIECE_BYTES))
        port = parts.port or _DEFAULT_PORTS[scheme]
        with _connection_errors(endpoint.url):
            stream = socket.create_connection((parts.hostname, port), timeout=endpoint.connect_timeout)
        self._socket = stream
        try:
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if scheme == "wss":
                self._socket = _tls(stream, endpoint, parts.hostname or "")
            self._shake_hands()
            self._socket.settimeout(endpoint.silence)
        except BaseException:
            self._socket.close()
            raise

    def send(self, request: Frame) -> None:
        try:
            for piece in self._stream.masked(encode(request)):
                _send_all(self._socket, piece, self._endpoint)
        except OSError:
            with _connection_errors(self._endpoint.url):
                raise

    def receive(self) -> Frame:
        try:
            while not self._messages:
                self._read()
        except (OSError, EOFError):
            with _connection_errors(self._endpoint.url):
                raise
        return decode(self._messages.popleft(), self._endpoint.max_payload)

    def close(self) -> None:
        from websockets.protocol import State

        try:
            # A connection that broke already, or that the other side has closed, needs no farewell.
            if self._protocol.state is State.OPEN:
                with contextlib.suppress(OSError):
                    self._socket.settimeout(1)
                    self._protocol.send_close()
                    self._flush()
        finally:
            self._socket.close()

    def _shake_hands(self) -> None:
        from websockets.exceptions import InvalidHandshake

        request = self._protocol.connect()
        if self._endpoint.token is not None:
            request.headers["Authorization"] = f"Bearer {self._endpoint.token}"
        self._protocol.send_request(request)
        with _connection_errors(self._endpoint.url), self._silence_explained():
            self._flush()
            response = None
            while response is None:
                data = self._socket.recv(_READ_BYTES)
                if not data:
                    self._protocol.receive_eof()
                    response = self._response()
                for line in data.splitlines(keepends=True):
                    if response is None:
                        self._protocol.receive_data(line)
                        response = self._response()
                    else:
                        # What follows the response is frames.
                        self._stream.feed(memoryview(line))
                if response is None and (not data or self._protocol.handshake_exc is not None):
                    break
        error = self._protocol.handshake_exc
        if error is None and response is not None:
            return
        if response is not None and response.status_code != 101:  # noqa: PLR2004  # switching protocols
            raise _refusal(self._endpoint.url, response)
        cause = reason(error) if isinstance(error, InvalidHandshake | Exception) else "it ended the connection"
        raise ConnectionLostError(
            f"{self._endpoint.url} does not speak WebSocket: {cause}",
            code="connection",
            hint="is that the address of `splitlearn serve`? A server with TLS needs https in its URL",
        )

    @contextlib.contextmanager
    def _silence_explained(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError as error:
            raise ConnectionLostError(
                f"{self._endpoint.url} accepted the connection, and did not answer within "
                f"{self._endpoint.connect_timeout:g} s",
                code="connection",
                hint="a server that is starting answers when it has imported its libraries: try again; "
                "or does another program listen at this address?",
            ) from error

    def _response(self) -> Response | None:
        from websockets.http11 import Response

        return next((event for event in self._protocol.events_received() if isinstance(event, Response)), None)

    def _read(self) -> None:
        """Read the bytes that have arrived, and queue complete messages."""
        count = _read(self._socket, self._scratch, self._endpoint)
        if count:
            self._stream.feed(self._scratch[:count])
        else:
            self._protocol.receive_eof()
        if not self._messages and (not count or self._protocol.close_expected()):
            closed = self._protocol.close_rcvd
            details = f": {closed.reason}" if closed is not None and closed.reason else ""
            raise ConnectionResetError(f"the connection was closed{details}")

    def _take_other(self, data: bytes) -> None:
        """Handle whatever is not a binary message in one frame."""
        from websockets.frames import Opcode

        self._protocol.receive_data(data)
        for event in self._protocol.events_received():
            frame: Any = event
            if frame.opcode in (Opcode.BINARY, Opcode.CONT):
                self._parts.append(frame.data)
                if frame.fin:
                    self._messages.append(b"".join(self._parts))
                    self._parts = []
        # The reply to a ping or a close. If it cannot be sent, the next read fails.
        with contextlib.suppress(OSError):
            self._flush()

    def _flush(self) -> None:
        for data in self._protocol.data_to_send():
            if data:
                self._socket.sendall(data)


def _tls(stream: socket.socket, endpoint: Endpoint, name: str) -> ssl.SSLSocket:
    with translate(
        lambda error: ConfigurationError(
            f"{endpoint.ca_file} holds no certificates: {reason(error)}", hint="give a PEM file"
        ),
        (OSError,),
    ):
        context = ssl.create_default_context(cafile=endpoint.ca_file)
    with (
        translate(
            lambda error: AccessRefusedError(
                f"the certificate of {endpoint.url} is not valid: {_verdict(error)}",
                code="certificate",
                hint="name the file of its authority with ca_file=..., use a name that is in it, or renew the "
                "certificate",
            ),
            ssl.SSLCertVerificationError,
        ),
        _connection_errors(endpoint.url),
    ):
        return context.wrap_socket(stream, server_hostname=name)


def _verdict(error: BaseException) -> str:
    """Return what is wrong with a certificate, without what OpenSSL writes around it."""
    return str(getattr(error, "verify_message", "")).rstrip(".") or reason(error)


def _refusal(url: str, response: Response) -> RemoteError:
    """Return the error of a host that answered with plain HTTP."""
    message, hint = f"HTTP status {response.status_code}", ""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        refusal = json.loads(response.body or b"")["error"]
        message, hint = str(refusal["message"]), str(refusal["hint"])
    status = response.status_code
    if status in (_UNAUTHORIZED, _FORBIDDEN):
        hint = hint or "give the token: token=..., --token-file FILE, or SPLITLEARN_TOKEN"
        return AccessRefusedError(f"{url} refuses access: {message}", code="access", hint=hint)
    if status in (_TOO_MANY, _UNAVAILABLE):
        after = response.headers.get("Retry-After", "")
        return RemoteBusyError(
            f"{url}: {message}",
            code="full" if status == _TOO_MANY else "unavailable",
            hint=hint,
            retry_after=float(after) if after.isdigit() else 5.0,
        )
    if status == _NOT_FOUND:
        hint = hint or "the id of the model comes after the address; `splitlearn ps` lists the models of a server"
        return RemoteError(f"{url}: {message}", code="unknown_model", hint=hint)
    return RemoteError(f"{url}: {message}", code="refused", hint=hint or "is that the address of `splitlearn serve`?")


@contextmanager
def _connection_errors(url: str) -> Iterator[None]:
    """Translate the errors that end a connection."""

    def lost(error: BaseException) -> RemoteError | None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return None
        is_plain_http = isinstance(error, ssl.SSLError) and "WRONG_VERSION" in str(error)
        return ConnectionLostError(
            f"the connection to {url} failed: {_error_text(error)}",
            code="connection",
            hint="the server does not use TLS: write http instead of https"
            if is_plain_http
            else "is the host running, and is this its address?",
        )

    with translate(lost, (OSError, EOFError), unchanged=(RemoteError,)):
        yield


def _error_text(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "it did not answer in time"
    number = error.errno if isinstance(error, OSError) else None
    # Errors of ssl and of address look-ups say more than their errno does.
    is_system_error = number and not isinstance(error, ssl.SSLError | socket.gaierror)
    return os.strerror(number) if is_system_error and number else reason(error)
