"""The user's end: sessions that survive the restarts of their host.

A session keeps a *journal*: its executed steps, as they were sent. A host that has lost the session, or another host
with the same weights, gets the same steps again, one by one, so that its cache is the same to the last bit.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from splitlearn_core.errors import ConnectionLostError, ProtocolError, RemoteError, SessionLostError
from splitlearn_core.hosts.client import Host, Pending, Upload
from splitlearn_core.hosts.protocol import Frame, Kind, TensorSpec
from splitlearn_core.types import human_bytes

log = logging.getLogger(__name__)

#: Codes of errors after which a session of this host is gone, and can be rebuilt.
_GONE = "unknown_session"


class Awaited(Protocol):
    """The result of a step that another host sends on: see ``chains.Awaited``."""

    nonce: str

    def result(self) -> Frame | None:
        """Return it; None if it did not arrive."""


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
        self._number, self._secret, self._pass = 0, "", ""
        self._process = os.getpid()
        self._done = 0
        #: For the next step: where its host sends its output, and the result that arrives there by itself.
        self.route: Mapping[str, Any] | None = None
        self.awaited: Awaited | None = None
        #: What the host said of the route of the last step: True, or why it sent nothing on.
        self.sent_on: Any = None
        #: Whether the host may have executed a step that is not in the journal.
        self.is_uncertain = False
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
            except RemoteError as error:
                self.is_uncertain |= isinstance(error, ConnectionLostError)
                raise
            except BaseException:
                # Interrupted: it is unknown whether the host has executed the step.
                self._leave()
                raise
            self._done += 1
            self.changes = []
            self._note(step)
        return result

    def announce(self, rows: int) -> dict[str, Any]:
        """Return what another host needs in order to send the next step in place of this process.

        Raises:
            RemoteError: There is no such session, and it cannot be opened.
        """
        with self._lock:
            if self._process != os.getpid():
                self._leave()
            if not self._number:
                self._rebuild(rows)
            announced = {"session": self._number, "step": self._done + 1, "pass": self._pass}
            changes = {"changes": [list(change) for change in self.changes]} if self.changes else {}
            return {**announced, **changes, "nonce": secrets.token_hex(8)}

    def collect(self, announced: Mapping[str, Any], wait: float) -> Pending:
        """Ask the host for the result of an announced step, which arrives within ``wait`` seconds or later.

        Raises:
            RemoteError: The host is unreachable.
        """
        meta = {"secret": self._secret, "nonce": announced["nonce"], "wait": wait}
        return self.host.begin(Frame(Kind.COLLECT, announced["session"], announced["step"], meta))

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
        awaited, route = self.awaited, self.route
        self.awaited = self.route = self.sent_on = None
        if awaited is not None:
            result = awaited.result()
            if result is not None:
                self.sent_on, self.is_uncertain = result.meta.get("sent_on"), False
                return result
        nonce = secrets.token_hex(8) if awaited is None else awaited.nonce
        deadline = self.host.clock.now() + self.host.patience.wait
        was_lost = False
        while True:
            try:
                if not self._number:
                    self._rebuild(rows)
                frame = step.frame(self._number, self._done + 1, self._secret, nonce)
                if route is not None:
                    frame = frame._replace(meta={**frame.meta, "next": route})
                result = self.host.request(frame, step.upload)
                self.sent_on, self.is_uncertain = result.meta.get("sent_on"), False
                return result
            except RemoteError as error:
                if error.code == "out_of_order" and self.is_uncertain:
                    # A step whose result was never seen was executed.
                    self._leave()
                    continue
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
        self._pass, self.is_uncertain = str(reply.meta.get("pass", "")), False
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
        self._finalizer, self._number, self._secret, self._pass = None, 0, "", ""
