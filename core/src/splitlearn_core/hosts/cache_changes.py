"""Changes of a session's cache, which ride on its next step: rows, removed tokens, a fresh start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch

from splitlearn_core.build.kv_cache import PartCache
from splitlearn_core.errors import ConfigurationError, RemoteError


def checked_change(name: str, value: Any, rows: int, max_rows: int, length: int) -> Any:
    """Return the value of a change, checked against its cache."""
    if name in ("reorder", "select"):
        if isinstance(value, list) and len(value) <= max_rows and all(type(r) is int and 0 <= r < rows for r in value):
            return torch.tensor(value, dtype=torch.long)
    elif name == "repeat":
        if type(value) is int and 1 <= value <= max_rows and rows * value <= max_rows:
            return value
    elif name == "remove":
        if type(value) is int and 0 <= value <= length:
            return value
    elif value is None:
        return None
    raise RemoteError(
        f"the cache has {rows} sequences of {length} tokens and cannot {name} {str(value)[:50]}",
        code="bad_input",
    )


#: Name of a change -> the number of sequences after it.
ROWS_AFTER: Mapping[str, Callable[[int, Any], int]] = {
    "reorder": lambda rows, value: len(value),
    "select": lambda rows, value: len(value),
    "repeat": lambda rows, value: rows * int(value),
}


def _remove(cache: PartCache, count: int) -> None:
    # Older versions take 0 for the remaining length; a layer that does not record takes none to remove.
    if count:
        try:
            cache.crop(-count)
        except ConfigurationError as error:
            raise RemoteError(error.message, code="bad_input", hint=error.hint) from error
        return
    for layer in cache.layers:
        if getattr(layer, "record_past", False):
            cast("Any", layer).crop(0)


def _record(cache: PartCache) -> None:
    for layer in cache.layers:
        # Older versions do not have it.
        activate = getattr(layer, "activate_past_recording", None)
        if activate is not None:
            activate()


#: Name of a change -> the function that applies it.
CHANGES: Mapping[str, Callable[[PartCache, Any], None]] = {
    "reorder": lambda cache, rows: cache.reorder_cache(rows),
    "select": lambda cache, rows: cache.batch_select_indices(rows),
    "repeat": lambda cache, times: cache.batch_repeat_interleave(times),
    "remove": _remove,
    "reset": lambda cache, _: cache.reset(),
    "record": lambda cache, _: _record(cache),
}
