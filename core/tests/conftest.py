"""A process that no other test has touched, and a small world of our own: a llama plugin and checkpoints."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from splitlearn_core.plugins import metadata
from splitlearn_core.plugins.metadata import PluginEntry
from splitlearn_core.plugins.registry import reset_registry
from support.warm import WarmInterpreter

#: The text of a sound plugin; the placeholders are its model type and its architecture.
PLUGIN = """
from splitlearn_core import ModelFamily, hookimpl


@hookimpl
def splitlearn_model_families():
    return [ModelFamily(model_type="{model_type}", architecture="LlamaForCausalLM")]
"""


class World:
    """A folder on ``sys.path`` with plugins as pip would leave them."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, warm: Callable[[], WarmInterpreter] | None = None
    ) -> None:
        self.folder = folder
        self._warm = warm
        self._monkeypatch = monkeypatch
        folder.mkdir()
        monkeypatch.syspath_prepend(str(folder))

    def source(self, model_type: str) -> str:
        """Return the text of a sound plugin."""
        return PLUGIN.format(model_type=model_type)

    def marker(self, name: str) -> Path:
        """Return the path of the file that :meth:`marking` writes."""
        return self.folder / f"{name}.imported"

    def marking(self, name: str) -> str:
        """Return a statement that leaves a file behind when it is run."""
        return f"import pathlib\npathlib.Path({str(self.marker(name))!r}).touch()\n"

    def install(self, model_type: str, source: str | None = None, **options: Any) -> Path:
        """Write a plugin, sound unless ``source`` says otherwise, and return its dist-info folder."""
        from splitlearn_core.testing.installing import write_plugin

        write_plugin(self.folder, model_type, self.source(model_type) if source is None else source, **options)
        importlib.invalidate_caches()
        reset_registry()
        name = options.get("distribution") or f"splitlearn-{model_type}"
        return self.folder / f"{name.replace('-', '_')}-{options.get('version', '1.0')}.dist-info"

    def environment(self, **more: str) -> dict[str, str]:
        """Return the environment of a process that sees this world, and no network."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SPLITLEARN_", "HF_"))}
        path = os.pathsep.join(filter(None, (str(self.folder), kept.get("PYTHONPATH", ""))))
        return {**kept, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **more}

    def python(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a fresh interpreter in this world."""
        return self._run(sys.executable, *arguments, **environment)

    def warm_python(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run an interpreter that has imported torch and transformers already."""
        assert self._warm is not None
        return self._run(str(self._warm().path), *arguments, **environment)

    def _run(self, interpreter: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [interpreter, *arguments],
            env=self.environment(**environment),
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )


#: These have an answer about the types and hosts that tests of core take for unknown.
_LEFT_OUT = ("splitlearn-auto", "splitlearn-ray")


def _without_answers(discover: Callable[[], tuple[PluginEntry, ...]]) -> Callable[[], tuple[PluginEntry, ...]]:
    return lambda: tuple(entry for entry in discover() if entry.distribution not in _LEFT_OUT)


@pytest.fixture(autouse=True)
def untouched_process(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Forget what a test imported from its own folders, and every variable that chooses plugins."""
    monkeypatch.delenv("SPLITLEARN_PLUGINS", raising=False)
    monkeypatch.delenv("SPLITLEARN_DISABLE_PLUGINS", raising=False)
    monkeypatch.delenv("SPLITLEARN_TRACE", raising=False)
    monkeypatch.setattr(metadata, "discover", _without_answers(metadata.discover))
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
    return World(tmp_path / "site", monkeypatch, lambda: request.getfixturevalue("warm"))


@pytest.fixture
def llama(world: World) -> World:
    """Return a world in which a llama plugin is installed."""
    world.install("llama")
    return world


@pytest.fixture(scope="session")
def whole() -> Any:
    """Return the unsplit model that the checkpoints hold: llama, six layers, head and embedding apart."""
    from splitlearn_core.testing.worlds import tiny_model

    return tiny_model("llama")


@pytest.fixture(scope="session")
def tied_whole() -> Any:
    """Return an unsplit model whose head is its embedding."""
    from splitlearn_core.testing.worlds import tiny_model

    return tiny_model("llama", tie_word_embeddings=True)


@pytest.fixture(scope="session")
def _originals(whole: Any, tied_whole: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from splitlearn_core.testing.worlds import write_checkpoint

    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "single": write_checkpoint(folder / "single", whole),
        # About one layer a shard: every component has shards of its own.
        "sharded": write_checkpoint(folder / "sharded", whole, max_shard_size="30KB"),
        "tied": write_checkpoint(folder / "tied", tied_whole),
    }


@pytest.fixture
def checkpoint(_originals: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that makes a copy of a checkpoint: ``single``, ``sharded`` or ``tied``."""

    def copy(kind: str = "single") -> Path:
        return Path(shutil.copytree(_originals[kind], tmp_path / kind))

    return copy


@pytest.fixture
def single(checkpoint: Callable[[str], Path]) -> Path:
    """Return a checkpoint of one file, the test's to spoil."""
    return checkpoint("single")


@pytest.fixture
def sharded(checkpoint: Callable[[str], Path]) -> Path:
    """Return a checkpoint of several shards, the test's to spoil."""
    return checkpoint("sharded")


@pytest.fixture
def tied(checkpoint: Callable[[str], Path]) -> Path:
    """Return a checkpoint that holds one tensor for embedding and head."""
    return checkpoint("tied")


@pytest.fixture
def edit_json() -> Callable[..., None]:
    """Return a function that changes values of a JSON file; ``...`` takes one out."""

    def edit(path: Path, **changes: Any) -> None:
        content = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))

    return edit


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
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
