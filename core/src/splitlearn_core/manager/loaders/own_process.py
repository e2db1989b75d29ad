"""Loading a component in a process of its own."""

from __future__ import annotations

import logging
from concurrent.futures import Future, wait
from typing import Any

from splitlearn_core.errors import HostDiedError, InternalError, RemoteError, SplitLearnError
from splitlearn_core.hosts.process import ProcessHandle, ProcessLoad, start_process
from splitlearn_core.hosts.remote import RemoteComponent
from splitlearn_core.manager.config import ModelConfig
from splitlearn_core.manager.loaders.loadable import LoadPlan, ReportProgress
from splitlearn_core.plugins.registry import registry
from splitlearn_core.types import Progress

log = logging.getLogger(__name__)

#: Seconds between two looks at whether a load is to stop.
_LOOK_EVERY = 0.05
#: Seconds in which a child may end by itself: it ends at once, unless it hangs with the interpreter's lock.
_GRACE = 0.5


class ProcessHost:
    """The process of a model, as the manager sees it."""

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
            hint="free memory, or load fewer layers; the kernel's log says whom it killed (dmesg)"
            if self.handle.exit is not None and self.handle.exit.may_be_out_of_memory
            else "what the process wrote to stderr may say more",
        )

    def private_memory(self) -> int:
        """Return the bytes that would come back if it ended now."""
        memory = self.handle.memory()
        return 0 if memory is None else memory.private

    def end(self) -> None:
        """End it: it has nothing to put in order, and its files are open for reading alone."""
        self.handle.kill(_GRACE)


def load_in_process(
    config: ModelConfig, plan: LoadPlan, report: ReportProgress, threads: int
) -> tuple[RemoteComponent, ProcessHost]:
    """Start a process, and return the component once it has loaded it.

    Args:
        config: What is loaded.
        plan: Of the same load in this process.
        report: Called often, in this thread; what it raises ends the process.
        threads: Threads of torch in the process.

    Raises:
        SplitLearnError: It cannot be loaded, or its process died.
    """
    after = plan.after.handle if isinstance(plan.after, ProcessHost) else None
    try:
        handle = _loaded(config, report, threads, after)
    except RemoteError as error:
        if error.code != "other_model" or after is None:
            raise
        # Its files have been replaced meanwhile.
        log.warning("The sessions of model %r end: %s", config.model_id, error.message)
        handle = _loaded(config, report, threads, None)
    return handle.component, ProcessHost(config.model_id, handle)


def _loaded(config: ModelConfig, report: ReportProgress, threads: int, after: ProcessHandle | None) -> ProcessHandle:
    latest = Progress("importing", config.component)

    def note(progress: Progress) -> None:
        nonlocal latest
        # It is ready once it is checked here.
        if progress.stage != "ready":
            latest = progress

    report(latest)
    handle = start_process(_load_of(config), threads=threads, progress=note, after=after)
    try:
        # A process that hangs reports nothing, so that only a look from here sees that it is to stop.
        while not wait((handle.ready,), timeout=_LOOK_EVERY).done:
            report(latest)
        report(latest)
        # Raises why there is none.
        _ = handle.component
    except BaseException:
        handle.kill(_GRACE)
        raise
    return handle


def _load_of(config: ModelConfig) -> ProcessLoad:
    if config.component is None or config.split_points is None:
        raise InternalError("a process loads components of families", hint="please report this")
    return ProcessLoad(
        config.model_path or registry().family(config.model_type).default_model or "",
        config.split_points,
        config.component,
        config.model_type,
        config.device,
        config.dtype,
        config.strategy,
        config.revision,
        config.cache_dir,
        config.token,
        config.local_files_only,
        config.attn_implementation,
        config.strict,
    )
