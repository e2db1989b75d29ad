"""Stand-ins for layers that run elsewhere: the family's modules, with names, shapes, dtypes and devices but no values.

PEFT finds them as it finds the layers of the unsplit model, and inserts its own modules, which are ordinary modules
with real parameters.
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

#: The attribute of a dropout module for its configured rate, which its host uses.
CONFIGURED_RATE = "_splitlearn_configured_rate"
#: The attribute that marks a module that runs elsewhere; and the attribute of all layers for the number of these.
_MARK, _COUNT = "_splitlearn_elsewhere", "_splitlearn_count"
#: The attribute of a module for its parameters without values while a state dict is loaded into it.
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
        """Whether values were written to it, which the host does not know."""
        return any(self.stride())

    def __deepcopy__(self, memo: dict[int, Any]) -> HoleParameter:
        # A plain parameter would allocate all of its elements.
        other = HoleParameter(self.element.clone(), self.shape)
        memo[id(self)] = other
        return other


class RemoteLayer(nn.Module):
    """Stands for a layer that runs elsewhere, if its modules are unknown."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url

    def extra_repr(self) -> str:
        return f"at {self.url}"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raise: a layer cannot be called on its own."""
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
        dtype: The dtype of its parameters.
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
        # Buffers are computed from the configuration, and only the forward uses them.
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
    """Describe changes of the stand-ins that have no effect at their host: hooks, and replaced modules.

    Args:
        layers: The result of :func:`layers_without_values`.
        prefix: The prefix of their names in the whole model.
        adapters: Classes of modules that may wrap others, and hold modules of their own.
    """
    problems: list[str] = []
    own_count = 0
    # An explicit stack instead of generators, because this runs in each call.
    stack: list[tuple[str, nn.Module, bool]] = [("", layers, True)]
    while stack:
        path, module, is_known = stack.pop()
        values: dict[str, Any] = vars(module)
        is_own = _MARK in values
        own_count += is_own
        is_known = is_known or isinstance(module, adapters)
        if not is_own and not is_known:
            problems.append(f"{prefix}{path}: {type(module).__name__} was put there")
        if values["_forward_hooks"] or values["_forward_pre_hooks"] or values["_backward_hooks"]:
            problems.append(f"{prefix}{path} has a hook")
        stack += [
            (f"{path}.{name}" if path else name, child, is_known and not is_own and module is not layers)
            for name, child in values["_modules"].items()
            if child is not None
        ]
    missing = vars(layers)[_COUNT] - own_count
    if missing > 0:
        problems.append(f"{missing} modules are not there any more")
    return problems


def holes_in(module: nn.Module) -> list[tuple[nn.Module, str, HoleParameter]]:
    """Return the parameters without values in a module, each with the module that holds it and its name."""
    return [
        (owner, name, parameter)
        for owner in module.modules()
        for name, parameter in owner._parameters.items()  # noqa: SLF001  # the register that nn.Module documents
        if isinstance(parameter, HoleParameter)
    ]


def apply_around_holes(
    module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor], rest: Callable[[], Any]
) -> None:
    """Move or cast a module without allocating its parameters without values.

    Args:
        module: The module.
        change: The function for each tensor; of a parameter without values it gets one element.
        rest: Applies the change to everything else.
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
    """Leave parameters without values out of a state dict: saving it would write their full size."""
    for name, parameter in module._parameters.items():  # noqa: SLF001  # the register that nn.Module documents
        if isinstance(parameter, HoleParameter):
            state_dict.pop(prefix + name, None)


def _set_aside(module: nn.Module, *_: Any) -> None:
    """Hide the parameters without values from ``load_state_dict``: they are neither missing nor overwritten."""
    own = {name: value for name, value in module._parameters.items() if isinstance(value, HoleParameter)}  # noqa: SLF001  # as above
    vars(module)[_SET_ASIDE] = own
    module._parameters.update(dict.fromkeys(own))  # noqa: SLF001  # as above


def _put_back(module: nn.Module, *_: Any) -> None:
    module._parameters.update(vars(module).pop(_SET_ASIDE, {}))  # noqa: SLF001  # as above
