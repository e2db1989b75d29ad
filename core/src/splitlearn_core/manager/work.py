"""What a loader says before it loads, and what it hands out afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from splitlearn_core.types import ProgressCallback

if TYPE_CHECKING:
    import torch

#: Where a loader reports, often, from the thread that it works in. It may raise, LoadCancelledError
#: for one: the loader then lets go of everything and lets the error through.
ReportProgress = ProgressCallback

#: The ledger of this machine's memory that no file stands behind.
HOST = "host"
#: The ledger of weights that are pages of their file: they can be dropped and read again.
MAPPED = "mapped"


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What a load will take, known before it takes it."""

    #: Ledger (``host``, ``mapped``, ``cuda:0``, ...) -> bytes, while loading: the peak.
    needs: Mapping[str, int]
    #: The same once loaded.
    keeps: Mapping[str, int]
    #: The folder or file on this machine.
    location: str
    #: torch's name of the dtype that the weights will have; ``auto`` where only reading them tells.
    dtype: str
    device: str
    #: The loader's own; nobody else looks into it.
    details: Any = None


@dataclass(slots=True)
class LoadedModel:
    """A model in memory."""

    module: torch.nn.Module
    location: str
    dtype: str
    device: str
