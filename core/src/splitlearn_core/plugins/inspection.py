"""Read a plugin's source without running it: which hooks it implements, and what is plainly wrong.

This is what lets a list of plugins say more than their names and yet import none of them. It finds
what can be known from the text; the rest shows when the plugin is used, or with ``--check``.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from splitlearn_core.plugins.contract import HOOKS, HookFunction, signature_problem, without_hooks
from splitlearn_core.quoting import reason


@dataclass(frozen=True, slots=True)
class Inspection:
    """What the source of a plugin's module tells."""

    hooks: tuple[str, ...] = ()
    #: All that is plainly wrong, a line or more for each; empty where nothing is.
    problem: str = ""
    #: Modules that it imports and that are not installed.
    missing: tuple[str, ...] = ()


def inspect_source(module: str) -> Inspection:
    """Look at a module's source; a module that is found but has none (compiled) is left alone."""
    try:
        path = _source_of(module)
    except (ImportError, AttributeError, ValueError) as error:
        return Inspection(problem=f"module {module!r} is not there: {reason(error)}")
    if path is None or path.suffix != ".py":
        return Inspection()
    try:
        tree = ast.parse(path.read_bytes(), filename=str(path))
    except (OSError, SyntaxError, ValueError) as error:
        return Inspection(problem=f"module {module!r} cannot be read: {reason(error)}")
    body = list(_statements(tree.body))
    marks = _names_of_hookimpl(body)
    nodes = [node for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    functions = [_described(node, mark, path) for node in nodes if (mark := _mark(node, marks)) is not None]
    hooks = [function.hook for function in functions] + _imported_hooks(body)
    missing = _missing_imports(tree)
    problems = [f"it imports {name!r}, which is not installed" for name in missing]
    problems += map(signature_problem, functions)
    if any(isinstance(node, ast.Raise) for node in tree.body):
        problems.append(f"module {module!r} raises when it is imported")
    # An object of a module, or what it imports by a star, may have hooks that the text does not show.
    if not hooks and ":" not in module and not any(_is_star(node) for node in body):
        problems.append(without_hooks(module, [node.name for node in nodes]))
    return Inspection(tuple(sorted(hooks)), "\n".join(filter(None, problems)), missing)


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a module, those under ``if`` and ``try`` too."""
    for node in body:
        yield node
        for branch in ("body", "orelse", "handlers", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.ExceptHandler | ast.With):
                yield from _statements(getattr(node, branch, []))


def _names_of_hookimpl(body: list[ast.stmt]) -> set[str]:
    imports = [node for node in body if isinstance(node, ast.ImportFrom)]
    return {"hookimpl"} | {a.asname for node in imports for a in node.names if a.name == "hookimpl" and a.asname}


def _is_star(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)


def _source_of(module: str) -> Path | None:
    # find_spec imports the parents of a dotted name, so only the first part is given to it.
    top, *rest = module.partition(":")[0].split(".")
    spec = importlib.util.find_spec(top)
    if spec is None:
        raise ModuleNotFoundError(f"no module named {top!r}")
    if not rest:
        return Path(spec.origin) if spec.origin else None
    for folder in spec.submodule_search_locations or ():
        base = Path(folder, *rest)
        for candidate in (base / "__init__.py", base.with_suffix(".py")):
            if candidate.is_file():
                return candidate
    raise ModuleNotFoundError(f"{top!r} has no {'.'.join(rest)!r}")


def _mark(function: ast.FunctionDef | ast.AsyncFunctionDef, marks: set[str]) -> ast.expr | None:
    """Return the decorator that marks a function as a hook, or None."""
    for decorator in function.decorator_list:
        name = decorator.func if isinstance(decorator, ast.Call) else decorator
        if (isinstance(name, ast.Name) and name.id in marks) or getattr(name, "attr", "") == "hookimpl":
            return decorator
    return None


def _imported_hooks(body: list[ast.stmt]) -> list[str]:
    nodes = [node for node in body if isinstance(node, ast.ImportFrom)]
    return [alias.asname or alias.name for node in nodes for alias in node.names if alias.name in HOOKS]


def _missing_imports(tree: ast.Module) -> tuple[str, ...]:
    wanted: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.Import):
            wanted += [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            wanted.append(node.module.split(".")[0])
    return tuple(name for name in wanted if name not in sys.modules and importlib.util.find_spec(name) is None)


def _described(function: ast.FunctionDef | ast.AsyncFunctionDef, mark: ast.expr, path: Path) -> HookFunction:
    said = function.args
    positional = [argument.arg for argument in (*said.posonlyargs, *said.args)]
    defaulted = positional[len(positional) - len(said.defaults) :]
    defaulted += [
        argument.arg for argument, default in zip(said.kwonlyargs, said.kw_defaults, strict=True) if default is not None
    ]
    options = _options(mark)
    is_async = isinstance(function, ast.AsyncFunctionDef)
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    return HookFunction(
        hook=str(options.get("specname") or function.name),
        arguments=tuple(positional),
        defaulted=tuple(defaulted),
        keyword_only=tuple(argument.arg for argument in said.kwonlyargs),
        variadic=tuple(
            stars + argument.arg for stars, argument in (("*", said.vararg), ("**", said.kwarg)) if argument is not None
        ),
        is_async=is_async,
        is_wrapper=bool(options.get("wrapper") or options.get("hookwrapper")),
        is_optional=bool(options.get("optionalhook")),
        text=f"{'async ' if is_async else ''}def {function.name}({ast.unparse(said)}){returns}",
        where=f"{path}:{function.lineno}",
    )


def _options(mark: ast.expr) -> dict[str, object]:
    """Return what ``@hookimpl(...)`` is given that the text tells."""
    keywords = mark.keywords if isinstance(mark, ast.Call) else []
    return {
        keyword.arg: keyword.value.value
        for keyword in keywords
        if keyword.arg and isinstance(keyword.value, ast.Constant)
    }
