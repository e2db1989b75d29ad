"""Quick simulations of owners and servers: they hold their invariants, each of which can fail, and repeat."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from splitlearn_core import load_split_model
from splitlearn_core.hosts import sessions as host_sessions
from splitlearn_core.hosts.journals import RemoteSession
from splitlearn_core.testing.worlds import tiny_model, write_checkpoint

#: Servers that fail, connections that break, and less memory than all owners need at once.
TROUBLE = {
    "owners": 16,
    "servers": 3,
    "bursts": 2,
    "burst_every": 1.0,
    "prompt": 6,
    "new": 6,
    "life": 3.0,
    "down": 1.0,
    "breaks": 0.06,
    "room": 3,
}


@pytest.fixture(scope="module")
def modules() -> Any:
    """Return the modules of the benchmarks that simulate."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent / "benchmarks"))
        yield SimpleNamespace(
            servers=importlib.import_module("simulated_servers"),
            world=importlib.import_module("simulated_world"),
            time=importlib.import_module("virtual_time"),
        )


@pytest.fixture(scope="module")
def simulate(modules: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Return a function that simulates a scenario on a trunk of one tiny layer."""
    folder = write_checkpoint(tmp_path_factory.mktemp("qwen2"), tiny_model("qwen2", num_hidden_layers=3))
    trunk = load_split_model(None, (1, 2), folder, parts=("trunk",), progress=False).trunk
    scenario = modules.world.Scenario()
    return lambda **values: modules.world.simulate(replace(scenario, **values), trunk)


@pytest.mark.parametrize("mode", ["solo", "packed"])
def test_sessions_survive_failing_servers_and_lines(simulate: Any, mode: str) -> None:
    """Every owner gets its text; nothing is done twice, is in two places, or is more than memory holds."""
    figures = simulate(**TROUBLE, mode=mode)
    assert figures["problems"] == []
    # It was not easy.
    assert figures["failures"] > 0
    assert figures["refusals"] > 0
    assert 0 < figures["lost"] < 1
    assert 0 < figures["fullest"] <= 1
    assert 0 < figures["slowest"] <= 1
    assert 0 < figures["fairness"] <= 1


def test_the_same_seed_gives_the_same_figures(simulate: Any) -> None:
    figures = simulate(**TROUBLE, seed=5)
    assert simulate(**TROUBLE, seed=5) == figures
    assert simulate(**TROUBLE, seed=6)["first"] != figures["first"]


def test_a_step_that_is_done_twice_is_noticed(simulate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_sessions, "_repeated", lambda session, frame: None)
    problems = simulate(**{**TROUBLE, "owners": 4, "life": float("inf"), "breaks": 0.3})["problems"]
    assert any("tokens were sent in steps 1 to" in problem for problem in problems)


def test_sessions_on_two_servers_are_noticed(simulate: Any, modules: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A balancer sends an owner elsewhere although its server still has the session."""
    connect = modules.servers.Balancer._connect

    def elsewhere(self: Any, answer: Any) -> None:
        others = [machine for machine in self._world.machines if machine is not self.home]
        self.home = others[0]
        connect(self, answer)

    monkeypatch.setattr(modules.servers.Balancer, "_connect", elsewhere)
    problems = simulate(**{**TROUBLE, "life": float("inf")})["problems"]
    assert any(problem.endswith("at once") for problem in problems)


def test_admission_beyond_memory_is_noticed(simulate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_sessions.SessionTable, "_admit", lambda *_: None)
    problems = simulate(**{**TROUBLE, "room": 1})["problems"]
    assert any("has caches of" in problem for problem in problems)


def test_a_session_that_is_rebuilt_wrongly_is_noticed(simulate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal keeps as many tokens as were sent, and other values."""
    note = RemoteSession._note

    def forgetful(self: RemoteSession, step: Any) -> None:
        note(self, replace(step, buffers=tuple(memoryview(bytes(buffer.nbytes)) for buffer in step.buffers)))

    monkeypatch.setattr(RemoteSession, "_note", forgetful)
    problems = simulate(**TROUBLE)["problems"]
    assert any("differs from an undisturbed one" in problem for problem in problems)


#: Work that takes no time, and owners who are near, and ask one server without a pause.
NO_WORK = {"call": 0.0, "loop": 0.0, "owner": 0.0, "connection_loop": 0.0, "connection_owner": 0.0}
ONE_SERVER = {"servers": 1, "bursts": 1, "burst_every": 0, "prompt": 6, "spread": 0, "think": 0, "slow_share": 0}


@pytest.fixture
def one_server(simulate: Any, modules: Any) -> Callable[..., dict[str, Any]]:
    """Return a function that simulates owners on one server, where work takes no other time than is given."""

    def run(owners: int, new: int, forwards: Any, *, mode: str = "solo", one: bool = False, **work: Any) -> Any:
        costs, line = modules.servers.Costs(forwards, **{**NO_WORK, **work}), modules.servers.Line(0.0001)
        values = {**ONE_SERVER, "owners": owners, "new": new, "mode": mode, "is_one_process": one}
        figures = simulate(**values, costs=costs, fast=line)
        assert figures["problems"] == []
        return figures

    return run


def test_one_server_takes_the_time_of_its_forwards(one_server: Any, modules: Any) -> None:
    """Owners that ask without a pause keep it busy: its time is the sum of all forwards."""
    forwards = ((1, 0.030), (6, 0.090))
    owners, new = 4, 5
    figures = one_server(owners, new, forwards)
    assert figures["seconds"] == pytest.approx(owners * (0.090 + new * 0.030), rel=0.05)
    # Each token waits for those of the others.
    assert figures["step"]["p50"] == pytest.approx(owners * 0.030, rel=0.05)
    assert figures["lost"] == 0
    costs = modules.servers.Costs(forwards)
    assert [costs.forward(tokens) for tokens in (1, 3, 6, 11)] == pytest.approx([0.030, 0.054, 0.090, 0.150])


def test_forwards_vary_as_those_that_were_measured(one_server: Any) -> None:
    """Each takes one of the given shares of its time."""
    shares = ((1.0,), (2.0,), (1.0, 2.0))
    as_usual, slower, varied = (one_server(2, 8, ((1, 0.030),), variation=each) for each in shares)
    assert slower["seconds"] == pytest.approx(2 * as_usual["seconds"], rel=0.05)
    assert as_usual["seconds"] < varied["seconds"] < slower["seconds"]


def test_packed_owners_share_forwards(one_server: Any) -> None:
    """Where several tokens take as long as one, several owners do."""
    alone, together = (one_server(4, 8, ((1, 0.030),), mode=mode) for mode in ("solo", "packed"))
    assert together["seconds"] < 0.5 * alone["seconds"]


@pytest.mark.parametrize("where", ["loop", "owner"])
def test_work_besides_forwards_takes_its_time(one_server: Any, where: str) -> None:
    """A loop, and owners in one process, do one thing after the other, and so each token waits for the others'."""
    owners, seconds = 4, 0.010
    figures = one_server(owners, 8, ((1, 0.001),), one=True, **{where: seconds})
    assert figures["step"]["p50"] == pytest.approx(owners * seconds, rel=0.05)


def test_owners_apart_work_at_the_same_time(one_server: Any) -> None:
    figures = one_server(4, 8, ((1, 0.0001),), owner=0.010)
    assert figures["step"]["p50"] == pytest.approx(0.010, rel=0.1)


def test_each_session_of_a_pack_takes_its_time(one_server: Any) -> None:
    """In its call: what is done for it, and its attention."""
    owners = 4
    figures = one_server(owners, 8, ((1, 0.030),), mode="packed", call=0.002, session=0.003)
    assert figures["step"]["p50"] == pytest.approx(0.030 + owners * 0.002 + (owners - 1) * 0.003, rel=0.05)


def test_time_does_not_stand_still_unnoticed(modules: Any) -> None:
    """Where everything waits for something that cannot happen, that is an error."""
    loop = modules.time.VirtualLoop()
    try:
        assert loop.run_until_complete(asyncio.sleep(3600, "an hour")) == "an hour"
        assert loop.time() == pytest.approx(3600)
        with pytest.raises(RuntimeError, match="nothing is left that could happen"):
            loop.run_until_complete(loop.create_future())
    finally:
        loop.close()
