"""Split points for given machines: trunks that fit in memory, and take about the same time for each token.

A token that is generated alone needs all weights once, so a component takes its bytes divided by the bytes that its
machine reads in a second. The owner has bottom and top, the other machines a trunk each, in the order in which they are
given.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from splitlearn_core.errors import ConfigurationError, InsufficientMemoryError
from splitlearn_core.family import ModelFamily
from splitlearn_core.plan.placement import parse_size
from splitlearn_core.plan.splitplan import SplitPlan, loaded_nbytes
from splitlearn_core.types import component_names, human_bytes

_MACHINE = re.compile(r"(?P<name>[^=:\s]+)=(?P<memory>[^:]+):(?P<speed>[^:]+)/s(?::(?P<delay>\d{1,9}(?:\.\d+)?)\s*ms)?")
_EXAMPLE = "--over owner=8GB:20GB/s --over server=24GB:300GB/s:10ms"
#: The owner, and one machine with a trunk.
_LEAST = 2
#: What rounding may add to the time of the slowest trunk.
_ROUNDING = 1 + 1e-9


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine that components can be on."""

    name: str
    #: Bytes for weights and caches.
    memory: int
    #: Bytes of weights that it reads in a second, while it generates.
    speed: float
    #: Seconds from the owner to it and back.
    delay: float = 0.0


@dataclass(frozen=True, slots=True)
class Piece:
    """Layers that no cut parts, with what is before the first or after the last layer."""

    #: Its first layer, and one past its last.
    start: int
    end: int
    #: Bytes in memory, with the caches of all tokens.
    memory: int
    #: Bytes that are read for each token.
    read: int


@dataclass(frozen=True, slots=True)
class Stage:
    """What one machine has."""

    machine: Machine
    components: tuple[str, ...]
    layers: int
    memory: int
    #: For each token; without the delay.
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "machine": self.machine.name,
            "components": list(self.components),
            "layers": self.layers,
            "bytes": self.memory,
            "seconds_per_token": self.seconds,
            "delay_seconds": self.machine.delay,
        }


@dataclass(frozen=True, slots=True)
class Proposal:
    """Split points for machines, and the time that a token takes."""

    split_points: tuple[int, ...]
    stages: tuple[Stage, ...]

    @property
    def seconds_per_token(self) -> float:
        """For one text: the times of all machines, one after the other, and their delays."""
        return sum(stage.seconds + stage.machine.delay for stage in self.stages)

    @property
    def tokens_per_second(self) -> float:
        """For many texts at once, at most: as many as the slowest trunk computes, one at a time."""
        return 1 / max(stage.seconds for stage in self.stages[1:])

    def to_dict(self) -> dict[str, Any]:
        return {
            "split_points": list(self.split_points),
            "machines": [stage.to_dict() for stage in self.stages],
            "seconds_per_token": self.seconds_per_token,
            "tokens_per_second": self.tokens_per_second,
        }


def parse_machines(texts: Sequence[str]) -> tuple[Machine, ...]:
    """Read machines: ``NAME=MEMORY:SPEED/s``, or with the delay after it, ``:10ms``.

    Raises:
        ConfigurationError: A text describes no machine, there are fewer than two, or two have one name; it lists all.
    """
    machines, problems = [], []
    for text in texts:
        match = _MACHINE.fullmatch(text.strip())
        memory, speed = (parse_size(match[part]) if match else -1 for part in ("memory", "speed"))
        if match is None or memory <= 0 or speed <= 0:
            why = "" if match is None else ", with sizes of 1 byte or more"
            problems.append(f"{text!r} is not NAME=MEMORY:SPEED/s[:DELAYms]{why}")
        else:
            machines.append(Machine(match["name"], memory, float(speed), float(match["delay"] or 0) / 1000))
    names = [machine.name for machine in machines]
    problems += [f"{name!r} is there {names.count(name)} times" for name in sorted(set(names)) if names.count(name) > 1]
    if not problems and len(machines) < _LEAST:
        problems = [f"{len(machines)} machine; the owner of the data is the first, a server the next"]
    if problems:
        raise ConfigurationError(f"machines to split over: {'; '.join(problems)}", hint=f"for example {_EXAMPLE}")
    return tuple(machines)


def pieces_of(plan: SplitPlan, family: ModelFamily, tokens: int) -> list[Piece]:
    """Return the pieces of a plan that cuts a model wherever it can be cut.

    Args:
        plan: The plan.
        family: The model's family.
        tokens: The tokens in the caches of all sequences together.
    """
    embedding = f"{family.base}.{family.embedding}."
    pieces = []
    of_bottom = {item.info.key for item in plan.components[0].tensors}
    for part in plan.components:
        loaded = part.loaded_bytes(part.dtype)
        # Of the embedding, a token needs one row.
        rows = [item for item in part.tensors if part.layers.start == 0 and item.module_key.startswith(embedding)]
        unread = sum(loaded_nbytes(item, part.dtype) for item in rows)
        caches = part.kv_bytes_per_token * tokens + part.state_bytes_per_sequence
        # The owner has bottom and top, and what is in both, such as a tied head, once.
        twice = [item for item in part.tensors if part.layers.start and item.info.key in of_bottom]
        memory = loaded + caches - sum(loaded_nbytes(item, part.dtype) for item in twice)
        pieces.append(Piece(part.layers.start, part.layers.end, memory, loaded - unread))
    return pieces


def propose(pieces: Sequence[Piece], machines: Sequence[Machine]) -> Proposal:
    """Choose split points that fit: those with the fastest slowest trunk, and of these, those with the fastest token.

    Args:
        pieces: All layers, in order.
        machines: The owner of bottom and top, and a machine for each trunk.

    Raises:
        ConfigurationError: There are fewer pieces than components.
        InsufficientMemoryError: They do not fit on these machines.
    """
    owner, *servers = machines
    if len(pieces) < len(servers) + 2:
        raise ConfigurationError(
            f"{len(machines)} machines need {len(servers) + 1} cuts, and this model has {len(pieces) - 1}",
            hint="give fewer machines",
        )
    slowest = _best(pieces, owner, servers, limit=None)
    if slowest is None:
        needed = sum(piece.memory for piece in pieces)
        there = ", ".join(f"{machine.name} {human_bytes(machine.memory)}" for machine in machines)
        raise InsufficientMemoryError(
            f"{human_bytes(needed)} do not fit on these machines when cut between layers: {there}",
            hint="give more machines or memory, a smaller dtype (--dtype), or fewer tokens (--tokens)",
        )
    chosen = _best(pieces, owner, servers, limit=slowest[0] * _ROUNDING) or slowest
    return _proposal(pieces, machines, chosen[1])


def _best(
    pieces: Sequence[Piece], owner: Machine, servers: Sequence[Machine], limit: float | None
) -> tuple[float, tuple[int, ...]] | None:
    """Return the least cost, and the numbers of the pieces that components begin with; None if nothing fits.

    The cost is the time of the slowest trunk; with a limit for that, it is the time of a token.
    """
    count = len(pieces)
    memory, read = ([0] * (count + 1) for _ in range(2))
    for number, piece in enumerate(pieces):
        memory[number + 1], read[number + 1] = memory[number] + piece.memory, read[number] + piece.read
    best: tuple[float, tuple[int, ...]] | None = None
    for first in range(1, count - len(servers)):
        # Where the trunks so far end -> their cost, and where they begin.
        reached: dict[int, tuple[float, tuple[int, ...]]] = {first: (0.0, (first,))}
        for number, server in enumerate(servers, start=1):
            following: dict[int, tuple[float, tuple[int, ...]]] = {}
            for start, (cost, cuts) in reached.items():
                for end in range(start + 1, count - len(servers) + number):
                    if memory[end] - memory[start] > server.memory:
                        break
                    seconds = (read[end] - read[start]) / server.speed
                    if limit is not None and seconds > limit:
                        break
                    total = max(cost, seconds) if limit is None else cost + seconds
                    if end not in following or total < following[end][0]:
                        following[end] = total, (*cuts, end)
            reached = following
        for last, (cost, cuts) in reached.items():
            if memory[first] + memory[count] - memory[last] > owner.memory:
                continue
            total = cost
            if limit is not None:
                total += (read[first] + read[count] - read[last]) / owner.speed
            if best is None or total < best[0]:
                best = total, cuts
    return best


def _proposal(pieces: Sequence[Piece], machines: Sequence[Machine], cuts: tuple[int, ...]) -> Proposal:
    edges = (0, *cuts, len(pieces))
    parts = [pieces[start:end] for start, end in pairwise(edges)]
    names = component_names(len(parts))

    def stage(machine: Machine, *numbers: int) -> Stage:
        own = [piece for number in numbers for piece in parts[number]]
        return Stage(
            machine,
            tuple(names[number] for number in numbers),
            sum(piece.end - piece.start for piece in own),
            sum(piece.memory for piece in own),
            sum(piece.read for piece in own) / machine.speed,
        )

    trunks = [stage(machine, number) for number, machine in enumerate(machines[1:], start=1)]
    return Proposal(tuple(pieces[cut].start for cut in cuts), (stage(machines[0], 0, len(parts) - 1), *trunks))
