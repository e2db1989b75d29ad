"""Results as values, a table of them, and the same as JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

_DIGITS = {"s": 2, "ms": 1, "MB": 1, "tok/s": 1, "%": 1}
_COLUMNS = ("what", "ours", "peer", "theirs", "ratio", "target", "reached")


@dataclass(frozen=True)
class Sample:
    """Repeated measurements of one thing."""

    values: tuple[float, ...]
    unit: str

    @classmethod
    def of(cls, values: Iterable[float], unit: str) -> Sample:
        return cls(tuple(values), unit)

    @property
    def median(self) -> float:
        return statistics.median(self.values) if self.values else math.nan

    def __str__(self) -> str:
        digits = _DIGITS.get(self.unit, 0)
        text = f"{self.median:.{digits}f}"
        if len(self.values) > 1:
            text += f" ({min(self.values):.{digits}f}-{max(self.values):.{digits}f})"
        return f"{text} {self.unit}"

    def to_dict(self) -> dict[str, Any]:
        return {"unit": self.unit, "median": self.median, "values": list(self.values)}


@dataclass(frozen=True)
class Row:
    """One line of the table: a claim, what was measured, and whether the claim held."""

    benchmark: str
    what: str
    ours: Sample | None = None
    peer: str = ""
    theirs: Sample | None = None
    #: How the two compare; the target says in which direction.
    ratio: float | None = None
    target: str = ""
    #: None where nothing is claimed, or nothing could be measured.
    reached: bool | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {
            "benchmark": self.benchmark,
            "what": self.what,
            "ours": self.ours.to_dict() if self.ours else None,
            "peer": self.peer,
            "theirs": self.theirs.to_dict() if self.theirs else None,
            "ratio": self.ratio,
            "target": self.target,
            "reached": self.reached,
            "note": self.note,
        }

    def cells(self) -> tuple[str, ...]:
        ratio = "" if self.ratio is None else _short(self.ratio)
        reached = {True: "yes", False: "NO", None: ""}[self.reached]
        return self.what, str(self.ours or ""), self.peer, str(self.theirs or ""), ratio, self.target, reached


def faster(
    benchmark: str, what: str, ours: Sample, peer: str, theirs: Sample, *, times: float | None, note: str = ""
) -> Row:
    """Say how many times faster ours is; ``times`` is the claim, None for a comparison without one."""
    ratio = theirs.median / ours.median
    target = f">= {_short(times)}x faster" if times else ""
    return Row(benchmark, what, ours, peer, theirs, ratio, target, ratio >= times if times else None, note)


def at_most(benchmark: str, what: str, ours: Sample, peer: str, theirs: Sample, *, share: float, note: str = "") -> Row:
    """Say which share of theirs ours is."""
    ratio = ours.median / theirs.median
    return Row(benchmark, what, ours, peer, theirs, ratio, f"<= {share:g} of it", ratio <= share, note)


def within(
    benchmark: str,
    what: str,
    ours: Sample,
    limit: float | None,
    peer: str = "",
    theirs: Sample | None = None,
    *,
    note: str = "",
) -> Row:
    """Say whether ours keeps to a limit of its own, and is below theirs where there is one; None for no claim."""
    if limit is None:
        return Row(benchmark, what, ours, peer, theirs, note=note)
    below = theirs is None or ours.median < theirs.median
    target = f"<= {limit:g} {ours.unit}{'' if theirs is None else ', below theirs'}"
    return Row(benchmark, what, ours, peer, theirs, None, target, ours.median <= limit and below, note)


def table(rows: Sequence[Row]) -> str:
    """Lay the rows out, the benchmarks one below the other."""
    cells = [_COLUMNS, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(_COLUMNS))]
    lines = [_line(_COLUMNS, widths)]
    for number, row in enumerate(rows):
        if number == 0 or rows[number - 1].benchmark != row.benchmark:
            lines.append(f"-- {row.benchmark} ".ljust(sum(widths) + 2 * len(widths), "-"))
        lines.append(_line(row.cells(), widths))
        if row.note:
            lines.append(f"    {row.note}")
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> str:
    """Count the claims that held."""
    judged = [row for row in rows if row.reached is not None]
    missed = [f"{row.benchmark}: {row.what}{f', {row.peer}' if row.peer else ''}" for row in judged if not row.reached]
    lines = [f"{len(judged) - len(missed)} of {len(judged)} targets reached"]
    return "\n  missed: ".join(lines + missed)


def _short(ratio: float) -> str:
    return f"{ratio:.3g}" if ratio < 1000 else f"{ratio:.0f}"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
