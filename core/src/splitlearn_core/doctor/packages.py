"""What is installed: twice, stale, damaged, in a group that nobody reads, or without what it needs."""

from __future__ import annotations

import os
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

import splitlearn_core
from splitlearn_core.doctor.findings import Finding, Level
from splitlearn_core.doctor.tested import LIBRARIES
from splitlearn_core.plugins.metadata import (
    API_GROUP,
    CORE,
    FAMILY,
    FAMILY_GROUP,
    KINDS,
    Installed,
    PluginEntry,
    installed,
    nearest_group,
    version_of,
)
from splitlearn_core.plugins.registry import registry
from splitlearn_core.quoting import reason

_NAME = "packages"
_GROUPS = (*KINDS, API_GROUP)


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
            _NAME,
            Level.NOTE,
            "no installed package provides a model family",
            os.pathsep.join(splitlearn_core.__path__),
            "pip install splitlearn-gpt2, or the package of your model type, with this very Python",
        )
    else:
        yield Finding(_NAME, Level.OK, f"{len(entries)} entry points of {len(packages)} packages are found")


def damaged(found: Sequence[Installed]) -> Iterator[Finding]:
    """Find metadata that cannot be read."""
    for one in found:
        if one.problem:
            yield Finding(
                _NAME,
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
        yield Finding(_NAME, Level.WRONG, what, str(used.info), mend)


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
        yield Finding(_NAME, Level.WRONG, what, str(project), f"{again}, or pip uninstall {one.name}")
        return
    if not stated or "entry-points" in stated.get("dynamic", ()):
        return
    actual = {point for point in one.points if point[0] in _GROUPS}
    changes = [f"{name} = {value} [{group}] was added since" for group, name, value in sorted(wanted - actual)]
    changes += [f"{name} = {value} [{group}] is gone since" for group, name, value in sorted(actual - wanted)]
    if changes:
        what = f"{one.name} was installed with other entry points than its project has: {'; '.join(changes)}"
        yield Finding(_NAME, Level.WRONG, what, str(project), again)
    elif stated.get("version", one.version) != one.version:
        what = f"{one.name} was installed as {one.version}, and its project is {stated['version']} by now"
        yield Finding(_NAME, Level.NOTE, what, str(project), again)


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
                _NAME,
                Level.WRONG,
                f"{one.name} has the entry point {name} = {value} in the group {group}, which nobody reads",
                str(one.info / "entry_points.txt"),
                f'in its pyproject.toml write [project.entry-points."{meant}"], then {_again(one)}',
            )
    near = any(nearest_group(group) for group, _, _ in one.points)
    if one.name.startswith("splitlearn-") and not near:
        yield Finding(
            _NAME,
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
                _NAME, Level.WRONG, f"{one.name} requires {line!r}, which says nothing: {reason(error)}", str(one.info)
            )
            continue
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        there = version_of(wanted.name)
        if there is None or not wanted.specifier.contains(there, prereleases=True):
            state = f"{there} is installed" if there else "it is not installed"
            yield Finding(
                _NAME,
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
        yield Finding(_NAME, Level.WRONG, what, str(code), f"pip install {CORE}")
    elif not code.resolve().is_relative_to(Path(core.origin if core.editable else core.home).resolve()):
        yield Finding(
            _NAME,
            Level.NOTE,
            f"the code that runs is not that of the installed {CORE} {core.version} ({core.origin or core.home})",
            str(code),
            "unset PYTHONPATH, unless that is what you want",
        )


def _source(one: Installed) -> str:
    return one.origin or one.name


def _again(one: Installed) -> str:
    return f"pip install {'-e ' if one.editable else '--force-reinstall '}{_source(one)}"
