"""What a load requested over HTTP may use: folders that the file names, and no token of the server's user."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from serving import ScriptedLoader, StatusServer
from splitlearn_core.errors import ConfigurationError
from splitlearn_core.manager.config import ModelConfig, read_config_file
from splitlearn_serve.permissions import RequestRules, request_problems

SECRET = "my-private-file.txt"


def config(path: str | None, model_type: str = "llama", **values: Any) -> ModelConfig:
    if model_type in ("huggingface", "pytorch"):
        kind: dict[str, Any] = {"architecture": "torch.nn:Identity"} if model_type == "pytorch" else {}
    else:
        kind = {"component": "trunk", "split_points": (1, 2)}
    return ModelConfig(model_id="x", model_type=model_type, model_path=path, **kind, **values)


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make folders: ``root`` may be used, ``private`` may not, and there are links from the one to the other."""
    for name in ("root/model", "root/linked", "private/model", "cwd/owner/name", "home/models"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "private" / SECRET).touch()
    (tmp_path / "private" / "model" / SECRET).touch()
    (tmp_path / "private" / "weights.pt").touch()
    (tmp_path / "cwd" / "owner" / "name" / SECRET).touch()
    (tmp_path / "root" / "out").symlink_to(tmp_path / "private")
    (tmp_path / "root" / "nowhere").symlink_to(tmp_path / "private" / "none")
    (tmp_path / "root" / "again").symlink_to(tmp_path / "root" / "model")
    (tmp_path / "root" / "loop").symlink_to(tmp_path / "root" / "loop")
    (tmp_path / "root" / "linked" / "config.json").symlink_to(tmp_path / "private" / SECRET)
    (tmp_path / "root-2").mkdir()
    (tmp_path / "alias").symlink_to(tmp_path / "root")
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


def rules(places: Path, *models: ModelConfig, **settings: Any) -> RequestRules:
    return RequestRules.of({"model_roots": [str(places / "root")], **settings}, models)


OUTSIDE = [
    "{}/private", "{}/private/model", "{}/private/none", "{}/root/../private", "{}/root/../private/none",
    "{}/root/out", "{}/root/out/model", "{}/root/out/none", "{}/root/nowhere", "{}/root/loop/../out", "{}/root-2",
    "{}", "/", "//", "/etc/passwd", "../private", "../private/none", "./owner/name", "./none", ".", "..", "~",
    "~/models",     "~root", "~root/x", "~nobody-of-this-name/x", "a/b/c", "owner/../../private", "owner/name/", "file:///etc",
    "{}/private/weights.pt", "x\n/etc", "a" * 5000, "/" + "a" * 5000, "hub:../private", "hub:/etc", "hub:",
]  # fmt: skip


@pytest.mark.parametrize("model_type", ["llama", "huggingface", "pytorch"])
@pytest.mark.parametrize("path", OUTSIDE)
def test_outside(places: Path, path: str, model_type: str) -> None:
    """What is not in a root is refused in the same words, whether it is there or not."""
    refused = []
    for asked in (path.format(places), str(places / "private" / "surely-not-there")):
        with pytest.raises(ConfigurationError) as error:
            rules(places).permitted(config(asked, model_type))
        refused.append((error.value.message, error.value.hint))
    assert refused[0] == refused[1]
    assert str(places) not in "".join(refused[0])


@pytest.mark.parametrize(
    ("path", "real"),
    [
        ("{}/root/model", "root/model"),
        ("{}/root/model/", "root/model"),
        ("{}/root/./model/../model", "root/model"),
        ("{}/root/out/../model", "root/model"),
        ("{}/root/again", "root/model"),
        ("{}/root/not-there", "root/not-there"),
        ("{}/alias/model", "root/model"),
        ("../root/model", "root/model"),
        ("~/models", "home/models"),
    ],
)
def test_inside(places: Path, path: str, real: str) -> None:
    """What is in a root is loaded from where it really is, by every way of writing it."""
    roots = [str(places / "alias"), str(places / "root"), "~/models"]

    permitted = rules(places, model_roots=roots).permitted(config(path.format(places)))

    assert permitted.model_path == os.path.realpath(places / real)


def test_links_of_files(places: Path) -> None:
    """A checkpoint of which a file is a link to outside is refused: an error would quote what it holds."""
    with pytest.raises(ConfigurationError, match="a link to outside"):
        rules(places).permitted(config(str(places / "root" / "linked")))
    both = [str(places / "root"), str(places / "private")]
    assert rules(places, model_roots=both).permitted(config(str(places / "root" / "linked"))).model_path


@pytest.mark.parametrize("model_type", ["llama", "huggingface"])
@pytest.mark.parametrize("name", ["owner/name", "gpt2", "hub:owner/name"])
def test_names_on_the_hub(places: Path, name: str, model_type: str) -> None:
    """A name is the Hub's, and never a folder in the server's working directory; the file may forbid even that."""
    (places / "cwd" / "gpt2").mkdir()

    assert rules(places).permitted(config(name, model_type)).model_path == "hub:" + name.removeprefix("hub:")
    with pytest.raises(ConfigurationError, match="Hub"):
        rules(places, hub=False).permitted(config(name, model_type))


def test_a_name_that_is_a_folder_of_a_root(places: Path) -> None:
    """As in the file, a folder goes before the Hub, where the file lets it be named."""
    permitted = rules(places, model_roots=["owner"]).permitted(config("owner/name"))

    assert permitted.model_path == os.path.realpath(places / "cwd" / "owner" / "name")


def test_what_the_file_names(places: Path) -> None:
    """The path of a model of the file may be named as it stands there, and nothing below it."""
    filed = config(str(places / "private" / "model"))

    allowed = rules(places, filed)

    assert allowed.permitted(config(filed.model_path)).model_path == filed.model_path
    with pytest.raises(ConfigurationError):
        allowed.permitted(config(f"{filed.model_path}/x"))
    assert allowed.permitted(config("bundled:gpt2")).model_path == "bundled:gpt2"


@pytest.mark.parametrize("given", [None, False])
def test_tokens(places: Path, given: bool | None) -> None:
    """None is sent unless the file says so; a request may still do without."""
    assert rules(places).permitted(config("a/b", token=given)).token is False
    assert rules(places, token="hf_readonly").permitted(config("a/b")).token == "hf_readonly"
    assert rules(places, token=True).permitted(config("a/b", token=given)).token is (given is None)
    assert "hf_readonly" not in repr(rules(places, token="hf_readonly"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("revision", "../../../../etc"),
        ("revision", "/etc/passwd"),
        ("revision", "refs/../../x"),
        ("revision", "a b"),
        ("revision", ""),
        ("attn_implementation", "someone/kernel"),
        ("attn_implementation", "paged|someone/kernel"),
        ("attn_implementation", "flash_attention_2"),
        ("attn_implementation", ["sdpa"]),
        ("architecture", "os:system"),
        ("cache_dir", "/tmp/x"),
        ("host_options", {"address": "elsewhere:6379"}),
        ("allow_pickle", True),
        ("allow_pickle", "yes"),
        ("token", "hf_x"),
        ("token", True),
    ],
)
def test_fields_that_are_refused(field: str, value: object) -> None:
    """What names files, fetches code or uses rights is not for requests."""
    (reason,) = RequestRules().refusals({field: value})

    assert reason.startswith(f"{field}: ")


def test_fields_that_are_not() -> None:
    """What is part of torch and transformers, what the file's models name, and names of versions."""
    filed = config("a/b", attn_implementation="flash_attention_2")
    allowed = RequestRules.of({}, [filed])

    for revision in ("main", "refs/pr/7", "v1.0", "0" * 40, None):
        assert allowed.refusals({"revision": revision}) == []
    for attention in ("eager", "sdpa", "flex_attention", "flash_attention_2", None):
        assert allowed.refusals({"attn_implementation": attention}) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model_root": []}, "did you mean 'model_roots'?"),
        ({"model_roots": "/srv"}, "is not a list of folders"),
        ({"model_roots": [7]}, "is not a list of folders"),
        ({"model_roots": ["/no/such/folder"]}, "there is no folder '/no/such/folder'"),
        ({"hub": "yes"}, "is neither true nor false"),
        ({"token": "hf_secret "}, "token: "),
        ({"token": 7}, "token: "),
    ],
)
def test_settings(settings: dict[str, Any], said: str) -> None:
    """An invalid table is reported, without the token."""
    (problem,) = request_problems(settings)

    assert said in problem
    assert "hf_secret" not in problem
    with pytest.raises(ConfigurationError):
        RequestRules.of(settings)


def test_the_file(tmp_path: Path) -> None:
    """The table stands in the file, and its problems are reported with all others."""
    path = tmp_path / "models.toml"
    path.write_text(f"models = []\n[http]\nmodel_roots = ['{tmp_path}']\nhub = false\n")
    assert read_config_file(path, check_http=request_problems).http == {"model_roots": [str(tmp_path)], "hub": False}
    path.write_text("models = 7\nhttp = 7\n[manager]\n")
    with pytest.raises(ConfigurationError) as error:
        read_config_file(path, check_http=request_problems)
    assert "http: 7 is not a table" in error.value.message
    assert "models: 7 is not a list" in error.value.message


@pytest.fixture
def serve(llama: Any) -> Iterator[Callable[..., StatusServer]]:
    with ExitStack() as stack:

        def serve(*configs: ModelConfig, **options: Any) -> StatusServer:
            return stack.enter_context(StatusServer(configs, **options))

        yield serve


@pytest.mark.parametrize("model_type", ["llama", "huggingface", "pytorch"])
def test_nothing_says_what_is_outside(serve: Callable[..., StatusServer], places: Path, model_type: str) -> None:
    """Neither answers, nor lists, nor events, nor metrics tell a folder that is there from one that is not."""
    allowed: dict[str, Any] = {"architecture": "torch.nn:Identity"} if model_type == "pytorch" else {}
    if model_type == "llama":
        allowed = {"component": "trunk", "split_points": [1, 2]}
    filed = ModelConfig(
        model_id="own", model_type="pytorch", model_path=str(places / "own.pt"), architecture="torch.nn:Identity"
    )
    server = serve(filed, http={"model_roots": [str(places / "root")]})
    seen = []
    for path in (places / "private", places / "root" / "out", places / "none"):
        body = {"model_id": "x", "model_type": model_type, "model_path": str(path), **allowed}
        for target in ("/api/models", "/api/models?wait=true"):
            answer = server.request("POST", target, body)
            assert answer.status == 422
            seen.append(answer.body)
    assert len(set(seen)) == 1
    assert server.request("GET", "/api/models/x").status == 404
    for path in ("/api/models", "/api/statistics", "/metrics"):
        assert "private" not in server.request("GET", path).body.decode()


def test_a_reload_is_a_request_too(serve: Callable[..., StatusServer], places: Path) -> None:
    """A new configuration is held against the same rules, and the model stays as it was."""
    filed = config(str(places / "root" / "model"))
    server = serve(filed, loader=ScriptedLoader(), min_residency=0, http={"model_roots": [str(places / "root")]})
    server.wait_until(lambda manager: any(info.ready for info in manager.list_models()))
    body = {**filed.to_dict(), "model_path": str(places / "private")}

    assert server.request("POST", "/api/models/x/reload?wait=true", body).status == 422
    assert server.get("/api/models/x")["generation"] == 1
    assert server.request("POST", "/api/models/x/reload?wait=true").status == 200


def test_configurations_of_requests_are_not_kept_for_ever(
    serve: Callable[..., StatusServer], places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of models that are gone, only the newest can be loaded again by their id."""
    monkeypatch.setattr("splitlearn_serve.control._REMEMBERED", 3)
    server = serve(
        config("/own"), loader=ScriptedLoader(), min_residency=0, http={"model_roots": [str(places / "root")]}
    )
    for number in range(8):
        body = {**config(str(places / "root" / "model")).to_dict(), "model_id": f"m{number}"}
        assert server.request("POST", "/api/models?wait=true", body).status == 200
        assert server.request("DELETE", f"/api/models/m{number}").status == 200

    assert {model["model_id"] for model in server.get("/api/models")["not_loaded"]} <= {"m4", "m5", "m6", "m7"}
    assert server.request("POST", "/api/models/m7/load?wait=true").status == 200
    assert server.request("POST", "/api/models/m1/load").status == 404
    assert server.get("/api/models/x")["status"] == "ready"
