"""What the outside relies on, name by name, as a text: a change of it shows in review.

``python core/tests/test_public_api.py`` writes the text anew.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import enum
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import splitlearn_core
from splitlearn_core import cli, errors, testing
from splitlearn_core.cli import main
from splitlearn_core.plugins import contract, metadata
from support.command_lines import command_lines

SNAPSHOT = Path(__file__).with_name("public_api.txt")
SOURCE = Path(splitlearn_core.__file__).parent
REWRITE = "python core/tests/test_public_api.py"


def public_api() -> str:
    """Return the text: a section for each kind of thing, its lines sorted."""
    sections = {
        "errors": error_tree(errors.SplitLearnError),
        "hooks": hooks(),
        "entry-point groups": sorted([*metadata.KINDS, metadata.COMMAND_GROUP, metadata.API_GROUP]),
        "environment variables": environment_variables(),
        "splitlearn_core": names(splitlearn_core),
        "splitlearn_core.testing": names(testing),
        "splitlearn_core.cli": names(cli),
        "command line": command_lines("splitlearn", main.cli),
    }
    return "\n".join(f"# {title}\n\n" + "".join(f"{line}\n" for line in lines) for title, lines in sections.items())


def error_tree(error: type[BaseException], depth: int = 0) -> list[str]:
    """An error, what built-in it is too, and those below it."""
    builtin = ", ".join(base.__name__ for base in error.__bases__ if not issubclass(base, errors.SplitLearnError))
    ours = [other for other in error.__subclasses__() if other.__module__ == errors.__name__]
    below = [line for other in sorted(ours, key=lambda cls: cls.__name__) for line in error_tree(other, depth + 1)]
    return ["    " * depth + error.__name__ + (f" ({builtin})" if builtin else ""), *below]


def hooks() -> list[str]:
    specs = splitlearn_core.hookspecs
    return [f"plugin API {splitlearn_core.PLUGIN_API}"] + [
        f"{name}{signature(getattr(specs, name))}" for name in sorted(contract.HOOKS)
    ]


def environment_variables() -> list[str]:
    """The variables of ours that the source names, wherever it does."""
    texts = {
        node.value
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    return sorted({name for text in texts for name in re.findall(r"\bSPLITLEARN_[A-Z_]+\b", text)})


def names(module: Any) -> list[str]:
    """The names of a module's ``__all__``, each with all that can be seen of it."""
    found: list[str] = []
    for name in sorted(module.__all__):
        found += described(name, getattr(module, name))
    return found


def described(name: str, value: Any) -> list[str]:
    if inspect.isclass(value):
        return [class_line(name, value), *(f"    {line}" for line in members(value))]
    if inspect.isfunction(value):
        return [f"def {name}{signature(value)}"]
    return [f"{name}: {type(value).__name__}" + (f" = {value!r}" if isinstance(value, int | str) else "")]


def class_line(name: str, cls: type) -> str:
    bases = ", ".join(base.__name__ for base in cls.__bases__ if base is not object)
    by_name = " keyword-only" if has_fields(cls) and all(item.kw_only for item in dataclasses.fields(cls)) else ""
    made = "" if is_made_elsewhere(cls) else f": made as {name}{signature(cls)}".removesuffix(" -> None")
    return f"class {name}" + (f"({bases})" if bases else "") + by_name + made


def is_made_elsewhere(cls: type) -> bool:
    """Enums, protocols and errors are not made by a call of ours, or all by the same one; fields have their lines."""
    return issubclass(cls, enum.Enum | BaseException | tuple) or getattr(cls, "_is_protocol", False) or has_fields(cls)


def has_fields(cls: type) -> bool:
    return dataclasses.is_dataclass(cls)


def members(cls: type) -> Iterator[str]:
    """Yield the fields, methods and properties that our own code gives a class, inherited ones of ours too."""
    if issubclass(cls, BaseException) and cls is not errors.SplitLearnError:
        return
    if issubclass(cls, enum.Enum):
        yield from (f"{item.name} = {item.value!r}" for item in cls)
        return
    if has_fields(cls):
        yield from (field_line(item) for item in dataclasses.fields(cls) if is_public(item.name))
    ours = [base for base in cls.__mro__ if base.__module__.startswith("splitlearn_core")]
    seen = {item.name for item in dataclasses.fields(cls)} if has_fields(cls) else set()
    attributes = {name: kind for base in reversed(ours) for name, kind in vars(base).get("__annotations__", {}).items()}
    for name in sorted(attributes):
        if is_public(name) and name not in seen:
            yield f"{name}: {getattr(attributes[name], '__forward_arg__', attributes[name])}"
    found = {name: value for base in reversed(ours) for name, value in vars(base).items()}
    for name in sorted(found):
        # The fixtures of the kit and the hooks of pytest are no names to call.
        known = name in seen or name in attributes or name.startswith("pytest_") or not is_plain(found[name])
        if (is_public(name) or name in CALLED) and not known:
            yield member_line(name, found[name])


#: Methods with a name of Python's that callers use by its syntax.
CALLED = ("__call__", "__aenter__", "__aexit__", "__enter__", "__exit__", "__iter__", "__aiter__", "__anext__")


def is_plain(value: Any) -> bool:
    return not type(value).__module__.startswith("_pytest")


def is_public(name: str) -> bool:
    return not name.startswith("_")


def member_line(name: str, value: Any) -> str:
    if isinstance(value, property):
        return f"{name} -> {inspect.signature(value.fget).return_annotation}" if value.fget else name
    kind = type(value).__name__ if isinstance(value, classmethod | staticmethod) else ""
    function = getattr(value, "__func__", value)
    if inspect.isfunction(function):
        word = "async def" if inspect.iscoroutinefunction(function) else "def"
        return " ".join(filter(None, (kind, f"{word} {name}{signature(function)}")))
    return f"{name} = {plain(value)}"


def field_line(item: Any) -> str:
    default = "" if item.default is dataclasses.MISSING else f" = {plain(item.default)}"
    made = "" if item.default_factory is dataclasses.MISSING else f" = {plain(item.default_factory())}"
    return f"{item.name}: {item.type}{default}{made}"


def signature(value: Any) -> str:
    """A signature in which defaults have no addresses."""
    found = inspect.signature(value)
    changed = [
        parameter.replace(default=_Shown(plain(parameter.default)))
        if parameter.default is not parameter.empty
        else parameter
        for parameter in found.parameters.values()
    ]
    # Annotations are texts where their module postpones them; then the quotes say nothing.
    return str(found.replace(parameters=changed)).replace("'", "")


class _Shown:
    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def plain(value: Any) -> str:
    if inspect.isfunction(value) or inspect.isclass(value):
        return str(value.__name__)
    text = repr(value).replace("'", '"')
    return re.sub(r"mappingproxy\((.*)\)", r"\1", re.sub(r" at 0x[0-9a-f]+", "", text))


def test_the_public_api_is_the_one_that_was_reviewed() -> None:
    """A change of the public API fails here until the list changes in the same commit."""
    now, then = public_api().splitlines(), SNAPSHOT.read_text().splitlines()

    difference = "\n".join(difflib.unified_diff(then, now, SNAPSHOT.name, "the code", lineterm="", n=1))
    assert not difference, f"the public API has changed; if it is meant, run: {REWRITE}\n{difference}"


def test_the_text_sees_what_it_is_to_see() -> None:
    """A generator that found nothing would agree with an empty file."""
    text = public_api()

    for known in (
        "UnknownModelTypeError (KeyError)",
        "splitlearn_map_weight_keys(family: ModelFamily",
        "SPLITLEARN_PLUGINS",
        "    zero_outside_bottom: tuple[str, ...] = ()",
        "    async def ensure_model(",
        "splitlearn plan MODEL",
        "    --json",
    ):
        assert known in text, known
    assert " at 0x" not in text


if __name__ == "__main__":
    SNAPSHOT.write_text(public_api())
    sys.stderr.write(f"wrote {SNAPSHOT}\n")
