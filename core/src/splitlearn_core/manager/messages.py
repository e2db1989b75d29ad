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


# --- events -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LoadRequested:
    """A caller requests a model. With ``join``, a load on its way or a ready model will do."""

    now: float
    model_id: str
    request: LoadRequest
    join: bool = False
    #: Load again although a generation serves; it serves on until the new one is ready.
    reload: bool = False


@dataclass(frozen=True, slots=True)
class WaiterJoined:
    """A caller waits for a load that is on its way."""

    now: float
    key: Key


@dataclass(frozen=True, slots=True)
class WaiterGone:
    """A caller no longer waits; the load goes on."""

    now: float
    key: Key


@dataclass(frozen=True, slots=True)
class Planned:
    """A worker has planned: bytes per ledger at the peak of the load, and once loaded."""

    now: float
    key: Key
    needs: Mapping[str, int]
    keeps: Mapping[str, int]
    location: str = ""
    dtype: str = ""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A worker has loaded the weights."""

    now: float
    key: Key
    measured: int | None = None


@dataclass(frozen=True, slots=True)
class WarmedUp:
    """A worker has run the forward passes."""

    now: float
    key: Key


@dataclass(frozen=True, slots=True)
class WorkerFailed:
    """A worker has ended with an error."""

    now: float
    key: Key
    failure: FailureInfo


@dataclass(frozen=True, slots=True)
class WorkerStopped:
    """A worker has acknowledged the request to stop, and no longer holds anything."""

    now: float
    key: Key


@dataclass(frozen=True, slots=True)
class CancelRequested:
    """A caller cancels the load of a model."""

    now: float
    model_id: str


@dataclass(frozen=True, slots=True)
class LeaseTaken:
    """A caller leases a ready model."""

    now: float
    model_id: str


@dataclass(frozen=True, slots=True)
class CallStarted:
    """A holder's call begins; it counts as a lease of its own until it ends."""

    now: float
    key: Key


@dataclass(frozen=True, slots=True)
class LeaseReleased:
    """A lease, or a call, is over. After a forced unload this changes nothing."""

    now: float
    key: Key


@dataclass(frozen=True, slots=True)
class UnloadRequested:
    """A caller unloads a model: after its leases, within a limit, or by force."""

    now: float
    model_id: str
    force: bool = False
    #: Seconds to wait for leases; None for as long as it takes.
    drain_timeout: float | None = None


@dataclass(frozen=True, slots=True)
class Unloaded:
    """The memory of a model is free."""

    now: float
    key: Key


@dataclass(frozen=True, slots=True)
class UnloadFailed:
    """The memory of a model could not be freed."""

    now: float
    key: Key
    reason: str


@dataclass(frozen=True, slots=True)
class MemorySampled:
    """The memory of this machine: ledger -> total bytes, and bytes free at this moment.

    ``mapped`` is counted before the weights that are mapped, the other ledgers after what is loaded.
    """

    now: float
    total: Mapping[str, int]
    free: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; the latest progress of the workers."""

    now: float
    progress: Mapping[Key, Progress] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CloseRequested:
    """No more work is taken; what is loading is cancelled, what is ready drains and is freed."""

    now: float
    #: Do not wait for leases any longer.
    force: bool = False


Event = (
    LoadRequested
    | WaiterJoined
    | WaiterGone
    | Planned
    | Loaded
    | WarmedUp
    | WorkerFailed
    | WorkerStopped
    | CancelRequested
    | LeaseTaken
    | CallStarted
    | LeaseReleased
    | UnloadRequested
    | Unloaded
    | UnloadFailed
    | MemorySampled
    | Tick
    | CloseRequested
)


# --- effects ----------------------------------------------------------------------------------


class Job(StrEnum):
    """The task of a worker."""

    PLAN = "plan"
    LOAD = "load"
    WARM_UP = "warm up"


@dataclass(frozen=True, slots=True)
class StartWorker:
    """Start a worker; it answers with an event."""

    key: Key
    job: Job


@dataclass(frozen=True, slots=True)
class StopWorker:
    """Request a worker to stop; it answers with WorkerStopped, or with the result it had already."""

    key: Key
    reason: str


@dataclass(frozen=True, slots=True)
class StartUnload:
    """Make the model unusable for holders, and free its memory off the loop."""

    key: Key
    broken_leases: int = 0


@dataclass(frozen=True, slots=True)
class Discard:
    """Drop the result of a worker for a generation that is no longer wanted."""

    key: Key


@dataclass(frozen=True, slots=True)
class Resolve:
    """Resolve the waiters of a load with its outcome; without a failure, it is ready."""

    key: Key
    failure: FailureInfo | None = None


@dataclass(frozen=True, slots=True)
class DrainEnded:
    """Notify the waiters of an unload that holders kept the model; it serves on."""

    key: Key
    leases: int


@dataclass(frozen=True, slots=True)
class Gone:
    """A generation is gone: notify its waiters."""

    key: Key
    released: Mapping[str, int] = field(default_factory=lambda: _EMPTY)


@dataclass(frozen=True, slots=True)
class Forgotten:
    """A failed model is no longer listed, since newer ones have failed; its generation goes next."""

    model_id: str


@dataclass(frozen=True, slots=True)
class Changed:
    """A generation changed its status."""

    key: Key
    before: ModelStatus | None
    after: ModelStatus | None
    cause: str


Effect = StartWorker | StopWorker | StartUnload | Discard | Resolve | DrainEnded | Gone | Forgotten | Changed
