"""From a failure to the field of the family that is to blame."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from splitlearn_core.build.configuration import architecture_class
from splitlearn_core.errors import BrokenPluginError, ConfigurationError, InvalidSplitError, TensorMismatchError
from splitlearn_core.family import ModelFamily
from splitlearn_core.plan.keys import map_keys, placement
from splitlearn_core.plan.split_points import layers_between
from splitlearn_core.plugins.registry import registry
from splitlearn_core.testing.conformance.anatomy import Anatomy, anatomy
from splitlearn_core.testing.conformance.findings import Suspect
from splitlearn_core.testing.conformance.subject import configure
from splitlearn_core.testing.worlds import random_model

#: The values of ``config.json`` that core asks a family for.
COMMON = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings"
)  # fmt: skip
#: The one of them that says which tensors there are; the others say how many layers, and how large the cache is.
READ_FOR_TIES = ("tie_word_embeddings",)
_MAP_HOOK = "hook splitlearn_map_weight_keys"
MAPPER = Suspect(_MAP_HOOK, "it must answer for every key, and name no module key twice")
#: What a refusal of tensors says of each, and what may have made it so where nothing else is wrong.
_MISFITS = {
    "unexpected: ": Suspect("ignored_suffixes", "tensors that no module wants are left out by the ends of their keys"),
    "missing: ": Suspect("renamed", "keys of old checkpoints, (old, new)"),
}


def explain(error: Exception, family: ModelFamily, values: Mapping[str, Any]) -> tuple[Suspect, ...]:
    """Say where the cause of an exception lies, as far as something of the family is evidence for it.

    Args:
        error: What core, transformers or torch raised.
        family: The family under test.
        values: The values of the configuration that the model was made of.
    """
    if isinstance(error, BrokenPluginError) and _MAP_HOOK in str(error):
        return (MAPPER,)
    try:
        hf_class: Any = architecture_class(family)
        model = random_model(hf_class, configure(family, values, {}))
        return tuple(_explained(error, family, model))
    # A model that cannot be made or run is another matter, and told as that.
    except Exception:  # noqa: BLE001
        return ()


def _explained(error: Exception, family: ModelFamily, model: Any) -> list[Suspect]:
    if isinstance(error, InvalidSplitError):
        impossible = family.impossible_cuts(model.config.to_dict())
        declared = any(reason in str(error) for reason in impossible.values())
        return [Suspect("impossible_cuts", "a cut that is declared so")] if declared else []
    if isinstance(error, ConfigurationError):
        spelled = {name: (name, family.config_names.get(name, name)) for name in COMMON}
        named = [name for name in COMMON if any(word in str(error) for word in spelled[name])]
        return list(misread(family, model.config, named))
    if not isinstance(error, TensorMismatchError):
        return list(misnamed(family, model))
    # What is named wrongly is placed wrongly, too.
    found = [*misnamed(family, model), *misread(family, model.config, READ_FOR_TIES)]
    found = found or [suspect for problem, suspect in misplaced(family, model) if _shares_a_name(problem, str(error))]
    return found or [suspect for words, suspect in _MISFITS.items() if words in str(error)]


def _shares_a_name(problem: str, words: str) -> bool:
    return any(word in words for word in problem.replace(",", " ").split() if "." in word)


def misnamed(family: ModelFamily, model: Any) -> Iterator[Suspect]:
    """Hold the names of a family against the modules of the unsplit model."""
    seen = anatomy(model)
    if family.base != seen.base:
        yield Suspect("base", f"{type(model).__name__} has its base model in {seen.base!r}, not in {family.base!r}")
        return  # Nothing relative to it can be right.
    if family.layers not in seen.layers:
        yield Suspect("layers", _instead(family.layers, seen.layers))
    else:
        yield from mixed(family, model)
    if family.embedding != seen.embedding:
        yield Suspect("embedding", _instead(family.embedding, [seen.embedding]))
    # What comes after the norm, where there is such a thing, yields the base's output in its place.
    if family.norm and not {family.norm, *family.skip_outside_top} & set(seen.norms):
        yield Suspect("norm", _instead(family.norm, [name for name in seen.norms if name != family.layers][:1]))
    if family.head != seen.head:
        yield Suspect("head", _instead(family.head, [seen.head]))
    inlets: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
        "zero_outside_bottom": (family.zero_outside_bottom, seen.added),
        "skip_outside_bottom": (family.skip_outside_bottom, seen.passed),
    }
    there = {name for name, _ in model.get_submodule(family.base).named_modules()}
    for field, (said, right) in inlets.items():
        for name in said:
            if name not in there:
                yield Suspect(field, _instead(name, right))
    both = set(family.zero_outside_bottom) & set(seen.passed), set(family.skip_outside_bottom) & set(seen.added)
    for field, names in zip(inlets, both, strict=True):
        for name in sorted(names):
            other = next(one for one in inlets if one != field)
            yield Suspect(field, f"{name!r} belongs into {other}")


def _instead(said: str, right: Iterable[str]) -> str:
    names = [name for name in right if name]
    return f"{said!r} is not it; " + (f"it is {' or '.join(map(repr, names))}" if names else "there is none")


def undeclared_inlets(family: ModelFamily, model: Any) -> Iterator[Suspect]:
    """Say what changes states before the first layer, and is not said to run in the bottom alone."""
    seen = anatomy(model)
    added = [name for name in seen.added if name not in family.zero_outside_bottom]
    passed = [name for name in seen.passed if name not in family.skip_outside_bottom]
    if added:
        yield Suspect("zero_outside_bottom", f"added again: {', '.join(added)}")
    if passed:
        yield Suspect("skip_outside_bottom", f"states pass through again: {', '.join(passed)}")


def mixed(family: ModelFamily, model: Any) -> Iterator[Suspect]:
    """Hold ``uniform_layers`` against the layers there are."""
    if not family.uniform_layers:
        return
    layers = model.get_submodule(family.base).get_submodule(family.layers)
    classes = sorted({type(layer).__name__ for layer in layers})
    if len(classes) > 1:
        yield Suspect("uniform_layers", f"say False: the layers are of several classes, {', '.join(classes)}")
        return
    for number, layer in enumerate(layers):
        try:
            with torch.device("meta"):
                made = type(layers[0])(model.config, number)
        # A constructor of other arguments raises what it likes.
        except Exception as error:  # noqa: BLE001
            yield Suspect("uniform_layers", f"say False: {classes[0]}(config, {number}) fails: {error}")
            return
        if _shapes(made) != _shapes(layer):
            yield Suspect(
                "uniform_layers", f"say False: {classes[0]}(config, {number}) is not what the model has there"
            )
            return


def _shapes(module: Any) -> dict[str, Any]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def misconfigured(family: ModelFamily, model: Any) -> Iterator[Suspect]:
    """Hold what a family reads from ``config.json`` against what transformers reads there."""
    # As it would be written: numbers and texts, by the family's own names.
    written = json.loads(model.config.to_json_string(use_diff=False))
    own_names = type(model.config).attribute_map
    for name in COMMON:
        right = getattr(model.config, name, None)
        read = effective(family, written, name)
        if right is None or read == right:
            continue
        own = own_names.get(name, name)
        if family.config_names.get(name, name) != own:
            yield Suspect(f"config_names[{name!r}]", f"config.json calls it {own!r}")
        else:
            field = "config_names" if name in family.config_names else "config_defaults"
            yield Suspect(f"{field}[{name!r}]", f"the family reads {read!r} where transformers has {right!r}")


def misread(family: ModelFamily, config: Any, names: Iterable[str] = COMMON) -> Iterator[Suspect]:
    """Hold what a plan of one model reads, stated or filled in, against what transformers has.

    Args:
        family: The family.
        config: The model's configuration.
        names: The values that matter.
    """
    # As it lies in the file: what is as transformers fills it in is left out.
    written = json.loads(config.to_json_string())
    for name in names:
        right, read = getattr(config, name, None), effective(family, written, name)
        if right is not None and read != right:
            own = type(config).attribute_map.get(name, name)
            if own in written and family.config_names.get(name, name) != own:
                yield Suspect(f"config_names[{name!r}]", f"config.json calls it {own!r}")
            elif own in written and name in family.config_names:
                yield Suspect(f"config_names[{name!r}]", f"{read!r} is read where transformers has {right!r}")
            else:
                yield Suspect(f"config_defaults[{name!r}]", f"{read!r} is read where transformers has {right!r}")


def wrong_defaults(family: ModelFamily) -> Iterator[Suspect]:
    """Hold what a family fills in for a silent ``config.json`` against what transformers fills in."""
    hf_class: Any = architecture_class(family)
    silent = hf_class.config_class()
    for name, value in family.config_defaults.items():
        right = getattr(silent, name, None)
        # None is how a configuration says that core's own rule holds.
        if right is not None and value != right:
            yield Suspect(f"config_defaults[{name!r}]", f"transformers fills in {right!r}, not {value!r}")
    known = {name: getattr(silent, name, None) for name in ("hidden_size", "num_attention_heads")}
    for name in ("num_key_value_heads", "head_dim", "tie_word_embeddings"):
        right = getattr(silent, name, None)
        if name not in family.config_defaults and right is not None and effective(family, known, name) != right:
            yield Suspect(f"config_defaults[{name!r}]", f"transformers fills in {right!r} where config.json is silent")


def effective(family: ModelFamily, config: Mapping[str, Any], name: str) -> Any:
    """Return a value as a plan uses it: what is said, the family's default, or core's own rule."""
    value = family.config_value(config, name)
    if value is not None:
        return value
    if name == "tie_word_embeddings":
        return False
    heads = family.config_value(config, "num_attention_heads")
    if name == "num_key_value_heads":
        return heads
    hidden = family.config_value(config, "hidden_size")
    return hidden // heads if name == "head_dim" and hidden and heads else None


def misplaced(family: ModelFamily, model: Any, keys: Iterable[str] | None = None) -> list[tuple[str, Suspect]]:
    """Say which tensors of a checkpoint do not find their place, and why.

    Args:
        family: The family.
        model: The unsplit model.
        keys: The checkpoint's keys; by default those that the model itself would write.
    """
    wanted = set(model.state_dict())
    written = json.loads(model.config.to_json_string(use_diff=False))
    names = sorted(wanted if keys is None else keys)
    mapping = registry().map_weight_keys(family, written, names) or map_keys(family, names)
    targets = {target for target in mapping.values() if target is not None}
    dropped = {key for key, target in mapping.items() if target is None}
    mapper = _MAP_HOOK if "splitlearn_map_weight_keys" in registry().plugin(family.model_type).hooks else "renamed"
    found = [
        (f"{key} is left out, and the model wants it", Suspect(_dropper(family, key, mapper), "it drops a tensor"))
        for key, target in mapping.items()
        if target is None and key in wanted
    ]
    for key, target in mapping.items():
        if target is not None and target not in wanted:
            why = f"{key} becomes {target}, which the model does not have"
            found.append((why, Suspect(mapper, "its new name is a name of the module tree")))
    optional = _tied_names(model)
    found += [
        (f"no tensor of the checkpoint becomes {name}", Suspect(mapper, "every parameter needs a tensor"))
        for name in sorted(wanted - targets - optional - dropped)
    ]
    return [*found, *_homeless(family, model, sorted(wanted & targets))]


def _tied_names(model: Any) -> set[str]:
    """Return the names that a tied checkpoint may leave out."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embedding.weight:
        return set()
    return {name for name, tensor in model.named_parameters(remove_duplicate=False) if tensor is head.weight}


def _dropper(family: ModelFamily, key: str, mapper: str) -> str:
    return "ignored_suffixes" if mapper == "renamed" and key.endswith(family.ignored_suffixes) else mapper


def _homeless(family: ModelFamily, model: Any, names: list[str]) -> Iterator[tuple[str, Suspect]]:
    """Yield the tensors that no component holds."""
    layers = model.config.num_hidden_layers
    third = max(layers // 3, 1)
    component_of, seen = placement(family, layers_between((third, 2 * third), layers)), anatomy(model)
    for name in names:
        if component_of(name) is None:
            yield f"no component holds {name}", _inlet_of(name.removeprefix(f"{family.base}."), seen)


def _inlet_of(name: str, seen: Anatomy) -> Suspect:
    for field, modules, does in (
        ("zero_outside_bottom", seen.added, "is added to the embeddings"),
        ("skip_outside_bottom", seen.passed, "lets the state through before the first layer"),
    ):
        for module in modules:
            if name.startswith(f"{module}."):
                return Suspect(field, f"{module!r} {does}, outside bottom too, unless it is named here")
    return Suspect("layers, norm, head, zero_outside_bottom or skip_outside_bottom", f"none of them holds {name!r}")
