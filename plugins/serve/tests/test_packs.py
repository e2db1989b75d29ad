"""Packed sessions of a server: several users generate at once, in shared forwards."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from serving import StatusServer
from splitlearn_core import ConfigurationError, ModelConfig, SplitCausalLM, connect, load_split_model
from splitlearn_core.extension import Frame, Kind, sessions_on
from splitlearn_core.hosts.protocol import TensorSpec
from splitlearn_core.testing.worlds import tiny_model, write_checkpoint
from splitlearn_serve.packs import Packs

USERS = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("splitlearn_qwen2")
    return write_checkpoint(tmp_path_factory.mktemp("qwen2"), tiny_model("qwen2"))


def trunk_of(checkpoint: Path, **settings: Any) -> ModelConfig:
    return ModelConfig(
        model_id="trunk",
        model_type="qwen2",
        model_path=str(checkpoint),
        component="trunk",
        split_points=(2, 4),
        **settings,
    )


def test_users_generate_together(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their texts are those of the unsplit model, their forwards are shared, and a solo session is served meanwhile."""
    arrived, everybody, sizes = [], asyncio.Event(), []
    original_run, original_forward = Packs.run, Packs._forward

    async def run(self: Packs, step: Any) -> Any:
        arrived.append(step)
        if len(arrived) == USERS:
            everybody.set()
        await everybody.wait()
        return await original_run(self, step)

    def forward(self: Packs, pack: list[Any], model: Any) -> Any:
        sizes.append(len(pack))
        return original_forward(self, pack, model)

    monkeypatch.setattr(Packs, "run", run)
    monkeypatch.setattr(Packs, "_forward", forward)
    whole = AutoModelForCausalLM.from_pretrained(checkpoint)
    ids = torch.randint(3, 90, (USERS, 6), generator=torch.Generator().manual_seed(0))
    settings = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0}
    with StatusServer([trunk_of(checkpoint)]) as server:

        def generate(place: int) -> tuple[torch.Tensor, set[str]]:
            mode = "packed" if place < USERS else "solo"
            remote = connect(f"{server.url}/trunk", mode=mode)
            modes, send = set(), remote.host.exchange

            def exchange(frame: Any) -> Any:
                reply = send(frame)
                if reply.kind is Kind.RESULT:
                    modes.add(reply.meta["mode"])
                return reply

            monkeypatch.setattr(remote.host, "exchange", exchange)
            ends = load_split_model(None, (2, 4), checkpoint, parts=("bottom", "top"), progress=False)
            model = SplitCausalLM(ends.bottom, remote, ends.top)
            result = model.generate(ids[place % USERS : place % USERS + 1], **settings)
            remote.close()
            return result, modes

        with ThreadPoolExecutor(USERS + 1) as pool:
            results = list(pool.map(generate, range(USERS + 1)))
    for place, (result, modes) in enumerate(results):
        assert torch.equal(result, whole.generate(ids[place % USERS : place % USERS + 1], **settings))
        assert modes == ({"packed"} if place < USERS else {"solo"})
    assert sum(sizes) == USERS * 8
    assert sizes[0] == USERS


class Trunk:
    """A trunk whose forwards wait until they may begin, and say when they would."""

    def __init__(self, checkpoint: Path) -> None:
        module = load_split_model(None, (2, 4), checkpoint, parts=("trunk",), progress=False).trunk
        self.table: Any = sessions_on(module)
        self.packs = Packs(self, self.table)  # type: ignore[arg-type]  # a model that is loaded
        self.began, self.may_begin = asyncio.Event(), asyncio.Event()
        meta = {"rows": 1, "tokens": 16, "mode": "packed"}
        self.opened = [self.table.handle(Frame(Kind.OPEN, meta=meta)) for _ in range(3)]

    async def run(self, function: Any) -> Any:
        self.began.set()
        await self.may_begin.wait()
        return function(None)

    def start(self, place: int, states: torch.Tensor) -> asyncio.Task[Any]:
        """Send the first step of a session."""
        opened, spec = self.opened[place], TensorSpec("hidden_states", "F32", tuple(states.shape))
        buffers = [memoryview(states.numpy().tobytes())]
        frame = Frame(Kind.STEP, opened.session, 1, {"secret": opened.meta["secret"], "nonce": "a"}, (spec,), buffers)
        step = self.packs.step_of(frame, "", self.table.limits)
        assert step is not None
        return asyncio.create_task(self.packs.run(step))


@pytest.mark.parametrize("moment", ["before its forward", "in its forward"])
def test_a_user_whose_connection_ends_does_not_change_the_others(checkpoint: Path, moment: str) -> None:
    """Their results are, to the last bit, those of a pack without it; or, if it took part already, those with it."""
    states = [torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]

    async def results(*places: int, leaves: bool) -> list[bytes]:
        trunk = Trunk(checkpoint)
        tasks = [trunk.start(place, states[place]) for place in places]
        if moment == "in its forward":
            await trunk.began.wait()
        else:
            # The steps are waiting; the task that runs them has not begun.
            await asyncio.sleep(0)
        if leaves:
            tasks[-1].cancel()
            if moment == "before its forward":
                await asyncio.sleep(0)
        trunk.may_begin.set()
        replies = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(replies[-1], asyncio.CancelledError) is leaves
        kept = [reply[0] for reply in replies if not isinstance(reply, BaseException)]
        assert {frame.kind for frame in kept} == {Kind.RESULT}
        return [bytes(frame.buffers[0]) for frame in kept[:2]]

    expected = (0, 1, 2) if moment == "in its forward" else (0, 1)
    assert asyncio.run(results(0, 1, 2, leaves=True)) == asyncio.run(results(*expected, leaves=False))


def test_each_reply_of_a_pack_has_a_turn_of_the_loop(checkpoint: Path) -> None:
    """A large pack does not keep the loop from other things until all of its replies are sent."""

    async def turns() -> list[int]:
        trunk, turn, ends = Trunk(checkpoint), 0, []
        tasks = [trunk.start(place, torch.zeros(1, 2, 32)) for place in range(3)]
        for task in tasks:
            task.add_done_callback(lambda _: ends.append(turn))
        trunk.may_begin.set()
        while len(ends) < len(tasks):
            await asyncio.sleep(0)
            turn += 1
        return ends

    ends = asyncio.run(turns())
    assert len(set(ends)) == len(ends)


def test_a_server_that_ends_waits_for_no_pack(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tasks are cancelled while they wait for further steps; none of them goes on waiting."""
    monkeypatch.setattr("splitlearn_serve.packs._WINDOW_LEAST", 60.0)

    async def end() -> None:
        trunk = Trunk(checkpoint)
        # As if another session had taken part in the last forward.
        trunk.packs._latest = frozenset({1}), frozenset()
        task = trunk.start(0, torch.zeros(1, 2, 32))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        running = trunk.packs._task
        assert running is not None
        assert not trunk.began.is_set()
        running.cancel()
        task.cancel()
        ended, waiting = await asyncio.wait([task, running], timeout=10)
        assert not waiting
        assert all(each.cancelled() for each in ended)

    asyncio.run(end())


def test_a_trunk_in_another_process_has_none(checkpoint: Path) -> None:
    with (
        StatusServer([trunk_of(checkpoint, host="process")]) as server,
        pytest.raises(ConfigurationError, match="runs sessions solo"),
    ):
        connect(f"{server.url}/trunk", mode="packed")
