"""Real faults: hanging, torn and changing files, no memory, no disk, plugins that misbehave.

Each is a typed error with a hint, affects no other model, leaves no memory charged, and does not keep
the manager from closing; a worker that hangs is shown, and its memory charged until it comes back.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import socket
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from splitlearn_core import (
    AsyncModelManager,
    BrokenPluginError,
    CheckpointError,
    InsufficientDiskError,
    InsufficientMemoryError,
    InvalidCheckpointError,
    MissingFileError,
    ModelConfig,
    SplitLearnError,
)
from splitlearn_core.checkpoint.hub import repository
from splitlearn_core.errors import LoadCancelledError, LoadStalledError, ManagerClosedError
from splitlearn_core.manager.loaders.loadable import LoadedModel, LoadPlan, ReportProgress
from splitlearn_core.manager.loaders.loader import ModelLoader
from splitlearn_core.manager.status import ModelStatus
from splitlearn_core.readers import copied
from splitlearn_core.types import Progress
from support.managing import (
    charges,
    check_closed,
    check_sound,
    closing,
    outcome_of,
    reached,
    run,
    seen,
    splitlearn_threads,
    status_of,
    until,
)

pytestmark = pytest.mark.usefixtures("llama")

S = ModelStatus
HIDDEN = torch.ones(1, 3, 32)
WEIGHTS = "model.safetensors"


def part(folder: Path | str, model_id: str = "a", **options: Any) -> ModelConfig:
    fields = {"model_type": "llama", "component": "trunk", "split_points": (2, 4), "model_path": str(folder)}
    return ModelConfig(model_id=model_id, **{**fields, **options})


class Meddling(ModelLoader):
    """The real loader, with a function that interferes when it comes to a stage."""

    def __init__(self, stage: str, meddle: Callable[[], Any], model_id: str = "a") -> None:
        self._stage = stage
        self._meddle: Callable[[], Any] | None = meddle
        self._model_id = model_id

    def plan(self, config: ModelConfig, report: ReportProgress) -> LoadPlan:
        """As the real one."""
        return super().plan(config, self._spying(config, report))

    def load(self, config: ModelConfig, plan: LoadPlan, report: ReportProgress) -> LoadedModel:
        """As the real one."""
        return super().load(config, plan, self._spying(config, report))

    def _spying(self, config: ModelConfig, report: ReportProgress) -> ReportProgress:
        def spying(progress: Progress) -> None:
            report(progress)
            meddle = self._meddle
            if config.model_id == self._model_id and progress.stage == self._stage and meddle is not None:
                self._meddle = None
                meddle()

        return spying


async def fails(models: AsyncModelManager, config: ModelConfig, kind: type[SplitLearnError], *named: str) -> None:
    """Load it, which fails so, and leaves the others, the ledgers and the threads as they were."""
    before = charges(models)
    with pytest.raises(kind) as failure:
        await models.load_model(config)
    assert failure.value.hint
    for text in named:
        assert text in str(failure.value)
    info = models.get_model_info(config.model_id)
    assert info.status is S.FAILED
    assert info.error is not None
    assert (info.error.type, info.error.message) == (type(failure.value).__name__, failure.value.message)
    assert charges(models) == before
    check_sound(models)


async def with_a_neighbour(
    single: Path, loader: ModelLoader | None, act: Callable[[AsyncModelManager], Any], **options: Any
) -> None:
    """Do something next to a model that is in use, and check that it stays in use and that everything ends."""
    async with closing(AsyncModelManager(loader=loader, **options)) as models:
        neighbour = await models.load_model(part(single, "neighbour", component="bottom"))
        ids = torch.tensor([[1, 2, 3]])
        before = await neighbour(input_ids=ids)
        await act(models)
        assert torch.equal(await neighbour(input_ids=ids), before)
        assert neighbour.status is S.READY


# --- a file that hangs --------------------------------------------------------------------------


@pytest.fixture
def hanging(
    checkpoint: Callable[[str], Path], single: Path
) -> Iterator[tuple[Path, Callable[[], None], Callable[[], None]]]:
    """Return a checkpoint, what lets a load hang in a call of the system, as that of a plugin may, and what ends it."""
    folder = single.parent / "hanging"
    folder.mkdir()
    for path in single.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    pipe = single.parent / "pipe"

    def hang() -> None:
        os.mkfifo(pipe)
        with pipe.open("rb"):
            pass

    def free() -> None:
        while any(name.startswith("splitlearn-load") for name in splitlearn_threads()):
            # Whoever stands in open() goes on once there is a writer.
            with contextlib.suppress(OSError):
                os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
            threading.Event().wait(0.005)

    yield folder, hang, free
    free()


needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")


@needs_pipes
def test_a_pipe_in_place_of_the_weights_is_refused(single: Path) -> None:
    """It is not read, so nothing hangs."""

    async def act(models: AsyncModelManager) -> None:
        (single / WEIGHTS).rename(single / "aside")
        os.mkfifo(single / WEIGHTS)
        await fails(models, part(single), CheckpointError)

    run(with_a_neighbour(single, None, act))


def _put_pipe(path: Path) -> None:
    os.mkfifo(path)


def _put_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


IRREGULAR = {
    "a named pipe": _put_pipe,
    "a folder": Path.mkdir,
    "a socket": _put_socket,
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


@needs_pipes
@pytest.mark.parametrize("kind", IRREGULAR)
@pytest.mark.parametrize("strategy", ["mapped", "copied", "incremental", "whole"])
def test_what_takes_the_place_of_the_weights_between_plan_and_load_is_refused(
    single: Path, strategy: str, kind: str
) -> None:
    """At once, by what it is: opening it does not wait for the other end of a pipe."""

    def replace() -> None:
        (single / WEIGHTS).rename(single / "aside")
        IRREGULAR[kind](single / WEIGHTS)

    async def act(models: AsyncModelManager) -> None:
        # transformers opens the file by itself, and looks at it before.
        named = () if strategy == "whole" else (f"is {kind}, where a regular file is needed",)
        await fails(models, part(single, strategy=strategy), CheckpointError, WEIGHTS, *named)

    run(with_a_neighbour(single, Meddling("building", replace), act))


@needs_pipes
@pytest.mark.parametrize("strategy", ["mapped", "copied"])
def test_a_load_that_hangs_in_open_is_the_only_stuck_one(
    single: Path, hanging: tuple[Path, Any, Any], strategy: str
) -> None:
    """Shown with its stack after a cancel, charged until it comes back; another load of the same id works."""
    folder, hang, free = hanging

    async def act(models: AsyncModelManager) -> None:
        before = charges(models)
        task = asyncio.create_task(models.load_model(part(folder, strategy=strategy)))
        await seen(models, lambda: status_of(models, "a") is S.LOADING)
        await until(
            lambda: "building" in models.get_model_info("a").stage or "reading" in models.get_model_info("a").stage
        )
        with pytest.raises(LoadStalledError, match="does not stop"):
            await models.cancel_load("a")
        assert isinstance(await outcome_of(task), LoadCancelledError)
        assert status_of(models, "a") is S.STUCK
        (stack,) = models.get_statistics().stuck.values()
        assert "open" in stack
        assert sum(charges(models).values()) > sum(before.values())
        assert models.health().live

        other = await models.load_model(part(single, "b"))
        assert (await other(hidden_states=HIDDEN)).shape == HIDDEN.shape
        await models.unload_model("b")
        again = await models.load_model(part(single, "a"))
        assert again.status is S.READY
        await models.unload_model("a")

        await asyncio.to_thread(free)
        await reached(models, "a", None)
        assert charges(models) == before

    run(with_a_neighbour(single, Meddling("building", hang), act, cancel_grace=0.2))


@needs_pipes
def test_close_is_bounded_while_a_load_hangs(single: Path, hanging: tuple[Path, Any, Any]) -> None:
    """It returns within its limit; the one thread that is left is the one that hangs."""
    folder, hang, free = hanging

    async def main() -> None:
        models = AsyncModelManager(loader=Meddling("building", hang), cancel_grace=0.1)
        async with models:
            await models.load_model(part(single, "neighbour"))
            task = asyncio.create_task(models.load_model(part(folder)))
            await until(
                lambda: (
                    status_of(models, "a") is S.LOADING and models.get_model_info("a").stage in ("building", "reading")
                )
            )
            began = asyncio.get_running_loop().time()
            await models.close(timeout=2)
            assert asyncio.get_running_loop().time() - began < 3
            assert isinstance(await outcome_of(task), LoadCancelledError | ManagerClosedError)
            assert [name for name in splitlearn_threads() if "ahead" not in name] == ["splitlearn-load-a"]
            assert [info.model_id for info in models.list_models()] == ["a"]
            assert charges(models)
            check_sound(models)
            await asyncio.to_thread(free)
            await until(lambda: not models.list_models())
        check_closed(models)

    run(main())


@needs_pipes
def test_a_hanging_load_does_not_keep_the_process(hanging: tuple[Path, Any, Any], llama: Any, tmp_path: Path) -> None:
    """The interpreter ends although the thread stands in open() for ever."""
    folder, _, _ = hanging
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import asyncio, os
from splitlearn_core import AsyncModelManager, ModelConfig, SplitLearnError
from splitlearn_core.manager.loaders.loader import ModelLoader

pipe = {str(folder / "pipe")!r}
os.mkfifo(pipe)

class Loader(ModelLoader):
    def load(self, config, plan, report):
        open(pipe)

async def main():
    async with AsyncModelManager(loader=Loader(), cancel_grace=0.1, close_timeout=2) as models:
        task = asyncio.create_task(models.load_model(ModelConfig(
            model_id="a", model_type="llama", component="trunk", split_points=(2, 4), model_path={str(folder)!r})))
        events = models.events()
        while str((await anext(events)).after) != "loading":
            pass
    try:
        await task
    except SplitLearnError as error:
        print(type(error).__name__)

asyncio.run(main())
print("ended")
"""
    )
    done = llama.warm_python(str(script))

    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["LoadCancelledError", "ended"]


# --- files that are not what they were ----------------------------------------------------------


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5], ids=str)
def test_truncated_weights(single: Path, checkpoint: Callable[[str], Path], keep: float) -> None:
    """Cut in the length, the header and the data."""

    async def act(models: AsyncModelManager) -> None:
        folder = checkpoint("sharded")
        path = min(folder.glob("*.safetensors"))
        for path in folder.glob("*.safetensors"):
            os.truncate(path, int(keep * path.stat().st_size) if isinstance(keep, float) else keep)
        await fails(models, part(folder), InvalidCheckpointError, ".safetensors")

    run(with_a_neighbour(single, None, act))


@pytest.mark.parametrize("stage", ["importing", "building", "reading"])
@pytest.mark.parametrize("how", ["replaced", "cut", "gone"])
def test_weights_that_change_during_the_load(
    single: Path, checkpoint: Callable[[str], Path], stage: str, how: str
) -> None:
    """Whatever is done to the file in between, what was loaded is not handed out."""
    folder = checkpoint("tied")
    weights = folder / WEIGHTS

    def meddle() -> None:
        if how == "replaced":
            other = folder / "other"
            other.write_bytes(bytes(byte ^ 1 for byte in weights.read_bytes()))
            other.replace(weights)
        elif how == "gone":
            weights.unlink()
        else:
            # A copy, because a process that has mapped the very file would be killed.
            other = folder / "other"
            other.write_bytes(weights.read_bytes()[:-100])
            other.replace(weights)

    async def act(models: AsyncModelManager) -> None:
        await fails(models, part(folder, strategy="copied"), CheckpointError, WEIGHTS)

    run(with_a_neighbour(single, Meddling(stage, meddle), act))


def test_weights_that_may_not_be_read(single: Path, checkpoint: Callable[[str], Path]) -> None:
    """For root, which may read everything, a directory replaces them."""

    async def act(models: AsyncModelManager) -> None:
        folder = checkpoint("tied")
        if os.getuid() == 0:
            (folder / WEIGHTS).unlink()
            (folder / WEIGHTS).mkdir()
        else:
            (folder / WEIGHTS).chmod(0)
        await fails(models, part(folder), CheckpointError)

    run(with_a_neighbour(single, None, act))


# --- no memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")], ids=repr)
@pytest.mark.parametrize("after", [0, 1, 5, 17])
def test_memory_that_runs_out_in_the_middle(
    single: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, after: int
) -> None:
    """At a piece in the middle of the trunk; what was allocated and read before it is freed, without a collection."""
    alive: list[weakref.ref[torch.Tensor]] = []
    arrived: list[object] = []
    arrivals, allocate = copied._Readers.arrivals, copied.fresh_memory

    def some_arrivals(self: Any) -> Iterator[Any]:
        for piece in arrivals(self):
            if len(arrived) == after:
                raise error
            arrived.append(None)
            yield piece

    def allocate_seen(*sizes: Iterable[int]) -> list[torch.Tensor]:
        blocks = allocate(*sizes)
        alive.extend(map(weakref.ref, blocks))
        return blocks

    async def act(models: AsyncModelManager) -> None:
        gc.collect()
        gc.disable()
        try:
            with monkeypatch.context() as patch:
                patch.setattr(copied, "CHUNK_BYTES", 1024)
                patch.setattr(copied._Readers, "arrivals", some_arrivals)
                patch.setattr(copied, "fresh_memory", allocate_seen)
                await fails(models, part(single, strategy="copied"), InsufficientMemoryError)
            assert len(arrived) == after
            assert alive
            assert [tensor() for tensor in alive] == [None] * len(alive)
        finally:
            gc.enable()
        assert (await models.load_model(part(single, strategy="copied"))).status is S.READY

    run(with_a_neighbour(single, None, act))


# --- no disk ------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk(single: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The download says so, whatever wrote."""
    import huggingface_hub

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number), "/cache/blob")

    async def act(models: AsyncModelManager) -> None:
        for name in ("snapshot_download", "hf_hub_download"):
            monkeypatch.setattr(huggingface_hub, name, full)
        # As if the Hub answered.
        monkeypatch.setattr(repository, "connection_failure", lambda: None)
        await fails(models, part("somebody/something"), InsufficientDiskError, "/cache/blob")

    run(with_a_neighbour(single, None, act))


# --- plugins ------------------------------------------------------------------------------------

HEAD = "from splitlearn_core import ModelFamily, hookimpl\n"
SOUND = """
@hookimpl
def splitlearn_model_families():
    return [ModelFamily(model_type="llama", architecture="LlamaForCausalLM")]
"""


def hook(body: str) -> str:
    return f"{HEAD}\n@hookimpl\ndef splitlearn_model_families():\n    {body}\n"


def mapping(body: str) -> str:
    return f"{HEAD}{SOUND}\n@hookimpl\ndef splitlearn_map_weight_keys(family, config, checkpoint_keys):\n    {body}\n"


def strategy(body: str) -> str:
    return f"""{HEAD}{SOUND}

class Odd:
    name = "odd"

    def refusal(self, plan):
        return ""

    def anonymous_bytes(self, plan):
        return 0

    def read(self, plan):
        {body}


@hookimpl
def splitlearn_loading_strategies():
    return [Odd()]
"""


BROKEN = {
    "raises": (hook("raise OSError('disk on fire')"), "auto", "disk on fire"),
    "exits": (hook("raise SystemExit(3)"), "auto", "SystemExit"),
    "returns None": (hook("return None"), "auto", "splitlearn_model_families"),
    "map raises": (mapping("raise ValueError('no map')"), "auto", "no map"),
    "map returns nonsense": (mapping("return 7"), "auto", "not a mapping"),
    "strategy raises": (strategy("raise ValueError('cannot')"), "odd", "cannot"),
    "strategy returns None": (strategy("return None"), "odd", "odd"),
    "strategy yields None": (strategy("yield None"), "odd", "odd"),
    "strategy yields too little": (strategy("yield from ()"), "odd", "left out"),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_a_plugin_that_misbehaves(world: Any, llama: Any, single: Path, edit_json: Any, case: str) -> None:
    """It is named; a model of another family next to it keeps running."""
    source, strategy, named = BROKEN[case]
    other = single.parent / "other"
    other.mkdir()
    for path in single.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    edit_json(other / "config.json", model_type="odd")
    world.install("odd", source.replace('model_type="llama"', 'model_type="odd"'))

    async def act(models: AsyncModelManager) -> None:
        await fails(models, part(other, model_type="odd", strategy=strategy), BrokenPluginError, named, "odd")

    run(with_a_neighbour(single, None, act))


@pytest.mark.parametrize("where", ["families", "map", "read"])
def test_a_plugin_that_hangs(world: Any, single: Path, edit_json: Any, where: str) -> None:
    """The load is stuck, others go on, closing is bounded; when it comes back it is gone."""
    gate = world.folder / "gate.py"
    gate.write_text("import threading\nopened, reached = threading.Event(), threading.Event()\n")
    wait = "import gate; gate.reached.set(); gate.opened.wait(60); raise ValueError('late')"
    source = {"families": hook(wait), "map": mapping(wait), "read": strategy(wait)}[where]
    other = single.parent / "other"
    other.mkdir()
    for path in single.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    edit_json(other / "config.json", model_type="odd")
    world.install("odd", source.replace('model_type="llama"', 'model_type="odd"'))
    import gate as events  # type: ignore[import-not-found]

    async def act(models: AsyncModelManager) -> None:
        before = charges(models)
        config = part(other, model_type="odd", strategy="odd" if where == "read" else "auto")
        task = asyncio.create_task(models.load_model(config))
        assert await asyncio.to_thread(events.reached.wait, 20)
        with pytest.raises(LoadStalledError):
            await models.cancel_load("a")
        assert isinstance(await outcome_of(task), LoadCancelledError)
        (stack,) = models.get_statistics().stuck.values()
        assert "splitlearn_odd" in stack
        assert (await models.load_model(part(single, "b", component="top"))).status is S.READY
        await models.unload_model("b")
        events.opened.set()
        await reached(models, "a", None)
        assert charges(models) == before

    try:
        run(with_a_neighbour(single, None, act, cancel_grace=0.1))
    finally:
        events.opened.set()
        sys.modules.pop("gate", None)


# --- workers that never come back ---------------------------------------------------------------


def test_workers_that_never_come_back_are_counted_and_then_no_load_starts(single: Path) -> None:
    """A few do no harm; when all workers are stuck, a load is refused with a hint, and snapshots still work."""
    opened = threading.Event()

    class Hanging(ModelLoader):
        def load(self, config: ModelConfig, plan: LoadPlan, report: ReportProgress) -> LoadedModel:
            if config.model_id.startswith("hang"):
                opened.wait(60)
            return super().load(config, plan, report)

    async def act(models: AsyncModelManager) -> None:
        before = charges(models)
        count = 0
        for count in range(10):  # how many there were is the subject
            task = asyncio.create_task(models.load_model(part(single, f"hang{count}")))
            await asyncio.sleep(0)
            if task.done():
                break
            await reached(models, f"hang{count}", S.LOADING)
            await outcome_of(models.cancel_load(f"hang{count}"))
            await outcome_of(task)
        refusal = await outcome_of(task)
        assert isinstance(refusal, SplitLearnError)
        assert "restart" in refusal.hint
        assert len(models.get_statistics().stuck) == count == 3
        assert models.health().live
        opened.set()
        await seen(models, lambda: not models.get_statistics().stuck)
        assert charges(models) == before
        assert (await models.load_model(part(single))).status is S.READY

    try:
        run(with_a_neighbour(single, Hanging(), act, cancel_grace=0, max_workers=1))
    finally:
        opened.set()


def test_a_missing_checkpoint_is_found_when_it_comes(single: Path, tmp_path: Path) -> None:
    """The failure is not kept against the next attempt."""

    async def act(models: AsyncModelManager) -> None:
        later = tmp_path / "later"
        await fails(models, part(later), MissingFileError, "later")
        later.symlink_to(single)
        assert (await models.ensure_model(part(later))).status is S.READY

    run(with_a_neighbour(single, None, act))
