"""A path that begins with ``~`` is in the home, wherever one is taken, and no folder is called so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from splitlearn_core import (
    ModelConfig,
    ModelFactory,
    ModelLoader,
    SplitLearnError,
    load_component,
    load_split_directory,
    load_split_model,
    merge_split,
    plan_split,
    save_split,
)
from splitlearn_core.adapters.adapter_files import check_adapter_target
from splitlearn_core.checkpoint.source import open_source
from splitlearn_core.manager.config import load_configs
from splitlearn_core.storage.directory import verify_saved
from splitlearn_core.user_paths import user_path

CUTS = (2, 4)


@pytest.fixture
def home(llama: Any, single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a home with a model ``m``; the working directory is another folder."""
    folder, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    shutil.copytree(single, folder / "m")
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(elsewhere)
    return folder


def test_python_takes_a_home(home: Path) -> None:
    assert plan_split("~/m", CUTS).num_layers == 6
    assert load_split_model(None, CUTS, "~/m", parts=("trunk",)).trunk is not None
    save_split("~/m", "~/parts", CUTS)
    assert (home / "parts/trunk/config.json").is_file()
    assert load_split_directory("~/parts").trunk is not None
    assert load_component("~/parts", "trunk").start_layer == CUTS[0]
    assert verify_saved("~/parts").sound
    merge_split("~/parts", out="~/whole")
    assert (home / "whole/config.json").is_file()
    kept: dict[str, Any] = {"storage_path": "~/kept", "auto_save": True}
    ModelFactory.create_split_models("llama", "~/m", *CUTS, **kept)
    ModelFactory.create_split_models("llama", Path("~/m"), *CUTS, **kept)
    assert (home / "kept/trunk").is_dir()
    assert check_adapter_target("~/adapter") == home / "adapter"
    assert not list(Path.cwd().iterdir())


def test_the_manager_takes_a_home(home: Path) -> None:
    config = ModelConfig(model_id="trunk", model_type="llama", model_path="~/m", component="trunk", split_points=CUTS)
    assert ModelLoader.load_from_config(config) is not None
    models = [{"model_id": "trunk", "model_type": "llama", "model_path": "~/m", "component": "trunk"}]
    (home / "models.json").write_text(json.dumps({"models": [{**models[0], "split_points": list(CUTS)}]}))
    assert load_configs("~/models.json")[0].model_path == "~/m"


def test_a_cache_is_in_the_home(home: Path) -> None:
    """As huggingface_hub has its own variables."""
    repository, commit = home / "cache/models--owner--name", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    shutil.copytree(home / "m", repository / "snapshots" / commit)
    source = open_source("owner/name", cache_dir="~/cache", local_files_only=True)
    assert source.path("config.json") == repository / "snapshots" / commit / "config.json"


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "~/m", "--split", "2", "4"),
        ("split", "~/m", "--split", "2", "4", "--out", "~/new"),
        ("split", "~/m", "--split", "2", "4", "--out", "~/new", "--dry-run"),
        ("verify", "~/parts"),
        ("merge", "~/parts", "--out", "~/whole"),
        ("plugins", "new", "mistral", "--from", "~/mistral.json", "--dry-run"),
    ],
    ids=" ".join,
)
def test_the_command_line_takes_a_home(home: Path, cli: Callable[..., Any], arguments: tuple[str, ...]) -> None:
    """Where no shell has put the home in already: in quotation marks, and after an equals sign."""
    save_split("~/m", "~/parts", CUTS)
    (home / "mistral.json").write_text(json.dumps({"model_type": "mistral"}))
    code, _, error = cli(*arguments)
    assert code == 0, error
    assert not list(Path.cwd().iterdir())


def test_the_home_of_nobody_is_refused() -> None:
    with pytest.raises(SplitLearnError, match="unknown user"):
        user_path("~nobody-of-this-name/m")
