"""What a fetch would transfer, and which byte ranges of a file are worth fetching alone. Pure: no file, no network."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

#: Bytes of a file, from the first to one past the last.
Span = tuple[int, int]

#: File -> the bytes of it that are wanted; None: all of it.
Wanted = Mapping[str, Sequence[Span] | None]

#: A gap of so many bytes is fetched along: a request of its own, with its redirect, takes longer than
#: they do (a tenth of a second is a megabyte at 80 Mbit/s).
GAP_BYTES = 2**20

#: Ranges have to spare at least so many bytes of a file, for the same reason, ...
MIN_SPARED = 2**20

#: ... and at least this part of it: a whole file lies in the ordinary cache, where everybody finds it.
MIN_SPARED_PART = 0.25

#: Bytes of one request, at most: several are under way at once, and a broken one is not begun anew at its start.
REQUEST_BYTES = 64 * 2**20
_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19})")
_RECORD_FORMAT = 1


def merged(spans: Iterable[Span], gap: int = 0) -> tuple[Span, ...]:
    """Sort spans, and join those that touch, overlap, or are no more than ``gap`` bytes apart."""
    joined: list[Span] = []
    for begin, end in sorted(span for span in spans if span[0] < span[1]):
        if joined and begin <= joined[-1][1] + gap:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((begin, end))
    return tuple(joined)


def without(spans: Iterable[Span], held: Iterable[Span]) -> tuple[Span, ...]:
    """Return the bytes of ``spans`` that are not in ``held``."""
    left: list[Span] = []
    taken = merged(held)
    for begin, end in merged(spans):
        at = begin
        for first, last in taken:
            if last <= at or first >= end:
                continue
            if first > at:
                left.append((at, first))
            at = last
        if at < end:
            left.append((at, end))
    return tuple(left)


def count(spans: Iterable[Span]) -> int:
    """Count the bytes of spans that do not overlap."""
    return sum(end - begin for begin, end in spans)


def to_request(wanted: Iterable[Span], held: Iterable[Span]) -> tuple[Span, ...]:
    """Return what to ask a server for: what is not held yet, with small gaps filled."""
    held = merged(held)
    return without(merged(without(wanted, held), GAP_BYTES), held)


def pays(requested: Iterable[Span], size: int) -> bool:
    """Say whether to fetch these ranges of a file of ``size`` bytes rather than all of it."""
    spared = size - count(requested)
    return spared >= max(MIN_SPARED, size * MIN_SPARED_PART)


def pieces(spans: Iterable[Span], limit: int) -> Iterator[Span]:
    """Cut spans into pieces of ``limit`` bytes at most."""
    for begin, end in spans:
        for at in range(begin, end, limit):
            yield at, min(at + limit, end)


def parse_content_range(text: str | None) -> tuple[Span, int] | None:
    """Read a ``Content-Range`` header: the span and the size of the whole; None where it says nothing of use."""
    match = _CONTENT_RANGE.fullmatch((text or "").strip())
    if match is None:
        return None
    first, last, size = map(int, match.groups())
    return ((first, last + 1), size) if first <= last < size else None


@dataclass(frozen=True, slots=True)
class Coverage:
    """Which bytes of one version of a file are held."""

    #: What the server calls this version.
    etag: str
    size: int
    spans: tuple[Span, ...] = ()
    #: Commits of the repository in which the file is known to be this version.
    commits: tuple[str, ...] = ()

    def holding(self, span: Span) -> Coverage:
        return replace(self, spans=merged((*self.spans, span)))

    def seen_at(self, commit: str) -> Coverage:
        return self if commit in self.commits else replace(self, commits=(*self.commits, commit))

    def to_json(self) -> str:
        fields = {"etag": self.etag, "size": self.size, "spans": self.spans, "commits": self.commits}
        return json.dumps({"format": _RECORD_FORMAT, **fields})


def parse_coverage(text: str) -> Coverage | None:
    """Read what :meth:`Coverage.to_json` wrote; None where it is anything else, which then holds nothing."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or record.get("format") != _RECORD_FORMAT:
        return None
    etag, size, spans, commits = (record.get(name) for name in ("etag", "size", "spans", "commits"))
    if not isinstance(etag, str) or type(size) is not int or not isinstance(spans, list):
        return None
    if not isinstance(commits, list) or not all(isinstance(commit, str) for commit in commits):
        return None
    if not all(_is_span(span, size) for span in spans):
        return None
    return Coverage(etag, size, merged((begin, end) for begin, end in spans), tuple(commits))


def _is_span(span: Any, size: int) -> bool:
    return (
        isinstance(span, list)
        and len(span) == 2  # noqa: PLR2004  # a pair
        and all(type(number) is int for number in span)
        and 0 <= span[0] < span[1] <= size
    )


@dataclass(frozen=True, slots=True)
class FileFetch:
    """One file: what of it is needed, what is here, and what is to be fetched. All numbers are bytes."""

    name: str
    #: Of the whole file; 0 where it is not known.
    size: int
    #: Of it that the asked parts need.
    needed: int
    #: Of the needed ones that are on this machine already.
    cached: int
    #: What is to be transferred: small gaps between needed ranges come along, or the whole file.
    fetched: int
    #: The ranges that are to be asked for; empty where the whole file is, or nothing.
    spans: tuple[Span, ...] = ()
    #: Whether all that is needed is on this machine.
    is_here: bool = True

    @property
    def is_partial(self) -> bool:
        """Whether ranges of the file are fetched, and not all of it."""
        return bool(self.spans)

    def to_dict(self) -> dict[str, Any]:
        return {
            "file": self.name,
            "size": self.size,
            "needed": self.needed,
            "cached": self.cached,
            "fetched": self.fetched,
            "ranges": len(self.spans),
        }


@dataclass(frozen=True, slots=True)
class FetchPlan:
    """The files that a load of some components needs, and what of them is to be fetched."""

    model: str
    #: The commit that a Hub revision was resolved to; None for a directory.
    commit: str | None
    files: tuple[FileFetch, ...]

    @property
    def needed(self) -> int:
        """Bytes that are needed, here or not."""
        return sum(file.needed for file in self.files)

    @property
    def cached(self) -> int:
        """Needed bytes that are on this machine already."""
        return sum(file.cached for file in self.files)

    @property
    def fetched(self) -> int:
        """Bytes that are to be transferred."""
        return sum(file.fetched for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "commit": self.commit,
            "needed": self.needed,
            "cached": self.cached,
            "fetched": self.fetched,
            "files": [file.to_dict() for file in self.files],
        }


def here(name: str, size: int, spans: Sequence[Span] | None = None) -> FileFetch:
    """Describe a file of which all that is needed is on this machine; ``spans`` None: all of it is needed."""
    needed = size if spans is None else count(spans)
    return FileFetch(name, size, needed, needed, 0)
