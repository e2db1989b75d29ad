"""What a fetch would transfer: a description of work not yet done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from splitlearn_core.checkpoint.ranges import Span, count


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
