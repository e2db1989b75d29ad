"""Select the families to test by name; imports neither torch nor pytest."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import replace

from packaging.utils import canonicalize_name

from splitlearn_core.errors import ConfigurationError, PluginConflictError, UnknownModelTypeError
from splitlearn_core.plugins.metadata import STRATEGY, PluginEntry, discover
from splitlearn_core.plugins.registry import blocked_by, registry


def choose_families(names: Iterable[str]) -> tuple[PluginEntry, ...]:
    """Return the families with these names: model types, or distributions for all of their model types.

    Raises:
        UnknownModelTypeError: No installed plugin has the name, or a variable blocks it.
        PluginConflictError: Several distributions claim the model type.
        ConfigurationError: The name is that of a loading strategy.
    """
    entries = discover()
    chosen = tuple(dict.fromkeys(entry for name in names for entry in _entries_named(name, entries)))
    for entry in chosen:
        if variable := blocked_by(entry):
            raise UnknownModelTypeError(
                f"the plugin for model type {entry.name!r} ({entry.label}) is blocked by {variable}",
                hint=f"change or unset {variable}",
            )
    return chosen


def _entries_named(name: str, entries: tuple[PluginEntry, ...]) -> list[PluginEntry]:
    families = [entry for entry in entries if entry.model_type]
    for_any = [entry for entry in entries if entry.is_for_any_type and not blocked_by(entry)]
    claimed = [entry for entry in families if entry.model_type == name]
    by_type = [entry for entry in claimed if not blocked_by(entry)] or claimed
    if len(by_type) > 1:
        owners = [entry.distribution for entry in by_type]
        raise PluginConflictError(
            f"model type {name!r} is claimed by {' and '.join(owners)}", hint=f"name one of them: {' or '.join(owners)}"
        )
    by_distribution = [e for e in families if canonicalize_name(e.distribution) == canonicalize_name(name)]
    if by_type or by_distribution:
        return by_type or by_distribution
    if for_any and canonicalize_name(for_any[0].distribution) == canonicalize_name(name):
        raise ConfigurationError(
            f"{name!r} provides any model type that no other plugin does, and the kit tests one at a time",
            hint="give a model type: splitlearn plugins test TYPE",
        )
    strategies = [entry for entry in entries if entry.kind == STRATEGY]
    if any(entry.is_named(frozenset({canonicalize_name(name)})) for entry in strategies):
        raise ConfigurationError(
            f"{name!r} is a loading strategy, and the kit tests families",
            hint="splitlearn plugins --check tries it; its numbers are compared with transformers by torch.equal",
        )
    if for_any:
        # Raises if the type is refused.
        registry().family(name)
        return [replace(for_any[0], name=name)]
    known = sorted({entry.name for entry in families} | {entry.distribution for entry in families})
    # Compared without case.
    spelled = {other.lower(): other for other in known}
    close = difflib.get_close_matches(name.lower(), spelled, n=1)
    raise UnknownModelTypeError(
        f"no installed plugin is named {name!r} (there are: {', '.join(known) or 'none'})",
        hint=(f"did you mean {spelled[close[0]]!r}? " if close else "") + "splitlearn plugins lists what is installed",
    )
