"""What the manager hands out: models that can be called, and placeholders of those that are loading."""

from __future__ import annotations

import asyncio
import contextvars
import copy
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from splitlearn_core.errors import BusyError, ModelGoneError
from splitlearn_core.manager.config import ModelConfig
from splitlearn_core.manager.messages import Key
from splitlearn_core.manager.status import ModelInfo, ModelStatus
from splitlearn_core.manager.threads import CallPool, answering
from splitlearn_core.manager.torch_modes import in_mode

if TYPE_CHECKING:
    import torch

_T = TypeVar("_T")


class Lender(Protocol):
    """What a lent model needs of its manager."""

    def info_of(self, key: Key) -> ModelInfo: ...

    def call(self, key: Key, function: Callable[[], Any]) -> Awaitable[Any]: ...

    def wait_for(self, key: Key) -> Awaitable[AsyncManagedModel]: ...


@dataclass(slots=True, eq=False)
class _Holder:
    """What all handles of one generation share."""

    module: torch.nn.Module | None


class AsyncManagedModel:
    """A loaded model. ``await model(hidden_states=...)`` runs it in a worker thread.

    Take it from :meth:`AsyncModelManager.lease`: while a lease or a call lasts, it is not freed. One
    that was unloaded by force raises :class:`ModelGoneError` when it is called.

    Calls record no gradients, whatever the caller's mode is; those of :meth:`with_gradients` do. So no
    ``torch.no_grad()`` has to be held over an ``await``, where it would be in force for every other task.
    """

    def __init__(self, key: Key, config: ModelConfig, module: torch.nn.Module, lender: Lender) -> None:
        self.model_id, self.generation = key
        self.config = config
        self.gradients = False
        self._holder = _Holder(module)
        self._lender = lender

    def with_gradients(self) -> AsyncManagedModel:
        """Return a handle of the same model whose calls record gradients, whatever the caller's mode is."""
        handle = copy.copy(self)
        handle.gradients = True
        return handle

    @property
    def model(self) -> torch.nn.Module:
        """The module itself, for what needs it. Calling it here blocks the event loop, in the caller's mode.

        Raises:
            ModelGoneError: It was unloaded.
        """
        if self._holder.module is None:
            raise self._gone()
        return self._holder.module

    @property
    def is_gone(self) -> bool:
        """Whether it was unloaded, and can only be taken anew."""
        return self._holder.module is None

    @property
    def info(self) -> ModelInfo:
        """The present snapshot; ModelGoneError once it was unloaded."""
        if self.is_gone:
            raise self._gone()
        return self._lender.info_of((self.model_id, self.generation))

    @property
    def status(self) -> ModelStatus:
        return ModelStatus.UNLOADING if self.is_gone else self.info.status

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module with these arguments off the event loop; see :meth:`run`."""
        return await self.run(lambda module: module(*args, **kwargs))

    async def run(self, function: Callable[[Any], _T]) -> _T:
        """Run ``function(module)`` off the event loop, in the caller's context, with this handle's ``gradients``.

        For what is more than one call: ``await model.run(lambda module: module.generate(ids))``.

        Cancelling the caller does not stop a call that has begun; the model stays lent until it ends.

        Raises:
            BusyError: As many calls wait for this model as its queue takes.
            ModelGoneError: It was unloaded.
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

    def take(self) -> torch.nn.Module | None:
        """Let go of the module: from here on the model is gone. For the manager."""
        module, self._holder.module = self._holder.module, None
        return module

    def _gone(self) -> ModelGoneError:
        return ModelGoneError(
            f"this generation of model {self.model_id!r} was unloaded", hint="take a new lease of the model"
        )


class LoadingPlaceholder:
    """Stands where a model will be, from the request for it until it is there."""

    def __init__(self, key: Key, config: ModelConfig, lender: Lender) -> None:
        self.model_id, self.generation = key
        self.config = config
        self._lender = lender

    @property
    def info(self) -> ModelInfo:
        """The present snapshot; UnknownModelError once the load is over and forgotten."""
        return self._lender.info_of((self.model_id, self.generation))

    @property
    def status(self) -> ModelStatus:
        return self.info.status

    async def wait(self) -> AsyncManagedModel:
        """Wait until it is loaded; raises what the load failed with."""
        return await self._lender.wait_for((self.model_id, self.generation))

    def __repr__(self) -> str:
        return f"<LoadingPlaceholder {self.model_id!r}, generation {self.generation}>"


@dataclass(slots=True, eq=False)
class _Call:
    #: None once it was handed to a thread, which lets go of it as soon as it has run.
    function: Callable[[], Any] | None
    future: asyncio.Future[Any]
    #: Called once when it is over, however it ends.
    release: Callable[[], None]
    started: bool = False


def _into(box: list[Any], function: Callable[[], Any] | None) -> None:
    """Run a function, and put what it returned or raised into a box."""
    try:
        box.append(function() if function is not None else None)
    except BaseException as error:  # noqa: BLE001  # SystemExit too: the other side waits for an answer
        box.append(error)


class CallGate:
    """Lets so many calls of one generation run at once, and so many wait. Lives on the event loop."""

    def __init__(self, model_id: str, pool: CallPool, limit: int, queue: int) -> None:
        self._model_id = model_id
        self._pool = pool
        self._limit = limit
        self._queue = queue
        self._numbers = 0
        #: Number of a call -> the call, and what will hold its outcome.
        self._under_way: dict[int, tuple[_Call, list[Any]]] = {}
        self._waiting: deque[_Call] = deque()
        self._when_idle: list[Callable[[], object]] = []

    @property
    def running(self) -> int:
        return len(self._under_way)

    def when_idle(self, action: Callable[[], object]) -> None:
        """Do something once no call runs: at once, or when the last one ends."""
        if self.running:
            self._when_idle.append(action)
        else:
            action()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def refuse_if_full(self) -> None:
        """Raise BusyError where one more call could neither run nor wait."""
        if self.running >= self._limit and len(self._waiting) >= self._queue:
            raise BusyError(
                f"{len(self._waiting)} calls wait for model {self._model_id!r}, and its queue takes {self._queue}",
                hint="try again later, or raise call_queue or calls_per_model",
            )

    def submit(self, function: Callable[[], Any], release: Callable[[], None]) -> asyncio.Future[Any]:
        """Run a function when it is its turn; the future tells its result."""
        call = _Call(function, asyncio.get_running_loop().create_future(), release)
        call.future.add_done_callback(lambda future: self._given_up(call) if future.cancelled() else None)
        self._waiting.append(call)
        self._start()
        return call.future

    def fail_waiting(self, error: Callable[[], BaseException]) -> None:
        """Answer every call that has not begun with an error."""
        while self._waiting:
            call = self._waiting.popleft()
            call.release()
            if not call.future.done():
                call.future.set_exception(error())

    def _start(self) -> None:
        while self._waiting and self.running < self._limit:
            call = self._waiting.popleft()
            if call.future.cancelled():
                # Its callback has not had its turn yet, and will find it gone.
                call.release()
                continue
            self._begin(call)

    def _begin(self, call: _Call) -> None:
        # The thread gets a number, and nothing of the call but its function: kept from its last steps
        # for a while, as it may be, it then holds neither the model nor an error that knows it.
        self._numbers += 1
        number, function = self._numbers, call.function
        box: list[Any] = []
        self._under_way[number] = call, box
        call.started, call.function = True, None
        done = answering(asyncio.get_running_loop(), partial(self._done, number))
        self._pool.submit(partial(_into, box, function), done)

    def _done(self, number: int, refusal: Any) -> None:
        call, box = self._under_way.pop(number)
        outcome = box.pop() if box else refusal
        call.release()
        if not call.future.done():
            if isinstance(outcome, Exception) and not isinstance(outcome, StopIteration):
                call.future.set_exception(outcome)
            elif isinstance(outcome, BaseException):
                # These would end the generator, the task or the loop that waits for it.
                call.future.set_exception(RuntimeError(f"the call raised {outcome!r}"))
            else:
                call.future.set_result(outcome)
        self._start()
        while self._when_idle and not self.running:
            self._when_idle.pop(0)()

    def _given_up(self, call: _Call) -> None:
        # One that has begun is released when its thread is done with the module.
        if not call.started and call in self._waiting:
            self._waiting.remove(call)
            call.release()
