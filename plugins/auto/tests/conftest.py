"""A world in which plugins are installed, and the command line in this process."""

from __future__ import annotations

import copy
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from splitlearn_core.plugins.registry import reset_registry
from splitlearn_core.testing.installing import write_plugin

PLUGIN = """
from splitlearn_core import ModelFamily, hookimpl


@hookimpl
def splitlearn_model_families():
    return [ModelFamily(model_type="{model_type}", architecture="LlamaForCausalLM")]
"""


class World:
    """A folder on ``sys.path`` with plugins as pip would leave them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, interpreter: Callable[[], str]) -> None:
        self.folder = folder
        self._interpreter = interpreter
        folder.mkdir()
        monkeypatch.syspath_prepend(str(folder))

    def source(self, model_type: str) -> str:
        """Return the text of a plugin."""
        return PLUGIN.format(model_type=model_type)

    def install(self, model_type: str, source: str = "") -> None:
        """Write a plugin, as pip would leave it."""
        write_plugin(self.folder, model_type, source or self.source(model_type))
        importlib.invalidate_caches()
        reset_registry()

    def warm_python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run an interpreter that has imported torch and transformers already, in this world and without a network."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SPLITLEARN_", "HF_"))}
        path = os.pathsep.join(filter(None, (str(self.folder), kept.get("PYTHONPATH", ""))))
        return subprocess.run(
            [self._interpreter(), *arguments],
            env={**kept, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )


@pytest.fixture(autouse=True)
def untouched_process(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Forget what a test imported from its own folders, and every variable that chooses plugins."""
    for name in ("SPLITLEARN_PLUGINS", "SPLITLEARN_DISABLE_PLUGINS", "SPLITLEARN_TRACE"):
        monkeypatch.delenv(name, raising=False)
    # What is found out about a type is kept there.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    reset_registry()
    before = set(sys.modules)
    yield
    base = str(tmp_path_factory.getbasetemp())
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(base):
            del sys.modules[name]
    reset_registry()


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> World:
    """Return an empty world for plugins."""

    def interpreter() -> str:
        try:
            return str(request.getfixturevalue("warm").path)
        except pytest.FixtureLookupError:
            # This package is tested alone, without what the tests of the repository share.
            return sys.executable

    return World(tmp_path / "site", monkeypatch, interpreter)


@pytest.fixture(scope="session")
def examined() -> Callable[..., Any]:
    """Return a function that examines each configuration once, and returns a copy of what it has found."""
    from splitlearn_auto.examining import examine

    derived: dict[str, Any] = {}

    def once(model_type: str, stated: Mapping[str, Any]) -> Any:
        key = json.dumps([model_type, stated], sort_keys=True)
        if key not in derived:
            derived[key] = examine(model_type, stated)
        return copy.deepcopy(derived[key])

    return once


@pytest.fixture
def examined_once(examined: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let commands examine so: for tests that begin where the examination has ended."""
    monkeypatch.setattr("splitlearn_auto.examining.examine", examined)


@pytest.fixture
def llama(world: World) -> World:
    """Return a world in which a llama plugin is installed."""
    world.install("llama")
    return world


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs the command line in this process: exit code, stdout, stderr."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        from splitlearn_core.cli.main import main

        monkeypatch.setattr(sys, "argv", ["splitlearn", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        shown = capsys.readouterr()
        return int(end.value.code or 0), shown.out, shown.err

    return run
