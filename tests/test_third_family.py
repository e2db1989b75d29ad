"""Plugins as their users get them: built, installed with core in a new environment, and removed again."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from splitlearn_core.testing.worlds import tiny_model, write_checkpoint
from support.warm import WarmInterpreter

ROOT = Path(__file__).resolve().parent.parent

#: What somebody writes who wants llama, and all of it.
LLAMA_MODULE = '''\
"""Llama for splitlearn: model type ``llama``."""

from splitlearn_core import ModelFamily, hookimpl


@hookimpl
def splitlearn_model_families():
    return [ModelFamily(model_type="llama", architecture="LlamaForCausalLM")]
'''

LLAMA_PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "splitlearn-llama"
version = "0.3.1"
dependencies = ["splitlearn-core>=0.1"]

[project.entry-points."splitlearn.families"]
llama = "splitlearn_llama"
"""

#: Distribution -> its model types.
PLUGINS = {
    "splitlearn-gpt2": ["gpt2"],
    "splitlearn-qwen2": ["qwen2"],
    "splitlearn-gemma": ["gemma", "gemma2", "gemma3", "gemma3_text"],
}


class Environment:
    """A virtual environment that sees this one's third-party packages, and of splitlearn only what is installed."""

    def __init__(self, folder: Path, libraries: Path, warm: WarmInterpreter) -> None:
        venv.create(folder, symlinks=True)
        self._bin = folder / ("Scripts" if os.name == "nt" else "bin")
        self.packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
        self._warm = warm.write(self._bin / "warm", self._bin / "python")
        (self.packages / "libraries.pth").write_text(f"{libraries}\n")

    def pip(self, *arguments: object) -> None:
        """Run this interpreter's pip on the environment, with no index to ask."""
        python = self._bin / "python"
        command = [sys.executable, "-m", "pip", "--quiet", "--isolated", "--python", python, *arguments]
        result = run(*command)
        assert result.returncode == 0, result.stdout + result.stderr

    def install(self, *packages: Path) -> None:
        self.pip("install", "--no-deps", "--no-build-isolation", "--no-index", *packages)

    def splitlearn(self, *arguments: object, **variables: str) -> CompletedProcess[str]:
        """Run the environment's own console script."""
        return run(self._warm, self._bin / "splitlearn", *arguments, **variables)

    def model_types(self) -> dict[str, str]:
        """Ask the command line for the installed model types, each with its status."""
        result = self.splitlearn("plugins", "--check", "--json")
        assert result.returncode == 0, result.stderr
        return {row["model_type"]: row["status"] for row in json.loads(result.stdout)}


def run(*command: object, **variables: str) -> CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        env={**os.environ, "HF_HUB_OFFLINE": "1", **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def digest(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.suffix != ".pyc"
    }


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Links to everything that is installed here, less splitlearn: its distributions would be discovered."""
    folder = tmp_path_factory.mktemp("libraries")
    for packages in dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))):
        for entry in Path(packages).iterdir():
            if "splitlearn" not in entry.name and entry.suffix != ".pth":
                (folder / entry.name).symlink_to(entry)
    return folder


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The packages of this repository, built from their source once."""
    folder = tmp_path_factory.mktemp("wheels")
    sources = [ROOT / "core", *(ROOT / "plugins" / name.removeprefix("splitlearn-") for name in PLUGINS)]
    command = (sys.executable, "-m", "pip", "--quiet", "--isolated", "wheel", "--wheel-dir", folder)
    result = run(*command, "--no-deps", "--no-build-isolation", "--no-index", *sources)
    assert result.returncode == 0, result.stdout + result.stderr
    return {path.name.split("-")[0].replace("_", "-"): path for path in folder.glob("*.whl")}


@pytest.fixture
def environment(tmp_path: Path, libraries: Path, warm: WarmInterpreter) -> Environment:
    return Environment(tmp_path / "env", libraries, warm)


@pytest.fixture
def llama_source(tmp_path: Path) -> Path:
    """The third family's package: a project file and one module."""
    folder = tmp_path / "splitlearn-llama"
    folder.mkdir()
    (folder / "pyproject.toml").write_text(LLAMA_PYPROJECT)
    (folder / "splitlearn_llama.py").write_text(LLAMA_MODULE)
    return folder


def tiny(folder: Path, model_type: str) -> Path:
    return write_checkpoint(folder, tiny_model(model_type))


def test_llama_is_fifteen_lines() -> None:
    """A new family needs no more than that."""
    assert len(LLAMA_MODULE.splitlines()) <= 15


def test_llama_comes_and_goes(
    environment: Environment, wheels: dict[str, Path], llama_source: Path, tmp_path: Path
) -> None:
    """Installing a package adds a family that verifies equal, removing it takes it away; core stays as it is."""
    known = sorted(name for names in PLUGINS.values() for name in names)
    environment.install(*wheels.values())
    core = environment.packages / "splitlearn_core"
    before = digest(core)
    checkpoint = tiny(tmp_path / "llama", "llama")
    verify = ("verify", checkpoint, "--split", 2, 4, "--json")

    environment.install(llama_source)
    assert environment.model_types() == dict.fromkeys([*known, "llama"], "ready")
    listed = json.loads(environment.splitlearn("plugins", "--json").stdout)
    row = next(row for row in listed if row["model_type"] == "llama")
    assert (row["distribution"], row["version"], row["module"]) == ("splitlearn-llama", "0.3.1", "splitlearn_llama")
    assert row["hooks"] == ["splitlearn_model_families"]
    verified = environment.splitlearn(*verify)
    assert verified.returncode == 0, verified.stderr
    answer = json.loads(verified.stdout)
    assert answer["equal"] is True
    assert answer["max_difference"] == 0
    assert len(answer["components"]) == 3

    environment.pip("uninstall", "--yes", "splitlearn-llama")
    assert sorted(environment.model_types()) == known
    refused = environment.splitlearn(*verify)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "Traceback" not in refused.stderr
    assert "'llama'" in refused.stderr
    assert ", ".join(known) in refused.stderr
    assert "pip install splitlearn-auto" in refused.stderr
    assert digest(core) == before


def test_core_alone(environment: Environment, wheels: dict[str, Path], tmp_path: Path) -> None:
    """Core knows no family: alone it lists none, and says what to install for a model."""
    environment.install(wheels["splitlearn-core"])
    assert environment.model_types() == {}
    people = environment.splitlearn("plugins")
    assert people.returncode == 0
    assert "pip install splitlearn-" in people.stdout
    refused = environment.splitlearn("plan", tiny(tmp_path / "qwen2", "qwen2"), "--split", 2, 4)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "installed: none" in refused.stderr
    assert "pip install splitlearn-qwen2" in refused.stderr


@pytest.mark.parametrize("distribution", PLUGINS)
def test_plugin_alone(environment: Environment, wheels: dict[str, Path], tmp_path: Path, distribution: str) -> None:
    """Each plugin works with core and no other: its families are ready, one verifies equal, and no other is seen.

    All of them are compared by the plugin's own tests, which the checks run beside core alone.
    """
    environment.install(wheels["splitlearn-core"], wheels[distribution])
    assert environment.model_types() == dict.fromkeys(PLUGINS[distribution], "ready")
    checkpoint = tiny(tmp_path / "own", PLUGINS[distribution][-1])
    result = environment.splitlearn("verify", checkpoint, "--split", 2, 4, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["equal"] is True
    stranger = "qwen2" if distribution != "splitlearn-qwen2" else "gpt2"
    refused = environment.splitlearn("plan", tiny(tmp_path / "stranger", stranger), "--split", 2, 4)
    assert refused.returncode == 1
    assert f"pip install splitlearn-{stranger}" in refused.stderr


def test_wheels_hold_their_package_and_nothing_else(wheels: dict[str, Path]) -> None:
    """No test, no benchmark and no neighbour travels in a wheel; type information and the bundled model do."""
    from zipfile import ZipFile

    assert sorted(wheels) == sorted(["splitlearn-core", *PLUGINS])
    for name, wheel in wheels.items():
        package = name.replace("-", "_")
        names = ZipFile(wheel).namelist()
        assert {entry.split("/")[0].split("-")[0] for entry in names} == {package}
        assert f"{package}/py.typed" in names
        assert not [entry for entry in names if "/tests/" in entry or entry.endswith(".pyc")]
    bundled = [entry for entry in ZipFile(wheels["splitlearn-gpt2"]).namelist() if "/bundled/" in entry]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {Path(entry).name for entry in bundled}


def test_variables_block_a_plugin(environment: Environment, wheels: dict[str, Path], llama_source: Path) -> None:
    """SPLITLEARN_PLUGINS and SPLITLEARN_DISABLE_PLUGINS leave a plugin installed and out of use, and say so."""
    environment.install(wheels["splitlearn-core"], wheels["splitlearn-qwen2"], llama_source)

    def statuses(**variables: str) -> dict[str, str]:
        rows = json.loads(environment.splitlearn("plugins", "--json", **variables).stdout)
        return {row["model_type"]: row["status"] for row in rows}

    assert statuses() == {"llama": "ready", "qwen2": "ready"}
    assert statuses(SPLITLEARN_PLUGINS="qwen2") == {"llama": "blocked", "qwen2": "ready"}
    assert statuses(SPLITLEARN_PLUGINS="splitlearn-llama") == {"llama": "ready", "qwen2": "blocked"}
    assert statuses(SPLITLEARN_PLUGINS="") == {"llama": "blocked", "qwen2": "blocked"}
    assert statuses(SPLITLEARN_DISABLE_PLUGINS="llama") == {"llama": "blocked", "qwen2": "ready"}
