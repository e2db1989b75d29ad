"""Import one plugin, verify it and call its hooks in isolation: a failure names the plugin."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO, cast

import pluggy

from splitlearn_core import hookspecs
from splitlearn_core.errors import BrokenPluginError
from splitlearn_core.family import ModelFamily
from splitlearn_core.plugins.contract import HookFunction, signature_problem, signature_text, without_hooks
from splitlearn_core.plugins.metadata import FAMILY, STRATEGY, PluginEntry
from splitlearn_core.plugins.tracing import HOOK, IMPORT, NOT_IMPLEMENTED, traced
from splitlearn_core.quoting import said

if TYPE_CHECKING:
    from splitlearn_core.loading_strategy import LoadingStrategy


#: The hook that answers with what an entry point of a kind names.
_PROVIDING = {FAMILY: "splitlearn_model_families", STRATEGY: "splitlearn_loading_strategies"}


@dataclass(frozen=True, slots=True)
class LoadedPlugin:
    """A plugin that was imported, verified and registered."""

    entry: PluginEntry
    families: Mapping[str, ModelFamily]
    strategies: tuple[LoadingStrategy, ...]
    hooks: tuple[str, ...]
    plugin: object

    def strategy(self, name: str) -> LoadingStrategy | None:
        """Return the strategy of a name, or None where the plugin has none."""
        return next((strategy for strategy in self.strategies if strategy.name == name), None)


def broken(entry: PluginEntry, why: str, hint: str = "") -> BrokenPluginError:
    return BrokenPluginError(f"plugin {entry.label} ({entry.what}) is broken: {why}", hint=mend_for(entry, hint))


def import_plugin(entry: PluginEntry) -> object:
    name, _, attribute = entry.module.partition(":")
    try:
        with traced(IMPORT, entry, entry.module), printing_aside():
            plugin: object = importlib.import_module(name)
            for part in filter(None, attribute.split(".")):
                plugin = getattr(plugin, part)
    # A plugin's module is foreign code: whatever it does to itself must not reach the others.
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) and error.name else ""
        package = missing.split(".")[0]
        hint = f"pip install {package}" if package and package != name.split(".")[0] else ""
        raise broken(entry, f"importing {name!r} failed: {said(error)}", hint) from error
    return plugin


def hook_functions(entry: PluginEntry, plugin: object) -> list[HookFunction]:
    """Return what a plugin marks as implementations of hooks, right or wrong.

    Raises:
        BrokenPluginError: Looking at the plugin fails.
    """
    mark = f"{hookspecs.PROJECT}_impl"
    try:
        with printing_aside():
            members = inspect.getmembers(plugin, inspect.isroutine)
        marked = [(name, function) for name, function in members if hasattr(function, mark)]
        return [_described(name, function, getattr(function, mark)) for name, function in marked]
    # Looking at an attribute may run code of the plugin.
    except (Exception, SystemExit) as error:
        raise broken(entry, f"looking at its hooks failed: {said(error)}") from error


def verify_hooks(entry: PluginEntry, plugin: object) -> tuple[str, ...]:
    """Check every hook implementation before pluggy sees the plugin; return the names of the hooks.

    Raises:
        BrokenPluginError: An implementation is not as its specification asks; all are named.
    """
    hooks = hook_functions(entry, plugin)
    problems = list(filter(None, map(signature_problem, hooks)))
    if problems:
        raise broken(entry, "\n".join(problems))
    if not hooks:
        raise broken(entry, without_hooks(entry.module, dir(plugin)))
    return tuple(function.hook for function in hooks)


def _described(name: str, function: Any, options: Mapping[str, Any]) -> HookFunction:
    signature = inspect.signature(function)
    parameters = signature.parameters.values()
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    is_async = inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)
    code = getattr(inspect.unwrap(function), "__code__", None)
    return HookFunction(
        hook=options.get("specname") or name,
        arguments=tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)),
        defaulted=tuple(p.name for p in parameters if p.default is not p.empty),
        keyword_only=tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY),
        variadic=tuple(stars[p.kind] + p.name for p in parameters if p.kind in stars),
        is_async=is_async,
        is_wrapper=bool(options.get("wrapper") or options.get("hookwrapper")),
        is_optional=bool(options.get("optionalhook")),
        text=signature_text(name, signature, is_async=is_async),
        where=f"{code.co_filename}:{code.co_firstlineno}" if code else "",
    )


def call(manager: pluggy.PluginManager, loaded: LoadedPlugin, hook: str, **arguments: object) -> list[Any]:
    """Call one hook of one plugin; what it raises is its own fault and says so."""
    others = [plugin for plugin in manager.get_plugins() if plugin is not loaded.plugin]
    try:
        with traced(HOOK, loaded.entry, hook, arguments) as answered, printing_aside():
            answers: list[Any] = manager.subset_hook_caller(hook, others)(**arguments)
            # A generator runs only now, and a mapping may compute its values when they are looked up.
            settled = [dict(a) if isinstance(a, Mapping) else list(a) if _is_list(a) else a for a in answers]
            answered(_shown(loaded, hook, settled))
    # Foreign code again, see import_plugin.
    except (Exception, SystemExit) as error:
        raise broken(loaded.entry, f"hook {hook} raised {said(error)}") from error
    for answer in filter(inspect.iscoroutine, settled):
        answer.close()
        raise broken(loaded.entry, f"hook {hook} answered a coroutine: hooks answer at once")
    return settled


def _shown(loaded: LoadedPlugin, hook: str, settled: list[Any]) -> object:
    """Return what a trace says was answered; pluggy leaves out who answers None, and who does not implement a hook."""
    if not settled:
        return None if hook in loaded.hooks else NOT_IMPLEMENTED
    return settled[0] if len(settled) == 1 else settled


def _is_list(answer: object) -> bool:
    return isinstance(answer, Iterable) and not isinstance(answer, str | bytes | Mapping)


def answers(manager: pluggy.PluginManager, loaded: LoadedPlugin, hook: str) -> list[Any]:
    """Call a hook that answers with an iterable, and return the items of all answers."""
    items: list[Any] = []
    found = call(manager, loaded, hook)
    # pluggy leaves out who answers None. Of the hook that the plugin is there for, that is a forgotten return.
    if not found and hook in loaded.hooks and hook == _PROVIDING[loaded.entry.kind]:
        raise broken(loaded.entry, f"hook {hook} answered None, not a list", "let the hook return the list")
    for answer in found:
        if not isinstance(answer, list):
            raise broken(loaded.entry, f"hook {hook} answered {answer!r}, not a list", "let the hook return a list")
        items += answer
    return items


def families_of(entry: PluginEntry, items: list[Any]) -> dict[str, ModelFamily]:
    families: dict[str, ModelFamily] = {}
    for item in items:
        if not isinstance(item, ModelFamily):
            raise broken(entry, f"hook splitlearn_model_families answered {item!r}, which is no ModelFamily")
        if item.model_type in families:
            raise broken(entry, f"hook splitlearn_model_families answered {item.model_type!r} twice")
        families[item.model_type] = item
    if entry.kind == FAMILY and entry.name not in families:
        provided = ", ".join(sorted(families)) or "none"
        raise broken(
            entry,
            f"its entry point is named {entry.name!r}, but hook splitlearn_model_families provides {provided}",
            "name the entry point after the model type",
        )
    return families


def strategies_of(entry: PluginEntry, items: list[Any]) -> tuple[LoadingStrategy, ...]:
    if items:
        _check_strategies(entry, items)
    names = [strategy.name for strategy in items]
    if entry.kind == STRATEGY and entry.name not in names:
        raise broken(
            entry,
            f"its entry point is named {entry.name!r}, "
            f"but hook splitlearn_loading_strategies provides {', '.join(sorted(names)) or 'none'}",
            "name the entry point after the strategy",
        )
    return tuple(items)


def _check_strategies(entry: PluginEntry, items: list[Any]) -> None:
    from splitlearn_core.loading_strategy import LoadingStrategy, reserved_names

    taken = set(reserved_names())
    for item in items:
        if not isinstance(item, LoadingStrategy) or not isinstance(item.name, str):
            raise broken(entry, f"hook splitlearn_loading_strategies answered {item!r}, which is no LoadingStrategy")
        if item.name in taken:
            raise broken(entry, f"hook splitlearn_loading_strategies: the name {item.name!r} is taken")
        taken.add(item.name)


def mapping_problem(mapping: object, checkpoint_keys: Sequence[str]) -> str:
    if not isinstance(mapping, Mapping):
        return f"it answered {type(mapping).__name__}, not a mapping"
    left_out = sorted(set(checkpoint_keys) - set(mapping))
    if left_out:
        return f"no answer for {len(left_out)} of {len(checkpoint_keys)} keys: {', '.join(left_out[:5])}"
    targets: dict[str, str] = {}
    for key in checkpoint_keys:
        target = mapping[key]
        if not isinstance(target, str | None):
            return f"{key!r} is mapped to {target!r}, not to a name or None"
        if target is not None and targets.setdefault(target, key) != key:
            return f"{targets[target]!r} and {key!r} are both mapped to {target!r}"
    return ""


#: A block-list of plugins: entry-point or distribution names.
BLOCK_VARIABLE = "SPLITLEARN_DISABLE_PLUGINS"


def mend_for(entry: PluginEntry, how: str = "") -> str:
    """Return the way out for those who have a plugin that is broken.

    Args:
        entry: The plugin's.
        how: What mends it, where that is known; by default what its installation suggests.
    """
    return f"{how or repair_of(entry)}; or leave the plugin out: {BLOCK_VARIABLE}={entry.distribution}"


def repair_of(entry: PluginEntry) -> str:
    """Say who can fix a package: the owner of its checkout, or its authors, whose newer version may have done so."""
    if entry.editable:
        return f"mend it in {entry.origin}"
    if entry.is_local:
        return f"mend it where {entry.origin} was made, and install it again"
    if entry.origin:
        return f"report it to its authors ({entry.origin})"
    return f"pip install --upgrade {entry.distribution}, or report it to its authors"


#: Whether a plugin's code is running: each thread has a value of its own.
_ASIDE: ContextVar[bool] = ContextVar("splitlearn_printing_aside", default=False)


@contextmanager
def printing_aside() -> Iterator[None]:
    """Mark what this thread runs as a plugin's code; it matters inside :func:`stdout_for_data`."""
    before = _ASIDE.set(True)
    try:
        yield
    finally:
        _ASIDE.reset(before)


@contextmanager
def stdout_for_data() -> Iterator[None]:
    """Send to stderr what plugins print to ``sys.stdout``, and let through what all others print.

    What goes past ``sys.stdout`` (a library in C, another process) is not held up.
    """
    data = sys.stdout
    # None where it is closed: then printing does nothing, and should go on doing it.
    if data is not None:
        sys.stdout = cast("TextIO", _Sorting(data))
    try:
        yield
    finally:
        sys.stdout = data


class _Sorting:
    """Is stdout to whoever prints data, and stderr to a plugin."""

    def __init__(self, data: TextIO) -> None:
        self._data = data

    def __getattr__(self, name: str) -> Any:
        return getattr((sys.stderr or self._data) if _ASIDE.get() else self._data, name)
