"""What the shell holds for one generation: everything that is not a decision."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from splitlearn_core.manager.config import ModelConfig
from splitlearn_core.manager.lending import AsyncManagedModel, CallGate, LoadingPlaceholder
from splitlearn_core.manager.status import FailureInfo, UnloadReport
from splitlearn_core.manager.threads import Worker
from splitlearn_core.manager.work import LoadedModel, LoadPlan
from splitlearn_core.types import Progress


@dataclass(slots=True, eq=False)
class Slot:
    """One generation: who waits for it, what its worker says, and what came of it."""

    config: ModelConfig
    placeholder: LoadingPlaceholder
    #: Result: None when ready, or why not. Never an exception, so that nobody has to retrieve it.
    resolved: asyncio.Future[FailureInfo | None]
    #: Who waits for an unload. Result: a report, the leases that stood in the way, or why it could not be freed.
    unloads: list[asyncio.Future[UnloadReport | int | FailureInfo]] = field(default_factory=list)
    #: Written by the worker's thread, read by the tick.
    progress: Progress = field(default_factory=lambda: Progress("queued"))
    #: Read by the worker's thread at each report: not empty means stop, and says why.
    stop: str = ""
    #: When the worker's thread last let others have the interpreter.
    breathed: float = 0.0
    worker: Worker | None = None
    #: All threads that worked for it; one that has answered may still be on its last steps.
    workers: list[Worker] = field(default_factory=list)
    #: The manager's ``_activity`` when the worker began alone; None where it did not.
    measuring: int | None = None
    plan: LoadPlan | None = None
    loaded: LoadedModel | None = None
    model: AsyncManagedModel | None = None
    gate: CallGate | None = None
    broken_leases: int = 0
    freed: int | None = None
