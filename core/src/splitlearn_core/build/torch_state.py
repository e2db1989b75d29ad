"""The state of torch and of this process in which modules are built, loaded and compared."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_PLAIN_DTYPE = torch.float32
#: Seconds between two checks whether a load that waits for its turn is still wanted.
_CHECK_EVERY = 0.05

#: Held while modules are built: that reads and writes state of transformers that is not thread-safe.
BUILD_LOCK = threading.RLock()


@contextmanager
def build_turn(waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the build lock, and call ``waiting``, which may raise, until it is free.

    from_pretrained replaces functions and defaults of torch while it runs: two calls at the same time
    return incomplete models without an error.
    """
    waiting()
    while not BUILD_LOCK.acquire(timeout=_CHECK_EVERY):
        waiting()
    try:
        yield
    finally:
        BUILD_LOCK.release()


@contextmanager
def own_modes(*, gradients: bool) -> Iterator[None]:
    """Run without the caller's inference mode, gradient mode, autocast and default device, in this thread.

    Args:
        gradients: Whether results can be differentiated.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.set_grad_enabled(gradients))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        # Only where it differs, because a device context slows down every call of torch.
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


@contextmanager
def own_state(*, gradients: bool) -> Iterator[None]:
    """Run without the caller's modes (:func:`own_modes`) and without the caller's default dtype.

    The default dtype belongs to the whole process, so it is set only if it is not torch's own.
    """
    # Under the lock, because from_pretrained in another thread changes it for a while.
    with BUILD_LOCK:
        dtype = torch.get_default_dtype()
        if dtype != _PLAIN_DTYPE:
            torch.set_default_dtype(_PLAIN_DTYPE)
    try:
        with own_modes(gradients=gradients):
            yield
    finally:
        if dtype != _PLAIN_DTYPE:
            with BUILD_LOCK:
                torch.set_default_dtype(dtype)


#: Functions that fill parameters with initial values: skipped for tensors without memory, where they
#: would take most of the time of building. By name, because transformers replaces torch's functions
#: with its own while it initialises.
_FILL = {
    *("constant_", "copy_", "fill_", "kaiming_normal_", "kaiming_uniform_", "normal_", "ones_"),
    *("trunc_normal_", "uniform_", "xavier_normal_", "xavier_uniform_", "zero_", "zeros_"),
}

#: Factories whose dtype is torch's default unless the caller gives one.
_FOLLOW_DEFAULT = {torch.empty, torch.ones, torch.zeros}


class _Skeleton(TorchFunctionMode):
    """Allocates no memory for parameters, in this thread only.

    Layers allocate their parameters with ``torch.empty``, which is redirected to the meta device. Everything
    else is computed, so that buffers that are in no checkpoint (rotary frequencies, embedding scales) get
    their values from the model's own code. Factories get the dtype of the weights, because the default
    dtype, which ``from_pretrained`` sets to it, belongs to the whole process.
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
    with BUILD_LOCK, _Skeleton(dtype):
        # Some models call it (XGLM, for its positions), and a torch function mode does not see that.
        own, builder = torch.get_default_dtype, threading.get_ident()
        own_set = torch.set_default_dtype

        def set_for_others(value: Any) -> None:
            # A model that is made of others sets it for each, and then back to what it took for the default before.
            if threading.get_ident() != builder:
                own_set(value)

        torch.get_default_dtype = lambda: dtype if threading.get_ident() == builder else own()
        torch.set_default_dtype = set_for_others
        try:
            yield
        finally:
            torch.get_default_dtype, torch.set_default_dtype = own, own_set
