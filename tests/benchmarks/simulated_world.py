"""Owners and servers in virtual time: all is real but the time, the network, and how long work takes.

Owners use ``RemoteComponent`` with its sessions and journals. *Invariants* are checked from outside at every message:

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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from simulated_servers import Balancer, Costs, Line, Machine, Worker, task_of_machine
from virtual_time import Actor, ActorClock, VirtualLoop

from splitlearn_core import ConnectionLostError, RemoteBusyError, RemoteError
from splitlearn_core.hosts.client import Host, Patience
from splitlearn_core.hosts.facts import SOLO
from splitlearn_core.hosts.protocol import Frame, Kind
from splitlearn_core.hosts.remote import RemoteComponent
from splitlearn_core.hosts.sessions import SessionLimits, SessionTable
from splitlearn_serve.tokens import Owner

#: Different texts; owners share them, so that what an undisturbed forward gives is computed once.
_TEXTS = 4
_FAST, _SLOW = Line(0.010, 12.5e6), Line(0.100, 0.25e6)


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
    #: Whether the owners are threads of one process, which do one thing after the other.
    is_one_process: bool = False
    costs: Costs = field(default_factory=Costs)
    fast: Line = _FAST
    slow: Line = _SLOW
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
        self.loop.set_task_factory(task_of_machine)
        self.chance = random.Random(scenario.seed)
        self.clock = ActorClock(self.loop, self.chance)
        #: Lets an owner work for some seconds, and then calls a function.
        self.owners_do: Callable[[float, Callable[[], object]], object] = (
            Worker(self.loop).do if scenario.is_one_process else self.loop.call_later
        )
        self.watch = Watch(self)
        self.computing: Machine | None = None
        self.lives: list[Life] = []
        #: Tokens that went through a trunk, and those that owners have got.
        self.computed = self.received = 0
        self.failures = 0
        self._actors: set[Actor] = set()
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
                pack = getattr(kwargs["past_key_values"], "_pack", None)
                self.computing.spend(tokens, 1 if pack is None else len(pack.items))

        handle = self.trunk.register_forward_pre_hook(count, with_kwargs=True)
        try:
            self.loop.run_until_complete(self._run())
        finally:
            handle.remove()
            self.loop.close()
        return self._figures()

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
                    costs = scenario.costs
                    alone = costs.forward(tokens) + costs.call + costs.loop + costs.owner
                    alone += 2 * line.seconds(states.nbytes * scenario.stretch)
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
        end = max(life.ended_at for life in self.lives)
        return {
            "problems": self.watch.problems,
            "seconds": end,
            "tokens": self.received,
            "tokens_per_second": self.received / end,
            "first": percentiles(life.first for life in self.lives),
            "step": percentiles(itertools.chain.from_iterable(life.steps for life in self.lives)),
            "wait": percentiles(itertools.chain.from_iterable(life.waits for life in self.lives)),
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


def percentiles(values: Iterable[float]) -> dict[str, float]:
    """Return the median, and those values below which 95 and 99 % are."""
    ordered = sorted(values)
    places = {"p95": 0.95, "p99": 0.99}
    return {"p50": statistics.median(ordered)} | {
        name: ordered[int(share * (len(ordered) - 1))] for name, share in places.items()
    }
