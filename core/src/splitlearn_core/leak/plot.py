"""Recovery against loss as a picture. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from splitlearn_core.leak.measure import NO_DEFENCE, Leak
from splitlearn_core.plan.split_points import cut_words

_WIDTH, _HEIGHT, _LEFT, _TOP, _LEGEND = 420, 260, 60, 20, 200
#: Dash patterns of the lines, by split.
_DASHES = ("none", "6 3", "2 3", "10 3 2 3")
_COLOURS = ("#1b6ca8", "#c0392b", "#27835a", "#7d4fa3")


def recovery_plot(results: Sequence[Sequence[Leak]]) -> str:
    """Return an SVG: for each attack and split, recovery over loss, starting with the undefended messages.

    Args:
        results: For each choice of split points, results of one model and text with increasing noise.
    """
    first = results[0][0]
    losses = [[split[0].loss_without_cuts, *(result.loss for result in split)] for split in results]
    low, high = min(map(min, losses)), max(map(max, losses))
    span = high - low or 1.0

    def position(loss: float, share: float) -> tuple[float, float]:
        return _LEFT + _WIDTH * (loss - low) / span, _TOP + _HEIGHT * (1 - share)

    parts = [_text(_LEFT + _WIDTH / 2, _TOP + _HEIGHT + 40, "loss", "middle"), _text(8, 14, "tokens recovered")]
    for share in (0.0, 0.5, 1.0):
        y = position(low, share)[1]
        parts.append(f'<line x1="{_LEFT}" y1="{y:g}" x2="{_LEFT + _WIDTH}" y2="{y:g}" stroke="#ccc"/>')
        parts.append(_text(_LEFT - 6, y + 4, f"{share:.0%}", "end"))
    axis_y = _TOP + _HEIGHT + 18
    parts += [_text(position(loss, 0)[0], axis_y, f"{loss:.2f}", "middle") for loss in (low, high)]
    legend_x = _LEFT + _WIDTH + 16
    for number, attack in enumerate(first.attacks):
        parts.append(_text(legend_x, _TOP + 14 + 20 * number, attack.attack, colour=_COLOURS[number % len(_COLOURS)]))
    for row, (split, split_losses) in enumerate(zip(results, losses, strict=True)):
        dashes = _DASHES[row % len(_DASHES)]
        y = _TOP + 14 + 20 * (len(first.attacks) + 1 + row)
        parts.append(_polyline([(legend_x, y - 4), (legend_x + 30, y - 4)], "#222", dashes))
        parts.append(_text(legend_x + 38, y, f"cut at {cut_words(split[0].split_points)}"))
        for number, attack in enumerate(split[0].attacks):
            colour = _COLOURS[number % len(_COLOURS)]
            shares = [attack.controls[NO_DEFENCE].share, *(result.attacks[number].recovery.share for result in split)]
            points = [position(*point) for point in sorted(zip(split_losses, shares, strict=True))]
            parts.append(_polyline(points, colour, dashes))
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
    parts.append(_text(8, _TOP + _HEIGHT + 64, f"{first.model}; {first.note}"))
    rows = len(first.attacks) + 1 + len(results)
    width, height = _LEFT + _WIDTH + _LEGEND, _TOP + max(_HEIGHT + 74, 34 + 20 * rows)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-size="12"'
    return "\n".join(
        (
            head + ' font-family="sans-serif">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            *parts,
            "</svg>\n",
        )
    )


def _polyline(points: Sequence[tuple[float, float]], colour: str, dashes: str) -> str:
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", colour: str = "#222") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(text)}</text>'
