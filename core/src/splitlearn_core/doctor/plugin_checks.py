"""One plugin: imported, called, compared with what it promises; and its bundled model verified."""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TextIO

from splitlearn_core.doctor.report import Finding, Level, left_out
from splitlearn_core.environment_errors import cause_of, is_halted
from splitlearn_core.errors import PluginError
from splitlearn_core.family import ModelFamily
from splitlearn_core.plugins.host import LoadedPlugin
from splitlearn_core.plugins.metadata import FAMILY, STRATEGY, PluginEntry
from splitlearn_core.plugins.registry import PluginStatus, registry

_PLUGIN = "plugins"
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
    return Finding(_PLUGIN, level, what, where, status.hint)


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
        return left_out(_PLUGIN, cause.library, f"{entry.what} ({entry.label})")
    return replace(_as_finding(status), mend=cause.hint)


def manners(entry: PluginEntry, said: str, heavy: list[str]) -> Iterator[Finding]:
    """Find what a plugin should not do where it is only imported and asked."""
    if said:
        what = f"{entry.label} prints when it is asked: {said.strip()[:60]!r}"
        yield Finding(
            _PLUGIN, Level.NOTE, what, entry.module, "data of commands goes to stdout: print nothing, or log it"
        )
    if heavy:
        what = f"{entry.label} imports {' and '.join(heavy)} when it is asked, which takes seconds"
        yield Finding(_PLUGIN, Level.NOTE, what, entry.module, "import them in the functions that use them")


def promises(loaded: LoadedPlugin, entries: tuple[PluginEntry, ...]) -> Iterator[Finding]:
    """Find what a plugin's families name that is not there, and families that nobody finds."""
    from splitlearn_core.loading.opening import bundled_checkpoint
    from splitlearn_core.loading_strategy import reserved_names

    entry = loaded.entry
    named = {other.name for other in entries if (other.kind, other.distribution) == (FAMILY, entry.distribution)}
    for name in sorted(loaded.families.keys() - named):
        yield Finding(
            _PLUGIN,
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
            yield Finding(_PLUGIN, Level.WRONG, what, entry.module, f"one of {', '.join(sorted(strategies))}")
        if family.bundled_checkpoint and not (bundled_checkpoint(family) / "config.json").is_file():
            what = f"the family {name!r} says that it carries a checkpoint, and there is none"
            yield Finding(
                _PLUGIN, Level.WRONG, what, str(bundled_checkpoint(family)), f"reinstall {entry.distribution}"
            )


_SELFTEST = "self-test"


def check_itself() -> list[Finding]:
    """Split and compare the model that an installed plugin carries."""
    from splitlearn_core.loading.load import import_builders
    from splitlearn_core.loading.opening import BUNDLED, open_model
    from splitlearn_core.loading.options import LoadOptions
    from splitlearn_core.plan.split_points import count_layers
    from splitlearn_core.verification import verify_split

    family = _carrier()
    if family is None:
        return [
            Finding(
                _SELFTEST,
                Level.NOTE,
                "left out: no usable plugin carries a model",
                mend="pip install splitlearn-gpt2, which does; or prove your own: splitlearn verify MODEL --split A B",
            )
        ]
    model = open_model(BUNDLED + family.model_type)
    layers = count_layers(family, model.config)
    import_builders(family)
    started = time.perf_counter()
    points = (max(1, layers // 3), max(2, 2 * layers // 3))
    proof = verify_split(model, points, "auto", LoadOptions("cpu", "auto", None), lambda _: None)
    took = time.perf_counter() - started
    if proof.equal:
        what = f"{model.name} cut at {points[0]} and {points[1]} equals the uncut model to the last bit ({took:.1f} s)"
        return [Finding(_SELFTEST, Level.OK, what)]
    unequal = ", ".join(name for name, equal in proof.checks.items() if not equal)
    what = f"{model.name} cut differs from the uncut model by up to {proof.max_difference:.3g} in {unequal}"
    return [
        Finding(_SELFTEST, Level.WRONG, what, str(model.checkpoint.folder), "report it, with splitlearn doctor --json")
    ]


def _carrier() -> ModelFamily | None:
    """Return a family whose plugin carries a checkpoint; a plugin that is broken has a finding already."""
    for model_type in registry().model_types():
        try:
            family = registry().family(model_type)
        except PluginError:
            continue
        if family.bundled_checkpoint:
            return family
    return None
