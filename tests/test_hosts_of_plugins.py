"""The host that the documents show, installed and used: by the manager, and by sessions over its relay."""

from __future__ import annotations

import asyncio
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from splitlearn_core import AsyncModelManager, HostDiedError, ModelConfig, load_split_model
from splitlearn_core.errors import LoadCancelledError
from splitlearn_core.extension import Frame, Kind, sessions_on
from splitlearn_core.hosts.payload import pack, unpack
from splitlearn_core.manager.status import ModelStatus
from splitlearn_core.plugins.registry import reset_registry
from splitlearn_core.testing.installing import write_plugin
from support.managing import closing, reached, run

CUT = (2, 6)
PAGE = Path(__file__).parent.parent / "docs" / "hosts.md"


@pytest.fixture(autouse=True)
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Install the package of the page, for children too."""
    source = re.search(r"<!-- file: splitlearn_pipe.py -->\n```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    assert source
    write_plugin(tmp_path / "site", "pipe", source[1], group="splitlearn.hosts")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    reset_registry()
    yield
    reset_registry()


def trunk(path: Path, host: str = "pipe", **options: Any) -> ModelConfig:
    return ModelConfig(
        model_id="trunk",
        model_type="qwen2",
        model_path=str(path),
        component="trunk",
        split_points=CUT,
        host=host,
        **options,
    )


def states(tokens: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, tokens, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.slow
@pytest.mark.usefixtures("warm_processes")
def test_a_model_runs_there(single: Path) -> None:
    """Equal to the last bit, for the manager's callers and in sessions of others; its death is the model's failure."""
    (expected,) = [part for part in load_split_model(None, CUT, str(single), parts=("trunk",)) if part is not None]

    async def main() -> None:
        async with closing(AsyncModelManager(min_residency=0)) as models:
            model = await models.load_model(trunk(single, pinned=True))
            info = models.get_model_info("trunk")
            assert (info.host, info.status) == ("pipe", ModelStatus.READY)
            caches = model.new_cache(), expected.new_cache()
            for tokens in (4, 1, 2):
                mine = await model(hidden_states=states(tokens), past_key_values=caches[0])
                assert torch.equal(mine, expected(hidden_states=states(tokens), past_key_values=caches[1]))
            await serve_sessions(models, expected)
            assert info.pid is not None
            os.kill(info.pid, signal.SIGKILL)
            await reached(models, "trunk", ModelStatus.FAILED)
            with pytest.raises(HostDiedError, match="status -9"):
                await model(hidden_states=states(1))
            again = await models.ensure_model(trunk(single, pinned=True))
            assert torch.equal(await again(hidden_states=states(3)), expected(hidden_states=states(3)))
            await models.unload_model("trunk")

    run(main())


async def serve_sessions(models: AsyncModelManager, expected: Any) -> None:
    """Do what a server does: the frames go through, and the sessions are in the process."""
    async with models.lease("trunk") as model:
        table = await model.run(sessions_on)
        opened = table.handle(Frame(Kind.OPEN, meta={"rows": 1, "tokens": 8}), "alice")
        assert (len(table), opened.session in table) == (1, True)
        specs, buffers = pack({"hidden_states": states(3)})
        step = Frame(Kind.STEP, opened.session, 1, {"secret": opened.meta["secret"]}, specs, buffers)
        assert table.handle(step, "bob").meta["code"] == "unknown_session"
        result = unpack(table.handle(step, "alice"))["output"]
        assert torch.equal(result, expected(hidden_states=states(3), past_key_values=expected.new_cache()))
        table.close()
        assert table.handle(step, "alice").meta["code"] == "closing"


def test_a_load_is_stopped(single: Path) -> None:
    """The host ends what it has started."""

    async def main() -> None:
        async with closing(AsyncModelManager(min_residency=0)) as models:
            load = asyncio.ensure_future(models.load_model(trunk(single)))
            await reached(models, "trunk", ModelStatus.LOADING)
            await models.cancel_load("trunk")
            with pytest.raises(LoadCancelledError):
                await load

    run(main())
