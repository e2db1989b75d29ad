"""Fill built modules with tensors, keep shared parameters shared, and check that nothing is missing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from splitlearn_core.errors import ConfigurationError, InternalError
from splitlearn_core.types import FLOAT_DTYPES, TensorInfo


def tensor_problems(module: nn.Module, planned: Mapping[str, TensorInfo]) -> list[str]:
    """Compare planned tensors with the module's own, before any is read.

    Args:
        module: The built component.
        planned: Module key -> the description of the tensor in the file's header.

    Returns:
        One text for each missing, unexpected, mis-shaped or mis-typed tensor.
    """
    wanted = {name: tensor for name, tensor, in_file in _tensors(module) if in_file}
    problems = [f"missing: {name} {list(wanted[name].shape)}" for name in sorted(wanted.keys() - planned.keys())]
    problems += [f"unexpected: {name} {list(planned[name].shape)}" for name in sorted(planned.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & planned.keys()):
        info, tensor = planned[name], wanted[name]
        if info.shape != tuple(tensor.shape):
            by_config = list(tensor.shape)
            problems.append(f"mis-shaped: {name} is {list(info.shape)} in the file, {by_config} by config.json")
        if tensor.is_floating_point() and info.dtype not in FLOAT_DTYPES.values():
            problems.append(f"mis-typed: {name} is {info.dtype} in the file, which is not a plain floating dtype")
    return problems


def unexpected_names(module: nn.Module, planned: Mapping[str, TensorInfo]) -> set[str]:
    """Return the module keys of planned tensors that a module has no place for."""
    return planned.keys() - {name for name, _, in_file in _tensors(module) if in_file}


def ignored_names(module: Any, names: Iterable[str]) -> set[str]:
    """Return those names of tensors that a class has no place for on purpose, and ignores in files, by its own list.

    Gemma 4's files have keys and values of layers that use those of other layers.
    """
    patterns = module._keys_to_ignore_on_load_unexpected or ()  # noqa: SLF001  # the name in transformers
    return {name for name in names if any(re.search(pattern, name) for pattern in patterns)}


def assign_tensor(
    modules: Mapping[str, nn.Module], name: str, tensor: torch.Tensor | nn.Parameter
) -> nn.Parameter | torch.Tensor:
    """Replace a tensor of a module with another one, or with a shared parameter.

    Args:
        modules: The modules of a component by path, as ``named_modules`` gives them.
        name: The tensor's name in the component.
        tensor: The new tensor, or the shared parameter.
    """
    path, _, leaf = name.rpartition(".")
    owner = modules[path]
    if leaf in owner._buffers:  # noqa: SLF001  # the register that nn.Module documents for buffers
        setattr(owner, leaf, tensor)
        return tensor
    if isinstance(tensor, nn.Parameter):
        parameter = tensor
        note_shared(parameter)
    else:
        parameter = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    setattr(owner, leaf, parameter)
    return parameter


def finish(module: nn.Module, device: str) -> None:
    """Move the computed buffers to the device, and check that every tensor has memory.

    Raises:
        InternalError: A parameter or buffer has no memory, or is on another device.
    """
    for owner in module.modules():
        for name, buffer in owner._buffers.items():  # noqa: SLF001  # a register that nn.Module documents
            if buffer is not None:
                owner._buffers[name] = buffer.to(device)  # noqa: SLF001  # a register that nn.Module documents
    empty = [name for name, tensor, _ in _tensors(module) if tensor.is_meta]
    if empty:
        raise InternalError(f"tensors without memory after loading: {', '.join(empty)}", hint="please report this")
    mark_initialized(module)


def mark_initialized(module: nn.Module) -> None:
    """Mark modules and tensors as transformers marks what it has loaded.

    A model of transformers that contains them gives random values to unmarked tensors when it initialises its weights.
    """
    for owner in module.modules():
        vars(owner)["_is_hf_initialized"] = True
        for tensor in (*owner._parameters.values(), *owner._buffers.values()):  # noqa: SLF001  # registers that nn.Module documents
            if tensor is not None:
                tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # noqa: SLF001  # transformers' own mark


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """Yield each parameter and buffer of a module with its name, and whether a checkpoint holds it.

    In one pass over the registers that nn.Module documents; its own iterators pass over the tree once for each kind.
    """
    for path, owner in module.named_modules():
        prefix = f"{path}." if path else ""
        for name, parameter in owner._parameters.items():  # noqa: SLF001  # a register that nn.Module documents
            if parameter is not None:
                yield prefix + name, parameter, True
        for name, buffer in owner._buffers.items():  # noqa: SLF001  # a register that nn.Module documents
            if buffer is not None:
                yield prefix + name, buffer, name not in owner._non_persistent_buffers_set  # noqa: SLF001  # a register that nn.Module documents


def tie_if_equal(first: nn.Module, first_key: str, second: nn.Module, second_key: str) -> bool:
    """Tie two parameters if their values are equal; return whether they are."""
    kept, replaced = first.get_parameter(first_key), second.get_parameter(second_key)
    equal = kept.shape == replaced.shape and torch.equal(kept, replaced)
    if equal:
        assign_tensor(dict(second.named_modules()), second_key, kept)
    return equal


#: Parameters that are shared by components of one load.
_SHARED: Any = WeakIdKeyDictionary()


def note_shared(parameter: nn.Parameter) -> None:
    """Record that a parameter is shared by more than one component."""
    _SHARED[parameter] = True


def refuse_parting(component: str, module: nn.Module, names: Iterable[str]) -> None:
    """Refuse to replace parameters that another component shares.

    Args:
        component: The name of the component.
        module: The component.
        names: The parameters that would be replaced.

    Raises:
        ConfigurationError: One of them is shared; the other component would keep the old values.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    shared = sorted(name for name in names if name in parameters and parameters[name] in _SHARED)
    if shared:
        raise ConfigurationError(
            f"load_state_dict(assign=True) would replace {', '.join(shared)} of this {component} alone, "
            "which is shared with another component",
            hint="leave assign out, so that the values are copied; or call it on SplitCausalLM(bottom, ..., top)",
        )


@contextmanager
def keeping_ties(module: nn.Module) -> Iterator[None]:
    """Tie parameters again that were tied before a block in which some of their names got new parameters.

    The last of the new ones is used, as if values were copied name by name.
    """
    before: dict[int, tuple[nn.Parameter, list[str]]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        before.setdefault(id(parameter), (parameter, []))[1].append(name)
    yield
    modules = dict(module.named_modules())
    for old, names in before.values():
        if len(names) == 1:
            continue
        places = [(modules[path], leaf) for path, _, leaf in (name.rpartition(".") for name in names)]
        replaced = [new for owner, leaf in places if (new := getattr(owner, leaf)) is not old]
        for owner, leaf in places if replaced else ():
            setattr(owner, leaf, replaced[-1])
        if replaced:
            note_shared(replaced[-1])
