"""From checkpoint keys to module keys, and from module keys to components."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from splitlearn_core.errors import ConfigurationError
from splitlearn_core.family import ModelFamily
from splitlearn_core.plan.conversions import WeightConversion
from splitlearn_core.plan.split_points import count_layers
from splitlearn_core.quoting import quote
from splitlearn_core.types import Component, LayerRange


@dataclass(frozen=True, slots=True)
class KeyTable:
    """Where the tensors of a checkpoint go.

    The tied tensor is one checkpoint key with two module keys; :attr:`sources` therefore runs from
    module key to checkpoint key.
    """

    #: Component -> module key -> checkpoint key; also of tensors that others are made of, under names of their own.
    sources: Mapping[str, Mapping[str, str]]
    #: Checkpoint keys that are used in more than one component.
    tied: tuple[str, ...]
    #: Checkpoint keys that have no place in a model of the family -> the module key that each would be.
    unexpected: Mapping[str, str]
    #: Descriptions of places that two tensors have.
    problems: tuple[str, ...]
    #: Module keys that the configuration ties and the file stores separately: their values may differ.
    separate_ends: tuple[str, str] | None
    #: Component -> what is made there of several tensors, or of parts of them.
    conversions: Mapping[str, Sequence[WeightConversion]] = field(default_factory=dict)


#: Where a tensor of a checkpoint goes: to a module key, into what a conversion makes, or nowhere.
KeyTarget = str | WeightConversion | None


def _tie(family: ModelFamily, config: Mapping[str, Any], origins: dict[str, str]) -> tuple[str, str] | None:
    """Give the tied tensor both of its module keys; return these if the file stores it separately."""
    if not family.config_value(config, "tie_word_embeddings"):
        return None
    embedding, head = f"{family.base}.{family.embedding}.weight", f"{family.head}.weight"
    pairs = [(embedding, head)] + ([(family.head_bias, f"{family.head}.bias")] if family.head_bias else [])
    separate = (embedding, head) if embedding in origins and head in origins else None
    # One tensor, two names: the file may have either.
    for present, absent in (ordered for pair in pairs for ordered in (pair, pair[::-1])):
        if present in origins and absent not in origins:
            origins[absent] = origins[present]
    return separate


def shared_prefixes(family: ModelFamily, config: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield, for each module that layers share, the beginnings of its tensors' names in these layers, in order.

    Raises:
        ConfigurationError: ``config.json`` does not say which layers share it.
    """
    for module, (kinds_name, kind, count_name) in family.shared_modules.items():
        kinds, total = family.config_value(config, kinds_name), count_layers(family, config)
        count = family.config_value(config, count_name) if count_name else 1
        if not isinstance(kinds, list) or len(kinds) != total or type(count) is not int or count < 1:
            stated = f"{kinds_name} = {quote(kinds)}{f' and {count_name} = {quote(count)}' if count_name else ''}"
            raise ConfigurationError(
                f"config.json says {stated}, which do not say which of its {total} layers share {module}",
                hint="use the config.json that the checkpoint was saved with",
            )
        having = [number for number in range(total) if kinds[number] == kind]
        for first in range(count):
            yield [f"{family.base}.{family.layers}.{number}.{module}." for number in having[first::count]]


def _share(family: ModelFamily, config: Mapping[str, Any], origins: dict[str, str]) -> None:
    """Give the tensors of modules that layers share all of their module keys."""
    for prefixes in shared_prefixes(family, config):
        own: dict[str, str] = {}
        for prefix in prefixes:
            for name, key in origins.items():
                if name.startswith(prefix):
                    own.setdefault(name.removeprefix(prefix), key)
        for prefix in prefixes:
            for name, key in own.items():
                origins.setdefault(prefix + name, key)


def _own_names(family: ModelFamily, conversion: WeightConversion, taken: Container[str]) -> dict[str, str]:
    """Name the sources of a conversion as tensors of the same layer that no module has: name -> checkpoint key."""
    names = map_keys(family, conversion.keys)
    return {
        name if name is not None and name not in taken else f"{conversion.targets[0]}#{key}": key
        for key, name in names.items()
    }


def map_keys(family: ModelFamily, checkpoint_keys: Iterable[str]) -> dict[str, str | None]:
    """Map checkpoint keys to module keys by the family's tables; None leaves a tensor out.

    Some checkpoints name their tensors relative to the base module (GPT-2's on the Hub), some
    relative to the whole model; both are supported.
    """
    mapped: dict[str, str | None] = {}
    for key in checkpoint_keys:
        name = renamed(family, key)
        mapped[key] = None if name.endswith(family.ignored_suffixes) else in_model(family, name)
    return mapped


def renamed(family: ModelFamily, key: str) -> str:
    """Return a checkpoint key with the family's renamings."""
    for old, new in family.renamed:
        key = key.replace(old, new)
    return key


def in_model(family: ModelFamily, name: str) -> str | None:
    """Return a name relative to the whole model, also of a tensor that a file names relative to a module in it.

    None for a tensor of another model than the decoder.
    """
    modules = (family.base, *family.before_head, family.head)
    if (name and name == family.head_bias) or name.startswith(tuple(f"{module}." for module in modules)):
        return name
    if not family.text_config:
        return f"{family.base}.{name}"
    outer, _, deeper = family.base.partition(".")
    inside = f"{outer}.{name}"
    if not deeper:
        own = (family.layers, *family.inlets, *family.outlets)
        return inside if name.startswith(tuple(f"{module}." for module in own)) else None
    return inside if inside.startswith(f"{family.base}.") else None


def place_keys(
    family: ModelFamily,
    config: Mapping[str, Any],
    mapping: Mapping[str, KeyTarget],
    ranges: Mapping[str, LayerRange],
) -> KeyTable:
    """Assign every tensor of a checkpoint to the component that holds its module.

    A tensor without a place is recorded, not an error: a load warns of it, or reports it together with missing ones.
    """
    origins: dict[str, str] = {}
    twice: list[str] = []
    conversions: dict[int, WeightConversion] = {}
    for key, target in sorted(mapping.items(), key=lambda item: item[0]):
        if isinstance(target, WeightConversion):
            conversions[id(target)] = target
        elif target is not None and origins.setdefault(target, key) != key:
            twice.append(f"{origins[target]} and {key} (both are {target})")
    separate = _tie(family, config, origins)
    _share(family, config, origins)
    sources: dict[str, dict[str, str]] = {component: {} for component in ranges}
    unexpected: dict[str, str] = {}
    component_of = placement(family, ranges)
    for name, key in origins.items():
        component = component_of(name)
        if component is None:
            unexpected[key] = name
        else:
            sources[component][name] = key
    made: dict[str, list[WeightConversion]] = {}
    for conversion in conversions.values():
        first = conversion.keys[0]
        twice += [
            f"{origins[target]} and {first} (both make {target})"
            for target in conversion.targets
            if origins.setdefault(target, first) != first
        ]
        holders = {component_of(target) for target in conversion.targets}
        component = holders.pop() if len(holders) == 1 else None
        if component is None:
            unexpected |= dict.fromkeys(conversion.keys, conversion.targets[0])
        else:
            made.setdefault(component, []).append(conversion)
            sources[component] |= _own_names(family, conversion, origins)
    problems = [f"twice: {pair}" for pair in sorted(twice)]
    users: dict[str, int] = {}
    for table in sources.values():
        for key in table.values():
            users[key] = users.get(key, 0) + 1
    shared = tuple(sorted(key for key, count in users.items() if count > 1))
    return KeyTable(sources, shared, dict(sorted(unexpected.items())), tuple(problems), separate, made)


def placement(family: ModelFamily, ranges: Mapping[str, LayerRange]) -> Callable[[str], str | None]:
    """Return a function from a module key to the component that holds it, or None if none does."""
    owners = [component for component, owned in ranges.items() for _ in range(len(owned))]
    layers = f"{family.base}.{family.layers}."
    bottom = tuple(f"{family.base}.{inlet}." for inlet in family.inlets)
    top = (
        *(f"{family.base}.{outlet}." for outlet in family.outlets),
        *(f"{module}." for module in (*family.before_head, family.head)),
    )

    def component_of(name: str) -> str | None:
        if name.startswith(layers):
            # Parsed, not compared as text: layers.1 is a prefix of layers.10.
            number = name[len(layers) :].partition(".")[0]
            return owners[int(number)] if number.isdecimal() and int(number) < len(owners) else None
        # An end may be a parameter of the base module itself.
        within = f"{name}."
        if within.startswith(top) or (name and name == family.head_bias):
            return Component.TOP
        return Component.BOTTOM if within.startswith(bottom) else None

    return component_of


def companions(table: KeyTable, checkpoint_keys: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Assign tensors that no module uses, such as the masks of old checkpoints, to components.

    Each goes to the component of the tensors with the longest common module path.
    """
    owners = {
        key: component for component in reversed(list(table.sources)) for key in table.sources[component].values()
    }
    component_of_module: dict[str, str] = {}
    for key, component in owners.items():
        while "." in key:
            key = key.rpartition(".")[0]  # noqa: PLW2901  # the name of the module around it
            component_of_module.setdefault(key, component)
    companions_of: dict[str, list[str]] = {component: [] for component in table.sources}
    for key in sorted(set(checkpoint_keys) - owners.keys()):
        around = key
        while around and around not in component_of_module:
            around = around.rpartition(".")[0]
        companions_of[component_of_module.get(around, Component.BOTTOM)].append(key)
    return {component: tuple(keys) for component, keys in companions_of.items()}


#: Only if at most one of so many layers lacks a tensor does it look lost: in models whose layers differ on purpose,
#: there are more of each kind.
_ONE_OF = 4
_NAMED = 3


def uneven_layers(prefix: str, module_keys: Iterable[str]) -> tuple[str, ...]:
    """Describe which layers lack tensors that nearly all others have.

    This does not prove an error: layers may differ on purpose. A layer that has tensors of its own instead (one
    without experts among layers with experts) is therefore not reported.

    Args:
        prefix: Of the layers' module keys, up to their numbers: ``model.layers.``.
        module_keys: The tensors that are present.
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
