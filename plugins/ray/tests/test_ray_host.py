"""Trunks in actors of a real cluster: used by the manager as on any other host, and placed again when they die."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import torch

from splitlearn_core import (
    AsyncModelManager,
    CapacityError,
    ConfigurationError,
    HostDiedError,
    LoadCancelledError,
    MissingFileError,
    ModelConfig,
    ModelLoader,
    ModelStatus,
    load_split_model,
)
from splitlearn_core.extension import Frame, Kind, sessions_on
from splitlearn_ray.cluster import _clusters, end_clusters

CUT = (2, 4)
#: Seconds for what takes a few on an idle machine.
PATIENCE = 240


@pytest.fixture
def trunk(single: Path) -> Callable[..., ModelConfig]:
    """Return a function that describes a trunk on the cluster."""

    def trunk(model_id: str = "trunk", path: Path = single, **options: Any) -> ModelConfig:
        # No memory is reserved, so that tests run side by side whatever the machine has.
        chosen = {"num_cpus": 0, "memory_mb": 0, "resources": {"place": 1}, "prepared": False, **options}
        return ModelConfig(
            model_id=model_id,
            model_type="llama",
            model_path=str(path),
            component="trunk",
            split_points=CUT,
            pinned=True,
            host="ray",
            host_options=chosen,
        )

    return trunk


@pytest.fixture
def expected(single: Path) -> Any:
    (part,) = [part for part in load_split_model("llama", CUT, str(single), parts=("trunk",)) if part is not None]
    return part


def states(tokens: int) -> torch.Tensor:
    return torch.randn(1, tokens, 32, generator=torch.Generator().manual_seed(tokens))


def run(main: Callable[[AsyncModelManager], Coroutine[Any, Any, None]]) -> None:
    async def managed() -> None:
        async with AsyncModelManager(min_residency=0) as models:
            await asyncio.wait_for(main(models), PATIENCE)

    asyncio.run(managed())


async def until(models: AsyncModelManager, met: Callable[[], object]) -> None:
    """Wait until something is so, looking after each event of the manager."""
    events = models.events()
    if not met():
        async for _ in events:
            if met():
                return


@pytest.mark.usefixtures("ray")
def test_a_trunk_runs_in_an_actor_and_is_placed_again(trunk: Any, expected: Any) -> None:
    """Equal to the last bit for callers and in sessions; a killed actor is followed by another, with the old caches."""

    async def main(models: AsyncModelManager) -> None:
        model = await models.load_model(trunk())
        info = models.get_model_info("trunk")
        assert (info.host, info.status, info.predicted) == ("ray", ModelStatus.READY, {})
        assert info.pid not in (None, os.getpid())
        assert info.measured is not None
        assert info.measured > 2**20
        caches = model.new_cache(), expected.new_cache()
        for tokens in (4, 1, 2):
            mine = await model(hidden_states=states(tokens), past_key_values=caches[0])
            assert torch.equal(mine, expected(hidden_states=states(tokens), past_key_values=caches[1]))
        await serve_sessions(models)

        os.kill(info.pid, signal.SIGKILL)
        await until(models, lambda: models.get_statistics().hosts_died)
        with pytest.raises(HostDiedError, match=r"the actor of model 'trunk' on the machine .* has ended"):
            await model(hidden_states=states(1))
        await until(models, lambda: models.get_model_info("trunk").status is ModelStatus.READY)
        second = models.get_model_info("trunk")
        assert (second.restarts, second.pid not in (None, info.pid)) == (1, True)
        async with models.lease("trunk") as again:
            mine = await again(hidden_states=states(3), past_key_values=caches[0])
        assert torch.equal(mine, expected(hidden_states=states(3), past_key_values=caches[1]))

        assert second.pid is not None
        process = os.pidfd_open(second.pid)
        await models.unload_model("trunk")
        assert select.select([process], [], [], 0)[0], "the process still runs"
        os.close(process)

    run(main)


async def serve_sessions(models: AsyncModelManager) -> None:
    """Do what a server does: frames go through, and each owner sees their own sessions."""
    async with models.lease("trunk") as model:
        table = await model.run(sessions_on)
        opened = table.handle(Frame(Kind.OPEN, meta={"rows": 1, "tokens": 8}), "alice")
        assert (opened.kind, len(table)) == (Kind.OPENED, 1)
        step = Frame(Kind.STEP, opened.session, 1, {"secret": opened.meta["secret"]})
        assert table.handle(step, "bob").meta["code"] == "unknown_session"
        table.close()


@pytest.mark.usefixtures("ray")
def test_a_load_is_cancelled(trunk: Any) -> None:
    """Also one that waits for resources: nothing of it is left."""

    async def main(models: AsyncModelManager) -> None:
        load = asyncio.ensure_future(models.load_model(trunk(resources={"absent": 1})))
        # A stage is no event.
        while not (models.list_models() and models.get_model_info("trunk").stage == "placing"):
            await asyncio.to_thread(threading.Event().wait, 0.02)
        await models.cancel_load("trunk")
        with pytest.raises(LoadCancelledError):
            await load

    run(main)


@pytest.mark.usefixtures("ray")
def test_resources_that_are_missing_or_held_are_named(trunk: Any) -> None:
    """The error names what each machine has, and who holds it; of a group, which places are taken."""

    async def main(models: AsyncModelManager) -> None:
        options = {"resources": {"single": 1}, "group": "chain", "group_strategy": "STRICT_PACK"}
        await models.load_model(trunk("first", **options))
        with pytest.raises(ConfigurationError, match="all 1 places of group 'chain' are taken, by first"):
            await models.load_model(trunk("second", **options))
        with pytest.raises(
            ConfigurationError, match=r"was reserved with 1 places of 1 single, STRICT_PACK; 'third' asks"
        ):
            await models.load_model(trunk("third", **{**options, "group_size": 2}))
        with pytest.raises(
            CapacityError, match=r"asks for 1 single, .* has 1 single; free are 0 single.*'chain' \(1 sin"
        ):
            await models.load_model(trunk("fourth", resources={"single": 1}, wait=0.2))
        with pytest.raises(CapacityError, match=r"it asks for 8 absent, \S+ has 0 absent\n"):
            await models.load_model(trunk("fifth", resources={"absent": 8}, wait=0))

    run(main)


@pytest.mark.usefixtures("ray")
def test_a_machine_without_the_files_is_named(trunk: Any, single: Path, tmp_path: Path) -> None:
    """The error is that of a load here, with the machine that it happened on."""
    moved = tmp_path / "there"
    moved.mkdir()
    for file in single.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    config, loader = trunk(path=moved), ModelLoader()
    plan = loader.plan(config, lambda _: None)
    assert (plan.needs, plan.keeps, plan.elsewhere > 0) == ({}, {}, True)
    moved.rename(tmp_path / "elsewhere")

    with pytest.raises(MissingFileError, match=r"there.*\(on the machine \S+ of the cluster\)"):
        loader.load(config, plan, lambda _: None)


@pytest.mark.usefixtures("ray")
def test_the_end_of_the_connection_is_the_end_of_its_models_alone(trunk: Any, expected: Any) -> None:
    """As when the head of the cluster goes: the manager lives, and the model is placed over a new connection."""

    async def main(models: AsyncModelManager) -> None:
        model = await models.load_model(trunk())
        caches = model.new_cache(), expected.new_cache()
        mine = await model(hidden_states=states(4), past_key_values=caches[0])
        assert torch.equal(mine, expected(hidden_states=states(4), past_key_values=caches[1]))
        for cluster in list(_clusters.known.values()):
            cluster._process.kill()
        await until(models, lambda: models.get_statistics().hosts_died)
        await until(models, lambda: models.get_model_info("trunk").status is ModelStatus.READY)
        async with models.lease("trunk") as again:
            mine = await again(hidden_states=states(1), past_key_values=caches[0])
        assert torch.equal(mine, expected(hidden_states=states(1), past_key_values=caches[1]))

    run(main)


@pytest.mark.usefixtures("ray")
def test_a_cluster_that_does_not_run_is_refused(trunk: Any) -> None:
    """With the commands that start one; and nothing is started instead."""

    async def main(models: AsyncModelManager) -> None:
        with pytest.raises(ConfigurationError, match=r"at 127\.0\.0\.1:9") as error:
            await models.load_model(trunk(address="127.0.0.1:9"))
        assert "ray start --head" in error.value.hint

    run(main)


@pytest.mark.usefixtures("ray")
def test_a_load_that_waits_for_a_cluster_is_cancelled(trunk: Any) -> None:
    """Something else may listen at its address, and Ray tries for minutes."""

    async def main(models: AsyncModelManager) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            load = asyncio.ensure_future(models.load_model(trunk(address=f"127.0.0.1:{silent.getsockname()[1]}")))
            stream, _ = await asyncio.to_thread(silent.accept)
            stream.close()
            await models.cancel_load("trunk")
            with pytest.raises(LoadCancelledError):
                await load
        end_clusters()

    run(main)
