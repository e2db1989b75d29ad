"""The only module that reads installed metadata: which plugins are there, without importing any."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from functools import cache
from typing import cast
from urllib.parse import unquote, urlsplit

# The backport rather than the standard library: one behaviour for entry points and damaged
# metadata on every supported Python. Its classes must not be mixed with the standard ones.
import importlib_metadata
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

log = logging.getLogger(__name__)

#: Entry points of plugins: the name is the model type, the value the module with the hooks.
FAMILY_GROUP = "splitlearn.families"
#: Entry points of packages that add a loading strategy to every family: the name is the strategy's.
STRATEGY_GROUP = "splitlearn.strategies"
FAMILY, STRATEGY = "family", "strategy"
#: Group -> what its entry points name.
KINDS = {FAMILY_GROUP: FAMILY, STRATEGY_GROUP: STRATEGY}
#: An optional entry point ``version = "1"`` that says which plugin API a plugin was made for.
API_GROUP = "splitlearn.plugin_api"
CORE = "splitlearn-core"


@dataclass(frozen=True, slots=True)
class PluginEntry:
    """One entry point, as the metadata of an installed distribution states it."""

    #: The model type of a family, or the name of a loading strategy.
    name: str
    #: The module with the hook implementations, ``package.module``.
    module: str
    distribution: str
    version: str
    #: The folder of an editable checkout, or the URL it was installed from; empty for an index.
    origin: str = ""
    editable: bool = False
    plugin_api: str = "1"
    #: What the distribution demands of core, ``>=0.1``; empty where it demands nothing.
    requires_core: str = ""
    #: ``family`` or ``strategy``.
    kind: str = FAMILY

    @property
    def model_type(self) -> str:
        """The model type of a family; empty for a strategy."""
        return self.name if self.kind == FAMILY else ""

    @property
    def what(self) -> str:
        """What the entry point names, in words."""
        return f"model type {self.name!r}" if self.kind == FAMILY else f"loading strategy {self.name!r}"

    @property
    def label(self) -> str:
        return f"{self.distribution} {self.version}"

    def is_named(self, names: frozenset[str]) -> bool:
        """Say whether a list of canonical names holds the entry point's or the distribution's."""
        return bool(names & {canonicalize_name(self.name), canonicalize_name(self.distribution)})


def discover() -> tuple[PluginEntry, ...]:
    """Return the plugins of all installed distributions, families first, sorted by name and distribution.

    A damaged distribution, whether it holds a plugin or not, costs nobody else's plugin.
    """
    found: dict[str, PluginEntry] = {}
    for distribution in importlib_metadata.distributions():
        # The backport's iterator is typed by a protocol that its own classes satisfy.
        for entry in _entries(cast("importlib_metadata.Distribution", distribution)):
            # A copy of a distribution that comes later on the path is shadowed by the first.
            found.setdefault(f"{canonicalize_name(entry.distribution)} {entry.kind} {entry.name}", entry)
    return tuple(sorted(found.values(), key=lambda entry: (entry.kind, entry.name, entry.distribution)))


@cache
def core_version() -> str:
    """Return the installed version of core."""
    return importlib_metadata.version(CORE)


def summary(distribution: str) -> str:
    """Return the line in which a distribution says what it is."""
    return str(importlib_metadata.metadata(distribution).get("Summary") or "")


def _entries(distribution: importlib_metadata.Distribution) -> list[PluginEntry]:
    try:
        # Most distributions have no plugin, and parsing them all is most of the scan.
        text = distribution.read_text("entry_points.txt") or ""
        if not any(group in text for group in KINDS):
            return []
        points = list(distribution.entry_points)
    except (ValueError, TypeError, OSError) as error:
        log.warning("the entry points of an installed distribution cannot be read (%s): %s", distribution, error)
        return []
    name, version, requires = _description(distribution)
    origin, editable = _origin(distribution)
    api = next((point.value for point in points if point.group == API_GROUP), "1")
    return [
        PluginEntry(point.name, _module(point), name, version, origin, editable, api, requires, KINDS[point.group])
        for point in points
        if point.group in KINDS
    ]


def _module(point: importlib_metadata.EntryPoint) -> str:
    return point.value.partition("[")[0].strip()


def _description(distribution: importlib_metadata.Distribution) -> tuple[str, str, str]:
    """Return name, version and what is demanded of core; ``unknown`` where METADATA is damaged."""
    # A half-removed distribution may have lost its METADATA file or a field of it.
    try:
        fields = distribution.metadata
        lines = fields.get_all("Requires-Dist") or []
        return fields.get("Name") or "unknown", fields.get("Version") or "unknown", _requires_core(lines)
    # By version of the backport, missing metadata is None (AttributeError) or an error of files.
    except (AttributeError, KeyError, ValueError, OSError):
        return "unknown", "unknown", ""


def _requires_core(lines: list[str]) -> str:
    """Return all that requirements demand of core here and now, extras left out."""
    specifiers = []
    for line in lines:
        # Parsing costs; the cheap test leaves the lines that matter.
        if line.lower().replace("_", "-").startswith(CORE):
            try:
                requirement = Requirement(line)
            except InvalidRequirement:
                continue
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if canonicalize_name(requirement.name) == CORE and applies:
                specifiers.append(str(requirement.specifier))
    return ",".join(filter(None, specifiers))


def _origin(distribution: importlib_metadata.Distribution) -> tuple[str, bool]:
    """Read ``direct_url.json`` (PEP 610): where it was installed from, and whether it is editable."""
    try:
        record = json.loads(distribution.read_text("direct_url.json") or "null")
        if record is None:
            return "", False
        url, editable = str(record["url"]), bool(record.get("dir_info", {}).get("editable", False))
        parts = urlsplit(url)
    except (ValueError, KeyError, TypeError, AttributeError):
        return "", False
    return (unquote(parts.path) if parts.scheme == "file" else url), editable


@cache
def core_satisfies(specifier: str) -> bool:
    """Say whether the installed core is one that a plugin's requirement admits."""
    return not specifier or SpecifierSet(specifier).contains(core_version(), prereleases=True)
