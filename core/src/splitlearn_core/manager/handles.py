"""Handles of the manager: models with their calls, placeholders of those that are loading, and streams of events."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import weakref
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from splitlearn_core.errors import BusyError, HostDiedError, ModelGoneError, SplitLearnError
from splitlearn_core.manager.config import ModelConfig
from splitlearn_core.manager.messages import Changed, Key
from splitlearn_core.manager.status import FailureInfo, ManagerEvent, ModelInfo, ModelStatus
from splitlearn_core.manager.workers import CallPool, answering, in_mode

if TYPE_CHECKING:
    import torch

_T = TypeVar("_T")
#: Events that a slow reader may be behind before it misses the oldest.
_BACKLOG = 1024
#: Changes that are kept for :meth:`History.of`.
_KEPT = 4096


class Lender(Protocol):
    """The interface of the manager for its handles."""

    def info_of(self, key: Key) -> ModelInfo: ...

    def call(self, key: Key, function: Callable[[], Any]) -> Awaitable[Any]: ...

    def wait_for(self, key: Key) -> Awaitable[AsyncManagedModel]: ...


@dataclass(slots=True, eq=False)
class _SharedModule:
    """The module, shared by all handles of one generation; None once it is unloaded."""

    module: torch.nn.Module | None
    #: Why it is gone, if its host has died.
    failure: FailureInfo | None = None


class AsyncManagedModel:
    """A loaded model. ``await model(hidden_states=...)`` runs it in a worker thread.

    Get it from :meth:`AsyncModelManager.lease`: during a lease or a call, it is not freed. After an
    unload by force, calls raise :class:`ModelGoneError`.

    Calls record no gradients, whatever the caller's mode is; calls of :meth:`with_gradients` do. So no
    ``torch.no_grad()`` is needed around an ``await``, where it would be in force for every other task.
    """

    def __init__(self, key: Key, config: ModelConfig, module: torch.nn.Module, lender: Lender) -> None:
        self.model_id, self.generation = key
        self.config = config
        self.gradients = False
        self._shared = _SharedModule(module)
        self._lender = lender

    def with_gradients(self) -> AsyncManagedModel:
        """Return a handle of the same model whose calls record gradients, whatever the caller's mode is."""
        handle = copy.copy(self)
        handle.gradients = True
        return handle

    @property
    def model(self) -> torch.nn.Module:
        """The module itself. Calling it directly blocks the event loop, in the caller's mode.

        Raises:
            ModelGoneError: It was unloaded.
            HostDiedError: Its process has ended.
        """
        if self._shared.module is None:
            raise self._gone_error()
        return self._shared.module

    @property
    def is_gone(self) -> bool:
        """Whether it was unloaded; a new lease is then needed."""
        return self._shared.module is None

    @property
    def info(self) -> ModelInfo:
        """The present snapshot; ModelGoneError once it was unloaded."""
        if self.is_gone:
            raise self._gone_error()
        return self._lender.info_of((self.model_id, self.generation))

    @property
    def status(self) -> ModelStatus:
        if self._shared.failure is not None:
            return ModelStatus.FAILED
        return ModelStatus.UNLOADING if self.is_gone else self.info.status

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module with these arguments off the event loop; see :meth:`run`."""
        return await self.run(lambda module: module(*args, **kwargs))

    async def run(self, function: Callable[[Any], _T]) -> _T:
        """Run ``function(module)`` off the event loop, in the caller's context, with this handle's ``gradients``.

        For more than one call: ``await model.run(lambda module: module.generate(ids))``.

        Cancelling the caller does not stop a call that has started; the model stays leased until it ends.

        Raises:
            BusyError: The queue of waiting calls of this model is full.
            ModelGoneError: It was unloaded.
            HostDiedError: Its process has ended.
        """
        bound = in_mode(partial(contextvars.copy_context().run, function, self.model), gradients=self.gradients)
        result: _T = await self._lender.call((self.model_id, self.generation), bound)
        return result

    def new_cache(self) -> Any:
        """Return an empty key-value cache for this component's layers."""
        make: Any = self.model.new_cache
        return make()

    def __repr__(self) -> str:
        gradients = ", with gradients" * self.gradients
        return f"<AsyncManagedModel {self.model_id!r}, generation {self.generation}, {self.status}{gradients}>"

    def take(self, failure: FailureInfo | None = None) -> torch.nn.Module | None:
        """Remove and return the module: from now on the model is gone, by a failure of its host. For the manager."""
        module, self._shared.module, self._shared.failure = self._shared.module, None, failure
        return module

    def _gone_error(self) -> SplitLearnError:
        failure = self._shared.failure
        return unloaded_error((self.model_id, self.generation)) if failure is None else lost_error(failure)


def unloaded_error(key: Key) -> ModelGoneError:
    """Return the error for using a generation that was unloaded."""
    return ModelGoneError(f"this generation of model {key[0]!r} was unloaded", hint="take a new lease of the model")


def lost_error(failure: FailureInfo) -> SplitLearnError:
    """Return the error for using a generation whose host has died."""
    return HostDiedError(
        failure.message, hint=f"take a new lease once it is ready again; {failure.hint}", code="host_died"
    )


class LoadingPlaceholder:
    """Stands for a model from the request to load it until it is ready."""

    def __init__(self, key: Key, config: ModelConfig, lender: Lender) -> None:
        self.model_id, self.generation = key
        self.config = config
        self._lender = lender

    @property
    def info(self) -> ModelInfo:
        """The present snapshot; UnknownModelError once the load has ended and is no longer recorded."""
        return self._lender.info_of((self.model_id, self.generation))

    @property
    def status(self) -> ModelStatus:
        return self.info.status

    async def wait(self) -> AsyncManagedModel:
        """Wait until it is loaded; raises the error of a failed load."""
        return await self._lender.wait_for((self.model_id, self.generation))

    def __repr__(self) -> str:
        return f"<LoadingPlaceholder {self.model_id!r}, generation {self.generation}>"


@dataclass(slots=True, eq=False)
class _Call:
    #: None once it was passed to a thread, which drops it as soon as it has run.
    function: Callable[[], Any] | None
    future: asyncio.Future[Any]
    #: Called once when the call has ended, in any way.
    release: Callable[[], None]
    started: bool = False


def _into(box: list[Any], function: Callable[[], Any] | None) -> None:
    """Run a function, and put its result or its exception into a box."""
    try:
        box.append(function() if function is not None else None)
    except BaseException as error:  # noqa: BLE001  # SystemExit too: the caller waits for an answer
        box.append(error)


class CallGate:
    """Limits the running and the waiting calls of one generation. Used on the event loop only."""

    def __init__(self, model_id: str, pool: CallPool, limit: int, queue: int) -> None:
        self._model_id = model_id
        self._pool = pool
        self._limit = limit
        self._queue = queue
        self._last_number = 0
        #: Number of a call -> the call, and a list that will hold its outcome.
        self._running: dict[int, tuple[_Call, list[Any]]] = {}
        self._waiting: deque[_Call] = deque()
        self._when_idle: list[Callable[[], object]] = []

    @property
    def running(self) -> int:
        return len(self._running)

    def when_idle(self, action: Callable[[], object]) -> None:
        """Run an action once no call runs: at once, or when the last one ends."""
        if self.running:
            self._when_idle.append(action)
        else:
            action()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def refuse_if_full(self) -> None:
        """Raise BusyError if another call could neither run nor wait."""
        if self.running >= self._limit and len(self._waiting) >= self._queue:
            raise BusyError(
                f"{len(self._waiting)} calls wait for model {self._model_id!r}, and its queue takes {self._queue}",
                hint="try again later, or raise call_queue or calls_per_model",
            )

    def submit(self, function: Callable[[], Any], release: Callable[[], None]) -> asyncio.Future[Any]:
        """Queue a function, and return the future of its result."""
        call = _Call(function, asyncio.get_running_loop().create_future(), release)
        call.future.add_done_callback(lambda future: self._cancelled(call) if future.cancelled() else None)
        self._waiting.append(call)
        self._start()
        return call.future

    def fail_waiting(self, error: Callable[[], BaseException]) -> None:
        """Fail every call that has not started."""
        while self._waiting:
            call = self._waiting.popleft()
            call.release()
            if not call.future.done():
                call.future.set_exception(error())

    def _start(self) -> None:
        while self._waiting and self.running < self._limit:
            call = self._waiting.popleft()
            if call.future.cancelled():
                # A cancelled call: its callback has not run yet, and will not find it in the queue.
                call.release()
                continue
            self._begin(call)

    def _begin(self, call: _Call) -> None:
        # The thread gets a number and the function, but not the call: should its end be delayed, it
        # then refers neither to the model nor to an error that does.
        self._last_number += 1
        number, function = self._last_number, call.function
        box: list[Any] = []
        self._running[number] = call, box
        call.started, call.function = True, None
        done = answering(asyncio.get_running_loop(), partial(self._done, number))
        self._pool.submit(partial(_into, box, function), done)

    def _done(self, number: int, refusal: Any) -> None:
        call, box = self._running.pop(number)
        outcome = box.pop() if box else refusal
        call.release()
        if not call.future.done():
            if isinstance(outcome, Exception) and not isinstance(outcome, StopIteration):
                call.future.set_exception(outcome)
            elif isinstance(outcome, BaseException):
                # These exceptions would end the generator, task or loop that awaits the call.
                call.future.set_exception(RuntimeError(f"the call raised {outcome!r}"))
            else:
                call.future.set_result(outcome)
        self._start()
        while self._when_idle and not self.running:
            self._when_idle.pop(0)()

    def _cancelled(self, call: _Call) -> None:
        # A call that has started is released when its thread has finished with the module.
        if not call.started and call in self._waiting:
            self._waiting.remove(call)
            call.release()


class EventStream(AsyncIterator[ManagerEvent]):
    """Yields the events from its creation until the manager is closed.

    A reader that is more than 1024 events behind misses the oldest: ``sequence`` then has a gap.
    """

    def __init__(self) -> None:
        self._events: deque[ManagerEvent] = deque(maxlen=_BACKLOG)
        self._news = asyncio.Event()
        self._ended = False

    def put(self, event: ManagerEvent) -> None:
        self._events.append(event)
        self._news.set()

    def end(self) -> None:
        self._ended = True
        self._news.set()

    def __aiter__(self) -> EventStream:
        return self

    async def __anext__(self) -> ManagerEvent:
        while not self._events:
            if self._ended:
                raise StopAsyncIteration
            self._news.clear()
            await self._news.wait()
        return self._events.popleft()


class History:
    """The changes of a manager's models: keeps the last ones, and passes each to all streams."""

    def __init__(self) -> None:
        self._streams: weakref.WeakSet[EventStream] = weakref.WeakSet()
        self._changes: deque[ManagerEvent] = deque(maxlen=_KEPT)
        self._sequence = 0
        self._ended = False

    def add(self, change: Changed, at: float) -> None:
        """Record a change, ``at`` in seconds since 1970."""
        self._sequence += 1
        (model_id, number), before, after = change.key, change.before, change.after
        event = ManagerEvent(self._sequence, at, model_id, number, before, after, change.cause)
        self._changes.append(event)
        # Usually there is no stream, and iterating over a weak set costs more than the rest of this method.
        for stream in tuple(self._streams) if len(self._streams) else ():
            stream.put(event)

    def of(self, model_id: str) -> tuple[ManagerEvent, ...]:
        """Return the recorded changes of one model, oldest first."""
        return tuple(event for event in self._changes if event.model_id == model_id)

    def follow(self) -> EventStream:
        """Return a stream of the changes from now on."""
        stream = EventStream()
        self._streams.add(stream)
        if self._ended:
            stream.end()
        return stream

    def end(self) -> None:
        """End all streams: there will be no more changes."""
        self._ended = True
        for stream in tuple(self._streams):
            stream.end()
