"""Modules without weights: shapes and real buffers, but no memory for parameters."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

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
    default dtype would be the weights'; it is process-wide, so here the factories are told instead.
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
