"""A cluster, a plugin for llama and a small checkpoint."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from splitlearn_core.plugins.registry import reset_registry
from splitlearn_core.testing.installing import write_plugin

PLUGIN = (
    "from splitlearn_core import ModelFamily, hookimpl\n\n\n@hookimpl\ndef splitlearn_model_families():\n"
    "    return [ModelFamily(model_type='llama', architecture='LlamaForCausalLM')]\n"
)


def _load(name: str) -> ModuleType:
    """Import a module next to this file, which pytest does not put on the path."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cluster = _load("local_cluster")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs Ray."""
    for item in items:
        if "ray" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ray)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a plugin for llama, for the processes of all tests."""
    shared = _shared(tmp_path_factory) / "site"
    if not shared.exists():
        write_plugin(shared, "llama", PLUGIN)
    return shared


@pytest.fixture(autouse=True)
def llama(site: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Install that plugin here."""
    for name in ("SPLITLEARN_PLUGINS", "SPLITLEARN_DISABLE_PLUGINS", "SPLITLEARN_TRACE"):
        monkeypatch.delenv(name, raising=False)
    # Ray's library sets it when it is imported.
    monkeypatch.setenv("RAY_CLIENT_MODE", "0")
    monkeypatch.syspath_prepend(str(site))
    reset_registry()
    yield
    reset_registry()
    sys.modules.pop("splitlearn_llama", None)


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from splitlearn_core.testing.worlds import tiny_model, write_checkpoint

    return write_checkpoint(tmp_path_factory.mktemp("single"), tiny_model("llama", num_hidden_layers=6))


@pytest.fixture(scope="session")
def variables(site: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The variables for the users of the cluster, which runs for the whole session."""
    cluster.requires_ray()
    # The machines of a cluster have what their actors need; the llama plugin is on the path of this one.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH", "")))))
        using = cluster.local_cluster(_shared(tmp_path_factory) / "ray")
        found = using.__enter__()
    from splitlearn_ray.cluster import end_clusters

    yield found
    end_clusters()
    using.__exit__(None, None, None)


@pytest.fixture
def ray(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the cluster in this test."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def _shared(factory: pytest.TempPathFactory) -> Path:
    """Return a folder that the processes of a parallel run have in common."""
    base = factory.getbasetemp()
    return base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
