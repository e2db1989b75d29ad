"""Modules without weights, pruned to a range of layers: skeletons, stand-ins for what is left out, name checks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from splitlearn_core.errors import BrokenPluginError
from splitlearn_core.family import ModelFamily

#: The hidden states of the forward that runs in this thread or task, where they enter at the layers.
_ENTERING: ContextVar[torch.Tensor] = ContextVar("splitlearn_entering")


class PassLayer(nn.Module):
    """Hands the first argument on unchanged, whatever else a decoder layer is given."""

    # Called for every layer of the other components at every token: nn.Module's own way of calling
    # would cost more than a decoded token may lose.
    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states

    forward = __call__


class TupleLayer(PassLayer):
    """The same where a decoder layer answers with a tuple: the running state, and nothing besides."""

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return hidden_states, None

    forward = __call__


class EnteringLayer(nn.Module):
    """Stands for the first layer, and hands on the hidden states that came from outside.

    Whatever the model did to them on their way here, as it does to embeddings, is left behind.

    Args:
        neutral: The neutral layer that wraps an answer as the family's layers do.
    """

    def __init__(self, neutral: PassLayer) -> None:
        super().__init__()
        self._neutral = neutral

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._neutral(_ENTERING.get(hidden_states))


@contextmanager
def entering(hidden_states: torch.Tensor) -> Iterator[None]:
    """Let hidden states reach the layers as they are."""
    token = _ENTERING.set(hidden_states)
    try:
        yield
    finally:
        _ENTERING.reset(token)


class Zero(nn.Module):
    """Yields a zero that any addition leaves without a trace."""

    def forward(self, indices: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Without dimensions: it broadcasts, and it does not promote a half-precision sum.
        return torch.zeros((), device=indices.device)


#: Building modules reads and writes state of transformers that is not made for threads.
BUILD_LOCK = threading.RLock()

#: What fills parameters with their first values: on a tensor without memory there is nothing to
#: fill, and going through the motions would be most of the time that building takes. By name,
#: because transformers puts functions of its own in the place of torch's while it initialises.
_FILL = {
    *("constant_", "copy_", "fill_", "kaiming_normal_", "kaiming_uniform_", "normal_", "ones_"),
    *("trunc_normal_", "uniform_", "xavier_normal_", "xavier_uniform_", "zero_", "zeros_"),
}

#: Factories whose dtype follows torch's default where the caller names none.
_FOLLOW_DEFAULT = {torch.empty, torch.ones, torch.zeros}


class _Skeleton(TorchFunctionMode):
    """Leaves out the memory of parameters and nothing else, in this thread only.

    Layers allocate their parameters with ``torch.empty``; that goes to the meta device. Everything
    else is computed, so that buffers which no checkpoint holds (rotary frequencies, embedding
    scales) get the values that the model's own code gives them. Under ``from_pretrained`` the
    default dtype would be the weights'; it is process-wide, so here the factories get it instead.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if getattr(func, "__name__", "") in _FILL:
            tensor = args[0] if args else options.get("tensor")
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                return tensor
        if func in _FOLLOW_DEFAULT or (func is torch.tensor and args and isinstance(args[0], float)):
            options["dtype"] = options.get("dtype") or self._dtype
        if func is torch.empty and options.get("device") is None:
            options["device"] = "meta"
        return func(*args, **options)


@contextmanager
def skeleton(dtype: torch.dtype) -> Iterator[None]:
    """Build modules whose parameters have shapes but no memory."""
    with BUILD_LOCK, _Skeleton(dtype), _told_as_default(dtype):
        yield


@contextmanager
def _told_as_default(dtype: torch.dtype) -> Iterator[None]:
    """Tell a model that asks for the default dtype (XGLM, for its positions); this thread only, and nobody sets it.

    The function is none of those that a mode is asked about.
    """
    own, builder = torch.get_default_dtype, threading.get_ident()
    torch.get_default_dtype = lambda: dtype if threading.get_ident() == builder else own()
    try:
        yield
    finally:
        torch.get_default_dtype = own


#: What a module has of a name that it does not know.
_MISSING = object()


def layer_at(model: Any, family: ModelFamily, number: int) -> nn.Module:
    """Make a layer of the model, or take it where the model made all of them."""
    layers = model.get_submodule(family.base).get_submodule(family.layers)
    layer_class: type[nn.Module] = type(layers[0])
    return layer_class(model.config, number) if family.uniform_layers else cast("nn.Module", layers[number])


def replace_module(parent: nn.Module, path: str, module: nn.Module) -> None:
    holder, _, name = path.rpartition(".")
    setattr(parent.get_submodule(holder), name, module)


def replace_modules(base: nn.Module, neutral: Mapping[str, nn.Module]) -> None:
    for path, module in neutral.items():
        holder, _, name = path.rpartition(".")
        # A model that does without it has None in its place.
        if base.get_submodule(holder)._modules.get(name) is not None:  # noqa: SLF001  # a register that nn.Module documents
            replace_module(base, path, module)


def check_names(model: nn.Module, family: ModelFamily) -> None:
    """Hold the names of a family against the modules there are, before any is replaced.

    Raises:
        BrokenPluginError: There are no modules of these names; those there are, are listed.
    """
    inside = (family.layers, *family.inlets, *family.outlets)
    paths = [family.base, family.head, *(f"{family.base}.{name}" for name in inside)]
    there = dict(model.named_modules())
    optional = {f"{family.base}.{name}" for name in (*family.inlets[1:], *family.outlets)}
    astray = [path for path in paths if path not in there and not (path in optional and _is_left_out(there, path))]
    if astray:
        shallow = sorted(name for name in there if name and name.count(".") <= family.base.count(".") + 1)
        raise BrokenPluginError(
            f"the family {family.model_type!r} names {', '.join(astray)}, "
            f"and {type(model).__name__} has no such modules",
            hint=f"it has: {', '.join(shallow)}",
        )


def _is_left_out(modules: Mapping[str, nn.Module], path: str) -> bool:
    """Say whether a module has None where others of its class have a module of this name."""
    holder, _, name = path.rpartition(".")
    return holder in modules and getattr(modules[holder], name, _MISSING) is None
