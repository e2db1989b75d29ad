"""The user's end: connections to one host, which are made again when it was away."""

from __future__ import annotations

import itertools
import logging
import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from splitlearn_core.errors import (
    AccessRefusedError,
    ConfigurationError,
    ConnectionLostError,
    ProtocolError,
    RemoteBusyError,
    RemoteError,
    RemoteStepError,
    SplitLearnError,
    translate,
)
from splitlearn_core.hosts.carriers import Address, Connection
from splitlearn_core.hosts.clock import MACHINE_CLOCK, Clock
from splitlearn_core.hosts.facts import SOLO, Facts
from splitlearn_core.hosts.protocol import Frame, Kind
from splitlearn_core.hosts.wires import compressed, expanded
from splitlearn_core.types import MEGABYTE, human_bytes
from splitlearn_core.wire_formats import RAW

if TYPE_CHECKING:
    from splitlearn_core.hosts.journals import RemoteSession

log = logging.getLogger(__name__)

#: Bytes of inputs that a session keeps by default.
JOURNAL_BYTES = 1024 * MEGABYTE
#: Seconds between two attempts to reach an unreachable host: the first pause, and the longest.
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 2.0
#: Seconds for closing sessions before their connections are closed.
_CLOSE_TIMEOUT = 2.0
#: Idle connections that are kept open.
_MAX_IDLE = 8
#: How often an adapter is sent again if its host does not keep it.
_MAX_UPLOADS = 3
#: Codes for which the host counts as unreachable: it is shutting down, or has no room for a connection.
_AWAY = ("closing", "unavailable", "not_loaded")
#: Request -> the kind of its reply, if that is not an ERROR.
_REPLIES = {
    Kind.HELLO: Kind.WELCOME,
    Kind.PING: Kind.PONG,
    Kind.OPEN: Kind.OPENED,
    Kind.COPY: Kind.OPENED,
    Kind.STEP: Kind.RESULT,
    Kind.BACKWARD: Kind.RESULT,
    Kind.PUT: Kind.KEPT,
    Kind.CLOSE: Kind.CLOSED,
    Kind.LINK: Kind.LINKED,
    Kind.COLLECT: Kind.RESULT,
}
#: Codes of errors after which a connection is not reused.
_ENDING = ("malformed", "version", "too_large", *_AWAY)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for an unreachable host, and how much to keep for rebuilding a session.

    Attributes:
        wait: Seconds for a host to come back; 0 to fail at once.
        journal_bytes: Bytes of inputs that a session keeps. A session that has sent more cannot be rebuilt.
    """

    wait: float = 60.0
    journal_bytes: int = JOURNAL_BYTES


@dataclass(frozen=True, slots=True)
class Pending:
    """A request that was sent, on a connection of its own.

    Attributes:
        reply: Reads and returns any reply; raises like :meth:`Host.exchange`.
        drop: Ends the connection: the reply is no longer wanted.
    """

    reply: Callable[[], Frame]
    drop: Callable[[], None]


class Upload(Protocol):
    """Content that a host stores by its hashes: see ``calls.Upload``."""

    names: tuple[str, ...]
    #: The name of the content that it replaces.
    replaces: tuple[str, ...]

    def frames(self) -> Iterator[tuple[str, Frame]]:
        """Yield each hash with the request that sends its content."""


class Host:
    """A host as its user sees it: what it runs, and a pool of connections. Any thread may use it.

    Args:
        endpoint: Its address.
        patience: How long to wait for it.
        wire: How hidden states and gradients are sent, both ways.
        mode: How its sessions run: alone, or packed.
        clock: Where time comes from.

    Raises:
        ConfigurationError: The address is invalid, or the host does not support this encoding or mode.
        RemoteError: It cannot be reached, or refuses.
    """

    def __init__(
        self, endpoint: Address, patience: Patience, wire: str = RAW, mode: str = SOLO, clock: Clock = MACHINE_CLOCK
    ) -> None:
        endpoint.check()
        self.endpoint = endpoint
        self.patience = patience
        self.wire = wire
        self.mode = mode
        self.clock = clock
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        self._numbers = itertools.count(1)
        self._process = os.getpid()
        #: Sessions whose caches were garbage-collected; a queue that finalizers may write to.
        self._abandoned: queue.SimpleQueue[tuple[int, str] | None] = queue.SimpleQueue()
        self._closer: threading.Thread | None = None
        self._is_closed = False
        self._facts: Facts | None = None
        #: Sessions that are open.
        self.sessions: weakref.WeakSet[RemoteSession] = weakref.WeakSet()
        #: Hashes of uploads that the host may still have.
        self._uploaded: set[str] = set()
        #: Requests and replies so far, and their bytes.
        self.round_trips = 0
        self.bytes_sent = 0
        self.bytes_received = 0
        # No retries: an unreachable host is more often a wrong address than a restart.
        self._put_back(self._connect())
        if mode not in self.facts.modes:
            self.close()
            raise ConfigurationError(
                f"mode={mode!r}: {self.url} runs sessions {', '.join(self.facts.modes)}",
                hint='leave mode out; packed sessions need a trunk in the server\'s own process (host="inline"), of a '
                "family that is packable, whose rotary positions do not depend on the longest sequence",
            )
        if wire not in self.facts.wires:
            self.close()
            raise ConfigurationError(
                f"wire={wire!r}: {self.url} knows {', '.join(self.facts.wires)}",
                hint="give one of these, or install the same version of splitlearn-core on both sides",
            )

    @property
    def url(self) -> str:
        return self.endpoint.url

    @property
    def facts(self) -> Facts:
        """The host's description of its component, from the first connection."""
        if self._facts is None:
            raise ConnectionLostError(f"{self.url} was never reached", code="connection")
        return self._facts

    def request(self, frame: Frame, upload: Upload | None = None) -> Frame:
        """Send a request and return its reply; sends it again over new connections while the host is away.

        Args:
            frame: The request.
            upload: The adapters that it names; they are sent first if the host does not have them.

        Raises:
            RemoteError: The host refused; or was away for too long.
        """
        attempts = 0
        while upload is not None:
            attempts += 1
            try:
                self._put(upload)
                return self._request(frame)
            except RemoteError as error:
                if error.code != "unknown_adapter" or attempts > _MAX_UPLOADS:
                    raise
                # The host was restarted, or needed the memory.
                self._uploaded.difference_update(upload.names)
        return self._request(frame)

    def _put(self, upload: Upload) -> None:
        for name, frame in upload.frames():
            if name in self._uploaded:
                continue
            stored = self._request(frame).meta.get("hash")
            if stored != name:
                raise ProtocolError(f"{self.url} keeps {stored!r}, and {name!r} was sent", code="malformed")
            self._uploaded.add(name)
            self._uploaded.difference_update(upload.replaces)

    def _request(self, frame: Frame) -> Frame:
        deadline = self.clock.now() + self.patience.wait
        pause = 0.0
        while True:
            try:
                return self.request_once(frame)
            except RemoteError as error:
                if not isinstance(error, ConnectionLostError) and error.code not in _AWAY:
                    raise
                left = deadline - self.clock.now()
                if left <= 0:
                    raise ConnectionLostError(
                        f"{error.message}; it did not come back within {self.patience.wait:g} s",
                        # That of a refused connection asks for the address, which was right before.
                        hint=(error.code in _AWAY and error.hint) or "connect(..., wait=SECONDS) waits longer",
                        code="connection",
                    ) from error
                if pause == _FIRST_PAUSE:
                    log.warning("%s; waiting up to %.0f s for it to come back", error.message, left)
            # No pause the first time: an idle connection may be dead while its host is running.
            self.clock.pause(min(self.clock.spread(pause), left))
            pause = min(max(2 * pause, _FIRST_PAUSE), _LONGEST_PAUSE)

    def close(self) -> None:
        """End the sessions and all connections.

        An unreachable host ends the sessions after its own time limit; this does not wait for it.
        """
        for session in list(self.sessions):
            session.close()
        self._abandoned.put(None)
        if self._closer is not None:
            self._closer.join(_CLOSE_TIMEOUT)
        self._is_closed = True
        self.drop_connections()

    def drop_connections(self) -> None:
        """Close the idle connections."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def abandon(self, number: int, secret: str) -> None:
        """End a session without waiting for it; may be called from a finalizer."""
        self._abandoned.put((number, secret))
        if self._closer is None or not self._closer.is_alive():
            self._closer = threading.Thread(target=self._close_abandoned, name="close remote sessions", daemon=True)
            self._closer.start()

    # --- connections ----------------------------------------------------------------------------------

    def request_once(self, frame: Frame) -> Frame:
        """Send a request and return its reply; raises ConnectionLostError if the host is unreachable."""
        frame = compressed(frame, self.wire)
        self._refuse_too_large(frame)
        reply = self.exchange(frame)
        if reply.kind is Kind.ERROR:
            raise _error_of(self.url, reply)
        return expanded(reply, self.facts.max_payload)

    def _refuse_too_large(self, frame: Frame) -> None:
        if frame.payload_bytes > self.facts.max_payload:
            raise RemoteStepError(
                f"a step of {human_bytes(frame.payload_bytes)}; {self.url} takes {human_bytes(self.facts.max_payload)}",
                hint="send fewer tokens or sequences at once: a long prompt in several steps",
                code="too_large",
            )

    def exchange(self, frame: Frame) -> Frame:
        """Send a request once, and return any reply; raises ConnectionLostError if the host is unreachable."""
        connection = self._borrow()
        # Requests outside of sessions get a step number too, so that a reply to another request is noticed.
        sent = frame if frame.session else frame._replace(step=next(self._numbers))
        return self._received(connection, frame, sent, lambda: connection.exchange(sent))

    def begin(self, frame: Frame) -> Pending:
        """Send a request of a session, whose reply is read later.

        Raises:
            ConnectionLostError: The host is unreachable.
            RemoteStepError: The request is larger than it takes.
        """
        self._refuse_too_large(frame)
        connection = self._borrow()
        try:
            connection.send(frame)
        except BaseException as error:
            self._broken(connection, error)
            raise
        return Pending(
            lambda: self._received(connection, frame, frame, connection.receive),
            connection.close,
        )

    def _received(self, connection: Connection, frame: Frame, sent: Frame, receive: Callable[[], Frame]) -> Frame:
        try:
            with self._named():
                reply = receive()
            if not _answers(reply, sent):
                raise ConnectionLostError(
                    f"{self.url} answered the wrong request: a {sent.kind.name} with a "
                    f"{reply.kind.name} of step {reply.step}",
                    code="connection",
                    hint="is there a proxy in between that repeats or reorders messages?",
                )
        except BaseException as error:
            self._broken(connection, error)
            raise
        self.round_trips += 1
        self.bytes_sent += frame.payload_bytes
        self.bytes_received += reply.payload_bytes
        if reply.kind is Kind.ERROR and reply.meta.get("code") in _ENDING:
            connection.close()
        else:
            self._put_back(connection)
        return reply if reply.step == frame.step else reply._replace(step=frame.step)

    def _named(self) -> AbstractContextManager[None]:
        """Name the host in errors about what it has sent: a caller may have several."""

        def named(error: BaseException) -> SplitLearnError | None:
            if not isinstance(error, ProtocolError) or error.message.startswith(self.url):
                return None
            return ProtocolError(f"{self.url}: {error.message}", code=error.code, hint=error.hint)

        return translate(named, ProtocolError, unchanged=())

    def _broken(self, connection: Connection, error: BaseException) -> None:
        # A reply may still arrive, so the connection cannot be used for another request.
        connection.close()
        if isinstance(error, ConnectionLostError):
            # The other idle connections are older, and dead too.
            self.drop_connections()

    def _borrow(self) -> Connection:
        with self._lock:
            if self._process != os.getpid():
                # After a fork they belong to the parent: two processes on one connection get each other's replies.
                self._process, self._idle = os.getpid(), []
                self._closer = None
            if self._idle:
                return self._idle.pop()
        return self._connect()

    def _put_back(self, connection: Connection) -> None:
        with self._lock:
            if len(self._idle) < _MAX_IDLE and not self._is_closed:
                self._idle.append(connection)
                return
        connection.close()

    def _connect(self) -> Connection:
        connection = self.endpoint.open()
        try:
            with self._named():
                reply = connection.exchange(Frame(Kind.HELLO))
                if reply.kind is Kind.ERROR:
                    raise _error_of(self.url, reply)
                if reply.kind is not Kind.WELCOME:
                    raise ProtocolError(f"a greeting was answered with {reply.kind.name}", code="malformed")
                facts = Facts.from_json(reply.meta)
            if self._facts is None:
                self._facts = facts
            problems = self._facts.differences(facts)
            if problems:
                raise RemoteError(
                    f"{self.url} now runs a different component than before: {'; '.join(problems)}",
                    code="other_model",
                    hint="connect again, and load bottom and top of the same checkpoint",
                )
        except BaseException:
            connection.close()
            raise
        return connection

    def _close_abandoned(self) -> None:
        while (session := self._abandoned.get()) is not None:
            number, secret = session
            try:
                self.request_once(Frame(Kind.CLOSE, number, meta={"secret": secret}))
            except RemoteError as error:
                # The host ends it after its own time limit.
                log.debug("A session at %s was not closed: %s", self.url, error.message)
                if self._is_closed:
                    return


def _answers(reply: Frame, request: Frame) -> bool:
    """Whether a reply belongs to a request, judging by its header."""
    if reply.kind is Kind.ERROR and not reply.session and not reply.step:
        # The host could not read the request.
        return True
    is_kind = reply.kind in (_REPLIES[request.kind], Kind.ERROR)
    # A new session gets its number from the host.
    return is_kind and reply.step == request.step and (reply.kind is Kind.OPENED or reply.session == request.session)


_KINDS: Mapping[str, type[RemoteError]] = {
    "full": RemoteBusyError,
    "access": AccessRefusedError,
    "malformed": ProtocolError,
    "version": ProtocolError,
    "too_large": RemoteStepError,
    "bad_input": RemoteStepError,
    "failed": RemoteStepError,
    "out_of_order": RemoteStepError,
    "out_of_memory": RemoteStepError,
    "no_peft": RemoteStepError,
    "no_training": AccessRefusedError,
    "no_more_training": AccessRefusedError,
}


def _error_of(url: str, reply: Frame) -> RemoteError:
    """Return the error that a reply describes."""
    code, message, hint = (str(reply.meta.get(name) or "") for name in ("code", "message", "hint"))
    after = reply.meta.get("retry_after")
    kind = _KINDS.get(code, RemoteError)
    return kind(
        f"{url}: {message or 'an error without a message'}",
        hint=hint,
        code=code,
        retry_after=float(after) if isinstance(after, int | float) and 0 <= after < 1e6 else None,  # noqa: PLR2004  # ten days
    )
