"""Split arithmetic: from split points to the layer ranges of the components."""

from __future__ import annotations

import operator
import string
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from splitlearn_core.errors import BrokenPluginError, ConfigurationError, InvalidSplitError
from splitlearn_core.family import ModelFamily
from splitlearn_core.quoting import listed, quote, reason
from splitlearn_core.types import THREE, Component, LayerRange, component_names, kind_of

#: Far above that of any model; a larger number is a mistake or an attack, and would exhaust the memory.
MAX_LAYERS = 10_000
#: What configurations of transformers say of models that are decoders or not.
_OF_DECODERS = frozenset({"is_decoder", "is_encoder_decoder"})


def count_layers(family: ModelFamily, config: Mapping[str, Any]) -> int:
    """Read the number of layers from ``config.json``.

    Raises:
        ConfigurationError: It is missing, not a positive integer, or above :data:`MAX_LAYERS`.
    """
    layers = family.config_value(config, "num_hidden_layers")
    if not isinstance(layers, int) or isinstance(layers, bool) or not 1 <= layers <= MAX_LAYERS:
        name = family.config_names.get("num_hidden_layers", "num_hidden_layers")
        raise ConfigurationError(
            f"config.json says {name} = {layers!r}, which is not a number of layers (1 to {MAX_LAYERS})",
            hint=f'set "{name}" to the number of layers of the checkpoint',
        )
    return layers


def split_layers(family: ModelFamily, config: Mapping[str, Any], split_points: Sequence[int]) -> dict[str, LayerRange]:
    """Cut the layers of a model at its split points.

    Args:
        family: The model's family; it may declare cuts impossible.
        config: ``config.json``.
        split_points: One or more increasing layer numbers, each in ``(0, number of layers)``.

    Returns:
        The layers of each component, by its name, in order.

    Raises:
        InvalidSplitError: The points do not cut this model; the message shows the arithmetic.
    """
    total = count_layers(family, config)
    points = check_split_points(split_points, total)
    impossible = impossible_cuts(family, config)
    refused = [f"no cut before layer {point}: {impossible[point]}" for point in points if point in impossible]
    if refused:
        possible = [point for point in range(1, total) if point not in impossible]
        raise InvalidSplitError(
            f"split points {_show(points)} do not cut this {family.model_type} model: {'; '.join(refused)}",
            hint=_nearest([point for point in points if point in impossible], possible) + _possible(possible),
        )
    return layers_between(points, total)


def _possible(points: Sequence[int]) -> str:
    """Say at which points a model can be cut."""
    if points:
        return f"cuts are possible before layers {', '.join(map(str, points))}"
    return "no cut is possible with this config.json; the manager loads the model as a whole: model_type='huggingface'"


def _nearest(refused: Sequence[int], possible: Sequence[int]) -> str:
    if not possible:
        return ""
    near = dict.fromkeys(min(possible, key=lambda point: abs(point - wrong)) for wrong in refused)
    return f"the nearest possible is before layer {' and '.join(map(str, near))}; "


def layers_between(points: Sequence[int], total: int) -> dict[str, LayerRange]:
    """Return the layers of each component, by its name, of a model that is cut at these points."""
    edges = (0, *points, total)
    return {
        name: LayerRange(start, end, total)
        for name, start, end in zip(component_names(len(points) + 1), edges, edges[1:], strict=False)
    }


def names_of_parts(split_points: object) -> tuple[str, ...]:
    """Return the names of the components into which split points cut, before they are compared with a model.

    Invalid split points are refused once the model is known; until then, two are assumed.
    """
    count = len(split_points) if isinstance(split_points, Sequence) and not isinstance(split_points, str) else 0
    return component_names(count + 1) if 0 < count < MAX_LAYERS else THREE


def even_thirds(family: ModelFamily, config: Mapping[str, Any]) -> tuple[int, int]:
    """Return split points that give bottom and top a third of the layers each, and the trunk the rest.

    If a family declares one of these cuts impossible, it is the nearest that is possible.

    Raises:
        InvalidSplitError: The model cannot be cut into three.
    """
    total, possible = count_layers(family, config), possible_points(family, config)
    impossible = impossible_cuts(family, config)
    if len(possible) < 2:  # noqa: PLR2004  # two cuts make three components
        why = f": {next(iter(impossible.values()))}" if impossible and not possible else ""
        raise InvalidSplitError(
            f"this {family.model_type} model of {total} layers cannot be cut into bottom, trunk and top{why}",
            hint=_possible(possible) + ("; one cut makes bottom and top" if possible else ""),
        )
    first, last = _thirds(total)
    a = min(possible[:-1], key=lambda point: abs(point - first))
    b = min((point for point in possible if point > a), key=lambda point: abs(point - last))
    return a, b


def possible_points(family: ModelFamily, config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the layers before which a model can be cut."""
    impossible = impossible_cuts(family, config)
    return tuple(point for point in range(1, count_layers(family, config)) if point not in impossible)


def ranges_around(component: str, owned: LayerRange) -> dict[str, LayerRange]:
    """Cut a model so that a bottom, trunk or top has these layers; the other two share the rest, and may be empty."""
    first, last, total = owned.start, owned.end, owned.total
    cuts = {Component.BOTTOM: (last, total), Component.TRUNK: (first, last), Component.TOP: (0, first)}
    return layers_between(cuts[kind_of(component)], total)


def impossible_cuts(family: ModelFamily, config: Mapping[str, Any]) -> Mapping[int, str]:
    """Return the cuts that a family's models do not allow, each with the reason; raises BrokenPluginError."""
    try:
        impossible = dict(family.impossible_cuts(family.decoder_values(config)))
    # The plugin's own code, which may raise anything.
    except Exception as error:
        raise BrokenPluginError(
            f"impossible_cuts of the family {family.model_type!r} gave no mapping of cuts: {error!r}",
            hint="report it to the plugin's authors",
        ) from error
    for name, kinds in family.joined_layers.items():
        # A file that lacks the list has the defaults of the class, which are not known here.
        of_layers = family.decoder_values(config).get(name) or ()
        if not isinstance(of_layers, list | tuple):
            raise ConfigurationError(
                f"config.json says {name} = {quote(of_layers)}, which is no list with a kind for each layer",
                hint="use the config.json that the checkpoint was saved with",
            )
        for number, kind in enumerate(of_layers):
            if number and kind in kinds:
                impossible.setdefault(number, f"it uses what the layer before it computed ({name}: {kind!r})")
    different = {
        name: value
        for name, required in family.required_values.items()
        if (value := family.config_value(config, name)) not in (None, required)
    }
    if different:
        values = ", ".join(
            f"{name} is {value!r}, not {family.required_values[name]!r}" for name, value in different.items()
        )
        encodes = _OF_DECODERS.intersection(different)
        why = "the model is no causal decoder" if encodes else "more than the hidden states would cross it"
        return impossible | dict.fromkeys(range(1, count_layers(family, config)), f"{why} ({values})")
    for number, source in _shared_caches(family, config):
        for point in range(source + 1, number + 1):
            impossible.setdefault(point, f"layer {number} uses the keys and values of layer {source}")
    return impossible


def _shared_caches(family: ModelFamily, config: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Yield each layer that uses the keys and values of an earlier one, and that layer, the last layer first."""
    count = family.config_value(config, family.sharing_layers) if family.sharing_layers else 0
    if type(count) is not int or count < 1:
        return
    total = count_layers(family, config)
    kinds = family.decoder_values(config).get("layer_types")
    if not isinstance(kinds, list) or len(kinds) != total:
        raise ConfigurationError(
            f"config.json has no layer_types of {total} layers, which say whose keys and values the last {count} use",
            hint="use the config.json that the checkpoint was saved with",
        )
    own = kinds[: max(total - count, 0)]
    for number in range(total - 1, len(own) - 1, -1):
        if kinds[number] in own:
            yield number, len(own) - 1 - own[::-1].index(kinds[number])


def check_split_points(split_points: Sequence[int], total: int) -> tuple[int, ...]:
    """Return the split points as integers; raises InvalidSplitError, with a valid choice in its hint."""
    points = _integers(split_points)
    parts = len(points) + 1 if points else min(len(THREE), total)
    if total < max(parts, 2):
        raise InvalidSplitError(
            f"a model of {total} layers cannot be cut into {_components(max(parts, 2))}",
            hint=f"each component needs at least one layer, so at least {max(parts, 2)}",
        )
    if not points:
        raise InvalidSplitError(
            "0 split points () were given; one or more cut a model into components",
            hint=f"try {nearest_points(points, total)}",
        )
    names = point_names(len(points))
    broken = [
        f"{left} < {right} does not hold ({a} >= {b})"
        for left, right, a, b in zip(
            ("0", *names), (*names, f"{total} layers"), (0, *points), (*points, total), strict=True
        )
        if a >= b
    ]
    if broken:
        raise InvalidSplitError(
            f"split points {_show(points)} do not cut a model of {total} layers: "
            f"{' < '.join(('0', *names, str(total)))} is needed, but {listed(broken, '; ')}",
            hint=f"the nearest valid choice is {nearest_points(points, total)}",
        )
    return tuple(points)


def _integers(split_points: object) -> list[int]:
    if isinstance(split_points, str) or not isinstance(split_points, Sequence):
        one = f"({split_points},) for one cut, " if type(split_points) is int else ""
        raise InvalidSplitError(
            f"split_points is {split_points!r}, and no sequence of layer numbers",
            hint=f"give a tuple, {one}(2, 10) say",
        )
    if len(split_points) >= MAX_LAYERS:
        raise InvalidSplitError(
            f"{len(split_points)} split points were given, and no model has more than {MAX_LAYERS} layers",
            hint="give the layer before which each component but the first begins, (2, 10) say",
        )
    try:
        if any(isinstance(point, bool) for point in split_points):
            raise TypeError("a truth value is not a layer number")
        return [operator.index(point) for point in split_points]
    except TypeError as error:
        raise InvalidSplitError(
            f"split points {_show(list(split_points))} are not all integers: {reason(error)}",
            hint="give layer numbers, (2, 10) say",
        ) from error


def describe_cuts(split_points: Sequence[int]) -> str:
    """Return split points as text: ``1, 3 and 5``."""
    *others, last = map(str, split_points)
    return f"{', '.join(others)} and {last}" if others else last


def _components(count: int) -> str:
    """Return the names of so many components, or their number if there are many."""
    if count > len(THREE):
        return f"{count} components"
    *others, last = component_names(count)
    return f"{', '.join(others)} and {last}"


def point_names(count: int) -> tuple[str, ...]:
    """Return the names of the points in a message: a, b, c, ..."""
    return (
        tuple(string.ascii_lowercase[:count])
        if count <= len(string.ascii_lowercase)
        else tuple(f"p{number}" for number in range(1, count + 1))
    )


def _thirds(total: int) -> tuple[int, int]:
    return total // 3, total - total // 3


def nearest_points(points: Sequence[int], total: int) -> tuple[int, ...]:
    """Return as many valid split points near these, for a model of so many layers; even thirds if there are none."""
    if not points:
        return _thirds(total) if total >= len(THREE) else (1,)
    near: list[int] = []
    for number, point in enumerate(sorted(points)):
        near.append(min(max(point, near[-1] + 1 if near else 1), total - len(points) + number))
    return tuple(near)


def _show(points: Sequence[object]) -> str:
    return f"({', '.join(map(repr, points))}{',' if len(points) == 1 else ''})"
