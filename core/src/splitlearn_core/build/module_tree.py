"""The module tree of the unsplit model, over the modules that its components hold.

Everything that looks for a module or a parameter by name (PEFT, optimizers, state dicts, a trainer's checkpoint)
finds it where the unsplit model has it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import nn

from splitlearn_core.errors import ConfigurationError
from splitlearn_core.types import Component

_CLASSES: dict[tuple[Any, Any], Any] = {}


class LinkedModules(dict[str, Any]):
    """The children of a module, most of which are also children of a component's module.

    Replacing a linked child (with a wrapper of PEFT, or a resized embedding) replaces it in the component too, and
    a replacement in the component is visible here.

    Args:
        own: Children that only this module has. They cannot be replaced.
        links: Name of a child -> the module of a component that has it under the same name.
        order: The names of these children, in order.
        added: Further children, which may be replaced.
    """

    def __init__(
        self,
        own: Mapping[str, nn.Module],
        links: Mapping[str, nn.Module],
        order: Sequence[str],
        added: Mapping[str, nn.Module] = MappingProxyType({}),
    ) -> None:
        super().__init__({**{name: own.get(name) for name in order}, **added})
        self._links = links
        self._fixed = frozenset(own)

    def added(self) -> list[nn.Module]:
        """Return the children that were added later, for example by a subclass."""
        return [module for name, module in self.items() if name not in self._fixed and name not in self._links]

    def __reduce__(self) -> tuple[Any, ...]:
        own = {name: self[name] for name in self._fixed}
        added = {name: self[name] for name in self if name not in own and name not in self._links}
        order = [name for name in self if name not in added]
        return type(self), (own, dict(self._links), order, added)

    def __getitem__(self, name: str) -> Any:
        holder = self._links.get(name)
        return super().__getitem__(name) if holder is None else holder._modules[name]  # noqa: SLF001  # the register that nn.Module documents

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401  # it would call itself

    def items(self) -> Any:
        return {name: self[name] for name in self}.items()

    def values(self) -> Any:
        return {name: self[name] for name in self}.values()

    def copy(self) -> dict[str, Any]:
        return dict(self.items())

    def __setitem__(self, name: str, module: Any) -> None:
        if name in self._fixed:
            raise ConfigurationError(
                f"{name} of a split model cannot be replaced as a whole: its modules belong to the components",
                hint="replace the modules in it, or change the unsplit model before it is split",
            )
        holder = self._links.get(name)
        if holder is None:
            super().__setitem__(name, module)
        else:
            setattr(holder, name, module)

    def __delitem__(self, name: str) -> None:
        if name in self._fixed or name in self._links:
            raise ConfigurationError(
                f"{name} cannot be removed from a split model: a component runs it",
                hint="remove it from the unsplit model, save that, and split the result",
            )
        super().__delitem__(name)


def class_over(own: Any, family_class: Any) -> Any:
    """Return a class that derives from one of ours and one of the family's, and has the name of the family's.

    transformers and libraries that build on it decide by the names and attributes of a class, and by its module,
    which counts as remote code if it is not their own.
    """
    if (own, family_class) not in _CLASSES:
        attributes = {
            "__module__": family_class.__module__,
            "__qualname__": family_class.__qualname__,
            "__reduce_ex__": lambda self, _: (_instance, (own, family_class), self.__dict__),
            "family_class": family_class,
            "places": places_of(family_class),
        }
        # Two threads that come here at the same time get the same class.
        _CLASSES.setdefault((own, family_class), type(family_class.__name__, (own, family_class), attributes))
    return _CLASSES[own, family_class]


def places_of(family_class: Any) -> tuple[str, ...]:
    """Return the names of the positional arguments of the forward of a class, in order."""
    parameters = list(inspect.signature(family_class.forward).parameters.values())[1:]
    return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD)


def _instance(own: Any, family_class: Any) -> Any:
    """Make an instance without state, for pickle and copy."""
    return object.__new__(class_over(own, family_class))


def module_tree(parts: Mapping[str, Any], backbone: type[Any], attributes: Mapping[str, Any]) -> LinkedModules:
    """Make the children of the unsplit model's root from the components' modules.

    Args:
        parts: The components by name.
        backbone: A class with a forward over components, of which the family's base model becomes an instance.
        attributes: Attributes that it gets in addition to those of the family's base model.
    """
    bottom, top = parts[Component.BOTTOM], parts[Component.TOP]
    family = top.family
    layers = f"{family.base}.{family.layers}"
    outlets = {f"{family.base}.{name}" for name in family.outlets}
    elsewhere = {layers, *outlets, *(f"{family.base}.{name}" for name in family.inlets)}

    def children(path: str) -> LinkedModules:
        own: dict[str, nn.Module] = {}
        links: dict[str, nn.Module] = {}
        module = top.get_submodule(path)
        for name in module._modules:  # noqa: SLF001  # the register that nn.Module documents
            full = f"{path}.{name}".lstrip(".")
            if full == layers:
                own[name] = _layer_list([part.layer_modules for part in parts.values()], parts)
            elif any(other.startswith(f"{full}.") for other in elsewhere):
                own[name] = shell(full)
            else:
                inside = full.startswith(f"{family.base}.") and full not in outlets
                links[name] = (bottom if inside else top).get_submodule(path)
        return LinkedModules(own, links, list(module._modules))  # noqa: SLF001  # the register that nn.Module documents

    def shell(path: str) -> nn.Module:
        module = top.get_submodule(path)
        is_backbone = f"{family.base}.".startswith(f"{path}.")
        made = _shell(module, class_over(backbone, type(module)) if is_backbone else type(module))
        if path == family.base:
            _take_inlets(made, bottom.get_submodule(path), family.inlets)
        vars(made).update({"_modules": children(path), **(attributes if is_backbone else {})})
        return made

    return children("")


def _take_inlets(made: nn.Module, base: Any, inlets: Sequence[str]) -> None:
    """Give the base model its own parameters that only a bottom has."""
    own = {name: parameter for name, parameter in base.named_parameters(recurse=False) if name in inlets}
    if own:
        # What stands for them in the top is a plain attribute, which would hide them.
        for name in own:
            vars(made).pop(name, None)
        outlets = vars(made)["_parameters"]
        # The bottom's own register where possible, so that moving its tensors moves these.
        vars(made)["_parameters"] = {**own, **outlets} if outlets else vars(base)["_parameters"]


def _layer_list(lists: Sequence[Any], parts: Mapping[str, Any]) -> nn.ModuleList:
    """Return the list of all layers, each from the component that runs it."""
    links = {
        str(number): layers
        for layers, part in zip(lists, parts.values(), strict=True)
        for number in range(part.start_layer, part.end_layer)
    }
    made = nn.ModuleList()
    vars(made)["_modules"] = LinkedModules({}, links, list(links))
    made.training = lists[-1].training
    return made


def _shell(module: nn.Module, made_of: Any) -> nn.Module:
    """Return an instance with the attributes and tensors of a module, without its children and hooks."""
    made: nn.Module = object.__new__(made_of)
    nn.Module.__init__(made)
    ours = vars(made)
    # accelerate replaces the forward of a module that it moves.
    kept = {name: value for name, value in vars(module).items() if name not in {"forward", "_old_forward", "_hf_hook"}}
    ours.update({name: value for name, value in kept.items() if name not in ours})
    for register in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
        # The same objects, so that moving the component's tensors moves these.
        ours[register] = vars(module)[register]
    made.training = module.training
    return made
