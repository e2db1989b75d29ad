"""The protocol of further stages at a cut, which plugins may add."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

#: What crosses a cut: on the way forward, and on the way back.
STATES, GRADIENTS = "hidden states", "gradients"


@dataclass(frozen=True, slots=True)
class Crossing:
    """One message that leaves the data owner, as a stage sees it."""

    #: The number of the cut, from 0 on.
    cut: int
    #: ``"hidden states"`` or ``"gradients"``.
    what: str
    #: Returns secret random bytes, for a stage that needs randomness. A message that is sent again, or recomputed
    #: by gradient checkpointing, gets the same bytes.
    random_bytes: Callable[[int], bytes] = field(repr=False, compare=False)


@runtime_checkable
class CutStage(Protocol):
    """A further stage of a cut, between noise and quantisation, at the data owner. Packages may add stages.

    Its entry point is in the group ``splitlearn.cut_stages``, is named after the stage, and names an object::

        [project.entry-points."splitlearn.cut_stages"]
        signs = "splitlearn_signs:signs"

    It is only imported when a ``Cut`` names it, ``Cut(stages=("signs",))``; ``stages`` also takes the object
    itself.
    """

    #: The name by which a ``Cut`` requests it.
    name: str

    def apply(self, values: torch.Tensor, crossing: Crossing) -> torch.Tensor:
        """Return what is sent in place of ``values`` ``[batch, sequence, hidden]``, with their shape, dtype and device.

        The result depends on the arguments alone. On the way back, the gradient passes a stage unchanged.
        """
