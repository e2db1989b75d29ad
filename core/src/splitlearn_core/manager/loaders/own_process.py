"""The host ``process``: a component in its own process."""

from __future__ import annotations

import logging
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any

from splitlearn_core.errors import HostDiedError, InternalError, RemoteError, SplitLearnError
from splitlearn_core.manager.config import ModelConfig
from splitlearn_core.manager.loaders.loadable import LoadedModel, LoadPlan, ReportProgress, refuse_changes
from splitlearn_core.manager.workers import default_torch_threads
from splitlearn_core.plugins.registry import registry
from splitlearn_core.types import Progress

if TYPE_CHECKING:
    from splitlearn_core.hosts.process import ProcessHandle, ProcessLoad

log = logging.getLogger(__name__)

#: Fields of a configuration that are arguments of load_split_model by the same names.
_SAME = (
    "model_type",
    "device",
    "dtype",
    "strategy",
    "revision",
    "cache_dir",
    "token",
    "local_files_only",
    "attn_implementation",
    "strict",
)
#: Seconds between two checks whether a load should stop.
_LOOK_EVERY = 0.05
#: Seconds in which a child may end by itself: it ends immediately, unless it hangs while holding the GIL.
_GRACE = 0.5


class ModelProcess:
    """The process of a model, with the manager's interface of a host."""

    def __init__(self, model_id: str, handle: ProcessHandle) -> None:
        self._model_id = model_id
        self.handle = handle

    @property
    def pid(self) -> int | None:
        return self.handle.pid

    @property
    def ended(self) -> Future[Any]:
        return self.handle.ended

    @property
    def has_sessions(self) -> bool:
        """Whether caches of it are in use here."""
        return self.handle.ready.done() and bool(self.handle.component.host.sessions)

    def death(self) -> SplitLearnError:
        """Return how it ended."""
        return HostDiedError(
            f"the process {self.pid} of model {self._model_id!r} {self.handle.exit}",
            code="host_died",
            hint="free memory, or load fewer layers; the kernel's log shows which process it killed (dmesg)"
            if self.handle.exit is not None and self.handle.exit.may_be_out_of_memory
            else "what the process wrote to stderr may say more",
        )

    def private_memory(self) -> int:
        """Return the bytes that would be freed if it ended now."""
        memory = self.handle.memory()
        return 0 if memory is None else memory.private

    def end(self) -> None:
        """Kill it: there is nothing to clean up, since it only reads files."""
        self.handle.kill(_GRACE)


def load(config: ModelConfig, plan: LoadPlan, report: ReportProgress, threads: int | None) -> LoadedModel:
    """Start a process, and return the component once it has loaded it; see :meth:`ComponentHost.load`."""
    refuse_changes(plan.details.files)
    after = plan.after.handle if isinstance(plan.after, ModelProcess) else None
    count = threads or default_torch_threads()
    try:
        handle = _loaded(config, report, count, after)
    except RemoteError as error:
        if error.code != "other_model" or after is None:
            raise
        # The weights have been replaced meanwhile.
        log.warning("The sessions of model %r end: %s", config.model_id, error.message)
        handle = _loaded(config, report, count, None)
    host = ModelProcess(config.model_id, handle)
    try:
        (part,) = plan.details.planned.split.components
        report(Progress("verifying", part.component, part.nbytes, part.nbytes))
        refuse_changes(plan.details.files)
    except BaseException:
        host.end()
        raise
    # Its inputs are sent from CPU memory.
    return LoadedModel(handle.component, plan.location, plan.dtype, "cpu", host)


def _loaded(config: ModelConfig, report: ReportProgress, threads: int, after: ProcessHandle | None) -> ProcessHandle:
    from splitlearn_core.hosts.process import start_process

    latest = Progress("importing", config.component)

    def note(progress: Progress) -> None:
        nonlocal latest
        # It is not ready before it is checked here.
        if progress.stage != "ready":
            latest = progress

    report(latest)
    handle = start_process(_load_of(config), threads=threads, progress=note, after=after)
    try:
        # A process that hangs reports nothing, so this thread has to check whether the load should stop.
        while not wait((handle.ready,), timeout=_LOOK_EVERY).done:
            report(latest)
        report(latest)
        # Raises the error of a failed load.
        _ = handle.component
    except BaseException:
        handle.kill(_GRACE)
        raise
    return handle


def _load_of(config: ModelConfig) -> ProcessLoad:
    from splitlearn_core.hosts.process import ProcessLoad

    arguments = load_arguments(config)
    (component,) = arguments.pop("parts")
    return ProcessLoad(component=component, **arguments)


def load_arguments(config: ModelConfig) -> dict[str, Any]:
    """Return the arguments of ``load_split_model`` that load a model's component in another process.

    Raises:
        InternalError: It is a whole model, for which the configuration checks refuse any host but inline.
    """
    if config.component is None or config.split_points is None:
        raise InternalError("only components of families can be loaded in another process", hint="please report this")
    return {
        "model_name_or_path": config.model_path or registry().packaged_family(config.model_type).default_model or "",
        "split_points": config.split_points,
        "parts": (config.component,),
        **{name: getattr(config, name) for name in _SAME},
    }
