"""What every package of the workspace has: a changelog of its version, its tests in its source archive, its licence."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import click
import pytest
from packaging.version import Version

import splitlearn_core
from splitlearn_core import cli, extension, testing
from splitlearn_core.plugins.known import COMMANDS
from support.command_lines import command_lines

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = [path.parent for path in sorted([ROOT / "core" / "pyproject.toml", *ROOT.glob("plugins/*/pyproject.toml")])]
SNAPSHOT = Path(__file__).with_name("package_commands.txt")
#: Modules of core with public names of their own.
PUBLIC_MODULES = (splitlearn_core, cli, testing)
#: Packages that do more than provide a family or a strategy, and pin the version of core for it.
EXTENSIONS = ("auto", "ray", "serve")


@pytest.fixture(params=PACKAGES, ids=lambda folder: folder.name)
def package(request: pytest.FixtureRequest) -> Path:
    """Return the folder of a package."""
    folder: Path = request.param
    return folder


def project(folder: Path) -> dict[str, Any]:
    return tomllib.loads((folder / "pyproject.toml").read_text())


def test_the_newest_heading_of_the_changelog_is_the_version(package: Path) -> None:
    """The changelog is named after its package and begins with the version that is built, or with what comes next."""
    title, *lines = (package / "CHANGELOG.md").read_text().splitlines()
    described = project(package)["project"]

    assert title == f"# Changelog of {described['name']}"
    newest = next(line for line in lines if line.startswith("## "))
    heading = re.fullmatch(r"## (?:Unreleased|(?P<version>\S+) \((?:unreleased|\d{4}-\d{2}-\d{2})\))", newest)
    assert heading, f"{newest!r} is neither '## Unreleased' nor '## VERSION (unreleased or a date)'"
    assert heading["version"] in (None, described["version"])


def test_the_index_names_every_changelog() -> None:
    """The changelog of the workspace leads to those of the packages."""
    named = re.findall(r"\]\((\S+/CHANGELOG\.md)\)", (ROOT / "CHANGELOG.md").read_text())

    assert sorted(named) == sorted(f"{folder.relative_to(ROOT).as_posix()}/CHANGELOG.md" for folder in PACKAGES)


def test_a_source_archive_holds_tests_readme_changelog_and_licence(package: Path) -> None:
    """The checks build it and run its tests, so what it leaves out would be missed elsewhere."""
    included = project(package)["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]

    assert set(included) >= {"src", "tests", "README.md", "CHANGELOG.md", "LICENSE"}
    assert [name for name in included if not (package / name).exists()] == []


def imported(source: Path) -> set[str]:
    """Return the names of ours that a file imports, each as ``module.name``."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.startswith("splitlearn_")}


@pytest.mark.parametrize("plugin", PACKAGES[1:], ids=lambda folder: folder.name)
def test_a_plugin_imports_what_is_public_and_no_other_plugin(plugin: Path) -> None:
    """Those of this repository stand where a stranger's would: on the names of ``splitlearn_core``."""
    public = {f"{module.__name__}.{name}" for module in PUBLIC_MODULES for name in module.__all__}
    public.add("splitlearn_core.errors")
    if plugin.name in EXTENSIONS:
        public |= {f"splitlearn_core.extension.{name}" for name in extension.__all__}
        assert any(line.startswith("splitlearn-core>=0.1,<0.2") for line in project(plugin)["project"]["dependencies"])
    own = f"splitlearn_{plugin.name}"
    sources = sorted((plugin / "src").rglob("*.py"))

    assert sources
    for source in sources:
        foreign = {name for name in imported(source) if name.split(".")[0] != own}
        assert foreign <= public, source


def test_every_name_of_the_extension_module_is_there(tmp_path: Path) -> None:
    """Each leads to what it names, and a package of this repository uses it, or that of a host in the documents."""
    sources = [source for plugin in EXTENSIONS for source in (ROOT / "plugins" / plugin).rglob("*.py")]
    (shown,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "hosts.md").read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "splitlearn_pipe.py").write_text(shown)
    sources.append(tmp_path / "splitlearn_pipe.py")
    used = {name for source in sources for name in imported(source)}

    for name in extension.__all__:
        assert getattr(extension, name) is not None
        assert f"splitlearn_core.extension.{name}" in used, name
    with pytest.raises(AttributeError, match="no_such_name"):
        extension.no_such_name  # noqa: B018


def package_commands() -> dict[str, click.Command]:
    """Return the commands that the packages of this repository add, by the words that lead to them, joined by dots."""
    commands = {}
    for plugin in PACKAGES[1:]:
        for name, value in project(plugin)["project"].get("entry-points", {}).get("splitlearn.commands", {}).items():
            module, _, attribute = value.partition(":")
            commands[name] = getattr(importlib.import_module(module), attribute)
            package, short_help = COMMANDS[name]
            assert package == project(plugin)["project"]["name"]
            assert (commands[name].name, commands[name].short_help) == (name.rpartition(".")[2], short_help)
    return commands


def test_commands_of_packages_are_those_that_core_knows_of() -> None:
    """What core says of a command where its package is missing or not imported is what the package says."""
    assert package_commands().keys() == COMMANDS.keys()


def test_commands_of_packages_are_those_that_were_reviewed() -> None:
    """As ``public_api.txt`` has those of core; ``PYTHONPATH=core/tests python tests/test_packages.py`` rewrites it."""
    assert written_commands() == SNAPSHOT.read_text()


def written_commands() -> str:
    commands = sorted(package_commands().items())
    lines = [
        line for name, command in commands for line in command_lines(f"splitlearn {name.replace('.', ' ')}", command)
    ]
    return "\n".join([*lines, ""])


def test_plugins_use_nothing_of_the_shared_tests() -> None:
    """Their tests come in a source archive of their own, without ``core/tests/support``."""
    sources = [source for plugin in PACKAGES[1:] for source in (plugin / "tests").rglob("*.py")]
    support = re.compile(r"^\s*(from|import) support\b", re.MULTILINE)

    assert [source for source in sources if support.search(source.read_text())] == []


def test_the_package_splitlearn_is_core_and_the_families(tmp_path: Path) -> None:
    """It depends on packages of this repository alone, and neither its wheel nor its source archive has code."""
    described = project(ROOT)["project"]
    packages = [project(package)["project"] for package in PACKAGES]
    # An entry point * is for types that no package provides.
    families = {
        one["name"] for one in packages if {*one.get("entry-points", {}).get("splitlearn.families", ())} - {"*"}
    }
    needed = {line.partition(">")[0] for line in described["dependencies"]}
    extras = {extra: lines for extra, lines in described["optional-dependencies"].items() if extra != "peft"}

    assert needed == {"splitlearn-core", *families}
    assert {f"splitlearn-{extra}" for extra in extras} == {one["name"] for one in packages} - needed
    assert all(lines == [f"splitlearn-{extra}>=0.1"] for extra, lines in extras.items())

    build = [sys.executable, "-m", "hatchling", "build", "-d", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)

    assert done.returncode == 0, done.stderr
    (archive,), (wheel,) = tmp_path.glob("splitlearn-*.tar.gz"), tmp_path.glob("splitlearn-*.whl")
    with tarfile.open(archive) as opened:
        assert {name.partition("/")[2] for name in opened.getnames()} == {
            ".gitignore", "CHANGELOG.md", "LICENSE", "PKG-INFO", "README.md", "pyproject.toml"
        }  # fmt: skip
    assert {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()} == {
        f"splitlearn-{described['version']}.dist-info"
    }


def test_lower_bounds_are_the_versions_that_the_oldest_environment_has(package: Path) -> None:
    """What the metadata of a package admits at the least is what the checks install."""
    lines = (ROOT / "tests" / "oldest-constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    described = project(package)["project"]
    extras = described.get("optional-dependencies", {}).values()
    needed = [line for lines in (described["dependencies"], *extras) for line in lines]
    bounds = dict(re.findall(r"^([a-z0-9-]+)>=([0-9.]+)$", "\n".join(needed), re.MULTILINE))

    for name, bound in bounds.items():
        if name in pins:
            assert Version(pins[name]) == Version(bound), name


if __name__ == "__main__":
    SNAPSHOT.write_text(written_commands())
    sys.stderr.write(f"wrote {SNAPSHOT}\n")
