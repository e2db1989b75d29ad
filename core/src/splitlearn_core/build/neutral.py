"""Modules that stand where another component's module would be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

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
