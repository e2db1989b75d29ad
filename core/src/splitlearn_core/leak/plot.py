"""Recovery against loss as a picture. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from splitlearn_core.leak.measure import NO_DEFENCE, Leak
from splitlearn_core.line_plot import Axis, Line, line_plot

_COLOURS = ("#1b6ca8", "#c0392b", "#27835a", "#7d4fa3")


def recovery_plot(results: Sequence[Leak]) -> str:
    """Return an SVG: for each attack a line over the losses, from the messages without a defence on.

    Args:
        results: The same model, text and cuts, with more and more noise.
    """
    losses = [results[0].loss_without_cuts, *(result.loss for result in results)]
    lines = []
    for number, attack in enumerate(results[0].attacks):
        shares = [attack.controls[NO_DEFENCE].share, *(each.attacks[number].recovery.share for each in results)]
        points = sorted(zip(losses, shares, strict=True))
        lines.append(Line(attack.attack, points, _COLOURS[number % len(_COLOURS)], has_dots=True))
    low, high = min(losses), max(losses)
    return line_plot(
        lines,
        Axis("loss", low, high, (low, high)),
        Axis("tokens recovered", 0.0, 1.0, (0.0, 0.5, 1.0), ".0%"),
        f"{results[0].model}, cut at {', '.join(map(str, results[0].split_points))}; {results[0].note}",
    )
