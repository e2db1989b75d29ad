"""The user's end: connections to one host, and sessions that survive its restarts.

A session keeps a *journal*: its executed steps, as they were sent. A host that has lost the session, or another host
with the same weights, gets the same steps again, one by one, so that its cache is the same to the last bit.
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import secrets
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from splitlearn_core.errors import (
    AccessRefusedError,
    ConfigurationError,
    ConnectionLostError,
    ProtocolError,
    RemoteBusyError,
    RemoteError,
    RemoteStepError,
    SessionLostError,
)
from splitlearn_core.hosts.carriers import Address, Connection
from splitlearn_core.hosts.clock import MACHINE_CLOCK, Clock
from splitlearn_core.hosts.facts import SOLO, Facts
from splitlearn_core.hosts.protocol import Frame, Kind, TensorSpec
from splitlearn_core.hosts.wires import compressed, expanded
from splitlearn_core.types import MEGABYTE, human_bytes
from splitlearn_core.wire_formats import RAW

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
#: Codes of errors after which a session of this host is gone, and can be rebuilt.
_GONE = "unknown_session"
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
                "family that is packable",
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
                        hint=error.hint or "connect(..., wait=SECONDS) waits longer",
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
        if frame.payload_bytes > self.facts.max_payload:
            raise RemoteStepError(
                f"a step of {human_bytes(frame.payload_bytes)}; {self.url} takes {human_bytes(self.facts.max_payload)}",
                hint="send fewer tokens or sequences at once: a long prompt in several steps",
                code="too_large",
            )
        reply = self.exchange(frame)
        if reply.kind is Kind.ERROR:
            raise _error_of(self.url, reply)
        return expanded(reply, self.facts.max_payload)

    def exchange(self, frame: Frame) -> Frame:
        """Send a request once, and return any reply; raises ConnectionLostError if the host is unreachable."""
        connection = self._borrow()
        # Requests outside of sessions get a step number too, so that a reply to another request is noticed.
        sent = frame if frame.session else frame._replace(step=next(self._numbers))
        try:
            reply = connection.exchange(sent)
            if not _answers(reply, sent):
                raise ConnectionLostError(
                    f"{self.url} answered the wrong request: a {sent.kind.name} with a "
                    f"{reply.kind.name} of step {reply.step}",
                    code="connection",
                    hint="is there a proxy in between that repeats or reorders messages?",
                )
        except BaseException as error:
            # A reply may still arrive, so the connection cannot be used for another request.
            connection.close()
            if isinstance(error, ConnectionLostError):
                # The other idle connections are older, and dead too.
                self.drop_connections()
            raise
        self.round_trips += 1
        self.bytes_sent += frame.payload_bytes
        self.bytes_received += reply.payload_bytes
        if reply.kind is Kind.ERROR and reply.meta.get("code") in _ENDING:
            connection.close()
        else:
            self._put_back(connection)
        return reply if reply.step == frame.step else reply._replace(step=frame.step)

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
            reply = connection.exchange(Frame(Kind.HELLO))
            if reply.kind is Kind.ERROR:
                raise _error_of(self.url, reply)
            if reply.kind is not Kind.WELCOME:
                raise ProtocolError(f"{self.url} answered a greeting with {reply.kind.name}", code="malformed")
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


@dataclass(frozen=True, slots=True)
class Step:
    """What a step sends besides its number: changes of the cache, arguments, and tensors as bytes."""

    arguments: Mapping[str, Any]
    tensors: tuple[TensorSpec, ...]
    buffers: tuple[memoryview, ...]
    #: The mode it runs in, if that is not the default.
    meta: Mapping[str, Any]
    #: The adapters that it names.
    upload: Upload | None = None
    changes: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(
        cls,
        arguments: Mapping[str, Any],
        tensors: tuple[TensorSpec, ...],
        buffers: Sequence[memoryview],
        meta: Mapping[str, Any],
        upload: Upload | None,
    ) -> Step:
        """Take copies of the buffers: their tensors may change before the step is sent again."""
        return cls(arguments, tensors, tuple(memoryview(bytes(buffer)) for buffer in buffers), meta, upload)

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers)

    def frame(self, session: int, number: int, secret: str, nonce: str) -> Frame:
        meta: dict[str, Any] = {**self.meta, "arguments": self.arguments, "secret": secret, "nonce": nonce}
        if self.changes:
            meta["changes"] = [list(change) for change in self.changes]
        return Frame(Kind.STEP, session, number, meta, self.tensors, self.buffers)


class RemoteSession:
    """A cache at a host, and the steps on it, for one caller at a time. The first step opens it.

    Args:
        host: The host of the cache.
        max_tokens: The declared length of a sequence; the host reserves memory for it.
    """

    def __init__(self, host: Host, max_tokens: int) -> None:
        self.host = host
        self._max_tokens = max_tokens
        self._lock = threading.Lock()
        self._number, self._secret = 0, ""
        self._process = os.getpid()
        self._done = 0
        #: None once it is larger than allowed.
        self._journal: list[Step] | None = []
        self._journal_bytes = 0
        #: Pending changes of the cache, applied before the next forward.
        self.changes: list[tuple[str, Any]] = []
        self._finalizer: weakref.finalize[Any, Any] | None = None

    def step(self, step: Step, rows: int) -> Frame:
        """Apply the pending changes, execute the next step on ``rows`` sequences, and return its result.

        Raises:
            RemoteError: The step was refused; the session is unchanged.
            SessionLostError: The host has lost the session, and the journal is not complete.
        """
        step = replace(step, changes=tuple(self.changes))
        with self._lock:
            if self._process != os.getpid():
                # After a fork, the parent may go on using it.
                self._leave()
            try:
                result = self._sent(step, rows)
            except RemoteError:
                raise
            except BaseException:
                # Interrupted: it is unknown whether the host has executed the step.
                self._leave()
                raise
            self._done += 1
            self.changes = []
            self._note(step)
        return result

    @property
    def steps(self) -> int:
        """The number of executed steps."""
        return self._done

    def undo(self) -> None:
        """Forget the last step: the next one rebuilds the session without it.

        Raises:
            SessionLostError: The journal is not complete.
        """
        with self._lock:
            if not self._journal:
                raise SessionLostError(
                    f"the last step of the session at {self.host.url} cannot be undone: its journal was larger than "
                    "allowed",
                    code="journal",
                    hint="start again with an empty cache; connect(..., journal_bytes=N) keeps more",
                )
            step = self._journal.pop()
            self._journal_bytes -= step.nbytes
            self.changes = [*step.changes, *self.changes]
            self._leave()
            self._done = len(self._journal)

    def expect(self, tokens: int) -> None:
        """Declare more tokens at the next opening; an open session grows when they arrive."""
        self._max_tokens = max(self._max_tokens, tokens)

    def copy(self) -> RemoteSession:
        """Return a session with the same content: a copy at the host, or a journal from which it will be rebuilt."""
        other = RemoteSession(self.host, self._max_tokens)
        with self._lock:
            other.changes = list(self.changes)
            other._journal = None if self._journal is None else list(self._journal)  # its own class
            other._journal_bytes = self._journal_bytes  # its own class
            if self._number and self._process == os.getpid():
                request = Frame(Kind.COPY, self._number, self._done, {"secret": self._secret})
                try:
                    other._opened(self.host.request(request), self._done)  # its own class
                except RemoteError as error:
                    if self._journal is None:
                        raise
                    log.debug("A session is rebuilt instead of copied: %s", error.message)
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteSession:
        return self.copy()

    def close(self) -> None:
        """End the session at the host, without waiting for it."""
        self._leave()

    def _sent(self, step: Step, rows: int) -> Frame:
        nonce = secrets.token_hex(8)
        deadline = self.host.clock.now() + self.host.patience.wait
        was_lost = False
        while True:
            try:
                if not self._number:
                    self._rebuild(rows)
                return self.host.request(step.frame(self._number, self._done + 1, self._secret, nonce), step.upload)
            except RemoteError as error:
                if error.code != _GONE:
                    raise
                self._forget()
                # A host that keeps losing the session cannot be used.
                if was_lost and self.host.clock.now() > deadline:
                    raise SessionLostError(
                        f"{self.host.url} loses the session whenever it is rebuilt: {error.message}",
                        code=_GONE,
                        hint="its idle time limit may be shorter than a step takes",
                    ) from error
                was_lost = True

    def _rebuild(self, rows: int) -> None:
        """Open a session, and replay the journal."""
        if self._journal is None:
            raise SessionLostError(
                f"the session at {self.host.url} ended, and its journal was larger than allowed",
                code="journal",
                hint="start again with an empty cache; connect(..., journal_bytes=N) keeps more",
            )
        meta = {"rows": rows, "tokens": min(self._max_tokens, self.host.facts.max_tokens), "mode": self.host.mode}
        self._opened(self.host.request(Frame(Kind.OPEN, meta=meta)), 0)
        if self._journal:
            log.warning("Rebuilding a session at %s from %d steps", self.host.url, len(self._journal))
        for number, step in enumerate(self._journal, start=1):
            self.host.request(step.frame(self._number, number, self._secret, secrets.token_hex(8)), step.upload)
        self._done = len(self._journal)

    def _opened(self, reply: Frame, done: int) -> None:
        secret = reply.meta.get("secret")
        if reply.kind is not Kind.OPENED or not reply.session or not isinstance(secret, str):
            raise ProtocolError(f"{self.host.url} opened no session: {reply.kind.name}", code="malformed")
        self._number, self._secret, self._done, self._process = reply.session, secret, done, os.getpid()
        self._finalizer = weakref.finalize(self, self.host.abandon, self._number, self._secret)
        self._finalizer.atexit = False
        self.host.sessions.add(self)

    def _note(self, step: Step) -> None:
        if self._journal is None:
            return
        if step.changes and step.changes[0][0] == "reset":
            self._journal, self._journal_bytes = [], 0
        self._journal.append(step)
        self._journal_bytes += step.nbytes
        if self._journal_bytes > self.host.patience.journal_bytes:
            log.warning(
                "A session at %s has sent %s, more than journal_bytes: a restart of the host would end it",
                self.host.url,
                human_bytes(self._journal_bytes),
            )
            self._journal = None

    def _leave(self) -> None:
        """End the session at the host without waiting, unless it belongs to another process."""
        finalizer = self._finalizer
        if finalizer is not None and self._process == os.getpid():
            finalizer()
        self._forget()

    def _forget(self) -> None:
        if self._finalizer is not None:
            self._finalizer.detach()
            self.host.sessions.discard(self)
        self._finalizer, self._number, self._secret = None, 0, ""
