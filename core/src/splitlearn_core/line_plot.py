"""Lines over two axes as an SVG. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT, _LEFT, _TOP, _LEGEND = 420, 260, 60, 20, 200


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis, and the values that are written along it."""

    label: str
    low: float
    high: float
    marks: tuple[float, ...]
    #: How a value is written, as in ``format``.
    style: str = ".2f"

    def share(self, value: float) -> float:
        """Return where a value lies: 0 at the low end, 1 at the high one."""
        return (value - self.low) / (self.high - self.low or 1.0)


@dataclass(frozen=True, slots=True)
class Line:
    """One line, with its name in the legend."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: str
    width: float = 2
    #: Lengths of dashes and gaps, as SVG has them; nothing for a line without.
    dashes: str = ""
    has_dots: bool = False


def line_plot(lines: Sequence[Line], x: Axis, y: Axis, note: str) -> str:
    """Return an SVG with the lines, later ones above earlier ones, and a note below them."""
    parts = [_text(_LEFT + _WIDTH / 2, _TOP + _HEIGHT + 40, x.label, "middle"), _text(8, 14, y.label)]
    for mark in y.marks:
        height = _place(x, y, x.low, mark)[1]
        parts.append(f'<line x1="{_LEFT}" y1="{height:g}" x2="{_LEFT + _WIDTH}" y2="{height:g}" stroke="#ccc"/>')
        parts.append(_text(_LEFT - 6, height + 4, format(mark, y.style), "end"))
    below = _TOP + _HEIGHT + 18
    parts += [_text(_place(x, y, mark, y.low)[0], below, format(mark, x.style), "middle") for mark in x.marks]
    for number, line in enumerate(lines):
        points = [_place(x, y, *point) for point in line.points]
        drawn = " ".join(f"{across:.1f},{down:.1f}" for across, down in points)
        dashes = f' stroke-dasharray="{line.dashes}"' if line.dashes else ""
        parts.append(
            f'<polyline points="{drawn}" fill="none" stroke="{line.colour}" stroke-width="{line.width:g}"{dashes}/>'
        )
        if line.has_dots:
            parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{line.colour}"/>' for a, b in points]
        parts.append(_text(_LEFT + _WIDTH + 16, _TOP + 14 + 20 * number, line.label, colour=line.colour))
    parts.append(_text(8, _TOP + _HEIGHT + 64, note))
    width, height = _LEFT + _WIDTH + _LEGEND, _TOP + max(_HEIGHT + 74, 14 + 20 * len(lines))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-size="12"'
    return "\n".join(
        (
            head + ' font-family="sans-serif">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            *parts,
            "</svg>\n",
        )
    )


def _place(x: Axis, y: Axis, across: float, up: float) -> tuple[float, float]:
    return _LEFT + _WIDTH * x.share(across), _TOP + _HEIGHT * (1 - y.share(up))


def _text(x: float, y: float, text: str, anchor: str = "start", colour: str = "#222") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'
