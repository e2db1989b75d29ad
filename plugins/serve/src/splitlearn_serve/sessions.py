"""Sessions on the models of a manager: each frame is answered under a lease, in the manager's threads.

A model is loaded by the first frame that needs it, and leased while sessions on it are open, so that it is neither
evicted nor unloaded under them. A reload with the same weights moves them: they are ended with the code ``closing``,
and their users rebuild them on the new generation. With other weights they stay where they are until they end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from splitlearn_core import (
    AsyncManagedModel,
    BusyError,
    CapacityError,
    ConnectionLostError,
    DuplicateModelError,
    HostDiedError,
    LoadCancelledError,
    ManagerClosedError,
    ModelGoneError,
    ModelInfo,
    ModelNotReadyError,
    ModelStatus,
    ProtocolError,
    RemoteError,
    SplitLearnError,
    UnknownModelError,
    WaitTimeoutError,
)
from splitlearn_core.extension import (
    HEADER_BYTES,
    Frame,
    Kind,
    decode,
    decode_header,
    encode,
)
from splitlearn_serve.control import Control
from splitlearn_serve.hops import Hops
from splitlearn_serve.packs import Packs
from splitlearn_serve.tokens import ANYONE, Owner
from splitlearn_serve.traffic import Traffic

if TYPE_CHECKING:
    # They need torch, which is imported once the configuration is known to be valid.
    from splitlearn_core.extension import Facts, SessionLimits, TrainingUsage
    from splitlearn_core.extension import Sessions as Table

log = logging.getLogger(__name__)

#: The size of a frame's meta from which on it is parsed in a thread.
_LARGE_META = 16 * 1024
#: The pause between two searches for idle sessions: a fraction of the idle time limit, and at most so many seconds.
_EXPIRY_PART, _EXPIRY_MOST = 0.25, 5.0
#: Seconds after which a client may try again, while a model is unloaded or there is no room.
_SOON, _LATER = 1.0, 5.0
#: The longest pause between two attempts to load a model whose loads fail.
_LONGEST_PAUSE = 60.0
_REQUESTS = frozenset(
    {
        *(Kind.HELLO, Kind.PING, Kind.OPEN, Kind.COPY, Kind.STEP, Kind.BACKWARD, Kind.CLOSE, Kind.PUT),
        *(Kind.LINK, Kind.COLLECT),
    }
)
#: The longest time that a step may take to arrive, in seconds, while its owner waits for the result.
_LONGEST_ARRIVAL = 30.0
#: What the names of this server's own trunks begin with where an output is sent on.
_HERE = "here/"
#: The size of a result from which on it is put together in a thread.
_LARGE_RESULT = 1024 * 1024
#: Tokens, of all sequences, from which on a step is long: a prompt, rather than a token or a few proposed ones.
_LONG_TOKENS = 16
#: Codes after which a connection ends, since it is unknown where the next frame begins or what it means.
_FATAL = frozenset({"malformed", "version"})
_GOING = (ModelStatus.DRAINING, ModelStatus.UNLOADING)
#: Errors of a generation that has ended or is about to; another one may follow.
_LEAVING = (
    HostDiedError,
    ConnectionLostError,
    ModelGoneError,
    ModelNotReadyError,
    ManagerClosedError,
    LoadCancelledError,
)


@dataclass(frozen=True, slots=True)
class Reply:
    """A frame as bytes."""

    data: bytes
    #: Whether the connection ends after it.
    is_last: bool = False


@dataclass(slots=True, eq=False)
class _Held:
    """A generation of a model that is leased, and the sessions on it."""

    model_id: str
    model: AsyncManagedModel
    table: Table
    lease: contextlib.AsyncExitStack
    #: Steps of packed sessions, which share its forwards.
    packs: Packs
    #: Frames that are being answered.
    users: int = 0


@dataclass(slots=True, eq=False)
class _Turn:
    lock: asyncio.Lock
    users: int = 0


class _Step(NamedTuple):
    """A step of a session, with what distinguishes it from another one of the same number."""

    session: int
    number: int
    nonce: str

    @classmethod
    def of(cls, frame: Frame) -> _Step:
        return cls(frame.session, frame.step, str(frame.meta.get("nonce")))


class Sessions:
    """The sessions on all models of a manager. It is used in the manager's event loop.

    Args:
        control: The manager with its configurations, which are loaded on their first use.
        limits: The limits of sessions.
        hops: The servers that outputs may be sent on to.
        clock: Returns seconds, monotonically.
    """

    def __init__(
        self,
        control: Control,
        limits: SessionLimits | None = None,
        hops: Hops | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        from splitlearn_core.extension import SessionLimits, TrainingUsage

        self.limits = limits or SessionLimits()
        #: Model -> the training of each owner on it, across its generations.
        self._usage: defaultdict[str, TrainingUsage] = defaultdict(TrainingUsage)
        self.control = control
        self._clock = clock
        self._manager = control.manager
        #: Model -> generation -> its lease and sessions.
        self._held: dict[str, dict[int, _Held]] = {}
        #: Model -> the generation that was last used, and its facts.
        self._facts: dict[str, tuple[int, Facts]] = {}
        #: For each model, a lock: one lease is taken at a time.
        self._preparing: dict[str, _Turn] = {}
        #: One frame of each session waits or computes, so that no session fills the queue of its model, and one long
        #: step of each generation.
        self._turns: dict[object, _Turn] = {}
        self._hops = hops or Hops()
        #: A step that another host sends on -> its owner, who waits for the result; None if there is none.
        self._awaited: dict[_Step, asyncio.Future[bytes | None]] = {}
        #: Those that have arrived, and are not done.
        self._arrived: set[_Step] = set()
        #: Steps that were sent on from one trunk of this server to another one.
        self._sent_on: set[asyncio.Task[Reply]] = set()
        self._timer: asyncio.Task[None] | None = None
        self._is_closed = False
        control.before_unload = self.end

    @property
    def is_closing(self) -> bool:
        return self._is_closed or self.control.closing.is_set()

    async def answer(self, model_id: str, data: bytes | bytearray, owner: Owner) -> Reply:
        """Answer one message; an error is an answer, too."""
        traffic = self.control.traffic.of(model_id)
        traffic.bytes_received += len(data)
        frame: Frame | None = None
        try:
            frame = await self._decoded(data)
            reply = await self._reply(model_id, frame, owner, traffic)
        except SplitLearnError as error:
            reply = _refusal(error, frame, traffic)
        except Exception:
            # The error's text goes only to the log: it may contain file names.
            log.exception("A request to %s failed", model_id)
            failure = RemoteError("the server failed at this request", code="failed", hint="its log has the details")
            reply = _refusal(failure, frame, traffic)
        traffic.bytes_sent += len(reply.data)
        return reply

    async def expire(self) -> None:
        """End the sessions that have been idle for too long, and release the leases of models without sessions."""
        for model_id, generations in list(self._held.items()):
            for held in list(generations.values()):
                # This frees the memory of their caches. A process that does not answer delays only its own sessions.
                with contextlib.suppress(TimeoutError):
                    count = await asyncio.wait_for(asyncio.to_thread(held.table.expire), _EXPIRY_MOST)
                    self.control.traffic.of(model_id).expired += count
                info = self._listed(model_id)
                is_going = info is not None and info.status in _GOING
                # Adapters alone do not keep a model from being unloaded: clients send them again.
                if held.model.is_gone or (is_going and not len(held.table)):
                    held.table.close()
                await self._settle(held)
            with contextlib.suppress(SplitLearnError):
                await self._follow_reload(model_id)

    async def end(self, model_id: str) -> None:
        """End all sessions on a model; their users may rebuild them on another generation or server."""
        for held in self._all(model_id):
            for step in [step for step in self._awaited if step.session in held.table]:
                self._settle_awaited(step, None)
            held.table.close()
            await self._settle(held)

    async def close(self) -> None:
        """End all sessions, and accept no more."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
            await asyncio.gather(self._timer, return_exceptions=True)
        for model_id in list(self._held):
            await self.end(model_id)
        for step in list(self._awaited):
            self._settle_awaited(step, None)
        self._hops.close()

    # --- a request ------------------------------------------------------------------------------------

    async def _decoded(self, data: bytes | bytearray) -> Frame:
        header = decode_header(data, self.limits.max_payload)
        if header.kind not in _REQUESTS:
            raise ProtocolError(f"{header.kind.name} is not a request", code="malformed")
        if header.meta_length > _LARGE_META and len(data) == HEADER_BYTES + header.rest:
            return await asyncio.to_thread(decode, data, self.limits.max_payload)
        return decode(data, self.limits.max_payload)

    async def _reply(self, model_id: str, frame: Frame, owner: Owner, traffic: Traffic) -> Reply:
        if frame.kind in (Kind.PING, Kind.LINK):
            answer = Frame(Kind.PONG, step=frame.step) if frame.kind is Kind.PING else await self._linked(frame)
            return _encoded(answer)
        if frame.kind is Kind.HELLO:
            facts = await self._facts_of(model_id)
            # A session declares at most the limit of its owner.
            meta = {**facts.to_json(), "max_tokens": owner.limits(self.limits).max_tokens}
            meta |= {"sends_on": len(self._hops) > 0 or self.control.has_several_trunks, "takes_over": True}
            return _encoded(Frame(Kind.WELCOME, step=frame.step, meta=meta))
        if frame.kind is Kind.CLOSE and not any(frame.session in held.table for held in self._all(model_id)):
            # The session is closed already; the model is not loaded for that.
            return _encoded(Frame(Kind.CLOSED, frame.session, frame.step))
        if frame.kind is Kind.COLLECT:
            return await self._collected(model_id, frame, owner)
        if frame.kind is Kind.STEP and "pass" in frame.meta:
            return await self._taken_over(model_id, frame, owner, traffic)
        reply = Reply((await self._executed(model_id, frame, owner, traffic))[1])
        # An owner who sends a step does not wait for it any more.
        self._settle_awaited(_Step.of(frame), None)
        return reply

    async def _taken_over(self, model_id: str, frame: Frame, owner: Owner, traffic: Traffic) -> Reply:
        """Execute a step that another host has sent on; its owner gets the result, and that host none."""
        step, result = _Step.of(frame), None
        self._arrived.add(step)
        try:
            reply, data = await self._executed(model_id, frame, owner, traffic)
            if reply.kind is not Kind.RESULT:
                return Reply(data)
            result = data
            return _encoded(Frame(Kind.RESULT, frame.session, frame.step))
        finally:
            self._arrived.discard(step)
            self._settle_awaited(step, result)

    async def _collected(self, model_id: str, frame: Frame, owner: Owner) -> Reply:
        """Wait for a step that another host sends on, and return its result."""
        wait = frame.meta.get("wait")
        wait = min(wait, _LONGEST_ARRIVAL) if isinstance(wait, int | float) and wait >= 0 else 0.0
        awaited = asyncio.get_running_loop().create_future()
        step = _Step.of(frame)
        # Before the session is looked at: the step may arrive at any moment.
        self._awaited[step] = awaited
        try:
            async with self._using(model_id, frame) as held:
                table, limits = held.table, owner.limits(self.limits)
                reply = await asyncio.to_thread(table.handle, frame, owner.name, limits)
            if reply.meta.get("code") == "not_arrived":
                await asyncio.wait({awaited}, timeout=wait)
                if not awaited.done() and step in self._arrived:
                    await asyncio.wait({awaited})
                result = awaited.result() if awaited.done() else None
                if result is not None:
                    return Reply(result)
            return _encoded(reply)
        finally:
            if self._awaited.get(step) is awaited:
                del self._awaited[step]

    def _settle_awaited(self, step: _Step, result: bytes | None) -> None:
        awaited = self._awaited.pop(step, None)
        if awaited is not None and not awaited.done():
            awaited.set_result(result)

    async def _executed(self, model_id: str, frame: Frame, owner: Owner, traffic: Traffic) -> tuple[Frame, bytes]:
        """Execute a request, and send its output on if it has a route; return the reply, and the same as bytes."""
        arrived = self._clock()
        # Without a session, the owner's frames take turns.
        async with _turn(self._turns, frame.session or owner.name), self._using(model_id, frame) as held:
            table, limits = held.table, owner.limits(self.limits)

            def work(_: Any) -> tuple[Frame, bytes, float, float]:
                began = self._clock()
                reply = table.handle(frame, owner.name, limits)
                return reply, _bytes_of(reply), began - arrived, self._clock() - began

            step = held.packs.step_of(frame, owner.name, limits)
            if step is not None:
                reply, data = await held.packs.run(step)
                waited, computed = reply.meta.get("waited", 0.0), reply.meta.get("computed", 0.0)
            else:
                async with self._long_turn(held, frame):
                    reply, data, waited, computed = await held.model.run(work)
            if reply.kind is Kind.RESULT:
                traffic.stepped(waited, computed)
            elif reply.kind is Kind.OPENED:
                traffic.opened += 1
            elif reply.kind is Kind.ERROR:
                traffic.refused[str(reply.meta.get("code"))] += 1
        if frame.kind is Kind.STEP and reply.kind is Kind.RESULT and "next" in frame.meta:
            reply = reply._replace(meta={**reply.meta, "sent_on": await self._send_on(frame, reply)})
            data = await asyncio.to_thread(_bytes_of, reply) if len(data) > _LARGE_RESULT else _bytes_of(reply)
        return reply, data

    async def _linked(self, frame: Frame) -> Frame:
        """Return the name of the trunk that a request describes: one of this server's, or of a next server's."""
        for model_id, (_, facts) in self._facts.items():
            if facts.epoch == frame.meta.get("epoch"):
                return Frame(Kind.LINKED, step=frame.step, meta={"link": _HERE + model_id})
        return await self._hops.link(frame)

    async def _send_on(self, frame: Frame, reply: Frame) -> bool | str:
        """Make the next step of a result, and see that it is executed; return True, or the reason why it is not."""
        from splitlearn_core.extension import onward

        try:
            name, step = onward(frame, reply)
        except RemoteError as error:
            return error.message
        if not name.startswith(_HERE):
            return await self._hops.send_on(name, step)
        model_id = name.removeprefix(_HERE)
        if self.control.known(model_id) is None:
            return "it does not have the next trunk any more"
        data = await asyncio.to_thread(_bytes_of, step) if step.payload_bytes > _LARGE_RESULT else _bytes_of(step)
        # As if it came from another server: what entitles it is the pass.
        task = asyncio.create_task(self.answer(model_id, data, ANYONE), name="execute a step that is sent on")
        self._sent_on.add(task)
        task.add_done_callback(self._sent_on.discard)
        return True

    @contextlib.asynccontextmanager
    async def _using(self, model_id: str, frame: Frame) -> AsyncIterator[_Held]:
        """Use the generation that has the frame's session, or else the newest one."""
        held = await self._holder(model_id, frame)
        try:
            yield held
        finally:
            held.users -= 1
            await self._settle(held)

    async def _holder(self, model_id: str, frame: Frame) -> _Held:
        """Return the generation that has the frame's session, with one user more."""
        if self.is_closing:
            raise _closing("this server is shutting down")
        await self._follow_reload(model_id)
        for held in self._all(model_id):
            if frame.session in held.table and not held.model.is_gone:
                held.users += 1
                break
        else:
            held = await self._newest(model_id)
        return held

    @contextlib.asynccontextmanager
    async def _long_turn(self, held: _Held, frame: Frame) -> AsyncIterator[None]:
        """Keep several long steps from running one after the other while short ones wait."""
        if not _is_long(frame):
            yield
            return
        follows = held in self._turns
        async with _turn(self._turns, held):
            if follows:
                # Calls run in the order in which they arrive: those that waited during the last long one come first.
                await held.model.run(lambda _: None)
            yield

    async def _facts_of(self, model_id: str) -> Facts:
        if self.is_closing:
            raise _closing("this server is shutting down")
        info, known = self._listed(model_id), self._facts.get(model_id)
        if info is not None and info.status is ModelStatus.READY and known and known[0] == info.generation:
            return known[1]
        held = await self._newest(model_id)
        held.users -= 1
        await self._settle(held)
        return held.table.facts

    # --- generations ----------------------------------------------------------------------------------

    async def _newest(self, model_id: str) -> _Held:
        """Return the newest generation of a model with one user more; load the model if necessary."""
        from splitlearn_core.extension import sessions_on

        async with _turn(self._preparing, model_id):
            await self._make_ready(model_id)
            async with contextlib.AsyncExitStack() as stack:
                model = await stack.enter_async_context(self._manager.lease(model_id))
                generations = self._held.setdefault(model_id, {})
                held = generations.get(model.generation)
                if held is None:
                    known, limits = self._facts.get(model_id), self.limits
                    facts = known[1] if known and known[0] == model.generation else None
                    usage, clock = self._usage[model_id], self._clock
                    table = await model.run(lambda module: sessions_on(module, limits, facts, usage, clock))
                    if self.is_closing:
                        raise _closing("this server is shutting down")
                    self._facts[model_id] = model.generation, table.facts
                    held = generations[model.generation] = _Held(
                        model_id, model, table, stack.pop_all(), Packs(model, table, clock)
                    )
                held.users += 1
        if self._timer is None or self._timer.done():
            self._timer = asyncio.create_task(self._expire_forever(), name="end idle sessions")
        return held

    async def _make_ready(self, model_id: str) -> None:
        info = self._listed(model_id)
        if info is not None and info.status in _GOING:
            raise _closing(f"model {model_id!r} is being unloaded")
        if info is not None and info.status is not ModelStatus.FAILED:
            return
        if info is not None and info.error is not None:
            # Clients that keep retrying must not keep loading a broken model.
            left = info.error.at + min(2.0**info.error.consecutive, _LONGEST_PAUSE) - time.time()
            if not info.error.retryable or left > 0:
                raise RemoteError(
                    f"model {model_id!r} cannot be loaded: {info.error.message}",
                    code="not_loaded",
                    hint=info.error.hint,
                    retry_after=max(left, _SOON) if info.error.retryable else None,
                )
        # Another request may already be loading it.
        with contextlib.suppress(DuplicateModelError):
            await self.control.load_known(model_id, wait=True)

    async def _follow_reload(self, model_id: str) -> None:
        """Move sessions from older generations to the one that serves now, if it has the same weights."""
        generations = self._held.get(model_id)
        if not generations:
            return
        info = self._listed(model_id)
        if info is None or info.status is not ModelStatus.READY or info.generation <= min(generations):
            return
        known = self._facts.get(model_id)
        if known is None or known[0] != info.generation:
            newest = await self._newest(model_id)
            newest.users -= 1
            await self._settle(newest)
            known = newest.model.generation, newest.table.facts
        for held in self._all(model_id):
            if held.model.generation < known[0] and not held.table.facts.differences(known[1]):
                held.table.close()
                await self._settle(held)

    async def _settle(self, held: _Held) -> None:
        """Count the sessions, and release a lease that is no longer needed."""
        generations = self._held.get(held.model_id, {})
        if not held.users and held.table.is_idle and generations.get(held.model.generation) is held:
            del generations[held.model.generation]
            if not generations:
                del self._held[held.model_id]
            await held.lease.aclose()
        traffic = self.control.traffic.of(held.model_id)
        tables = [other.table for other in self._held.get(held.model_id, {}).values()]
        traffic.open = sum(map(len, tables))
        traffic.cache_bytes = sum(table.reserved_bytes for table in tables)

    def _all(self, model_id: str) -> list[_Held]:
        return list(self._held.get(model_id, {}).values())

    def _listed(self, model_id: str) -> ModelInfo | None:
        try:
            return self._manager.get_model_info(model_id)
        except UnknownModelError:
            return None

    async def _expire_forever(self) -> None:
        interval = min(self.limits.idle_timeout * _EXPIRY_PART, _EXPIRY_MOST)
        while self._held:
            await asyncio.sleep(interval)
            try:
                await self.expire()
            except Exception:
                # Without this task, no session would ever end.
                log.exception("Idle sessions could not be ended")


@contextlib.asynccontextmanager
async def _turn(turns: dict[Any, _Turn], key: object) -> AsyncIterator[None]:
    """Wait for earlier holders of the same key."""
    turn = turns.setdefault(key, _Turn(asyncio.Lock()))
    turn.users += 1
    try:
        async with turn.lock:
            yield
    finally:
        turn.users -= 1
        if not turn.users:
            del turns[key]


def _is_long(frame: Frame) -> bool:
    tokens = max((math.prod(spec.shape[:-1]) for spec in frame.tensors), default=0)
    return frame.kind is Kind.BACKWARD or (frame.kind is Kind.STEP and tokens >= _LONG_TOKENS)


def _bytes_of(frame: Frame) -> bytes:
    return b"".join(encode(frame))


def _encoded(frame: Frame) -> Reply:
    return Reply(_bytes_of(frame))


def _refusal(error: SplitLearnError, frame: Frame | None, traffic: Traffic) -> Reply:
    remote = as_remote(error)
    traffic.refused[remote.code] += 1
    return Reply(refusal_frame(remote, frame), remote.code in _FATAL or frame is None)


def refusal_frame(error: RemoteError, request: Frame | None = None) -> bytes:
    """Return an error as the bytes of a frame."""
    from splitlearn_core.extension import error_frame

    return _bytes_of(error_frame(error, request))


def _closing(message: str) -> RemoteError:
    return RemoteError(message, code="closing", retry_after=_SOON, hint="try again: it may be loaded again elsewhere")


def as_remote(error: SplitLearnError) -> RemoteError:
    """Translate an error of the manager into one that a client understands."""
    if isinstance(error, RemoteError) and not isinstance(error, HostDiedError | ConnectionLostError):
        return error
    code, retry_after = "not_loaded", None
    if isinstance(error, BusyError | CapacityError | WaitTimeoutError):
        code, retry_after = "full", _SOON if isinstance(error, BusyError) else _LATER
    elif isinstance(error, _LEAVING):
        code, retry_after = "closing", _SOON
    elif isinstance(error, UnknownModelError):
        code = "unknown_model"
    return RemoteError(error.message, hint=error.hint, code=code, retry_after=retry_after)
