"""The Hub path: the real client of the Hugging Face Hub against a Hub on loopback."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, NamedTuple

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from splitlearn_core import (
    CheckpointError,
    ConfigurationError,
    InsufficientDiskError,
    MissingFileError,
    Progress,
    SplitCausalLM,
    SplitLearnError,
    load_split_model,
    plan_split,
)
from splitlearn_core.checkpoint.hub.transfer import transport
from splitlearn_core.doctor.load_checks import check_model
from splitlearn_core.testing.worlds import parts_equal, tiny_model, write_checkpoint
from support.hub import LoopbackHub, RequestRecord

pytestmark = pytest.mark.libs

REPO = "someone/tiny"
SPLIT = (2, 4)
CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
GENERATION = "generation_config.json"
TOKEN = "hf_rightful"
COMMIT = re.compile(r"[0-9a-f]{40}")
IDS = torch.tensor([[5, 17, 3, 88, 41]])

Cli = Callable[..., CompletedProcess[str]]


def load(**options: Any) -> Any:
    return load_split_model(None, options.pop("split", SPLIT), options.pop("model", REPO), **options)


def numbers(plan: Any) -> dict[str, Any]:
    """All that a plan says except where the model came from."""
    return {key: value for key, value in plan.to_dict().items() if key not in ("model", "commit")}


def shards_of(folder: Path, *parts: str) -> set[str]:
    return set(plan_split(folder, SPLIT, parts=parts).shards)


def file_requests(hub: LoopbackHub, suffix: str, method: str = "GET") -> list[RequestRecord]:
    return [r for r in hub.requests if r.method == method and r.filename and r.filename.endswith(suffix)]


def asked(hub: LoopbackHub) -> list[RequestRecord]:
    """Requests about repositories; the client's own look-up of its callers' names, once a day, is not one."""
    return [r for r in hub.requests if r.repo is not None]


def whole_downloads(hub: LoopbackHub) -> list[str]:
    """Names of the weight files that were requested without a range, one for each request."""
    return [str(r.filename) for r in file_requests(hub, ".safetensors") if r.range is None]


def other_weights(folder: Path, like: Path) -> Path:
    """A checkpoint with the files of another, and other weights in them."""
    assert (like / INDEX).exists()
    model = tiny_model("qwen2", tie_word_embeddings=False, seed=1)
    shard_bytes = max(path.stat().st_size for path in like.glob("*.safetensors"))
    write_checkpoint(folder, model, max_shard_size=min(shard_bytes, 40_000))
    assert sorted(path.name for path in folder.glob("*.safetensors")) == sorted(
        path.name for path in like.glob("*.safetensors")
    )
    return folder


def said_well(error: SplitLearnError) -> bool:
    """An error has a message of its own, a way out, and no trace of the HTTP library's words alone."""
    return bool(error.message.strip() and error.hint.strip())


def failed_cleanly(result: CompletedProcess[str]) -> bool:
    return (
        result.returncode == 1
        and result.stdout == ""
        and "Traceback" not in result.stderr
        and re.search(r"^error: .+$", result.stderr, re.MULTILINE) is not None
    )


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits between its attempts; here it does not."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.fixture
def closed_port() -> Any:
    """An endpoint that refuses connections: its port is bound, so that no process can take it, but nothing listens."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{reserved.getsockname()[1]}"


class TestDownloads:
    def test_trunk_fetches_config_index_and_its_shards_only(self, hub: LoopbackHub, sharded: Path) -> None:
        """A trunk needs some of the shards, and no byte of the others is sent."""
        hub.add_repo(REPO, sharded)
        loaded = load(parts=("trunk",))
        assert loaded.bottom is None
        assert loaded.top is None
        needed = shards_of(sharded, "trunk")
        assert hub.downloaded(REPO) == {CONFIG, INDEX} | needed
        assert needed < {path.name for path in sharded.glob("*.safetensors")}
        assert sorted(whole_downloads(hub)) == sorted(needed)
        assert parts_equal(loaded, load(model=sharded, parts=("trunk",)))

    def test_all_parts_equal_those_of_the_directory(self, hub: LoopbackHub, sharded: Path) -> None:
        """Each shard is fetched once, and the logits are those of the unsplit model."""
        hub.add_repo(REPO, sharded)
        loaded = load()
        assert sorted(whole_downloads(hub)) == sorted(path.name for path in sharded.glob("*.safetensors"))
        assert parts_equal(loaded, load(model=sharded))
        whole = AutoModelForCausalLM.from_pretrained(sharded)
        with torch.inference_mode():
            assert torch.equal(SplitCausalLM(*loaded)(input_ids=IDS).logits, whole(input_ids=IDS).logits)

    def test_parts_that_share_a_cache_fetch_nothing_twice(self, hub: LoopbackHub, sharded: Path) -> None:
        """Three processes that load one part each download together what one load of all would."""
        hub.add_repo(REPO, sharded)
        for part in ("bottom", "trunk", "top"):
            load(parts=(part,))
        assert sorted(whole_downloads(hub)) == sorted(path.name for path in sharded.glob("*.safetensors"))

    def test_single_file_repository(self, hub: LoopbackHub, single: Path) -> None:
        """A repository with one weight file gives that file, once, and no index is looked for."""
        hub.add_repo(REPO, single)
        loaded = load(parts=("trunk",))
        assert hub.downloaded(REPO) == {CONFIG, SINGLE}
        assert whole_downloads(hub) == [SINGLE]
        assert not file_requests(hub, INDEX)
        assert parts_equal(loaded, load(model=single, parts=("trunk",)))

    def test_other_formats_in_the_repository_are_left_alone(
        self, hub: LoopbackHub, single: Path, tmp_path: Path
    ) -> None:
        """Pickles, ONNX files and folders next to the safetensors are not downloaded."""
        folder = shutil.copytree(single, tmp_path / "mixed")
        (folder / "pytorch_model.bin").write_bytes(b"pickle")
        (folder / "onnx").mkdir()
        (folder / "onnx" / "model.onnx").write_bytes(b"onnx")
        hub.add_repo(REPO, folder)
        load(parts=("trunk",))
        assert hub.downloaded(REPO) == {CONFIG, SINGLE}

    def test_generation_config_is_honoured(self, hub: LoopbackHub, sharded: Path) -> None:
        """``generate`` without arguments stops where the repository's generation_config.json says."""
        hub.add_repo(REPO, sharded)
        parts = load()
        assert parts.top.generation_config.max_new_tokens == 7
        generated = SplitCausalLM(*parts).generate(IDS, do_sample=False)
        assert generated.shape[1] == IDS.shape[1] + 7
        assert torch.equal(generated, AutoModelForCausalLM.from_pretrained(sharded).generate(IDS, do_sample=False))

    def test_repository_without_generation_config(self, hub: LoopbackHub, single: Path, tmp_path: Path) -> None:
        """The file is optional: without it a load asks for none and works."""
        folder = shutil.copytree(single, tmp_path / "bare")
        (folder / GENERATION).unlink()
        hub.add_repo(REPO, folder)
        assert parts_equal(load(), load(model=folder))
        assert not file_requests(hub, GENERATION)

    def test_directory_wins_over_a_repository_of_its_name(
        self, hub: LoopbackHub, single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A folder ``someone/tiny`` below the working directory is meant, as in transformers."""
        shutil.copytree(single, tmp_path / REPO)
        hub.add_repo(REPO, single)
        monkeypatch.chdir(tmp_path)
        assert plan_split(REPO, SPLIT).commit is None
        assert asked(hub) == []

    def test_cache_dir_and_hf_home(self, hub: LoopbackHub, sharded: Path, tmp_path: Path) -> None:
        """``cache_dir`` is where the files go; without it, the cache below HF_HOME."""
        hub.add_repo(REPO, sharded)
        folder = "models--someone--tiny"
        load(parts=("trunk",), cache_dir=tmp_path / "elsewhere")
        assert (tmp_path / "elsewhere" / folder).is_dir()
        assert not (tmp_path / "home" / "hub" / folder).exists()
        load(parts=("trunk",))
        assert (tmp_path / "home" / "hub" / folder).is_dir()


PLAN_SCRIPT = """
import json, sys
from splitlearn_core import plan_split
plan = plan_split(sys.argv[1], (2, 4))
print(json.dumps({"plan": plan.to_dict(), "heavy": sorted({"torch", "transformers"} & set(sys.modules))}))
"""


class TestPlanning:
    @pytest.mark.parametrize("kind", ["single", "sharded"])
    def test_plan_equals_that_of_the_directory(
        self, hub: LoopbackHub, kind: str, request: pytest.FixtureRequest
    ) -> None:
        """Layers, parameters, bytes, shards and dtype of a repository are those of its files on disk."""
        folder = request.getfixturevalue(kind)
        commit = hub.add_repo(REPO, folder)
        plan, local = plan_split(REPO, SPLIT), plan_split(folder, SPLIT)
        assert numbers(plan) == numbers(local)
        assert (plan.model, plan.commit, plan.source) == (REPO, commit, "headers")

    @pytest.mark.parametrize("kind", ["single", "sharded"])
    def test_where_the_tensors_lie_equals_the_directory(
        self, hub: LoopbackHub, kind: str, request: pytest.FixtureRequest
    ) -> None:
        """The planned byte ranges are the same, counted from the start of the file, for both readers of the header."""
        folder = request.getfixturevalue(kind)
        hub.add_repo(REPO, folder)
        remote, local = (plan_split(model, SPLIT).components for model in (REPO, folder))
        assert [part.tensors for part in remote] == [part.tensors for part in local]

    def test_plan_reads_headers_by_range_alone(self, hub: LoopbackHub, single: Path) -> None:
        """A plan downloads no weight file: each request for one asks for a range at its beginning."""
        hub.add_repo(REPO, single)
        plan_split(REPO, SPLIT)
        requests = file_requests(hub, ".safetensors")
        assert requests
        assert all(r.range is not None and r.range.startswith(("bytes=0-", "bytes=8-")) for r in requests)
        assert sum(r.sent for r in requests) < (single / SINGLE).stat().st_size
        assert whole_downloads(hub) == []

    def test_plan_of_one_part_reads_its_headers_alone(self, hub: LoopbackHub, sharded: Path) -> None:
        """Of a sharded repository only the headers of the requested part's shards are read."""
        hub.add_repo(REPO, sharded)
        plan_split(REPO, SPLIT, parts=("trunk",))
        assert {r.filename for r in file_requests(hub, ".safetensors")} == shards_of(sharded, "trunk")
        assert whole_downloads(hub) == []

    def test_plan_imports_neither_torch_nor_transformers(self, hub: LoopbackHub, sharded: Path, process: Cli) -> None:
        """A fresh process that plans a repository has not imported them, and says what the directory's plan says."""
        hub.add_repo(REPO, sharded)
        result = process("-c", PLAN_SCRIPT, REPO)
        assert result.returncode == 0, result.stderr
        answer = json.loads(result.stdout)
        assert answer["heavy"] == []
        assert answer["plan"] == {
            **plan_split(sharded, SPLIT).to_dict(),
            "model": REPO,
            "commit": answer["plan"]["commit"],
        }
        assert whole_downloads(hub) == []

    def test_header_that_is_no_header(self, hub: LoopbackHub, single: Path, tmp_path: Path) -> None:
        """A weight file that is an error page in truth is refused in our words, before it is downloaded."""
        folder = shutil.copytree(single, tmp_path / "damaged")
        (folder / SINGLE).write_bytes(b"<html>" * 50_000)
        hub.add_repo(REPO, folder)
        with pytest.raises(CheckpointError, match=r"model\.safetensors") as caught:
            load()
        assert isinstance(caught.value, ValueError)
        assert whole_downloads(hub) == []


class TestRevisions:
    def test_branch_tag_and_commit(self, hub: LoopbackHub, sharded: Path, tmp_path: Path) -> None:
        """Whatever names a revision, it is resolved to the full commit that its weights come from."""
        first = hub.add_repo(REPO, sharded)
        hub.add_repo(REPO, sharded, first, revision="v1.0")
        second = hub.add_repo(REPO, other_weights(tmp_path / "second", sharded))
        hub.add_repo(REPO, tmp_path / "second", second, revision="experiment")
        assert COMMIT.fullmatch(first)
        assert first != second
        expected = {None: second, "main": second, "experiment": second, "v1.0": first, first: first, second: second}
        assert {revision: plan_split(REPO, SPLIT, revision=revision).commit for revision in expected} == expected
        here = {first: load(model=sharded), second: load(model=tmp_path / "second")}
        for revision in ("v1.0", "experiment", first):
            assert parts_equal(load(revision=revision), here[expected[revision]])
            assert not parts_equal(load(revision=revision), here[first if expected[revision] == second else second])

    def test_full_commit_in_the_cache_asks_nothing_for_its_files(self, hub: LoopbackHub, sharded: Path) -> None:
        """A commit cannot change, so its cached files are not requested again."""
        commit = hub.add_repo(REPO, sharded)
        load(revision=commit)
        before = len(asked(hub))
        load(revision=commit)
        assert [r for r in asked(hub)[before:] if r.filename] == []

    @pytest.mark.parametrize("moment", [CONFIG, INDEX, "the first shard", "the last shard"])
    def test_push_during_a_load_changes_nothing(
        self, hub: LoopbackHub, sharded: Path, tmp_path: Path, moment: str
    ) -> None:
        """The branch is resolved once: a load that began before a push ends with the weights from before it."""
        second, shards = other_weights(tmp_path / "second", sharded), sorted(shards_of(sharded, "bottom", "trunk"))
        trigger = {"the first shard": shards[0], "the last shard": shards[-1]}.get(moment, moment)
        first, moved = hub.add_repo(REPO, sharded), []

        def push(method: str, repo: str, name: str) -> None:
            if name == trigger and not moved:
                moved.append(hub.add_repo(REPO, second))

        hub.faults.before_file = push
        loaded = load(parts=("bottom", "trunk"))
        assert moved
        assert moved[0] != first
        assert parts_equal(loaded, load(model=sharded, parts=("bottom", "trunk")))
        assert plan_split(REPO, SPLIT).commit == moved[0]
        assert parts_equal(load(parts=("trunk",)), load(model=second, parts=("trunk",)))

    def test_push_during_generate_mixes_no_commits(
        self, hub: LoopbackHub, talking: Path, tmp_path: Path, cli: Cli
    ) -> None:
        """``generate`` takes tokenizer and weights from one commit, also when the branch moves in between."""
        second = tmp_path / "second"
        write_checkpoint(
            second, tiny_model("qwen2", vocab_size=257, max_position_embeddings=256, seed=1), max_shard_size=40_000
        )
        for path in talking.glob("tokenizer*"):
            shutil.copy(path, second)
        hub.add_repo(REPO, talking)
        moved: list[str] = []

        def push(method: str, repo: str, name: str) -> None:
            if name == "tokenizer.json" and not moved:
                moved.append(hub.add_repo(REPO, second))

        hub.faults.before_file = push
        arguments = ("--split", 2, 4, "--prompt", "Once", "--max-new-tokens", 8, "--json")
        got, expected = cli("generate", REPO, *arguments), cli("generate", talking, *arguments)
        assert moved
        assert (got.returncode, expected.returncode) == (0, 0), got.stderr + expected.stderr
        assert json.loads(got.stdout)["text"] == json.loads(expected.stdout)["text"]


OFFLINE_SCRIPT = """
import json, sys
from splitlearn_core import MissingFileError, load_split_model, plan_split
repo, answers = sys.argv[1], {}
def attempt(name, action):
    try:
        answers[name] = action()
    except MissingFileError as error:
        answers[name] = {"message": error.message, "hint": error.hint, "builtin": isinstance(error, FileNotFoundError)}
attempt("plan", lambda: plan_split(repo, (2, 4), parts=("trunk",)).to_dict())
for part in ("bottom", "trunk"):
    attempt(part, lambda: sum(p.sum().item() for p in getattr(load_split_model(
        None, (2, 4), repo, parts=(part,)), part).parameters()))
print(json.dumps(answers))
"""


class TestOffline:
    def test_everything_works_from_the_cache(self, hub: LoopbackHub, sharded: Path) -> None:
        """After one load online, ``local_files_only`` plans and loads the same with no request at all."""
        hub.add_repo(REPO, sharded)
        online, plan = load(), plan_split(REPO, SPLIT)
        before = len(asked(hub))
        offline = load(local_files_only=True)
        assert parts_equal(offline, online)
        assert offline.top.generation_config.max_new_tokens == 7
        assert plan_split(REPO, SPLIT, local_files_only=True) == plan
        assert plan_split(REPO, SPLIT, local_files_only=True, revision="main") == plan
        assert plan_split(REPO, SPLIT, local_files_only=True, revision=plan.commit) == plan
        assert len(asked(hub)) == before

    def test_hf_hub_offline_works_from_the_cache(self, hub: LoopbackHub, sharded: Path, process: Cli) -> None:
        """HF_HUB_OFFLINE=1 does for a process what ``local_files_only`` does for a call; what is missing is named."""
        hub.add_repo(REPO, sharded)
        trunk = load(parts=("trunk",)).trunk
        before = len(hub.requests)
        result = process("-c", OFFLINE_SCRIPT, REPO, HF_HUB_OFFLINE="1")
        assert result.returncode == 0, result.stderr
        answers = json.loads(result.stdout)
        assert len(hub.requests) == before
        assert answers["trunk"] == sum(parameter.sum().item() for parameter in trunk.parameters())
        assert answers["plan"]["shards"] == sorted(shards_of(sharded, "trunk"))
        assert answers["bottom"]["builtin"]
        assert "HF_HUB_OFFLINE" in answers["bottom"]["message"] + answers["bottom"]["hint"]

    @pytest.mark.parametrize("action", [load, lambda **options: plan_split(REPO, SPLIT, **options)])
    def test_without_a_cache(self, hub: LoopbackHub, sharded: Path, action: Callable[..., Any]) -> None:
        """Offline and with nothing cached, a FileNotFoundError names the model and both ways to allow a look."""
        hub.add_repo(REPO, sharded)
        with pytest.raises(MissingFileError, match=REPO) as caught:
            action(local_files_only=True)
        assert isinstance(caught.value, FileNotFoundError)
        assert "local_files_only" in caught.value.hint
        assert "HF_HUB_OFFLINE" in caught.value.hint
        assert asked(hub) == []

    def test_cache_with_the_shards_of_another_part(self, hub: LoopbackHub, sharded: Path) -> None:
        """With only the trunk's shards cached the trunk loads offline; the bottom says which file is missing."""
        hub.add_repo(REPO, sharded)
        online = load(parts=("trunk",))
        before = len(asked(hub))
        assert parts_equal(load(parts=("trunk",), local_files_only=True), online)
        missing = sorted(shards_of(sharded, "bottom") - shards_of(sharded, "trunk"))
        assert missing
        with pytest.raises(MissingFileError) as caught:
            load(parts=("bottom",), local_files_only=True)
        assert len(asked(hub)) == before
        assert "local_files_only" in caught.value.hint
        assert missing[0] in caught.value.message

    def test_cache_with_the_config_alone(self, hub: LoopbackHub, single: Path) -> None:
        """Offline, weights that were never fetched are missing from the cache, not from the repository."""
        hub.add_repo(REPO, single)
        plan_split(REPO, SPLIT)
        with pytest.raises(MissingFileError) as caught:
            load(local_files_only=True)
        assert "local_files_only" in caught.value.hint

    def test_command_line_offline(self, hub: LoopbackHub, talking: Path, cli: Cli, command: Cli) -> None:
        """Once generated online, the command line plans, generates and verifies offline with no request.

        HF_HUB_OFFLINE stops even what the client asks the Hub for itself; the flag stops all that concerns the model.
        """
        hub.add_repo(REPO, talking)
        arguments = ("generate", REPO, "--split", 2, 4, "--prompt", "Once", "--max-new-tokens", 4)
        online = command(*arguments)
        assert online.returncode == 0, online.stderr
        before = len(asked(hub))
        flag = command(*arguments, "--local-files-only")
        planned = cli("plan", REPO, "--split", 2, 4, "--json", "--local-files-only")
        assert asked(hub)[before:] == []
        all_before = len(hub.requests)
        variable = cli(*arguments, HF_HUB_OFFLINE="1")
        verified = cli("verify", REPO, "--split", 2, 4, "--json", HF_HUB_OFFLINE="1")
        results = (flag, variable, verified, planned)
        assert [result.returncode for result in results] == [0] * 4, [result.stderr for result in results]
        assert flag.stdout == variable.stdout == online.stdout
        assert json.loads(verified.stdout)["equal"] is True
        assert [f"{r.method} {r.path}" for r in hub.requests[all_before:]] == []

    def test_command_line_offline_without_a_cache(self, hub: LoopbackHub, talking: Path, cli: Cli) -> None:
        """The error of an offline process without a cache fits on two lines and names the variable."""
        hub.add_repo(REPO, talking)
        result = cli("plan", REPO, "--split", 2, 4, HF_HUB_OFFLINE="1")
        assert failed_cleanly(result), result.stderr
        assert "HF_HUB_OFFLINE" in result.stderr
        assert hub.requests == []


class TestRefusals:
    """Each refusal of the Hub is a MissingFileError that says what to do."""

    def expect(self, action: Callable[[], Any], message: str, hint: str) -> None:
        with pytest.raises(MissingFileError, match=message) as caught:
            action()
        assert isinstance(caught.value, FileNotFoundError)
        assert re.search(hint, caught.value.hint)
        assert caught.value.__cause__ is not None

    def test_no_such_repository(self, hub: LoopbackHub) -> None:
        """A misspelt name is neither a directory nor a repository."""
        self.expect(lambda: load(model="someone/tyni"), "someone/tyni.*neither a directory", "spelling")

    def test_no_such_revision(self, hub: LoopbackHub, sharded: Path) -> None:
        """The revision is named, not the repository doubted."""
        hub.add_repo(REPO, sharded)
        self.expect(lambda: load(revision="v9"), "someone/tiny.*v9", "branch")
        self.expect(lambda: plan_split(REPO, SPLIT, revision="0" * 40), "0{40}", "commit")

    def test_no_config(self, hub: LoopbackHub, single: Path, tmp_path: Path) -> None:
        """A repository that is not a transformers checkpoint lacks config.json, and the error says so."""
        folder = tmp_path / "dataset"
        folder.mkdir()
        (folder / "data.csv").write_text("a,b\n")
        hub.add_repo(REPO, folder)
        self.expect(load, r"config\.json", "transformers checkpoint")

    @pytest.mark.parametrize("token", [None, "hf_wrong"])
    def test_gated(self, hub: LoopbackHub, sharded: Path, token: str | None) -> None:
        """The hint for a gated repository is to accept its terms, with no token and with another user's."""
        hub.add_repo(REPO, sharded, gated=True, token=TOKEN)
        self.expect(lambda: load(token=token), "gated", "terms.*token")
        assert hub.downloaded(REPO) == set()

    @pytest.mark.parametrize("token", [None, "hf_wrong"])
    def test_private(self, hub: LoopbackHub, sharded: Path, token: str | None) -> None:
        """A private repository cannot be distinguished from a missing one; the hint names the token."""
        hub.add_repo(REPO, sharded, private=True, token=TOKEN)
        self.expect(lambda: load(token=token), "neither a directory", "token")
        assert hub.downloaded(REPO) == set()

    @pytest.mark.parametrize("kind", ["private", "gated"])
    def test_token_opens(
        self, hub: LoopbackHub, sharded: Path, kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """With the right token, given or in the environment, both load; ``token=False`` sends none."""
        hub.add_repo(REPO, sharded, token=TOKEN, **{kind: True})
        local = load(model=sharded, parts=("trunk",))
        assert parts_equal(load(parts=("trunk",), token=TOKEN), local)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        assert parts_equal(load(parts=("trunk",), cache_dir=tmp_path / "second"), local)
        with pytest.raises(MissingFileError):
            load(parts=("trunk",), token=False, cache_dir=tmp_path / "third")

    @pytest.mark.parametrize("name", ["no/such/depth", "spaces are not allowed", "-dash"])
    def test_names_that_no_repository_can_have(self, hub: LoopbackHub, name: str) -> None:
        """A name that cannot be a repository was meant as a path, and is not requested."""
        self.expect(lambda: load(model=name), "neither a directory", "path|spelling")
        assert asked(hub) == []

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (("someone/tyni", "--split", 2, 4), "neither a directory"),
            ((REPO, "--split", 2, 4, "--revision", "v9"), "v9"),
            (("someone/gated", "--split", 2, 4), "gated"),
            (("someone/private", "--split", 2, 4), "token"),
        ],
    )
    def test_command_line(
        self, hub: LoopbackHub, sharded: Path, cli: Cli, arguments: tuple[object, ...], says: str
    ) -> None:
        """At the command line a refusal is an error and a hint on stderr, exit code 1, no traceback."""
        hub.add_repo(REPO, sharded)
        hub.add_repo("someone/gated", sharded, gated=True, token=TOKEN)
        hub.add_repo("someone/private", sharded, private=True, token=TOKEN)
        result = cli("plan", *arguments)
        assert failed_cleanly(result), result.stderr
        assert says in result.stderr
        assert re.search(r"^hint: .+$", result.stderr, re.MULTILINE)

    def test_command_line_takes_the_token_from_the_environment(self, hub: LoopbackHub, sharded: Path, cli: Cli) -> None:
        """HF_TOKEN means here what it means elsewhere."""
        hub.add_repo(REPO, sharded, private=True, token=TOKEN)
        result = cli("plan", REPO, "--split", 2, 4, "--json", HF_TOKEN=TOKEN)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["components"] == plan_split(sharded, SPLIT).to_dict()["components"]


#: The console script, less the client's waiting between attempts.
IMPATIENT = "import sys, time; time.sleep = lambda s: None; from splitlearn_core.cli.main import main; main()"


@pytest.mark.usefixtures("no_waiting")
class TestConnection:
    def test_unreachable(self, closed_port: str, point_at: Callable[[str], None]) -> None:
        """A Hub that cannot be reached is no missing model: the message says which, the hint what to try."""
        point_at(closed_port)
        with pytest.raises(SplitLearnError, match="cannot be reached") as caught:
            load()
        assert REPO in caught.value.message
        assert said_well(caught.value)

    def test_a_name_that_nothing_answers_to_is_said_soon(
        self, closed_port: str, point_at: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The client would wait 23 seconds between attempts before it says that nothing is there."""
        point_at(closed_port)
        waits: list[float] = []
        monkeypatch.setattr(time, "sleep", waits.append)
        with pytest.raises(MissingFileError, match="cannot be reached") as caught:
            load()
        assert sum(waits) <= 2
        assert closed_port in caught.value.message
        assert "refused" in caught.value.message

    def test_a_moment_without_the_hub_is_no_error(
        self, hub: LoopbackHub, single: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The first attempt to connect may fail; and where something answers, the client's own attempts go on."""
        hub.add_repo(REPO, single)
        attempts: list[str] = []
        session = get_session()
        ask = session.head

        def fail_once(url: str, **options: Any) -> Any:
            attempts.append(url)
            if len(attempts) == 1:
                raise transport().ConnectError("no route")
            return ask(url, **options)

        monkeypatch.setattr(session, "head", fail_once)
        assert parts_equal(load(), load_split_model(None, SPLIT, single))
        assert len(attempts) == 2

    def test_unreachable_with_a_cache(
        self, hub: LoopbackHub, sharded: Path, closed_port: str, point_at: Callable[[str], None]
    ) -> None:
        """With all files cached, an unreachable Hub is either no hindrance or an error of ours with a way out."""
        hub.add_repo(REPO, sharded)
        online = load()
        point_at(closed_port)
        try:
            offline = load()
        except SplitLearnError as error:
            assert said_well(error)  # noqa: PT017  # one of two sound outcomes
        else:
            assert parts_equal(offline, online)

    def test_unreachable_half_way(
        self, hub: LoopbackHub, sharded: Path, closed_port: str, point_at: Callable[[str], None]
    ) -> None:
        """With the trunk's shards cached and the network gone, asking for the bottom is an error of ours."""
        hub.add_repo(REPO, sharded)
        load(parts=("trunk",))
        point_at(closed_port)
        with pytest.raises(SplitLearnError) as caught:
            load(parts=("bottom",))
        assert said_well(caught.value)

    @pytest.mark.parametrize("cached", [False, True])
    def test_unreachable_at_the_command_line(
        self, hub: LoopbackHub, sharded: Path, closed_port: str, process: Cli, cached: bool
    ) -> None:
        """No traceback: an error, a hint, exit code 1; with the needed files cached, a plan is as good an answer."""
        hub.add_repo(REPO, sharded)
        if cached:
            load()
        result = process("-c", IMPATIENT, "plan", REPO, "--split", "2", "4", HF_ENDPOINT=closed_port)
        if not (cached and result.returncode == 0):
            assert failed_cleanly(result), result.stderr
            assert re.search(r"^hint: .+$", result.stderr, re.MULTILINE)

    def test_header_cut_off(self, hub: LoopbackHub, sharded: Path) -> None:
        """A connection that breaks while a header is read is an error of ours."""
        hub.add_repo(REPO, sharded)
        for shard in shards_of(sharded, "trunk"):
            hub.faults.break_connection(shard, 100, times=50)
        with pytest.raises(SplitLearnError) as caught:
            plan_split(REPO, SPLIT)
        assert said_well(caught.value)

    def test_download_cut_off(self, hub: LoopbackHub, single: Path) -> None:
        """A download that breaks again and again is an error of ours that names the model."""
        hub.add_repo(REPO, single)
        self.break_downloads(hub)
        with pytest.raises(SplitLearnError, match=REPO) as caught:
            load()
        assert said_well(caught.value)

    def test_retry_after_a_cut_completes(self, hub: LoopbackHub, single: Path) -> None:
        """A broken download leaves nothing that stands in the way: the next load gives the right weights."""
        hub.add_repo(REPO, single)
        self.break_downloads(hub)
        with pytest.raises(Exception):  # noqa: B017, PT011  # of which kind is another test's matter
            load()
        assert hub.faults.breaks[SINGLE] != [150_000] + [0] * 20
        hub.faults.breaks.clear()
        assert parts_equal(load(), load(model=single))

    def test_cut_at_the_command_line(self, hub: LoopbackHub, single: Path, warm_process: Cli) -> None:
        """A download that breaks shows no traceback; the next command completes it."""
        hub.add_repo(REPO, single)
        self.break_downloads(hub)
        command = ("-c", IMPATIENT, "verify", REPO, "--split", "2", "4", "--json")
        broken = warm_process(*command)
        hub.faults.breaks.clear()
        again = warm_process(*command)
        assert again.returncode == 0, again.stderr
        assert json.loads(again.stdout)["equal"] is True
        assert failed_cleanly(broken), broken.stderr

    def test_server_without_ranges(self, hub: LoopbackHub, single: Path) -> None:
        """A mirror that ignores ranges costs bytes, not correctness."""
        hub.add_repo(REPO, single)
        hub.faults.ignore_range = True
        assert parts_equal(load(), load(model=single))

    @staticmethod
    def break_downloads(hub: LoopbackHub) -> None:
        # Past what reading the header takes, and then at once, so that the client's own resuming fails as well.
        hub.faults.breaks[SINGLE] = [150_000] + [0] * 20


class TestProgress:
    def test_stages_and_bytes(self, hub: LoopbackHub, sharded: Path) -> None:
        """The callback sees the download with the sizes of the shards, before anything is built."""
        hub.add_repo(REPO, sharded)
        seen: list[Progress] = []
        load(parts=("trunk",), progress=seen.append)
        sizes = {name: (sharded / name).stat().st_size for name in shards_of(sharded, "trunk")}
        downloads = [progress for progress in seen if progress.stage == "downloading"]
        assert {progress.bytes_total for progress in downloads} == {sum(sizes.values())}
        assert {progress.file for progress in downloads} - {""} == set(sizes)
        done = [progress.bytes_done for progress in downloads]
        assert done == sorted(done)
        assert (done[0], done[-1]) == (0, sum(sizes.values()))
        stages = list(dict.fromkeys(progress.stage for progress in seen))
        assert stages[0] == "resolving"
        assert stages[-1] == "ready"
        assert stages.index("downloading") < stages.index("building") < stages.index("reading")

    def test_cached_files_are_not_counted(self, hub: LoopbackHub, sharded: Path) -> None:
        """What is in the cache is not downloaded, and not counted as if it were."""
        hub.add_repo(REPO, sharded)
        load(parts=("trunk",))
        seen: list[Progress] = []
        load(parts=("trunk", "bottom"), progress=seen.append)
        new = shards_of(sharded, "trunk", "bottom") - shards_of(sharded, "trunk")
        totals = {progress.bytes_total for progress in seen if progress.stage == "downloading"}
        assert totals == {sum((sharded / name).stat().st_size for name in new)}

    def test_progress_false_is_silent(self, hub: LoopbackHub, sharded: Path, warm_process: Cli) -> None:
        """Where stderr is no terminal, a load writes nothing on stdout."""
        hub.add_repo(REPO, sharded)
        code = "import sys; from splitlearn_core import load_split_model as l; l(None, (2, 4), sys.argv[1])"
        result = warm_process("-c", code, REPO)
        assert (result.returncode, result.stdout) == (0, ""), result.stderr


class Usage(NamedTuple):
    """What ``shutil.disk_usage`` answers."""

    total: int
    used: int
    free: int


class TestDisk:
    def test_a_cache_that_cannot_be_used(
        self, hub: LoopbackHub, single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Cli
    ) -> None:
        """The connection is not blamed for a folder that is a file."""
        hub.add_repo(REPO, single)
        (tmp_path / "file").touch()
        for folder in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(CheckpointError, match=r"cache of models cannot be used: .*Not a directory") as caught:
                plan_split(REPO, SPLIT, cache_dir=folder)
            assert "HF_HOME" in caught.value.hint
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "file" / "token"))
        result = command("plan", REPO, "--split", 2, 4)
        assert failed_cleanly(result)
        assert "the cache of models cannot be used" in result.stderr

    @pytest.mark.parametrize("place", ["", "refs", "snapshots"])
    def test_a_cache_that_may_not_be_read(
        self, hub: LoopbackHub, single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
    ) -> None:
        """To the client it is as if nothing were there; the error has the folder and the line that changes it."""
        hub.add_repo(REPO, single)
        barred = tmp_path / ("models--" + REPO.replace("/", "--")) / place
        barred.mkdir(parents=True)
        scan = os.scandir

        def refused(path: Any) -> Any:
            if Path(path) == barred:
                raise PermissionError(errno.EACCES, "Permission denied", str(barred))
            return scan(path)

        monkeypatch.setattr(os, "scandir", refused)
        with pytest.raises(CheckpointError, match=r"cache of models cannot be used: .*Permission denied") as caught:
            plan_split(REPO, SPLIT, cache_dir=tmp_path, local_files_only=True)
        assert caught.value.hint.startswith(f"chmod u+rwx {barred!s}, or choose another folder")

    def test_a_model_is_not_fetched_to_be_looked_at(self, hub: LoopbackHub, single: Path) -> None:
        """The doctor leaves weights where they are, and loads those that are here."""
        hub.add_repo(REPO, single)
        (before,) = [found for found in check_model(REPO, load=True) if "was not tried" in found.what]
        assert whole_downloads(hub) == []
        load()
        after = check_model(REPO, load=True)
        assert before.what.endswith("its weights are not all here")
        assert before.fix == f"splitlearn verify {REPO} --split 3 5"
        assert [found.what for found in after][-1] == "bottom, trunk and top load"

    def test_too_little_disk(self, hub: LoopbackHub, single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Weights that do not fit on the disk are not begun to be downloaded; the hint says how to make room."""
        hub.add_repo(REPO, single)
        free = (single / SINGLE).stat().st_size - 1
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12 - free, free))
        with pytest.raises(InsufficientDiskError, match=REPO) as caught:
            load()
        assert isinstance(caught.value, OSError)
        assert "cache_dir" in caught.value.hint
        assert "HF_HOME" in caught.value.hint
        assert whole_downloads(hub) == []

    def test_cached_weights_need_no_disk(self, hub: LoopbackHub, single: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A full disk does not keep what is already on it from being loaded."""
        hub.add_repo(REPO, single)
        online = load()
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 10**12, 0))
        assert parts_equal(load(), online)


class TestCommandLine:
    def test_plan(self, hub: LoopbackHub, sharded: Path, cli: Cli) -> None:
        """The plan for people names repository and commit; that for programs is the plan of the directory."""
        commit = hub.add_repo(REPO, sharded)
        people, programs = cli("plan", REPO, "--split", 2, 4), cli("plan", REPO, "--split", 2, 4, "--json")
        assert (people.returncode, programs.returncode) == (0, 0), people.stderr + programs.stderr
        assert people.stdout.startswith(f"{REPO} at {commit[:12]}\n")
        assert json.loads(programs.stdout) == {**plan_split(sharded, SPLIT).to_dict(), "model": REPO, "commit": commit}
        assert people.stderr == ""
        assert whole_downloads(hub) == []

    def test_generate(self, hub: LoopbackHub, talking: Path, command: Cli) -> None:
        """A repository with a tokenizer generates the text that its directory generates; stdout is the text alone."""
        hub.add_repo(REPO, talking)
        arguments = ("--split", 2, 4, "--prompt", "Once upon", "--max-new-tokens", 12)
        remote, local = command("generate", REPO, *arguments), command("generate", talking, *arguments)
        assert (remote.returncode, local.returncode) == (0, 0), remote.stderr + local.stderr
        assert remote.stdout == local.stdout
        assert remote.stdout.startswith("Once upon")
        assert "12 tokens" in remote.stderr

    def test_verify(self, hub: LoopbackHub, talking: Path, command: Cli) -> None:
        """A repository verifies equal, on a prompt of its own tokenizer."""
        commit = hub.add_repo(REPO, talking)
        result = command("verify", REPO, "--split", 2, 4, "--json", "--revision", commit)
        assert result.returncode == 0, result.stderr
        answer = json.loads(result.stdout)
        assert answer["equal"] is True
        assert answer["max_difference"] == 0
        assert (answer["model"], answer["input"]) == (REPO, "prompt")

    def test_without_a_tokenizer(self, hub: LoopbackHub, single: Path, command: Cli) -> None:
        """Without a tokenizer ``generate`` says so before it downloads weights; ``verify`` takes random tokens."""
        hub.add_repo(REPO, single)
        result = command("generate", REPO, "--split", 2, 4, "--prompt", "Once")
        assert failed_cleanly(result), result.stderr
        assert "tokenizer" in result.stderr
        assert whole_downloads(hub) == []
        verified = command("verify", REPO, "--split", 2, 4, "--json")
        assert json.loads(verified.stdout)["input"] == "random tokens"

    def test_cache_dir(self, hub: LoopbackHub, sharded: Path, cli: Cli, tmp_path: Path) -> None:
        """``--cache-dir`` is where everything goes, the small files too."""
        hub.add_repo(REPO, sharded)
        result = cli("plan", REPO, "--split", 2, 4, "--cache-dir", tmp_path / "elsewhere")
        assert result.returncode == 0, result.stderr
        assert (tmp_path / "elsewhere" / "models--someone--tiny").is_dir()
        assert not list((tmp_path / "home").rglob("models--*"))


def test_quantised_repository_is_refused_before_its_weights(hub: LoopbackHub, single: Path, tmp_path: Path) -> None:
    """What config.json rules out costs config.json alone."""
    folder = shutil.copytree(single, tmp_path / "quantised")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    hub.add_repo(REPO, folder)
    with pytest.raises(CheckpointError, match="gptq"):
        load()
    assert hub.downloaded(REPO) == {CONFIG}


def test_pickled_repository_is_refused(hub: LoopbackHub, single: Path, tmp_path: Path) -> None:
    """For a repository with pickles of another layout, the hint says how to convert, and none of them is downloaded."""
    folder = shutil.copytree(single, tmp_path / "pickled")
    (folder / SINGLE).rename(folder / "consolidated.pth")
    hub.add_repo(REPO, folder)
    with pytest.raises(CheckpointError, match=r"consolidated\.pth") as caught:
        load()
    assert "convert_TYPE_weights_to_hf" in caught.value.hint
    assert hub.downloaded(REPO) == {CONFIG}


def test_index_that_names_a_missing_shard(hub: LoopbackHub, sharded: Path, tmp_path: Path) -> None:
    """An incomplete upload says which file the repository lacks."""
    folder = shutil.copytree(sharded, tmp_path / "incomplete")
    lost = sorted(shards_of(sharded, "trunk"))[0]
    (folder / lost).unlink()
    hub.add_repo(REPO, folder)
    with pytest.raises(MissingFileError, match=re.escape(lost)):
        load(parts=("trunk",))


def test_wrong_model_type_costs_the_config_alone(hub: LoopbackHub, single: Path) -> None:
    """A contradiction between the caller and config.json is found before anything large is requested."""
    hub.add_repo(REPO, single)
    with pytest.raises(ConfigurationError, match=r"gpt2.*qwen2"):
        load_split_model("gpt2", SPLIT, REPO)
    assert hub.downloaded(REPO) == {CONFIG}


def test_other_processes_see_the_hub_of_this_one(hub: LoopbackHub, process: Cli) -> None:
    """What these tests rely on: the constants set here are those that HF_ENDPOINT sets in a fresh process."""
    from huggingface_hub import constants

    names = [name for name, value in vars(constants).items() if isinstance(value, str) and hub.endpoint in value]
    code = (
        "import json; from huggingface_hub import constants as c;"
        f"print(json.dumps([n for n, v in vars(c).items() if isinstance(v, str) and {hub.endpoint!r} in v]))"
    )
    result = process("-c", code)
    assert sorted(json.loads(result.stdout)) == sorted(names)
    assert os.environ["HF_ENDPOINT"] == hub.endpoint


@pytest.mark.parametrize("strategy", ["auto", "whole"])
def test_bin_files_come_from_the_hub(hub: LoopbackHub, single: Path, tmp_path: Path, strategy: str) -> None:
    """They cannot be planned by a header, so they are fetched first; the whole model needs all of them."""
    folder = shutil.copytree(single, tmp_path / "pickled")
    state = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    torch.save(state, folder / "pytorch_model.bin")
    hub.add_repo(REPO, folder)

    trunk = load_split_model(None, (2, 4), REPO, parts=["trunk"], strategy=strategy).trunk

    assert trunk is not None
    assert all(torch.equal(tensor, state[name]) for name, tensor in trunk.state_dict().items())


def test_a_whole_model_comes_from_the_hub(hub: LoopbackHub, sharded: Path) -> None:
    """All of its shards, although one part was requested."""
    hub.add_repo(REPO, sharded)

    trunk = load_split_model(None, (2, 4), REPO, parts=["trunk"], strategy="whole").trunk

    assert trunk is not None
    assert {path.name for path in sharded.glob("*.safetensors")} <= hub.downloaded(REPO)
