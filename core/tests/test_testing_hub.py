"""The loopback hub, seen by the real client of the Hugging Face Hub."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import HfApi, constants, file_download, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from support.hub import Faults, LoopbackHub

pytestmark = [pytest.mark.libs, pytest.mark.light]

REPO = "someone/tiny"
WEIGHTS = "model.safetensors"
WAIT = 30.0


def safetensors_bytes(tensors: int = 2) -> bytes:
    names = [f"layer.{index}.weight" for index in range(tensors)]
    header = {
        name: {"dtype": "U8", "shape": [1000], "data_offsets": [index * 1000, index * 1000 + 1000]}
        for index, name in enumerate(names)
    }
    encoded = json.dumps(header).encode()
    data = bytes(value % 251 for value in range(1000 * tensors))
    return len(encoded).to_bytes(8, "little") + encoded + data


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(("HF_", "HUGGING")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "published"
    (folder / "extra" / "deep").mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "tiny"}')
    (folder / WEIGHTS).write_bytes(safetensors_bytes())
    (folder / "empty.txt").touch()
    (folder / "extra" / "deep" / "a b+c%é.txt").write_text("odd name")
    return folder


@pytest.fixture
def hub(folder: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub() as hub:
        hub.add_repo(REPO, folder)
        yield hub


def fetch(hub: LoopbackHub, cache: Path, filename: str = WEIGHTS, **options: Any) -> Path:
    options = {"repo_id": REPO, "endpoint": hub.endpoint, "cache_dir": cache, "token": False, **options}
    return Path(hf_hub_download(filename=filename, **options))


def raw(hub: LoopbackHub, path: str, method: str = "GET", **headers: str) -> tuple[int, http.client.HTTPMessage, bytes]:
    address = urllib.parse.urlsplit(hub.endpoint)
    connection = http.client.HTTPConnection("127.0.0.1", address.port or 0, timeout=WAIT)
    try:
        connection.request(method, path, headers=headers)
        with connection.getresponse() as response:
            return response.status, response.headers, response.read()
    finally:
        connection.close()


def test_download_of_one_file(hub: LoopbackHub, folder: Path, tmp_path: Path) -> None:
    path = fetch(hub, tmp_path / "cache")
    assert path.read_bytes() == (folder / WEIGHTS).read_bytes()
    assert path.resolve().name == hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    assert path.parent.name == HfApi(endpoint=hub.endpoint, token=False).model_info(REPO).sha
    assert hub.downloaded(REPO) == {WEIGHTS}
    assert [(r.method, r.status) for r in hub.requests if r.filename] == [("HEAD", 200), ("GET", 200)]
    assert hub.requests[1].sent == hub.requests[1].length == path.stat().st_size


def test_small_files_are_cached_under_their_git_id(hub: LoopbackHub, folder: Path, tmp_path: Path) -> None:
    path = fetch(hub, tmp_path / "cache", "config.json")
    assert path.resolve().name == git_sha1((folder / "config.json").read_bytes())


def test_snapshot_of_some_files(hub: LoopbackHub, tmp_path: Path) -> None:
    wanted, cache = ["*.json", "extra/*", "*.txt"], tmp_path / "cache"
    path = Path(snapshot_download(REPO, allow_patterns=wanted, endpoint=hub.endpoint, cache_dir=cache, token=False))
    found = {entry.relative_to(path).as_posix() for entry in path.rglob("*") if entry.is_file()}
    assert found == {"config.json", "empty.txt", "extra/deep/a b+c%é.txt"}
    # The client knows that an empty file is empty from its headers and does not ask for the body.
    assert hub.downloaded(REPO) == found - {"empty.txt"}
    assert (path / "extra" / "deep" / "a b+c%é.txt").read_text() == "odd name"


def test_one_part_names_and_commits(hub: LoopbackHub, folder: Path, tmp_path: Path) -> None:
    commit = "0123456789" * 4
    assert hub.add_repo("gpt2", folder, commit) == commit
    for revision in ("main", commit):
        path = fetch(hub, tmp_path / revision, "config.json", repo_id="gpt2", revision=revision)
        assert path.parent.name == commit
    assert HfApi(endpoint=hub.endpoint, token=False).model_info("gpt2", revision=commit).sha == commit
    assert hub.downloaded("gpt2") == {"config.json"}
    assert hub.downloaded(REPO) == set()


def test_a_second_publication_moves_the_branch(hub: LoopbackHub, tmp_path: Path) -> None:
    old = fetch(hub, tmp_path / "cache", "config.json")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    commit = hub.add_repo(REPO, other)
    assert fetch(hub, tmp_path / "cache", "config.json").parent.name == commit
    again = fetch(hub, tmp_path / "again", "config.json", revision=old.parent.name)
    assert again.read_text() == old.read_text() != "{}"
    hub.add_repo(REPO, other, revision="refs/pr/1")
    assert fetch(hub, tmp_path / "pr", "config.json", revision="refs/pr/1").read_text() == "{}"


def test_model_info(hub: LoopbackHub, folder: Path) -> None:
    info = HfApi(endpoint=hub.endpoint, token=False).model_info(REPO, files_metadata=True)
    assert info.id == REPO
    assert info.private is False
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
    assert set(siblings) == {"config.json", WEIGHTS, "empty.txt", "extra/deep/a b+c%é.txt"}
    config, weights = siblings["config.json"], siblings[WEIGHTS]
    assert config.lfs is None
    assert config.blob_id == git_sha1((folder / "config.json").read_bytes())
    assert weights.lfs is not None
    assert weights.lfs.sha256 == hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    assert weights.size == weights.lfs.size == (folder / WEIGHTS).stat().st_size


def test_listing(hub: LoopbackHub) -> None:
    api = HfApi(endpoint=hub.endpoint, token=False)
    top = {entry.path for entry in api.list_repo_tree(REPO)}
    assert top == {"config.json", "empty.txt", "extra", WEIGHTS}
    everything = {entry.path for entry in api.list_repo_tree(REPO, recursive=True)}
    assert everything == top | {"extra/deep", "extra/deep/a b+c%é.txt"}
    assert [entry.path for entry in api.list_repo_tree(REPO, "extra")] == ["extra/deep"]
    assert set(api.list_repo_files(REPO)) == everything - {"extra", "extra/deep"}
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(REPO, "config.json"))
    infos = api.get_paths_info(REPO, ["extra", WEIGHTS, "nothing"])
    assert [info.path for info in infos] == ["extra", WEIGHTS]


@pytest.mark.parametrize("tensors", [2, 2000], ids=["short header", "header longer than the first range"])
def test_safetensors_metadata_reads_ranges(hub: LoopbackHub, folder: Path, tensors: int) -> None:
    data = safetensors_bytes(tensors)
    (folder / WEIGHTS).write_bytes(data)
    metadata = HfApi(endpoint=hub.endpoint, token=False).get_safetensors_metadata(REPO)
    assert set(metadata.weight_map) == {f"layer.{index}.weight" for index in range(tensors)}
    gets = [request for request in hub.requests if request.method == "GET"]
    assert [request.status for request in gets] == ([206] if tensors == 2 else [206, 206])
    assert gets[0].range == "bytes=0-100000"
    assert sum(request.sent for request in gets) <= min(len(data), 400_000)


@pytest.mark.parametrize(
    ("asked", "status", "expected"),
    [
        ("bytes=2-4", 206, slice(2, 5)),
        ("bytes=5-", 206, slice(5, None)),
        ("bytes=-3", 206, slice(-3, None)),
        ("bytes=-99999", 206, slice(None)),
        ("bytes=20-99999", 206, slice(20, None)),
        ("bytes=4-2", 200, slice(None)),
        ("bytes=0-1,3-4", 200, slice(None)),
        ("bytes=-", 200, slice(None)),
        ("bytes=22-", 416, None),
        ("bytes=-0", 416, None),
    ],
)
def test_ranges(hub: LoopbackHub, folder: Path, asked: str, status: int, expected: slice | None) -> None:
    data = (folder / "config.json").read_bytes()
    assert len(data) == 22
    answer, headers, body = raw(hub, f"/{REPO}/resolve/main/config.json", Range=asked)
    assert answer == status
    if expected is None:
        assert headers["Content-Range"] == "bytes */22"
        return
    assert body == data[expected]
    if status == 206:
        start, stop, _ = expected.indices(22)
        assert headers["Content-Range"] == f"bytes {start}-{stop - 1}/22"
    whole, _, _ = raw(hub, f"/{REPO}/resolve/main/config.json", "HEAD", Range=asked)
    assert whole == 200


def test_unknown_things_raise_the_errors_of_the_client(hub: LoopbackHub, tmp_path: Path) -> None:
    cache, api = tmp_path / "cache", HfApi(endpoint=hub.endpoint, token=False)
    with pytest.raises(RepositoryNotFoundError):
        fetch(hub, cache, repo_id="someone/else")
    with pytest.raises(RevisionNotFoundError):
        fetch(hub, cache, revision="v9")
    with pytest.raises(EntryNotFoundError):
        fetch(hub, cache, "nothing.json")
    assert list(cache.rglob(".no_exist/*/nothing.json")), "the commit was not named in the refusal"
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("gpt2")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="v9")
    assert not api.file_exists(REPO, "nothing.json")
    assert hub.downloaded(REPO) == set()


def test_private_and_gated_repositories(hub: LoopbackHub, folder: Path, tmp_path: Path) -> None:
    hub.add_repo("someone/hidden", folder, private=True, token="hf_right")
    hub.add_repo("someone/gated", folder, gated=True, token="hf_right")
    for name, error in (("someone/hidden", RepositoryNotFoundError), ("someone/gated", GatedRepoError)):
        for token in (False, "hf_wrong"):
            with pytest.raises(error):
                fetch(hub, tmp_path / "cache", repo_id=name, token=token)
        assert hub.downloaded(name) == set()
        fetch(hub, tmp_path / "cache", repo_id=name, token="hf_right")
        assert hub.downloaded(name) == {WEIGHTS}
    with pytest.raises(RepositoryNotFoundError):
        HfApi(endpoint=hub.endpoint, token=False).model_info("someone/hidden")
    assert HfApi(endpoint=hub.endpoint, token=False).model_info("someone/gated").gated == "manual"
    with pytest.raises(ValueError, match="token"):
        hub.add_repo("someone/hidden", folder, private=True)


def test_file_names_never_leave_the_directory(hub: LoopbackHub, folder: Path) -> None:
    (folder.parent / "secret.txt").write_text("secret")
    (folder / "link.txt").symlink_to(folder.parent / "secret.txt")
    (folder / "out").symlink_to(folder.parent, target_is_directory=True)
    inside = urllib.parse.quote(str(folder.parent / "secret.txt"), safe="")
    for name in ("../secret.txt", "%2e%2e%2fsecret.txt", "link.txt", "out/secret.txt", inside, "extra"):
        status, headers, body = raw(hub, f"/{REPO}/resolve/main/{name}")
        assert (status, headers["X-Error-Code"]) == (404, "EntryNotFound")
        assert body != b"secret"
    for method, path in (("GET", "/"), ("GET", "/api/whoami-v2"), ("POST", f"/api/models/{REPO}")):
        assert raw(hub, path, method)[0] == 404


def download_with_retry(hub: LoopbackHub, cache: Path) -> bytes:
    """Old clients leave a part of the file behind and fail; new ones resume by themselves."""
    try:
        return fetch(hub, cache).read_bytes()
    except Exception as error:
        if type(error).__name__ != "RemoteProtocolError":
            raise
    return fetch(hub, cache).read_bytes()


@pytest.mark.parametrize("ignore_range", [False, True])
def test_resumed_download(
    hub: LoopbackHub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ignore_range: bool
) -> None:
    # The client keeps of a cut download only its whole chunks, which are of 10 MB by default.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda seconds: None))
    hub.faults = Faults(ignore_range=ignore_range)
    hub.faults.break_connection(WEIGHTS, after=1234)
    assert download_with_retry(hub, tmp_path / "cache") == (folder / WEIGHTS).read_bytes()
    first, second = [request for request in hub.requests if request.method == "GET"]
    assert (first.status, first.sent) == (200, 1234)
    assert (second.status, second.range) == (200 if ignore_range else 206, "bytes=1200-")
    assert second.sent == second.length == first.length - (0 if ignore_range else 1200)


def test_connection_broken_more_than_once(hub: LoopbackHub) -> None:
    hub.faults.break_connection(WEIGHTS, after=0, times=2)
    for _ in range(2):
        with pytest.raises(http.client.IncompleteRead):
            raw(hub, f"/{REPO}/resolve/main/{WEIGHTS}")
    assert hub.downloaded(REPO) == set()
    assert raw(hub, f"/{REPO}/resolve/main/{WEIGHTS}")[0] == 200


def test_file_replaced_between_requests(hub: LoopbackHub, folder: Path) -> None:
    def replace(method: str, repo: str, filename: str) -> None:
        if method == "GET":
            (folder / filename).write_bytes(b"changed")

    path = f"/{REPO}/resolve/main/config.json"
    hub.faults.before_file = replace
    _, before, _ = raw(hub, path, "HEAD")
    _, after, body = raw(hub, path)
    assert body == b"changed"
    assert after["ETag"] == f'"{git_sha1(body)}"' != before["ETag"]


@pytest.mark.parametrize("after", [0, 500])
def test_held_download_waits_for_release(hub: LoopbackHub, folder: Path, tmp_path: Path, after: int) -> None:
    with ThreadPoolExecutor() as pool:
        with hub.hold(WEIGHTS, after) as hold:
            download = pool.submit(fetch, hub, tmp_path / "cache")
            assert hold.reached.wait(WAIT)
            assert not download.done()
            assert hub.requests[-1].sent == after
            assert hub.downloaded(REPO) == ({WEIGHTS} if after else set())
            fetch(hub, tmp_path / "cache", "config.json")
        assert download.result(WAIT).read_bytes() == (folder / WEIGHTS).read_bytes()


def test_big_files_count_as_lfs(hub: LoopbackHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("support.hub.LFS_BYTES", 22)
    _, headers, body = raw(hub, f"/{REPO}/resolve/main/config.json")
    assert headers["X-Linked-ETag"] == headers["ETag"] == f'"{hashlib.sha256(body).hexdigest()}"'
    assert headers["X-Linked-Size"] == "22"
    assert not [name for name in headers if "xet" in name.lower()]


def test_closing_releases_what_is_held(folder: Path) -> None:
    with ThreadPoolExecutor() as pool, ExitStack() as after_closing:
        with LoopbackHub() as hub:
            hub.add_repo(REPO, folder)
            hold = after_closing.enter_context(hub.hold(WEIGHTS))
            answer = pool.submit(raw, hub, f"/{REPO}/resolve/main/{WEIGHTS}")
            assert hold.reached.wait(WAIT)
        assert answer.result(WAIT)[2] == (folder / WEIGHTS).read_bytes()
    assert hub.downloaded(REPO) == {WEIGHTS}


def test_endpoint_from_the_environment(hub: LoopbackHub, folder: Path, tmp_path: Path) -> None:
    script = f"from huggingface_hub import hf_hub_download as get; print(get({REPO!r}, {WEIGHTS!r}))"
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "elsewhere")}
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    assert path.is_relative_to(tmp_path / "elsewhere")
    assert path.read_bytes() == (folder / WEIGHTS).read_bytes()
    assert hub.downloaded(REPO) == {WEIGHTS}
