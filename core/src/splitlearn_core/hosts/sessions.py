"""The host's end: a component, the sessions on it, and the steps that change them.

What can go wrong has a code, which the caller gets with the session's state. A step that fails leaves its session as
it was.

================  =========  ==================================================================================
code              again?     meaning
================  =========  ==================================================================================
malformed         no         not a valid frame; the connection ends
version           no         another version of the protocol
too_large         no         more bytes or tokens than the host allows
bad_input         no         a step that this component cannot do: wrong shapes, dtypes, numbers, arguments
unknown_session   no         there is no such session: it expired, was closed, the host was restarted, or the
                             secret is wrong; the caller can open another and replay its journal
out_of_order      no         a step that is neither the next nor the last one
not_arrived       no         the step that another host was to send on is not here; its owner sends it
no_next           no         this host does not send on to the one that was named
full              later      no room for another session, or for more tokens
failed            no         the component raised an error in the step
out_of_memory     no         the host ran out of memory in the step
unknown_adapter   at once    the host no longer has an adapter; the caller sends it again
no_training       no         this owner may not train
no_more_training  no         this owner has used up its training allowance
no_peft           no         PEFT is not installed at the host
access            no         the token is missing or wrong
closing           later      the host is shutting down, or its model is being unloaded
not_loaded        later      the model of a server could not be loaded
================  =========  ==================================================================================
"""

from __future__ import annotations

import hmac
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch

from splitlearn_core.build.component import ComponentModel
from splitlearn_core.build.forward_arguments import RECORDINGS
from splitlearn_core.build.kv_cache import PartCache, cached_rows, counts_tokens
from splitlearn_core.errors import ConfigurationError, ProtocolError, RemoteError, SplitLearnError
from splitlearn_core.family import STATES
from splitlearn_core.hosts.cache_changes import CHANGES, ROWS_AFTER, checked_change
from splitlearn_core.hosts.description import component_facts
from splitlearn_core.hosts.facts import PACKED, SOLO, Facts
from splitlearn_core.hosts.packs import BegunStep, PendingStep, advance, fits_a_pack
from splitlearn_core.hosts.payload import pack, unpack
from splitlearn_core.hosts.protocol import MAX_PAYLOAD_BYTES, Frame, Kind
from splitlearn_core.hosts.training import Mode, Training, TrainingLimits, TrainingUsage, taken_gradients, taken_random
from splitlearn_core.hosts.tuning import frozen_copy
from splitlearn_core.hosts.wires import compressed, expanded, wire_of
from splitlearn_core.system_memory import return_free_memory
from splitlearn_core.types import Component, human_bytes

log = logging.getLogger(__name__)

#: Seconds after which a refused client may try again.
_RETRY_AFTER = 5.0
_HIDDEN_DIMENSIONS = 3
#: Seconds between returns of free memory to the system, which take milliseconds each.
_RETURN_INTERVAL = 1.0


@dataclass(frozen=True, slots=True)
class SessionLimits(TrainingLimits):
    """The limits of a host for sessions and training."""

    #: Sessions at a time, in total and for each owner (that is, for each token).
    max_sessions: int = 256
    max_sessions_per_owner: int = 256
    #: Tokens of one sequence, and sequences of one session.
    max_tokens: int = 32_768
    max_rows: int = 512
    #: Bytes of all caches together; None for no limit.
    cache_bytes: int | None = None
    #: Seconds without a step after which a session ends.
    idle_timeout: float = 600.0
    #: Bytes of one message.
    max_payload: int = MAX_PAYLOAD_BYTES


@dataclass(slots=True, eq=False)
class _Session:
    number: int
    secret: str
    #: A bearer may send the session's steps, and nothing else.
    passkey: str
    owner: str
    cache: PartCache
    rows: int
    #: Tokens of one sequence: declared, or cached if that is more.
    tokens: int
    lock: threading.Lock
    used_at: float
    #: The limits of its owner.
    limits: SessionLimits
    #: Whether its steps may share forwards with those of other sessions.
    is_packed: bool = False
    #: The number of the last executed step, and its result until the next one.
    done: int = 0
    result: Frame | None = None
    #: What the caller chose for that step: another step of the same number is not the same step.
    nonce: object = None


@dataclass(frozen=True, slots=True)
class _State:
    """What a session was before a step."""

    # Where keys and values are alone, it shares them: a step replaces them.
    cache: PartCache
    rows: int
    tokens: int

    @classmethod
    def of(cls, session: _Session) -> _State:
        return cls(session.cache.copy(), session.rows, session.tokens)

    def restore(self, session: _Session) -> None:
        session.cache, session.rows, session.tokens = self.cache, self.rows, self.tokens


def _repeated(session: _Session, frame: Frame) -> Frame | None:
    """Return the result of a step that is sent again; None for the next step."""
    is_same = session.nonce == frame.meta.get("nonce")
    if frame.step == session.done and session.result is not None and is_same:
        return session.result
    if frame.step != session.done + 1:
        raise RemoteError(
            f"step {frame.step} was sent, and step {session.done + 1} is next",
            code="out_of_order",
            hint="a session has one caller at a time; copy its cache for another caller",
        )
    return None


def _abandoned() -> RemoteError:
    return RemoteError("the step was given up before it ended", code="failed")


def _finished(session: _Session, frame: Frame, result: Frame) -> Frame:
    session.done, session.nonce = frame.step, frame.meta.get("nonce")
    session.result = result._replace(session=session.number, step=frame.step)
    return session.result


class SessionTable:
    """The sessions of one component, as a function from frames to frames.

    :meth:`handle` may be called from several threads; one forward runs at a time.

    Args:
        component: A trunk. Its mode (evaluation or training) and dtype stay as they are.
        limits: The limits of its sessions.
        clock: Returns seconds, monotonically.
        facts: The facts of an earlier table of the same component; by default the component is examined.
        usage: Counts the training of each owner, across several tables.

    Raises:
        ConfigurationError: The component is not a trunk, or does not run in this process.
    """

    def __init__(
        self,
        component: ComponentModel,
        limits: SessionLimits | None = None,
        clock: Callable[[], float] = time.monotonic,
        facts: Facts | None = None,
        usage: TrainingUsage | None = None,
    ) -> None:
        if not isinstance(component, ComponentModel):
            raise ConfigurationError(
                f"a {type(component).__name__} has no layers in this process, and so no sessions here",
                hint="its sessions are kept where it runs; use sessions_on(component, limits)",
            )
        if component.kind is not Component.TRUNK:
            raise ConfigurationError(
                f"a {component.component} cannot be used from elsewhere: it has the data owner's embeddings or head",
                hint="a host runs trunks; load bottom and top where the data is",
            )
        self.limits = limits or SessionLimits()
        self._component = component
        self._clock = clock
        self.facts = facts or component_facts(component, self.limits.max_tokens, self.limits.max_payload)
        self._dimensions = 2 + len(component.crossing[STATES].sizes) if component.crossing else _HIDDEN_DIMENSIONS
        #: What crosses besides hidden states.
        self._others = component.crossing.keys() - {STATES}
        self._counts_tokens = any(map(counts_tokens, component.new_cache().layers))
        self._sessions: dict[int, _Session] = {}
        self._training = Training(component, clock, usage)
        #: Modules of its own with the same weights, which run packs.
        self._packing: ComponentModel | None = None
        self._lock = threading.Lock()
        #: Held during a forward, so that one runs at a time.
        self._compute = threading.Lock()
        #: When free memory was last returned to the system.
        self._returned_at = 0.0
        self._closing = False

    def __len__(self) -> int:
        return len(self._sessions)

    def __contains__(self, number: int) -> bool:
        return number in self._sessions

    @property
    def numbers(self) -> list[int]:
        """The numbers of the open sessions."""
        return list(self._sessions)

    @property
    def is_idle(self) -> bool:
        """Whether it keeps neither sessions nor adapters."""
        return not self._sessions and not len(self._training)

    @property
    def reserved_bytes(self) -> int:
        """The bytes of caches that open sessions may grow to."""
        return sum(map(self._bytes_of, list(self._sessions.values())))

    def handle(self, frame: Frame, owner: str = "", limits: SessionLimits | None = None) -> Frame:
        """Answer one request. A bad request does not raise: it is answered with an ERROR.

        Args:
            frame: The request.
            owner: Who sent it. Sessions of one owner are counted together, and only that owner's requests reach them.
            limits: The limits of this owner, in place of the table's; the sizes of caches and messages, and
                the time limit, are always the table's.
        """
        handler = self._handlers.get(frame.kind)
        if handler is None:
            return error_frame(ProtocolError(f"{frame.kind.name} is not a request", code="malformed"), frame)
        pending = self.pending_step(frame, owner, limits)
        if pending is not None:
            while pending.reply is None:
                self.run_pack([pending])
            return pending.reply
        reply: Frame = self._answer(frame, lambda request: handler(self, request, owner, limits or self.limits))
        return reply

    def pending_step(self, frame: Frame, owner: str = "", limits: SessionLimits | None = None) -> PendingStep | None:
        """Return a step for :meth:`run_pack`, or None if its session is not packed; arguments as for :meth:`handle`."""
        session = self._sessions.get(frame.session)
        if frame.kind is not Kind.STEP or session is None or not session.is_packed:
            return None
        return PendingStep(frame, owner, limits or self.limits)

    def run_pack(self, steps: Sequence[PendingStep]) -> None:
        """Run one forward for the next tokens of each step. A step that is done, or refused, then has its reply.

        One step of each session at a time; a step that has begun is continued until it has its reply, or is abandoned.
        """
        for step in steps:
            if step.is_abandoned:
                step.end(error_frame(_abandoned(), step.frame) if step.begun is None else step.begun.fail(None))
            elif step.begun is None:
                step.reply = self._answer(step.frame, partial(self._begin, step))
        ready = [step for step in steps if step.reply is None and step.begun is not None]
        running = [cast("BegunStep", step.begun) for step in ready]
        if not running:
            return
        with self._compute, torch.inference_mode(mode=False), torch.no_grad():
            if self._packing is None:
                # A pack changes the configuration, which others may be using: the component may have other callers.
                self._packing = frozen_copy(self._component)
            failed = advance(self._packing, running, self._clock)
        for place, (step, begun) in enumerate(zip(ready, running, strict=True)):
            if place in failed:
                step.end(begun.fail(failed[place]))
            elif not begun.remaining:
                step.end(self._answer(step.frame, partial(begun.succeed, begun), is_expanded=True))

    def _answer(self, frame: Frame, handler: Callable[[Frame], Any], *, is_expanded: bool = False) -> Any:
        """Return a handler's reply to a request, or the error that it raises as a reply."""
        try:
            reply = handler(frame if is_expanded else expanded(frame, self.limits.max_payload))
            if reply is None:
                return None
            reply = compressed(reply, wire_of(frame))
            # Its number shows the other side which request it answers.
            return reply if reply.step == frame.step else reply._replace(step=frame.step)
        except SplitLearnError as error:
            return error_frame(error, frame)
        except Exception as error:
            # One client's request must not stop the service of the others. The error's text may name files.
            log.exception("A %s failed", frame.kind.name)
            failure = RemoteError(
                f"the host failed: {type(error).__name__}", code="failed", hint="its log has the details"
            )
            return error_frame(failure, frame)

    def expire(self) -> int:
        """End the sessions that have been idle for too long, and return their number."""
        limit = self._clock() - self.limits.idle_timeout
        with self._lock:
            # A session in a step is not idle, however long the step takes.
            idle = [s for s in self._sessions.values() if s.used_at < limit and not s.lock.locked()]
            for session in idle:
                del self._sessions[session.number]
        self._training.forget(used_before=limit)
        return len(idle)

    def close(self) -> None:
        """End all sessions, and accept no more."""
        with self._lock:
            self._closing = True
            self._sessions.clear()
        self._training.forget()

    # --- requests -------------------------------------------------------------------------------------

    def _hello(self, frame: Frame, owner: str, limits: SessionLimits) -> Frame:
        return Frame(Kind.WELCOME, meta=self.facts.to_json())

    def _ping(self, frame: Frame, owner: str, limits: SessionLimits) -> Frame:
        return Frame(Kind.PONG)

    def _open(self, frame: Frame, owner: str, limits: SessionLimits) -> Frame:
        rows = _number(frame.meta, "rows", 1, limits.max_rows)
        tokens = _number(frame.meta, "tokens", 1, limits.max_tokens)
        mode = frame.meta.get("mode", SOLO)
        if mode not in self.facts.modes:
            raise RemoteError(
                f"this host runs sessions {' or '.join(self.facts.modes)}, not {str(mode)[:50]!r}",
                code="bad_input",
                hint='connect with mode="solo", or to a server with the trunk of a family that is packable',
            )
        return self._opened(
            self._component.new_cache(), (rows, tokens), owner, limits, done=0, is_packed=mode == PACKED
        )

    def _copy(self, frame: Frame, owner: str, limits: SessionLimits) -> Frame:
        source = self._session(frame, owner)
        with source.lock:
            if frame.step != source.done:
                raise RemoteError(
                    f"the session has done {source.done} steps, and a copy of it after step {frame.step} was requested",
                    code="out_of_order",
                )
            size = source.rows, source.tokens
            cache = source.cache.copy()
            return self._opened(cache, size, owner, limits, done=source.done, is_packed=source.is_packed)

    def _opened(
        self,
        cache: PartCache,
        size: tuple[int, int],
        owner: str,
        limits: SessionLimits,
        *,
        done: int,
        is_packed: bool,
    ) -> Frame:
        self.expire()
        session = _Session(
            number=secrets.randbits(62) + 1,
            secret=secrets.token_hex(16),
            passkey=secrets.token_hex(16),
            owner=owner,
            cache=cache,
            rows=size[0],
            tokens=size[1],
            lock=threading.Lock(),
            used_at=self._clock(),
            limits=limits,
            done=done,
            is_packed=is_packed,
        )
        with self._lock:
            if self._closing:
                raise RemoteError("this host is shutting down", code="closing", retry_after=_RETRY_AFTER)
            own = sum(other.owner == owner for other in self._sessions.values())
            if len(self._sessions) >= self.limits.max_sessions or own >= limits.max_sessions_per_owner:
                raise RemoteError(
                    f"{len(self._sessions)} sessions are open, {own} of them yours; "
                    f"{self.limits.max_sessions} and {limits.max_sessions_per_owner} are allowed",
                    code="full",
                    retry_after=_RETRY_AFTER,
                    hint="try again when other sessions have ended, or close those that are no longer needed",
                )
            self._admit(0, self._bytes_of(session))
            self._sessions[session.number] = session
        return Frame(Kind.OPENED, session.number, meta={"secret": session.secret, "pass": session.passkey})

    def _close(self, frame: Frame, owner: str, limits: SessionLimits) -> Frame:
        try:
            number = self._session(frame, owner).number
        except RemoteError:
            return Frame(Kind.CLOSED, frame.session)
        with self._lock:
            self._sessions.pop(number, None)
        return Frame(Kind.CLOSED, number)

    def _collect(self, frame: Frame, owner: str, limits: SessionLimits) -> Frame:
        session = self._session(frame, owner)
        result = session.result
        # Not under the session's lock, which a step holds while it computes.
        if result is None or result.step != frame.step or session.nonce != frame.meta.get("nonce"):
            raise RemoteError(f"step {frame.step} has not arrived here", code="not_arrived")
        return result

    def _step(self, frame: Frame, owner: str, limits: SessionLimits) -> Frame:
        if frame.session == 0:
            return self._forward(frame, None, owner, limits)
        session = self._session(frame, owner)
        with session.lock:
            repeated = _repeated(session, frame)
            if repeated is not None:
                return repeated
            before = _State.of(session)
            try:
                self._change(session, frame.meta.get("changes", []))
                result = self._forward(frame, session, owner, limits)
            except BaseException:
                before.restore(session)
                raise
            finally:
                session.used_at = self._clock()
            return _finished(session, frame, result)

    def _begin(self, step: PendingStep, frame: Frame) -> Frame | None:
        """Check a step of a packed session, and prepare it; return its reply if there is nothing more to run."""
        session = self._session(frame, step.owner)
        session.lock.acquire()
        before: _State | None = None
        is_prepared = False
        try:
            before = _State.of(session)
            repeated = _repeated(session, frame)
            if repeated is not None:
                return repeated
            self._change(session, frame.meta.get("changes", []))
            tensors, mode = unpack(frame), Mode.of(frame.meta)
            self._training.admit(mode, step.owner, step.limits)
            self._grow_for(session, tensors)
            plain = mode == Mode.of({})
            hidden, inputs = self._inputs(frame, tensors, session, mode) if plain else (None, {})
            if hidden is None or not fits_a_pack(hidden, inputs, cached_rows(session.cache)):
                result = self._forward(frame, session, step.owner, step.limits)
                is_prepared = True
                return _finished(session, frame, result)

            begun_from = before

            # Neither holds the step, which holds both: the state from before, with its cache, would wait for the
            # collector of garbage.
            def succeed(begun: BegunStep, request: Frame) -> Frame:
                try:
                    specs, buffers = pack({"output": torch.cat(begun.outputs, dim=1)})
                    meta = {
                        "length": session.cache.get_seq_length(),
                        "mode": PACKED,
                        "pack": begun.sessions,
                        "waited": cast("float", begun.began_at) - begun.requested_at,
                        "computed": begun.computed,
                    }
                    result = Frame(Kind.RESULT, meta=meta, tensors=specs, buffers=buffers)
                    return _finished(session, request, result)
                except BaseException:
                    begun_from.restore(session)
                    raise
                finally:
                    session.used_at = self._clock()
                    session.lock.release()

            def fail(error: RemoteError | None) -> Frame:
                begun_from.restore(session)
                session.used_at = self._clock()
                session.lock.release()
                return error_frame(error or _abandoned(), frame)

            step.begun = BegunStep(
                hidden=hidden,
                cache=session.cache,
                attention_mask=inputs.get("attention_mask"),
                position_ids=inputs.get("position_ids"),
                requested_at=self._clock(),
                succeed=succeed,
                fail=fail,
            )
            is_prepared = True
            return None
        finally:
            if before is not None and not is_prepared:
                before.restore(session)
            if step.begun is None:
                session.used_at = self._clock()
                session.lock.release()

    def _put(self, frame: Frame, owner: str, limits: SessionLimits) -> Frame:
        with self._lock:
            if self._closing:
                raise RemoteError("this host is shutting down", code="closing", retry_after=_RETRY_AFTER)
        return Frame(Kind.KEPT, meta={"hash": self._training.put(frame, owner, limits)})

    def _backward(self, frame: Frame, owner: str, limits: SessionLimits) -> Frame:
        tensors, mode = unpack(frame), Mode.of(frame.meta)
        random, gradients = taken_random(tensors), taken_gradients(tensors)
        if not gradients or frame.session:
            raise RemoteError("a backward pass needs a forward without cache", code="bad_input")
        requested_at = self._clock()
        with self._compute, torch.inference_mode(mode=False), torch.enable_grad():
            began_at = self._clock()
            with self._training.running(mode, owner, random) as running:
                hidden, inputs = self._inputs(frame, tensors, None, mode)
                self._training.admit(mode, owner, limits, hidden.shape[0] * hidden.shape[1])
                specs, buffers = pack(running.gradients(hidden, inputs, frame.meta, gradients))
        meta = {"waited": began_at - requested_at, "computed": self._clock() - began_at}
        # Until its owner's next step it needs nothing but the adapter, which holds the top of the heap in place.
        if began_at - self._returned_at >= _RETURN_INTERVAL:
            self._returned_at = began_at
            return_free_memory()
        return Frame(Kind.RESULT, meta=meta, tensors=specs, buffers=buffers)

    _handlers: Mapping[Kind, Callable[..., Frame]] = {
        Kind.HELLO: _hello,
        Kind.PING: _ping,
        Kind.OPEN: _open,
        Kind.COPY: _copy,
        Kind.CLOSE: _close,
        Kind.STEP: _step,
        Kind.COLLECT: _collect,
        Kind.BACKWARD: _backward,
        Kind.PUT: _put,
    }

    # --- parts of a step ------------------------------------------------------------------------------

    def _session(self, frame: Frame, owner: str) -> _Session:
        session = self._sessions.get(frame.session)
        # Another host sends plain steps with a pass, under a token of its own.
        is_sent_on = frame.kind is Kind.STEP and "pass" in frame.meta
        secret = frame.meta.get("pass" if is_sent_on else "secret")
        # A wrong secret gets the same answer as an unknown number, so that numbers cannot be probed.
        if (
            session is None
            or (session.owner != owner and not is_sent_on)
            or not isinstance(secret, str)
            or not hmac.compare_digest(
                secret.encode(errors="replace"), (session.passkey if is_sent_on else session.secret).encode()
            )
        ):
            raise RemoteError(
                "there is no such session here: it has ended, or belongs to another owner",
                code="closing" if self._closing else "unknown_session",
                hint="open another session",
            )
        if is_sent_on and Mode.of(frame.meta) != Mode.of({}):
            raise RemoteError("steps that another host sends on do not train", code="bad_input")
        return session

    def _admit(self, before: int, after: int) -> None:
        """Refuse the bytes of one session if there is no room for them; called with the lock held."""
        limit, reserved, additional = self.limits.cache_bytes, self.reserved_bytes, after - before
        if limit is not None and after > limit:
            raise RemoteError(
                f"the cache of one session would take {human_bytes(after)}, and {human_bytes(limit)} are allowed for "
                "those of all sessions together",
                code="full",
                hint="declare fewer tokens: connect(..., max_tokens=N); or send fewer sequences at once",
            )
        if limit is not None and reserved + additional > limit:
            raise RemoteError(
                f"caches of {human_bytes(reserved)} are reserved, {human_bytes(additional)} more are needed, "
                f"and {human_bytes(limit)} are allowed",
                code="full",
                retry_after=_RETRY_AFTER,
                hint="try again when other sessions have ended, or declare fewer tokens: connect(..., max_tokens=N)",
            )

    def _bytes_of(self, session: _Session) -> int:
        facts = self.facts
        return session.rows * (session.tokens * facts.cache_bytes_per_token + facts.cache_bytes_per_sequence)

    def _grow_for(self, session: _Session, tensors: Mapping[str, torch.Tensor]) -> None:
        hidden = tensors.get("hidden_states")
        if hidden is not None and hidden.dim() == self._dimensions:
            self._grow(session, hidden.shape[0], session.cache.get_seq_length() + hidden.shape[1])

    def _grow(self, session: _Session, rows: int, tokens: int) -> None:
        """Reserve memory for a step that exceeds what was declared."""
        limits = session.limits
        if rows > limits.max_rows or tokens > limits.max_tokens:
            raise RemoteError(
                f"sequences: {rows}, tokens of each: {tokens}; "
                f"this host allows {limits.max_rows} and {limits.max_tokens}",
                code="too_large",
                hint="shorten the input, or generate fewer tokens or beams",
            )
        grown = replace(session, rows=max(rows, session.rows), tokens=max(tokens, session.tokens))
        with self._lock:
            self._admit(self._bytes_of(session), self._bytes_of(grown))
            session.rows, session.tokens = grown.rows, grown.tokens

    def _change(self, session: _Session, changes: Any) -> None:
        """Apply a step's changes of the cache, in order."""
        if not isinstance(changes, list):
            raise RemoteError("the changes of a cache are not a list", code="bad_input")
        for change in changes:
            name, value = change if isinstance(change, list) and len(change) == 2 else ("", None)  # noqa: PLR2004  # name and value
            apply = CHANGES.get(name) if isinstance(name, str) else None
            if apply is None:
                raise RemoteError(f"{str(name)[:50]!r} is not a change of a cache", code="bad_input")
            rows, length = cached_rows(session.cache), session.cache.get_seq_length()
            checked = checked_change(name, value, rows, self.limits.max_rows, length)
            if rows and name in ROWS_AFTER:
                self._grow(session, ROWS_AFTER[name](rows, value), length)
            apply(session.cache, checked)

    def _forward(self, frame: Frame, session: _Session | None, owner: str, limits: SessionLimits) -> Frame:
        tensors, mode = unpack(frame), Mode.of(frame.meta)
        random = taken_random(tensors)
        self._training.admit(mode, owner, limits)
        if session is not None:
            self._grow_for(session, tensors)
        requested_at = self._clock()
        with self._compute, torch.inference_mode(mode=False), torch.no_grad():
            began_at = self._clock()
            with self._training.running(mode, owner, random) as running:
                hidden, inputs = self._inputs(frame, tensors, session, mode)
                packed = pack({**running(hidden, inputs), **running.random()})
        meta = {
            "length": 0 if session is None else session.cache.get_seq_length(),
            "mode": SOLO,
            "waited": began_at - requested_at,
            "computed": self._clock() - began_at,
        }
        return Frame(Kind.RESULT, meta=meta, tensors=packed[0], buffers=packed[1])

    def _inputs(
        self, frame: Frame, tensors: dict[str, torch.Tensor], session: _Session | None, mode: Mode
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Check the inputs of a step, and return them by the component's argument names."""
        device = next(self._component.parameters()).device
        hidden = tensors.pop("hidden_states", None)
        if hidden is None or hidden.dim() != self._dimensions:
            raise RemoteError("a step has no hidden_states [batch, sequence, hidden] of this type", code="bad_input")
        if hidden.shape[0] * hidden.shape[1] == 0 or hidden.shape[0] > self.limits.max_rows:
            raise RemoteError(f"hidden_states are {_shape(hidden)}: empty, or too many sequences", code="bad_input")
        if hidden.shape[1] > self.limits.max_tokens:
            raise RemoteError(
                f"{hidden.shape[1]} tokens in one step; this host allows {self.limits.max_tokens}", code="too_large"
            )
        if not hidden.is_floating_point():
            raise RemoteError(f"hidden_states are {_shape(hidden)}, not floating-point numbers", code="bad_input")
        # A gradient scaler looks for infinities and NaNs itself, and skips the step.
        crossing = {STATES: hidden, **{name: tensors[name] for name in tensors.keys() & self._others}}
        infinite = sorted(name for name, tensor in crossing.items() if not torch.isfinite(tensor).all())
        if mode.autocast != "float16" and infinite:
            raise RemoteError(
                f"{' and '.join(infinite)} have values that are not finite",
                code="bad_input",
                hint="check the bottom and its input: is a value NaN, or out of the range of the dtype?",
            )
        inputs = _arguments(frame.meta, tensors, {*self.facts.arguments, *self._others, *RECORDINGS})
        inputs = {name: _to(value, device) for name, value in inputs.items()}
        past = 0 if session is None else session.cache.get_seq_length()
        # Layers of running states alone take the part of the new tokens, too.
        lengths = {past + hidden.shape[1], *(() if self._counts_tokens else (hidden.shape[1],))}
        for tensor in _tensors_in(inputs.get("attention_mask")):
            if not tensor.dim() or tensor.shape[-1] not in lengths or tensor.shape[:1] not in ((1,), hidden.shape[:1]):
                raise RemoteError(
                    f"the attention mask is {_shape(tensor)}; {past} tokens are cached, and hidden_states are "
                    f"{_shape(hidden)}",
                    code="bad_input",
                    hint="give a mask of [batch, cached tokens + new tokens]",
                )
        if session is not None:
            inputs["past_key_values"] = session.cache
        elif frame.meta.get("has_cache") is True:
            inputs["past_key_values"] = self._component.new_cache()
        return hidden.to(device), inputs


def error_frame(error: SplitLearnError, request: Frame | None = None) -> Frame:
    """Return the reply to a refused request."""
    code = getattr(error, "code", "") or "failed"
    after = getattr(error, "retry_after", None)
    session, step = (request.session, request.step) if request is not None else (0, 0)
    meta = {"code": code, "message": error.message[:2_000], "hint": error.hint[:1_000], "retry_after": after}
    return Frame(Kind.ERROR, session, step, meta)


def _arguments(meta: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], known: AbstractSet[str]) -> dict[str, Any]:
    """Return the arguments of a forward by name, from the values in meta and the tensors of a frame."""
    values, kinds = meta.get("arguments", {}), []
    if isinstance(values, dict) and "attention_mask_of" in values:
        kinds = values["attention_mask_of"]
        values = {name: value for name, value in values.items() if name != "attention_mask_of"}
    if (
        not isinstance(values, dict)
        or not all(isinstance(value, bool | int | float | str) for value in values.values())
        or not isinstance(kinds, list)
        or not all(isinstance(kind, str) for kind in kinds)
    ):
        raise RemoteError("the arguments of a step are not a mapping of names to numbers and strings", code="bad_input")
    masks = {f"attention_mask.{kind}": kind for kind in kinds}
    unknown = [name for name in (*values, *tensors) if name not in known and name not in masks]
    if unknown:
        raise RemoteError(
            f"this component does not take {', '.join(map(repr, unknown[:5]))}",
            code="bad_input",
            hint=f"it takes hidden_states, {', '.join(sorted(known))}",
        )
    arguments = {**values, **{name: tensor for name, tensor in tensors.items() if name not in masks}}
    if kinds:
        arguments["attention_mask"] = {kind: tensors.get(name) for name, kind in masks.items()}
    return arguments


def _tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [item for item in value.values() if isinstance(item, torch.Tensor)] if isinstance(value, dict) else []


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return {name: _to(item, device) for name, item in value.items()} if isinstance(value, dict) else value


def _shape(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _number(meta: Mapping[str, Any], name: str, least: int, most: int) -> int:
    value = meta.get(name)
    if type(value) is not int or not least <= value <= most:
        raise RemoteError(
            f"{name} is {str(value)[:50]}, not a whole number from {least} to {most}",
            code="too_large" if type(value) is int and value > most else "bad_input",
            hint=f"this host allows {most} {name} in one session",
        )
    return value
