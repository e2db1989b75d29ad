"""Snapshots of the manager and its models: frozen values, replaced at each change."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from splitlearn_core import errors
from splitlearn_core.errors import LoadFailedError, SplitLearnError, printable, shortened


class ModelStatus(StrEnum):
    """The states of a model, in the order in which it passes through them."""

    #: Accepted; no worker is free yet.
    QUEUED = "queued"
    #: A worker finds the files, downloads what is missing and plans; no weights are in memory.
    PLANNING = "planning"
    #: Planned; there is no room yet.
    WAITING = "waiting"
    #: A worker builds the modules and reads the weights.
    LOADING = "loading"
    #: A worker runs forward passes.
    WARMING = "warming"
    #: The worker was requested to stop and has not acknowledged it.
    CANCELLING = "cancelling"
    #: Can be leased.
    READY = "ready"
    #: No longer leased out; waits for its leases to end.
    DRAINING = "draining"
    #: No lease is left; its memory is being freed.
    UNLOADING = "unloading"
    #: The last attempt failed, and the reason is kept; the next call tries again.
    FAILED = "failed"
    #: A worker did not come back after a request to stop; its memory counts as taken until it does.
    STUCK = "stuck"

    @property
    def is_loading(self) -> bool:
        """Whether an attempt is on its way to READY."""
        return self in _ON_THE_WAY


_ON_THE_WAY = frozenset(
    {ModelStatus.QUEUED, ModelStatus.PLANNING, ModelStatus.WAITING, ModelStatus.LOADING, ModelStatus.WARMING}
)


@dataclass(frozen=True, slots=True)
class FailureInfo:
    """Why an attempt failed, kept as text: a traceback would keep the weights it touched alive."""

    #: Name of the exception's class.
    type: str
    message: str
    #: What to do; empty if the message suffices.
    hint: str
    #: The stage in which it happened.
    stage: str
    #: Whether trying again unchanged can help.
    retryable: bool
    #: The traceback as text, for logs; empty where the error is ours to explain.
    traceback: str = ""
    #: How many attempts in a row have failed.
    consecutive: int = 1
    #: Seconds since the epoch.
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """One model at one moment. Bytes are bytes, durations are seconds."""

    model_id: str
    status: ModelStatus
    #: Counts the attempts to load this id; a reload has a higher one than what it replaces.
    generation: int
    model_type: str
    component: str | None
    #: ``resolving``, ``examining``, ``downloading``, ``planning``, ``importing``, ``building``, ``reading``,
    #: ``verifying``, ``warming up``, or empty where no worker is at work.
    stage: str = ""
    bytes_done: int = 0
    bytes_total: int = 0
    #: Bytes a second of the current stage, over the last seconds; None where it is unknown.
    rate: float | None = None
    #: Seconds left of the current stage; None rather than a guess.
    eta: float | None = None
    #: The file at work.
    file: str = ""
    #: Why it waits, in a sentence; empty where it does not.
    waiting_for: str = ""
    #: Seconds without a byte, once they are more than the manager's ``stall_after``; else None.
    stalled_for: float | None = None
    #: Callers that wait for this load.
    waiters: int = 0
    #: Leases that are not released yet, running calls among them.
    leases: int = 0
    #: Whether a newer generation is loading while this one serves.
    reloading: bool = False
    pinned: bool = False
    required: bool = False
    device: str = ""
    dtype: str = ""
    #: Where the files are on this machine; empty before they are known.
    location: str = ""
    #: Ledger (``host``, ``mapped``, ``cuda:0``, ...) -> bytes that the plan says it takes once loaded.
    predicted: Mapping[str, int] = field(default_factory=dict)
    #: Anonymous bytes that loading took, as measured; None where other loads ran at the same time.
    measured: int | None = None
    #: Where it runs: ``inline`` in this process, ``process`` in its own.
    host: str = "inline"
    #: The id of that process, while it serves.
    pid: int | None = None
    #: How often in a row it was restarted because its process died; and when it will be restarted, None for never.
    restarts: int = 0
    restarts_at: float | None = None
    #: Seconds since the epoch; None where it has not happened.
    requested_at: float | None = None
    ready_at: float | None = None
    last_used_at: float | None = None
    #: When it will be unloaded if it is not used; None for never.
    expires_at: float | None = None
    #: Seconds from request to ready.
    load_seconds: float | None = None
    error: FailureInfo | None = None

    @property
    def ready(self) -> bool:
        return self.status is ModelStatus.READY

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values, for JSON."""
        return {
            **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)},
            "status": str(self.status),
            "predicted": dict(self.predicted),
            "error": dataclasses.asdict(self.error) if self.error else None,
        }


@dataclass(frozen=True, slots=True)
class LedgerInfo:
    """One budget of memory."""

    #: Bytes that all models together may take, as last sampled.
    capacity: int
    #: Bytes of models that are loaded, or stuck.
    charged: int
    #: Bytes that are reserved for loads on their way.
    reserved: int


@dataclass(frozen=True, slots=True)
class ManagerStatistics:
    """The manager at one moment, and what it has counted since it was made."""

    #: Status -> number of models.
    models: Mapping[str, int]
    ledgers: Mapping[str, LedgerInfo]
    loads_started: int
    loads_succeeded: int
    loads_failed: int
    loads_cancelled: int
    joined: int
    unloads: int
    evictions: int
    expirations: int
    leases: int
    calls: int
    calls_failed: int
    calls_rejected: int
    #: Workers that did not come back after a request to stop, each with its current stack.
    stuck: Mapping[str, str]
    uptime: float
    #: Models that failed and are not listed any more, since as many newer ones have failed as are kept.
    failures_forgotten: int = 0
    #: Processes of models that ended without a request, and starts by the restart policy.
    hosts_died: int = 0
    restarts: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values, for JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            **values,
            "models": dict(self.models),
            "ledgers": {name: dataclasses.asdict(ledger) for name, ledger in self.ledgers.items()},
            "stuck": dict(self.stuck),
        }


@dataclass(frozen=True, slots=True)
class ManagerEvent:
    """One change of a model's status."""

    #: Counts all events of this manager; a gap shows a slow reader how many it missed.
    sequence: int
    #: Seconds since the epoch.
    at: float
    model_id: str
    generation: int
    #: None for a model that was not there before.
    before: ModelStatus | None
    #: None for a model that is gone.
    after: ModelStatus | None
    #: Why, in a few words.
    cause: str

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class Health:
    """Whether the process should be restarted (not live), and whether it can serve (ready)."""

    live: bool
    ready: bool
    #: Required model -> why it is not ready.
    missing: Mapping[str, str]
    #: Why it is not live; empty where it is.
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "missing": dict(self.missing)}


@dataclass(frozen=True, slots=True)
class UnloadReport:
    """The memory that an unload released."""

    model_id: str
    #: Ledger -> bytes that are no longer charged.
    released: Mapping[str, int]
    #: Anonymous bytes of the process before less after; None where something else ran at the same time.
    measured: int | None
    #: Leases that a forced unload broke.
    broken_leases: int = 0


#: Characters of another library's error, and of its traceback: both are kept in every snapshot.
_MESSAGE, _TRACEBACK = 2_000, 20_000

#: Trying again unchanged cannot help against these.
_PERMANENT = (
    errors.ConfigurationError,
    errors.PluginError,
    errors.InvalidCheckpointError,
    errors.TensorMismatchError,
)


def record(error: BaseException, stage: str) -> FailureInfo:
    """Record an exception as text, and release what its frames hold."""
    trace = "" if isinstance(error, SplitLearnError) else "".join(traceback.format_exception(error))
    current: BaseException | None = error
    while current is not None:
        traceback.clear_frames(current.__traceback__)
        current = current.__cause__ or current.__context__
    message = error.message if isinstance(error, SplitLearnError) else shortened(printable(str(error)), _MESSAGE)
    return FailureInfo(
        type=type(error).__name__,
        message=message or type(error).__name__,
        hint=error.hint if isinstance(error, SplitLearnError) else "",
        stage=stage,
        retryable=not isinstance(error, _PERMANENT),
        traceback=shortened(printable(trace), _TRACEBACK),
    )


def fresh(failure: FailureInfo) -> SplitLearnError:
    """Make an exception from a record: of the same class if that is a SplitLearnError, else LoadFailedError."""
    kind = getattr(errors, failure.type, None)
    if isinstance(kind, type) and issubclass(kind, SplitLearnError):
        return kind(failure.message, hint=failure.hint)
    return LoadFailedError(
        f"loading failed while {failure.stage or 'working'}: {failure.type}: {failure.message}",
        hint=failure.hint or "the traceback is in get_model_info(id).error.traceback",
    )
