"""One plugin: imported, called, compared with what it promises; and its bundled model verified."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TextIO

from splitlearn_core.checkpoint.files import CONFIG
from splitlearn_core.doctor.report import Finding, Level, is_blocked, left_out, note, ok, wrong
from splitlearn_core.environment_errors import cause_of
from splitlearn_core.errors import PluginError
from splitlearn_core.family import ModelFamily
from splitlearn_core.loading.load import import_builders
from splitlearn_core.loading.opening import BUNDLED, bundled_checkpoint, open_model
from splitlearn_core.loading.options import LoadOptions
from splitlearn_core.loading_strategy import reserved_names
from splitlearn_core.plan.split_points import count_layers
from splitlearn_core.plugins.host import LoadedPlugin
from splitlearn_core.plugins.metadata import FAMILY, STRATEGY, PluginEntry
from splitlearn_core.plugins.registry import PluginStatus, registry
from splitlearn_core.verification import verify_split

_HEAVY = ("torch", "transformers")
_LEVELS = {"ready": Level.OK, "blocked": Level.NOTE}


def check_plugin(kind: str, name: str, distribution: str) -> Iterator[Finding]:
    """Use a plugin as a load would.

    Args:
        kind: ``family`` or ``strategy``.
        name: The name of its entry point.
        distribution: Its package.
    """
    (entry,) = (e for e in registry().entries if (e.kind, e.name, e.distribution) == (kind, name, distribution))
    output, before = _Tee(sys.stdout), set(sys.modules)
    with contextlib.redirect_stdout(output):
        status = registry().status(entry, check=True)
    yield _status_finding(status)
    if status.status == "ready":
        yield from side_effects(
            entry, output.getvalue(), [name for name in _HEAVY if name in set(sys.modules) - before]
        )
        if kind == FAMILY:
            yield from broken_promises(registry().plugin(name), registry().entries)


class _Tee(io.StringIO):
    """Keeps what is printed, and passes it on: a plugin may end the process before it is read here."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(text)
        return super().write(text)

    def flush(self) -> None:
        self._stream.flush()


def _status_finding(status: PluginStatus) -> Finding:
    """Return the finding on a plugin; where it is broken because a library is, the finding is about the library."""
    entry = status.entry
    hooks = ", ".join(hook.removeprefix("splitlearn_") for hook in status.hooks)
    what = status.error or f"{entry.what}: {entry.label}, with {hooks}"
    if entry.label not in what:
        what = f"{entry.what} ({entry.label}): {what}"
    # A conflict is between packages, and all of them have the same finding.
    where = "" if status.status == "conflict" else entry.origin or entry.module
    finding = Finding("", _LEVELS.get(status.status, Level.WRONG), what, where, status.hint)
    if status.status != "broken":
        return finding
    try:
        if entry.kind == FAMILY:
            registry().plugin(entry.name)
        else:
            registry().strategies(None, entry.name)
    except PluginError as error:
        cause = cause_of(error)
        if cause is not None and is_blocked(cause.library):
            return left_out(cause.library, f"{entry.what} ({entry.label})")
        if cause is not None and cause.library:
            return replace(finding, fix=cause.hint)
    return finding


def side_effects(entry: PluginEntry, output: str, heavy: Sequence[str]) -> Iterator[Finding]:
    """Find what a plugin should not do where it is only imported and its hooks are called."""
    if output:
        what = f"{entry.label} prints when its hooks are called: {output.strip()[:60]!r}"
        yield note(what, entry.module, "data of commands goes to stdout: print nothing, or log it")
    if heavy:
        what = f"{entry.label} imports {' and '.join(heavy)} when its hooks are called, which takes seconds"
        yield note(what, entry.module, "import them in the functions that use them")


def broken_promises(loaded: LoadedPlugin, entries: Sequence[PluginEntry]) -> Iterator[Finding]:
    """Find what the families of a plugin name that does not exist, and families without an entry point."""
    entry = loaded.entry
    named = {other.name for other in entries if (other.kind, other.distribution) == (FAMILY, entry.distribution)}
    for name in sorted(loaded.families.keys() - named):
        what = f"{entry.label} provides the family {name!r}, and no entry point names it: it is never used"
        yield wrong(what, entry.module, f'add {name} = "{entry.module}" to its entry points, and install it again')
    strategies = {*reserved_names(), *(strategy.name for strategy in loaded.strategies)}
    strategies |= {other.name for other in entries if other.kind == STRATEGY}
    for name, family in loaded.families.items():
        preferred = family.preferred_strategy
        if preferred and preferred not in strategies:
            what = f"the family {name!r} prefers the loading strategy {preferred!r}, which no plugin provides"
            yield wrong(what, entry.module, f"one of {', '.join(sorted(strategies))}")
        if family.bundled_checkpoint and not (bundled_checkpoint(family) / CONFIG).is_file():
            what = f"the family {name!r} says that it carries a checkpoint, and there is none"
            yield wrong(what, str(bundled_checkpoint(family)), f"reinstall {entry.distribution}")


def check_self() -> Iterator[Finding]:
    """Split the model that an installed plugin carries, and compare it with the unsplit one."""
    family = _carrier()
    if family is None:
        fix = "pip install splitlearn-gpt2, which does; or prove your own: splitlearn verify MODEL --split A B"
        yield note("left out: no usable plugin carries a model", fix=fix)
        return
    model = open_model(BUNDLED + family.model_type)
    layers = count_layers(family, model.config)
    a, b = max(1, layers // 3), max(2, 2 * layers // 3)
    import_builders(family)
    started = time.perf_counter()
    proof = verify_split(model, (a, b), "auto", LoadOptions(), lambda _: None)
    seconds = time.perf_counter() - started
    if proof.equal:
        yield ok(f"{model.name} cut at {a} and {b} equals the uncut model to the last bit ({seconds:.1f} s)")
    else:
        unequal = ", ".join(name for name, equal in proof.checks.items() if not equal)
        what = f"{model.name} cut differs from the uncut model by up to {proof.max_difference:.3g} in {unequal}"
        yield wrong(what, str(model.checkpoint.folder), "report it, with splitlearn doctor --json")


def _carrier() -> ModelFamily | None:
    """Return a family whose plugin carries a checkpoint; a broken plugin has a finding already."""
    for model_type in registry().model_types():
        with contextlib.suppress(PluginError):
            family = registry().family(model_type)
            if family.bundled_checkpoint:
                return family
    return None
