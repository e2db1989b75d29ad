"""What every package of the workspace has: a changelog of its version, its tests in its source archive, its licence."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

import splitlearn_core

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = [path.parent for path in sorted([ROOT / "core" / "pyproject.toml", *ROOT.glob("plugins/*/pyproject.toml")])]


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
    public = {f"splitlearn_core.{name}" for name in splitlearn_core.__all__}
    own = f"splitlearn_{plugin.name}"
    sources = sorted((plugin / "src").rglob("*.py"))

    assert sources
    for source in sources:
        foreign = {name for name in imported(source) if name.split(".")[0] != own}
        assert foreign <= public, source
