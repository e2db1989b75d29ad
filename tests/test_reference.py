"""The reference, held against the code: nothing that is public is missing from it, and nothing in it is gone."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import pytest

import splitlearn_core
from splitlearn_core import ModelFamily, errors, hookspecs
from splitlearn_core.plugins.contract import HOOKS

ROOT = Path(__file__).parent.parent
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md")}
FIELDS = [item.name for item in dataclasses.fields(ModelFamily) if not item.name.startswith("_")]

_DIRECTIVE = re.compile(r"^\.\. auto(?:class|function|data|attribute):: (\S+)$", re.MULTILINE)
_VARIABLE = re.compile(r"SPLITLEARN_[A-Z_]+")


def documented() -> list[str]:
    """What the reference takes from the code, by the names it is written with."""
    return [name for page in PAGES.values() for name in _DIRECTIVE.findall(page)]


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_has_its_text_and_an_example(field: str) -> None:
    """Each field of a family is described from its source, and used in a block that is run."""
    page = PAGES["family"]
    examples = "".join(re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))

    assert f".. autoattribute:: ModelFamily.{field}\n" in page
    assert re.search(rf"\b{field}=", examples)


@pytest.mark.parametrize("hook", sorted(HOOKS))
def test_a_hook_has_its_text_and_an_example(hook: str) -> None:
    """Each hook is on the page, with each of its arguments and an example, which are in its docstring."""
    members = re.search(r"automodule:: splitlearn_core.hookspecs\n   :members: (.+)", PAGES["hooks"])
    manual = inspect.getdoc(getattr(hookspecs, hook)) or ""

    assert members
    assert hook in members[1].split(", ")
    assert "Example::" in manual
    for argument in HOOKS[hook]:
        assert re.search(rf"^    {argument}: \S", manual, re.MULTILINE)


def test_public_names_are_documented() -> None:
    """Each name of the package is on one page; the errors are taken from their module as a whole."""
    of_errors = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    names = documented()

    assert ".. automodule:: splitlearn_core.errors\n   :members:" in PAGES["errors"]
    assert sorted(set(splitlearn_core.__all__) - of_errors - set(names)) == []
    assert len(names) == len(set(names))


def test_variables_are_documented() -> None:
    """The variables that the code knows are those on the page."""
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "core" / "src").rglob("*.py"))
    used = {name for source in sources for name in _VARIABLE.findall(source)}

    assert set(_VARIABLE.findall(PAGES["environment"])) == used


def test_pages_are_found() -> None:
    """Each page is in the table of contents."""
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = {str(path.relative_to(ROOT / "docs").with_suffix("")) for path in (ROOT / "docs").rglob("*.md")}

    assert pages - {"index"} <= set(index.split())
