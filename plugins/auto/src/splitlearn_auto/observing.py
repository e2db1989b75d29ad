"""Record a forward pass: which modules are called, in which order, and with which inputs."""

from __future__ import annotations

import inspect
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

#: A short sequence whose length is not a power of two, in a batch of more than one row.
ROWS, COLUMNS = 2, 7

#: Replaces the forward of a module: (original forward, args, kwargs) -> output.
Replacement = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@dataclass(slots=True)
class Call:
    """One call of a module."""

    path: str
    #: Its tensors, by the names of the arguments of its forward; nested ones by their place.
    inputs: dict[str, torch.Tensor]
    output: Any = None
    #: Called by a module on the path to the layers, not from inside another module.
    outermost: bool = True

    @property
    def state(self) -> torch.Tensor:
        """The first input tensor."""
        return next(iter(self.inputs.values()), torch.empty(0))

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The output tensors, in order."""
        return [tensor for _, tensor in _tensors("", self.output)]


@dataclass(slots=True)
class Forward:
    """A forward pass of a base model: its calls in order, and the resulting hidden states."""

    calls: list[Call] = field(default_factory=list)
    hidden: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def of(self, path: str) -> list[Call]:
        return [call for call in self.calls if call.path == path]


def watch(
    base: Any,
    embeddings: torch.Tensor,
    spine: Sequence[str],
    replaced: Mapping[str, Replacement] | None = None,
    *,
    training: bool = False,
    arguments: Mapping[str, Any] | None = None,
) -> Forward:
    """Run the base model on embeddings, and record its calls.

    Args:
        base: The base model; it is left in evaluation mode.
        embeddings: The inputs instead of token embeddings, ``[batch, sequence, width]``.
        spine: Paths of the modules that contain the layers, without the layers; their own calls are not recorded.
        replaced: Replacements of modules, by path.
        training: Run in training mode.
        arguments: Further arguments of the forward.
    """
    forward, stack = Forward(), _Stack(set(spine))
    with ExitStack() as hooks:
        hooks.callback(base.eval)
        base.train(training)
        for path, module in base.named_modules():
            if path and path not in stack.frame:
                hooks.enter_context(_recorded(module, path, forward, stack, (replaced or {}).get(path)))
        # A copy, because a model may change its embeddings in place.
        output = base(inputs_embeds=embeddings.clone(), use_cache=False, **(arguments or {}))
    forward.hidden = output[0]
    return forward


@dataclass(slots=True)
class _Stack:
    frame: set[str]
    calls: list[Call] = field(default_factory=list)


@contextmanager
def _recorded(
    module: nn.Module, path: str, forward: Forward, stack: _Stack, replacement: Replacement | None
) -> Iterator[None]:
    own = module.forward
    names = tuple(inspect.signature(own).parameters)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        by_name = {**dict(zip(_place_names(names, args), args, strict=True)), **kwargs}
        call = Call(path, dict(_tensors("", by_name)), outermost=not stack.calls)
        stack.calls.append(call)
        forward.calls.append(call)

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        stack.calls.pop().output = output

    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ]
    if replacement is not None:
        # An attribute of the instance hides the method of the class.
        module.forward = lambda *args, **kwargs: replacement(own, args, kwargs)
    try:
        yield
    finally:
        vars(module).pop("forward", None)
        for handle in handles:
            handle.remove()


def _place_names(names: Sequence[str], args: Sequence[Any]) -> list[str]:
    """Name the arguments that are given by their places."""
    return [names[place] if place < len(names) else str(place) for place in range(len(args))]


def _tensors(name: str, value: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors in nested arguments, each with its place."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(f"{name}.{key}" if name else str(key), item)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _tensors(f"{name}[{number}]", item)


def passed(_: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Replacement that returns the first argument."""
    return next(iter((*args, *kwargs.values())))


def zeroed(own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Replacement that returns zeros of the same shape."""
    return _zeros(own(*args, **kwargs))


def nothing(_: Callable[..., Any], __: tuple[Any, ...], ___: dict[str, Any]) -> torch.Tensor:
    """Replacement that returns a zero without dimensions, as wide as anything that it is added to."""
    return torch.zeros(())


def with_noise(argument: str, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Replacement that calls the module with noise in place of what is computed, in one argument."""
    names = _place_names(tuple(inspect.signature(own).parameters), args)
    placed = [_noise(value) if name == argument else value for name, value in zip(names, args, strict=True)]
    return own(*placed, **{name: _noise(value) if name == argument else value for name, value in kwargs.items()})


def _noise(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.randn_like(value) if value.requires_grad else value
    if isinstance(value, dict | UserDict):
        return {key: _noise(item) for key, item in value.items()}
    return type(value)(map(_noise, value)) if type(value) in (list, tuple) else value


def _zeros(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    return type(value)(map(_zeros, value)) if isinstance(value, list | tuple) else value


def random_embeddings(width: int) -> torch.Tensor:
    """Create embeddings that require gradients: everything computed from them requires gradients, too."""
    embeddings = torch.randn(ROWS, COLUMNS, width, generator=torch.Generator().manual_seed(1))
    return embeddings.requires_grad_()
