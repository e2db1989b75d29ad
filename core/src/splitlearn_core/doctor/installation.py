"""What is installed: libraries and their versions; packages that are damaged, stale, duplicate or incomplete."""

from __future__ import annotations

import importlib
import os
import platform
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

import splitlearn_core
from splitlearn_core.doctor.report import Finding, Level
from splitlearn_core.plugins.known import COMMANDS
from splitlearn_core.plugins.metadata import (
    API_GROUP,
    COMMAND_GROUP,
    CORE,
    FAMILY,
    FAMILY_GROUP,
    KINDS,
    STRATEGY,
    Installed,
    PluginEntry,
    discover_commands,
    installed,
    nearest_group,
    version_of,
)
from splitlearn_core.plugins.registry import registry
from splitlearn_core.quoting import reason

#: The module of a library to import: that of transformers imports nothing by itself.
_MODULES = {"transformers": "transformers.modeling_utils"}


def check_import(library: str) -> list[Finding]:
    """Import a library; what it raises is the finding."""
    importlib.import_module(_MODULES.get(library, library))
    return []


@dataclass(frozen=True, slots=True)
class Range:
    """Versions from the lowest to the newest that was tried, both included."""

    lowest: str
    #: As exact as it is written: ``2.13`` means every 2.13.
    newest: str

    def __str__(self) -> str:
        return self.lowest if self.lowest == self.newest else f"{self.lowest} to {self.newest}"

    def is_below(self, version: str) -> bool:
        return Version(version) < Version(self.lowest)

    def is_above(self, version: str) -> bool:
        newest = Version(self.newest).release
        return Version(version).release[: len(newest)] > newest


PYTHON = Range("3.11", "3.13")

#: Those of the libraries below that decide what models come out as.
DECISIVE = ("torch", "transformers", "huggingface-hub", "safetensors")

#: Distribution -> its versions. What core needs; the lowest are those of its dependencies.
LIBRARIES = {
    "torch": Range("2.13", "2.13"),
    "transformers": Range("5.4", "5.24"),
    "huggingface-hub": Range("1.5", "2.4"),
    "safetensors": Range("0.6.2", "0.8"),
    "click": Range("8.2", "8.5"),
    "importlib-metadata": Range("8.7", "10.2"),
    "packaging": Range("24.2", "26.3"),
    "pluggy": Range("1.7", "1.7"),
    "psutil": Range("6.0", "7.2"),
    "pyyaml": Range("6.0.2", "6.0.4"),
    "tqdm": Range("4.67", "4.70"),
}

#: What core can do with more: extra -> what it is good for, and the distributions it needs.
EXTRAS = {
    "peft": ("adapters", {"peft": Range("0.18", "0.21")}),
}


_VERSIONS = "versions"


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
            yield Finding(_VERSIONS, Level.WRONG, f"{name} is not installed (tested: {tested})", mend=mend)
            continue
        finding = _judged(name, version, tested, "", mend)
        if finding.level is Level.OK and name not in DECISIVE:
            well.append(f"{name} {version}")
        else:
            yield finding
    if well:
        yield Finding(_VERSIONS, Level.OK, f"{', '.join(well)}: as tested")


def _judged(name: str, version: str, tested: Range, where: str, mend: str) -> Finding:
    try:
        below, above = tested.is_below(version), tested.is_above(version)
    except InvalidVersion:
        return Finding(
            _VERSIONS, Level.NOTE, f"{name} {version} has a version that cannot be compared ({tested})", where
        )
    if below:
        return Finding(
            _VERSIONS, Level.WRONG, f"{name} {version} is older than what works (tested: {tested})", where, mend
        )
    if above:
        what = f"{name} {version} is newer than what was tested ({tested})"
        return Finding(
            _VERSIONS, Level.NOTE, what, where, "splitlearn verify MODEL --split A B proves your model with it"
        )
    return Finding(_VERSIONS, Level.OK, f"{name} {version} (tested: {tested})", where)


def extras() -> Iterator[Finding]:
    """Say which of the things that need more packages can be done."""
    for extra, (purpose, needs) in EXTRAS.items():
        there = {name: version_of(name) for name in needs}
        missing = [name for name, version in there.items() if version is None]
        if missing:
            what = f"{', '.join(missing)} not installed: no {purpose}"
            yield Finding(_VERSIONS, Level.NOTE, what, mend=f"pip install '{CORE}[{extra}]'")
        else:
            for name, tested in needs.items():
                mend = f"pip install '{name}>={tested.lowest}'"
                yield _judged(name, str(there[name]), tested, "", mend)
    if not any(entry.kind == STRATEGY and entry.name == "gguf" for entry in registry().entries):
        yield Finding(_VERSIONS, Level.NOTE, "GGUF files cannot be read", mend="pip install splitlearn-gguf")
    offered = {entry.name for entry in discover_commands()}
    for command, (package, _) in COMMANDS.items():
        if command not in offered:
            words = command.replace(".", " ")
            yield Finding(
                _VERSIONS, Level.NOTE, f"there is no command splitlearn {words}", mend=f"pip install {package}"
            )


_PACKAGES = "packages"
_GROUPS = (*KINDS, COMMAND_GROUP, API_GROUP)


def check_packages() -> list[Finding]:
    """Look at the metadata of everything that has to do with plugins; nothing of it is imported."""
    found = installed(("torch", "transformers"))
    counts = Counter(one.name for one in found)
    # Of a package that is there twice, no copy says what holds of it.
    alone = [one for one in found if counts[one.name] == 1]
    kin = [one for one in alone if one.name not in LIBRARIES]
    problems = [
        *damaged(alone),
        *twice(found),
        *(finding for one in kin for finding in (*stale(one), *wrong_groups(one), *unmet(one))),
        *elsewhere(Path(splitlearn_core.__file__).parents[1], found),
    ]
    return [*problems, *plugins_found(registry().entries)]


def plugins_found(entries: Sequence[PluginEntry]) -> Iterator[Finding]:
    """Say how many plugins there are, and that there is nothing to load models with where there is none."""
    packages = {entry.distribution for entry in entries}
    if not any(entry.kind == FAMILY for entry in entries):
        yield Finding(
            _PACKAGES,
            Level.NOTE,
            "no installed package provides a model family",
            os.pathsep.join(splitlearn_core.__path__),
            "pip install splitlearn-gpt2, or the package of your model type, with this very Python",
        )
    else:
        yield Finding(_PACKAGES, Level.OK, f"{len(entries)} entry points of {len(packages)} packages are found")


def damaged(found: Sequence[Installed]) -> Iterator[Finding]:
    """Find metadata that cannot be read."""
    for one in found:
        if one.problem:
            yield Finding(
                _PACKAGES,
                Level.WRONG,
                f"the metadata of {one.name} is damaged: {one.problem}",
                str(one.info),
                f"pip install --force-reinstall {_source(one)}",
            )


def twice(found: Sequence[Installed]) -> Iterator[Finding]:
    """Find packages that are installed more than once, and say which is used and which is stale."""
    for name in (name for name, count in Counter(one.name for one in found).items() if count > 1):
        copies = [one for one in found if one.name == name]
        used, newest = copies[0], max(copies, key=_version)
        others = ", ".join(f"{_of(one)} in {one.info}" for one in copies if one is not used)
        if len({one.home for one in copies}) > 1:
            so, mend = f"is used and hides {others}", f"pip uninstall {name} until pip finds none; then {_again(used)}"
        else:
            # Of two in one folder, the older was left behind by an installation, whichever is found first.
            stale_too = _version(used) < _version(newest)
            so = f"is used and is stale; {others} is not used" if stale_too else f"is used; {others} is stale"
            kept = newest if stale_too else used
            mend = f"remove {' and '.join(str(one.info) for one in copies if one is not kept)}; then {_again(kept)}"
        what = f"{name} is installed {len(copies)} times: {_of(used)} {so}"
        yield Finding(_PACKAGES, Level.WRONG, what, str(used.info), mend)


def _of(one: Installed) -> str:
    return one.version or "a version unknown"


def _version(one: Installed) -> Version:
    try:
        return Version(one.version)
    except InvalidVersion:
        return Version("0")


def stale(one: Installed) -> Iterator[Finding]:
    """Find editable packages whose project says other entry points than were installed."""
    if not one.editable or one.problem:
        return
    project = Path(one.origin) / "pyproject.toml"
    again = f"pip install -e {one.origin}"
    try:
        stated = tomllib.loads(project.read_text("utf-8")).get("project", {})
        wanted = _stated_points(stated)
    except (OSError, ValueError, AttributeError) as error:
        what = f"{one.name} is an editable checkout whose pyproject.toml cannot be read: {reason(error)}"
        yield Finding(_PACKAGES, Level.WRONG, what, str(project), f"{again}, or pip uninstall {one.name}")
        return
    if not stated or "entry-points" in stated.get("dynamic", ()):
        return
    actual = {point for point in one.points if point[0] in _GROUPS}
    changes = [f"{name} = {value} [{group}] was added since" for group, name, value in sorted(wanted - actual)]
    changes += [f"{name} = {value} [{group}] is gone since" for group, name, value in sorted(actual - wanted)]
    if changes:
        what = f"{one.name} was installed with other entry points than its project has: {'; '.join(changes)}"
        yield Finding(_PACKAGES, Level.WRONG, what, str(project), again)
    elif stated.get("version", one.version) != one.version:
        what = f"{one.name} was installed as {one.version}, and its project is {stated['version']} by now"
        yield Finding(_PACKAGES, Level.NOTE, what, str(project), again)


def _stated_points(project: dict[str, Any]) -> set[tuple[str, str, str]]:
    groups = project.get("entry-points", {})
    return {(group, name, value) for group in _GROUPS for name, value in groups.get(group, {}).items()}


def wrong_groups(one: Installed) -> Iterator[Finding]:
    """Find entry points in groups that look like ours, and packages that look like plugins and have none."""
    if one.problem or one.name == CORE:
        return
    for group, name, value in one.points:
        meant = nearest_group(group) if group not in _GROUPS else ""
        if meant:
            yield Finding(
                _PACKAGES,
                Level.WRONG,
                f"{one.name} has the entry point {name} = {value} in the group {group}, which nobody reads",
                str(one.info / "entry_points.txt"),
                f'in its pyproject.toml write [project.entry-points."{meant}"], then {_again(one)}',
            )
    near = any(nearest_group(group) for group, _, _ in one.points)
    if one.name.startswith("splitlearn-") and not near:
        yield Finding(
            _PACKAGES,
            Level.NOTE,
            f"{one.name} is named like a plugin, and has no entry point",
            str(one.info),
            f'if it is one: [project.entry-points."{FAMILY_GROUP}"] in its pyproject.toml, then {_again(one)}',
        )


def unmet(one: Installed) -> Iterator[Finding]:
    """Find requirements that what is installed does not meet; those of core itself are checked as versions."""
    for line in one.requires if one.name != CORE else ():
        try:
            wanted = Requirement(line)
        except InvalidRequirement as error:
            yield Finding(
                _PACKAGES,
                Level.WRONG,
                f"{one.name} requires {line!r}, which says nothing: {reason(error)}",
                str(one.info),
            )
            continue
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        there = version_of(wanted.name)
        if there is None or not wanted.specifier.contains(there, prereleases=True):
            state = f"{there} is installed" if there else "it is not installed"
            yield Finding(
                _PACKAGES,
                Level.WRONG,
                f"{one.name} {one.version} requires {wanted.name}{wanted.specifier}, and {state}",
                str(one.info),
                f"pip install '{wanted.name}{wanted.specifier}'",
            )


def elsewhere(code: Path, found: Sequence[Installed]) -> Iterator[Finding]:
    """Say where the code of core that runs is not that of the package that is installed."""
    core = next((one for one in found if canonicalize_name(one.name) == CORE), None)
    if core is None:
        what = f"{CORE} runs from a folder and is not installed: its version is unknown, and so is every plugin's need"
        yield Finding(_PACKAGES, Level.WRONG, what, str(code), f"pip install {CORE}")
    elif not code.resolve().is_relative_to(Path(core.origin if core.editable else core.home).resolve()):
        yield Finding(
            _PACKAGES,
            Level.NOTE,
            f"the code that runs is not that of the installed {CORE} {core.version} ({core.origin or core.home})",
            str(code),
            "unset PYTHONPATH, unless that is what you want",
        )


def _source(one: Installed) -> str:
    return one.origin or one.name


def _again(one: Installed) -> str:
    return f"pip install {'-e ' if one.editable else '--force-reinstall '}{_source(one)}"
