"""Python and the libraries, held against the versions that were tested."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator, Mapping

from packaging.version import InvalidVersion

from splitlearn_core.doctor.findings import Finding, Level
from splitlearn_core.doctor.tested import DECISIVE, EXTRAS, LIBRARIES, PYTHON, Range
from splitlearn_core.plugins.metadata import CORE, STRATEGY, version_of
from splitlearn_core.plugins.registry import registry

_NAME = "versions"


def check_versions() -> list[Finding]:
    """Compare what is installed with what was tested."""
    there = {name: version_of(name) for name in LIBRARIES}
    return [*python(platform.python_version()), *libraries(there), *extras()]


def python(version: str) -> Iterator[Finding]:
    """Judge the interpreter."""
    yield _judged("Python", version, PYTHON, sys.executable, f"make an environment of Python {PYTHON}")


def libraries(there: Mapping[str, str | None]) -> Iterator[Finding]:
    """Judge what core needs.

    Args:
        there: Distribution -> the version that is installed, or None.
    """
    well = []
    for name, tested in LIBRARIES.items():
        version, mend = there[name], f"pip install '{name}>={tested.lowest}'"
        if version is None:
            yield Finding(_NAME, Level.WRONG, f"{name} is not installed (tested: {tested})", mend=mend)
            continue
        finding = _judged(name, version, tested, "", mend)
        if finding.level is Level.OK and name not in DECISIVE:
            well.append(f"{name} {version}")
        else:
            yield finding
    if well:
        yield Finding(_NAME, Level.OK, f"{', '.join(well)}: as tested")


def _judged(name: str, version: str, tested: Range, where: str, mend: str) -> Finding:
    try:
        below, above = tested.is_below(version), tested.is_above(version)
    except InvalidVersion:
        return Finding(_NAME, Level.NOTE, f"{name} {version} has a version that cannot be compared ({tested})", where)
    if below:
        return Finding(_NAME, Level.WRONG, f"{name} {version} is older than what works (tested: {tested})", where, mend)
    if above:
        what = f"{name} {version} is newer than what was tested ({tested})"
        return Finding(_NAME, Level.NOTE, what, where, "splitlearn verify MODEL --split A B proves your model with it")
    return Finding(_NAME, Level.OK, f"{name} {version} (tested: {tested})", where)


def extras() -> Iterator[Finding]:
    """Say which of the things that need more packages can be done."""
    for extra, (purpose, needs) in EXTRAS.items():
        there = {name: version_of(name) for name in needs}
        missing = [name for name, version in there.items() if version is None]
        if missing:
            what = f"{', '.join(missing)} not installed: no {purpose}"
            yield Finding(_NAME, Level.NOTE, what, mend=f"pip install '{CORE}[{extra}]'")
        else:
            for name, tested in needs.items():
                mend = f"pip install '{name}>={tested.lowest}'"
                yield _judged(name, str(there[name]), tested, "", mend)
    if not any(entry.kind == STRATEGY and entry.name == "gguf" for entry in registry().entries):
        yield Finding(_NAME, Level.NOTE, "GGUF files cannot be read", mend="pip install splitlearn-gguf")
