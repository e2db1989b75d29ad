"""The manager under many hands at once, and the same model over and over: nothing is left, and nothing grows."""

from __future__ import annotations

import asyncio
import gc
import random
import weakref
from pathlib import Path
from statistics import linear_regression
from typing import Any

import pytest
import torch

from splitlearn_core import AsyncModelManager, ModelConfig, SplitLearnError
from splitlearn_core.manager.status import ModelStatus
from splitlearn_core.testing.worlds import tiny_model, write_checkpoint
from support.long import cases
from support.managing import charges, check_closed, check_sound, resting, run

TASKS, OPERATIONS = 32, cases(1000, 100)
IDS = torch.tensor([[5, 17, 42]])
HIDDEN = torch.ones(1, 3, 32)
CYCLES = 50


def part(folder: Path, name: str, model_id: str, **options: Any) -> ModelConfig:
    fields = {"model_type": "qwen2", "component": name, "split_points": (2, 4), "model_path": str(folder)}
    return ModelConfig(model_id=model_id, **{**fields, **options})


class Hand:
    """One of many who use a manager, each as it likes."""

    def __init__(self, models: AsyncModelManager, configs: list[ModelConfig], seed: int) -> None:
        self._models = models
        self._configs = configs
        self._random = random.Random(seed)
        self.done = 0
        self.refused = 0

    async def work(self) -> None:
        """Do many things, one after the other."""
        weights = {
            self._use: 40, self._ensure: 15, self._look: 15, self._unload: 8, self._unload_by_force: 3, self._load: 5,
            self._reload: 2, self._cancel: 4, self._give_up: 6, self._break: 2,
        }  # fmt: skip
        for _ in range(OPERATIONS):
            (operation,) = self._random.choices(list(weights), list(weights.values()))
            try:
                await operation(self._random.choice(self._configs))
            except SplitLearnError:
                self.refused += 1
            self.done += 1
            # A turn for others even where nothing had to be waited for.
            await asyncio.sleep(0)

    async def _use(self, config: ModelConfig) -> None:
        async with self._models.lease(config.model_id) as model:
            given = {"input_ids": IDS} if config.component == "bottom" else {"hidden_states": HIDDEN}
            await model(**given)

    async def _ensure(self, config: ModelConfig) -> None:
        model = await self._models.ensure_model(config)
        assert model.model_id == config.model_id

    async def _load(self, config: ModelConfig) -> None:
        await self._models.load_model(config)

    async def _reload(self, config: ModelConfig) -> None:
        await self._models.reload_model(config.model_id)

    async def _unload(self, config: ModelConfig) -> None:
        await self._models.unload_model(config.model_id, timeout=0.05)

    async def _unload_by_force(self, config: ModelConfig) -> None:
        await self._models.unload_model(config.model_id, force=True)

    async def _cancel(self, config: ModelConfig) -> None:
        await self._models.cancel_load(config.model_id)

    async def _look(self, config: ModelConfig) -> None:
        # The broken ones come beside them.
        assert len(self._models.list_models()) <= len(self._configs) + 3
        self._models.get_statistics()
        self._models.health()
        self._models.get_model_info(config.model_id)

    async def _give_up(self, config: ModelConfig) -> None:
        """Begin something, and leave in the middle of it."""
        work = self._random.choice((self._use, self._ensure, self._unload, self._reload))
        task = asyncio.create_task(work(config))
        for _ in range(self._random.randrange(4)):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def _break(self, config: ModelConfig) -> None:
        """Load what is not there under an id of its own, and forget it."""
        broken = part(Path("/nowhere"), "trunk", f"broken {self._random.randrange(3)}")
        try:
            await self._models.ensure_model(broken)
        finally:
            await self._models.unload_model(broken.model_id)


@pytest.mark.slow
def test_many_hands_leave_nothing_behind(tmp_path: Path) -> None:
    """32 tasks do 1,000 random things each with six models of which three may be there at a time."""
    folder = write_checkpoint(tmp_path / "tiny", tiny_model("qwen2", tie_word_embeddings=False))

    async def main() -> None:
        models = AsyncModelManager(
            max_models=3, min_residency=0, call_queue=8, keep_alive=0.3, drain_timeout=0.1, wait_timeout=0.5
        )
        names = ("bottom", "trunk", "top")
        configs = [part(folder, name, f"{name} {way}", strategy=way) for name in names for way in ("mapped", "copied")]
        async with models:
            hands = [Hand(models, configs, seed) for seed in range(TASKS)]
            async with asyncio.TaskGroup() as group:
                for hand in hands:
                    group.create_task(hand.work())
            check_sound(models)
            assert [hand.done for hand in hands] == [OPERATIONS] * TASKS

            await resting(models)
            infos = models.list_models()
            assert [info.waiters + info.leases for info in infos] == [0] * len(infos)
            assert sum(info.status is ModelStatus.READY for info in infos) <= 3
            statistics = models.get_statistics()
            assert statistics.loads_started == (
                statistics.loads_succeeded + statistics.loads_failed + statistics.loads_cancelled
            )
            # It was a test of something: all that can happen has happened, many times.
            happened = (statistics.loads_succeeded, statistics.evictions, statistics.calls, statistics.joined)
            assert min(happened) >= OPERATIONS // 5
            for info in infos:
                await models.unload_model(info.model_id)
            assert charges(models) == {}
            check_sound(models)
        check_closed(models)

    run(main(), limit=280)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose trunk takes some 40 MB."""
    model = tiny_model(
        "qwen2", hidden_size=512, intermediate_size=2560, num_attention_heads=8, num_key_value_heads=8, head_dim=64
    )
    return write_checkpoint(tmp_path_factory.mktemp("large"), model)


#: Loads, uses and unloads one component, and prints its size and what memory is taken after each cycle.
CYCLING = """
import asyncio, sys
import torch
from splitlearn_core import AsyncModelManager, ModelConfig, preload
from splitlearn_core.system_memory import anonymous_memory

preload(["qwen2"], serving=True)
folder, use, cycles = sys.argv[1], sys.argv[2], int(sys.argv[3])
config = ModelConfig(
    model_id="a", model_type="qwen2", component="trunk", split_points=(2, 4), model_path=folder, strategy="copied"
)


async def call(model):
    try:
        await model(hidden_states=torch.ones(1, 3, 512 if use == "called" else 7))
    except (RuntimeError, ValueError):
        assert use == "failing calls"


async def main():
    async with AsyncModelManager() as models:
        for cycle in range(cycles):
            model = await models.load_model(config)
            if cycle == 0:
                print(sum(model.info.predicted.values()))
            if use != "loaded":
                await asyncio.gather(*(call(model) for _ in range(3)))
            await models.unload_model("a")
            print(anonymous_memory())


asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not tell anonymous memory")
@pytest.mark.parametrize("use", ["loaded", "called", "failing calls"])
def test_anonymous_memory_is_flat_over_many_cycles(large: Path, warm_process: Any, use: str) -> None:
    """Fifty loads and unloads of one component: the slope is below a thousandth of it per cycle.

    The process is set up for serving: otherwise glibc keeps some of what was freed.
    """
    warm = 5
    done = warm_process("-c", CYCLING, large, use, warm + CYCLES)

    assert done.returncode == 0, done.stderr
    size, *levels = map(int, done.stdout.split())
    assert size > 30 * 2**20
    # The first few fill caches of torch and of the allocator.
    slope = linear_regression(range(CYCLES), levels[warm:]).slope
    assert slope < size / 1000, f"{slope:.0f} bytes a cycle of a model of {size}: {levels}"


@pytest.mark.parametrize("use", ["loaded", "called", "failing calls", "reloaded", "cancelled", "forced"])
def test_a_model_dies_without_the_collector(tmp_path: Path, use: str) -> None:
    """Nothing of ours stands in a circle that holds it: once unload returns, it is dead."""
    folder = write_checkpoint(tmp_path / "tiny", tiny_model("qwen2"))

    async def main() -> None:
        async with AsyncModelManager() as models:
            # Once with the collector, for what torch and transformers do the first time.
            await models.load_model(part(folder, "trunk", "first"))
            gc.collect()
            gc.disable()
            model = await models.load_model(part(folder, "trunk", "a", warmup=True))
            dead = [weakref.ref(model.model), *map(weakref.ref, model.model.parameters())]
            if use in ("called", "failing calls"):
                await asyncio.gather(*(_call_tiny(model, failing=use != "called") for _ in range(3)))
            if use == "reloaded":
                await models.reload_model("a")
                await resting(models)
            elif use == "cancelled":
                call = asyncio.create_task(_call_tiny(model, failing=False))
                await asyncio.sleep(0)
                call.cancel()
                await asyncio.gather(call, return_exceptions=True)
                del call
                await models.unload_model("a")
            else:
                await models.unload_model("a", force=use == "forced")
            assert [reference() for reference in dead] == [None] * len(dead)

    try:
        run(main(), limit=60)
    finally:
        gc.enable()


async def _call_tiny(model: Any, *, failing: bool) -> None:
    try:
        await model(hidden_states=torch.ones(1, 3, 7 if failing else 32))
    except (RuntimeError, ValueError):
        assert failing
