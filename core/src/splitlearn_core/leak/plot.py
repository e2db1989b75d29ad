"""Recovery against loss as a picture. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from splitlearn_core.leak.measure import NO_DEFENCE, Leak
from splitlearn_core.line_plot import Axis, Line, line_plot
from splitlearn_core.plan.split_points import describe_cuts

_COLOURS = ("#1b6ca8", "#c0392b", "#27835a", "#7d4fa3")
#: Dash patterns of the lines, by split.
_DASHES = ("", "6 3", "2 3", "10 3 2 3")


def recovery_plot(results: Sequence[Sequence[Leak]]) -> str:
    """Return an SVG: for each attack and split, recovery over loss, starting with the undefended messages.

    Args:
        results: For each choice of split points, results of one model and text with increasing noise.
    """
    lines = []
    for row, split in enumerate(results):
        losses = [split[0].loss_without_cuts, *(result.loss for result in split)]
        for number, attack in enumerate(split[0].attacks):
            shares = [attack.controls[NO_DEFENCE].share, *(result.attacks[number].recovery.share for result in split)]
            points = sorted(zip(losses, shares, strict=True))
            label = f"{attack.attack}, {describe_cuts(split[0].split_points)}"
            colour, dashes = _COLOURS[number % len(_COLOURS)], _DASHES[row % len(_DASHES)]
            lines.append(Line(label, points, colour, dashes=dashes, has_dots=True))
    all_losses = [loss for line in lines for loss, _ in line.points]
    low, high = min(all_losses), max(all_losses)
    first = results[0][0]
    return line_plot(
        lines,
        Axis("loss", low, high, (low, high)),
        Axis("tokens recovered", 0.0, 1.0, (0.0, 0.5, 1.0), ".0%"),
        f"{first.model}, by attack and cuts; {first.note}",
    )
