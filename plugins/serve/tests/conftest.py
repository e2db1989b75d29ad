"""A llama plugin and a small checkpoint, and no variable or command of the user's."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from splitlearn_core.testing.installing import write_plugin

PLUGIN = (
    "from splitlearn_core import ModelFamily, hookimpl\n\n\n@hookimpl\ndef splitlearn_model_families():\n"
    "    return [ModelFamily(model_type='llama', architecture='LlamaForCausalLM')]\n"
)


def _load(name: str) -> None:
    """Import a module next to this file, which pytest does not put on the path."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


_load("serving")
_load("proxy")


@pytest.fixture(autouse=True)
def chosen_plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forget what another test has found, and every variable that chooses plugins."""
    from splitlearn_core.plugins import metadata
    from splitlearn_core.plugins.registry import reset_registry

    for name in ("SPLITLEARN_PLUGINS", "SPLITLEARN_DISABLE_PLUGINS", "SPLITLEARN_TRACE"):
        monkeypatch.delenv(name, raising=False)
    # If splitlearn-auto is installed, it has an answer about the types that these tests take for unknown.
    found = metadata.discover
    others = lambda: tuple(entry for entry in found() if entry.distribution != "splitlearn-auto")  # noqa: E731
    monkeypatch.setattr(metadata, "discover", others)
    reset_registry()
    yield
    reset_registry()


@pytest.fixture
def llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Install a plugin for llama."""
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    write_plugin(tmp_path / "site", "llama", PLUGIN)
    yield
    sys.modules.pop("splitlearn_llama", None)


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a llama of six layers in one file."""
    from splitlearn_core.testing.worlds import tiny_model, write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("single") / "model", tiny_model("llama"))
