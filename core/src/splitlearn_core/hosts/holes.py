"""Layers that run elsewhere, as modules of the family: true names, shapes, dtypes and devices, without values.

PEFT finds them as it finds the layers of the unsplit model, and puts its own modules there, which are ordinary modules
with parameters of their own.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn

from splitlearn_core.build.construction import build_component
from splitlearn_core.errors import ConfigurationError
from splitlearn_core.family import ModelFamily
from splitlearn_core.types import LayerRange

#: Where a module of dropout keeps its rate by the configuration, which is that of its host.
CONFIGURED_RATE = "_splitlearn_configured_rate"
#: What marks a module that runs elsewhere; and where all of them keep how many they are.
_MARK, _COUNT = "_splitlearn_elsewhere", "_splitlearn_count"
#: Where a module keeps its parameters without values while values are loaded into it.
_SET_ASIDE = "_splitlearn_set_aside"


class HoleParameter(nn.Parameter):
    """A frozen parameter without values: one element, which is expanded to the shape."""

    def __new__(cls, element: torch.Tensor, shape: torch.Size) -> Self:
        return super().__new__(cls, element.detach().expand(shape), requires_grad=False)

    @property
    def element(self) -> torch.Tensor:
        """The one element."""
        return self.detach()[(0,) * self.dim()]

    @property
    def has_values(self) -> bool:
        """Whether values were written to it, which are not those of the host."""
        return any(self.stride())

    def __deepcopy__(self, memo: dict[int, Any]) -> HoleParameter:
        # A parameter copies itself with memory for each of its elements.
        other = HoleParameter(self.element.clone(), self.shape)
        memo[id(self)] = other
        return other


class RemoteLayer(nn.Module):
    """Stands for a layer that runs elsewhere, where nothing is known of its modules."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url

    def extra_repr(self) -> str:
        return f"at {self.url}"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: a layer is not called by itself."""
        _Refusal(self.url)()


class _Refusal:
    """The forward of a layer that runs elsewhere."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise ConfigurationError(
            f"this layer runs at {self.url}, as a part of a component", hint="call the component, or the whole model"
        )


def layers_without_values(
    family: ModelFamily, config: Any, component: str, owned: LayerRange, dtype: torch.dtype, url: str
) -> nn.ModuleDict:
    """Build the layers of a component that runs elsewhere, by their number in the whole model.

    Args:
        family: The model's family.
        config: The configuration of the whole model; it is not changed.
        component, owned: The component's name, and the layers that it runs.
        dtype: That of its parameters.
        url: Where it runs.
    """
    own = copy.deepcopy(config)
    own.dtype = dtype
    built = build_component(family, own, component, owned)
    layers = nn.ModuleDict({str(number): built.layer_modules[number] for number in range(owned.start, owned.end)})
    modules: list[Any] = [module for layer in layers.values() for module in layer.modules()]
    for module in modules:
        for name, parameter in module._parameters.items():  # noqa: SLF001  # the register that nn.Module documents
            if parameter is not None:
                element = torch.zeros((), dtype=parameter.dtype)
                module._parameters[name] = HoleParameter(element, parameter.shape)  # noqa: SLF001  # as above
        if isinstance(module, nn.Dropout):
            vars(module)[CONFIGURED_RATE] = module.p
        # Computed from the configuration, and used by the forward alone.
        module._buffers.update(dict.fromkeys(module._buffers))  # noqa: SLF001  # as above
        module.register_state_dict_post_hook(_leave_out)
        module.register_load_state_dict_pre_hook(_set_aside)
        module.register_load_state_dict_post_hook(_put_back)
        vars(module)[_MARK] = True
    vars(layers)[_COUNT] = len(modules)
    for layer in layers.values():
        vars(layer).update(forward=_Refusal(url), extra_repr=functools.partial(str, f"at {url}"))
    return layers


def ineffective_changes(layers: nn.ModuleDict, prefix: str, adapters: tuple[type[Any], ...]) -> list[str]:
    """Return what was done to modules here that their host would know nothing of: hooks, other modules in their place.

    Args:
        layers: What :func:`layers_without_values` has returned.
        prefix: What comes before their names in the whole model.
        adapters: Classes of modules that may be around others, and hold modules of their own.
    """
    problems: list[str] = []
    found = 0
    # A stack, and no generators: it is looked at in each call.
    left: list[tuple[str, nn.Module, bool]] = [("", layers, True)]
    while left:
        path, module, is_known = left.pop()
        values: dict[str, Any] = vars(module)
        is_own = _MARK in values
        found += is_own
        is_known = is_known or isinstance(module, adapters)
        if not is_own and not is_known:
            problems.append(f"{prefix}{path}: {type(module).__name__} was put there")
        if values["_forward_hooks"] or values["_forward_pre_hooks"] or values["_backward_hooks"]:
            problems.append(f"{prefix}{path} has a hook")
        left += [
            (f"{path}.{name}" if path else name, child, is_known and not is_own and module is not layers)
            for name, child in values["_modules"].items()
            if child is not None
        ]
    missing = vars(layers)[_COUNT] - found
    if missing > 0:
        problems.append(f"{missing} modules are not there any more")
    return problems


def holes_in(module: nn.Module) -> list[tuple[nn.Module, str, HoleParameter]]:
    """Return the parameters without values in a module, each with its owner and its name there."""
    return [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()  # noqa: SLF001  # the register that nn.Module documents
        if isinstance(parameter, HoleParameter)
    ]


def apply_around_holes(
    module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor], rest: Callable[[], Any]
) -> None:
    """Move or cast a module without giving memory to its parameters without values.

    Args:
        module: The module.
        change: What is done to each tensor; to one element of those without values.
        rest: Does it to all others.
    """
    holes = holes_in(module)
    for owner, name, _ in holes:
        owner._parameters[name] = None  # noqa: SLF001  # the register that nn.Module documents
    try:
        rest()
    finally:
        for owner, name, hole in holes:
            owner._parameters[name] = hole  # noqa: SLF001  # as above
    for owner, name, hole in holes:
        owner._parameters[name] = HoleParameter(change(hole.element), hole.shape)  # noqa: SLF001  # as above


def _leave_out(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Leave parameters without values out of a state dict: who saves it would write their whole size."""
    for name, parameter in module._parameters.items():  # noqa: SLF001  # the register that nn.Module documents
        if isinstance(parameter, HoleParameter):
            state_dict.pop(prefix + name, None)


def _set_aside(module: nn.Module, *_: Any) -> None:
    """Neither miss nor overwrite them where values are loaded."""
    own = {name: value for name, value in module._parameters.items() if isinstance(value, HoleParameter)}  # noqa: SLF001  # as above
    vars(module)[_SET_ASIDE] = own
    module._parameters.update(dict.fromkeys(own))  # noqa: SLF001  # as above


def _put_back(module: nn.Module, *_: Any) -> None:
    module._parameters.update(vars(module).pop(_SET_ASIDE, {}))  # noqa: SLF001  # as above
