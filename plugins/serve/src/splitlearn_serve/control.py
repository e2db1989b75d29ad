"""The operations behind the routes: configurations, loads in the background, and snapshots."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from splitlearn_core import (
    AsyncModelManager,
    CapacityError,
    ConfigurationError,
    Health,
    LoadCancelledError,
    ManagerClosedError,
    ModelConfig,
    ModelInfo,
    ModelStatus,
    SplitLearnError,
    UnknownModelError,
)
from splitlearn_serve.answers import RequestError, encode, error_json, model_json
from splitlearn_serve.permissions import RequestRules
from splitlearn_serve.traffic import TrafficTable

log = logging.getLogger(__name__)

#: Seconds for which a snapshot is reused.
_FRESH = 0.2
#: Configurations of requests that are kept, in addition to those of listed models.
_REMEMBERED = 256


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The content of the page, as JSON."""

    #: Without times, so that it changes only when something has happened.
    content: bytes
    #: With the time of the snapshot.
    document: bytes


class Control:
    """A manager, and the configurations that it has loaded or may load.

    Args:
        manager: Runs in the event loop of the server.
        configs: The models that can be loaded by their id alone.
        rules: What else may be loaded; by default public models on the Hub, and what the configurations name.
    """

    def __init__(
        self, manager: AsyncModelManager, configs: Iterable[ModelConfig] = (), rules: RequestRules | None = None
    ) -> None:
        self.manager = manager
        #: Set once no more work is accepted.
        self.closing = asyncio.Event()
        #: Set once no more events follow.
        self.ended = asyncio.Event()
        #: What sessions on the models have done.
        self.traffic = TrafficTable()
        #: Called before a model is unloaded by force, to end what holds it.
        self.before_unload: Callable[[str], Awaitable[None]] | None = None
        self._configs = {config.model_id: config for config in configs}
        self._in_file = frozenset(self._configs)
        self._rules = rules or RequestRules.of({}, self._configs.values())
        #: Model -> why its last load was refused before it began; the manager does not keep that.
        self._refusals: dict[str, dict[str, Any]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._snapshot: Snapshot | None = None
        self._taken_at = float("-inf")

    # --- queries ----------------------------------------------------------------------------------

    def health(self) -> Health:
        """Return the manager's health; not ready while the server closes."""
        health = self.manager.health()
        if self.closing.is_set():
            return Health(health.live, False, health.missing, health.reason or "the server is closing")
        return health

    def not_loaded(self) -> list[dict[str, Any]]:
        """Return the configured models that the manager does not list."""
        listed = {info.model_id for info in self.manager.list_models()}
        return [
            {
                "model_id": config.model_id,
                "model_type": config.model_type,
                "component": config.component,
                "required": config.required,
                "in_file": config.model_id in self._in_file,
                "error": self._refusals.get(config.model_id),
            }
            for config in self._configs.values()
            if config.model_id not in listed
        ]

    def snapshot(self, *, fresh: bool = False) -> Snapshot:
        """Return the content of the page, at most 0.2 s old; made now if ``fresh``."""
        now = time.monotonic()
        if self._snapshot is None or fresh or now - self._taken_at > _FRESH:
            self._snapshot, self._taken_at = self._take_snapshot(), now
        return self._snapshot

    def _take_snapshot(self) -> Snapshot:
        statistics = self.manager.get_statistics().to_dict()
        uptime = statistics.pop("uptime")
        statistics["stuck"] = sorted(statistics["stuck"])  # the stacks are for /api/statistics
        content = encode(
            {
                "models": [
                    {**model_json(info), "sessions": self.traffic.get(info.model_id)}
                    for info in self.manager.list_models()
                ],
                "not_loaded": self.not_loaded(),
                "health": self.health().to_dict(),
                "statistics": statistics,
            }
        )
        return Snapshot(content, encode({"now": time.time(), "uptime": uptime})[:-1] + b"," + content[1:])

    def is_moving(self) -> bool:
        """Whether the snapshot changes without events, because a model is loading."""
        return any(info.status.is_loading for info in self.manager.list_models())

    def info(self, model_id: str) -> ModelInfo:
        """Return a model that is listed.

        Raises:
            UnknownModelError: It is not listed; the message says if it is configured.
        """
        try:
            return self.manager.get_model_info(model_id)
        except UnknownModelError:
            if model_id not in self._configs:
                raise
            raise UnknownModelError(
                f"model {model_id!r} is configured, and not loaded", hint="load_model() loads it"
            ) from None

    def known(self, model_id: str) -> ModelConfig | None:
        """Return the configuration of a model that is loaded or can be loaded by its id; None if there is none."""
        with contextlib.suppress(UnknownModelError):
            return self._config_of(model_id)
        return None

    @property
    def has_several_trunks(self) -> bool:
        """Whether one of its trunks may be followed by another one."""
        return sum(map(is_trunk, self._configs.values())) > 1

    def story(self, model_id: str) -> list[dict[str, Any]]:
        """Return the last events of a model.

        Raises:
            UnknownModelError: There is no such model, and its events are no longer kept.
        """
        events = [event.to_dict() for event in self.manager.story(model_id)]
        if not events and model_id not in self._configs:
            self.manager.get_model_info(model_id)
        return events

    # --- operations -------------------------------------------------------------------------------

    def parse(self, body: Any) -> ModelConfig:
        """Parse the body of a request as a configuration.

        Raises:
            ConfigurationError: It is invalid, or not permitted over HTTP; all reasons are listed.
        """
        if not isinstance(body, Mapping):
            raise ConfigurationError("the body must be a JSON object: the fields of a model's configuration")
        refusals = self._rules.refusals(body)
        if refusals:
            raise ConfigurationError(
                "this is not done over HTTP:\n  " + "\n  ".join(refusals),
                hint="put the model into the configuration file of `splitlearn serve`",
            )
        return ModelConfig.from_dict(body)

    async def load(self, config: ModelConfig, *, wait: bool) -> ModelInfo:
        """Load a model for a request; without ``wait``, return once the load is accepted.

        Raises:
            ConfigurationError: The rules do not permit it.
            SplitLearnError: The manager refuses it or, with ``wait``, the load failed.
        """
        self._refuse_when_closing()
        return await self._load(await self._permitted(config), wait=wait)

    async def load_known(self, model_id: str, *, wait: bool) -> ModelInfo:
        """Load a model by its id alone: one of the configuration file, or one that was loaded before.

        Raises:
            UnknownModelError: No configuration of this id is known.
        """
        return await self._load(self._config_of(model_id), wait=wait)

    async def reload(self, model_id: str, config: ModelConfig | None, *, wait: bool) -> ModelInfo:
        """Reload a model; the old one serves until the new one is ready."""
        self._refuse_when_closing()
        if config is not None and config.model_id != model_id:
            raise ConfigurationError(f"model_id {config.model_id!r} is not the {model_id!r} of the address")
        self.info(model_id)
        if config is not None:
            config = await self._permitted(config)
        return await self._begin(self.manager.reload_model(model_id, config), model_id, config, wait=wait)

    async def unload(self, model_id: str, *, force: bool, patience: float | None) -> dict[str, Any]:
        """Unload a model, and report the released memory; forget a failed or merely remembered one."""
        listed = {info.model_id: info.status for info in self.manager.list_models()}
        self.remember(model_id)
        if listed.get(model_id, ModelStatus.FAILED) is ModelStatus.FAILED and model_id not in self._in_file:
            remembered = self._configs.pop(model_id, None)
            self._refusals.pop(model_id, None)
            if remembered is not None and model_id not in listed:
                return {"model_id": model_id, "released": {}, "measured": None, "broken_leases": 0}
        self.info(model_id)
        if force and self.before_unload is not None:
            await self.before_unload(model_id)
        report = await self.manager.unload_model(model_id, force=force, timeout=patience)
        return {
            "model_id": report.model_id,
            "released": dict(report.released),
            "measured": report.measured,
            "broken_leases": report.broken_leases,
        }

    async def cancel(self, model_id: str) -> None:
        """Cancel the load of a model."""
        self.remember(model_id)
        await self.manager.cancel_load(model_id)

    def load_configured(self) -> None:
        """Start loading every configured model; a failure is recorded and does not stop the others."""
        for config in self._configs.values():
            self._spawn(self.manager.ensure_model(config), config.model_id)

    def remember(self, model_id: str) -> None:
        """Keep the configuration of a model that is unloaded, so that its id is enough to load it again."""
        if model_id not in self._configs:
            try:
                self._configs[model_id] = self.manager.get_model(model_id).config
            except UnknownModelError:
                return

    async def end(self) -> None:
        """Stop waiting for loads; the manager ends them itself."""
        self.ended.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _permitted(self, config: ModelConfig) -> ModelConfig:
        return await asyncio.to_thread(self._rules.permitted, config)

    async def _load(self, config: ModelConfig, *, wait: bool) -> ModelInfo:
        self._refuse_when_closing()
        return await self._begin(self.manager.load_model(config), config.model_id, config, wait=wait)

    def _keep(self, config: ModelConfig) -> None:
        """Keep a configuration; of those neither in the file nor listed, keep only the newest."""
        self._configs.pop(config.model_id, None)
        self._configs[config.model_id] = config
        needed = {*self._in_file, *(info.model_id for info in self.manager.list_models())}
        for model_id in [name for name in self._configs if name not in needed][:-_REMEMBERED]:
            del self._configs[model_id]
            self._refusals.pop(model_id, None)
            self.traffic.forget(model_id)

    def _config_of(self, model_id: str) -> ModelConfig:
        self.remember(model_id)
        if model_id not in self._configs:
            raise UnknownModelError(
                f"no model {model_id!r} is configured or loaded",
                hint=f"these are: {', '.join(sorted(self._configs)) or 'none'}; "
                "another one needs a configuration, in the file or sent to POST /api/models",
            )
        return self._configs[model_id]

    def _refuse_when_closing(self) -> None:
        if self.closing.is_set():
            raise ManagerClosedError("the server is closing and takes no more work")

    def _spawn(self, work: Coroutine[Any, Any, Any], model_id: str) -> asyncio.Task[Any]:
        task = asyncio.create_task(work, name=f"load {model_id}")
        self._tasks.add(task)
        task.add_done_callback(partial(self._done, model_id))
        return task

    def _done(self, model_id: str, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()
        self._refusals.pop(model_id, None)
        if error is None:
            return
        if not isinstance(error, SplitLearnError):
            log.error("Loading %s ended with an internal error", model_id, exc_info=error)
        elif model_id in self._configs and not isinstance(error, LoadCancelledError) and not self._is_listed(model_id):
            # The manager keeps the failure of a load, but not the refusal to begin one.
            self._refusals[model_id] = error_json(error)
            log.warning("%s is not loaded: %s", model_id, error.message)

    def _is_listed(self, model_id: str) -> bool:
        return any(info.model_id == model_id for info in self.manager.list_models())

    async def _begin(
        self, work: Coroutine[Any, Any, Any], model_id: str, config: ModelConfig | None, *, wait: bool
    ) -> ModelInfo:
        """Start a load, and return once it is done or, without ``wait``, accepted; raises its error."""
        task = self._spawn(work, model_id)
        # The manager refuses or accepts before it waits for anything.
        await asyncio.sleep(0)
        if task.done():
            await self._finished(task, model_id)
        if config is not None:
            self._keep(config)
        if wait:
            await self._finished(task, model_id)
        return self.manager.get_model_info(model_id)

    async def _finished(self, task: asyncio.Task[Any], model_id: str) -> None:
        try:
            # The load goes on if the client that requested it leaves.
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.cancelled():
                raise
            # The server has stopped waiting, not the client.
            raise ManagerClosedError("the server is closing and waits for no load") from None
        except CapacityError as error:
            # Only the record of the failure says whether a retry can succeed.
            failures = [info.error for info in self.manager.list_models() if info.model_id == model_id]
            if any(failure is not None and not failure.retryable for failure in failures):
                raise RequestError.for_good(error) from error
            raise


def is_trunk(config: ModelConfig) -> bool:
    """Whether a model is a component that can be used remotely."""
    return config.is_family and (config.component or "").startswith("trunk")
