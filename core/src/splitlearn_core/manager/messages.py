"""Events, which the shell sends to the state machine, and effects, which the shell carries out. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from splitlearn_core.manager.status import FailureInfo, ModelStatus
from splitlearn_core.types import Progress

#: A model and the number of one attempt to load it.
Key = tuple[str, int]
_EMPTY: Mapping[str, int] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRequest:
    """The part of a configuration that the machine needs."""

    model_type: str
    component: str | None = None
    device: str = ""
    #: Equal for configurations that request the same load.
    fingerprint: object = None
    #: Seconds of idleness until it is unloaded; None for never.
    keep_alive: float | None = None
    pinned: bool = False
    required: bool = False
    allow_paging: bool = False
    warmup: bool = False
    #: Where it runs, and how often in a row it is restarted automatically after its host has died.
    host: str = "inline"
    restart_limit: int = 0


# --- events -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened, and when: seconds of the manager's clock."""

    now: float


@dataclass(frozen=True, slots=True)
class _OfModel(Event):
    model_id: str


@dataclass(frozen=True, slots=True)
class _OfGeneration(Event):
    key: Key


@dataclass(frozen=True, slots=True)
class LoadRequested(_OfModel):
    """A caller requests a model. With ``join``, a load on its way or a ready model will do."""

    request: LoadRequest
    join: bool = False
    #: Load again although a generation serves; it serves on until the new one is ready.
    reload: bool = False


class WaiterJoined(_OfGeneration):
    """A caller waits for a load that is on its way."""


class WaiterGone(_OfGeneration):
    """A caller no longer waits; the load goes on."""


@dataclass(frozen=True, slots=True)
class Planned(_OfGeneration):
    """A worker has planned: bytes per ledger at the peak of the load, and once loaded."""

    needs: Mapping[str, int]
    keeps: Mapping[str, int]
    location: str = ""
    dtype: str = ""


@dataclass(frozen=True, slots=True)
class Loaded(_OfGeneration):
    """A worker has loaded the weights."""

    measured: int | None = None
    #: The process id of the model; None if it runs in this process.
    pid: int | None = None


class WarmedUp(_OfGeneration):
    """A worker has run the forward passes."""


@dataclass(frozen=True, slots=True)
class WorkerFailed(_OfGeneration):
    """A worker has ended with an error."""

    failure: FailureInfo


class WorkerStopped(_OfGeneration):
    """A worker has acknowledged the request to stop, and no longer holds anything."""


@dataclass(frozen=True, slots=True)
class HostDied(_OfGeneration):
    """The process of a model has ended without a request."""

    failure: FailureInfo
    #: Whether sessions are open, besides the leases that the machine counts.
    has_sessions: bool = False


class CancelRequested(_OfModel):
    """A caller cancels the load of a model."""


class LeaseTaken(_OfModel):
    """A caller leases a ready model."""


class CallStarted(_OfGeneration):
    """A holder's call begins; it counts as a lease of its own until it ends."""


class LeaseReleased(_OfGeneration):
    """A lease, or a call, is over. After a forced unload this changes nothing."""


@dataclass(frozen=True, slots=True)
class UnloadRequested(_OfModel):
    """A caller unloads a model: after its leases, within a limit, or by force."""

    force: bool = False
    #: Seconds to wait for leases; None for as long as it takes.
    drain_timeout: float | None = None


class Unloaded(_OfGeneration):
    """The memory of a model is free."""


@dataclass(frozen=True, slots=True)
class UnloadFailed(_OfGeneration):
    """The memory of a model could not be freed."""

    reason: str


@dataclass(frozen=True, slots=True)
class MemorySampled(Event):
    """The memory of this machine: ledger -> total bytes, and bytes free at this moment.

    ``mapped`` is counted before the weights that are mapped, the other ledgers after what is loaded.
    """

    total: Mapping[str, int]
    free: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Tick(Event):
    """Time has passed; the latest progress of the workers."""

    progress: Mapping[Key, Progress] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CloseRequested(Event):
    """No more work is taken; what is loading is cancelled, what is ready drains and is freed."""

    #: Do not wait for leases any longer.
    force: bool = False


# --- effects ----------------------------------------------------------------------------------


class Job(StrEnum):
    """The task of a worker."""

    PLAN = "plan"
    LOAD = "load"
    WARM_UP = "warm up"


@dataclass(frozen=True, slots=True)
class Effect:
    """Something that the shell has to do."""


@dataclass(frozen=True, slots=True)
class _ForGeneration(Effect):
    key: Key


@dataclass(frozen=True, slots=True)
class StartWorker(_ForGeneration):
    """Start a worker; it answers with an event."""

    job: Job


@dataclass(frozen=True, slots=True)
class StopWorker(_ForGeneration):
    """Request a worker to stop; it answers with WorkerStopped, or with the result it had already."""

    reason: str


@dataclass(frozen=True, slots=True)
class StartUnload(_ForGeneration):
    """Make the model unusable for holders, and free its memory off the loop."""

    broken_leases: int = 0


@dataclass(frozen=True, slots=True)
class HostLost(_ForGeneration):
    """Make a model whose host has died unusable for holders, who get the failure; its memory is free already."""

    failure: FailureInfo
    broken_leases: int = 0


@dataclass(frozen=True, slots=True)
class Succeeds(_ForGeneration):
    """A generation replaces one whose host has died, and continues its sessions."""

    before: Key


class Discard(_ForGeneration):
    """Drop the result of a worker for a generation that is no longer wanted."""


@dataclass(frozen=True, slots=True)
class Resolve(_ForGeneration):
    """Resolve the waiters of a load with its outcome; without a failure, it is ready."""

    failure: FailureInfo | None = None


@dataclass(frozen=True, slots=True)
class DrainEnded(_ForGeneration):
    """Notify the waiters of an unload that holders kept the model; it serves on."""

    leases: int


@dataclass(frozen=True, slots=True)
class Gone(_ForGeneration):
    """A generation is gone: notify its waiters."""

    released: Mapping[str, int] = field(default_factory=lambda: _EMPTY)


@dataclass(frozen=True, slots=True)
class Forgotten(Effect):
    """A failed model is no longer listed, since newer ones have failed; its generation goes next."""

    model_id: str


@dataclass(frozen=True, slots=True)
class Changed(_ForGeneration):
    """A generation changed its status."""

    before: ModelStatus | None
    after: ModelStatus | None
    cause: str
