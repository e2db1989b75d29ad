"""Tell the users of a plugin, and so its authors, what it does that a later release refuses."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator

from splitlearn_core.deprecation import deprecated_api, deprecated_field, deprecated_in_hook
from splitlearn_core.errors import SplitLearnDeprecationWarning
from splitlearn_core.family import ModelFamily
from splitlearn_core.plugins.host import hook_functions
from splitlearn_core.plugins.metadata import PluginEntry


def announce(entry: PluginEntry, plugin: object, families: Iterable[ModelFamily]) -> None:
    """Warn of each deprecated thing that a plugin uses, at the place where it does.

    Args:
        entry: The plugin's entry point; its number of the plugin API is one that core takes.
        plugin: The plugin itself, imported and verified.
        families: What it provides.

    Warns:
        SplitLearnDeprecationWarning: Names the plugin and its version, what is deprecated, since and until when, and
            what to write instead. A filter that makes it an error keeps the plugin out of use.
    """
    for text, place in _findings(entry, plugin, families):
        file, _, line = place.rpartition(":")
        warning = SplitLearnDeprecationWarning(f"plugin {entry.label} ({entry.what}): {text}")
        warnings.warn_explicit(warning, SplitLearnDeprecationWarning, file, int(line))


def _findings(entry: PluginEntry, plugin: object, families: Iterable[ModelFamily]) -> Iterator[tuple[str, str]]:
    """Yield sentences, each with the file and line that it is about."""
    name = entry.module.partition(":")[0]
    module = f"{getattr(sys.modules.get(name), '__file__', None) or name}:1"
    if api := deprecated_api(int(entry.plugin_api)):
        yield api, module
    for function in hook_functions(entry, plugin):
        for text in deprecated_in_hook(function.hook, function.arguments):
            yield text, function.where or module
    for family in families:
        for old in family._old_names:  # noqa: SLF001  # written by core, for core
            yield f"{deprecated_field(old)} (family {family.model_type!r})", module
