"""The registry: from a model type to a family, or a name to a strategy, importing one plugin and no other."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import logging
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from packaging.utils import canonicalize_name

from splitlearn_core import hookspecs
from splitlearn_core.component_host import CORE_HOSTS
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
    PROVIDING_HOOKS,
    LoadedPlugin,
    broken,
    load_plugin,
    mapping_problem,
    providing_hook,
    trace_if_requested,
    trace_skipped,
)
from splitlearn_core.plugins.known import HOSTS, is_known, is_type_name, way_out
from splitlearn_core.plugins.metadata import FAMILY, HOST, STAGE, STRATEGY, PluginEntry
from splitlearn_core.quoting import listed, quote

if TYPE_CHECKING:
    from splitlearn_core.component_host import ComponentHost
    from splitlearn_core.cut_stage import CutStage
    from splitlearn_core.loading_strategy import LoadingStrategy
    from splitlearn_core.plan.conversions import WeightConversion
    from splitlearn_core.types import ProgressCallback

log = logging.getLogger(__name__)

ALLOW_VARIABLE = "SPLITLEARN_PLUGINS"
#: Characters of a model type that are compared with others.
_MAX_COMPARED = 64


@dataclass(frozen=True, slots=True)
class PluginStatus:
    """One row of the list of plugins."""

    entry: PluginEntry
    #: ``ready``, ``blocked``, ``incompatible``, ``conflict`` or ``broken``.
    status: str
    #: The hooks it implements; of a plugin that is not imported, the one that its entry point is for.
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
    """Finds the plugin of a model type, imports it in isolation, and remembers the outcome.

    Args:
        entries: The plugins; by default those of the installed distributions.

    The registry can be used from several threads. It can be rebuilt in any process: pass model
    types, not families, between processes.
    """

    def __init__(self, entries: Iterable[PluginEntry] | None = None) -> None:
        self._entries = tuple(entries) if entries is not None else None
        self._loaded: dict[tuple[str, str, bool], LoadedPlugin | PluginError] = {}
        #: Never held while a plugin's code runs.
        self._lock = threading.Lock()
        #: One lock for each plugin, held while it is imported and called: one that hangs blocks
        #: neither the others nor the list.
        self._loading: dict[tuple[str, str, bool], threading.RLock] = {}
        #: Model type -> the plugin for any type, with the family that it has for this one.
        self._of_any_type: dict[str, LoadedPlugin] = {}
        #: Plugins that were skipped, and what blocked them; each is logged once.
        self._skipped: set[tuple[PluginEntry, str]] = set()
        trace_if_requested()

    @property
    def entries(self) -> tuple[PluginEntry, ...]:
        """All plugins, blocked ones too. Scans the installed metadata once."""
        entries = self._entries
        if entries is None:
            # Two threads at once scan twice, with the same result.
            entries = self._entries = metadata.discover()
        return entries

    def model_types(self) -> tuple[str, ...]:
        """Return the model types that an entry point names and no variable blocks."""
        return tuple(sorted({entry.model_type for entry in self._of(FAMILY) if not blocked_by(entry)} - {""}))

    def may_provide(self, model_type: str) -> bool:
        """Return whether :meth:`family` may find a family. Imports no plugin, and asks none that is for any type."""
        return model_type in self.model_types() or bool(not self._named(model_type) and self._for_any_type(model_type))

    def unknown_names(self) -> dict[str, tuple[str, ...]]:
        """Return, for each variable, the names in it that no installed plugin has: they are probably misspelt."""
        known = {canonicalize_name(name) for entry in self.entries for name in (entry.name, entry.distribution)}
        unknown = {variable: (_names(variable) or frozenset()) - known for variable in (ALLOW_VARIABLE, BLOCK_VARIABLE)}
        return {variable: tuple(sorted(names)) for variable, names in unknown.items() if names}

    def family(self, model_type: str, progress: ProgressCallback = lambda _: None) -> ModelFamily:
        """Return the family of a model type, importing the plugin that owns it.

        Args:
            model_type: The type.
            progress: Called while the plugin for any type works, which may take seconds; may raise to stop it.

        Raises:
            UnknownModelTypeError: No plugin provides the type, or a variable blocks it.
            PluginConflictError: More than one distribution provides it.
            IncompatiblePluginError: The plugin was made for another plugin API or core.
            BrokenPluginError: The plugin cannot be imported, or does not follow the hook specifications.
        """
        return self.plugin(model_type, progress).families[model_type]

    def plugin(self, model_type: str, progress: ProgressCallback = lambda _: None) -> LoadedPlugin:
        """Return the loaded plugin that owns a model type; arguments and errors are those of :meth:`family`."""
        if self._named(model_type) or not self._for_any_type(model_type):
            return self._packaged(model_type)
        if model_type not in self._of_any_type:
            loaded = self.use(_only(self._for_any_type(model_type)))
            self._trace_others(loaded.entry, model_type)
            family = self._family_for(loaded, model_type, progress)
            # Of two threads at once, both get the family of the first.
            self._of_any_type.setdefault(model_type, replace(loaded, families={model_type: family}))
        return self._of_any_type[model_type]

    def packaged_family(self, model_type: str) -> ModelFamily:
        """Return the family of a type that an entry point names, as :meth:`family` does; no other plugin is asked."""
        return self._packaged(model_type).families[model_type]

    def _packaged(self, model_type: str) -> LoadedPlugin:
        claimed = self._named(model_type)
        usable = [entry for entry in claimed if not blocked_by(entry)]
        self._trace_others(usable[0] if usable else None, model_type)
        if not usable:
            raise self._unknown(model_type, claimed)
        loaded = self.use(_only(usable))
        if model_type not in loaded.families:
            raise broken(loaded.entry, f"hook splitlearn_model_families: no family with model type {model_type!r}")
        return loaded

    def _family_for(self, loaded: LoadedPlugin, model_type: str, progress: ProgressCallback) -> ModelFamily:
        try:
            family = loaded.family_for(model_type, progress)
        except UnknownModelTypeError as error:
            raise UnknownModelTypeError(
                f"no installed plugin provides model type {quote(model_type)}, and {loaded.entry.label} refuses it: "
                f"{error.message}",
                hint=self._nearest(model_type) + error.hint,
            ) from error
        if family is None:
            raise UnknownModelTypeError(
                f"no installed plugin provides model type {quote(model_type)}, nor does {loaded.entry.label}",
                hint=f'{self._nearest(model_type)}check "model_type" in config.json',
            )
        return family

    def _named(self, model_type: str) -> list[PluginEntry]:
        return [entry for entry in self._of(FAMILY) if entry.model_type and entry.model_type == model_type]

    def _for_any_type(self, model_type: str) -> list[PluginEntry]:
        # A hostile text of an untrusted file is not passed on.
        entries = [entry for entry in self._of(FAMILY) if entry.is_for_any_type and not blocked_by(entry)]
        return entries if is_type_name(model_type) else []

    def strategies(
        self, family: ModelFamily | None = None, requested: str | None = None
    ) -> tuple[LoadingStrategy, ...]:
        """Return the loading strategies that plugins add: the family's own, and those of strategy packages.

        Args:
            family: The family whose plugin's strategies are included.
            requested: The name that a caller chose. Of the strategy packages only the one of that name is then
                imported; the others are returned if they are in use already. None, or an unknown name, imports
                all packages; one that cannot be used is left out, with a warning.

        Raises:
            PluginError: The requested package cannot be used, or the family's plugin cannot.
            ConfigurationError: A variable blocks the requested package.
        """
        from splitlearn_core.loading_strategy import reserved_names

        own = self.plugin(family.model_type).strategies if family is not None else ()
        known = {*reserved_names(), *(entry.name for entry in self._of(STRATEGY)), *(item.name for item in own)}
        if requested not in known:
            # The caller's error message lists all strategies.
            requested = None
        added: dict[str, LoadingStrategy] = {}
        for name in dict.fromkeys(entry.name for entry in self._of(STRATEGY)):
            strategy = self._package_strategy(name, requested)
            if strategy is not None:
                added[name] = strategy
        return tuple({**added, **{strategy.name: strategy for strategy in own}}.values())

    def host(self, name: str) -> ComponentHost:
        """Return the host of a name that a plugin provides, importing that plugin.

        Raises:
            ConfigurationError: No plugin provides it, or a variable blocks it.
            PluginError: It cannot be used.
        """
        if problem := self.host_problem(name):
            raise ConfigurationError(f"host {quote(name)} {problem}", hint="change host=, or what is installed")
        return cast("ComponentHost", self._object(HOST, name))

    def host_problem(self, name: str) -> str:
        """Return why there is no host of a name, as the end of a sentence, with the way out; empty if there is one.

        Nothing is imported for it.
        """
        return "" if name in CORE_HOSTS else self._object_problem(HOST, name, CORE_HOSTS, HOSTS)

    def cut_stage(self, name: str) -> CutStage:
        """Return the stage of cuts of a name that a plugin provides, importing that plugin.

        Raises:
            ConfigurationError: No plugin provides it, or a variable blocks it.
            PluginError: It cannot be used.
        """
        if problem := self._object_problem(STAGE, name):
            raise ConfigurationError(f"cut stage {quote(name)} {problem}", hint="splitlearn plugins shows the plugins")
        return cast("CutStage", self._object(STAGE, name))

    def _object(self, kind: str, name: str) -> object:
        entries = [entry for entry in self._of(kind) if entry.name == name and not blocked_by(entry)]
        return self.use(_only(entries)).value

    def _object_problem(
        self, kind: str, name: str, own: Iterable[str] = (), known: Mapping[str, str] = MappingProxyType({})
    ) -> str:
        """Return why no plugin provides an object of a name; ``own`` are core's, ``known`` packages with others."""
        claimed = [entry for entry in self._of(kind) if entry.name == name]
        if any(not blocked_by(entry) for entry in claimed):
            return ""
        if claimed:
            variable = blocked_by(claimed[0])
            return f"({claimed[0].label}) is blocked by {variable}: change or unset it"
        names = (*own, *sorted({entry.name for entry in self._of(kind) if not blocked_by(entry)}))
        close = difflib.get_close_matches(name.strip().lower()[:_MAX_COMPARED], names, n=1)
        way = f"; pip install {known[name]}" if name in known else f"; did you mean {close[0]!r}?" if close else ""
        return f"is not installed (installed: {listed(names, most=50) or 'none'}){way}"

    def _package_strategy(self, name: str, requested: str | None) -> LoadingStrategy | None:
        entries = [entry for entry in self._of(STRATEGY) if entry.name == name]
        allowed = [entry for entry in entries if not blocked_by(entry)]
        if not allowed:
            self._trace_skipped(entries[0], "")
            if name == requested:
                raise ConfigurationError(
                    f"loading strategy {name!r} ({entries[0].label}) is blocked by {blocked_by(entries[0])}",
                    hint=f"change or unset {blocked_by(entries[0])}",
                )
            return None
        in_use = any(self._is_loaded(entry) for entry in allowed)
        if requested is not None and name != requested and not in_use:
            self._trace_skipped(allowed[0], f"loading strategy {requested!r} was requested")
            return None
        try:
            loaded = self.use(_only(allowed))
            strategy = loaded.strategy(name)
            if strategy is None:
                raise broken(loaded.entry, f"hook splitlearn_loading_strategies: no strategy named {name!r}")
        except PluginError as error:
            if name == requested:
                raise
            log.warning("loading strategy %r is left out: %s", name, error)
            return None
        return strategy

    def _trace_others(self, used: PluginEntry | None, model_type: str) -> None:
        for entry in self._of(FAMILY):
            if blocked_by(entry) or used is None or entry.name != used.name:
                self._trace_skipped(entry, f"model type {model_type!r} was requested")

    def _trace_skipped(self, entry: PluginEntry, why: str) -> None:
        """Log, once, why a plugin was not used."""
        variable = blocked_by(entry)
        if not self._is_loaded(entry) and (entry, variable) not in self._skipped:
            self._skipped.add((entry, variable))
            trace_skipped(entry, f"blocked by {variable}" if variable else why)

    def _of(self, kind: str) -> list[PluginEntry]:
        return [entry for entry in self.entries if entry.kind == kind]

    def _is_loaded(self, entry: PluginEntry) -> bool:
        return isinstance(self._loaded.get(_key(entry)), LoadedPlugin)

    def use(self, entry: PluginEntry) -> LoadedPlugin:
        """Return a plugin, imported at most once; the error of a failed import is raised each time."""
        _check_compatible(entry)
        key = _key(entry)
        with self._lock:
            loading = self._loading.setdefault(key, threading.RLock())
        with loading:
            if key not in self._loaded:
                try:
                    self._loaded[key] = load_plugin(entry)
                except PluginError as error:
                    self._loaded[key] = error
            loaded = self._loaded[key]
        if isinstance(loaded, PluginError):
            # A new exception each time: a stored one would collect the tracebacks of all callers.
            raise type(loaded)(loaded.message, hint=loaded.hint) from loaded.__cause__
        return loaded

    def map_weight_keys(
        self, family: ModelFamily, config: Mapping[str, Any], checkpoint_keys: Sequence[str]
    ) -> Mapping[str, str | WeightConversion | None] | None:
        """Return the key mapping of the owning plugin; None if it leaves the mapping to core.

        Raises:
            BrokenPluginError: The hook raised, or its result does not map all keys.
        """
        loaded = self.plugin(family.model_type)
        hook = "splitlearn_map_weight_keys"
        for mapping in loaded.call(hook, family=family, config=config, checkpoint_keys=checkpoint_keys):
            problem = mapping_problem(mapping, checkpoint_keys)
            if problem:
                raise broken(loaded.entry, f"hook {hook}: {problem}")
            return {key: mapping[key] for key in checkpoint_keys}
        return None

    def statuses(self, *, check: bool = False) -> tuple[PluginStatus, ...]:
        """Return a row for each plugin. Imports none of them without ``check``."""
        return tuple(self.status(entry, check=check) for entry in self.entries)

    def status(self, entry: PluginEntry, *, check: bool = False) -> PluginStatus:
        """Return the row of one plugin; with ``check`` it is imported and its hooks are called."""
        hooks = tuple(filter(None, (providing_hook(entry),)))
        if variable := blocked_by(entry):
            return PluginStatus(entry, "blocked", hooks, f"blocked by {variable}", f"change or unset {variable}")
        try:
            _only([other for other in self._of(entry.kind) if other.name == entry.name and not blocked_by(other)])
            _check_compatible(entry)
            if check and entry.model_type:
                hooks = self.plugin(entry.model_type).hooks
            elif check and entry.is_for_any_type:
                hooks = self.use(entry).hooks
            elif check and entry.kind not in PROVIDING_HOOKS:
                self._object(entry.kind, entry.name)
            elif check:
                self.strategies(None, entry.name)
                hooks = self.use(entry).hooks
            else:
                _check_installed(entry)
        except PluginError as error:
            status = {PluginConflictError: "conflict", IncompatiblePluginError: "incompatible"}.get(type(error))
            return PluginStatus(entry, status or "broken", hooks if status else (), error.message, error.hint)
        return PluginStatus(entry, "ready", hooks)

    def _unknown(self, model_type: str, blocked: list[PluginEntry]) -> UnknownModelTypeError:
        if blocked:
            variable = blocked_by(blocked[0])
            return UnknownModelTypeError(
                f"the plugin for model type {model_type!r} ({blocked[0].label}) is blocked by {variable}",
                hint=f"change or unset {variable}",
            )
        installed = self.model_types()
        for_any = next((entry for entry in self._of(FAMILY) if entry.is_for_any_type), None)
        way = ""
        if for_any is not None and blocked_by(for_any):
            way = f"change or unset {blocked_by(for_any)}, which blocks {for_any.label}"
        elif for_any is not None:
            way = f"name a model of the type, for which {for_any.label} is asked"
        return UnknownModelTypeError(
            f"no installed plugin provides model type {quote(model_type)} "
            f"(installed: {listed(installed, most=50) or 'none'})",
            hint=self._nearest(model_type) + way_out(model_type, installed, for_any=way),
        )

    def _nearest(self, model_type: str) -> str:
        close = difflib.get_close_matches(str(model_type)[:_MAX_COMPARED], self.model_types(), n=1)
        return f"did you mean {close[0]!r}? Otherwise " if close and not is_known(model_type) else ""


_registry: PluginRegistry | None = None


def registry() -> PluginRegistry:
    """Return the registry of this process, created on first use."""
    global _registry  # noqa: PLW0603  # one scan of the installed metadata for each process
    if _registry is None:
        _registry = PluginRegistry()
    return _registry


def reset_registry() -> None:
    """Forget the discovered and loaded plugins, so that newly installed packages are found."""
    global _registry  # noqa: PLW0603  # see registry()
    importlib.invalidate_caches()
    _registry = None


def _key(entry: PluginEntry) -> tuple[str, str, bool]:
    """Return what two entry points share that name the same plugin: hooks are registered once, a host is an object."""
    return entry.distribution, entry.module, entry.kind == HOST


def _names(variable: str) -> frozenset[str] | None:
    value = os.environ.get(variable)
    if value is None:
        return None
    return frozenset(canonicalize_name(name.strip()) for name in value.split(",") if name.strip())


def blocked_by(entry: PluginEntry) -> str:
    """Return the variable that blocks a plugin; empty if none does."""
    allowed = _names(ALLOW_VARIABLE)
    if allowed is not None and not entry.is_named(allowed):
        return ALLOW_VARIABLE
    return BLOCK_VARIABLE if entry.is_named(_names(BLOCK_VARIABLE) or frozenset()) else ""


def _only(entries: Sequence[PluginEntry]) -> PluginEntry:
    """Return the only entry.

    Raises:
        PluginConflictError: More than one distribution provides the same.
    """
    if len(entries) > 1:
        labels = " and ".join(f"{entry.label} ({entry.module})" for entry in entries)
        raise PluginConflictError(
            f"{entries[0].what} is claimed by {labels}",
            hint=f"uninstall one, or block it: {BLOCK_VARIABLE}={entries[-1].distribution}",
        )
    return entries[0]


def _check_compatible(entry: PluginEntry) -> None:
    """Refuse a plugin that was made for another plugin API or core, by its metadata alone."""
    upgrade = f"pip install --upgrade {entry.distribution} {metadata.CORE}"
    if entry.editable:
        upgrade = f"pip install --upgrade {metadata.CORE}, or change what {entry.origin} requires and reinstall it"
    if entry.plugin_api != str(hookspecs.PLUGIN_API):
        raise IncompatiblePluginError(
            f"{entry.label} was made for plugin API {entry.plugin_api}; "
            f"this {metadata.CORE} {metadata.core_version()} supports plugin API {hookspecs.PLUGIN_API}",
            hint=upgrade,
        )
    if not metadata.core_satisfies(entry.requires_core):
        raise IncompatiblePluginError(
            f"{entry.label} needs {metadata.CORE}{entry.requires_core}; {metadata.core_version()} is installed",
            hint=f"{upgrade}, or: pip install '{metadata.CORE}{entry.requires_core}'",
        )


def _check_installed(entry: PluginEntry) -> None:
    """Refuse a plugin whose module is not installed, without importing anything of it."""
    # Only the first part: find_spec imports the parents of a dotted name.
    name = entry.module.partition(":")[0].partition(".")[0]
    try:
        spec = importlib.util.find_spec(name)
    # An empty name, or a module that is half imported.
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise broken(entry, f"module {name!r} is not installed")
