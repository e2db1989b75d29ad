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

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

import splitlearn_core
from splitlearn_core.doctor.report import Finding, Level, note, ok, wrong
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


def check_import(library: str) -> list[Finding]:
    """Import a library; an exception is the finding."""
    # The package transformers itself imports nothing.
    importlib.import_module("transformers.modeling_utils" if library == "transformers" else library)
    return []


@dataclass(frozen=True, slots=True)
class Range:
    """The tested versions, from the lowest to the newest."""

    lowest: str
    #: ``2.13`` includes every 2.13.x.
    newest: str

    def __str__(self) -> str:
        return self.lowest if self.lowest == self.newest else f"{self.lowest} to {self.newest}"

    def is_above(self, version: str) -> bool:
        """Return whether a version is newer than all that were tested."""
        newest = Version(self.newest).release
        return Version(version).release[: len(newest)] > newest

    def judge(self, name: str, version: str | None, where: str = "", fix: str = "") -> Finding:
        """Compare the installed version of something, None if it is not installed, with the tested ones."""
        fix = fix or f"pip install '{name}>={self.lowest}'"
        if version is None:
            return wrong(f"{name} is not installed (tested: {self})", where, fix)
        try:
            if Version(version) < Version(self.lowest):
                return wrong(f"{name} {version} is older than what works (tested: {self})", where, fix)
            if self.is_above(version):
                fix = "splitlearn verify MODEL --split A B proves your model with it"
                return note(f"{name} {version} is newer than what was tested ({self})", where, fix)
        except InvalidVersion:
            return note(f"{name} {version} has a version that cannot be compared ({self})", where)
        return ok(f"{name} {version} (tested: {self})", where)


PYTHON = Range("3.11", "3.13")

#: The libraries that decide what a model computes; each has a finding of its own.
DECISIVE = ("torch", "transformers", "huggingface-hub", "safetensors")

#: The dependencies of core: distribution -> versions; the lowest are those that core requires.
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
    "websockets": Range("14.0", "17.4"),
}

#: Optional dependencies: extra -> what it is for, and its distributions.
EXTRAS = {
    "peft": ("adapters", {"peft": Range("0.18", "0.21")}),
}


def check_versions() -> Iterator[Finding]:
    """Compare what is installed with what was tested."""
    yield PYTHON.judge("Python", platform.python_version(), sys.executable, f"make an environment of Python {PYTHON}")
    yield from libraries({name: version_of(name) for name in LIBRARIES})
    for extra, (purpose, requirements) in EXTRAS.items():
        versions = {name: version_of(name) for name in requirements}
        if missing := [name for name, version in versions.items() if version is None]:
            yield note(f"{', '.join(missing)} not installed: no {purpose}", fix=f"pip install '{CORE}[{extra}]'")
        else:
            yield from (tested.judge(name, versions[name]) for name, tested in requirements.items())
    if not any(entry.kind == STRATEGY and entry.name == "gguf" for entry in registry().entries):
        yield note("GGUF files cannot be read", fix="pip install splitlearn-gguf")
    offered = {entry.name for entry in discover_commands()}
    for command, (package, _) in COMMANDS.items():
        if command not in offered:
            yield note(f"there is no command splitlearn {command.replace('.', ' ')}", fix=f"pip install {package}")


def libraries(versions: Mapping[str, str | None]) -> Iterator[Finding]:
    """Judge the dependencies of core.

    Args:
        versions: Distribution -> its installed version, or None.
    """
    as_tested = []
    for name, tested in LIBRARIES.items():
        finding = tested.judge(name, versions[name])
        if finding.level is Level.OK and name not in DECISIVE:
            as_tested.append(f"{name} {versions[name]}")
        else:
            yield finding
    if as_tested:
        yield ok(f"{', '.join(as_tested)}: as tested")


_GROUPS = (*KINDS, COMMAND_GROUP, API_GROUP)


def check_packages() -> Iterator[Finding]:
    """Examine the metadata of the packages that concern plugins; none of them is imported."""
    packages = installed(("torch", "transformers"))
    counts = Counter(package.name for package in packages)
    # The metadata of a package that is installed twice says nothing reliable.
    unique = [package for package in packages if counts[package.name] == 1]
    yield from damaged(unique)
    yield from duplicates(packages)
    for package in unique:
        if package.name not in LIBRARIES:
            yield from (*stale(package), *wrong_groups(package), *unmet(package))
    yield from other_core(Path(splitlearn_core.__file__).parents[1], packages)
    yield plugins_found(registry().entries)


def plugins_found(entries: Sequence[PluginEntry]) -> Finding:
    """Report how many plugins there are, and what to do if none provides a family."""
    if any(entry.kind == FAMILY for entry in entries):
        packages = {entry.distribution for entry in entries}
        return ok(f"found {len(entries)} entry points of {len(packages)} packages")
    path = os.pathsep.join(splitlearn_core.__path__)
    fix = "pip install splitlearn-gpt2, or the package of your model type, with this Python"
    return note("no installed package provides a model family", path, fix)


def damaged(packages: Sequence[Installed]) -> Iterator[Finding]:
    """Find metadata that cannot be read."""
    for package in packages:
        if package.problem:
            what = f"the metadata of {package.name} is damaged: {package.problem}"
            yield wrong(what, str(package.info), f"pip install --force-reinstall {package.origin or package.name}")


def duplicates(packages: Sequence[Installed]) -> Iterator[Finding]:
    """Find packages that are installed more than once, and say which copy is used and which is stale."""
    for name, count in Counter(package.name for package in packages).items():
        if count == 1:
            continue
        copies = [package for package in packages if package.name == name]
        used, newest = copies[0], max(copies, key=_version)
        others = ", ".join(f"{p.version or 'an unknown version'} in {p.info}" for p in copies if p is not used)
        if len({package.home for package in copies}) > 1:
            state = f"is used and hides {others}"
            fix = f"pip uninstall {name} until pip finds none; then {_reinstall(used)}"
        else:
            # In one folder, an installation left the older copy behind, whichever is listed first.
            is_stale = _version(used) < _version(newest)
            state = f"is used and is stale; {others} is not used" if is_stale else f"is used; {others} is stale"
            kept = newest if is_stale else used
            folders = " and ".join(str(package.info) for package in copies if package is not kept)
            fix = f"remove {folders}; then {_reinstall(kept)}"
        what = f"{name} is installed {count} times: {used.version or 'an unknown version'} {state}"
        yield wrong(what, str(used.info), fix)


def _version(package: Installed) -> Version:
    try:
        return Version(package.version)
    except InvalidVersion:
        return Version("0")


def stale(package: Installed) -> Iterator[Finding]:
    """Find an editable package whose project has changed its entry points since it was installed."""
    if not package.editable or package.problem:
        return
    path = Path(package.origin) / "pyproject.toml"
    reinstall = f"pip install -e {package.origin}"
    try:
        project = tomllib.loads(path.read_text("utf-8")).get("project", {})
        groups = project.get("entry-points", {})
        declared = {(group, *point) for group in _GROUPS for point in groups.get(group, {}).items()}
    except (OSError, ValueError, AttributeError) as error:
        what = f"{package.name} is an editable checkout whose pyproject.toml cannot be read: {reason(error)}"
        yield wrong(what, str(path), f"{reinstall}, or pip uninstall {package.name}")
        return
    if not project or "entry-points" in project.get("dynamic", ()):
        return
    actual = {point for point in package.points if point[0] in _GROUPS}
    changes = [f"{name} = {value} [{group}] was added" for group, name, value in sorted(declared - actual)]
    changes += [f"{name} = {value} [{group}] was removed" for group, name, value in sorted(actual - declared)]
    if changes:
        what = f"the entry points of {package.name} have changed since it was installed: {'; '.join(changes)}"
        yield wrong(what, str(path), reinstall)
    elif project.get("version", package.version) != package.version:
        what = f"{package.name} was installed as {package.version}, and its project is now {project['version']}"
        yield note(what, str(path), reinstall)


def wrong_groups(package: Installed) -> Iterator[Finding]:
    """Find entry points in misspelt groups, and packages that are named like plugins but have no entry point."""
    if package.problem or package.name == CORE:
        return
    for group, name, value in package.points:
        if group not in _GROUPS and (meant := nearest_group(group)):
            what = f"{package.name} has the entry point {name} = {value} in the group {group}, which nothing reads"
            fix = f'in its pyproject.toml write [project.entry-points."{meant}"], then {_reinstall(package)}'
            yield wrong(what, str(package.info / "entry_points.txt"), fix)
    if package.name.startswith("splitlearn-") and not any(nearest_group(group) for group, _, _ in package.points):
        what = f"{package.name} is named like a plugin, but has no entry point"
        fix = f'if it is one: [project.entry-points."{FAMILY_GROUP}"] in its pyproject.toml, then {_reinstall(package)}'
        yield note(what, str(package.info), fix)


def unmet(package: Installed) -> Iterator[Finding]:
    """Find requirements that are not met; those of core are checked with the versions."""
    for line in package.requires if package.name != CORE else ():
        try:
            required = Requirement(line)
        except InvalidRequirement as error:
            yield wrong(f"{package.name} requires {line!r}, which is invalid: {reason(error)}", str(package.info))
            continue
        if required.marker is not None and not required.marker.evaluate({"extra": ""}):
            continue
        version = version_of(required.name)
        if version is None or not required.specifier.contains(version, prereleases=True):
            requirement = f"{required.name}{required.specifier}"
            state = f"{version} is installed" if version else "it is not installed"
            what = f"{package.name} {package.version} requires {requirement}, but {state}"
            yield wrong(what, str(package.info), f"pip install '{requirement}'")


def other_core(code: Path, packages: Sequence[Installed]) -> Iterator[Finding]:
    """Find that the running code of core is not that of the installed package."""
    core = next((package for package in packages if canonicalize_name(package.name) == CORE), None)
    if core is None:
        what = f"{CORE} runs from a folder and is not installed: no plugin's requirement of its version can be checked"
        yield wrong(what, str(code), f"pip install {CORE}")
    elif not code.resolve().is_relative_to(Path(core.origin if core.editable else core.home).resolve()):
        what = f"the running code is not that of the installed {CORE} {core.version} ({core.origin or core.home})"
        yield note(what, str(code), "unset PYTHONPATH, unless that is what you want")


def _reinstall(package: Installed) -> str:
    return f"pip install {'-e ' if package.editable else '--force-reinstall '}{package.origin or package.name}"
