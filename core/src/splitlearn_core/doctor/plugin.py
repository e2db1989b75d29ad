"""One plugin: imported, asked, and held against what it promises. Made in a process of its own."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import TextIO

from splitlearn_core.causes import cause_of, is_halted
from splitlearn_core.doctor.explaining import left_out
from splitlearn_core.doctor.findings import Finding, Level
from splitlearn_core.errors import PluginError
from splitlearn_core.plugins.asking import LoadedPlugin
from splitlearn_core.plugins.metadata import FAMILY, STRATEGY, PluginEntry
from splitlearn_core.plugins.registry import PluginStatus, registry

_NAME = "plugins"
_HEAVY = ("torch", "transformers")
_LEVELS = {"ready": Level.OK, "blocked": Level.NOTE}


def check_plugin(kind: str, name: str, distribution: str) -> list[Finding]:
    """Use a plugin as a load would, and say what came of it.

    Args:
        kind: ``family`` or ``strategy``.
        name: Its entry point's.
        distribution: The package's.
    """
    (entry,) = (e for e in registry().entries if (e.kind, e.name, e.distribution) == (kind, name, distribution))
    said, before = _Overheard(sys.stdout), set(sys.modules)
    with contextlib.redirect_stdout(said):
        status = registry().status(entry, check=True)
    found = [_as_finding(status) if status.status != "broken" else _broken(status)]
    if status.status == "ready":
        found += manners(entry, said.getvalue(), [name for name in _HEAVY if name in set(sys.modules) - before])
        if kind == FAMILY:
            found += promises(registry().plugin(name), registry().entries)
    return found


class _Overheard(io.StringIO):
    """Keeps what is printed, and lets it through: a plugin may end the process before anybody reads it here."""

    def __init__(self, through: TextIO) -> None:
        super().__init__()
        self._through = through

    def write(self, text: str) -> int:
        self._through.write(text)
        return super().write(text)

    def flush(self) -> None:
        self._through.flush()


def _as_finding(status: PluginStatus) -> Finding:
    entry = status.entry
    hooks = ", ".join(hook.removeprefix("splitlearn_") for hook in status.hooks)
    what = status.error or f"{entry.what}: {entry.label}, with {hooks}"
    if entry.label not in what:
        what = f"{entry.what} ({entry.label}): {what}"
    level = _LEVELS.get(status.status, Level.WRONG)
    # A conflict is between packages, and each of them tells the same.
    where = "" if status.status == "conflict" else entry.origin or entry.module
    return Finding(_NAME, level, what, where, status.hint)


def _broken(status: PluginStatus) -> Finding:
    """Judge a plugin that is broken: perhaps it is not, and a library that it imports is."""
    entry = status.entry
    cause = None
    try:
        if entry.kind == FAMILY:
            registry().plugin(entry.name)
        else:
            registry().strategies(None, entry.name)
    except PluginError as error:
        cause = cause_of(error)
    if cause is None or not cause.library:
        return _as_finding(status)
    if is_halted(cause.library):
        return left_out(_NAME, cause.library, f"{entry.what} ({entry.label})")
    return replace(_as_finding(status), mend=cause.hint)


def manners(entry: PluginEntry, said: str, heavy: list[str]) -> Iterator[Finding]:
    """Find what a plugin should not do where it is only imported and asked."""
    if said:
        what = f"{entry.label} prints when it is asked: {said.strip()[:60]!r}"
        yield Finding(
            _NAME, Level.NOTE, what, entry.module, "data of commands goes to stdout: print nothing, or log it"
        )
    if heavy:
        what = f"{entry.label} imports {' and '.join(heavy)} when it is asked, which takes seconds"
        yield Finding(_NAME, Level.NOTE, what, entry.module, "import them in the functions that use them")


def promises(loaded: LoadedPlugin, entries: tuple[PluginEntry, ...]) -> Iterator[Finding]:
    """Find what a plugin's families name that is not there, and families that nobody finds."""
    from splitlearn_core.checkpoint.strategy import reserved_names
    from splitlearn_core.loading.opening import bundled_checkpoint

    entry = loaded.entry
    named = {other.name for other in entries if (other.kind, other.distribution) == (FAMILY, entry.distribution)}
    for name in sorted(loaded.families.keys() - named):
        yield Finding(
            _NAME,
            Level.WRONG,
            f"{entry.label} provides the family {name!r}, and no entry point names it: it is never found",
            entry.module,
            f'add {name} = "{entry.module}" to its entry points, and install it again',
        )
    strategies = {*reserved_names(), *(s.name for s in loaded.strategies)}
    strategies |= {other.name for other in entries if other.kind == STRATEGY}
    for name, family in loaded.families.items():
        if family.preferred_strategy and family.preferred_strategy not in strategies:
            what = (
                f"the family {name!r} prefers the loading strategy {family.preferred_strategy!r}, which nobody provides"
            )
            yield Finding(_NAME, Level.WRONG, what, entry.module, f"one of {', '.join(sorted(strategies))}")
        if family.bundled_checkpoint and not (bundled_checkpoint(family) / "config.json").is_file():
            what = f"the family {name!r} says that it carries a checkpoint, and there is none"
            yield Finding(_NAME, Level.WRONG, what, str(bundled_checkpoint(family)), f"reinstall {entry.distribution}")
