"""Adapters on layers that run elsewhere: described by their owner, checked and built at the host.

What crosses is JSON and tensors. A description has the kind, the settings that change a forward, and the adapted
modules by name; any other setting of PEFT is refused by name, at both ends.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from splitlearn_core.adapters.adapter_files import HARMLESS_INITIALISATIONS
from splitlearn_core.adapters.peft_models import import_peft
from splitlearn_core.errors import ConfigurationError, RemoteStepError
from splitlearn_core.hosts.holes import CONFIGURED_RATE, holes_in, ineffective_changes
from splitlearn_core.quoting import listed, quote, said

#: Kind -> the settings that change a forward, with their default values.
_SETTINGS: dict[str, dict[str, Any]] = {
    "LORA": {"lora_dropout": 0.0, "fan_in_fan_out": False, "lora_bias": False},
    "IA3": {"fan_in_fan_out": False},
    "LOHA": {"rank_dropout": 0.0, "module_dropout": 0.0, "use_effective_conv2d": False},
    "LOKR": {
        "rank_dropout": 0.0,
        "module_dropout": 0.0,
        "use_effective_conv2d": False,
        "decompose_both": False,
        "decompose_factor": -1,
        "rank_dropout_scale": False,
    },
}  # fmt: skip
#: Settings that say which modules are adapted, how adapters are initialised, and their names: the modules exist.
_SETTLED = frozenset({
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "rank_pattern",
    "alpha_pattern", "r", "alpha", "lora_alpha", "use_rslora", "feedforward_modules", "trainable_token_indices",
    "ensure_weight_tying",
})  # fmt: skip
#: Settings with which an adapter begins from the weights of the model, or changes them.
_BEGINNINGS = ("init_lora_weights", "init_weights", "init_ia3_weights")
_WHY = {
    "use_dora": "DoRA needs the norms of the weights",
    "bias": "it trains biases of the model itself",
    "loftq_config": "LoftQ changes the weights of the model",
    "alora_invocation_tokens": "it looks at token ids, which are not sent",
    "target_parameters": "it adapts parameters, not modules",
    "layer_replication": "it renumbers layers",
}
_MAX_RANK, _MAX_NAME, _MAX_ADAPTERS, _MAX_SCALING = 65_536, 256, 16, 1e6
_ADAPTER_NAME = re.compile(r"[^.]{1,64}")


@dataclass(frozen=True, slots=True)
class Tuning:
    """The adapters that are active on layers that run elsewhere."""

    #: Values of JSON; see :func:`build_adapted`.
    description: Mapping[str, Any]
    #: Their parameters, by name in the whole model.
    parameters: Mapping[str, torch.Tensor]


def refuse_unfit(configs: Mapping[str, Any], where: str) -> None:
    """Refuse PEFT configurations whose adapters cannot be trained on layers that run elsewhere.

    Raises:
        ConfigurationError: With the reason for each setting.
    """
    problems = [f"{name}: {problem}" for name, config in configs.items() for problem in _config_problems(config)]
    if problems:
        raise ConfigurationError(
            f"these adapters cannot work with layers at {where}, whose weights are not here: {'; '.join(problems)}",
            hint="LoRA, IA3, LoHa and LoKr with their plain settings can; or load the trunk here",
        )


def _config_problems(config: Any) -> Iterator[str]:
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in _SETTINGS:
        yield f"{kind} is not one of {', '.join(_SETTINGS)}"
        return
    values, usual = config.to_dict(), type(config)().to_dict()
    for name, value in values.items():
        if name in _BEGINNINGS:
            if value not in HARMLESS_INITIALISATIONS:
                yield f"{name}={quote(value)} changes, or looks at, the weights of the model"
        elif name not in _SETTLED and name not in _SETTINGS[kind] and value != usual.get(name):
            yield f"{name}={quote(value)}" + (f": {_WHY[name]}" if name in _WHY else " is not known here")


def refuse_ineffective(layers: nn.ModuleDict, prefix: str, where: str) -> None:
    """Refuse what was done to layers here that their host would know nothing of.

    Raises:
        ConfigurationError: It lists all of it.
    """
    problems = ineffective_changes(layers, prefix, _adapter_classes())
    if problems:
        raise ConfigurationError(
            f"layers that run at {where} were changed here, which would have no effect: {listed(problems, most=5)}",
            hint="of those layers only adapters can be changed here (a hook may come from adapter_names= of PEFT); "
            "load the trunk here for the rest",
        )


def has_adapter(layers: nn.Module, name: str) -> bool:
    """Return whether PEFT has put modules of an adapter there."""
    return any(name in layer._get_available_adapters() for _, layer in _adapted_modules(layers))  # noqa: SLF001  # as below


def _adapter_classes() -> tuple[type[Any], ...]:
    if "peft" not in sys.modules:
        return ()
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    return BaseTunerLayer, ModulesToSaveWrapper


def _adapted_modules(layers: nn.Module) -> Iterator[tuple[str, Any]]:
    if "peft" not in sys.modules:
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, layer in layers.named_modules():
        if isinstance(layer, BaseTunerLayer):
            yield path, layer


def tuning_of(
    layers: nn.ModuleDict, prefix: str, configs: Mapping[str, Any], where: str, *, training: bool
) -> Tuning | None:
    """Describe the changes to make at a host: active adapters and dropout rates; None if there are none.

    Args:
        layers: The layers.
        prefix: What comes before their names in the whole model.
        configs: PEFT's configurations, by the name of the adapter.
        where: The address of the host.
        training: Whether dropout is active.

    Raises:
        ConfigurationError: Something there would be trained, or was changed, that is not here.
    """
    refuse_ineffective(layers, prefix, where)
    if torch.is_grad_enabled():
        _refuse_changed(layers, prefix, where)
    active: list[str] = []
    targets: dict[str, dict[str, Any]] = {}
    parameters: dict[str, torch.Tensor] = {}
    for path, layer in _adapted_modules(layers):
        if layer.disable_adapters:
            continue
        names = [name for name in layer.active_adapters if name in layer._get_available_adapters()]  # noqa: SLF001  # PEFT has no other way to ask
        for name in names:
            targets.setdefault(name, {})[prefix + path] = _target_of(layer, name)
        active += [name for name in layer.active_adapters if name in names and name not in active]
        parameters.update({
            f"{prefix}{path}.{name}": parameter
            for name, parameter in layer.named_parameters()
            if not name.startswith("base_layer.") and not _is_apart(name, names)
        })  # fmt: skip
    rates = {prefix + path: rate for path, rate in _changed_rates(layers, active, configs)} if training else {}
    if not active and not rates:
        return None
    unknown = [name for name in active if name not in configs]
    if unknown:
        raise ConfigurationError(
            f"nothing is known of the adapter {', '.join(unknown)} on the layers at {where}",
            hint="give the SplitCausalLM itself to get_peft_model, PeftModel.from_pretrained or add_adapter",
        )
    refuse_unfit({name: configs[name] for name in active}, where)
    adapters = {}
    for name in active:
        kind = str(getattr(configs[name].peft_type, "value", configs[name].peft_type))
        settings = {setting: getattr(configs[name], setting, usual) for setting, usual in _SETTINGS[kind].items()}
        adapters[name] = {"kind": kind, "settings": settings, "targets": targets[name]}
    return Tuning({"active": active, "adapters": adapters, "rates": rates}, parameters)


def _changed_rates(layers: nn.Module, active: list[str], configs: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield modules of dropout whose rate was changed after they were made: trainers of preferences set it to 0."""
    for path, module in layers.named_modules():
        if not isinstance(module, nn.Dropout):
            continue
        adapter = path.rpartition(".")[2]
        is_known = CONFIGURED_RATE in vars(module) or adapter in active
        made_with = vars(module).get(CONFIGURED_RATE, getattr(configs.get(adapter), "lora_dropout", None))
        if is_known and module.p != made_with:
            yield path, module.p


def _is_apart(path: str, names: list[str]) -> bool:
    """Return whether a parameter of a PEFT layer belongs to none of these adapters."""
    return not set(path.split(".")).intersection(names)


def _refuse_changed(layers: nn.Module, prefix: str, where: str) -> None:
    names = {id(module): path for path, module in layers.named_modules()}
    for owner, name, hole in holes_in(layers):
        if hole.requires_grad or hole.has_values:
            what = "would be trained" if hole.requires_grad else "was given values"
            raise ConfigurationError(
                f"{prefix}{names[id(owner)]}.{name} {what}, and its values are at {where}",
                hint="only adapters of the layers there are trained, merged or changed here; "
                "leave the model's own parameters frozen",
            )


def _target_of(layer: Any, name: str) -> dict[str, Any]:
    """Return what PEFT derived for one module from the settings and their patterns."""
    target: dict[str, Any] = {}
    ranks, scalings = getattr(layer, "r", None), getattr(layer, "scaling", None)
    if isinstance(ranks, Mapping) and name in ranks:
        target["r"] = ranks[name]
    if isinstance(scalings, Mapping) and name in scalings:
        target["scaling"] = float(scalings[name])
    if hasattr(layer, "is_feedforward"):
        target["feedforward"] = bool(layer.is_feedforward)
    return target


def content_hash(description: Mapping[str, Any] | None, tensors: Mapping[str, torch.Tensor]) -> str:
    """Hash a description, or tensors with their names, dtypes and shapes."""
    digest = hashlib.sha256()
    if description is not None:
        digest.update(json.dumps(description, sort_keys=True).encode())
    for name, tensor in tensors.items():
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        flat: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(memoryview(flat))
    return digest.hexdigest()


# --- at the host ------------------------------------------------------------------------------------------


def frozen_copy(component: nn.Module) -> Any:
    """Return a component of its own modules with the same weights, which are frozen there."""
    shared: dict[int, Any] = {
        id(parameter): nn.Parameter(parameter.detach(), requires_grad=False) for parameter in component.parameters()
    }
    shared.update({id(buffer): buffer for buffer in component.buffers()})
    return copy.deepcopy(component, shared)


def build_adapted(component: nn.Module, description: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Put the modules of adapters into a copy of a component that shares its weights.

    Args:
        component: The component, which stays as it is.
        description: ``active``, the adapters in order; ``adapters``: for each its ``kind``, ``settings``, and the
            adapted modules as ``targets`` with their rank and scaling; and ``rates`` of dropout by module.

    Returns:
        The copy, and its parameters that need values: name -> a tensor without memory.

    Raises:
        RemoteStepError: It is not a description, or does not fit the component.
    """
    adapters, active, rates = _checked(description)
    try:
        # A host without adapters needs no PEFT.
        peft = import_peft() if adapters else None
    except ConfigurationError as error:
        raise RemoteStepError(
            f"this host cannot apply adapters: {error.message}", hint=error.hint, code="no_peft"
        ) from error
    made = frozen_copy(component)
    names = set(dict(made.named_parameters()))
    if adapters and any(True for _ in _adapted_modules(made)):
        raise RemoteStepError("the trunk has an adapter at its host already", code="bad_input", hint="use one of them")
    modules = dict(made.named_modules())
    foreign = [name for adapter in adapters.values() for name in adapter["targets"] if name not in modules]
    if foreign:
        raise _unfit([f"there is no {name}" for name in foreign])
    try:
        for name, adapter in adapters.items():
            _inject(peft, made, name, adapter)
    except Exception as error:
        raise RemoteStepError(f"PEFT cannot build the adapter: {said(error)}", code="bad_input") from error
    for path, layer in _adapted_modules(made):
        layer.set_adapter(active)
        for name, adapter in adapters.items():
            scaling = adapter["targets"].get(path, {}).get("scaling")
            if scaling is not None:
                layer.scaling[name] = scaling
    present = dict(made.named_modules())
    for path, rate in rates.items():
        dropout = present.get(path)
        if not isinstance(dropout, nn.Dropout):
            raise _unfit([f"there is no dropout {path}"])
        dropout.p = rate
    added = {name: parameter for name, parameter in made.named_parameters() if parameter.is_meta}
    if names - {name.replace(".base_layer.", ".") for name, _ in made.named_parameters()}:
        raise RemoteStepError("PEFT replaced weights of the trunk", code="bad_input")
    return made.requires_grad_(False), added


def _inject(peft: Any, module: nn.Module, name: str, adapter: Mapping[str, Any]) -> None:
    kind, targets = adapter["kind"], adapter["targets"]
    arguments = {**adapter["settings"], "target_modules": list(targets)}
    if kind == "IA3":
        arguments["feedforward_modules"] = [path for path, target in targets.items() if target.get("feedforward")]
    else:
        by_rank: dict[int, list[str]] = {}
        for path, target in targets.items():
            by_rank.setdefault(target["r"], []).append(re.escape(path))
        arguments["r"] = next(iter(by_rank))
        arguments["rank_pattern"] = {"|".join(paths): rank for rank, paths in by_rank.items()}
    classes = {"LORA": "LoraConfig", "IA3": "IA3Config", "LOHA": "LoHaConfig", "LOKR": "LoKrConfig"}
    config = getattr(peft, classes[kind])(**arguments)
    peft.inject_adapter_in_model(config, module, name, low_cpu_mem_usage=True)


def fit_tensors(
    added: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], device: torch.device
) -> dict[str, torch.Tensor]:
    """Compare tensors with the parameters that need values, and return them on a device.

    Raises:
        RemoteStepError: Some are missing, unknown, or of another shape; all are listed.
    """
    problems = [f"missing: {name}" for name in added if name not in tensors]
    problems += [f"unexpected: {name}" for name in tensors if name not in added]
    problems += [
        f"{name} is {list(tensor.shape)}, and {list(added[name].shape)} is needed"
        for name, tensor in tensors.items()
        if name in added and tensor.shape != added[name].shape
    ]
    problems += [f"{name} is {tensor.dtype}" for name, tensor in tensors.items() if not tensor.is_floating_point()]
    if problems:
        raise _unfit(problems)
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _unfit(problems: list[str]) -> RemoteStepError:
    return RemoteStepError(
        f"the adapter is not one of this trunk: {listed(problems, most=5)}",
        code="bad_input",
        hint="was it made for this model, and these split points?",
    )


def _checked(description: Any) -> tuple[dict[str, Any], list[str], dict[str, float]]:
    """Check a description, value for value."""
    given = description if isinstance(description, dict) else {}
    adapters, active, rates = given.get("adapters"), given.get("active"), given.get("rates")
    problems = []
    if (
        not isinstance(adapters, dict)
        or len(adapters) > _MAX_ADAPTERS
        or not isinstance(active, list)
        or not isinstance(rates, dict)
    ):
        problems.append("it lists no adapters, or too many")
    elif not all(isinstance(rate, int | float) and 0 <= rate <= 1 for rate in rates.values()):
        problems.append("a rate of dropout is none")
    elif sorted(adapters) != sorted(map(str, active)) or not all(map(_ADAPTER_NAME.fullmatch, adapters)):
        problems.append("the active adapters are not those that it lists")
    else:
        problems += [
            f"{name}: {problem}" for name, adapter in adapters.items() for problem in _adapter_problems(adapter)
        ]
    if problems:
        raise RemoteStepError(
            f"this is not a valid description of adapters: {listed(problems, most=5)}",
            code="bad_input",
            hint="install the same version of splitlearn-core on both sides",
        )
    return cast("dict[str, Any]", adapters), cast("list[str]", active), cast("dict[str, float]", rates)


def _adapter_problems(adapter: Any) -> Iterator[str]:
    given = adapter if isinstance(adapter, dict) else {}
    kind, settings, targets = given.get("kind"), given.get("settings"), given.get("targets")
    if kind not in _SETTINGS or not isinstance(settings, dict) or not isinstance(targets, dict) or not targets:
        yield f"its kind is {quote(kind)}; there are {', '.join(_SETTINGS)}, each with settings and targets"
        return
    for name, value in settings.items():
        usual = _SETTINGS[kind].get(name)
        is_rate = isinstance(usual, float)
        if usual is None or type(value) not in ((int, float) if is_rate else (type(usual),)):
            yield f"{quote(name)} is {quote(value)}"
        elif is_rate and not 0 <= value < 1:
            yield f"{name} is {quote(value)}, no rate"
    for path, target in targets.items():
        if not isinstance(target, dict) or len(path) > _MAX_NAME or not _is_target(kind, target):
            yield f"{quote(path)} has {quote(target)}"


def _is_target(kind: str, target: Mapping[str, Any]) -> bool:
    if kind == "IA3":
        return target.keys() == {"feedforward"} and isinstance(target["feedforward"], bool)
    rank, scaling = target.get("r"), target.get("scaling")
    return (
        target.keys() == {"r", "scaling"}
        and type(rank) is int
        and 0 < rank <= _MAX_RANK
        and isinstance(scaling, int | float)
        and math.isfinite(scaling)
        and abs(scaling) <= _MAX_SCALING
    )
