"""The only module that reads installed metadata: which plugins are there, without importing any."""

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
#: Entry points of packages that add a loading strategy to every family: the name is the strategy's.
STRATEGY_GROUP = "splitlearn.strategies"
#: Entry points of commands for the command line: the name is the command's words joined by dots (``plugins.new``), the
#: value where its click command is (``package.module:attribute``).
COMMAND_GROUP = "splitlearn.commands"
FAMILY, STRATEGY, COMMAND = "family", "strategy", "command"
#: Group -> what its entry points name: what loads models.
KINDS = {FAMILY_GROUP: FAMILY, STRATEGY_GROUP: STRATEGY}
#: An optional entry point ``version = "1"`` that says which plugin API a plugin was made for.
API_GROUP = "splitlearn.plugin_api"
CORE = "splitlearn-core"

#: How the names of files end that pip installs.
_ARCHIVES = {".whl", ".zip", ".gz", ".bz2", ".xz", ".tgz"}
_GROUP_LINE = re.compile(r"^\s*\[(.+?)\]", re.MULTILINE)
#: From how alike a group's name is to one of ours on it is taken for a slip of the pen.
_ALIKE = 0.8


@dataclass(frozen=True, slots=True)
class PluginEntry:
    """One entry point, as the metadata of an installed distribution states it."""

    #: The model type of a family, the name of a loading strategy, or the words of a command joined by dots.
    name: str
    #: The module with the hook implementations, ``package.module``; of a command ``package.module:attribute``.
    module: str
    distribution: str
    version: str
    #: The folder of an editable checkout, or the URL it was installed from; empty for an index.
    origin: str = ""
    editable: bool = False
    plugin_api: str = "1"
    #: What the distribution demands of core, ``>=0.1``; empty where it demands nothing.
    requires_core: str = ""
    #: ``family``, ``strategy`` or ``command``.
    kind: str = FAMILY

    @property
    def model_type(self) -> str:
        """The model type of a family; empty for a strategy."""
        return self.name if self.kind == FAMILY else ""

    @property
    def what(self) -> str:
        """What the entry point names, in words."""
        if self.kind == COMMAND:
            return f"command '{self.name.replace('.', ' ')}'"
        return f"model type {self.name!r}" if self.kind == FAMILY else f"loading strategy {self.name!r}"

    @property
    def is_local(self) -> bool:
        """Whether it was installed from a folder or file of this machine."""
        return Path(self.origin).is_absolute()

    @property
    def provenance(self) -> str:
        """Where it was installed from, in few words: ``index``, ``editable PATH``, ``local PATH``, ``file NAME``."""
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
        """Say whether a list of canonical names holds the entry point's or the distribution's."""
        return bool(names & {canonicalize_name(self.name), canonicalize_name(self.distribution)})


def discover() -> tuple[PluginEntry, ...]:
    """Return the plugins of all installed distributions, families first, sorted by name and distribution.

    A damaged distribution, whether it holds a plugin or not, costs nobody else's plugin.
    """
    return _discover(KINDS)


def discover_commands() -> tuple[PluginEntry, ...]:
    """Return the commands that installed distributions add to the command line, as :func:`discover` does plugins."""
    return _discover({COMMAND_GROUP: COMMAND})


def _discover(kinds: Mapping[str, str]) -> tuple[PluginEntry, ...]:
    found: dict[str, PluginEntry] = {}
    for distribution in importlib_metadata.distributions():
        # The backport's iterator is typed by a protocol that its own classes satisfy.
        for entry in _entries(cast("importlib_metadata.Distribution", distribution), kinds):
            # A copy of a distribution that comes later on the path is shadowed by the first.
            found.setdefault(f"{canonicalize_name(entry.distribution)} {entry.kind} {entry.name}", entry)
    return tuple(sorted(found.values(), key=lambda entry: (entry.kind, entry.name, entry.distribution)))


@dataclass(frozen=True, slots=True)
class Installed:
    """A distribution as its files state it, whatever state they are in; for those who look for faults."""

    #: The canonical name.
    name: str
    #: Empty where no file says it.
    version: str
    #: The folder of its metadata.
    info: Path
    #: The folder that its modules are in, as far as it is not editable.
    home: Path
    #: Group, name and value of each entry point.
    points: tuple[tuple[str, str, str], ...] = ()
    #: Its ``Requires-Dist`` lines.
    requires: tuple[str, ...] = ()
    origin: str = ""
    editable: bool = False
    #: Why its metadata cannot be read; empty where it can.
    problem: str = ""


def installed(names: Iterable[str] = ()) -> tuple[Installed, ...]:
    """Return the distributions that have to do with plugins, in the order of the path, shadowed ones too.

    These are those whose name begins with ``splitlearn``, those with an entry point in a group that is
    ours or looks like it, and those that are named.
    """
    wanted = {str(canonicalize_name(name)) for name in names}
    found: dict[Path, Installed] = {}
    for distribution in importlib_metadata.distributions():
        one = _look_at(cast("importlib_metadata.Distribution", distribution), wanted)
        if one is not None:
            # A folder may be on the path twice, under two names.
            found.setdefault(one.info.resolve(), one)
    return tuple(found.values())


def nearest_group(group: str) -> str:
    """Return the group of ours that a group's name means or looks like; empty where it looks like none."""
    ours = (*KINDS, COMMAND_GROUP, API_GROUP)
    close = difflib.get_close_matches(group.lower().replace("-", "."), ours, n=1, cutoff=_ALIKE)
    if close:
        return close[0]
    squeezed = re.sub("[^a-z]", "", group.lower())
    return FAMILY_GROUP if squeezed.startswith("splitlearn") else ""


def version_of(name: str) -> str | None:
    """Return the version of an installed distribution; None where there is none, or none that it states."""
    try:
        return str(importlib_metadata.version(name) or "") or None
    # By version of the backport, what is missing or damaged is any of these.
    except (importlib_metadata.PackageNotFoundError, AttributeError, KeyError, TypeError, ValueError, OSError):
        return None


@cache
def core_version() -> str:
    """Return the installed version of core."""
    return str(_fields(cast("importlib_metadata.Distribution", importlib_metadata.distribution(CORE)))["Version"])


def summary(distribution: str) -> str:
    """Return the line in which a distribution says what it is; empty where its metadata is damaged."""
    try:
        return str(importlib_metadata.metadata(distribution).get("Summary") or "")
    # As in version_of.
    except (importlib_metadata.PackageNotFoundError, AttributeError, KeyError, TypeError, ValueError, OSError):
        return ""


def _entries(distribution: importlib_metadata.Distribution, kinds: Mapping[str, str]) -> list[PluginEntry]:
    try:
        # Most distributions have no plugin, and parsing them all is most of the scan.
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
        PluginEntry(point.name, _module(point), name, version, origin, editable, api, requires, kinds[point.group])
        for point in points
        if point.group in kinds
    ]


def _look_at(distribution: importlib_metadata.Distribution, wanted: set[str]) -> Installed | None:
    """Read a distribution that has to do with plugins, or is wanted; None of any other."""
    home = Path(str(distribution.locate_file("")))
    # The folder's name is all that is left where METADATA is gone.
    info = Path(str(getattr(distribution, "_path", home)))
    name = str(canonicalize_name(info.name.partition("-")[0].removesuffix(".egg")))
    try:
        text = distribution.read_text("entry_points.txt") or ""
        is_named = name in wanted or name.startswith("splitlearn")
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
    # As in version_of: whatever is wrong with it is what is wanted to be known.
    except (AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        return Installed(name, "", info, home, problem=said(error))


def _module(point: importlib_metadata.EntryPoint) -> str:
    return point.value.partition("[")[0].strip()


def _description(distribution: importlib_metadata.Distribution) -> tuple[str, str, str]:
    """Return name, version and what is demanded of core; ``unknown`` where METADATA is damaged."""
    # A half-removed distribution may have lost its METADATA file or a field of it.
    try:
        fields = _fields(distribution)
        lines = fields.get_all("Requires-Dist") or []
        return fields.get("Name") or "unknown", fields.get("Version") or "unknown", _requires_core(lines)
    # By version of the backport, missing metadata is None (AttributeError) or an error of files.
    except (AttributeError, KeyError, ValueError, OSError):
        return "unknown", "unknown", ""


def _fields(distribution: importlib_metadata.Distribution) -> Message:
    """Return the fields of METADATA, without the README below them.

    ``distribution.metadata`` parses that, too, with a policy whose imports are a third of a first scan.
    """
    text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
    return HeaderParser().parsestr(text, headersonly=True)


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
