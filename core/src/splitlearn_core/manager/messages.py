"""What the shell tells the state machine, and what the machine tells the shell to do. Values only."""

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
    """What the machine must know of a configuration."""

    model_type: str
    component: str | None = None
    device: str = ""
    #: Equal for configurations that ask for the same load.
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
    """Somebody asks for a model. With ``join``, a load on its way or a ready model will do."""

    now: float
    model_id: str
    request: LoadRequest
    join: bool = False
    #: Load anew although a generation serves; it serves on until the new one is ready.
    reload: bool = False


@dataclass(frozen=True, slots=True)
class WaiterJoined:
    """Somebody waits for a load that is on its way."""

    now: float
    key: Key


@dataclass(frozen=True, slots=True)
class WaiterGone:
    """Somebody no longer waits; the load goes on."""

    now: float
    key: Key


@dataclass(frozen=True, slots=True)
class Planned:
    """A worker has planned: what loading takes at its peak, and what is kept."""

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
    """A worker has acknowledged that it was told to stop, and holds nothing any more."""

    now: float
    key: Key


@dataclass(frozen=True, slots=True)
class CancelRequested:
    """Somebody cancels the load of a model."""

    now: float
    model_id: str


@dataclass(frozen=True, slots=True)
class LeaseTaken:
    """Somebody borrows a ready model."""

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
    """Somebody wants a model freed: after its leases, within a limit, or by force."""

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
    """What the machine at hand has: ledger -> bytes in all, and free at this moment.

    ``mapped`` is counted before the weights that are mapped, the other ledgers after what is loaded.
    """

    now: float
    total: Mapping[str, int]
    free: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed; workers have got as far as this."""

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
    """What a worker is started for."""

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
    """Tell a worker to stop; it answers with WorkerStopped, or with what it had done already."""

    key: Key
    reason: str


@dataclass(frozen=True, slots=True)
class StartUnload:
    """Make the model unusable for holders, and free its memory off the loop."""

    key: Key
    broken_leases: int = 0


@dataclass(frozen=True, slots=True)
class Discard:
    """Drop what a worker brought for a generation that is not wanted any more."""

    key: Key


@dataclass(frozen=True, slots=True)
class Resolve:
    """Tell everybody who waits for a load how it ended; without a failure, it is ready."""

    key: Key
    failure: FailureInfo | None = None


@dataclass(frozen=True, slots=True)
class DrainEnded:
    """Tell whoever waits for an unload that holders kept the model; it serves on."""

    key: Key
    leases: int


@dataclass(frozen=True, slots=True)
class Gone:
    """A generation is no more: tell whoever waits for that."""

    key: Key
    released: Mapping[str, int] = field(default_factory=lambda: _EMPTY)


@dataclass(frozen=True, slots=True)
class Forgotten:
    """A model that failed is listed no more, since newer ones have failed; it goes next."""

    model_id: str


@dataclass(frozen=True, slots=True)
class Changed:
    """A generation changed its status."""

    key: Key
    before: ModelStatus | None
    after: ModelStatus | None
    cause: str


Effect = StartWorker | StopWorker | StartUnload | Discard | Resolve | DrainEnded | Gone | Forgotten | Changed
