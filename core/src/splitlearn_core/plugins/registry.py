"""The registry: from a model type to a family, or a name to a strategy, importing one plugin and no other."""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pluggy
from packaging.utils import canonicalize_name

from splitlearn_core import hookspecs
from splitlearn_core.errors import (
    ConfigurationError,
    IncompatiblePluginError,
    PluginConflictError,
    PluginError,
    UnknownModelTypeError,
)
from splitlearn_core.family import ModelFamily
from splitlearn_core.plugins import metadata
from splitlearn_core.plugins.host import (
    BLOCK_VARIABLE,
    LoadedPlugin,
    answers,
    broken,
    call,
    families_of,
    import_plugin,
    mapping_problem,
    strategies_of,
    verify_hooks,
)
from splitlearn_core.plugins.inspection import inspect_source
from splitlearn_core.plugins.known import is_known, way_out
from splitlearn_core.plugins.metadata import FAMILY, STRATEGY, PluginEntry
from splitlearn_core.plugins.tracing import skipped, trace_as_environment_says
from splitlearn_core.quoting import listed, quote

if TYPE_CHECKING:
    from splitlearn_core.loading_strategy import LoadingStrategy

log = logging.getLogger(__name__)

ALLOW_VARIABLE = "SPLITLEARN_PLUGINS"
#: Characters of a model type that are compared with others.
_LONGEST_TYPE = 64


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
            "kind": self.entry.kind,
            "name": self.entry.name,
            "model_type": self.entry.model_type or None,
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
        #: Plugins that were not asked, and what blocked them; traced once.
        self._skipped: set[tuple[PluginEntry, str]] = set()
        trace_as_environment_says()

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
        return tuple(sorted({entry.name for entry in self._of(FAMILY) if not blocked_by(entry)}))

    def unknown_names(self) -> dict[str, tuple[str, ...]]:
        """Return what the variables name that is no plugin, by variable: misspelt, most likely."""
        known = {canonicalize_name(name) for entry in self.entries for name in (entry.name, entry.distribution)}
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
        for entry in self._of(FAMILY):
            if blocked_by(entry) or entry.name != model_type:
                self._trace_skipped(entry, f"model type {model_type!r} was asked for")
        outcome = self._use(self._owner(model_type))
        if model_type not in outcome.families:
            raise broken(outcome.entry, f"hook splitlearn_model_families: no family with model type {model_type!r}")
        return outcome

    def strategies(self, family: ModelFamily | None = None, asked: str | None = None) -> tuple[LoadingStrategy, ...]:
        """Return the loading strategies that plugins add: the family's own, and those of strategy packages.

        Args:
            family: Whose plugin's strategies are wanted as well.
            asked: The name that a caller chose. Then only the strategy package of that name is
                imported for it; of the others those that are in use already are returned. None, or a
                name that nobody has, asks all packages: one that cannot be used is left out, with a
                warning.

        Raises:
            PluginError: The package of the asked name cannot be used, or the family's plugin cannot.
            ConfigurationError: A variable blocks the package of the asked name.
        """
        from splitlearn_core.loading_strategy import reserved_names

        own = self.plugin(family.model_type).strategies if family is not None else ()
        known = {*reserved_names(), *(entry.name for entry in self._of(STRATEGY)), *(item.name for item in own)}
        if asked not in known:
            # Nobody has it: whoever says so wants to list what there is.
            asked = None
        found: dict[str, LoadingStrategy] = {}
        for name in dict.fromkeys(entry.name for entry in self._of(STRATEGY)):
            strategy = self._strategy_of_package(name, asked)
            if strategy is not None:
                found[name] = strategy
        return tuple({**found, **{strategy.name: strategy for strategy in own}}.values())

    def _strategy_of_package(self, name: str, asked: str | None) -> LoadingStrategy | None:
        entries = [entry for entry in self._of(STRATEGY) if entry.name == name]
        allowed = [entry for entry in entries if not blocked_by(entry)]
        if not allowed:
            self._trace_skipped(entries[0], "")
            if name == asked:
                raise ConfigurationError(
                    f"loading strategy {name!r} ({entries[0].label}) is blocked by {blocked_by(entries[0])}",
                    hint=f"change or unset {blocked_by(entries[0])}",
                )
            return None
        used = any(self._is_loaded(entry) for entry in allowed)
        if asked is not None and name != asked and not used:
            self._trace_skipped(allowed[0], f"loading strategy {asked!r} was asked for")
            return None
        try:
            outcome = self._use(_only(allowed))
            strategy = outcome.strategy(name)
            if strategy is None:
                raise broken(outcome.entry, f"hook splitlearn_loading_strategies: no strategy named {name!r}")
        except PluginError as error:
            if name == asked:
                raise
            log.warning("loading strategy %r is left out: %s", name, error)
            return None
        return strategy

    def _trace_skipped(self, entry: PluginEntry, why: str) -> None:
        """Say, once, why a plugin was not asked; one that is loaded already was not passed over."""
        variable = blocked_by(entry)
        if not self._is_loaded(entry) and (entry, variable) not in self._skipped:
            self._skipped.add((entry, variable))
            skipped(entry, f"blocked by {variable}" if variable else why)

    def _of(self, kind: str) -> list[PluginEntry]:
        return [entry for entry in self.entries if entry.kind == kind]

    def _is_loaded(self, entry: PluginEntry) -> bool:
        return isinstance(self._loaded.get((entry.distribution, entry.module)), LoadedPlugin)

    def _use(self, entry: PluginEntry) -> LoadedPlugin:
        """Return a plugin, imported at most once; what went wrong then is raised each time."""
        _check_compatible(entry)
        key = (entry.distribution, entry.module)
        with self._lock:
            loading = self._loading.setdefault(key, threading.RLock())
        with loading:
            if key not in self._loaded:
                self._loaded[key] = self._load(entry)
            outcome = self._loaded[key]
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
        answer = call(self._manager, loaded, hook, family=family, config=config, checkpoint_keys=checkpoint_keys)
        for mapping in answer:
            problem = mapping_problem(mapping, checkpoint_keys)
            if problem:
                raise broken(loaded.entry, f"hook {hook}: {problem}")
            return {key: mapping[key] for key in checkpoint_keys}
        return None

    def statuses(self, *, check: bool = False) -> tuple[PluginStatus, ...]:
        """Return a row for each plugin. Imports none of them, unless ``check`` asks for that."""
        return tuple(self.status(entry, check=check) for entry in self.entries)

    def status(self, entry: PluginEntry, *, check: bool = False) -> PluginStatus:
        """Return the row of one plugin; imports it where ``check`` asks for that."""
        seen = inspect_source(entry.module)
        if variable := blocked_by(entry):
            return PluginStatus(entry, "blocked", seen.hooks, f"blocked by {variable}", f"change or unset {variable}")
        try:
            _only([other for other in self._of(entry.kind) if other.name == entry.name and not blocked_by(other)])
            _check_compatible(entry)
            # The text is what can be told without running it; where it may be run, that tells what happens in truth.
            if seen.problem and not check:
                raise broken(entry, seen.problem, f"pip install {' '.join(seen.missing)}" if seen.missing else "")
            hooks = self._check(entry) if check else seen.hooks
        except PluginError as error:
            status = {PluginConflictError: "conflict", IncompatiblePluginError: "incompatible"}
            return PluginStatus(entry, status.get(type(error), "broken"), seen.hooks, error.message, error.hint)
        return PluginStatus(entry, "ready", hooks)

    def _check(self, entry: PluginEntry) -> tuple[str, ...]:
        """Use a plugin for what its entry point names, and return the hooks it implements."""
        if entry.kind == FAMILY:
            return self.plugin(entry.name).hooks
        self.strategies(None, entry.name)
        return self._use(entry).hooks

    def _owner(self, model_type: str) -> PluginEntry:
        claimed = [entry for entry in self._of(FAMILY) if entry.name == model_type]
        open_to_use = [entry for entry in claimed if not blocked_by(entry)]
        if not open_to_use:
            raise self._unknown(model_type, claimed)
        return _only(open_to_use)

    def _unknown(self, model_type: str, blocked: list[PluginEntry]) -> UnknownModelTypeError:
        if blocked:
            variable = blocked_by(blocked[0])
            return UnknownModelTypeError(
                f"the plugin for model type {model_type!r} ({blocked[0].label}) is blocked by {variable}",
                hint=f"change or unset {variable}",
            )
        installed = self.model_types()
        close = difflib.get_close_matches(str(model_type)[:_LONGEST_TYPE], installed, n=1)
        return UnknownModelTypeError(
            f"no installed plugin provides model type {quote(model_type)} "
            f"(installed: {listed(installed, most=50) or 'none'})",
            hint=(f"did you mean {close[0]!r}? Otherwise " if close and not is_known(model_type) else "")
            + way_out(model_type, installed),
        )

    def _load(self, entry: PluginEntry) -> LoadedPlugin | PluginError:
        """Import, verify and register one plugin; a failure is an answer and leaves no trace."""
        try:
            plugin = import_plugin(entry)
            hooks = verify_hooks(entry, plugin)
            trial = _new_manager()
            trial.register(plugin)
            candidate = LoadedPlugin(entry, {}, (), hooks, plugin)
            families = families_of(entry, answers(trial, candidate, "splitlearn_model_families"))
            strategies = strategies_of(entry, answers(trial, candidate, "splitlearn_loading_strategies"))
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


def _new_manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    manager.add_hookspecs(hookspecs)
    return manager


def _names(variable: str) -> frozenset[str] | None:
    value = os.environ.get(variable)
    if value is None:
        return None
    return frozenset(canonicalize_name(name.strip()) for name in value.split(",") if name.strip())


def blocked_by(entry: PluginEntry) -> str:
    """Return the variable that keeps a plugin out, or nothing."""
    allowed = _names(ALLOW_VARIABLE)
    if allowed is not None and not entry.is_named(allowed):
        return ALLOW_VARIABLE
    return BLOCK_VARIABLE if entry.is_named(_names(BLOCK_VARIABLE) or frozenset()) else ""


def _only(entries: Sequence[PluginEntry]) -> PluginEntry:
    """Return the one plugin that provides something.

    Raises:
        PluginConflictError: More than one distribution does.
    """
    if len(entries) > 1:
        labels = " and ".join(f"{entry.label} ({entry.module})" for entry in entries)
        raise PluginConflictError(
            f"{entries[0].what} is claimed by {labels}",
            hint=f"uninstall one, or block it: {BLOCK_VARIABLE}={entries[-1].distribution}",
        )
    return entries[0]


def _check_compatible(entry: PluginEntry) -> None:
    """Refuse, from metadata alone, a plugin that was made for another plugin API or core."""
    upgrade = f"pip install --upgrade {entry.distribution} {metadata.CORE}"
    if entry.editable:
        upgrade = f"pip install --upgrade {metadata.CORE}, or change what {entry.origin} asks for and install it again"
    if entry.plugin_api != str(hookspecs.PLUGIN_API):
        raise IncompatiblePluginError(
            f"{entry.label} was made for plugin API {entry.plugin_api}; "
            f"this {metadata.CORE} {metadata.core_version()} takes plugin API {hookspecs.PLUGIN_API}",
            hint=upgrade,
        )
    if not metadata.core_satisfies(entry.requires_core):
        raise IncompatiblePluginError(
            f"{entry.label} needs {metadata.CORE}{entry.requires_core}; {metadata.core_version()} is installed",
            hint=f"{upgrade}, or: pip install '{metadata.CORE}{entry.requires_core}'",
        )
