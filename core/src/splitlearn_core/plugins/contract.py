"""What a plugin's hooks have to look like, for live modules and for type checkers."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from splitlearn_core import hookspecs

if TYPE_CHECKING:
    from splitlearn_core.family import ModelFamily
    from splitlearn_core.loading_strategy import LoadingStrategy


PREFIX = "splitlearn_"


def _specifications() -> dict[str, inspect.Signature]:
    return {
        name: inspect.signature(function)
        for name, function in vars(hookspecs).items()
        if name.startswith(PREFIX) and callable(function)
    }


_SIGNATURES = _specifications()

#: Hook name -> names of its arguments.
HOOKS = {name: tuple(signature.parameters) for name, signature in _SIGNATURES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class HookFunction:
    """A function that a plugin marks as the implementation of a hook, read from its source or looked at alive."""

    #: The hook: the function's name, or what its mark gives as ``specname``.
    hook: str
    #: Names of the arguments that can be passed by position, in order. pluggy passes them so.
    arguments: tuple[str, ...] = ()
    #: Those that have a default value; pluggy never passes them.
    defaulted: tuple[str, ...] = ()
    #: Arguments that can be passed by name alone.
    keyword_only: tuple[str, ...] = ()
    #: ``*args`` and ``**kwargs``, with their stars.
    variadic: tuple[str, ...] = ()
    is_async: bool = False
    #: Marked as a wrapper of other implementations.
    is_wrapper: bool = False
    #: Marked as ``optionalhook``: it may belong to a core that this one is not.
    is_optional: bool = False
    #: The function as it is written: ``def name(arguments) -> answer``.
    text: str = ""
    #: The file and line where it stands; empty where that is not known.
    where: str = ""


def signature_problem(function: HookFunction) -> str:
    """Say all that is wrong with an implementation, and show it beside the specification; or nothing."""
    if function.hook not in HOOKS:
        if function.is_optional:
            return ""
        close = difflib.get_close_matches(function.hook, HOOKS, n=1)
        meant = f"; did you mean {close[0]}?" if close else f" (hooks: {_list(HOOKS)})"
        return f"there is no hook {function.hook}{meant}" + _shown(close[0] if close else "", function)
    problems = "; ".join(_problems(function))
    return f"hook {function.hook} {problems}{_shown(function.hook, function)}" if problems else ""


def without_hooks(module: str, names: Iterable[str]) -> str:
    """Say that a module implements no hook, and which of its names look like one that lacks its mark."""
    near = [name for name in names if name.startswith(PREFIX)]
    return f"module {module!r} implements no hook" + (f"; is {near[0]} marked with @hookimpl?" if near else "")


def signature_text(name: str, signature: inspect.Signature, *, is_async: bool = False) -> str:
    """Write a signature as its author wrote it: annotations that are texts without quotes."""
    parameters = [
        parameter.replace(annotation=_bare(parameter.annotation)) for parameter in signature.parameters.values()
    ]
    plain = signature.replace(parameters=parameters, return_annotation=_bare(signature.return_annotation))
    return f"{'async ' if is_async else ''}def {name}{plain}"


def _problems(function: HookFunction) -> Iterator[str]:
    known = HOOKS[function.hook]
    if function.is_async:
        yield "is asynchronous: hooks answer at once, write a plain def"
    if function.is_wrapper:
        yield "is marked as a wrapper, and only its own plugin is ever asked: answer it instead"
    foreign = [name for name in (*function.arguments, *function.keyword_only) if name not in known]
    if foreign:
        near = [match for name in foreign for match in difflib.get_close_matches(name, known, n=1)]
        meant = f" (did you mean {_list(near)}?)" if near else ""
        yield f"has no argument {_list(foreign)}{meant}; it may take ({_list(known)})"
    if "self" in foreign[:1]:
        yield "is a method of a class: make an object of the class, and name that in the entry point"
    if function.variadic:
        yield f"takes {_list(function.variadic)}, which is never passed; name the arguments"
    if function.defaulted:
        yield f"has a default value for {_list(function.defaulted)}, which would never be passed; drop it"
    by_name = [name for name in function.keyword_only if name in known and name not in function.defaulted]
    if by_name:
        yield f"takes {_list(by_name)} by name alone, and is called by position; drop the '*'"


def _shown(hook: str, function: HookFunction) -> str:
    """Show both signatures, each on a line of its own."""
    place = f"  ({function.where})" if function.where else ""
    specified = f"\n  specified: {signature_text(hook, _SIGNATURES[hook])}" if hook else ""
    return f"{specified}\n  found:     {function.text}{place}" if function.text else specified


class _Bare(str):
    """An annotation that shows itself without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _bare(annotation: object) -> object:
    return _Bare(annotation) if isinstance(annotation, str) else annotation


def _list(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


class FamilyPlugin(Protocol):
    """A plugin that provides model families: what an entry point in ``splitlearn.families`` names."""

    def splitlearn_model_families(self) -> Iterable[ModelFamily]:
        """See :func:`splitlearn_core.hookspecs.splitlearn_model_families`."""


class KeyMappingPlugin(Protocol):
    """A plugin that maps the keys of its checkpoints itself."""

    def splitlearn_map_weight_keys(
        self, *, family: ModelFamily, config: Mapping[str, Any], checkpoint_keys: Sequence[str]
    ) -> Mapping[str, str | None] | None:
        """See :func:`splitlearn_core.hookspecs.splitlearn_map_weight_keys`."""


class StrategyPlugin(Protocol):
    """A plugin that adds loading strategies: what an entry point in ``splitlearn.strategies`` names."""

    def splitlearn_loading_strategies(self) -> Iterable[LoadingStrategy]:
        """See :func:`splitlearn_core.hookspecs.splitlearn_loading_strategies`."""
