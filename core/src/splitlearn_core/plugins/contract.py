"""The hook signatures that plugins implement: checked at run time, and as one protocol per hook for type checkers.

A plugin is a module, or an object that an entry point ``module:object`` names. mypy and pyright check either against a
protocol when it is assigned to a name of that type, in a test file for example::

    import splitlearn_llama
    from splitlearn_core import FamilyPlugin

    plugin: FamilyPlugin = splitlearn_llama

A misspelt hook, an argument that the hook does not have, or a wrong return type is then an error of the checker.
Arguments may come in any order. At run time a hook may also omit arguments; the protocols require all, because a
type checker cannot distinguish an omitted argument from a misspelt one.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from splitlearn_core import hookspecs

if TYPE_CHECKING:
    import pluggy

    from splitlearn_core.family import ModelFamily
    from splitlearn_core.loading_strategy import LoadingStrategy
    from splitlearn_core.plan.conversions import WeightConversion
    from splitlearn_core.types import ProgressCallback


PREFIX = "splitlearn_"

_SIGNATURES = {
    name: inspect.signature(function)
    for name, function in vars(hookspecs).items()
    if name.startswith(PREFIX) and callable(function)
}

#: Hook name -> names of its arguments.
HOOKS = {name: tuple(signature.parameters) for name, signature in _SIGNATURES.items()}


def signature_problem(hook: str, implementation: pluggy.HookImpl) -> str:
    """Return everything that is wrong with a hook implementation, followed by both signatures; empty if it is valid.

    pluggy itself refuses unknown arguments alone. It accepts what would fail, or silently have no effect, in a call:
    coroutines, keyword-only arguments, defaults, ``*args``, wrappers.
    """
    if hook in HOOKS:
        nearest = hook
        problem = "; ".join(_problems(hook, implementation))
        problem = problem and f"hook {hook} {problem}"
    elif implementation.optionalhook:
        return ""
    else:
        nearest = next(iter(difflib.get_close_matches(hook, HOOKS, n=1)), "")
        suggestion = f"; did you mean {nearest}?" if nearest else f" (hooks: {_list(HOOKS)})"
        problem = f"there is no hook {hook}{suggestion}"
    if not problem:
        return ""
    if nearest:
        problem += f"\n  specified: {written(nearest, _SIGNATURES[nearest])}"
    function = implementation.function
    code = getattr(inspect.unwrap(function), "__code__", None)
    place = f"  ({code.co_filename}:{code.co_firstlineno})" if code else ""
    keyword = "async " if _is_async(function) else ""
    name = getattr(function, "__name__", hook)
    return f"{problem}\n  found:     {keyword}{written(name, inspect.signature(function))}{place}"


def _problems(hook: str, implementation: pluggy.HookImpl) -> Iterator[str]:
    allowed = HOOKS[hook]
    parameters = inspect.signature(implementation.function).parameters.values()
    if _is_async(implementation.function):
        yield "is asynchronous: hooks return at once, write a plain def"
    if implementation.wrapper or implementation.hookwrapper:
        yield "is marked as a wrapper, but only its own plugin is called: return the result instead"
    variadic = [p for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    unknown = [p.name for p in parameters if p not in variadic and p.name not in allowed]
    if unknown:
        near = [match for name in unknown for match in difflib.get_close_matches(name, allowed, n=1)]
        suggestion = f" (did you mean {_list(near)}?)" if near else ""
        yield f"has no argument {_list(unknown)}{suggestion}; it may take ({_list(allowed)})"
    if unknown[:1] == ["self"]:
        yield "is a method of a class: create an instance, and name that in the entry point"
    if variadic:
        names = _list(f"{'*' if p.kind is p.VAR_POSITIONAL else '**'}{p.name}" for p in variadic)
        yield f"takes {names}, which is never passed; name the arguments"
    defaults = [p.name for p in parameters if p.default is not p.empty]
    if defaults:
        yield f"has a default value for {_list(defaults)}, which would never be passed; remove it"
    keyword_only = [
        p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name in allowed and p.default is p.empty
    ]
    if keyword_only:
        yield f"takes {_list(keyword_only)} by keyword only, but is called by position; remove the '*'"


def _is_async(function: Callable[..., object]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)


def written(name: str, signature: inspect.Signature) -> str:
    """Return the first line of a function's definition."""
    # Postponed annotations are strings, which inspect shows in quotes.
    return f"def {name}" + re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(signature))


def _list(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


class FamilyPlugin(Protocol):
    """A plugin that provides model families: what an entry point in ``splitlearn.families`` names."""

    def splitlearn_model_families(self) -> Iterable[ModelFamily]:
        """See :func:`splitlearn_core.hookspecs.splitlearn_model_families`."""


class AnyTypePlugin(Protocol):
    """A plugin for the model types that no package provides: what the entry point ``*`` of families names."""

    def splitlearn_family_for(self, *, model_type: str, progress: ProgressCallback) -> ModelFamily | None:
        """See :func:`splitlearn_core.hookspecs.splitlearn_family_for`."""


class KeyMappingPlugin(Protocol):
    """A plugin that maps the keys of its checkpoints itself."""

    def splitlearn_map_weight_keys(
        self, *, family: ModelFamily, config: Mapping[str, Any], checkpoint_keys: Sequence[str]
    ) -> Mapping[str, str | WeightConversion | None] | None:
        """See :func:`splitlearn_core.hookspecs.splitlearn_map_weight_keys`."""


class StrategyPlugin(Protocol):
    """A plugin that adds loading strategies: what an entry point in ``splitlearn.strategies`` names."""

    def splitlearn_loading_strategies(self) -> Iterable[LoadingStrategy]:
        """See :func:`splitlearn_core.hookspecs.splitlearn_loading_strategies`."""
