"""Owners and servers in virtual time: all is real but the time, the network, and how long a forward takes.

Owners use ``RemoteComponent`` with its sessions and journals; servers are the ASGI application, sessions, packs, calls
and connection pools of ``splitlearn serve``, on a small trunk that computes. What a forward takes is a table of
measured seconds. A balancer keeps an owner at its server while that accepts connections, and chooses the one with the
fewest connections otherwise. *Invariants* are checked from outside at every message:

- no owner has sessions on two servers at once;
- a session has the length of the steps that were sent, each counted once;
- the caches of a server are never larger than it allows;
- outputs of sessions that run alone are bit-equal to those of an undisturbed forward, those of packs are close.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import math
import random
import statistics
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from virtual_time import Actor, ActorClock, VirtualLoop

from splitlearn_core import ConnectionLostError, ModelConfig, ModelStatus, RemoteBusyError, RemoteError
from splitlearn_core.hosts.client import Host, Patience
from splitlearn_core.hosts.facts import SOLO
from splitlearn_core.hosts.protocol import SUBPROTOCOL, Frame, Kind, decode, encode
from splitlearn_core.hosts.remote import RemoteComponent
from splitlearn_core.hosts.sessions import SessionLimits, SessionTable
from splitlearn_core.manager.handles import CallGate
from splitlearn_serve.connections import Pool
from splitlearn_serve.control import Control
from splitlearn_serve.guard import OWNER
from splitlearn_serve.sessions import Sessions
from splitlearn_serve.sockets import SessionRoute
from splitlearn_serve.tokens import Owner

_MODEL = "trunk"
#: Different texts; owners share them, so that what an undisturbed forward gives is computed once.
_TEXTS = 4
#: As in a manager by default: calls of a model at once, and calls that wait.
_CALLS, _QUEUE = 1, 64
_MACHINE: ContextVar[Machine | None] = ContextVar("machine", default=None)


@dataclass(frozen=True)
class Costs:
    """Seconds of forwards, by their number of tokens; between two of them in proportion, and beyond as the last two."""

    forwards: tuple[tuple[int, float], ...] = ((1, 0.030), (8, 0.045), (32, 0.120))
    #: A request besides its forward, while the server computes nothing else.
    request: float = 0.0005

    def seconds(self, tokens: int) -> float:
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


@dataclass(frozen=True)
class Scenario:
    """What is simulated."""

    owners: int = 1000
    servers: int = 20
    seed: int = 0
    mode: str = SOLO
    #: Owners arrive in bursts, each within a second; seconds between two bursts.
    bursts: int = 10
    burst_every: float = 7.0
    #: Tokens of a prompt, and those after it: so many, or fewer or more by this share of them.
    prompt: int = 32
    new: int = 24
    spread: float = 0.5
    #: What an owner computes for each token: bottom and top.
    think: float = 0.010
    costs: Costs = field(default_factory=Costs)
    fast: Line = Line(0.010, 12.5e6)
    slow: Line = Line(0.100, 0.25e6)
    slow_share: float = 0.2
    #: Bytes of the model that is meant, for each byte of the small one.
    stretch: float = 14.0
    #: Seconds until a server fails, on average; seconds until it is back. Half of them say goodbye first.
    life: float = math.inf
    down: float = 10.0
    #: The share of exchanges in which a connection breaks: before the request arrives, or after it was carried out.
    breaks: float = 0.0
    #: Sessions that a server's memory holds.
    room: int = 48
    connections: int = 512


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
        #: What the running forward has taken; its clock is ahead of the loop's by that.
        self._ahead = 0.0

    def clock(self) -> float:
        return self.world.loop.time() + self._ahead

    def start(self) -> None:
        self.tables: list[SessionTable] = []
        #: Owner -> the numbers of its sessions, also those that have ended.
        self.opened: dict[str, list[int]] = {}
        self.gate = CallGate(_MODEL, self, _CALLS, _QUEUE)  # type: ignore[arg-type]  # it is its own pool of threads
        self.pool = Pool(self.world.scenario.connections)
        self.sessions = Sessions(Control(self, [self.world.config]), self.world.limits, clock=self.clock)  # type: ignore[arg-type]  # and manager
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

    def submit(self, function: Callable[[], Any], on_done: Callable[[Any], object]) -> None:
        """Run a function, and report its end when its forwards have taken their time; as a pool of threads."""
        self._ahead, self.world.computing = self.world.scenario.costs.request, self
        function()
        self.world.computing = None
        seconds, self._ahead = self._ahead, 0.0
        self.busy_seconds += seconds
        self.world.watch.memory_of(self)
        # A server that has failed reports nothing, and its callers are gone.
        self.world.loop.call_later(seconds, on_done, None)

    def spend(self, tokens: int) -> None:
        self._ahead += self.world.scenario.costs.seconds(tokens)

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
        self._world.start_task(machine, self._serve(scope))

    # --- the owner's side -----------------------------------------------------------------------------

    def exchange(self, request: Frame) -> Frame:
        data = b"".join(encode(request))
        return decode(Actor.current().wait(lambda answer: self._send(data, answer)))

    def close(self) -> None:
        self._world.loop.call_soon(self.sever)

    def _send(self, data: bytes, answer: Callable[[Any], None]) -> None:
        self._answer = answer
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
            self._machine.pool.note(self, idle=False)
            self._messages.put_nowait({"type": "websocket.receive", "bytes": data})

    async def _sent(self, message: dict[str, Any]) -> None:
        if self._is_severed:
            return
        self._machine.pool.note(self, idle=True)
        if message["type"] == "websocket.accept":
            # A connection, and the request for the WebSocket.
            self._world.loop.call_later(4 * self._line.delay, self._reply, self)
        elif message["type"] == "websocket.send":
            data = message["bytes"]
            self._world.watch.sent(self._machine, self._owner.name, decode(data))
            self._after(data, self.sever if self._loses_reply else partial(self._reply, data))
            if self._ends:
                self.sever()
        elif message["type"] == "websocket.http.response.start":
            self._reply(RemoteError(f"status {message['status']}", code="unavailable"))

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
        link: Link = Actor.current().wait(
            lambda answer: self._world.loop.call_later(self._line.delay, self._connect, answer)
        )
        return link

    def _connect(self, answer: Callable[[Any], None]) -> None:
        if self.home is None or not self.home.is_up:
            up = [machine for machine in self._world.machines if machine.is_up]
            self.home = min(up, key=lambda machine: len(machine.links), default=None)
        if self.home is None:
            answer(lost())
            return
        self._world.start_task(self.home, self._link(self.home, answer))

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


class WatchedHost(Host):
    """A host as an owner sees it, whose replies are compared with what was sent."""

    def __init__(self, world: World, address: Balancer, name: str) -> None:
        self._world, self._name = world, name
        #: Session -> step -> its tokens.
        self._sent: dict[int, dict[int, int]] = {}
        self._closing: Actor | None = None
        patience = Patience(wait=60.0)
        super().__init__(address, patience, mode=world.scenario.mode, clock=world.clock)

    def exchange(self, frame: Frame) -> Frame:
        reply = super().exchange(frame)
        if reply.kind is Kind.RESULT and frame.session:
            steps = self._sent.setdefault(frame.session, {})
            steps[frame.step] = frame.tensors[0].shape[1]
            length = sum(tokens for step, tokens in steps.items() if step <= frame.step)
            if reply.meta["length"] != length:
                self._world.watch.problems.append(
                    f"{self._name}: {length} tokens were sent in steps 1 to {frame.step}, and the session has "
                    f"{reply.meta['length']}"
                )
        return reply

    def abandon(self, number: int, secret: str) -> None:
        # In place of a thread that closes sessions.
        def close() -> None:
            with contextlib.suppress(RemoteError):
                self.request_once(Frame(Kind.CLOSE, number, meta={"secret": secret}))

        # A session may be collected when the simulation has ended.
        if not self._world.loop.is_closed():
            self._closing = self._world.start_actor(close)

    def wait_for_closing(self) -> None:
        """Wait until the session that was abandoned last is closed."""
        closing = self._closing
        if closing is not None:
            Actor.current().wait(closing.ended.add_done_callback)


class Watch:
    """Compares what happens with the invariants, from outside."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.problems: list[str] = []
        #: How much of a server's memory was used at most, as a share of what is allowed.
        self.fullest = 0.0

    def sent(self, machine: Machine, owner: str, reply: Frame) -> None:
        """Look at what a server sends."""
        if reply.kind is not Kind.OPENED:
            return
        machine.opened.setdefault(owner, []).append(reply.session)
        for other in self._world.machines:
            if other is machine or not other.is_up:
                continue
            still = [number for number in other.opened.get(owner, ()) if any(number in t for t in other.tables)]
            if still:
                self.problems.append(f"{owner} has sessions on {other.name} and {machine.name} at once")

    def memory_of(self, machine: Machine) -> None:
        """Add up the caches that a server has, tensor by tensor."""
        layers = [
            layer
            for table in machine.tables
            for session in list(table._sessions.values())
            for layer in session.cache.layers
        ]
        used = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers if layer.is_initialized)
        allowed = self._world.limits.cache_bytes or math.inf
        self.fullest = max(self.fullest, used / allowed)
        if used > allowed:
            self.problems.append(f"{machine.name} has caches of {used} bytes, and {allowed} are allowed")


@dataclass
class Life:
    """What one owner has experienced."""

    name: str
    is_slow: bool
    began_at: float
    tokens: int = 0
    ended_at: float = math.nan
    #: Seconds from the arrival to the first token, and of each later step.
    first: float = math.nan
    steps: list[float] = field(default_factory=list)
    #: The same without line and forward: what it waited for others.
    waits: list[float] = field(default_factory=list)
    refusals: int = 0

    @property
    def pace(self) -> float:
        """Tokens per second, from the arrival on."""
        return self.tokens / (self.ended_at - self.began_at)


class World:
    """Everything in one simulation.

    Args:
        scenario: What happens.
        trunk: A small trunk, of which all servers have the same weights.
    """

    def __init__(self, scenario: Scenario, trunk: Any) -> None:
        self.scenario = scenario
        self.trunk = trunk
        self.loop = VirtualLoop()
        self.loop.set_task_factory(_task)
        self.chance = random.Random(scenario.seed)
        self.clock = ActorClock(self.loop, self.chance)
        self.watch = Watch(self)
        self.computing: Machine | None = None
        self.lives: list[Life] = []
        #: Tokens that went through a trunk, and those that owners have got.
        self.computed = self.received = 0
        self.failures = 0
        self._actors: set[Actor] = set()
        self.config = ModelConfig(
            model_id=_MODEL,
            model_type=trunk.config.model_type,
            model_path="/none",
            component="trunk",
            split_points=(1, 2),
        )
        facts = SessionTable(trunk).facts
        #: By how many tokens texts are longer or shorter; the tokens of the longest one.
        self.spread = int(scenario.new * scenario.spread)
        self.tokens = scenario.prompt + scenario.new + self.spread
        size = self.tokens * facts.cache_bytes_per_token + facts.cache_bytes_per_sequence
        self.limits = SessionLimits(cache_bytes=scenario.room * size, max_tokens=2 * self.tokens)
        self.machines = [Machine(self, number) for number in range(scenario.servers)]
        self.texts = [self._text(seed) for seed in range(_TEXTS)]

    def run(self) -> dict[str, Any]:
        """Run it to the end of the last owner; return its figures."""

        # A function: copies of the trunk, which run packs, get the same one.
        def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
            tokens = kwargs["hidden_states"].shape[0] * kwargs["hidden_states"].shape[1]
            self.computed += tokens
            if self.computing is not None:
                self.computing.spend(tokens)

        handle = self.trunk.register_forward_pre_hook(count, with_kwargs=True)
        try:
            self.loop.run_until_complete(self._run())
        finally:
            handle.remove()
            self.loop.close()
        return self._figures()

    def start_task(self, machine: Machine, coroutine: Any) -> None:
        """Start a task that ends with a machine."""
        context = copy_context()
        context.run(_MACHINE.set, machine)
        self.loop.create_task(coroutine, context=context)

    def start_actor(self, function: Callable[[], None]) -> Actor:
        actor = Actor(self.loop, function)
        self._actors.add(actor)
        actor.ended.add_done_callback(lambda _: self._actors.discard(actor))
        return actor

    @torch.no_grad()
    def _text(self, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the inputs of the steps of a text, and what the trunk makes of them, undisturbed."""
        generator = torch.Generator().manual_seed(seed)
        cache, steps = self.trunk.new_cache(), []
        for tokens in (self.scenario.prompt, *[1] * (self.tokens - self.scenario.prompt)):
            states = torch.randn(1, tokens, self.trunk.config.hidden_size, generator=generator)
            steps.append((states, self.trunk(hidden_states=states, past_key_values=cache)))
        return steps

    async def _run(self) -> None:
        for machine in self.machines:
            machine.start()
        failing = [self.loop.create_task(self._fail(machine)) for machine in self.machines]
        owners = [self.start_actor(partial(self._own, life)) for life in self._arrivals()]
        await asyncio.gather(*(owner.ended for owner in owners))
        # Sessions that are being closed.
        while self._actors:
            await asyncio.wait([actor.ended for actor in self._actors])
        for task in failing:
            task.cancel()
        await asyncio.gather(*failing, return_exceptions=True)
        for machine in self.machines:
            await machine.stop(orderly=False)
        self.watch.problems += [repr(owner.failure) for owner in owners if owner.failure is not None]

    def _arrivals(self) -> Iterator[Life]:
        """Yield the owners; each begins when its time has come."""
        scenario = self.scenario
        for number in range(scenario.owners):
            at = (number % scenario.bursts) * scenario.burst_every
            at += self.chance.random() if scenario.burst_every else 0.0
            life = Life(f"owner{number}", self.chance.random() < scenario.slow_share, at)
            self.lives.append(life)
            yield life

    async def _fail(self, machine: Machine) -> None:
        while math.isfinite(self.scenario.life):
            await asyncio.sleep(self.chance.expovariate(1 / self.scenario.life))
            self.failures += 1
            await machine.stop(orderly=self.chance.random() < 0.5)
            await asyncio.sleep(self.scenario.down)
            machine.start()

    # --- an owner -------------------------------------------------------------------------------------

    def _own(self, life: Life) -> None:
        """Generate one text."""
        scenario, line = self.scenario, self.scenario.slow if life.is_slow else self.scenario.fast
        Actor.current().pause(life.began_at)
        count = scenario.new + self.chance.choice((-self.spread, 0, self.spread))
        text = self.texts[self.chance.randrange(_TEXTS)][: 1 + count]
        balancer = Balancer(self, Owner(life.name), line)
        trunk: RemoteComponent = self._attempt(
            life, balancer, None, lambda: RemoteComponent(WatchedHost(self, balancer, life.name), self.tokens)
        )
        cache = trunk.new_cache()
        with torch.no_grad():
            for number, (states, expected) in enumerate(text):
                began_at = self.loop.time() if number else life.began_at
                output = self._attempt(
                    life, balancer, trunk.host, partial(trunk, hidden_states=states, past_key_values=cache)
                )
                solo = scenario.mode == SOLO
                if not (torch.equal(output, expected) if solo else torch.allclose(output, expected, 1e-3, 1e-4)):
                    self.watch.problems.append(f"{life.name}: step {number + 1} differs from an undisturbed one")
                seconds = self.loop.time() - began_at
                tokens = states.shape[1]
                life.tokens += tokens
                self.received += tokens
                if number:
                    life.steps.append(seconds)
                    alone = scenario.costs.seconds(tokens) + 2 * line.seconds(states.nbytes * scenario.stretch)
                    life.waits.append(max(0.0, seconds - alone))
                else:
                    life.first = seconds
                Actor.current().pause(scenario.think)
        life.ended_at = self.loop.time()
        cast("Any", cache.layers[0]).session.close()
        cast("WatchedHost", trunk.host).wait_for_closing()
        trunk.close()

    def _attempt(self, life: Life, balancer: Balancer, host: Host | None, action: Callable[[], Any]) -> Any:
        """Do something until it succeeds, as a patient user does."""
        while True:
            try:
                return action()
            except RemoteBusyError as error:
                life.refusals += 1
                pause = error.retry_after or 1.0
                if host is not None and not host.sessions:
                    # There may be room elsewhere.
                    host.drop_connections()
                    balancer.home = None
            except ConnectionLostError:
                life.refusals += 1
                pause = 1.0
            Actor.current().pause(self.clock.spread(pause))

    # --- figures --------------------------------------------------------------------------------------

    def _figures(self) -> dict[str, Any]:
        paces = [life.pace for life in self.lives if not life.is_slow] or [life.pace for life in self.lives]
        waits = sorted(itertools.chain.from_iterable(life.waits for life in self.lives))
        steps = sorted(itertools.chain.from_iterable(life.steps for life in self.lives))
        firsts = sorted(life.first for life in self.lives)
        end = max(life.ended_at for life in self.lives)
        return {
            "problems": self.watch.problems,
            "seconds": end,
            "tokens": self.received,
            "tokens_per_second": self.received / end,
            "first": _percentiles(firsts),
            "step": _percentiles(steps),
            "wait": _percentiles(waits),
            "lost": (self.computed - self.received) / self.computed,
            "fairness": sum(paces) ** 2 / (len(paces) * sum(pace**2 for pace in paces)),
            "slowest": min(paces) / statistics.median(paces),
            "refusals": sum(life.refusals for life in self.lives),
            "failures": self.failures,
            "fullest": self.watch.fullest,
            "busy": sum(machine.busy_seconds for machine in self.machines) / (end * len(self.machines)),
        }


def simulate(scenario: Scenario, trunk: Any) -> dict[str, Any]:
    """Run a scenario; return its figures, and what was against the invariants as ``problems``."""
    return World(scenario, trunk).run()


def _task(loop: Any, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
    task = asyncio.Task(coroutine, loop=loop, **options)
    context = options.get("context")
    machine = _MACHINE.get() if context is None else context.get(_MACHINE)
    if machine is not None:
        machine.tasks[task] = None
        task.add_done_callback(lambda ended: machine.tasks.pop(ended, None))
    return task


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    return {
        name: values[int(share * (len(values) - 1))] for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))
    }
