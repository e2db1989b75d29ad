"""What a model does in one forward: which modules it calls, in which order, and what they are given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

#: A short sequence that is no power of two, in a batch of more than one row.
ROWS, COLUMNS = 2, 7

#: Answers instead of a module, whose own way of answering it is given: (answer, arguments) -> answer.
Replacement = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@dataclass(slots=True)
class Call:
    """One call of a module."""

    path: str
    #: Its tensors, by the names of the arguments of its forward; nested ones by their place.
    inputs: dict[str, torch.Tensor]
    output: Any = None
    #: Called by a module that holds the layers, and not by a part of another module.
    outermost: bool = True

    @property
    def state(self) -> torch.Tensor:
        """The first tensor that it was given."""
        return next(iter(self.inputs.values()), torch.empty(0))

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The tensors it answered with, the first first."""
        return [tensor for _, tensor in _tensors("", self.output)]


@dataclass(slots=True)
class Forward:
    """One forward of a base model: its calls in order, and the hidden states that came of it."""

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
) -> Forward:
    """Run the base model on embeddings, and write down what happens.

    Args:
        base: The base model, in evaluation mode, in which it is left.
        embeddings: What stands in for the embeddings of tokens, ``[batch, sequence, width]``.
        spine: Paths of the modules that hold the layers, the layers excluded: their calls are the frame.
        replaced: Modules whose answers are replaced, by path.
        training: Run it as it is trained.
    """
    seen, stack = Forward(), _Stack(set(spine))
    with ExitStack() as hooks:
        hooks.callback(base.eval)
        base.train(training)
        for path, module in base.named_modules():
            if path and path not in stack.frame:
                hooks.enter_context(_recorded(module, path, seen, stack, (replaced or {}).get(path)))
        # A copy, because a model may change its embeddings in place.
        output = base(inputs_embeds=embeddings.clone(), use_cache=False)
    seen.hidden = output[0]
    return seen


@dataclass(slots=True)
class _Stack:
    frame: set[str]
    calls: list[Call] = field(default_factory=list)


@contextmanager
def _recorded(
    module: nn.Module, path: str, seen: Forward, stack: _Stack, replacement: Replacement | None
) -> Iterator[None]:
    own = module.forward
    names = tuple(inspect.signature(own).parameters)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**{(names[i] if i < len(names) else str(i)): value for i, value in enumerate(args)}, **kwargs}
        call = Call(path, dict(_tensors("", given)), outermost=not stack.calls)
        stack.calls.append(call)
        seen.calls.append(call)

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        stack.calls.pop().output = output

    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after, with_kwargs=True),
    ]
    if replacement is not None:
        # On the instance, where it hides the method of the class.
        module.forward = lambda *args, **kwargs: replacement(own, args, kwargs)
    try:
        yield
    finally:
        vars(module).pop("forward", None)
        for handle in handles:
            handle.remove()


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
    """Replace: hand the first argument on."""
    return next(iter((*args, *kwargs.values())))


def zeroed(own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Replace: answer with zeros of the same shape."""
    return _zeros(own(*args, **kwargs))


def _zeros(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    return type(value)(map(_zeros, value)) if isinstance(value, list | tuple) else value


def random_embeddings(width: int) -> torch.Tensor:
    """Make embeddings that what depends on them can be told by."""
    made = torch.randn(ROWS, COLUMNS, width, generator=torch.Generator().manual_seed(1))
    return made.requires_grad_()
