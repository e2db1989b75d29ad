"""What a fetch transfers, and when ranges of a file are fetched instead of all of it. Pure: no file, no network."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

#: Bytes of a file, from the first to one past the last.
Span = tuple[int, int]

#: File -> its byte ranges that are wanted; None: the whole file.
Wanted = Mapping[str, Sequence[Span] | None]

#: A gap of up to so many bytes is fetched too: another request, with its redirect, takes longer than these
#: bytes (a tenth of a second is a megabyte at 80 Mbit/s).
GAP_BYTES = 2**20

#: Ranges have to save at least so many bytes of a file, for the same reason, ...
MIN_SPARED = 2**20

#: ... and at least this fraction of it: a whole file is in the ordinary cache, for all libraries to use.
MIN_SPARED_PART = 0.25

#: Most bytes of one request: several run at once, and after a broken connection only the rest is requested again.
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


def without(spans: Iterable[Span], present: Iterable[Span]) -> tuple[Span, ...]:
    """Return the bytes of ``spans`` that are not in ``present``."""
    left: list[Span] = []
    removed = merged(present)
    for begin, end in merged(spans):
        at = begin
        for first, last in removed:
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


def to_request(wanted: Iterable[Span], present: Iterable[Span]) -> tuple[Span, ...]:
    """Return the spans to request from a server: those not present yet, with small gaps filled."""
    present = merged(present)
    return without(merged(without(wanted, present), GAP_BYTES), present)


def pays(requested: Iterable[Span], size: int) -> bool:
    """Return whether to fetch these ranges of a file of ``size`` bytes rather than all of it."""
    saved = size - count(requested)
    return saved >= max(MIN_SPARED, size * MIN_SPARED_PART)


def pieces(spans: Iterable[Span], limit: int) -> Iterator[Span]:
    """Cut spans into pieces of ``limit`` bytes at most."""
    for begin, end in spans:
        for at in range(begin, end, limit):
            yield at, min(at + limit, end)


def parse_content_range(text: str | None) -> tuple[Span, int] | None:
    """Parse a ``Content-Range`` header into the span and the size of the whole file; None if it has not both."""
    match = _CONTENT_RANGE.fullmatch((text or "").strip())
    if match is None:
        return None
    first, last, size = map(int, match.groups())
    return ((first, last + 1), size) if first <= last < size else None


@dataclass(frozen=True, slots=True)
class Coverage:
    """The byte ranges of one version of a file that are present."""

    #: The server's identifier of this version.
    etag: str
    size: int
    spans: tuple[Span, ...] = ()
    #: Commits of the repository that are known to have this version of the file.
    commits: tuple[str, ...] = ()

    def holding(self, span: Span) -> Coverage:
        return replace(self, spans=merged((*self.spans, span)))

    def seen_at(self, commit: str) -> Coverage:
        return self if commit in self.commits else replace(self, commits=(*self.commits, commit))

    def to_json(self) -> str:
        fields = {"etag": self.etag, "size": self.size, "spans": self.spans, "commits": self.commits}
        return json.dumps({"format": _RECORD_FORMAT, **fields})


def parse_coverage(text: str) -> Coverage | None:
    """Parse the output of :meth:`Coverage.to_json`; None if the text is anything else."""
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
    """One file: the bytes that are needed, present and to be fetched. All numbers are bytes."""

    name: str
    #: Size of the whole file; 0 if unknown.
    size: int
    #: Bytes that the requested parts need.
    needed: int
    #: Needed bytes that are on this machine already.
    cached: int
    #: Bytes to transfer: the missing ranges with small gaps between them, or the whole file.
    fetched: int
    #: The ranges to request; empty if the whole file is fetched, or nothing.
    spans: tuple[Span, ...] = ()
    #: Whether all needed bytes are on this machine.
    is_here: bool = True

    @property
    def is_partial(self) -> bool:
        """Whether only ranges of the file are fetched."""
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
    """The files that a load of some components needs, and what is to be fetched of them."""

    model: str
    #: The commit that a Hub revision was resolved to; None for a directory.
    commit: str | None
    files: tuple[FileFetch, ...]

    @property
    def needed(self) -> int:
        """Bytes that are needed, on this machine or not."""
        return sum(file.needed for file in self.files)

    @property
    def cached(self) -> int:
        """Needed bytes that are on this machine already."""
        return sum(file.cached for file in self.files)

    @property
    def fetched(self) -> int:
        """Bytes to transfer."""
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
    """Describe a file whose needed bytes are all on this machine; ``spans`` None: the whole file is needed."""
    needed = size if spans is None else count(spans)
    return FileFetch(name, size, needed, needed, 0)
