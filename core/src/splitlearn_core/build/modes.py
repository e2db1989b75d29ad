"""The state of torch that loading, examining and comparing models need, whatever their caller has set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

_PLAIN_DTYPE = torch.float32


@contextmanager
def own_modes(*, gradients: bool) -> Iterator[None]:
    """Run without the caller's inference mode, gradient mode, autocast, default device and default dtype.

    Args:
        gradients: Whether what is computed can be differentiated.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.set_grad_enabled(gradients))
        # Only where it differs: a device context is asked at every call, and the default dtype is the whole process's.
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if (dtype := torch.get_default_dtype()) != _PLAIN_DTYPE:
            torch.set_default_dtype(_PLAIN_DTYPE)
            stack.callback(torch.set_default_dtype, dtype)
        yield
