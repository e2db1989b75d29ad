"""Modules that stand where another component's module would be."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class PassLayer(nn.Module):
    """Hands the first argument on unchanged, whatever else a decoder layer is given."""

    # Called for every layer of the other components at every token: nn.Module's own way of calling
    # would cost more than a decoded token may lose.
    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states

    forward = __call__


class Zero(nn.Module):
    """Yields a zero that any addition leaves without a trace."""

    def forward(self, indices: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Without dimensions: it broadcasts, and it does not promote a half-precision sum.
        return torch.zeros((), device=indices.device)
