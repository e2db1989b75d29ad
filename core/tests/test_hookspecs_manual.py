"""The manual of the hooks, held against the hooks."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any

import pytest

from splitlearn_core import PLUGIN_API, hookimpl, hookspec, hookspecs
from splitlearn_core.plugins.contract import HOOKS, PREFIX

pytestmark = pytest.mark.light

SPECS: dict[str, Callable[..., Any]] = {
    name: value for name, value in vars(hookspecs).items() if name.startswith(PREFIX) and callable(value)
}


def section(doc: str, title: str) -> str:
    """Return the indented block under a title of a docstring."""
    found = re.search(rf"^{title}::?\n(.*?)(?=^\S|\Z)", doc, re.DOTALL | re.MULTILINE)
    return textwrap.dedent(found[1]).strip("\n") if found else ""


def example(name: str) -> ast.FunctionDef:
    """Return the function that the example of a hook defines."""
    tree = ast.parse(section(inspect.getdoc(SPECS[name]) or "", "Example"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert [function.name for function in functions] == [name]
    return functions[0]


def test_there_are_the_four_hooks() -> None:
    """No more and no fewer than the contract names."""
    assert sorted(SPECS) == [
        "splitlearn_family_for",
        "splitlearn_loading_strategies",
        "splitlearn_map_weight_keys",
        "splitlearn_model_families",
    ]
    assert {name: tuple(inspect.signature(spec).parameters) for name, spec in SPECS.items()} == HOOKS
    assert PLUGIN_API == 1


@pytest.mark.parametrize("name", sorted(SPECS))
def test_a_hook_begins_with_one_sentence(name: str) -> None:
    """The first line stands alone."""
    first, _, rest = (inspect.getdoc(SPECS[name]) or "").partition("\n")

    assert first.endswith(".")
    assert rest.startswith("\n")


@pytest.mark.parametrize("name", sorted(SPECS))
def test_the_arguments_are_described(name: str) -> None:
    """Args names exactly the parameters, in order; a hook without any has no such section."""
    text = section(inspect.getdoc(SPECS[name]) or "", "Args")

    assert re.findall(r"^(\w+): \S", text, re.MULTILINE) == list(inspect.signature(SPECS[name]).parameters)


@pytest.mark.parametrize("name", sorted(SPECS))
def test_the_answer_is_described(name: str) -> None:
    """Returns says something."""
    assert section(inspect.getdoc(SPECS[name]) or "", "Returns")


@pytest.mark.parametrize("name", sorted(SPECS))
def test_a_hook_is_a_marked_specification(name: str) -> None:
    """pluggy sees it, and every parameter and answer has a type."""
    signature = inspect.signature(SPECS[name])

    assert hasattr(SPECS[name], f"{hookspecs.PROJECT}_spec")
    assert signature.return_annotation is not signature.empty
    assert all(parameter.annotation is not parameter.empty for parameter in signature.parameters.values())
    assert all(parameter.default is parameter.empty for parameter in signature.parameters.values())


@pytest.mark.parametrize("name", sorted(SPECS))
def test_the_example_implements_the_hook(name: str) -> None:
    """It parses, is marked with ``@hookimpl``, and takes arguments that the hook has."""
    function = example(name)

    assert [ast.unparse(mark) for mark in function.decorator_list] == ["hookimpl"]
    assert {argument.arg for argument in function.args.args} <= set(HOOKS[name])


@pytest.mark.parametrize("name", sorted(SPECS))
def test_the_example_is_taken_by_the_registry(world: Any, name: str) -> None:
    """Copied into a plugin, it is accepted and listed."""
    from splitlearn_core.plugins.registry import registry

    code = section(inspect.getdoc(SPECS[name]) or "", "Example")
    families = section(inspect.getdoc(SPECS["splitlearn_model_families"]) or "", "Example")
    source = (
        "from splitlearn_core import ModelFamily, hookimpl\n"
        "from splitlearn_core.readers.copied import CopiedStrategy\n\n"
        "class MyStrategy(CopiedStrategy):\n    name = 'mine'\n\n"
    )
    world.install("llama", source + "\n\n".join(dict.fromkeys([families, code])) + "\n")

    loaded = registry().plugin("llama")

    assert name in loaded.hooks


def test_the_module_shows_the_entry_point() -> None:
    """The manual's entry point is in the group that discovery reads."""
    from splitlearn_core.plugins.metadata import API_GROUP, FAMILY_GROUP

    manual = inspect.getsource(hookspecs)

    assert f'[project.entry-points."{FAMILY_GROUP}"]' in manual
    assert API_GROUP in manual


def test_the_marks_belong_to_one_project() -> None:
    """A plugin that uses our mark is seen by our manager."""
    assert hookimpl.project_name == hookspec.project_name == hookspecs.PROJECT == "splitlearn"
