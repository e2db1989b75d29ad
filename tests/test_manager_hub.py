"""Downloads of the manager's loader: byte by byte, and stopped in the middle of a file."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

from splitlearn_core import CheckpointError, Progress, load_split_model
from splitlearn_core.checkpoint.hub.repository import byte_bar, reporting_bar
from splitlearn_core.errors import LoadCancelledError
from splitlearn_core.manager.config import ModelConfig
from splitlearn_core.manager.loaders.loader import ModelLoader
from support.hub import LoopbackHub

pytestmark = pytest.mark.libs

REPO = "someone/tiny"
SPLIT = (2, 4)
CHUNK = 4096


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client hands on ten megabytes at a time; the tests' models are smaller."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)


def component(**options: Any) -> ModelConfig:
    fields: dict[str, Any] = {"model_type": "qwen2", "component": "trunk", "split_points": SPLIT, **options}
    return ModelConfig(model_id="m", model_path=REPO, **fields)


def downloads(said: list[Progress]) -> list[Progress]:
    return [progress for progress in said if progress.stage == "downloading"]


def sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}


@pytest.mark.parametrize("whole", [False, True], ids=["component", "whole model"])
def test_bytes_are_reported_while_files_download(hub: LoopbackHub, sharded: Path, whole: bool) -> None:
    """Each file in steps of the client's chunks; the bytes go forward, over all files, up to the total."""
    hub.add_repo(REPO, sharded)
    config = ModelConfig(model_id="m", model_type="huggingface", model_path=REPO) if whole else component()
    said: list[Progress] = []

    module = ModelLoader.load_from_config(config, said.append)

    told = downloads(said)
    done = [progress.bytes_done for progress in told]
    files = [progress.file for progress in told if progress.file]
    assert done == sorted(done)
    assert done[0] == 0
    assert done[-1] == told[-1].bytes_total == sum(sizes(sharded)[name] for name in set(files))
    assert max(b - a for a, b in itertools.pairwise(done)) <= CHUNK
    assert len(done) > 3 * len(set(files))
    expected = load_split_model("qwen2", SPLIT, sharded)
    if not whole:
        assert all(torch.equal(t, expected.trunk.state_dict()[k]) for k, t in module.state_dict().items())


def test_cached_files_are_not_reported_again(hub: LoopbackHub, sharded: Path) -> None:
    """A second load downloads nothing, and does not say so."""
    hub.add_repo(REPO, sharded)
    ModelLoader.load_from_config(component())
    said: list[Progress] = []

    ModelLoader.load_from_config(component(), said.append)

    assert downloads(said) == []


def test_bars_start_no_monitor_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A monitor of tqdm is a thread that never ends, and each class of bars would start one."""
    from huggingface_hub.utils import tqdm

    monkeypatch.setattr(tqdm, "monitor", None)
    for bar in (
        reporting_bar(lambda _: None, "file", 8, 0, 8)(total=8, disable=False, file=io.StringIO()),
        type(byte_bar("file", 8))(total=8, disable=False, file=io.StringIO()),
    ):
        bar.close()
        assert type(bar).monitor is None


@pytest.mark.parametrize(
    "error",
    [LoadCancelledError("stop"), RuntimeError("stop"), OSError(28, "stop")],
    ids=lambda error: type(error).__name__,
)
def test_a_download_can_be_stopped_in_the_middle_of_a_file(hub: LoopbackHub, single: Path, error: Exception) -> None:
    """What was raised comes out as it is, no more is fetched, and the next load works."""
    hub.add_repo(REPO, single)

    def stop(progress: Progress) -> None:
        if progress.stage == "downloading" and progress.bytes_done >= 3 * CHUNK:
            raise error

    with pytest.raises(type(error)) as caught:
        load_split_model("qwen2", SPLIT, REPO, progress=stop)

    assert caught.value is error
    assert not list((Path(constants.HF_HUB_CACHE)).rglob("snapshots/*/*.safetensors"))
    assert load_split_model("qwen2", SPLIT, REPO).trunk is not None


def test_a_cut_connection_does_not_count_back(hub: LoopbackHub, single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A load that resumes an interrupted download reports the cached bytes once."""
    hub.add_repo(REPO, single)
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub.faults.break_connection("model.safetensors", after=5 * CHUNK, times=1)
    said: list[Progress] = []

    for _ in range(2):
        try:
            ModelLoader().plan(component(), said.append)
        except CheckpointError:  # older clients leave it to the next attempt
            said.clear()

    done = [progress.bytes_done for progress in downloads(said)]
    assert done == sorted(done)
    assert done[-1] == sizes(single)["model.safetensors"]


def test_people_see_the_clients_bars(
    hub: LoopbackHub, single: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bars are the client's own, under its own conditions: on a terminal, or where they are forced."""
    hub.add_repo(REPO, single)
    ModelLoader().plan(component(), lambda _: None)
    assert "model.safetensors" not in capfd.readouterr().err

    monkeypatch.setenv("TQDM_POSITION", "-1")
    enable_progress_bars()
    try:
        ModelLoader().plan(component(cache_dir=str(tmp_path / "other")), lambda _: None)
    finally:
        disable_progress_bars()
    assert "100%" in capfd.readouterr().err


def test_a_download_that_stands_still_can_be_watched(hub: LoopbackHub, single: Path, spare: Callable[..., Any]) -> None:
    """Held in the middle of a file, the load has reported the file and its progress."""
    hub.add_repo(REPO, single)
    said: list[Progress] = []
    with hub.hold("model.safetensors", after=4 * CHUNK) as hold:
        worker = spare(lambda: ModelLoader().plan(component(), said.append))
        assert hold.reached.wait(20)
        hold.released.set()
        worker()

    assert next(p.file for p in downloads(said) if 0 < p.bytes_done < p.bytes_total) == "model.safetensors"


@pytest.fixture
def spare() -> Callable[..., Callable[[], Any]]:
    """Run a function in the background; the returned function waits for its result."""
    from concurrent.futures import ThreadPoolExecutor

    def start(function: Callable[[], Any]) -> Callable[[], Any]:
        executor = ThreadPoolExecutor(1)
        future = executor.submit(function)

        def finish() -> Any:
            executor.shutdown()
            return future.result(20)

        return finish

    return start
