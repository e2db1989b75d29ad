"""transformers' own tables: which tensors of a module are renamed, or made of others in the file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
import transformers
from transformers import conversion_mapping, core_model_loading

from splitlearn_core.build.configuration import (
    architecture_class,
    config_errors,
    decoder_config,
    hf_config,
    layer_count_set,
)
from splitlearn_core.build.torch_state import skeleton
from splitlearn_core.errors import CheckpointError, ConfigurationError
from splitlearn_core.family import ModelFamily
from splitlearn_core.loading_strategy import torch_dtype
from splitlearn_core.plan.conversions import WeightConversion, WeightOperation
from splitlearn_core.plan.keys import KeyTarget, in_model, renamed

#: transformers' operation -> ours, and the attributes that hold its dimensions.
_OPERATIONS = {
    "MergeModulelist": ("stack", ("dim",)),
    "Concatenate": ("concatenate", ("dim",)),
    "Chunk": ("chunk", ("dim",)),
    "Split": ("split", ("dim",)),
    "Transpose": ("transpose", ("dim0", "dim1")),
}
#: Attributes of an operation that make it depend on more than its sources.
_CONDITIONS = ("num_shards_attribute",)


def targets_by_tables(
    family: ModelFamily, config: Mapping[str, Any], checkpoint_keys: Sequence[str]
) -> Mapping[str, KeyTarget]:
    """Return where each key of a checkpoint goes by transformers' table for the type.

    Args:
        family: The family.
        config: The values of ``config.json``.
        checkpoint_keys: The keys.

    Raises:
        CheckpointError: The table has an operation that is not supported.
    """
    return _targets(family, _example(family, config), tuple(checkpoint_keys))


def names_in_float32(
    family: ModelFamily, config: Mapping[str, Any], dtype: str, module_keys: Collection[str]
) -> set[str]:
    """Return the tensors that transformers loads in float32 although the model is loaded in another dtype."""
    example = _example(family, config)
    wide = {_NUMBER.sub(".", name) for name, tensor in example.state_dict().items() if tensor.dtype == torch.float32}
    patterns = list(example._get_dtype_plan(torch_dtype(dtype)))  # noqa: SLF001  # as from_pretrained
    kept = core_model_loading.build_glob_alternation(patterns)[0] if patterns else None
    return {name for name in module_keys if _NUMBER.sub(".", name) in wide or (kept is not None and kept.search(name))}


#: Class, model type and configuration -> a model of few layers without values, in a narrow dtype.
_EXAMPLES: dict[tuple[str, str, str], Any] = {}
_MOST_EXAMPLES = 8
#: Layers of one: the first may differ from the others.
_LAYERS = 4
#: The number of a layer in a name, which does not matter.
_NUMBER = re.compile(r"\.\d+\.")
#: A number of its own in a pattern; not the one of a group, nor a digit of a word.
_NAMES_NUMBER = re.compile(r"(?<![\w\\])\d")


def _example(family: ModelFamily, config: Mapping[str, Any]) -> Any:
    """Return a small model without values.

    transformers' tables are those of its class and its submodels; tensors that are float32 in it are so in every model,
    and each layer of the model is like one of them.
    """
    key = family.architecture, family.model_type, json.dumps({**config}, sort_keys=True, default=str)
    if key in _EXAMPLES:
        return _EXAMPLES[key]
    while len(_EXAMPLES) >= _MOST_EXAMPLES:
        del _EXAMPLES[next(iter(_EXAMPLES))]
    name = f"a {family.model_type} model"
    own = hf_config(family, config, name, "bfloat16")
    decoder = decoder_config(family, own)
    total = decoder.num_hidden_layers
    try:
        _EXAMPLES[key] = _without_values(family, own, min(total, _LAYERS))
    except ConfigurationError:
        if total <= _LAYERS:
            raise
        # Some configurations are valid with all of their layers alone.
        _EXAMPLES[key] = _without_values(family, own, total)
    return _EXAMPLES[key]


def _without_values(family: ModelFamily, config: Any, layers: int) -> Any:
    errors = config_errors(family, f"a {family.model_type} model")
    with skeleton(config.dtype), errors, layer_count_set(family, config, layers):
        return architecture_class(family)(config)


# A plan maps the same keys several times, and there may be tens of thousands.
@lru_cache(maxsize=8)
def _targets(family: ModelFamily, example: Any, checkpoint_keys: tuple[str, ...]) -> Mapping[str, KeyTarget]:
    # Built again each time, because some entries remember which keys they have seen.
    table = conversion_mapping.get_model_conversion_mapping(example)
    converters = [entry for entry in table if isinstance(entry, core_model_loading.WeightConverter)]
    renamings = [entry for entry in table if not isinstance(entry, core_model_loading.WeightConverter)]
    targets: dict[str, KeyTarget] = {}
    shapes = {_NUMBER.sub(".", name): tuple(tensor.shape) for name, tensor in example.state_dict().items()}
    #: First target -> its converter, and the sources by the pattern that they match.
    collected: dict[str, tuple[Any, dict[str, list[str]]]] = {}
    rename = _by_layer(family, renamings, converters)
    for key in checkpoint_keys:
        if renamed(family, key).endswith(family.ignored_suffixes):
            targets[key] = None
            continue
        name, converter, pattern = rename(key)
        target = targets[key] = in_model(family, name)
        if pattern is not None and target is not None:
            collected.setdefault(target, (converter, {}))[1].setdefault(pattern, []).append(key)
    for target, (converter, sources) in collected.items():
        conversion = _conversion(family, converter, sources, target, shapes)
        targets |= dict.fromkeys(conversion.keys, conversion)
    return targets


def _natural_order(key: str) -> list[Any]:
    return [_part_order(part) for part in key.split(".")]


@lru_cache(maxsize=2**14)
def _part_order(part: str) -> Any:
    """Return transformers' order of a part of a name between dots: few of those differ in a model."""
    return core_model_loading.dot_natural_key(part)


def _by_layer(
    family: ModelFamily, renamings: Sequence[Any], converters: Sequence[Any]
) -> Callable[[str], tuple[str, Any, str | None]]:
    """Return a function from a checkpoint key to its name, and to its converter and the pattern of that, if any.

    Names that differ in the number of the layer alone are renamed alike, so that one of each is enough.
    """
    patterns = [old for old, _ in family.renamed]
    patterns += [
        text for entry in (*renamings, *converters) for text in (*entry.source_patterns, *entry.target_patterns)
    ]
    if any(_NAMES_NUMBER.search(pattern) for pattern in patterns):
        return lambda key: _renamed(family, renamings, converters, key)
    known: dict[tuple[str, int, str], tuple[str, str, Any, str | None]] = {}

    def rename(key: str) -> tuple[str, Any, str | None]:
        before, number, after = _around_number(key)
        # Patterns may count digits.
        kind = before, len(number), after
        if kind in known:
            start, end, converter, pattern = known[kind]
            return f"{start}{number}{end}", converter, pattern
        name, converter, pattern = _renamed(family, renamings, converters, key)
        start, same, end = _around_number(name)
        if number and same == number and f".{number}." not in after:
            known[kind] = start, end, converter, pattern
        return name, converter, pattern

    return rename


def _around_number(name: str) -> tuple[str, str, str]:
    """Split a name around the first number between dots; all but the first are empty if there is none."""
    match = _NUMBER.search(name)
    return (name[: match.start() + 1], match[0][1:-1], name[match.end() - 1 :]) if match else (name, "", "")


def _renamed(
    family: ModelFamily, renamings: Sequence[Any], converters: Sequence[Any], name: str
) -> tuple[str, Any, str | None]:
    name = renamed(family, name)
    for renaming in renamings:
        name, _ = renaming.rename_source_key(name)
    for converter in converters:
        name, pattern = converter.rename_source_key(name)
        if pattern is not None:
            return name, converter, pattern
    return name, None, None


def _conversion(
    family: ModelFamily,
    converter: Any,
    sources: Mapping[str, Sequence[str]],
    target: str,
    shapes: Mapping[str, tuple[int, ...]],
) -> WeightConversion:
    """Translate a converter that has collected its sources; the shapes are those of the example's tensors."""
    first, *others = converter.target_patterns
    before, _, after = target.partition(first)
    targets = (target, *(f"{before}{other}{after}" for other in others))
    # In transformers' order: tensors are merged in it.
    groups = [sorted(sources[each], key=_natural_order) for each in converter.source_patterns if each in sources]
    operations = []
    for operation in converter.operations:
        name = type(operation).__name__
        known = _OPERATIONS.get(name)
        if known is None or any(getattr(operation, condition, None) for condition in _CONDITIONS):
            raise CheckpointError(
                f"transformers {transformers.__version__} makes {target} by an operation that splitlearn does not "
                f"have ({operation!r})",
                hint=f"save the model with transformers in its own layout, or report it: {family.model_type}",
            )
        dims = tuple(getattr(operation, dim) for dim in known[1])
        # Some files have tensors as the module has them already.
        unless = shapes.get(_NUMBER.sub(".", target)) if getattr(operation, "check_dims", False) else None
        pieces = [shapes.get(_NUMBER.sub(".", each), ()) for each in targets] if known[0] == "split" else []
        sizes = tuple(shape[dims[0]] for shape in pieces if len(shape) > dims[0])
        operations.append(WeightOperation(known[0], dims, unless=unless, sizes=sizes))
    return WeightConversion(
        sources=tuple(map(tuple, groups)),
        targets=targets,
        operations=tuple(operations),
    )
