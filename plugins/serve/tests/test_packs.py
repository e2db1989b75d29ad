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
from splitlearn_core.extension import Kind
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


def test_a_trunk_in_another_process_has_none(checkpoint: Path) -> None:
    with (
        StatusServer([trunk_of(checkpoint, host="process")]) as server,
        pytest.raises(ConfigurationError, match="runs sessions solo"),
    ):
        connect(f"{server.url}/trunk", mode="packed")
