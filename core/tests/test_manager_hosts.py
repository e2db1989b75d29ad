"""Models in their own processes: loaded, leased, killed, restarted, and removed completely."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from splitlearn_core import AsyncModelManager, ConfigurationError, ModelConfig
from splitlearn_core.api import load_split_model
from splitlearn_core.errors import (
    HostDiedError,
    LoadCancelledError,
    LoadStalledError,
    ModelNotReadyError,
    RemoteError,
)
from splitlearn_core.manager import messages as m
from splitlearn_core.manager.loaders.loader import ModelLoader
from splitlearn_core.manager.status import ModelStatus
from splitlearn_core.types import Progress
from support.hosts import BEHAVING_PLUGIN
from support.managing import StepsClock, check_sound, closing, reached, run, status_of

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="what is left is read from /proc")

S = ModelStatus
CUT = (2, 4)
ARRIVE = '(HERE / "arrived").write_text("0")\n'
HANGING = {
    "in Python": ARRIVE + "import threading\nthreading.Event().wait()\n",
    # With the lock of the interpreter, so that no other thread of it runs.
    "in C": ARRIVE + "import ctypes\nctypes.PyDLL(None).pause()\n",
}


@pytest.fixture(autouse=True)
def folder(world: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder that holds what children do, and through which they say that they have come to it."""
    monkeypatch.setenv("TEST_PARENT", str(os.getpid()))
    world.install("llama", BEHAVING_PLUGIN)
    os.mkfifo(world.folder / "arrived")
    return Path(world.folder)


def trunk(path: Path, **options: Any) -> ModelConfig:
    fields = {"model_id": "trunk", "model_type": "llama", "component": "trunk", "split_points": CUT, "host": "process"}
    return ModelConfig(**{**fields, "model_path": str(path), **options})


def states(tokens: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, tokens, 32, generator=torch.Generator().manual_seed(seed))


def pid_of(manager: AsyncModelManager, model_id: str = "trunk") -> int:
    pid = manager.get_model_info(model_id).pid
    assert pid is not None
    assert Path(f"/proc/{pid}").exists()
    return pid


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def tick(manager: AsyncModelManager) -> None:
    """Let the manager look at its clock now rather than within a tenth of a second."""
    manager._shell.dispatch(m.Tick(manager._shell.clock(), {}))


async def killed(manager: AsyncModelManager, model_id: str = "trunk") -> int:
    """Kill the process of an idle model, and wait until the manager has seen it."""
    pid = pid_of(manager, model_id)
    os.kill(pid, signal.SIGKILL)
    await reached(manager, model_id, S.FAILED)
    return pid


def test_it_computes_what_an_inline_one_does_and_ends_with_its_unload(single: Path) -> None:
    """Equal to the last bit, with a cache, after a warm-up; admission plans the same bytes."""

    async def main() -> None:
        async with closing(AsyncModelManager(min_residency=0)) as models:
            inline = await models.load_model(trunk(single, model_id="inline", host="inline"))
            await models.load_model(trunk(single, warmup=True))
            info, other = models.get_model_info("trunk"), models.get_model_info("inline")
            assert (info.host, info.restarts, info.restarts_at) == ("process", 0, None)
            assert (other.host, other.pid) == ("inline", None)
            assert info.predicted == other.predicted
            assert info.measured is not None
            assert info.measured > 2**20
            pid = pid_of(models)
            async with models.lease("trunk") as model:
                caches = model.new_cache(), inline.new_cache()
                for tokens in (5, 1, 3):
                    mine = await model(hidden_states=states(tokens), past_key_values=caches[0])
                    assert torch.equal(mine, await inline(hidden_states=states(tokens), past_key_values=caches[1]))
            report = await models.unload_model("trunk")
            assert sum(report.released.values()) == sum(info.predicted.values())
            assert not is_running(pid)
            check_sound(models)

    run(main())


def test_progress_is_that_of_the_process(single: Path, folder: Path) -> None:
    """What the child reports is what the loader does; and a report that raises ends it."""
    (folder / "load.py").write_text('import os\n(HERE / "arrived").write_text(str(os.getpid()))\n')
    loader, seen, pids, fails = ModelLoader(), list[Progress](), list[int](), False

    def report(progress: Progress) -> None:
        seen.append(progress)
        if progress.stage == "verifying" and fails:
            raise ZeroDivisionError

    for fails in (False, True):
        reader = threading.Thread(target=lambda: pids.append(int((folder / "arrived").read_text())), daemon=True)
        reader.start()
        plan = loader.plan(trunk(single), report)
        if not fails:
            loaded = loader.load(trunk(single), plan, report)
            assert loaded.host is not None
            assert {"importing", "verifying"} <= {progress.stage for progress in seen}
            assert seen[-1].bytes_done == seen[-1].bytes_total > 0
            loaded.host.end()
        else:
            with pytest.raises(ZeroDivisionError):
                loader.load(trunk(single), plan, report)
        reader.join()
    assert not any(map(is_running, pids))


def test_a_killed_idle_model_fails_alone(single: Path) -> None:
    """It is loaded again on its next use alone; what it held is free."""

    async def main() -> None:
        async with closing(AsyncModelManager()) as models:
            dead = await models.load_model(trunk(single))
            await models.load_model(trunk(single, model_id="other"))
            pid = await killed(models)
            assert (dead.status, dead.is_gone) == (S.FAILED, True)
            with pytest.raises(HostDiedError, match="SIGKILL"):
                await dead(hidden_states=states())
            info = models.get_model_info("trunk")
            assert (info.pid, info.restarts_at) == (None, None)
            assert info.error is not None
            assert info.error.type == "HostDiedError"
            assert f"process {pid} of model 'trunk' was killed by SIGKILL, perhaps because memory ran out" in (
                info.error.message
            )
            assert "dmesg" in info.error.hint
            with pytest.raises(ModelNotReadyError, match=r"'trunk' failed: .*SIGKILL"):
                async with models.lease("trunk"):
                    pass
            async with models.lease("other") as other:
                await other(hidden_states=states())
            assert models.get_statistics().hosts_died == 1
            check_sound(models)
            model = await models.ensure_model(trunk(single))
            assert model.generation == 3
            assert pid_of(models) != pid
            assert models.get_statistics().restarts == 0

    run(main())


def test_a_model_that_dies_in_a_call_is_started_again_with_its_sessions(single: Path, folder: Path) -> None:
    """The call fails immediately with the signal; the cache continues in the next process, to the last bit."""
    clock = StepsClock()
    whole = load_split_model(None, CUT, single, parts=["trunk"]).trunk
    expected = whole.new_cache()

    async def main() -> None:
        async with closing(AsyncModelManager(clock=clock)) as models:
            await models.load_model(trunk(single))
            async with models.lease("trunk") as model:
                cache = model.new_cache()
                for seed in range(3):
                    mine = await model(hidden_states=states(3, seed), past_key_values=cache)
                    assert torch.equal(mine, whole(hidden_states=states(3, seed), past_key_values=expected))
                # To the thread that computes: on a busy machine it may end its step before another one takes a signal.
                kill = f"signal.pthread_kill(threading.get_ident(), {int(signal.SIGSEGV)})"
                (folder / "step.py").write_text(f"import signal, threading\n{kill}\n")
                with pytest.raises(HostDiedError, match="SIGSEGV"):
                    await model(hidden_states=states(1, 7), past_key_values=cache)
                (folder / "step.py").unlink()
                with pytest.raises(HostDiedError, match="SIGSEGV") as error:
                    await model(hidden_states=states(1, 7), past_key_values=cache)
                assert "new lease" in error.value.hint
            info = models.get_model_info("trunk")
            assert info.status is S.FAILED
            assert info.restarts_at == pytest.approx(clock.now + 1 + models._shell.machine._epoch)
            with pytest.raises(ModelNotReadyError) as refusal:
                async with models.lease("trunk"):
                    pass
            assert "started again in 1.0 s" in refusal.value.hint
            clock.advance(1)
            tick(models)
            async with models.lease("trunk") as model:
                mine = await model(hidden_states=states(1, 7), past_key_values=cache)
            assert torch.equal(mine, whole(hidden_states=states(1, 7), past_key_values=expected))
            assert models.get_model_info("trunk").restarts == 1
            check_sound(models)

    with torch.no_grad():
        run(main())


def test_open_sessions_count_as_use(single: Path) -> None:
    """A cache that is still referenced is a reason to restart; one that is not referenced is none."""

    async def main() -> None:
        async with closing(AsyncModelManager(clock=StepsClock())) as models:
            model = await models.load_model(trunk(single))
            cache = model.new_cache()
            await model(hidden_states=states(), past_key_values=cache)
            await killed(models)
            assert models.get_model_info("trunk").restarts_at is not None
            del cache
            gc.collect()
            await models.ensure_model(trunk(single))
            await killed(models)
            assert models.get_model_info("trunk").restarts_at is None

    run(main())


def test_a_pinned_model_is_started_again_until_its_limit(single: Path, folder: Path) -> None:
    """Each time after twice as long; a start that fails counts; and at the limit it says so."""
    clock = StepsClock()

    async def main() -> None:
        async with closing(AsyncModelManager(clock=clock)) as models:
            await models.load_model(trunk(single, pinned=True, required=True, restart_limit=2))
            assert models.health().ready
            await killed(models)
            assert "SIGKILL" in models.health().missing["trunk"]
            clock.advance(0.9)
            tick(models)
            assert status_of(models, "trunk") is S.FAILED
            (folder / "load.py").write_text(f"import os\nos.kill(os.getpid(), {int(signal.SIGKILL)})\n")
            clock.advance(0.1)
            tick(models)
            assert status_of(models, "trunk") is not S.FAILED
            await reached(models, "trunk", S.FAILED)
            (folder / "load.py").unlink()
            info = models.get_model_info("trunk")
            assert info.restarts_at == pytest.approx(clock.now + 2 + models._shell.machine._epoch)
            clock.advance(2)
            tick(models)
            await reached(models, "trunk", S.READY)
            await killed(models)
            info = models.get_model_info("trunk")
            assert info.restarts_at is None
            assert info.error is not None
            assert "started again 2 times in a row" in info.error.hint
            # A caller's own wish begins the count again.
            await models.ensure_model(trunk(single, pinned=True, required=True, restart_limit=2))
            await killed(models)
            assert models.get_model_info("trunk").restarts_at is not None
            await models.unload_model("trunk")
            clock.advance(10)
            tick(models)
            assert models.list_models() == ()

    run(main())


@pytest.mark.parametrize("where", HANGING)
def test_a_load_that_hangs_is_ended_within_its_grace(single: Path, folder: Path, where: str) -> None:
    """Whether it is cancelled or stalls; nothing is stuck."""
    (folder / "load.py").write_text(HANGING[where])
    clock = StepsClock()

    async def main() -> None:
        async with closing(AsyncModelManager(clock=clock, stall_timeout=30)) as models:
            for stalls in (False, True):
                load = asyncio.ensure_future(models.load_model(trunk(single)))
                await asyncio.to_thread((folder / "arrived").read_text)
                # The clock stands still, so that no grace ends.
                if stalls:
                    clock.advance(31)
                    tick(models)
                else:
                    await models.cancel_load("trunk")
                with pytest.raises(LoadStalledError if stalls else LoadCancelledError):
                    await load
                assert status_of(models, "trunk") is (S.FAILED if stalls else None)
                assert models.get_statistics().stuck == {}
                check_sound(models)

    run(main())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_process_that_dies_while_it_loads_is_a_failed_load(
    single: Path, folder: Path, number: signal.Signals
) -> None:
    """Its caller gets the signal; it is not restarted."""
    (folder / "load.py").write_text(f"import os\nos.kill(os.getpid(), {int(number)})\n")

    async def main() -> None:
        async with closing(AsyncModelManager()) as models:
            with pytest.raises(HostDiedError, match=number.name):
                await models.load_model(trunk(single, pinned=True))
            info = models.get_model_info("trunk")
            assert (info.status, info.restarts_at) == (S.FAILED, None)

    run(main())


def test_a_call_that_hangs_ends_with_a_forced_unload(single: Path, folder: Path) -> None:
    """An inline one would be waited for."""

    async def main() -> None:
        async with closing(AsyncModelManager(min_residency=0)) as models:
            model = await models.load_model(trunk(single))
            pid = pid_of(models)
            (folder / "step.py").write_text(HANGING["in C"])
            call = asyncio.ensure_future(model(hidden_states=states()))
            await asyncio.to_thread((folder / "arrived").read_text)
            await models.unload_model("trunk", force=True)
            assert not is_running(pid)
            with pytest.raises(HostDiedError, match="on request"):
                await call

    run(main())


def test_closing_leaves_no_process(single: Path, folder: Path) -> None:
    """Neither of a ready model, nor of one that has begun to load."""
    pids: list[int] = []

    async def main() -> None:
        async with closing(AsyncModelManager()) as models:
            await models.load_model(trunk(single))
            pids.append(pid_of(models))
            (folder / "load.py").write_text(
                'import os, threading\n(HERE / "arrived").write_text(str(os.getpid()))\nthreading.Event().wait()\n'
            )
            load = asyncio.ensure_future(models.load_model(trunk(single, model_id="late")))
            pids.append(int(await asyncio.to_thread((folder / "arrived").read_text)))
            await models.close()
            with pytest.raises(LoadCancelledError):
                await load

    run(main())
    assert len(pids) == 2
    assert not any(map(is_running, pids))


def test_other_weights_in_the_same_place_are_loaded_without_the_sessions(single: Path) -> None:
    """A session cannot go on with them; the model does."""

    async def main() -> None:
        async with closing(AsyncModelManager(clock=StepsClock())) as models:
            model = await models.load_model(trunk(single))
            before, cache = model.model, model.new_cache()
            first = await model(hidden_states=states(), past_key_values=cache)
            await killed(models)
            other = AutoModelForCausalLM.from_pretrained(single)
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter.mul_(1.5)
            other.save_pretrained(single)
            model = await models.ensure_model(trunk(single))
            assert model.model is not before
            assert not torch.equal(first, await model(hidden_states=states()))
            with pytest.raises(RemoteError):
                before(hidden_states=states(), past_key_values=cache)

    run(main())


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"host": "proces"}, "did you mean 'process'"),
        ({"host": "ray"}, "is not installed (installed: inline, process"),
        ({"component": "bottom"}, "is for trunks, and a bottom"),
        ({"component": "top"}, "is for trunks, and a top"),
        ({"model_type": "huggingface", "component": None, "split_points": None}, "is loaded whole"),
        ({"restart_limit": -1}, "is not between 0"),
        ({"restart_limit": "3"}, "is not an integer"),
        ({"host": "inline", "restart_limit": 5}, "add host='process'"),
    ],
)
def test_what_cannot_have_a_process_is_refused(fields: dict[str, Any], text: str) -> None:
    """By name, with the way out, whether it comes from a file or not."""
    values = {"model_id": "a", "model_type": "llama", "model_path": "m", "component": "trunk", "split_points": [2, 4]}
    given = {name: value for name, value in {**values, "host": "process", **fields}.items() if value is not None}
    for make in (ModelConfig.from_dict, lambda all_of_it: ModelConfig(**all_of_it)):
        with pytest.raises(ConfigurationError) as error:
            make(given)
        assert text in error.value.message


def test_a_configuration_keeps_its_host() -> None:
    """As YAML too; the limit of restarts is no other load."""
    config = trunk(Path("m"), restart_limit=0)
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert config.fingerprint == trunk(Path("m")).fingerprint
    assert config.fingerprint != trunk(Path("m"), host="inline").fingerprint
