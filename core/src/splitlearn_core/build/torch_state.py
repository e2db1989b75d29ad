"""The state of torch that loading, examining and comparing models need, whatever their caller has set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from splitlearn_core.build.pruning import BUILD_LOCK

_PLAIN_DTYPE = torch.float32


@contextmanager
def own_modes(*, gradients: bool) -> Iterator[None]:
    """Run without the caller's inference mode, gradient mode, autocast and default device; all are this thread's.

    Args:
        gradients: Whether what is computed can be differentiated.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.set_grad_enabled(gradients))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        # Only where it differs, because a device context is asked at every call.
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


@contextmanager
def own_state(*, gradients: bool) -> Iterator[None]:
    """Run without the caller's modes (:func:`own_modes`) and without the caller's default dtype.

    That one belongs to the whole process, so it is touched only where it is not torch's own.
    """
    # from_pretrained changes it for a while, under this lock: a load in another thread is no caller.
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
