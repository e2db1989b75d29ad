"""Simulated servers, and lines to them: what ``splitlearn serve`` consists of, but for sockets, time and large weights.

The ASGI application, sessions, packs, calls and connection pools are real, on a small trunk that computes. What work
takes is measured: a forward with what is around it in its thread, one call at a time; the server's event loop, which
does one thing after the other meanwhile; and the owner. A balancer keeps an owner at its server while that accepts
connections, and chooses the one with the fewest connections otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
from bisect import bisect_left
from collections.abc import Callable
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from virtual_time import Actor, VirtualLoop

from splitlearn_core import ConnectionLostError, ModelConfig, ModelStatus, RemoteError
from splitlearn_core.hosts.protocol import SUBPROTOCOL, Frame, decode, encode
from splitlearn_core.hosts.sessions import SessionTable
from splitlearn_core.manager.handles import CallGate
from splitlearn_serve.connections import Pool
from splitlearn_serve.control import Control
from splitlearn_serve.guard import OWNER
from splitlearn_serve.sessions import Sessions
from splitlearn_serve.sockets import SessionRoute
from splitlearn_serve.tokens import Owner

if TYPE_CHECKING:
    from simulated_world import World

_MODEL = "trunk"
#: As in a manager by default: calls of a model at once, and calls that wait.
_CALLS, _QUEUE = 1, 64
_MACHINE: ContextVar[Machine | None] = ContextVar("machine", default=None)


@dataclass(frozen=True)
class Costs:
    """Seconds that work takes."""

    #: Forwards by their number of tokens; between two of them in proportion, and beyond as the last two.
    forwards: tuple[tuple[int, float], ...] = ((1, 0.030), (8, 0.045), (32, 0.120))
    #: Each further session in a forward, which attends for itself.
    session: float = 0.001
    #: What a forward takes of all that, by chance one of these.
    variation: tuple[float, ...] = (1.0,)
    #: A request in a thread of the server, besides its forward.
    call: float = 0.0005
    #: A request with its reply in the server's event loop, and at its owner; a connection, likewise.
    loop: float = 0.001
    owner: float = 0.001
    connection_loop: float = 0.002
    connection_owner: float = 0.001

    def forward(self, tokens: int, sessions: int = 1) -> float:
        """Return the seconds of a forward of so many tokens of all its sessions."""
        return self._alone(tokens) + (sessions - 1) * self.session

    def _alone(self, tokens: int) -> float:
        places = [tokens for tokens, _ in self.forwards]
        if len(places) == 1:
            return self.forwards[0][1]
        right = min(max(1, bisect_left(places, tokens)), len(places) - 1)
        (low, least), (high, most) = self.forwards[right - 1 : right + 1]
        return max(0.0, least + (most - least) * (tokens - low) / (high - low))


@dataclass(frozen=True)
class Line:
    """A line between an owner and any server: seconds each way, and bytes per second each way."""

    delay: float
    rate: float = math.inf

    def seconds(self, count: float) -> float:
        return self.delay + count / self.rate


class Worker:
    """Does one thing after the other, each of which takes its time: an event loop, or an interpreter's threads."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._free_at = 0.0

    def do(self, seconds: float, action: Callable[[], object]) -> None:
        """Call a function once everything before, and this, is done."""
        self._free_at = max(self._free_at, self._loop.time()) + seconds
        self._loop.call_at(self._free_at, action)


class Machine:
    """A server: what ``splitlearn serve`` consists of, and, as its manager, one model that is ready."""

    def __init__(self, world: World, number: int) -> None:
        self.world = world
        self.name = f"server{number}"
        # In their order, which a set does not keep.
        self.links: dict[Link, None] = {}
        self.tasks: dict[asyncio.Task[Any], None] = {}
        self.is_up = False
        self.busy_seconds = 0.0
        #: Another one than the world's: with other seconds, the same servers fail.
        self.chance = random.Random(f"{world.scenario.seed} {number}")
        #: What the running forward has taken; its clock is ahead of the loop's by that.
        self._ahead = 0.0

    def clock(self) -> float:
        return self.world.loop.time() + self._ahead

    def start(self) -> None:
        config = ModelConfig(
            model_id=_MODEL,
            model_type=self.world.trunk.config.model_type,
            model_path="/none",
            component="trunk",
            split_points=(1, 2),
        )
        self.tables: list[SessionTable] = []
        #: Owner -> the numbers of its sessions, also those that have ended.
        self.opened: dict[str, list[int]] = {}
        self.gate = CallGate(_MODEL, self, _CALLS, _QUEUE)  # type: ignore[arg-type]  # it is its own pool of threads
        self.pool = Pool(self.world.scenario.connections)
        self.worker = Worker(self.world.loop)
        self.sessions = Sessions(Control(self, [config]), self.world.limits, clock=self.clock)  # type: ignore[arg-type]  # and manager
        self.route = SessionRoute(self.sessions)
        self.is_up = True

    async def stop(self, *, orderly: bool) -> None:
        """End it: with a goodbye to sessions and connections, or at once."""
        self.is_up = False
        if orderly:
            await self.sessions.close()
        for link in list(self.links):
            link.sever()
        tasks, self.tasks = self.tasks, {}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.tables = []

    def start_task(self, coroutine: Any) -> None:
        """Start a task that ends with it."""
        context = copy_context()
        context.run(_MACHINE.set, self)
        self.world.loop.create_task(coroutine, context=context)

    def submit(self, function: Callable[[], Any], on_done: Callable[[Any], object]) -> None:
        """Run a function, and report its end when its forwards have taken their time; as a pool of threads."""
        self._ahead, self.world.computing = self.world.scenario.costs.call, self
        function()
        self.world.computing = None
        seconds, self._ahead = self._ahead, 0.0
        self.busy_seconds += seconds
        self.world.watch.memory_of(self)
        # A server that has failed reports nothing, and its callers are gone.
        self.world.loop.call_later(seconds, self.worker.do, 0.0, partial(on_done, None))

    def spend(self, tokens: int, sessions: int) -> None:
        """Count a forward, and what is done for its further sessions around it."""
        costs = self.world.scenario.costs
        forward = self.chance.choice(costs.variation) * costs.forward(tokens, sessions)
        self._ahead += forward + (sessions - 1) * costs.call

    # --- as a manager, and as its model ---------------------------------------------------------------

    generation, is_gone = 1, False

    def get_model_info(self, model_id: str) -> Any:
        return SimpleNamespace(status=ModelStatus.READY, generation=self.generation, error=None)

    def lease(self, model_id: str) -> contextlib.AbstractAsyncContextManager[Any]:
        return contextlib.nullcontext(self)

    async def run(self, function: Callable[[Any], Any]) -> Any:
        self.gate.refuse_if_full()
        result = await self.gate.submit(partial(function, self.world.trunk), lambda: None)
        if isinstance(result, SessionTable):
            self.tables = [*(table for table in self.tables if len(table)), result]
        return result


class Link:
    """A connection between an owner and a server: a WebSocket to the server's application, frames to the owner."""

    def __init__(self, owner: Owner, line: Line, machine: Machine, opened: Callable[[Any], None]) -> None:
        self._owner, self._line, self._machine = owner, line, machine
        self._world = machine.world
        self._costs = machine.world.scenario.costs
        self._messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._messages.put_nowait({"type": "websocket.connect"})
        self._answer: Callable[[Any], None] | None = opened
        self._is_severed = self._loses_reply = self._ends = False
        machine.links[self] = None
        scope = {
            "type": "websocket",
            "path_params": {"model_id": _MODEL},
            "subprotocols": [SUBPROTOCOL],
            OWNER: owner,
        }
        machine.start_task(self._serve(scope))

    # --- the owner's side -----------------------------------------------------------------------------

    def exchange(self, request: Frame) -> Frame:
        data = b"".join(encode(request))
        return decode(Actor.current().wait(lambda answer: self._send(data, answer)))

    def close(self) -> None:
        self._world.loop.call_soon(self.sever)

    def _send(self, data: bytes, answer: Callable[[Any], None]) -> None:
        self._answer = answer
        self._world.owners_do(self._costs.owner, partial(self._leave, data))

    def _leave(self, data: bytes) -> None:
        if self._is_severed:
            self._reply(lost())
            return
        fate, breaks = self._world.chance.random(), self._world.scenario.breaks
        self._loses_reply = breaks / 2 <= fate < breaks
        self._after(data, self.sever if fate < breaks / 2 else partial(self._arrive, data))

    def _after(self, data: bytes, action: Callable[[], object]) -> None:
        self._world.loop.call_later(self._line.seconds(len(data) * self._world.scenario.stretch), action)

    def _reply(self, value: Any) -> None:
        answer, self._answer = self._answer, None
        if answer is not None:
            answer(value)

    # --- the server's side ----------------------------------------------------------------------------

    async def _serve(self, scope: dict[str, Any]) -> None:
        try:
            await self._machine.route(scope, self._messages.get, self._sent)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001  # a server's application raises nothing
            self._world.watch.problems.append(f"the application of {self._machine.name} raised {error!r}")
        finally:
            self.sever()

    def _arrive(self, data: bytes) -> None:
        if not self._is_severed:
            self._machine.worker.do(self._costs.loop / 2, partial(self._read, data))

    def _read(self, data: bytes) -> None:
        if not self._is_severed:
            self._machine.pool.note(self, idle=False)
            self._messages.put_nowait({"type": "websocket.receive", "bytes": data})

    async def _sent(self, message: dict[str, Any]) -> None:
        if self._is_severed:
            return
        self._machine.pool.note(self, idle=True)
        if message["type"] == "websocket.accept":
            # A connection, and the request for the WebSocket.
            opened = partial(self._world.loop.call_later, 4 * self._line.delay, self._reply, self)
            self._machine.worker.do(self._costs.connection_loop, opened)
        elif message["type"] == "websocket.send":
            data = message["bytes"]
            self._world.watch.sent(self._machine, self._owner.name, decode(data))
            self._machine.worker.do(self._costs.loop / 2, partial(self._write, data))
        elif message["type"] == "websocket.http.response.start":
            self._reply(RemoteError(f"status {message['status']}", code="unavailable"))

    def _write(self, data: bytes) -> None:
        if not self._is_severed:
            self._after(data, self.sever if self._loses_reply else partial(self._deliver, data))

    def _deliver(self, data: bytes) -> None:
        self._reply(data)
        if self._ends:
            self.sever()

    def sever(self) -> None:
        """Break the connection, for both sides."""
        if self._is_severed:
            return
        self._is_severed = True
        self._machine.links.pop(self, None)
        self._machine.pool.forget(self)
        self._messages.put_nowait({"type": "websocket.disconnect"})
        self._world.loop.call_later(self._line.delay, self._reply, lost())

    abort = sever

    def end_after_answer(self) -> None:
        self._ends = True


class Balancer:
    """The address of all servers, for one owner."""

    url = "simulated://trunk"

    def __init__(self, world: World, owner: Owner, line: Line) -> None:
        self._world, self._owner, self._line = world, owner, line
        self.home: Machine | None = None

    def check(self) -> None:
        """Do nothing: the address is right."""

    def open(self) -> Link:
        seconds = self._world.scenario.costs.connection_owner
        link: Link = Actor.current().wait(
            lambda answer: self._world.owners_do(
                seconds, partial(self._world.loop.call_later, self._line.delay, self._connect, answer)
            )
        )
        return link

    def _connect(self, answer: Callable[[Any], None]) -> None:
        if self.home is None or not self.home.is_up:
            up = [machine for machine in self._world.machines if machine.is_up]
            self.home = min(up, key=lambda machine: len(machine.links), default=None)
        if self.home is None:
            answer(lost())
            return
        self.home.start_task(self._link(self.home, answer))

    async def _link(self, machine: Machine, answer: Callable[[Any], None]) -> None:
        try:
            has_room = await machine.pool.make_room()
        except asyncio.CancelledError:
            answer(lost())
            raise
        if has_room and machine.is_up:
            Link(self._owner, self._line, machine, answer)
        else:
            answer(lost())


def lost() -> ConnectionLostError:
    return ConnectionLostError("the connection broke", code="connection")


def task_of_machine(loop: Any, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
    """Make a task that ends with the machine on which it was started, as a loop's factory of tasks."""
    task = asyncio.Task(coroutine, loop=loop, **options)
    context = options.get("context")
    machine = _MACHINE.get() if context is None else context.get(_MACHINE)
    if machine is not None:
        machine.tasks[task] = None
        task.add_done_callback(lambda ended: machine.tasks.pop(ended, None))
    return task
