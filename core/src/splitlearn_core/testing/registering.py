"""Side effects of registering a plugin: ``python -m splitlearn_core.testing.registering MODEL_TYPE``.

Run in a new process, because nothing heavy may be imported before.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import sys
import threading
import warnings
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from splitlearn_core.plugins.registry import PluginRegistry

HEAVY = ("torch", "transformers")


def main(model_type: str) -> dict[str, Any]:
    """Register the plugin of a model type, and return what that changed.

    Returns:
        ``heavy``: libraries that were imported; ``changed``: changed state of the process;
        ``differs``: fields with another value in a second registration.
    """
    first = PluginRegistry()
    # Before the comparison: core scans the metadata, not the plugin.
    entries = first.entries
    before, printed = _state(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        family = first.family(model_type)
    after = _state()
    changed = {name: _difference(before[name], after[name]) for name in before if before[name] != after[name]}
    if printed.getvalue():
        changed["printed"] = printed.getvalue()
    values, second_values = (
        {field.name: _comparable(getattr(each, field.name)) for field in fields(each)}
        for each in (family, PluginRegistry(entries).family(model_type))
    )
    return {
        "heavy": [name for name in HEAVY if name in sys.modules],
        "changed": changed,
        "differs": [name for name, value in values.items() if second_values[name] != value],
    }


def _comparable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    # A hook may define a nested function in every call, or make an object that can be called: compared by name.
    name = getattr(value, "__qualname__", type(value).__qualname__)
    return f"{value.__module__}.{name}" if callable(value) else value


def _difference(before: Any, after: Any) -> str:
    """Describe a change; of environment variables only the names, because their values may be secrets."""
    if isinstance(before, dict):
        return ", ".join(sorted(name for name in {*before, *after} if before.get(name) != after.get(name)))
    return f"{before} -> {after}"


def _state() -> dict[str, Any]:
    root = logging.getLogger()
    return {
        "os.environ": dict(os.environ),
        "the working directory": str(Path.cwd()),
        "sys.path": list(sys.path),
        "sys.meta_path": [str(finder) for finder in sys.meta_path],
        "warnings.filters": [str(entry) for entry in warnings.filters],
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "logging": [logging.getLevelName(root.level), *map(str, root.handlers)],
    }


if __name__ == "__main__":
    json.dump(main(sys.argv[1]), sys.stdout)
