"""Byte ranges of a large file on the Hub: what is transferred, kept, resumed and refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, hf_hub_download, scan_cache_dir
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from splitlearn_core import (
    CheckpointError,
    InsufficientDiskError,
    InvalidCheckpointError,
    MissingFileError,
    Progress,
    SplitCausalLM,
    load_split_model,
    plan_fetch,
    plan_split,
)
from splitlearn_core.checkpoint.hub import transfer
from splitlearn_core.checkpoint.hub.fetch_plan import Span, count, merged, without
from splitlearn_core.checkpoint.hub.partial_file import FOLDER, partial_files
from splitlearn_core.manager.config import ModelConfig
from splitlearn_core.manager.loaders.loader import ModelLoader
from splitlearn_core.plugins.registry import reset_registry
from splitlearn_core.testing.worlds import parts_equal, tiny_model, write_checkpoint, write_plugin
from support.hub import LoopbackHub, RequestRecord

pytestmark = pytest.mark.libs

REPO = "someone/large"
SPLIT = (2, 4)
SINGLE = "model.safetensors"
#: What is read to find a header; it holds the beginning of the data, too.
HEAD = 100_000
#: Bytes of the head, which lie at the beginning of the file.
LM_HEAD = 101 * 128 * 4
IDS = torch.tensor([[5, 17, 3, 88, 41]])
MIXTRAL = """
from splitlearn_core import ModelFamily, hookimpl


@hookimpl
def splitlearn_model_families():
    return [ModelFamily(model_type="mixtral", architecture="MixtralForCausalLM", transformers_tables=True)]
"""


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A qwen2 of six layers of a megabyte in one file; bottom, trunk and top lie one after the other, less the head."""
    return write_checkpoint(tmp_path_factory.mktemp("large"), large_model(seed=0))


def large_model(seed: int) -> Any:
    sizes = {"hidden_size": 128, "intermediate_size": 512, "head_dim": 32}
    model = tiny_model("qwen2", tie_word_embeddings=False, seed=seed, **sizes)
    model.generation_config.max_length = None
    return model


def load(*parts: str, **options: Any) -> Any:
    return load_split_model(None, SPLIT, options.pop("model", REPO), parts=parts, **options)


def spans_of(folder: Path, *parts: str) -> tuple[Span, ...]:
    """The bytes of parts in the single file."""
    return merged((info.begin, info.end) for info in plan_split(folder, SPLIT, parts=parts).infos)


def gets(hub: LoopbackHub) -> list[RequestRecord]:
    return [r for r in hub.requests if r.method == "GET" and r.filename == SINGLE and r.status in (200, 206)]


def requested(hub: LoopbackHub) -> list[Span]:
    """Return the requested ranges of the file; no request was for all of it."""
    spans = []
    for record in gets(hub):
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", record.range or "")
        assert match is not None, record
        spans.append((int(match[1]), int(match[2]) + 1))
    return spans


def sent(hub: LoopbackHub) -> int:
    return sum(record.sent for record in gets(hub))


def is_whole(hub: LoopbackHub) -> bool:
    return any(record.range is None and record.sent == record.length for record in gets(hub))


def after_header(hub: LoopbackHub, action: Callable[[], object], requests: int = 1) -> None:
    """Do something, once, when the file is requested after so many responses: the first is for the header."""

    def act(method: str, repo: str, name: str) -> None:
        if name == SINGLE and len(gets(hub)) == requests:
            hub.faults.before_file = None
            action()

    hub.faults.before_file = act


def repo_folder() -> Path:
    return Path(constants.HF_HUB_CACHE) / f"models--{REPO.replace('/', '--')}"


def kept() -> list[Path]:
    return sorted(path for path in (repo_folder() / FOLDER).rglob("*") if path.is_file() and path.suffix != ".lock")


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between attempts there are pauses; here there are none."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(transfer, "_PAUSE_S", 0)


class TestTransfer:
    @pytest.mark.parametrize("part", ["bottom", "trunk", "top"])
    def test_a_part_costs_its_bytes(self, hub: LoopbackHub, large: Path, part: str) -> None:
        """Header and part are transferred, no byte of the others, and the weights are those of the directory."""
        hub.add_repo(REPO, large)
        loaded = load(part)
        others = without([(HEAD, (large / SINGLE).stat().st_size)], spans_of(large, part))
        requests = requested(hub)
        assert requests[0] == (0, HEAD)
        assert without(others, requests) == others
        assert sent(hub) <= HEAD + count(spans_of(large, part))
        assert parts_equal(loaded, load(part, model=large))

    def test_a_part_costs_its_own_experts(
        self, hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A tensor for each expert in the file, one of all in the module: those of other layers are not transferred."""
        write_plugin(tmp_path / "site", "mixtral", MIXTRAL)
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        reset_registry()
        sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_local_experts": 4}
        folder = write_checkpoint(tmp_path / "mixtral", tiny_model("mixtral", **sizes))
        hub.add_repo(REPO, folder)
        loaded = load("trunk")
        assert not is_whole(hub)
        assert sent(hub) <= HEAD + count(spans_of(folder, "trunk"))
        assert parts_equal(loaded, load("trunk", model=folder))

    @pytest.mark.newest
    def test_a_quantised_part_costs_its_numbers_and_scales(self, hub: LoopbackHub, tmp_path: Path) -> None:
        """Those of the whole model are not transferred to dequantise a part."""
        sizes = {"hidden_size": 256, "intermediate_size": 1024, "head_dim": 64}
        folder = write_checkpoint(tmp_path / "fp8", tiny_model("qwen2", tie_word_embeddings=False, **sizes))
        tensors = load_file(folder / SINGLE)
        for key in [key for key, tensor in tensors.items() if ".layers." in key and tensor.dim() == 2]:
            tensors[key] = tensors[key].to(torch.float8_e4m3fn)
            tensors[f"{key}_scale_inv"] = torch.full([size // 64 for size in tensors[key].shape], 0.5)
        (folder / SINGLE).unlink()
        save_file(tensors, folder / SINGLE, {"format": "pt"})
        stated = {"quant_method": "fp8", "weight_block_size": [64, 64]}
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | {"quantization_config": stated}))
        hub.add_repo(REPO, folder)
        planned = plan_fetch(REPO, SPLIT, parts=("trunk",))
        loaded = load("trunk")
        assert not is_whole(hub)
        assert planned.fetched <= count(spans_of(folder, "trunk"))
        assert sent(hub) <= 2 * HEAD + count(spans_of(folder, "trunk"))  # the plan read the header, too
        assert parts_equal(loaded, load("trunk", model=folder))

    @pytest.mark.parametrize(
        ("points", "part"), [((1,), "bottom"), ((1, 2, 5), "trunk1")], ids=["one cut", "three cuts"]
    )
    def test_a_part_of_other_cuts(self, hub: LoopbackHub, large: Path, points: tuple[int, ...], part: str) -> None:
        """A part of a model that is cut in one place, or in three, costs its bytes as well; the plan says so."""
        hub.add_repo(REPO, large)
        planned = plan_fetch(REPO, points, parts=(part,))
        loaded = load_split_model(None, points, REPO, parts=(part,))
        wanted = merged((info.begin, info.end) for info in plan_split(large, points, parts=(part,)).infos)
        assert planned.fetched <= count(wanted) < (large / SINGLE).stat().st_size / 3
        assert sent(hub) <= 2 * HEAD + count(wanted)  # the plan read the header, too
        assert parts_equal(loaded, load_split_model(None, points, large, parts=(part,)))

    @pytest.mark.parametrize("strategy", ["mapped", "copied"])
    def test_all_strategies_read_it(self, hub: LoopbackHub, large: Path, strategy: str) -> None:
        """A file with holes is read like any other, into another dtype too."""
        hub.add_repo(REPO, large)
        options = {"strategy": strategy, "dtype": "bfloat16"}
        assert parts_equal(load("trunk", **options), load("trunk", model=large, **options))
        assert not is_whole(hub)

    def test_present_ranges_are_not_fetched_again(self, hub: LoopbackHub, large: Path) -> None:
        """A second load asks for nothing of the file, not even for its header."""
        hub.add_repo(REPO, large)
        first = load("trunk")
        before = len(gets(hub))
        assert parts_equal(load("trunk"), first)
        assert len(gets(hub)) == before

    def test_parts_add_up(self, hub: LoopbackHub, large: Path) -> None:
        """One part after the other: each byte comes once, and together they are the unsplit model."""
        hub.add_repo(REPO, large)
        for part in ("bottom", "trunk", "top"):
            load(part)
        assert sent(hub) <= (large / SINGLE).stat().st_size + HEAD
        before = len(gets(hub))
        parts = load("bottom", "trunk", "top")
        assert len(gets(hub)) == before
        whole = AutoModelForCausalLM.from_pretrained(large)
        with torch.inference_mode():
            assert torch.equal(SplitCausalLM(*parts)(input_ids=IDS).logits, whole(input_ids=IDS).logits)

    def test_all_parts_at_once_are_the_whole_file(self, hub: LoopbackHub, large: Path) -> None:
        """Where ranges spare nothing the file goes into the ordinary cache, and serves single parts from there."""
        hub.add_repo(REPO, large)
        load("bottom", "trunk", "top")
        assert is_whole(hub)
        assert kept() == []
        before = len(gets(hub))
        assert parts_equal(load("trunk"), load("trunk", model=large))
        assert len(gets(hub)) == before

    def test_a_whole_file_in_the_cache_is_used(self, hub: LoopbackHub, large: Path) -> None:
        """Regardless of who fetched it."""
        hub.add_repo(REPO, large)
        hf_hub_download(REPO, SINGLE)
        before = len(gets(hub))
        assert parts_equal(load("trunk"), load("trunk", model=large))
        assert len(gets(hub)) == before

    def test_of_several_shards(self, hub: LoopbackHub, tmp_path: Path) -> None:
        """Each shard is judged by itself: one is left alone, of one ranges come."""
        folder = write_checkpoint(tmp_path / "sharded", large_model(seed=0), max_shard_size=4_000_000)
        hub.add_repo(REPO, folder)
        plan = plan_split(folder, SPLIT, parts=("bottom",))
        assert len(plan.shards) < len(list(folder.glob("*.safetensors")))
        assert parts_equal(load("bottom"), load("bottom", model=folder))
        weights = [r for r in hub.requests if r.method == "GET" and (r.filename or "").endswith(".safetensors")]
        assert {record.filename for record in weights} == set(plan.shards)
        assert all(record.range for record in weights)
        assert sum(record.sent for record in weights) <= plan.nbytes + HEAD * len(plan.shards)

    def test_another_commit_with_the_same_file(self, hub: LoopbackHub, large: Path, tmp_path: Path) -> None:
        """Versions are those of the file: a commit that changes another file costs no weights, offline neither."""
        hub.add_repo(REPO, large)
        first = load("trunk")
        folder = shutil.copytree(large, tmp_path / "second")
        (folder / "README.md").write_text("a card")
        commit = hub.add_repo(REPO, folder)
        before = requested(hub)
        assert parts_equal(load("trunk"), first)
        assert requested(hub)[len(before) :] == [(0, HEAD)]
        assert parts_equal(load("trunk", local_files_only=True, revision=commit), first)

    def test_behind_a_redirect(self, hub: LoopbackHub, large: Path) -> None:
        """As on the real Hub: bytes come from a store elsewhere, whose own ETag says nothing of the version."""
        hub.faults.redirect = True
        hub.add_repo(REPO, large, private=True, token="hf_rightful")
        assert parts_equal(load("trunk", token="hf_rightful"), load("trunk", model=large))
        assert {r.path.split("/")[3] for r in gets(hub)} == {"store"}
        assert sent(hub) <= HEAD + count(spans_of(large, "trunk"))

    def test_the_manager_loads_parts(self, hub: LoopbackHub, large: Path) -> None:
        """A load between whose plan and reading another part arrives is not disturbed by that."""
        hub.add_repo(REPO, large)

        def config(part: str) -> ModelConfig:
            return ModelConfig(model_id=part, model_type="qwen2", model_path=REPO, component=part, split_points=SPLIT)

        loader = ModelLoader()
        plan = loader.plan(config("trunk"), lambda _: None)
        bottom = ModelLoader.load_from_config(config("bottom"))
        trunk = loader.load(config("trunk"), plan, lambda _: None).module
        assert not is_whole(hub)
        expected = load("bottom", "trunk", model=large)
        for got, part in ((bottom, expected.bottom), (trunk, expected.trunk)):
            assert all(torch.equal(tensor, got.state_dict()[key]) for key, tensor in part.state_dict().items())


class TestOffline:
    def test_present_ranges_load_offline(self, hub: LoopbackHub, large: Path) -> None:
        """Plan and load need no request; a part that is not held is missing, and the message says how much of it."""
        hub.add_repo(REPO, large)
        online, plan = load("trunk"), plan_split(REPO, SPLIT)
        before = len(hub.requests)
        assert parts_equal(load("trunk", local_files_only=True), online)
        assert plan_split(REPO, SPLIT, local_files_only=True) == plan
        with pytest.raises(MissingFileError, match=SINGLE) as caught:
            load("bottom", local_files_only=True)
        assert "local_files_only" in caught.value.hint
        missing = count(without(spans_of(large, "bottom"), [(0, HEAD)]))
        assert f"lacks {missing} of the " in caught.value.message
        assert [r for r in hub.requests[before:] if r.repo] == []


class TestCacheTools:
    def test_the_clients_tools_see_nothing_strange(self, hub: LoopbackHub, large: Path) -> None:
        """Scanning warns of nothing and counts nothing double; what is removed with a repository is all of it."""
        hub.add_repo(REPO, large)
        load("trunk")
        found = scan_cache_dir(constants.HF_HUB_CACHE)
        assert found.warnings == []
        (repo,) = found.repos
        assert {file.file_name for revision in repo.revisions for file in revision.files} >= {"config.json"}
        assert SINGLE not in {file.file_name for revision in repo.revisions for file in revision.files}
        assert kept()
        found.delete_revisions(*(revision.commit_hash for revision in repo.revisions)).execute()
        assert not repo_folder().exists()

    def test_the_command_line_tools(self, hub: LoopbackHub, large: Path, process: Callable[..., Any]) -> None:
        """``hf cache ls``, ``verify`` and ``prune`` go through, and what is held is still held."""
        hub.add_repo(REPO, large)
        online = load("trunk")
        code = "import sys; from huggingface_hub.cli.hf import main; sys.argv[0] = 'hf'; main()"
        for arguments in (("ls",), ("prune", "-y")):
            done = process("-c", code, "cache", *arguments)
            assert done.returncode == 0, done.stderr
            assert "warning" not in (done.stdout + done.stderr).lower()
        assert parts_equal(load("trunk", local_files_only=True), online)

    def test_the_file_takes_the_disk_of_its_parts(self, hub: LoopbackHub, large: Path) -> None:
        """It has the size of the whole, so that offsets are those of the header, and holes between."""
        hub.add_repo(REPO, large)
        load("trunk")
        (path,) = (path for path in kept() if path.name == SINGLE)
        status = path.stat()
        assert status.st_size == (large / SINGLE).stat().st_size
        assert status.st_blocks * 512 < status.st_size / 2


@pytest.mark.usefixtures("no_waiting")
class TestBreaks:
    def test_a_broken_range_goes_on_where_it_broke(self, hub: LoopbackHub, large: Path) -> None:
        """Twice cut in the middle, each byte comes once."""
        hub.add_repo(REPO, large)
        hub.faults.break_connection(SINGLE, after=700_000, times=2)
        assert parts_equal(load("trunk"), load("trunk", model=large))
        assert sent(hub) <= HEAD + count(spans_of(large, "trunk"))
        assert len(gets(hub)) == 4

    def test_it_is_given_up_in_the_end(self, hub: LoopbackHub, large: Path) -> None:
        """After some attempts without data; received bytes are kept, as the message says; the next load continues."""
        hub.add_repo(REPO, large)
        trunk = count(spans_of(large, "trunk"))
        after_header(hub, lambda: hub.faults.breaks.update({SINGLE: [700_000] + [0] * 50}))
        with pytest.raises(CheckpointError, match="lost 5 times") as caught:
            load("trunk")
        assert f"{trunk - 700_000} bytes are missing" in caught.value.message
        assert "only what is missing" in caught.value.hint
        assert len(hub.faults.breaks[SINGLE]) > 40
        hub.faults.breaks.clear()
        before = len(gets(hub))
        assert parts_equal(load("trunk"), load("trunk", model=large))
        assert sum(record.sent for record in gets(hub)[before:]) == trunk - 700_000

    @pytest.mark.parametrize("status", [429, 500, 503])
    def test_a_busy_server_is_retried(self, hub: LoopbackHub, large: Path, status: int) -> None:
        """No more is transferred because of it."""
        hub.add_repo(REPO, large)
        after_header(hub, lambda: hub.faults.refuse(SINGLE, status, times=3))
        assert parts_equal(load("trunk"), load("trunk", model=large))
        assert sent(hub) <= HEAD + count(spans_of(large, "trunk"))

    def test_a_server_that_stays_busy(self, hub: LoopbackHub, large: Path) -> None:
        """Is an error of splitlearn in the end."""
        hub.add_repo(REPO, large)
        after_header(hub, lambda: hub.faults.refuse(SINGLE, 503, times=100))
        with pytest.raises(CheckpointError, match="503") as caught:
            load("trunk")
        assert caught.value.hint


class TestOddServers:
    def test_without_ranges(self, hub: LoopbackHub, large: Path) -> None:
        """The whole file goes into the ordinary cache."""
        hub.add_repo(REPO, large)
        hub.faults.ignore_range = True
        assert parts_equal(load("trunk"), load("trunk", model=large))
        assert is_whole(hub)
        assert kept() == []

    def test_that_stops_serving_ranges(self, hub: LoopbackHub, large: Path) -> None:
        """After the header: the same."""
        hub.add_repo(REPO, large)
        after_header(hub, lambda: setattr(hub.faults, "ignore_range", True))
        reported: list[Progress] = []
        assert parts_equal(load("trunk", progress=reported.append), load("trunk", model=large))
        assert is_whole(hub)
        done = [progress.bytes_done for progress in reported if progress.stage == "downloading"]
        assert done == sorted(done)
        assert done[-1] == (large / SINGLE).stat().st_size

    @pytest.mark.parametrize(
        "lie",
        [
            lambda text: text.replace("bytes ", "bytes 1"),
            lambda text: "bytes 0-0/" + text.rpartition("/")[2],
            lambda text: "nonsense",
            lambda text: f"bytes {10**18}-{10**18 + 5}/{10**18 + 6}",
        ],
    )
    def test_that_lies_about_its_ranges(self, hub: LoopbackHub, large: Path, lie: Callable[[str], str]) -> None:
        """Bytes of an uncertain range are not used: the whole file is fetched, or there is an error."""
        hub.add_repo(REPO, large)
        hub.faults.content_range = lambda text: lie(text) if len(gets(hub)) else text
        try:
            loaded = load("trunk")
        except CheckpointError as error:
            assert error.hint  # noqa: PT017  # one of two valid outcomes
            assert kept() == []
        else:
            assert parts_equal(loaded, load("trunk", model=large))
            assert is_whole(hub)

    def test_that_sends_more_than_was_requested(self, hub: LoopbackHub, large: Path) -> None:
        """What is beyond is not written anywhere."""
        hub.add_repo(REPO, large)
        hub.faults.surplus = b"\xff" * 100_000
        assert parts_equal(load("trunk"), load("trunk", model=large))
        hub.faults.surplus = b""
        assert parts_equal(load("bottom"), load("bottom", model=large))
        (path,) = (path for path in kept() if path.name == SINGLE)
        assert path.stat().st_size == (large / SINGLE).stat().st_size


@pytest.fixture
def changing(tmp_path: Path, large: Path) -> Path:
    """A repository whose file can be replaced."""
    return shutil.copytree(large, tmp_path / "changing")


class TestChanges:
    @pytest.mark.parametrize("how", ["other weights", "shorter", "longer"])
    def test_a_file_that_changes_in_between(self, hub: LoopbackHub, changing: Path, tmp_path: Path, how: str) -> None:
        """Under the same commit, after the header was read: refused, nothing is kept, and the next load is right."""
        hub.add_repo(REPO, changing)
        other = write_checkpoint(tmp_path / "other", large_model(seed=1)) / SINGLE
        content = {"shorter": b"x" * 4000, "longer": other.read_bytes() + b"x" * 10}.get(how, other.read_bytes())

        after_header(hub, lambda: (changing / SINGLE).write_bytes(content))
        with pytest.raises(InvalidCheckpointError, match="changed") as caught:
            load("trunk")
        assert "again" in caught.value.hint
        assert kept() == []
        shutil.copyfile(other, changing / SINGLE)
        assert parts_equal(load("trunk"), load("trunk", model=changing))

    def test_a_file_that_changes_between_attempts(
        self, hub: LoopbackHub, changing: Path, tmp_path: Path, no_waiting: None
    ) -> None:
        """What came of the first version before the connection broke is not joined with the second."""
        hub.add_repo(REPO, changing)
        other = write_checkpoint(tmp_path / "other", large_model(seed=1)) / SINGLE
        hub.faults.break_connection(SINGLE, after=700_000)

        after_header(hub, lambda: shutil.copyfile(other, changing / SINGLE), requests=2)
        with pytest.raises(InvalidCheckpointError, match="changed"):
            load("trunk")
        assert kept() == []

    @pytest.mark.parametrize("content", [b"short", None])
    def test_a_record_that_does_not_fit_its_file(self, hub: LoopbackHub, large: Path, content: bytes | None) -> None:
        """A file that was replaced or removed behind its record's back is fetched again."""
        hub.add_repo(REPO, large)
        load("trunk")
        (path,) = (path for path in kept() if path.name == SINGLE)
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        assert parts_equal(load("trunk"), load("trunk", model=large))


class TestAtOnce:
    def test_two_loads_of_one_file(self, hub: LoopbackHub, large: Path) -> None:
        """The second waits for the first, and finds its bytes: each comes once."""
        hub.add_repo(REPO, large)
        with hub.hold(SINGLE, after=HEAD) as hold, ThreadPoolExecutor(2) as pool:
            loads = [pool.submit(load, "trunk") for _ in range(2)]
            assert hold.reached.wait(30)
            hold.released.set()
            one, other = (future.result(60) for future in loads)
        assert parts_equal(one, other)
        assert parts_equal(one, load("trunk", model=large))
        assert sent(hub) <= 2 * HEAD + count(spans_of(large, "trunk"))

    def test_a_process_that_is_killed(self, hub: LoopbackHub, large: Path) -> None:
        """With one range recorded and one under way: the next load fetches the rest, and no more."""
        commit = hub.add_repo(REPO, large)
        spans = spans_of(large, "top")
        assert len(spans) == 2
        head, layers = spans
        load_top = "load_split_model(None, (2, 4), sys.argv[1], parts=('top',))"
        code = f"import sys; from splitlearn_core import load_split_model; {load_top}"
        with hub.hold(SINGLE, after=700_000) as hold:
            path = {"PYTHONPATH": os.pathsep.join(sys.path)}  # the code that is tested here, wherever it lies
            child = subprocess.Popen([sys.executable, "-c", code, REPO], env={**os.environ, **path})
            try:
                assert hold.reached.wait(60)
                wait_for(lambda: not without([head], present_spans(commit)))
            finally:
                child.send_signal(signal.SIGKILL)
                child.wait()
        before = len(gets(hub))
        assert parts_equal(load("top"), load("top", model=large))
        new = requested(hub)[before:]
        assert new
        assert without([head], new) == (head,)
        assert count(merged(new)) <= count([layers])


def present_spans(commit: str) -> tuple[Span, ...]:
    held = partial_files(repo_folder(), commit).get(SINGLE)
    return held.coverage().spans if held is not None else ()


def wait_for(met: Callable[[], bool]) -> None:
    """Look again and again, for a minute at most; what is waited for happens in another process."""
    deadline, pause = time.monotonic() + 60, threading.Event()
    while not met():
        assert time.monotonic() < deadline
        pause.wait(0.01)


class TestLimits:
    def test_disk_is_counted_by_what_is_fetched(
        self, hub: LoopbackHub, large: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A disk that would not take the file takes a part; one byte less does not."""
        hub.add_repo(REPO, large)
        needed = count(without(spans_of(large, "trunk"), [(0, HEAD)]))
        assert needed < (large / SINGLE).stat().st_size / 2
        usage = shutil.disk_usage(large)
        for free, fits in ((needed - 1, False), (needed, True)):
            monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
            if fits:
                assert load("trunk").trunk is not None
            else:
                with pytest.raises(InsufficientDiskError):
                    load("trunk")
                assert kept() == []

    def test_progress_counts_what_comes(self, hub: LoopbackHub, large: Path) -> None:
        """From 0 to what is fetched, forward, in steps, in the thread that loads."""
        hub.add_repo(REPO, large)
        reported: list[Progress] = []
        threads = set()

        def report(progress: Progress) -> None:
            reported.append(progress)
            threads.add(threading.current_thread())

        load("trunk", progress=report)
        downloads = [progress for progress in reported if progress.stage == "downloading"]
        done = [progress.bytes_done for progress in downloads]
        assert {progress.bytes_total for progress in downloads} == {count(spans_of(large, "trunk"))}
        assert done == sorted(done)
        assert (done[0], done[-1]) == (0, downloads[0].bytes_total)
        assert len(set(done)) > 10
        assert threads == {threading.current_thread()}

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("stop"), OSError(28, "stop")], ids=repr)
    def test_it_can_be_stopped(self, hub: LoopbackHub, large: Path, error: BaseException) -> None:
        """By what the callback raises, which comes out as it is; no thread is left, and what came is kept."""
        hub.add_repo(REPO, large)

        def stop(progress: Progress) -> None:
            if progress.bytes_done > 500_000:
                raise error

        with pytest.raises(type(error)) as caught:
            load("trunk", progress=stop)
        assert caught.value is error
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("splitlearn-fetch")]
        trunk = count(spans_of(large, "trunk"))
        before = len(gets(hub))
        assert parts_equal(load("trunk"), load("trunk", model=large))
        assert sum(record.sent for record in gets(hub)[before:]) - HEAD < trunk - 400_000

    def test_while_nothing_comes_it_can_be_stopped(self, hub: LoopbackHub, large: Path) -> None:
        """The callback is called while the server stands still."""
        hub.add_repo(REPO, large)
        with hub.hold(SINGLE, after=HEAD) as hold:

            def stop(progress: Progress) -> None:
                if hold.reached.is_set():
                    hold.released.set()
                    raise InterruptedError

            with pytest.raises(InterruptedError):
                load("trunk", progress=stop)

    def test_pieces_of_many_connections(self, hub: LoopbackHub, large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Cut small, the pieces of one range come over several connections, and are recorded as they come."""
        hub.add_repo(REPO, large)
        monkeypatch.setattr(transfer, "REQUEST_BYTES", 100_000)
        monkeypatch.setattr(transfer, "_RECORD_BYTES", 30_000)
        assert parts_equal(load("trunk"), load("trunk", model=large))
        assert len(requested(hub)) > 20
        assert sent(hub) <= HEAD + count(spans_of(large, "trunk"))


class TestFetchPlan:
    def test_it_says_what_a_load_transfers(self, hub: LoopbackHub, large: Path) -> None:
        """To the byte; planning itself costs the header, and is not counted again."""
        hub.add_repo(REPO, large)
        plan = plan_fetch(REPO, SPLIT, parts=("top",))
        assert requested(hub) == [(0, HEAD)]
        (file,) = (file for file in plan.files if file.name == SINGLE)
        header = min(info.begin for info in plan_split(large, SPLIT).infos)
        assert (file.size, file.needed) == ((large / SINGLE).stat().st_size, count(spans_of(large, "top")) + header)
        assert (file.cached, file.fetched, file.is_partial) == (0, file.needed - header - LM_HEAD, True)
        others = [file for file in plan.files if file.name != SINGLE]
        assert [(file.name, file.fetched) for file in others] == [
            ("config.json", 0),
            ("generation_config.json", (large / "generation_config.json").stat().st_size),
        ]
        before = sent(hub)
        load("top")
        assert sent(hub) - before - HEAD == file.fetched
        after = plan_fetch(REPO, SPLIT, parts=("top",))
        assert (after.fetched, after.cached) == (0, after.needed)
        assert all(file.is_here for file in after.files)

    def test_ranges_that_do_not_pay(self, hub: LoopbackHub, large: Path) -> None:
        """All of the file is fetched, and said to be."""
        hub.add_repo(REPO, large)
        (file,) = (file for file in plan_fetch(REPO, SPLIT).files if file.name == SINGLE)
        assert (file.fetched, file.is_partial, file.is_here) == (file.size, False, False)

    def test_of_a_directory(self, large: Path) -> None:
        """Everything is here."""
        plan = plan_fetch(large, SPLIT, parts=("trunk",))
        assert (plan.fetched, plan.commit, plan.cached) == (0, None, plan.needed)

    def test_without_weights(self, hub: LoopbackHub, large: Path, tmp_path: Path) -> None:
        """There is nothing to be fetched, and that is an error as it would be for a load."""
        folder = shutil.copytree(large, tmp_path / "bare")
        (folder / SINGLE).unlink()
        hub.add_repo(REPO, folder)
        for model in (REPO, folder):
            with pytest.raises(MissingFileError, match="no weights"):
                plan_fetch(model, SPLIT)

    def test_of_pickles(self, hub: LoopbackHub, large: Path, tmp_path: Path) -> None:
        """A file without a header is needed whole, and is not fetched to find that out."""
        folder = shutil.copytree(large, tmp_path / "pickled")
        (folder / SINGLE).unlink()
        torch.save(large_model(seed=0).state_dict(), folder / "pytorch_model.bin")
        hub.add_repo(REPO, folder)
        size = (folder / "pytorch_model.bin").stat().st_size
        (file,) = (file for file in plan_fetch(REPO, SPLIT, parts=("top",)).files if file.name.endswith(".bin"))
        assert (file.size, file.needed, file.fetched) == (size, size, size)
        assert hub.downloaded(REPO) == {"config.json"}

    def test_on_the_command_line(
        self, hub: LoopbackHub, talking: Path, cli: Callable[..., Any], tmp_path: Path
    ) -> None:
        """``--dry-run`` of what loads: files and bytes, for people and programs, and no weights are fetched."""
        commit = hub.add_repo(REPO, talking)
        shards = {path.name: path.stat().st_size for path in talking.glob("*.safetensors")}
        commands = (
            ("generate", REPO, "--prompt", "Once"),
            ("verify", REPO),
            ("split", REPO, "--out", tmp_path / "out"),
        )
        for command in commands:
            people = cli(*command, "--split", 2, 4, "--dry-run")
            programs = cli(*command, "--split", 2, 4, "--dry-run", "--json")
            assert (people.returncode, programs.returncode) == (0, 0), people.stderr + programs.stderr
            answer = json.loads(programs.stdout)
            assert (answer["model"], answer["commit"]) == (REPO, commit)
            fetched = {file["file"]: file["fetched"] for file in answer["files"]}
            assert {name: fetched[name] for name in shards} == shards
            assert answer["fetched"] == sum(fetched.values())
            assert "tokenizer.json" in fetched
            assert f"({answer['fetched']:,} bytes) would be fetched" in people.stdout
        assert not (tmp_path / "out").exists()
        assert not any(r.range is None and (r.filename or "").endswith(".safetensors") for r in hub.requests)


@pytest.fixture(autouse=True)
def no_threads_left() -> Iterator[None]:
    """No test leaves a connection behind."""
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("splitlearn-fetch")]


def test_a_record_is_json_that_people_can_read(hub: LoopbackHub, large: Path) -> None:
    """It names the version, the size, the commits and the ranges."""
    commit = hub.add_repo(REPO, large)
    load("trunk")
    (record,) = (json.loads(path.read_text()) for path in kept() if path.suffix == ".json")
    assert record["commits"] == [commit]
    assert record["size"] == (large / SINGLE).stat().st_size
    assert without(spans_of(large, "trunk"), map(tuple, record["spans"])) == ()
