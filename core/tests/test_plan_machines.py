"""Split points for given machines: against all that are possible, and what cannot be."""

from __future__ import annotations

import itertools
import random

import pytest

from splitlearn_core.errors import ConfigurationError, InsufficientMemoryError
from splitlearn_core.plan.machines import Machine, Piece, parse_machines, propose

pytestmark = pytest.mark.light


def all_splits(pieces: list[Piece], machines: list[Machine]) -> list[tuple[float, float, tuple[int, ...]]]:
    """Return the slowest trunk, the time of a token, and the cuts of each split that fits."""
    splits = []
    for cuts in itertools.combinations(range(1, len(pieces)), len(machines)):
        edges = (0, *cuts, len(pieces))
        parts = [pieces[start:end] for start, end in itertools.pairwise(edges)]
        ends = [*parts[0], *parts[-1]]
        held = [ends, *parts[1:-1]]
        fits = all(
            sum(piece.memory for piece in own) <= machine.memory for own, machine in zip(held, machines, strict=True)
        )
        times = [sum(piece.read for piece in own) / machine.speed for own, machine in zip(held, machines, strict=True)]
        if fits:
            delays = sum(machine.delay for machine in machines)
            splits.append((max(times[1:]), sum(times) + delays, tuple(pieces[cut].start for cut in cuts)))
    return splits


@pytest.mark.parametrize("seed", range(60))
def test_proposals_are_the_best_of_all_splits(seed: int) -> None:
    draw = random.Random(seed)  # not for secrets
    sizes = [draw.randint(1, 3) for _ in range(draw.randint(5, 9))]
    edges = list(itertools.accumulate(sizes, initial=0))
    pieces = [Piece(start, end, draw.randint(1, 9), draw.randint(1, 9)) for start, end in itertools.pairwise(edges)]
    machines = [
        Machine(f"m{number}", draw.randint(8, 40), draw.randint(1, 9), draw.random())
        for number in range(draw.randint(2, 4))
    ]
    splits = all_splits(pieces, machines)
    if not splits:
        with pytest.raises(InsufficientMemoryError, match="do not fit"):
            propose(pieces, machines)
        return
    proposal = propose(pieces, machines)
    slowest = min(splits)[0]
    best = min(seconds for time, seconds, _ in splits if time <= slowest * (1 + 1e-9))
    assert proposal.tokens_per_second == pytest.approx(1 / slowest)
    assert proposal.seconds_per_token == pytest.approx(best)
    assert proposal.split_points in [cuts for *_, cuts in splits]
    assert all(stage.memory <= stage.machine.memory for stage in proposal.stages)
    assert sum(stage.layers for stage in proposal.stages) == edges[-1]
    assert [name for stage in proposal.stages for name in stage.components][:2] == ["bottom", "top"]


def test_machines_are_read() -> None:
    assert parse_machines(["owner=8GB:20GB/s", "far=1GiB:1.5GiB/s:10ms"]) == (
        Machine("owner", 8 * 10**9, 20e9),
        Machine("far", 2**30, 1.5 * 2**30, 0.01),
    )


def test_all_that_is_wrong_with_machines_is_listed() -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_machines(["owner=8GB:20GB", "a=none:1GB/s", "b=1GB:0GB/s", "c=1GB:1GB/s", "c=1GB:1GB/s"])
    for text in (
        "'owner=8GB:20GB'",
        "'a=none:1GB/s'",
        "'b=1GB:0GB/s' is not NAME=MEMORY:SPEED/s[:DELAYms], with sizes",
        "'c' is there 2 times",
    ):
        assert text in caught.value.message
    with pytest.raises(ConfigurationError, match="the owner of the data is the first"):
        parse_machines(["owner=8GB:20GB/s"])


def test_more_machines_than_layers_are_refused() -> None:
    pieces = [Piece(number, number + 1, 1, 1) for number in range(3)]
    with pytest.raises(ConfigurationError, match="3 machines need 3 cuts, and this model has 2"):
        propose(pieces, [Machine(name, 9, 1.0) for name in "abc"])


@pytest.mark.parametrize("text", ["{}:1GB/s", "{}GB:1GB/s", "1GB:{}GB/s", "1GB:1GB/s:{}ms"])
def test_numbers_out_of_proportion_are_refused(text: str) -> None:
    for digits in (400, 5000):
        with pytest.raises(ConfigurationError, match="is not NAME=MEMORY"):
            parse_machines(["owner=8GB:20GB/s", f"far={text.format('9' * digits)}"])
