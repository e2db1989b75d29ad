"""What an adapter of a whole model is made of, and which component each of its tensors belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from splitlearn_core.family import ModelFamily
from splitlearn_core.plan.keys import placement
from splitlearn_core.plan.split_points import ranges_around
from splitlearn_core.quoting import plain, quote
from splitlearn_core.types import Component, LayerRange, TensorInfo, kind_of

#: What PEFT writes before the name of a module of the whole model.
PREFIX = "base_model.model."
#: Kinds of adapters whose tensors each belong to one module, so that layers can be told apart, and how
#: the names of these tensors begin within a module.
KINDS = {"IA3": "ia3_", "LOHA": "hada_", "LOKR": "lokr_", "LORA": "lora_"}

#: Ways to begin an adapter that leave the weights of the model as they are.
_HARMLESS_BEGINNINGS = (None, True, False, "gaussian", "orthogonal")
#: Settings that do not go by module and layer, each with the reason.
_REFUSED = {
    "alora_invocation_tokens": "it looks at token ids, which only the bottom sees",
    "ensure_weight_tying": "it ties modules of different components",
    "layer_replication": "it renumbers layers",
    "megatron_config": "it is for Megatron's parallel layers",
    "target_parameters": "it adapts parameters, not modules",
    "trainable_token_indices": "it changes single rows of the embedding, which a tied head would have to follow",
}


@dataclass(frozen=True, slots=True)
class AdapterSlice:
    """What one component takes of an adapter."""

    component: str
    #: Keys of the adapter's file.
    keys: tuple[str, ...]
    #: Those of them that are the model's own embedding or head, saved beside what adapts it.
    base_keys: tuple[str, ...]
    #: Modules that the adapter replaces as a whole, of those that are here, by their full names.
    modules_to_save: tuple[str, ...]
    #: Modules that the adapter adapts, of those that are here, by their full names.
    targets: tuple[str, ...]


def config_problems(config: Mapping[str, Any]) -> list[str]:
    """Say why an adapter of this configuration cannot be cut by layers; empty where it can."""
    problems = []
    kind, task = config.get("peft_type"), config.get("task_type")
    if not isinstance(kind, str) or kind not in KINDS:
        problems.append(f"peft_type is {quote(kind)}, and its tensors do not go by module; {', '.join(KINDS)} are cut")
    if task not in (None, "CAUSAL_LM"):
        problems.append(f"task_type is {quote(task)}, not CAUSAL_LM")
    problems += [f"{name}: {why}" for name, why in _REFUSED.items() if config.get(name)]
    beginning = config.get("init_lora_weights")
    if beginning not in _HARMLESS_BEGINNINGS:
        problems.append(f"init_lora_weights is {quote(beginning)}, which changes the model's own weights too")
    saved = config.get("modules_to_save")
    if saved is not None and not (isinstance(saved, list) and all(isinstance(name, str) and name for name in saved)):
        problems.append(f"modules_to_save is {quote(saved)}, no list of names")
    return problems


def rank_problems(config: Mapping[str, Any], infos: Iterable[TensorInfo]) -> list[str]:
    """Say which ranks of a LoRA adapter none of its tensors has: PEFT would make matrices of that size first."""
    if config.get("peft_type") != "LORA":
        return []
    largest = max((size for info in infos for size in info.shape), default=0)
    pattern = config.get("rank_pattern")
    ranks = {"r": config.get("r"), **(pattern if isinstance(pattern, Mapping) else {})}
    return [
        f"the rank {quote(rank)} of {plain(name)}, and no tensor has a dimension over {largest:,}"
        for name, rank in ranks.items()
        if rank is not None and not (type(rank) is int and rank <= largest)
    ]


def key_problems(keys: Iterable[str], config: Mapping[str, Any], family: ModelFamily, owned: LayerRange) -> list[str]:
    """Say which tensors of an adapter have no place in a model of this family and depth."""
    component_of = placement(family, ranges_around(Component.TRUNK, owned))
    names = list(keys)
    replaced = {_saved(key, config) for key in names}
    problems = [
        f"unexpected: {key}"
        for key in names
        if not key.startswith(PREFIX) or component_of(key.removeprefix(PREFIX)) is None
    ]
    absent = [name for name in config.get("modules_to_save") or () if not any(path.endswith(name) for path in replaced)]
    return problems + [f"missing: every tensor of {module}, of modules_to_save" for module in absent]


def slice_keys(
    keys: Iterable[str], config: Mapping[str, Any], family: ModelFamily, component: str, owned: LayerRange
) -> AdapterSlice:
    """Pick the tensors of one component, by the layer numbers of the whole model."""
    component_of = placement(family, ranges_around(component, owned))
    kind = kind_of(component)
    own = sorted(key for key in keys if component_of(key.removeprefix(PREFIX)) == kind)
    saved = dict.fromkeys(filter(None, (_saved(key, config) for key in own)))
    base = tuple(key for key in own if key.endswith(".base_layer.weight"))
    targets = dict.fromkeys(filter(None, (_target(key, config) for key in own)))
    return AdapterSlice(component, tuple(own), base, tuple(saved), tuple(targets))


def adapts_ends(keys: Iterable[str], config: Mapping[str, Any], family: ModelFamily) -> bool:
    """Say whether an adapter adapts, and does not replace, the embedding or the head."""
    ends = (f"{PREFIX}{family.base}.{family.embedding}.", f"{PREFIX}{family.head}.")
    return any(key.startswith(ends) and _target(key, config) for key in keys)


def adapted_modules(keys: Iterable[str], config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the modules of the whole model that an adapter has tensors to adapt with, by their full names."""
    return tuple(dict.fromkeys(filter(None, (_target(key, config) for key in sorted(keys)))))


def _target(key: str, config: Mapping[str, Any]) -> str:
    """Return the module that a tensor adapts; empty where it replaces one, or is a bias that learned along."""
    module, found, _ = key.removeprefix(PREFIX).partition(f".{KINDS[config['peft_type']]}")
    return module if found else ""


def _saved(key: str, config: Mapping[str, Any]) -> str:
    """Return the module that a tensor replaces a part of; empty where it adapts one.

    PEFT takes every module whose name ends so, with or without a dot before: ``norm`` is ``input_layernorm`` too.
    """
    ends = tuple(config.get("modules_to_save") or ())
    parts = [] if _target(key, config) else key.removeprefix(PREFIX).split(".")[:-1]
    paths = (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
    return next((path for path in paths if path.endswith(ends)), "")
