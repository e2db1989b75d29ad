"""The public interface of the manager.

It turns each request into an event for the machine, and waits for the result. The ``shell`` passes
events and carries out effects.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import partial
from types import TracebackType
from typing import Literal, Self

from splitlearn_core.errors import ConfigurationError, DrainTimeoutError, LoadStalledError, UnknownModelError
from splitlearn_core.manager import messages as m
from splitlearn_core.manager.config import ModelConfig
from splitlearn_core.manager.config_checks import is_amount, limit_problems, show
from splitlearn_core.manager.handles import AsyncManagedModel, EventStream, LoadingPlaceholder
from splitlearn_core.manager.loaders.loader import ModelLoader
from splitlearn_core.manager.machine import Limits
from splitlearn_core.manager.resources import ResourceManager
from splitlearn_core.manager.shell import Shell
from splitlearn_core.manager.status import (
    FailureInfo,
    Health,
    ManagerEvent,
    ManagerStatistics,
    ModelInfo,
    ModelStatus,
    UnloadReport,
    fresh,
)
from splitlearn_core.manager.workers import CallPool
from splitlearn_core.plugins.registry import registry
from splitlearn_core.types import MEGABYTE

_NO_KEY: m.Key = ("", 0)


class AsyncModelManager:
    """Loads, monitors, leases and unloads the models that the installed plugins support.

    ::

        async with AsyncModelManager(max_memory_mb=8000) as manager:
            await manager.load_model(ModelConfig(
                model_id="trunk", model_type="gpt2", model_path="bundled:gpt2",
                component="trunk", split_points=(1, 5),
            ))
            async with manager.lease("trunk") as trunk:
                hidden = await trunk(hidden_states=hidden)

    Use it from one event loop. Importing torch and transformers stalls the loop, in any thread:
    call :func:`splitlearn_core.preload` before the loop starts serving.

    Args:
        max_models: Models that are loaded or loading at once; None for no limit.
        max_memory_mb: Memory that all of them together may take, mapped files and devices included, in
            units of 2**20 bytes; None for all memory of the machine.
        headroom_mb: Memory of the machine that is left free, in the same units.
        max_workers: Loads at once.
        call_workers: Threads that run models.
        calls_per_model: Calls of one model at once.
        call_queue: Calls of one model that may wait; another one raises BusyError.
        load_threads: Threads that torch may use in a load; None for torch's default.
        call_threads: The same for each thread that runs models.
        when_full: What to do with a load that does not fit even after evicting idle models: ``wait``, or
            ``refuse`` it with the numbers.
        wait_timeout: Seconds that a load may wait for a worker and for memory; None for no limit.
        stall_after: Seconds without progress after which a load is shown as stalled.
        stall_timeout: Seconds without progress after which it is cancelled; None for never.
        cancel_grace: Seconds that a worker has to stop before it counts as stuck.
        drain_timeout: Seconds that an unload waits for leases to end; None for no limit.
        close_timeout: Seconds in which :meth:`close` ends.
        keep_alive: Seconds of idleness after which a model is unloaded, unless its configuration
            says otherwise; None for never.
        min_residency: Seconds that a model stays loaded at least, idle or not.
        max_failed: How many failed models stay listed with the reason: the newest. Older ones are dropped, and
            counted in ``get_statistics().failures_forgotten``.
        required: Models without which the manager is not ready, in addition to those whose configuration
            says so.
        loader, resources: Replacements for the default ones.
        clock: Returns seconds, monotonically.

    Raises:
        ConfigurationError: Limits are invalid; all of them are listed.
    """

    def __init__(
        self,
        *,
        max_models: int | None = None,
        max_memory_mb: float | None = None,
        headroom_mb: float = 512,
        max_workers: int = 2,
        call_workers: int = 2,
        calls_per_model: int = 1,
        call_queue: int = 64,
        load_threads: int | None = None,
        call_threads: int | None = None,
        when_full: Literal["wait", "refuse"] = "wait",
        wait_timeout: float | None = 600.0,
        stall_after: float = 10.0,
        stall_timeout: float | None = 300.0,
        cancel_grace: float = 10.0,
        drain_timeout: float | None = 30.0,
        close_timeout: float = 30.0,
        keep_alive: float | None = None,
        min_residency: float = 5.0,
        max_failed: int = 100,
        required: Iterable[str] = (),
        loader: ModelLoader | None = None,
        resources: ResourceManager | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # First of all, so that the arguments are the only local variables.
        problems = limit_problems(locals())
        if problems:
            raise ConfigurationError(
                "the limits of the manager are invalid:\n  " + "\n  ".join(problems),
                hint="each is documented in splitlearn_core.AsyncModelManager",
            )
        limits = Limits(
            max_models=max_models,
            max_memory=None if max_memory_mb is None else int(max_memory_mb * MEGABYTE),
            max_workers=max_workers,
            max_stuck=2 * max_workers,
            when_full=when_full,
            wait_timeout=wait_timeout,
            stall_after=stall_after,
            stall_timeout=stall_timeout,
            cancel_grace=cancel_grace,
            min_residency=min_residency,
            max_failed=max_failed,
        )
        self._shell = Shell(
            limits,
            loader or ModelLoader(call_threads),
            resources or ResourceManager(headroom=int(headroom_mb * MEGABYTE)),
            CallPool(call_workers, call_threads),
            call_limits=(calls_per_model, call_queue),
            load_threads=load_threads,
            clock=clock,
        )
        self._shell.always_required = frozenset(required)
        self._shell.required.update(self._shell.always_required)
        self._drain_timeout, self._close_timeout = drain_timeout, close_timeout
        self._keep_alive = keep_alive
        self._closing: asyncio.Task[None] | None = None
        self._entered = False

    # --- loading --------------------------------------------------------------------------------

    async def load_model(self, config: ModelConfig) -> AsyncManagedModel:
        """Load a model, and return it once it is ready.

        It is listed from the moment of the call. Cancelling the caller does not cancel the load:
        :meth:`cancel_load` does.

        Raises:
            DuplicateModelError: The id is loaded or loading (a ValueError); nothing has changed.
            UnknownModelTypeError: No plugin provides the model type (a KeyError).
            ManagerClosedError: The manager is closed.
            SplitLearnError: The load failed; the model is then listed as failed.
        """
        return await self._load(config, join=False)

    async def ensure_model(self, config: ModelConfig) -> AsyncManagedModel:
        """Return the model if it is ready, wait for it if it is loading, load it otherwise.

        Any number of callers share one load; each can be cancelled without affecting the others.

        Raises:
            DuplicateModelError: The id belongs to another configuration (a ValueError).
            SplitLearnError: As :meth:`load_model`; each caller gets its own exception.
        """
        return await self._load(config, join=True)

    async def reload_model(self, model_id: str, config: ModelConfig | None = None) -> AsyncManagedModel:
        """Load a model again; the old one stays in service until the new one is ready.

        Leases of the old one continue; later leases get the new one. If loading fails, the old one stays
        in service, and its ``info.error`` says why.

        Args:
            model_id: A model that is ready, or failed.
            config: Its new configuration; by default the old one.

        Raises:
            UnknownModelError: There is no such model (a KeyError).
            DuplicateModelError: It is already loading.
            ModelNotReadyError: It is being unloaded.
        """
        current = self._shell.machine.visible(model_id)
        config = config or self._shell.slots[current.key].config
        if config.model_id != model_id:
            raise ConfigurationError(
                f"the configuration is of model {config.model_id!r}, not of {model_id!r}",
                hint="a reload keeps the id",
            )
        return await self._load(config, reload=True)

    async def cancel_load(self, model_id: str) -> None:
        """Stop a load, and return once its worker has freed everything.

        Raises:
            UnknownModelError: There is no such model.
            ModelNotReadyError: It is not loading.
            LoadStalledError: The worker did not stop in time (a TimeoutError): the model is shown
                as stuck, and its memory counts as taken until the worker ends.
        """
        loading = self._shell.machine.coming(model_id)
        self._shell.dispatch(m.CancelRequested(self._shell.clock(), model_id))
        if loading is None or (slot := self._shell.slots.get(loading.key)) is None:
            return
        await asyncio.shield(slot.resolved)
        # A closing manager does not wait until the worker counts as stuck.
        if self._shell.machine.find(loading.key) and loading.status in (ModelStatus.STUCK, ModelStatus.CANCELLING):
            raise LoadStalledError(
                f"the worker that loads {model_id!r} does not stop",
                hint="get_statistics().stuck shows its stack; its memory stays taken until it ends",
            )

    async def _load(self, config: ModelConfig, *, join: bool = False, reload: bool = False) -> AsyncManagedModel:
        shell = self._shell
        shell.bind()
        if not isinstance(config, ModelConfig):
            raise ConfigurationError(
                f"a {type(config).__name__} was given instead of a ModelConfig",
                hint="ModelConfig.from_dict(mapping) makes one",
            )
        # First of all, because a missing plugin is an error of the caller, not of a load.
        config.check_installed()
        request = self._request_of(config)
        key = _NO_KEY

        def take_place() -> None:
            nonlocal key
            # A request for a model in service does not wait for a reload of it.
            key = shell.machine.wanted(config.model_id, reload=reload).key
            if key not in shell.slots:
                shell.add_slot(key, config)
                if config.required:
                    shell.required.add(config.model_id)

        shell.dispatch(m.LoadRequested(shell.clock(), config.model_id, request, join=join, reload=reload), take_place)
        generation = shell.machine.find(key)
        if generation is not None and generation.status is ModelStatus.READY and not reload:
            return shell.model_of(key)
        return await shell.wait(key)

    def _request_of(self, config: ModelConfig) -> m.LoadRequest:
        keep = self._keep_alive if config.keep_alive is None else config.keep_alive
        return m.LoadRequest(
            model_type=config.model_type,
            component=config.component,
            device=config.device,
            fingerprint=config.fingerprint,
            keep_alive=None if keep is None or math.isinf(keep) else keep,
            pinned=config.pinned,
            required=config.required or config.model_id in self._shell.required,
            allow_paging=config.allow_paging,
            warmup=config.warmup,
            host=config.host,
            restart_limit=config.restart_limit,
        )

    # --- unloading and closing ------------------------------------------------------------------

    async def unload_model(self, model_id: str, *, force: bool = False, timeout: float | None = None) -> UnloadReport:  # noqa: ASYNC109  # limits the drain, not the call
        """Unload a model once it has no leases, and report the freed memory; remove one that failed.

        Args:
            model_id: The model.
            force: Do not wait for leases: the next call under them raises ModelGoneError. A running call
                cannot be stopped; the unload ends when it does.
            timeout: Seconds to wait for leases to end, or with force for calls; by default the manager's
                ``drain_timeout``.

        Raises:
            UnknownModelError: There is no such model (a KeyError).
            ModelNotReadyError: It is loading (see :meth:`cancel_load`), or already being unloaded.
            DrainTimeoutError: Leases did not end in time (a TimeoutError); it stays in service. With force: a
                call still runs, and the memory is freed when it ends.
            SplitLearnError: Its memory could not be freed: it is shown as stuck.
        """
        self._shell.bind(closed_too=True)
        slot = self._shell.slots.get(self._shell.machine.visible(model_id).key)
        if timeout is not None and not is_amount(timeout):
            raise ConfigurationError(f"timeout is {show(timeout)}; a number of seconds from 0 is needed")
        limit = self._drain_timeout if timeout is None else timeout
        ended: asyncio.Future[UnloadReport | int | FailureInfo] = asyncio.get_running_loop().create_future()
        event = m.UnloadRequested(self._shell.clock(), model_id, force, limit)
        self._shell.dispatch(event, None if slot is None else partial(slot.unloads.append, ended))
        try:
            # The machine limits the drain; a running call has no limit of its own.
            async with asyncio.timeout(limit if force else None):
                outcome = await asyncio.shield(ended)
        except TimeoutError:
            raise DrainTimeoutError(
                f"model {model_id!r} has no more leases, but a call still runs after {limit:g} s",
                hint="its memory is taken until the call ends",
            ) from None
        if isinstance(outcome, int):
            raise DrainTimeoutError(
                f"model {model_id!r} stays loaded: {outcome} lease{'s' * (outcome != 1)} left after {limit:g} s",
                hint="unload_model(id, force=True) does not wait for leases to end",
            )
        if isinstance(outcome, FailureInfo):
            raise fresh(outcome)
        return outcome

    async def close(self, timeout: float | None = None) -> None:  # noqa: ASYNC109  # it ends in time, finished or not
        """Accept no more work, cancel loads, unload all models, and end within the time limit.

        May be called again, and concurrently: all callers wait for the same end. Leases have four
        fifths of the time to end. Workers that do not stop are logged with their stacks; they are daemon
        threads, and do not keep the process from ending.

        Args:
            timeout: Seconds; by default the manager's ``close_timeout``.
        """
        self._shell.bind(closed_too=True)
        if self._closing is None:
            limit = self._close_timeout if timeout is None else timeout
            self._closing = asyncio.get_running_loop().create_task(self._shell.close(limit), name="splitlearn-close")
        await asyncio.shield(self._closing)

    async def __aenter__(self) -> Self:
        self._shell.bind()
        if self._entered:
            raise ConfigurationError(
                "this manager was already entered, and the end of that `async with` closes it",
                hint="enter it once and pass it on, or make one manager for each",
            )
        self._entered = True
        try:
            # The first listing of the installed plugins reads dozens of files.
            await self._shell.in_thread("splitlearn-plugins", lambda: registry().model_types())
        except BaseException:
            # There will be no __aexit__, so everything that was started is ended here.
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    # --- lending --------------------------------------------------------------------------------

    @asynccontextmanager
    async def lease(self, model_id: str, *, gradients: bool = False) -> AsyncIterator[AsyncManagedModel]:
        """Borrow a model: it is neither freed nor evicted before the block ends.

        If the model is loading, this waits for it.

        Args:
            model_id: The model.
            gradients: Whether its calls record gradients, for training, whatever the caller's mode is. Other
                leases of the model are independent of it.

        Raises:
            UnknownModelError: There is no such model (a KeyError).
            ModelNotReadyError: It has failed, or is being unloaded.
            SplitLearnError: The load that this waited for failed.
        """
        self._shell.bind()
        # Between the end of a load and this task's turn the model may be unloaded, hence the loop.
        while (generation := self._shell.machine.visible(model_id)).is_loading:
            await self._shell.wait_for(generation.key)
        key = generation.key
        self._shell.dispatch(m.LeaseTaken(self._shell.clock(), model_id))
        try:
            model = self._shell.model_of(key)
            yield model.with_gradients() if gradients else model
        finally:
            self._shell.dispatch(m.LeaseReleased(self._shell.clock(), key))

    # --- without waiting ------------------------------------------------------------------------

    def get_model(self, model_id: str) -> AsyncManagedModel | LoadingPlaceholder:
        """Return a model if it is loaded, else its placeholder; see :meth:`lease` to use it.

        Raises:
            UnknownModelError: There is no such model (a KeyError).
        """
        slot = self._shell.slots[self._shell.machine.visible(model_id).key]
        return slot.model or slot.placeholder

    def list_models(self) -> tuple[ModelInfo, ...]:
        """Return a snapshot of every model that is loaded, loading, failed or being unloaded."""
        return self._shell.machine.infos()

    def get_model_info(self, model_id: str) -> ModelInfo:
        """Return the snapshot of one model; UnknownModelError (a KeyError) if there is none."""
        return self._shell.machine.info(model_id)

    def get_statistics(self) -> ManagerStatistics:
        """Return the manager's memory and counters."""
        return ManagerStatistics(
            models=self._shell.machine.counts(),
            ledgers=self._shell.machine.ledgers(),
            **asdict(self._shell.machine.counters),
            calls=self._shell.calls,
            calls_failed=self._shell.calls_failed,
            calls_rejected=self._shell.calls_rejected,
            stuck=self._shell.stuck_stacks(),
            uptime=self._shell.clock() - self._shell.started,
        )

    def health(self) -> Health:
        """Return whether the process is alive, which no load can change, and whether the required models are ready."""
        dead = self._shell.has_stopped_ticking
        reason = "the manager is closed" if self._shell.machine.closed else "its ticker has ended" if dead else ""
        missing: dict[str, str] = {}
        for model_id in sorted(self._shell.required):
            try:
                info = self.get_model_info(model_id)
            except UnknownModelError:
                missing[model_id] = "not loaded"
                continue
            if info.status is not ModelStatus.READY:
                missing[model_id] = f"{info.status}: {info.error.message}" if info.error else str(info.status)
        return Health(live=not reason, ready=not reason and not missing, missing=missing, reason=reason)

    def events(self) -> EventStream:
        """Follow the changes from now on: ``async for event in manager.events()``. Ends with the manager.

        A reader that falls more than 1024 events behind misses the oldest; ``event.sequence`` then
        has a gap. A stream that is no longer referenced is dropped.
        """
        return self._shell.history.follow()

    def story(self, model_id: str) -> tuple[ManagerEvent, ...]:
        """Return the last changes of one model, oldest first; some are kept after it is gone."""
        return self._shell.history.of(model_id)
