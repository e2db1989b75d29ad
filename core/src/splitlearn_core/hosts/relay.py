"""Sessions of clients on a component that runs elsewhere: a server forwards their frames unchanged.

The sessions are kept where the component is. The server has a :class:`SessionRelay`, which adds to each frame
its owner and that owner's limits; the :class:`ComponentServer` at the other end separates these sessions from
those of its own user. Payloads are neither read nor copied into tensors on the way.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import secrets
import threading
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from splitlearn_core.build.component import ComponentModel
from splitlearn_core.errors import ConnectionLostError, HostDiedError, ProtocolError, RemoteError, SplitLearnError
from splitlearn_core.hosts.facts import SOLO, Facts
from splitlearn_core.hosts.packs import PendingStep
from splitlearn_core.hosts.protocol import Frame, Kind, TensorSpec
from splitlearn_core.hosts.remote import RemoteComponent
from splitlearn_core.hosts.sessions import SessionLimits, SessionTable, error_frame
from splitlearn_core.hosts.shared_memory import Channel
from splitlearn_core.hosts.training import TrainingUsage
from splitlearn_core.hosts.wires import shape_of

log = logging.getLogger(__name__)

#: The entry of meta that only the user of a host may write: what clients send under this name is replaced.
_RELAY = "relay"
#: Seconds after which a client may try again when its host has ended.
_SOON = 1.0
_CHANGES_SESSIONS = (Kind.OPENED, Kind.CLOSED)


class ComponentServer:
    """Answers the frames of one component where it runs: those of its user, and those that its user relays.

    Args:
        component: A trunk that runs here.
        limits: The limits of the user's own sessions; relayed sessions have their own.
    """

    def __init__(self, component: ComponentModel, limits: SessionLimits | None = None) -> None:
        self._component = component
        self._own = SessionTable(component, limits)
        self._lock = threading.Lock()
        #: The latest relay.
        self._relay_id, self._relayed = "", self._own

    @property
    def limits(self) -> SessionLimits:
        return self._own.limits

    def handle(self, frame: Frame) -> Frame:
        """Answer one request; like ``SessionTable.handle``, from any thread."""
        relay = frame.meta.get(_RELAY)
        if relay is None:
            return self._own.handle(frame)
        frame = frame._replace(meta={name: value for name, value in frame.meta.items() if name != _RELAY})
        if "begin" in relay:
            self._begin(relay)
        with self._lock:
            table = self._relayed
            if relay["id"] != self._relay_id:
                return error_frame(_closing(), frame)
        if relay.get("end"):
            table.close()
        if frame.kind is Kind.PING:
            return _state(table)._replace(step=frame.step)
        reply = table.handle(frame, relay["owner"], SessionLimits(**relay["limits"]))
        if reply.kind not in _CHANGES_SESSIONS:
            return reply
        state = {"is_open": reply.session in table, "reserved": table.reserved_bytes}
        return reply._replace(meta={**reply.meta, _RELAY: state})

    def serve(self, channel: Channel) -> None:
        """Answer the requests on a channel until its other side is closed, and close it."""
        with contextlib.closing(channel), contextlib.suppress(OSError):  # the other side closed it
            while True:
                try:
                    request = channel.receive()
                except ProtocolError as error:
                    channel.send(error_frame(error))
                    return
                if request is None:
                    return
                channel.send(self.handle(request))

    def _begin(self, relay: Mapping[str, Any]) -> None:
        """Make a table for a new relay; the sessions of the previous one end."""
        limits = SessionLimits(**relay["begin"])
        table = SessionTable(self._component, limits, facts=_facts_for(self._own.facts, limits))
        with self._lock:
            if self._relayed is not self._own:
                self._relayed.close()
            self._relay_id, self._relayed = relay["id"], table


class SessionRelay:
    """The sessions of clients on a component that runs elsewhere, with the interface of :class:`SessionTable`.

    Args:
        component: The result of :func:`connect` or of a host; a :class:`ComponentServer` is at its other end.
        limits: The limits of the sessions.
        usage: Counts the training of each owner, across several relays.

    Raises:
        RemoteError: The host does not answer.
    """

    def __init__(
        self, component: RemoteComponent, limits: SessionLimits | None = None, usage: TrainingUsage | None = None
    ) -> None:
        self.limits = limits or SessionLimits()
        self._usage = usage or TrainingUsage()
        self.facts = _facts_for(component.facts, self.limits)
        self._host = component.host
        self._id = secrets.token_hex(8)
        self._numbers: set[int] = set()
        self._looking = threading.Lock()
        self._is_closed = False
        #: Whether the host may have adapters.
        self._keeps_adapters = False
        #: The bytes of caches that open sessions may grow to, as last reported by the host.
        self.reserved_bytes = 0
        self._exchange(Frame(Kind.PING), {"begin": dataclasses.asdict(self.limits)})

    def __len__(self) -> int:
        return len(self._numbers)

    def __contains__(self, number: int) -> bool:
        return number in self._numbers

    @property
    def is_idle(self) -> bool:
        """Whether there are neither sessions nor adapters."""
        return not self._numbers and not self._keeps_adapters

    def handle(self, frame: Frame, owner: str = "", limits: SessionLimits | None = None) -> Frame:
        """Answer one request; see :meth:`SessionTable.handle`."""
        try:
            if self._is_closed:
                raise _closing()
            limits = limits or self.limits
            if frame.kind is Kind.BACKWARD and limits.training:
                # Counted here, so that a restart of the host does not reset the count.
                self._usage.add(owner, _tokens(frame), limits)
                limits = dataclasses.replace(limits, training_steps=None, training_tokens=None)
            reply = self._exchange(frame, {"owner": owner, "limits": dataclasses.asdict(limits)})
        except (ConnectionLostError, HostDiedError) as error:
            # The error's text may contain file names. The client retries the step, or replays its journal.
            log.debug("A frame was not relayed: %s", error.message)
            return error_frame(_closing(), frame)
        except SplitLearnError as error:
            return error_frame(error, frame)
        self._keeps_adapters = self._keeps_adapters or reply.kind is Kind.KEPT
        state = reply.meta.get(_RELAY)
        if state is None:
            return reply
        if state["is_open"] and not self._is_closed:
            self._numbers.add(reply.session)
        else:
            self._numbers.discard(reply.session)
        self.reserved_bytes = state["reserved"]
        return reply._replace(meta={name: value for name, value in reply.meta.items() if name != _RELAY})

    def pending_step(self, frame: Frame, owner: str = "", limits: SessionLimits | None = None) -> None:
        """Return None: each step is relayed alone."""

    def run_pack(self, steps: Sequence[PendingStep]) -> None:
        """Do nothing: there are no such steps."""

    def expire(self) -> int:
        """End the sessions that have been idle for too long, and return their number.

        Only one caller at a time waits for a host that does not answer; the others get 0.
        """
        if self._is_closed or not self._looking.acquire(blocking=False):
            return 0
        try:
            before = set(self._numbers)
            reply = self._exchange(Frame(Kind.PING), {})
            if reply.kind is not Kind.PONG:
                return 0
            open_now = array("q", b"".join(reply.buffers))
            # A session that was opened meanwhile may be missing from them.
            self._numbers -= before.difference(open_now)
            self.reserved_bytes = int(reply.meta["reserved"])
            self._keeps_adapters = bool(reply.meta["adapters"])
            return int(reply.meta["expired"])
        except (ConnectionLostError, HostDiedError) as error:
            log.debug("Sessions were not counted: %s", error.message)
            return 0
        finally:
            self._looking.release()

    def close(self) -> None:
        """End all sessions, and accept no more; does not wait for the host."""
        if not self._is_closed:
            self._is_closed = True
            self._numbers.clear()
            self.reserved_bytes = 0
            threading.Thread(target=self._end, name="end relayed sessions", daemon=True).start()

    def _end(self) -> None:
        try:
            self._exchange(Frame(Kind.PING), {"end": True})
        except RemoteError as error:
            log.debug("Relayed sessions end with their host: %s", error.message)

    def _exchange(self, frame: Frame, relay: Mapping[str, Any]) -> Frame:
        meta = {**frame.meta, _RELAY: {"id": self._id, **relay}}
        return self._host.exchange(frame._replace(meta=meta))


#: The sessions of a component that runs here or elsewhere.
Sessions = SessionTable | SessionRelay


def sessions_on(
    component: Any,
    limits: SessionLimits | None = None,
    facts: Facts | None = None,
    usage: TrainingUsage | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Sessions:
    """Return the sessions of a component, wherever it runs.

    Args:
        component: A trunk in this process, or the :class:`RemoteComponent` of a trunk at a host.
        limits: The limits of the sessions.
        facts: The facts of an earlier table of the same component.
        usage: Counts the training of each owner, across several of these.
        clock: Returns seconds, monotonically. Elsewhere, it is the host's own.

    Raises:
        ConfigurationError: It is not a trunk.
        RemoteError: Its host does not answer.
    """
    if isinstance(component, RemoteComponent):
        return SessionRelay(component, limits, usage)
    return SessionTable(component, limits, clock, facts, usage)


def _facts_for(facts: Facts, limits: SessionLimits) -> Facts:
    # Each frame is relayed alone.
    return dataclasses.replace(facts, max_tokens=limits.max_tokens, max_payload=limits.max_payload, modes=(SOLO,))


def _tokens(frame: Frame) -> int:
    shape = shape_of(frame, "hidden_states")
    return math.prod(shape[:2])


def _state(table: SessionTable) -> Frame:
    """End idle sessions, and report the remaining ones."""
    expired = table.expire()
    numbers = array("q", table.numbers)
    spec = TensorSpec("sessions", "I64", (len(numbers),))
    meta = {"expired": expired, "reserved": table.reserved_bytes, "adapters": not table.is_idle and not len(numbers)}
    return Frame(Kind.PONG, meta=meta, tensors=(spec,), buffers=[memoryview(numbers).cast("B")])


def _closing() -> RemoteError:
    return RemoteError(
        "the process of this model has ended, or is about to end",
        code="closing",
        retry_after=_SOON,
        hint="try again: it may be restarted",
    )
