"""Layers that lack what their neighbours have: seen in names alone, before anything is loaded."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

#: At most one layer of so many may lack something for that to look like a loss: types of models whose layers
#: differ on purpose have more of each kind.
_ONE_OF = 4
_NAMED = 3


def uneven_layers(prefix: str, module_keys: Iterable[str]) -> tuple[str, ...]:
    """Say of each layer what it lacks that nearly all others have.

    It is no proof of a fault: the layers of a type may differ on purpose. So a layer that has something of its
    own instead (one with no experts among layers with experts) is left alone.

    Args:
        prefix: Of the layers' module keys, up to their numbers: ``model.layers.``.
        module_keys: The tensors that are there.
    """
    holders: dict[str, set[int]] = defaultdict(set)
    for key in module_keys:
        number, _, name = key.removeprefix(prefix).partition(".")
        if key.startswith(prefix) and number.isdecimal() and name:
            holders[name].add(int(number))
    layers = set().union(*holders.values())
    usual = {name for name, having in holders.items() if len(layers - having) * _ONE_OF <= len(layers)}
    peculiar = set().union(*(having for name, having in holders.items() if name not in usual))
    lacking: dict[tuple[int, tuple[int, ...]], list[str]] = defaultdict(list)
    for name in sorted(usual):
        for layer in layers - holders[name] - peculiar:
            lacking[layer, tuple(sorted(holders[name]))].append(name)
    return tuple(
        f"layer {layer} lacks {_some(names)}, which layers {number_ranges(having)} have"
        for (layer, having), names in sorted(lacking.items())
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def number_ranges(numbers: Sequence[int]) -> str:
    """Write sorted numbers as ``0-6 and 8-11``."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in spans]
    return " and ".join(filter(None, (", ".join(texts[:-1]), texts[-1])))
