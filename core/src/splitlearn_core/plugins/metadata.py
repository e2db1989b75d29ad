"""Installed plugins, from package metadata alone: none is imported. No other module reads that metadata."""

from __future__ import annotations

import difflib
import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from email.message import Message
from email.parser import HeaderParser
from functools import cache
from pathlib import Path
from typing import cast
from urllib.parse import unquote, urlsplit

# The backport rather than the standard library: one behaviour for entry points and damaged
# metadata on every supported Python. Its classes must not be mixed with the standard ones.
import importlib_metadata
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from splitlearn_core.quoting import said

log = logging.getLogger(__name__)

#: Entry points of plugins: the name is the model type, the value the module with the hooks.
FAMILY_GROUP = "splitlearn.families"
#: The name of the entry point of a family plugin for the types that no other entry point names.
ANY_TYPE = "*"
#: Entry points of packages that add a loading strategy to every family: the name is the strategy's.
STRATEGY_GROUP = "splitlearn.strategies"
#: Entry points of hosts: the name is the host's, the value the module, or the object in one, that loads models there.
HOST_GROUP = "splitlearn.hosts"
#: Entry points of commands for the command line: the name is the command's words joined by dots (``plugins.new``), the
#: value where its click command is (``package.module:attribute``).
COMMAND_GROUP = "splitlearn.commands"
#: Entry points of packages that add a stage of cuts: the name is the stage's, the value the object
#: (``package.module:attribute``).
STAGE_GROUP = "splitlearn.cut_stages"
FAMILY, STRATEGY, HOST, STAGE, COMMAND = "family", "strategy", "host", "cut stage", "command"
#: Group -> what its entry points name.
KINDS = {FAMILY_GROUP: FAMILY, STRATEGY_GROUP: STRATEGY, HOST_GROUP: HOST, STAGE_GROUP: STAGE}
#: An optional entry point ``version = "1"`` that says which plugin API a plugin was made for.
API_GROUP = "splitlearn.plugin_api"
CORE = "splitlearn-core"

#: Suffixes of the archives that pip installs.
_ARCHIVES = {".whl", ".zip", ".gz", ".bz2", ".xz", ".tgz"}
_GROUP_LINE = re.compile(r"^\s*\[(.+?)\]", re.MULTILINE)
#: Similarity from which the name of a group counts as a misspelling of one of ours.
_MIN_SIMILARITY = 0.8


@dataclass(frozen=True, slots=True)
class PluginEntry:
    """One entry point, as the metadata of an installed distribution states it."""

    #: The model type of a family, or :data:`ANY_TYPE`; the name of a loading strategy, host or cut stage; or the words
    #: of a command joined by dots.
    name: str
    #: The module with the hook implementations, ``package.module``; of a command, host or cut stage
    #: ``package.module:attribute``.
    module: str
    distribution: str
    version: str
    #: The folder of an editable checkout, or the URL it was installed from; empty for an index.
    origin: str = ""
    editable: bool = False
    plugin_api: str = "1"
    #: The version of core that the distribution requires, ``>=0.1``; empty if it does not say.
    requires_core: str = ""
    #: ``family``, ``strategy``, ``host``, ``cut stage`` or ``command``.
    kind: str = FAMILY

    @property
    def is_for_any_type(self) -> bool:
        """Whether it is a family plugin for the types that no other entry point names."""
        return self.kind == FAMILY and self.name == ANY_TYPE

    @property
    def model_type(self) -> str:
        """The model type of a family; empty for anything else, and where it is any type."""
        return self.name if self.kind == FAMILY and not self.is_for_any_type else ""

    @property
    def what(self) -> str:
        """What the entry point names, in words."""
        if self.kind == COMMAND:
            return f"command '{self.name.replace('.', ' ')}'"
        if self.is_for_any_type:
            return "any other model type"
        words = {FAMILY: "model type", STRATEGY: "loading strategy"}
        return f"{words.get(self.kind, self.kind)} {self.name!r}"

    @property
    def is_local(self) -> bool:
        """Whether it was installed from a folder or file of this machine."""
        return Path(self.origin).is_absolute()

    @property
    def provenance(self) -> str:
        """Where it was installed from: ``index``, ``editable PATH``, ``local PATH``, ``file NAME``."""
        if self.editable:
            return f"editable {self.origin}"
        if not self.is_local:
            return self.origin or "index"
        path = Path(self.origin)
        return f"file {path.name}" if path.suffix in _ARCHIVES else f"local {path}"

    @property
    def label(self) -> str:
        return f"{self.distribution} {self.version}"

    def is_named(self, names: frozenset[str]) -> bool:
        """Return whether canonical names include that of the entry point or of the distribution."""
        return bool(names & {canonicalize_name(self.name), canonicalize_name(self.distribution)})


def discover() -> tuple[PluginEntry, ...]:
    """Return the plugins of all installed distributions, families first, sorted by name and distribution.

    A damaged distribution does not affect the plugins of others.
    """
    return _discover(KINDS)


def discover_commands() -> tuple[PluginEntry, ...]:
    """Return the commands that installed distributions add to the command line, as :func:`discover` does plugins."""
    return _discover({COMMAND_GROUP: COMMAND})


def _discover(kinds: Mapping[str, str]) -> tuple[PluginEntry, ...]:
    entries: dict[str, PluginEntry] = {}
    for distribution in importlib_metadata.distributions():
        # The backport's iterator is typed by a protocol that its own classes satisfy.
        for entry in _entries(cast("importlib_metadata.Distribution", distribution), kinds):
            # A copy of a distribution later on the path is shadowed by the first.
            entries.setdefault(f"{canonicalize_name(entry.distribution)} {entry.kind} {entry.name}", entry)
    # Any type last, as it is asked.
    order = sorted(
        entries.values(), key=lambda entry: (entry.kind, entry.is_for_any_type, entry.name, entry.distribution)
    )
    return tuple(order)


@dataclass(frozen=True, slots=True)
class Installed:
    """A distribution as its files describe it, damaged ones too; for diagnosis."""

    #: The canonical name.
    name: str
    #: Empty if no file states it.
    version: str
    #: The folder of its metadata.
    info: Path
    #: The folder of its modules, unless it is editable.
    home: Path
    #: Group, name and value of each entry point.
    points: tuple[tuple[str, str, str], ...] = ()
    #: Its ``Requires-Dist`` lines.
    requires: tuple[str, ...] = ()
    origin: str = ""
    editable: bool = False
    #: Why its metadata cannot be read; empty if it can.
    problem: str = ""


def installed(names: Iterable[str] = ()) -> tuple[Installed, ...]:
    """Return the distributions that concern plugins, in the order of the path, shadowed ones too.

    Their name begins with ``splitlearn`` or is in ``names``, or they have an entry point in a group that is
    ours or resembles one.
    """
    requested = {str(canonicalize_name(name)) for name in names}
    by_folder: dict[Path, Installed] = {}
    for distribution in importlib_metadata.distributions():
        described = _describe(cast("importlib_metadata.Distribution", distribution), requested)
        if described is not None:
            # A folder may be on the path twice, under two names.
            by_folder.setdefault(described.info.resolve(), described)
    return tuple(by_folder.values())


def nearest_group(group: str) -> str:
    """Return the group of ours that a name is or resembles; empty if it resembles none."""
    ours = (*KINDS, COMMAND_GROUP, API_GROUP)
    close = difflib.get_close_matches(group.lower().replace("-", "."), ours, n=1, cutoff=_MIN_SIMILARITY)
    if close:
        return close[0]
    squeezed = re.sub("[^a-z]", "", group.lower())
    return FAMILY_GROUP if squeezed.startswith("splitlearn") else ""


def version_of(name: str) -> str | None:
    """Return the version of an installed distribution; None if it is not installed or has no version."""
    try:
        return str(importlib_metadata.version(name) or "") or None
    # The error for missing or damaged metadata depends on the version of the backport.
    except (importlib_metadata.PackageNotFoundError, AttributeError, KeyError, TypeError, ValueError, OSError):
        return None


@cache
def core_version() -> str:
    """Return the installed version of core."""
    return str(_fields(cast("importlib_metadata.Distribution", importlib_metadata.distribution(CORE)))["Version"])


def summary(distribution: str) -> str:
    """Return the one-line description of a distribution; empty if its metadata is damaged."""
    try:
        return str(importlib_metadata.metadata(distribution).get("Summary") or "")
    # As in version_of.
    except (importlib_metadata.PackageNotFoundError, AttributeError, KeyError, TypeError, ValueError, OSError):
        return ""


def _entries(distribution: importlib_metadata.Distribution, kinds: Mapping[str, str]) -> list[PluginEntry]:
    try:
        # Most distributions have no plugin, and parsing their entry points would take most of the scan.
        text = distribution.read_text("entry_points.txt") or ""
        if not any(group in text for group in kinds):
            return []
        points = list(distribution.entry_points)
    except (ValueError, TypeError, OSError) as error:
        log.warning("the entry points of an installed distribution cannot be read (%s): %s", distribution, error)
        return []
    name, version, requires = _description(distribution)
    origin, editable = _origin(distribution)
    api = next((point.value for point in points if point.group == API_GROUP), "1")
    return [
        PluginEntry(
            point.name,
            point.value.partition("[")[0].strip(),
            name,
            version,
            origin,
            editable,
            api,
            requires,
            kinds[point.group],
        )
        for point in points
        if point.group in kinds
    ]


def _describe(distribution: importlib_metadata.Distribution, requested: set[str]) -> Installed | None:
    """Read a distribution that concerns plugins or was requested; None for any other."""
    home = Path(str(distribution.locate_file("")))
    # The only source of the name if METADATA is gone.
    info = Path(str(getattr(distribution, "_path", home)))
    name = str(canonicalize_name(info.name.partition("-")[0].removesuffix(".egg")))
    try:
        text = distribution.read_text("entry_points.txt") or ""
        is_named = name in requested or name.startswith("splitlearn")
        if not is_named and not any(map(nearest_group, _GROUP_LINE.findall(text))):
            return None
        points = tuple((point.group, point.name, point.value) for point in distribution.entry_points)
        fields = distribution.metadata
        if not fields.get("Name") or not fields.get("Version"):
            raise ValueError("its METADATA states no name or no version")
        requires = tuple(fields.get_all("Requires-Dist") or ())
        origin, editable = _origin(distribution)
        return Installed(
            str(canonicalize_name(fields["Name"])), fields["Version"], info, home, points, requires, origin, editable
        )
    # As in version_of; the caller reports what is wrong.
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        return Installed(name, "", info, home, problem=said(error))


def _description(distribution: importlib_metadata.Distribution) -> tuple[str, str, str]:
    """Return name, version and required version of core; ``unknown`` if METADATA is damaged."""
    try:
        fields = _fields(distribution)
        lines = fields.get_all("Requires-Dist") or []
        return fields.get("Name") or "unknown", fields.get("Version") or "unknown", _requires_core(lines)
    # As in version_of.
    except (AttributeError, KeyError, ValueError, OSError):
        return "unknown", "unknown", ""


def _fields(distribution: importlib_metadata.Distribution) -> Message:
    """Return the fields of METADATA, without the README below them.

    ``distribution.metadata`` parses that too, with a policy whose imports take a third of a first scan.
    """
    text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
    return HeaderParser().parsestr(text, headersonly=True)


def _requires_core(lines: list[str]) -> str:
    """Return the version specifiers of core that apply in this environment without extras."""
    specifiers = []
    for line in lines:
        # Parsing is slow; this cheap test skips other distributions.
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
    """Return whether the installed core satisfies a requirement."""
    return not specifier or SpecifierSet(specifier).contains(core_version(), prereleases=True)
