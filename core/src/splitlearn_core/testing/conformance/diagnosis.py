"""Diagnose failures: find the field of the family that causes them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from splitlearn_core.build.configuration import architecture_class, decoder_config
from splitlearn_core.build.pruning import leave_out_others
from splitlearn_core.errors import BrokenPluginError, ConfigurationError, InvalidSplitError, TensorMismatchError
from splitlearn_core.family import ModelFamily
from splitlearn_core.loading.planning import key_targets
from splitlearn_core.plan.conversions import WeightConversion
from splitlearn_core.plan.keys import KeyTarget, placement
from splitlearn_core.plan.split_points import impossible_cuts, layers_between
from splitlearn_core.plugins.registry import registry
from splitlearn_core.testing.conformance.anatomy import Anatomy, anatomy
from splitlearn_core.testing.conformance.findings import Suspect
from splitlearn_core.testing.conformance.subject import configure
from splitlearn_core.testing.worlds import random_model

#: The values of ``config.json`` that core reads through a family.
COMMON = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings"
)  # fmt: skip
#: Of these, the one that decides which tensors there are; the others decide the layers and the size of the cache.
READ_FOR_TIES = ("tie_word_embeddings",)
_MAP_HOOK = "hook splitlearn_map_weight_keys"
MAPPER = Suspect(_MAP_HOOK, "it must return an entry for every key, and no module key twice")
#: Words of a tensor mismatch, and its possible cause if nothing else is wrong.
_MISFITS = {
    "unexpected: ": Suspect("ignored_suffixes", "tensors that no module uses are omitted by key suffix"),
    "missing: ": Suspect("renamed", "keys of old checkpoints, (old, new)"),
}


def explain(error: Exception, family: ModelFamily, values: Mapping[str, Any]) -> tuple[Suspect, ...]:
    """Return the fields that may have caused an exception, with the evidence.

    Args:
        error: The exception of core, transformers or torch.
        family: The family under test.
        values: The values of the configuration that the model was made of.
    """
    if isinstance(error, BrokenPluginError) and _MAP_HOOK in str(error):
        return (MAPPER,)
    try:
        hf_class: Any = architecture_class(family)
        model = random_model(hf_class, configure(family, values, {}))
        if family.text_config:
            leave_out_others(model, family)
        return tuple(_explained(error, family, model))
    # Another check reports a model that cannot be created or run.
    except Exception:  # noqa: BLE001
        return ()


def _explained(error: Exception, family: ModelFamily, model: Any) -> list[Suspect]:
    if isinstance(error, InvalidSplitError):
        impossible = impossible_cuts(family, model.config.to_dict())
        declared = any(reason in str(error) for reason in impossible.values())
        return [Suspect("impossible_cuts", "this cut is declared impossible")] if declared else []
    if isinstance(error, ConfigurationError):
        spelled = {name: (name, family.config_names.get(name, name)) for name in COMMON}
        named = [name for name in COMMON if any(word in str(error) for word in spelled[name])]
        crossing = [name for name in family.crossing if name in str(error)]
        wrong = [Suspect("crossing", f"{name!r} has other dimensions in the layers") for name in crossing]
        return [*wrong, *misread(family, model.config, named)]
    if not isinstance(error, TensorMismatchError):
        return list(misnamed(family, model))
    # Wrong names cause wrong placements, too.
    suspects = [*misnamed(family, model), *misread(family, model.config, READ_FOR_TIES)]
    # Only misplaced tensors that the error names.
    suspects = suspects or [
        suspect
        for problem, suspect in misplaced(family, model)
        if any(word in str(error) for word in problem.replace(",", " ").split() if "." in word)
    ]
    return suspects or [suspect for words, suspect in _MISFITS.items() if words in str(error)]


def misnamed(family: ModelFamily, model: Any) -> Iterator[Suspect]:
    """Compare the names of a family with the modules of the unsplit model."""
    seen = anatomy(model)
    if family.base != seen.base:
        yield Suspect("base", f"{type(model).__name__} has its base model in {seen.base!r}, not in {family.base!r}")
        return  # All other names are relative to it.
    if family.layers not in seen.layers:
        yield Suspect("layers", _instead(family.layers, seen.layers))
    else:
        yield from mixed(family, model)
    if family.embedding != seen.embedding:
        yield Suspect("embedding", _instead(family.embedding, [seen.embedding]))
    # A module after the norm yields the output of the base in its place.
    if family.norm and not {family.norm, *family.skip_outside_top} & set(seen.norms):
        yield Suspect("norm", _instead(family.norm, [name for name in seen.norms if name != family.layers][:1]))
    if family.head != seen.head:
        yield Suspect("head", _instead(family.head, [seen.head]))
    inlets: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
        "zero_outside_bottom": (family.zero_outside_bottom, seen.added),
        "skip_outside_bottom": (family.skip_outside_bottom, seen.passed),
    }
    inside = model.get_submodule(family.base)
    # An end may be a parameter of the base module itself.
    existing = {name for name, _ in (*inside.named_modules(), *inside.named_parameters(recurse=False))}
    for field, (declared, right) in inlets.items():
        for name in declared:
            if name not in existing:
                yield Suspect(field, _instead(name, right))
    both = set(family.zero_outside_bottom) & set(seen.passed), set(family.skip_outside_bottom) & set(seen.added)
    for field, names in zip(inlets, both, strict=True):
        for name in sorted(names):
            other = next(candidate for candidate in inlets if candidate != field)
            yield Suspect(field, f"{name!r} belongs in {other}")


def _instead(declared: str, right: Iterable[str]) -> str:
    names = [name for name in right if name]
    return f"{declared!r} is not it; " + (f"it is {' or '.join(map(repr, names))}" if names else "there is none")


def undeclared_inlets(family: ModelFamily, model: Any) -> Iterator[Suspect]:
    """Return the modules that change states before the first layer and are not declared to run only in the bottom."""
    seen = anatomy(model)
    added = [name for name in seen.added if name not in family.zero_outside_bottom]
    passed = [name for name in seen.passed if name not in family.skip_outside_bottom]
    if added:
        yield Suspect("zero_outside_bottom", f"added again: {', '.join(added)}")
    if passed:
        yield Suspect("skip_outside_bottom", f"states pass through again: {', '.join(passed)}")


def mixed(family: ModelFamily, model: Any) -> Iterator[Suspect]:
    """Compare ``uniform_layers`` with the layers of the model."""
    if not family.uniform_layers:
        return
    layers = model.get_submodule(family.base).get_submodule(family.layers)
    classes = sorted({type(layer).__name__ for layer in layers})
    if len(classes) > 1:
        yield Suspect("uniform_layers", f"set False: the layers are of several classes, {', '.join(classes)}")
        return
    for number, layer in enumerate(layers):
        try:
            with torch.device("meta"):
                made = type(layers[0])(decoder_config(family, model.config), number)
        # A constructor with other arguments may raise any exception.
        except Exception as error:  # noqa: BLE001
            yield Suspect("uniform_layers", f"set False: {classes[0]}(config, {number}) fails: {error}")
            return
        if _shapes(made) != _shapes(layer):
            yield Suspect("uniform_layers", f"set False: {classes[0]}(config, {number}) differs from the model's layer")
            return


def _shapes(module: Any) -> dict[str, Any]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def misconfigured(family: ModelFamily, model: Any) -> Iterator[Suspect]:
    """Compare the values that a family reads from ``config.json`` with those of transformers."""
    # As in a file: plain values, by the names of the configuration class.
    written = json.loads(model.config.to_json_string(use_diff=False))
    own_names = type(decoder_config(family, model.config)).attribute_map
    for name in COMMON:
        right = _value_of(family, model.config, name)
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
    """Compare the values that a plan of a model reads, stated or filled in, with those of transformers.

    Args:
        family: The family.
        config: The model's configuration.
        names: The values that matter.
    """
    # As in a file: values that equal the defaults of transformers are left out.
    written = json.loads(config.to_json_string())
    stated = family.decoder_values(written)
    for name in names:
        right, read = _value_of(family, config, name), effective(family, written, name)
        if right is not None and read != right:
            own = type(decoder_config(family, config)).attribute_map.get(name, name)
            if own in stated and family.config_names.get(name, name) != own:
                yield Suspect(f"config_names[{name!r}]", f"config.json calls it {own!r}")
            elif own in stated and name in family.config_names:
                yield Suspect(f"config_names[{name!r}]", f"{read!r} is read where transformers has {right!r}")
            else:
                yield Suspect(f"config_defaults[{name!r}]", f"{read!r} is read where transformers has {right!r}")


def _value_of(family: ModelFamily, config: Any, name: str) -> Any:
    """Return a value of a configuration; that heads are tied is said by the whole of a composite model."""
    owner = config if name == "tie_word_embeddings" else decoder_config(family, config)
    return _stated(owner, name)


def _stated(config: Any, name: str) -> Any:
    """Return a value of a configuration; None if it has none, or layers differ in it, so that a plan measures."""
    try:
        return getattr(config, name, None)
    # Of a class that only newer versions of transformers have.
    except RuntimeError:
        return None


def wrong_defaults(family: ModelFamily) -> Iterator[Suspect]:
    """Compare the defaults of a family with those of transformers."""
    hf_class: Any = architecture_class(family)
    defaults = hf_class.config_class()
    if family.text_config:
        # A file that says little of the decoder has the defaults of the decoder's own class.
        tied, defaults = defaults.tie_word_embeddings, type(decoder_config(family, defaults))()
        defaults.tie_word_embeddings = tied
    for name, value in family.config_defaults.items():
        right = _stated(defaults, name)
        # None in a configuration means that core's own rule applies.
        if right is not None and value != right:
            yield Suspect(f"config_defaults[{name!r}]", f"transformers fills in {right!r}, not {value!r}")
    known = {name: _stated(defaults, name) for name in ("hidden_size", "num_attention_heads")}
    # A plan that measures the cache does not read its sizes.
    of_the_cache = () if family.measured_cache else ("num_key_value_heads", "head_dim")
    for name in (*of_the_cache, "tie_word_embeddings"):
        right = _stated(defaults, name)
        if name not in family.config_defaults and right is not None and effective(family, known, name) != right:
            yield Suspect(f"config_defaults[{name!r}]", f"transformers fills in {right!r} if config.json omits it")


def effective(family: ModelFamily, config: Mapping[str, Any], name: str) -> Any:
    """Return a value as a plan uses it: the stated one, the family's default, or core's own rule."""
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
    """Return the tensors of a checkpoint that are not mapped to a tensor of a component, with the reason.

    Args:
        family: The family.
        model: The unsplit model.
        keys: The keys of the checkpoint; by default those that the model itself would write.
    """
    expected = set(model.state_dict())
    written = json.loads(model.config.to_json_string(use_diff=False))
    names = sorted(expected if keys is None else keys)
    mapping = {key: _names_of(target) for key, target in key_targets(family, written, names).items()}
    targets = {name for names in mapping.values() for name in names}
    dropped = {key for key, names in mapping.items() if not names}
    table = "transformers_tables" if family.transformers_tables else "renamed"
    mapper = _MAP_HOOK if "splitlearn_map_weight_keys" in registry().plugin(family.model_type).hooks else table
    problems = []
    for key, made in mapping.items():
        if not made and key in expected:
            by_suffix = mapper == "renamed" and key.endswith(family.ignored_suffixes)
            suspect = Suspect("ignored_suffixes" if by_suffix else mapper, "it drops a tensor")
            problems.append((f"{key} is left out, but the model needs it", suspect))
    for key, made in mapping.items():
        for target in sorted(set(made) - expected):
            text = f"{key} becomes {target}, which the model does not have"
            problems.append((text, Suspect(mapper, "its new name is a name of the module tree")))
    optional = _tied_names(model)
    problems += [
        (f"no tensor of the checkpoint becomes {name}", Suspect(mapper, "every parameter needs a tensor"))
        for name in sorted(expected - targets - optional - dropped)
    ]
    return [*problems, *_unplaced(family, model, sorted(expected & targets))]


def _names_of(target: KeyTarget) -> tuple[str, ...]:
    """Return the module keys of what a key of a checkpoint becomes, or becomes a part of."""
    if isinstance(target, WeightConversion):
        return target.targets
    return () if target is None else (target,)


def _tied_names(model: Any) -> set[str]:
    """Return the names of tensors that have several: a checkpoint may leave out all but one of each."""
    names: dict[int, list[str]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(tensor), []).append(name)
    return {name for same in names.values() if len(same) > 1 for name in same}


def _unplaced(family: ModelFamily, model: Any, names: list[str]) -> Iterator[tuple[str, Suspect]]:
    """Yield the tensors that no component holds."""
    layers = decoder_config(family, model.config).num_hidden_layers
    third = max(layers // 3, 1)
    component_of, parts = placement(family, layers_between((third, 2 * third), layers)), anatomy(model)
    for name in names:
        if component_of(name) is None:
            yield f"no component holds {name}", _inlet_of(name.removeprefix(f"{family.base}."), parts)


def _inlet_of(name: str, parts: Anatomy) -> Suspect:
    for field, modules, effect in (
        ("zero_outside_bottom", parts.added, "is added to the embeddings"),
        ("skip_outside_bottom", parts.passed, "lets the state through before the first layer"),
    ):
        for module in modules:
            if name.startswith(f"{module}."):
                return Suspect(field, f"{module!r} {effect}, outside bottom too, unless it is named here")
    return Suspect("layers, norm, head, zero_outside_bottom or skip_outside_bottom", f"none of them holds {name!r}")
