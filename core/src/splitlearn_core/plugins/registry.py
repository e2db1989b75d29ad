"""The registry: from a model type to a family, importing one plugin in isolation and no other."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pluggy
from packaging.utils import canonicalize_name

from splitlearn_core import hookspecs
from splitlearn_core.errors import (
    BrokenPluginError,
    IncompatiblePluginError,
    PluginConflictError,
    PluginError,
    UnknownModelTypeError,
)
from splitlearn_core.family import ModelFamily
from splitlearn_core.plugins import metadata
from splitlearn_core.plugins.contract import PREFIX, signature_problem
from splitlearn_core.plugins.inspection import inspect_source
from splitlearn_core.plugins.metadata import PluginEntry

if TYPE_CHECKING:
    from splitlearn_core.checkpoint.strategy import LoadingStrategy

ALLOW_VARIABLE = "SPLITLEARN_PLUGINS"
BLOCK_VARIABLE = "SPLITLEARN_DISABLE_PLUGINS"

#: Packages of this repository, so that a missing one is named rightly. Anything else is a guess.
_KNOWN_PACKAGES = {"gemma2": "splitlearn-gemma", "gemma3_text": "splitlearn-gemma"}


@dataclass(frozen=True, slots=True)
class LoadedPlugin:
    """A plugin that was imported, verified and registered."""

    entry: PluginEntry
    families: Mapping[str, ModelFamily]
    strategies: tuple[LoadingStrategy, ...]
    hooks: tuple[str, ...]
    plugin: object


@dataclass(frozen=True, slots=True)
class PluginStatus:
    """One row of the list of plugins."""

    entry: PluginEntry
    #: ``ready``, ``blocked``, ``incompatible``, ``conflict`` or ``broken``.
    status: str
    hooks: tuple[str, ...] = ()
    error: str = ""
    hint: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {
            "model_type": self.entry.model_type,
            "distribution": self.entry.distribution,
            "version": self.entry.version,
            "module": self.entry.module,
            "editable": self.entry.editable,
            "origin": self.entry.origin,
            "status": self.status,
            "hooks": list(self.hooks),
            "error": self.error or None,
            "hint": self.hint or None,
        }


class PluginRegistry:
    """Finds the plugin of a model type, imports it in isolation, and remembers what came of it.

    Args:
        entries: The plugins there are; by default those of the installed distributions.

    The registry is safe to use from several threads. It can be rebuilt in any process: pass model
    types, not families, between processes.
    """

    def __init__(self, entries: Iterable[PluginEntry] | None = None) -> None:
        self._entries = tuple(entries) if entries is not None else None
        self._loaded: dict[tuple[str, str], LoadedPlugin | PluginError] = {}
        #: Held for moments only, never while a plugin's code runs.
        self._lock = threading.Lock()
        #: One lock for each plugin, held while it is imported and asked: one that hangs keeps nobody
        #: from the others, and nobody from the list of those that there are.
        self._loading: dict[tuple[str, str], threading.RLock] = {}
        self._manager = _new_manager()

    @property
    def entries(self) -> tuple[PluginEntry, ...]:
        """All plugins, blocked ones too. Scans the installed metadata once."""
        entries = self._entries
        if entries is None:
            # Two threads that come first at once scan twice and find the same.
            entries = self._entries = metadata.discover()
        return entries

    def model_types(self) -> tuple[str, ...]:
        """Return the model types that some plugin offers and no variable blocks."""
        return tuple(sorted({entry.model_type for entry in self.entries if not _blocked_by(entry)}))

    def unknown_names(self) -> dict[str, tuple[str, ...]]:
        """Return what the variables name that is no plugin, by variable: misspelt, most likely."""
        known = {canonicalize_name(name) for entry in self.entries for name in (entry.model_type, entry.distribution)}
        named = {variable: _names(variable) or frozenset() for variable in (ALLOW_VARIABLE, BLOCK_VARIABLE)}
        return {variable: tuple(sorted(names - known)) for variable, names in named.items() if names - known}

    def family(self, model_type: str) -> ModelFamily:
        """Return the family of a model type, importing the plugin that owns it.

        Raises:
            UnknownModelTypeError: No plugin offers the type, or a variable blocks it.
            PluginConflictError: More than one distribution offers it.
            IncompatiblePluginError: The plugin was made for another plugin API or core.
            BrokenPluginError: The plugin does not import or does not keep to the hooks.
        """
        return self.plugin(model_type).families[model_type]

    def plugin(self, model_type: str) -> LoadedPlugin:
        """Return the loaded plugin that owns a model type; raises like :meth:`family`."""
        entry = self._owner(model_type)
        _check_compatible(entry)
        key = (entry.distribution, entry.module)
        with self._lock:
            loading = self._loading.setdefault(key, threading.RLock())
        with loading:
            if key not in self._loaded:
                self._loaded[key] = self._load(entry)
            outcome = self._loaded[key]
        if isinstance(outcome, LoadedPlugin) and model_type not in outcome.families:
            outcome = _broken(entry, f"hook splitlearn_model_families: no family with model type {model_type!r}")
        if isinstance(outcome, PluginError):
            # A fresh exception each time: a stored one would collect the tracebacks of all callers.
            raise type(outcome)(outcome.message, hint=outcome.hint) from outcome.__cause__
        return outcome

    def map_weight_keys(
        self, family: ModelFamily, config: Mapping[str, Any], checkpoint_keys: Sequence[str]
    ) -> Mapping[str, str | None] | None:
        """Ask the owning plugin for its key mapping; None where it leaves the mapping to core.

        Raises:
            BrokenPluginError: The hook raised, or its answer is no mapping of all keys.
        """
        loaded = self.plugin(family.model_type)
        hook = "splitlearn_map_weight_keys"
        answer = _call(self._manager, loaded, hook, family=family, config=config, checkpoint_keys=checkpoint_keys)
        for mapping in answer:
            problem = _mapping_problem(mapping, checkpoint_keys)
            if problem:
                raise _broken(loaded.entry, f"hook {hook}: {problem}")
            return {key: mapping[key] for key in checkpoint_keys}
        return None

    def statuses(self, *, check: bool = False) -> tuple[PluginStatus, ...]:
        """Return a row for each plugin. Imports none of them, unless ``check`` asks for that."""
        return tuple(self._status(entry, check=check) for entry in self.entries)

    def _status(self, entry: PluginEntry, *, check: bool) -> PluginStatus:
        seen = inspect_source(entry.module)
        if variable := _blocked_by(entry):
            return PluginStatus(entry, "blocked", seen.hooks, f"blocked by {variable}", f"change or unset {variable}")
        try:
            self._owner(entry.model_type)
            _check_compatible(entry)
            if seen.problem:
                raise _broken(entry, seen.problem)
            hooks = self.plugin(entry.model_type).hooks if check else seen.hooks
        except PluginError as error:
            status = {PluginConflictError: "conflict", IncompatiblePluginError: "incompatible"}
            return PluginStatus(entry, status.get(type(error), "broken"), seen.hooks, error.message, error.hint)
        return PluginStatus(entry, "ready", hooks)

    def _owner(self, model_type: str) -> PluginEntry:
        claimed = [entry for entry in self.entries if entry.model_type == model_type]
        open_to_use = [entry for entry in claimed if not _blocked_by(entry)]
        if not open_to_use:
            raise self._unknown(model_type, claimed)
        if len(open_to_use) > 1:
            labels = " and ".join(f"{entry.label} ({entry.module})" for entry in open_to_use)
            raise PluginConflictError(
                f"model type {model_type!r} is claimed by {labels}",
                hint=f"uninstall one, or block it: {BLOCK_VARIABLE}={open_to_use[-1].distribution}",
            )
        return open_to_use[0]

    def _unknown(self, model_type: str, blocked: list[PluginEntry]) -> UnknownModelTypeError:
        if blocked:
            variable = _blocked_by(blocked[0])
            return UnknownModelTypeError(
                f"the plugin for model type {model_type!r} ({blocked[0].label}) is blocked by {variable}",
                hint=f"change or unset {variable}",
            )
        installed = self.model_types()
        close = difflib.get_close_matches(str(model_type), installed, n=1)
        return UnknownModelTypeError(
            f"no installed plugin provides model type {model_type!r} (installed: {', '.join(installed) or 'none'})",
            hint=(f"did you mean {close[0]!r}? Otherwise " if close else "")
            + f'{_install_line(model_type)}check "model_type" in config.json',
        )

    def _load(self, entry: PluginEntry) -> LoadedPlugin | PluginError:
        """Import, verify and register one plugin; a failure is an answer and leaves no trace."""
        try:
            plugin = _import(entry)
            hooks = _verify(entry, plugin)
            trial = _new_manager()
            trial.register(plugin)
            candidate = LoadedPlugin(entry, {}, (), hooks, plugin)
            families = _families(entry, _answers(trial, candidate, "splitlearn_model_families"))
            strategies = _strategies(entry, _answers(trial, candidate, "splitlearn_loading_strategies"))
        except PluginError as error:
            return error
        with self._lock:
            self._manager.register(plugin, name=f"{entry.distribution}:{entry.module}")
        return LoadedPlugin(entry, families, strategies, hooks, plugin)


_registry: PluginRegistry | None = None


def registry() -> PluginRegistry:
    """Return the registry of this process, made on first use."""
    global _registry  # noqa: PLW0603  # one scan of the installed metadata for each process
    if _registry is None:
        _registry = PluginRegistry()
    return _registry


def reset_registry() -> None:
    """Forget what was discovered and loaded, so that packages installed since are seen."""
    global _registry  # noqa: PLW0603  # see registry()
    importlib.invalidate_caches()
    _registry = None


def _install_line(model_type: str) -> str:
    """Return the line to try, but only for a plain name: it may come from anybody's config.json."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", str(model_type)):
        return ""
    package = _KNOWN_PACKAGES.get(model_type, f"splitlearn-{canonicalize_name(model_type)}")
    return f"try: pip install {package}, or "


def _new_manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    return manager


def _names(variable: str) -> frozenset[str] | None:
    value = os.environ.get(variable)
    if value is None:
        return None
    return frozenset(canonicalize_name(name.strip()) for name in value.split(",") if name.strip())


def _blocked_by(entry: PluginEntry) -> str:
    """Return the variable that keeps a plugin out, or nothing."""
    allowed = _names(ALLOW_VARIABLE)
    if allowed is not None and not entry.is_named(allowed):
        return ALLOW_VARIABLE
    return BLOCK_VARIABLE if entry.is_named(_names(BLOCK_VARIABLE) or frozenset()) else ""


def _check_compatible(entry: PluginEntry) -> None:
    """Refuse, from metadata alone, a plugin that was made for another plugin API or core."""
    upgrade = f"pip install --upgrade {entry.distribution} {metadata.CORE}"
    if entry.plugin_api != str(hookspecs.PLUGIN_API):
        raise IncompatiblePluginError(
            f"{entry.label} was made for plugin API {entry.plugin_api}; "
            f"this {metadata.CORE} {metadata.core_version()} has plugin API {hookspecs.PLUGIN_API}",
            hint=upgrade,
        )
    if not metadata.core_satisfies(entry.requires_core):
        raise IncompatiblePluginError(
            f"{entry.label} needs {metadata.CORE}{entry.requires_core}; {metadata.core_version()} is installed",
            hint=f"{upgrade}, or: pip install '{metadata.CORE}{entry.requires_core}'",
        )


def _broken(entry: PluginEntry, why: str, hint: str = "") -> BrokenPluginError:
    mend = hint or f"report it to the authors of {entry.distribution}"
    return BrokenPluginError(
        f"plugin {entry.label} (model type {entry.model_type!r}) is broken: {why}",
        hint=f"{mend}; or leave the plugin out: {BLOCK_VARIABLE}={entry.distribution}",
    )


def _import(entry: PluginEntry) -> object:
    name, _, attribute = entry.module.partition(":")
    try:
        plugin: object = importlib.import_module(name)
        for part in filter(None, attribute.split(".")):
            plugin = getattr(plugin, part)
    # A plugin's module is foreign code: whatever it does to itself must not reach the others.
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) and error.name else ""
        package = missing.split(".")[0]
        hint = f"pip install {package}" if package and package != name.split(".")[0] else ""
        raise _broken(entry, f"importing {name!r} failed: {type(error).__name__}: {error}", hint) from error
    return plugin


def _verify(entry: PluginEntry, plugin: object) -> tuple[str, ...]:
    """Check every hook implementation's name and arguments before pluggy sees the plugin."""
    hooks = [
        (name, function)
        for name, function in inspect.getmembers(plugin, inspect.isroutine)
        if hasattr(function, f"{hookspecs.PROJECT}_impl")
    ]
    for name, function in hooks:
        parameters = inspect.signature(function).parameters.values()
        defaulted = [p.name for p in parameters if p.default is not p.empty]
        problem = signature_problem(name, [p.name for p in parameters], defaulted)
        if problem:
            raise _broken(entry, problem)
    if not hooks:
        near = [name for name in dir(plugin) if name.startswith(PREFIX)]
        why = f"module {entry.module!r} implements no hook"
        raise _broken(entry, why + (f"; is {near[0]} marked with @hookimpl?" if near else ""))
    return tuple(name for name, _ in hooks)


def _call(manager: pluggy.PluginManager, loaded: LoadedPlugin, hook: str, **arguments: object) -> list[Any]:
    """Call one hook of one plugin; what it raises is its own fault and says so."""
    others = [plugin for plugin in manager.get_plugins() if plugin is not loaded.plugin]
    try:
        answers: list[Any] = manager.subset_hook_caller(hook, others)(**arguments)
        # A generator runs only now, and a mapping may compute its values when they are looked up.
        return [dict(a) if isinstance(a, Mapping) else list(a) if _is_list(a) else a for a in answers]
    # Foreign code again, see _import.
    except (Exception, SystemExit) as error:
        raise _broken(loaded.entry, f"hook {hook} raised {type(error).__name__}: {error}") from error


def _is_list(answer: object) -> bool:
    return isinstance(answer, Iterable) and not isinstance(answer, str | bytes | Mapping)


def _answers(manager: pluggy.PluginManager, loaded: LoadedPlugin, hook: str) -> list[Any]:
    """Call a hook that answers with an iterable, and return the items of all answers."""
    items: list[Any] = []
    for answer in _call(manager, loaded, hook):
        if not isinstance(answer, list):
            raise _broken(loaded.entry, f"hook {hook} answered {answer!r}, not a list")
        items += answer
    return items


def _families(entry: PluginEntry, items: list[Any]) -> dict[str, ModelFamily]:
    families: dict[str, ModelFamily] = {}
    for item in items:
        if not isinstance(item, ModelFamily):
            raise _broken(entry, f"hook splitlearn_model_families answered {item!r}, which is no ModelFamily")
        if item.model_type in families:
            raise _broken(entry, f"hook splitlearn_model_families answered {item.model_type!r} twice")
        families[item.model_type] = item
    if entry.model_type not in families:
        provided = ", ".join(sorted(families)) or "none"
        raise _broken(
            entry,
            f"its entry point is named {entry.model_type!r}, but hook splitlearn_model_families provides {provided}",
            "name the entry point after the model type",
        )
    return families


def _strategies(entry: PluginEntry, items: list[Any]) -> tuple[LoadingStrategy, ...]:
    if not items:
        return ()
    from splitlearn_core.checkpoint.strategy import LoadingStrategy, reserved_names

    taken = set(reserved_names())
    for item in items:
        if not isinstance(item, LoadingStrategy) or not isinstance(item.name, str):
            raise _broken(entry, f"hook splitlearn_loading_strategies answered {item!r}, which is no LoadingStrategy")
        if item.name in taken:
            raise _broken(entry, f"hook splitlearn_loading_strategies: the name {item.name!r} is taken")
        taken.add(item.name)
    return tuple(items)


def _mapping_problem(mapping: object, checkpoint_keys: Sequence[str]) -> str:
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
