"""Split arithmetic: from two split points to the layer ranges of the three components."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from splitlearn_core.errors import BrokenPluginError, ConfigurationError, InvalidSplitError
from splitlearn_core.family import ModelFamily
from splitlearn_core.quoting import reason
from splitlearn_core.types import Component, LayerRange

#: Far above any model's; a number beyond it is a slip or an attack, and would fill the memory.
MAX_LAYERS = 10_000


def count_layers(family: ModelFamily, config: Mapping[str, Any]) -> int:
    """Read the number of layers from ``config.json``.

    Raises:
        ConfigurationError: It is missing, no positive integer, or beyond belief.
    """
    layers = family.config_value(config, "num_hidden_layers")
    if not isinstance(layers, int) or isinstance(layers, bool) or not 1 <= layers <= MAX_LAYERS:
        name = family.config_names.get("num_hidden_layers", "num_hidden_layers")
        raise ConfigurationError(
            f"config.json says {name} = {layers!r}, which is no number of layers (1 to {MAX_LAYERS})",
            hint=f'set "{name}" to the number of layers of the checkpoint',
        )
    return layers


def split_layers(
    family: ModelFamily, config: Mapping[str, Any], split_points: Sequence[int]
) -> dict[Component, LayerRange]:
    """Cut the layers of a model at two split points.

    Args:
        family: The model's family; it may declare cuts impossible.
        config: ``config.json``.
        split_points: ``(a, b)`` with ``0 < a < b < number of layers``.

    Raises:
        InvalidSplitError: The points do not cut this model; the message shows the arithmetic.
    """
    total = count_layers(family, config)
    first, second = check_split_points(split_points, total)
    impossible = impossible_cuts(family, config)
    refused = [f"no cut before layer {point}: {impossible[point]}" for point in (first, second) if point in impossible]
    if refused:
        possible = [point for point in range(1, total) if point not in impossible]
        raise InvalidSplitError(
            f"split points ({first}, {second}) do not cut this {family.model_type} model: {'; '.join(refused)}",
            hint=f"cuts are possible before layers {', '.join(map(str, possible)) or '(none)'}",
        )
    return {
        Component.BOTTOM: LayerRange(0, first, total),
        Component.TRUNK: LayerRange(first, second, total),
        Component.TOP: LayerRange(second, total, total),
    }


def even_thirds(family: ModelFamily, config: Mapping[str, Any]) -> tuple[int, int]:
    """Return split points that give bottom and top a third of the layers each, and the trunk the rest.

    Where a family declares a cut impossible, the nearest that is possible.

    Raises:
        InvalidSplitError: The model cannot be cut into three.
    """
    total = count_layers(family, config)
    impossible = impossible_cuts(family, config)
    possible = [point for point in range(1, total) if point not in impossible]
    if len(possible) < 2:  # noqa: PLR2004  # two cuts make three components
        raise InvalidSplitError(
            f"this {family.model_type} model of {total} layers cannot be cut into bottom, trunk and top",
            hint=f"cuts are possible before layers {', '.join(map(str, possible)) or '(none)'}",
        )
    first, last = _thirds(total)
    a = min(possible[:-1], key=lambda point: abs(point - first))
    b = min((point for point in possible if point > a), key=lambda point: abs(point - last))
    return a, b


def ranges_around(component: Component, owned: LayerRange) -> dict[Component, LayerRange]:
    """Cut a model so that one component has these layers; the other two share the rest, and may be empty."""
    first, last, total = owned.start, owned.end, owned.total
    cuts = {Component.BOTTOM: (last, total), Component.TRUNK: (first, last), Component.TOP: (0, first)}[component]
    return {
        Component.BOTTOM: LayerRange(0, cuts[0], total),
        Component.TRUNK: LayerRange(*cuts, total),
        Component.TOP: LayerRange(cuts[1], total, total),
    }


def impossible_cuts(family: ModelFamily, config: Mapping[str, Any]) -> Mapping[int, str]:
    """Return the cuts that a family's models do not bear, each with the reason; raises BrokenPluginError."""
    try:
        return dict(family.impossible_cuts(config))
    # The function is the plugin's.
    except Exception as error:
        raise BrokenPluginError(
            f"impossible_cuts of the family {family.model_type!r} gave no mapping of cuts: {error!r}",
            hint="report it to the plugin's authors",
        ) from error


def check_split_points(split_points: Sequence[int], total: int) -> tuple[int, int]:
    """Return the two split points as integers, or say what is wrong and what would be right."""
    points = _integers(split_points)
    if total < 3:  # noqa: PLR2004  # bottom, trunk and top each hold at least one layer
        raise InvalidSplitError(
            f"a model of {total} layers cannot be cut into bottom, trunk and top",
            hint="each component needs at least one layer, so at least 3",
        )
    if len(points) != 2:  # noqa: PLR2004  # two cuts make three components
        raise InvalidSplitError(
            f"{len(points)} split points {_show(points)} were given; two cut a model into bottom, trunk and top",
            hint=f"try {_nearest(points, total)}",
        )
    first, second = points
    broken = [
        f"{left} < {right} does not hold ({a} >= {b})"
        for left, right, a, b in (
            ("0", "a", 0, first),
            ("a", "b", first, second),
            ("b", f"{total} layers", second, total),
        )
        if a >= b
    ]
    if broken:
        raise InvalidSplitError(
            f"split points {_show(points)} do not cut a model of {total} layers: "
            f"0 < a < b < {total} is needed, but {'; '.join(broken)}",
            hint=f"the nearest valid choice is {_nearest(points, total)}",
        )
    return first, second


def _integers(split_points: object) -> list[int]:
    if isinstance(split_points, str) or not isinstance(split_points, Sequence):
        raise InvalidSplitError(
            f"split_points is {split_points!r}, not a pair of layer numbers", hint="give a tuple, (2, 10) say"
        )
    try:
        if any(isinstance(point, bool) for point in split_points):
            raise TypeError("a truth value is no layer number")
        return [operator.index(point) for point in split_points]
    except TypeError as error:
        raise InvalidSplitError(
            f"split points {_show(list(split_points))} are not all integers: {reason(error)}",
            hint="give two layer numbers, (2, 10) say",
        ) from error


def _thirds(total: int) -> tuple[int, int]:
    return total // 3, total - total // 3


def _nearest(points: Sequence[int], total: int) -> tuple[int, int]:
    if not points:
        return _thirds(total)
    low, high = (min(points), max(points)) if len(points) > 1 else (*points, total - 1)
    first = min(max(low, 1), total - 2)
    return first, min(max(high, first + 1), total - 1)


def _show(points: Sequence[object]) -> str:
    return f"({', '.join(map(repr, points))})"
