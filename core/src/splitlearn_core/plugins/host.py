"""Import one plugin, verify it and call its hooks in isolation: a failure names the plugin.

Each import, each hook call and each plugin that was skipped is a record of the logger ``splitlearn_core.trace``, level
DEBUG; ``record.trace`` holds the values of the message as a mapping. ``SPLITLEARN_TRACE=1`` prints the records on
stderr as lines, ``SPLITLEARN_TRACE=json`` as JSON objects.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import logging
import os
import re
import reprlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TextIO, cast

import pluggy

from splitlearn_core import hookspecs
from splitlearn_core.component_host import CORE_HOSTS, ComponentHost
from splitlearn_core.cut_stage import CutStage
from splitlearn_core.errors import BrokenPluginError, UnknownModelTypeError, translate
from splitlearn_core.family import ModelFamily
from splitlearn_core.plan.conversions import WeightConversion
from splitlearn_core.plugins.contract import PREFIX, signature_problem, written
from splitlearn_core.plugins.metadata import FAMILY, HOST, STRATEGY, PluginEntry
from splitlearn_core.progress import passing_through
from splitlearn_core.quoting import said

if TYPE_CHECKING:
    from splitlearn_core.loading_strategy import LoadingStrategy
    from splitlearn_core.types import ProgressCallback


#: Kind of entry point -> the hook that returns what it names; those of hosts and cut stages name the object itself.
PROVIDING_HOOKS = {FAMILY: "splitlearn_model_families", STRATEGY: "splitlearn_loading_strategies"}
#: The hook of a family plugin for any type.
_ANY_TYPE_HOOK = "splitlearn_family_for"
#: A block-list of plugins: entry-point or distribution names.
BLOCK_VARIABLE = "SPLITLEARN_DISABLE_PLUGINS"
#: What foreign code may raise without ending this process.
ANY_ERROR = (Exception, SystemExit)

trace_log = logging.getLogger("splitlearn_core.trace")


@dataclass(frozen=True, slots=True)
class LoadedPlugin:
    """A plugin that was imported and verified, alone in a plugin manager of its own."""

    entry: PluginEntry
    manager: pluggy.PluginManager
    #: Names of the hooks that it implements.
    hooks: tuple[str, ...]
    families: Mapping[str, ModelFamily] = field(default_factory=dict)
    strategies: tuple[LoadingStrategy, ...] = ()
    #: What the entry point names, of a host or a cut stage.
    value: object = None

    def strategy(self, name: str) -> LoadingStrategy | None:
        """Return the strategy of a name, or None where the plugin has none."""
        return next((strategy for strategy in self.strategies if strategy.name == name), None)

    def family_for(self, model_type: str, progress: ProgressCallback) -> ModelFamily | None:
        """Return the family that a plugin for any type has for one; None if it has none.

        Raises:
            UnknownModelTypeError: The plugin refuses the type.
            BrokenPluginError: The hook raises, or returns another family.
        """
        # What the callback raises stops the hook, and is no fault of the plugin.
        with passing_through(progress) as report:
            results = self.call(_ANY_TYPE_HOOK, model_type=model_type, progress=report)
        for family in results:
            if not isinstance(family, ModelFamily) or family.model_type != model_type:
                problem = f"hook {_ANY_TYPE_HOOK} returned {family!r}, which is no family of model type {model_type!r}"
                raise broken(self.entry, problem)
            return family
        return None

    def call(self, hook: str, **arguments: object) -> list[Any]:
        """Call a hook, and return its results other than None; iterables become lists, mappings become dicts.

        Raises:
            BrokenPluginError: The hook raises, or returns a coroutine.
            UnknownModelTypeError: The hook for any type refuses one.
        """
        if hook not in self.hooks:
            return []
        with (
            translate(
                lambda error: broken(self.entry, f"hook {hook} raised {said(error)}", _field_hint(error)),
                ANY_ERROR,
                unchanged=(UnknownModelTypeError,) if hook == _ANY_TYPE_HOOK else (),
            ),
            traced(HOOK, self.entry, hook, **arguments) as step,
            plugin_output(),
        ):
            results: list[Any] = getattr(self.manager.hook, hook)(**arguments)
            # Generators run only now, and a mapping may compute its values on access.
            results = [dict(r) if isinstance(r, Mapping) else list(r) if _is_list(r) else r for r in results]
            step["answer"] = results[0] if len(results) == 1 else results or None
        for coroutine in filter(inspect.iscoroutine, results):
            coroutine.close()
            raise broken(self.entry, f"hook {hook} returned a coroutine: hooks return at once")
        return results

    def call_list(self, hook: str) -> list[Any]:
        """Call a hook that returns an iterable, and return its items."""
        results = self.call(hook)
        # pluggy drops None. From the hook that the entry point is for, None means a forgotten return.
        if not results and hook in self.hooks and hook == providing_hook(self.entry):
            raise broken(self.entry, f"hook {hook} returned None, not a list", "let the hook return the list")
        for result in results:
            if not isinstance(result, list):
                problem = f"hook {hook} returned {result!r}, not a list"
                raise broken(self.entry, problem, "let the hook return a list")
        return [item for result in results for item in result]


def load_plugin(entry: PluginEntry) -> LoadedPlugin:
    """Import a plugin, verify its hooks, and call those that return what it provides; or verify the object that it is.

    Raises:
        BrokenPluginError: Importing or a hook fails, or the plugin does not follow the hook specifications.
    """
    if entry.kind not in PROVIDING_HOOKS:
        value = _imported(entry)
        (_check_host if entry.kind == HOST else _check_stage)(entry, value)
        return LoadedPlugin(entry, pluggy.PluginManager(hookspecs.PROJECT), (), value=value)
    loaded = _verified(entry, _imported(entry))
    if entry.is_for_any_type and _ANY_TYPE_HOOK not in loaded.hooks:
        raise broken(entry, f"it does not implement hook {_ANY_TYPE_HOOK}")
    families = _families(entry, loaded.call_list("splitlearn_model_families"))
    strategies = _strategies(entry, loaded.call_list("splitlearn_loading_strategies"))
    return replace(loaded, families=families, strategies=strategies)


def providing_hook(entry: PluginEntry) -> str:
    """Return the hook that an entry point is for; empty if it names an object."""
    return _ANY_TYPE_HOOK if entry.is_for_any_type else PROVIDING_HOOKS.get(entry.kind, "")


def broken(entry: PluginEntry, problem: str, hint: str = "") -> BrokenPluginError:
    """Make the error of a broken plugin; the hint is what fixes it, if known."""
    return BrokenPluginError(f"plugin {entry.label} ({entry.what}) is broken: {problem}", hint=fix_hint(entry, hint))


def fix_hint(entry: PluginEntry, fix: str = "") -> str:
    """Return the hint for users who have a broken plugin installed.

    Args:
        entry: The plugin's entry point.
        fix: What fixes it, if known; by default what its kind of installation suggests.
    """
    return f"{fix or repair_of(entry)}; or leave the plugin out: {BLOCK_VARIABLE}={entry.distribution}"


def repair_of(entry: PluginEntry) -> str:
    """Return what fixes a broken package: an edit of its source, or a newer version by its authors."""
    if entry.editable:
        return f"fix it in {entry.origin}"
    if entry.is_local:
        return f"fix it in the source of {entry.origin}, and install it again"
    if entry.origin:
        return f"report it to its authors ({entry.origin})"
    return f"pip install --upgrade {entry.distribution}, or report it to its authors"


def _imported(entry: PluginEntry) -> object:
    def failure(error: BaseException) -> BrokenPluginError:
        module = entry.module.partition(":")[0]
        return broken(entry, f"importing {module!r} failed: {said(error)}", install_hint(error, entry))

    with translate(failure, ANY_ERROR, unchanged=()), traced(IMPORT, entry, entry.module), plugin_output():
        return import_object(entry.module)


def import_object(path: str, attribute: str = "") -> object:
    """Import ``module:attribute``, or by default the given attribute of the module; of none, the module itself."""
    module, _, name = path.partition(":")
    value: object = importlib.import_module(module)
    for part in filter(None, (name or attribute).split(".")):
        value = getattr(value, part)
    return value


def install_hint(error: BaseException, entry: PluginEntry) -> str:
    """Return the command that installs the package whose absence made an import fail; empty for other errors."""
    package = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    own = entry.module.partition(":")[0].partition(".")[0]
    return f"pip install {package}" if package and package != own else ""


def _verified(entry: PluginEntry, plugin: object) -> LoadedPlugin:
    """Register a plugin in a manager of its own, and check each of its hook implementations."""
    manager = pluggy.PluginManager(hookspecs.PROJECT)
    with (
        translate(lambda error: broken(entry, f"inspecting its hooks failed: {said(error)}"), ANY_ERROR, unchanged=()),
        plugin_output(),
    ):
        # Before the specifications are added: pluggy would stop at the first problem, and show no specification.
        manager.register(plugin)
        implementations = [
            (caller.name, implementation)
            for caller in manager.get_hookcallers(plugin) or ()
            for implementation in caller.get_hookimpls()
        ]
        problems = [signature_problem(hook, implementation) for hook, implementation in implementations]
        names = dir(plugin)
    if any(problems):
        raise broken(entry, "\n".join(filter(None, problems)))
    if not implementations:
        unmarked = next((name for name in names if name.startswith(PREFIX)), "")
        question = f"; is {unmarked} marked with @hookimpl?" if unmarked else ""
        raise broken(entry, f"module {entry.module!r} implements no hook{question}")
    with translate(lambda error: broken(entry, said(error)), pluggy.PluginValidationError):
        manager.add_hookspecs(hookspecs)
    return LoadedPlugin(entry, manager, tuple(dict.fromkeys(hook for hook, _ in implementations)))


def _field_hint(error: BaseException) -> str:
    """Return the field of ModelFamily that was probably meant, where a plugin gave one that does not exist."""
    unknown = re.match(r"ModelFamily\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if unknown is None:
        return ""
    names = [known.name for known in fields(ModelFamily)]
    close = difflib.get_close_matches(unknown[1], names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"ModelFamily has the fields {', '.join(names)}"


def _is_list(result: object) -> bool:
    return isinstance(result, Iterable) and not isinstance(result, str | bytes | Mapping)


def _families(entry: PluginEntry, items: list[Any]) -> dict[str, ModelFamily]:
    families: dict[str, ModelFamily] = {}
    for item in items:
        if not isinstance(item, ModelFamily):
            raise broken(entry, f"hook splitlearn_model_families returned {item!r}, which is not a ModelFamily")
        if item.model_type in families:
            raise broken(entry, f"hook splitlearn_model_families returned {item.model_type!r} twice")
        families[item.model_type] = item
    if entry.kind == FAMILY and not entry.is_for_any_type:
        _check_name(entry, "model type", families)
    return families


def _strategies(entry: PluginEntry, items: list[Any]) -> tuple[LoadingStrategy, ...]:
    if items:
        from splitlearn_core.loading_strategy import LoadingStrategy, reserved_names

        hook, taken = "splitlearn_loading_strategies", set(reserved_names())
        for item in items:
            if not isinstance(item, LoadingStrategy) or not isinstance(item.name, str):
                raise broken(entry, f"hook {hook} returned {item!r}, which is not a LoadingStrategy")
            if item.name in taken:
                raise broken(entry, f"hook {hook}: the name {item.name!r} is taken")
            taken.add(item.name)
    if entry.kind == STRATEGY:
        _check_name(entry, "strategy", [strategy.name for strategy in items])
    return tuple(items)


def _check_host(entry: PluginEntry, value: object) -> None:
    """Check, without calling it, that an object can be a host."""
    if entry.name in CORE_HOSTS:
        raise broken(entry, f"the name {entry.name!r} is core's own", "choose another name for the entry point")
    load = getattr(value, "load", None)
    specified = inspect.signature(ComponentHost.load)
    if inspect.isclass(value) or not isinstance(value, ComponentHost) or not callable(load):
        what = f"{type(value).__name__} {entry.module!r} is not a host"
        hint = "name an instance" if inspect.isclass(value) else "name a module or an object that has a function load"
        raise broken(entry, f"{what}: it needs a method {written('load', specified)}", hint)
    if inspect.iscoroutinefunction(load):
        raise broken(entry, "its load is asynchronous: it runs in a thread, write a plain def")
    try:
        inspect.signature(load).bind(*list(specified.parameters)[1:])
    except (TypeError, ValueError) as error:
        signature = f"def load{inspect.signature(load)}" if isinstance(error, TypeError) else "load"
        raise broken(entry, f"{signature} cannot be called as {written('load', specified)}") from error


def _check_stage(entry: PluginEntry, value: object) -> None:
    if isinstance(value, type) or not isinstance(value, CutStage):
        raise broken(entry, f"{entry.module!r} is {value!r}, which is not a CutStage", "name an object: module:object")
    if value.name != entry.name:
        raise broken(
            entry,
            f"its entry point is named {entry.name!r}, but the stage {value.name!r}",
            "name the entry point after the stage",
        )


def _check_name(entry: PluginEntry, what: str, provided: Iterable[str]) -> None:
    if entry.name not in provided:
        raise broken(
            entry,
            f"its entry point is named {entry.name!r}, but hook {PROVIDING_HOOKS[entry.kind]} provides "
            f"{', '.join(sorted(provided)) or 'none'}",
            f"name the entry point after the {what}",
        )


def mapping_problem(mapping: object, checkpoint_keys: Sequence[str]) -> str:
    """Return what is wrong with the result of ``splitlearn_map_weight_keys``; empty if it is valid."""
    if not isinstance(mapping, Mapping):
        return f"it returned {type(mapping).__name__}, not a mapping"
    absent = sorted(set(checkpoint_keys) - set(mapping))
    if absent:
        return f"no entry for {len(absent)} of {len(checkpoint_keys)} keys: {', '.join(absent[:5])}"
    sources: dict[str, str] = {}
    for key in checkpoint_keys:
        target = mapping[key]
        if isinstance(target, WeightConversion):
            if problem := _conversion_problem(target, key, mapping):
                return problem
        elif not isinstance(target, str | None):
            return f"{key!r} is mapped to {target!r}, not to a name, a conversion or None"
        elif target is not None and sources.setdefault(target, key) != key:
            return f"{sources[target]!r} and {key!r} are both mapped to {target!r}"
    return ""


def _conversion_problem(conversion: WeightConversion, key: str, mapping: Mapping[str, object]) -> str:
    if key not in conversion.keys:
        return f"{key!r} is mapped to a conversion to {', '.join(conversion.targets)} that it is no source of"
    # Of the first alone, so that the cost does not grow with the square of their number.
    others = [other for other in conversion.keys if mapping.get(other) is not conversion]
    if key == conversion.keys[0] and others:
        return f"{others[0]!r} is a source of the conversion of {key!r}, and is mapped to something else"
    return ""


#: Whether the code of a plugin is running in this thread.
_IN_PLUGIN: ContextVar[bool] = ContextVar("splitlearn_in_plugin", default=False)


@contextmanager
def plugin_output() -> Iterator[None]:
    """Mark what this thread runs as a plugin's code, whose output :func:`stdout_for_data` redirects."""
    before = _IN_PLUGIN.set(True)
    try:
        yield
    finally:
        _IN_PLUGIN.reset(before)


@contextmanager
def stdout_for_data() -> Iterator[None]:
    """Redirect to stderr what plugins write to ``sys.stdout``, and only that.

    What bypasses ``sys.stdout`` (a C library, a child process) is not redirected.
    """
    data = sys.stdout
    # None if it is closed: printing then does nothing, which must stay so.
    if data is not None:
        sys.stdout = cast("TextIO", _PluginAwareStdout(data))
    try:
        yield
    finally:
        sys.stdout = data


class _PluginAwareStdout:
    """Behaves as stderr in the code of plugins, and as stdout in all other code."""

    def __init__(self, data: TextIO) -> None:
        self._data = data

    def __getattr__(self, name: str) -> Any:
        return getattr((sys.stderr or self._data) if _IN_PLUGIN.get() else self._data, name)


#: ``1`` for lines, ``json`` for JSON lines; empty or ``0`` for neither.
TRACE_VARIABLE = "SPLITLEARN_TRACE"

IMPORT, HOOK, SKIPPED = "import", "hook", "skipped"

#: Shows the beginning of long values, and survives a ``__repr__`` that raises.
_repr = reprlib.Repr()
_repr.maxlist = _repr.maxtuple = _repr.maxdict = 2
_repr.maxstring = _repr.maxother = 100


@contextmanager
def traced(event: str, entry: PluginEntry, what: str, **arguments: object) -> Iterator[dict[str, Any]]:
    """Time a step, and log it when it ends.

    Args:
        event: :data:`IMPORT` or :data:`HOOK`.
        entry: The plugin's entry point.
        what: The module, or the hook.
        arguments: Those of the hook.

    Yields:
        A mapping in which the caller sets ``answer``, what the hook returned.
    """
    step: dict[str, Any] = {"answer": None}
    error, started = None, time.perf_counter()
    try:
        yield step
    except BaseException as raised:
        error = f"{type(raised).__name__}: {raised}"
        raise
    finally:
        if is_traced():
            milliseconds = round((time.perf_counter() - started) * 1000, 3)
            shown = {name: _shortened(value) for name, value in arguments.items()}
            answer, text = None, what
            if event == HOOK:
                answer = _shortened(step["answer"])
                text += f"({', '.join(f'{name}={value}' for name, value in shown.items())})"
                text += "" if error else f" -> {answer}"
            text += f" raised {error}" if error else ""
            _log(event, entry, what, f"{text}  [{milliseconds:.1f} ms]", shown, answer, milliseconds, error)


def trace_skipped(entry: PluginEntry, reason: str) -> None:
    """Log that a plugin was not used, and why."""
    _log(SKIPPED, entry, entry.what, f"{entry.what}: {reason}", {}, reason)


def _log(
    event: str,
    entry: PluginEntry,
    what: str,
    text: str,
    arguments: dict[str, str],
    answer: str | None,
    milliseconds: float | None = None,
    error: str | None = None,
) -> None:
    step = {
        "event": event,
        "plugin": entry.label,
        "what": what,
        "arguments": arguments,
        "answer": None if error else answer,
        "milliseconds": milliseconds,
        "error": error,
    }
    trace_log.debug("%-7s  %s  %s", event, entry.label, text, extra={"trace": step})


def _shortened(value: object) -> str:
    return " ".join(_repr.repr(value).split())


def is_traced() -> bool:
    """Return whether the records are wanted."""
    return trace_log.isEnabledFor(logging.DEBUG)


def trace_to_stderr() -> None:
    """Print every step on stderr from now on, in the form that ``SPLITLEARN_TRACE`` names."""
    if not any(isinstance(handler, _StderrHandler) for handler in trace_log.handlers):
        trace_log.addHandler(_StderrHandler())
    trace_log.setLevel(logging.DEBUG)
    # Handlers of the program would print the same lines a second time.
    trace_log.propagate = False


def trace_if_requested() -> None:
    """Print steps on stderr if ``SPLITLEARN_TRACE`` requests it."""
    if os.environ.get(TRACE_VARIABLE, "") not in ("", "0"):
        trace_to_stderr()


class _StderrHandler(logging.Handler):
    """Writes to the ``sys.stderr`` of the moment, which tests and notebooks replace."""

    def emit(self, record: logging.LogRecord) -> None:
        as_json = os.environ.get(TRACE_VARIABLE, "").lower() == "json"
        step: dict[str, Any] = record.trace  # type: ignore[attr-defined]  # every record of this logger has it
        line = json.dumps(step) if as_json else f"trace {record.getMessage()}"
        # A closed stderr must not fail the load that is traced.
        with suppress(OSError, ValueError):
            sys.stderr.write(line + "\n")
