"""The only module that reads installed metadata: which plugins are there, without importing any."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

# The backport rather than the standard library: one behaviour for entry points and damaged
# metadata on every supported Python. Its classes must not be mixed with the standard ones.
import importlib_metadata
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

#: Entry points of plugins: the name is the model type, the value the module with the hooks.
FAMILY_GROUP = "splitlearn.families"
#: An optional entry point ``version = "1"`` that says which plugin API a plugin was made for.
API_GROUP = "splitlearn.plugin_api"
CORE = "splitlearn-core"


@dataclass(frozen=True, slots=True)
class PluginEntry:
    """One entry point, as the metadata of an installed distribution states it."""

    model_type: str
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

    @property
    def label(self) -> str:
        return f"{self.distribution} {self.version}"

    def is_named(self, names: frozenset[str]) -> bool:
        """Say whether a list of canonical names holds the entry point's or the distribution's."""
        return bool(names & {canonicalize_name(self.model_type), canonicalize_name(self.distribution)})


def discover() -> tuple[PluginEntry, ...]:
    """Return the plugins of all installed distributions, sorted by model type and distribution."""
    found = {entry.distribution + entry.model_type + entry.module: entry for entry in _entries()}
    return tuple(sorted(found.values(), key=lambda entry: (entry.model_type, entry.distribution)))


def core_version() -> str:
    """Return the installed version of core."""
    return importlib_metadata.version(CORE)


def _entries() -> Iterator[PluginEntry]:
    # Selecting by group also drops the second copy of a distribution that is on the path twice.
    for point in importlib_metadata.entry_points(group=FAMILY_GROUP):
        distribution = point.dist
        origin, editable = _origin(distribution)
        yield PluginEntry(
            model_type=point.name,
            module=point.value.split("[")[0].strip(),
            distribution=_metadata_field(distribution, "Name"),
            version=_metadata_field(distribution, "Version"),
            origin=origin,
            editable=editable,
            plugin_api=_plugin_api(distribution),
            requires_core=_requires_core(distribution),
        )


def _metadata_field(distribution: importlib_metadata.Distribution | None, name: str) -> str:
    # A half-removed distribution may have lost its METADATA file or a field of it.
    if distribution is None:
        return "unknown"
    try:
        return distribution.metadata[name] or "unknown"
    except (KeyError, importlib_metadata.MetadataNotFound):
        return "unknown"


def _plugin_api(distribution: importlib_metadata.Distribution | None) -> str:
    points = distribution.entry_points if distribution is not None else ()
    return next((point.value for point in points if point.group == API_GROUP), "1")


def _requires_core(distribution: importlib_metadata.Distribution | None) -> str:
    try:
        lines = (distribution.requires if distribution is not None else None) or []
    except (KeyError, importlib_metadata.MetadataNotFound):
        return ""
    for line in lines:
        # Parsing costs; the cheap test leaves the one line that matters.
        if line.lower().replace("_", "-").startswith(CORE):
            try:
                requirement = Requirement(line)
            except InvalidRequirement:
                continue
            if canonicalize_name(requirement.name) == CORE:
                return str(requirement.specifier)
    return ""


def _origin(distribution: importlib_metadata.Distribution | None) -> tuple[str, bool]:
    """Read ``direct_url.json`` (PEP 610): where it was installed from, and whether it is editable."""
    text = distribution.read_text("direct_url.json") if distribution is not None else None
    if not text:
        return "", False
    try:
        record = json.loads(text)
        url, editable = str(record["url"]), bool(record.get("dir_info", {}).get("editable", False))
    except (ValueError, KeyError, TypeError, AttributeError):
        return "", False
    parts = urlsplit(url)
    return (unquote(parts.path) if parts.scheme == "file" else url), editable


def core_satisfies(specifier: str) -> bool:
    """Say whether the installed core is one that a plugin's requirement admits."""
    return not specifier or SpecifierSet(specifier).contains(core_version(), prereleases=True)
