"""Prometheus metrics of a manager, read from its snapshots at each scrape.

Needs prometheus-client: ``pip install 'splitlearn-core[metrics]'``. With your own registry::

    registry = CollectorRegistry()
    registry.register(ManagerCollector(manager))

Nothing is counted or stored here: the manager counts, and this module only names the metrics.
"""

from __future__ import annotations

import asyncio
import bisect
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import TYPE_CHECKING, Protocol

from splitlearn_core.errors import ConfigurationError
from splitlearn_core.manager.status import ManagerStatistics, ModelInfo, ModelStatus

if TYPE_CHECKING:
    from prometheus_client import Metric
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

PREFIX = "splitlearn"
#: Seconds that a scrape from another thread waits for the event loop.
_SCRAPE_TIMEOUT = 5.0


class Snapshots(Protocol):
    """The part of a manager that is read; both methods return at once."""

    def list_models(self) -> tuple[ModelInfo, ...]: ...

    def get_statistics(self) -> ManagerStatistics: ...


class LoopLag:
    """The lag of an event loop: a histogram of the delays of a short sleep."""

    #: Upper bounds in seconds, the last one open.
    BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, float("inf"))

    def __init__(self, interval: float = 0.05, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval = interval
        self._clock = clock
        self._counts = [0] * len(self.BOUNDS)
        self._sum = 0.0

    async def run(self) -> None:
        """Measure until cancelled."""
        while True:
            start = self._clock()
            await asyncio.sleep(self._interval)
            self.observe(max(0.0, self._clock() - start - self._interval))

    def observe(self, seconds: float) -> None:
        """Count one lag."""
        self._counts[bisect.bisect_left(self.BOUNDS, seconds)] += 1
        self._sum += seconds

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """Return the cumulative counts by upper bound, and the sum of all lags."""
        total, buckets = 0, []
        for bound, count in zip(self.BOUNDS, self._counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else repr(bound), float(total)))
        return buckets, self._sum


class ManagerCollector:
    """A prometheus_client collector of one manager.

    Args:
        manager: An ``AsyncModelManager``. A scrape reads two snapshots of it, which return at once.
            Create the collector in the manager's event loop, and any thread may scrape.
        lag: The measurement of the event loop's lag, if there is one.

    Raises:
        ConfigurationError: prometheus-client is not installed.
    """

    def __init__(self, manager: Snapshots, lag: LoopLag | None = None) -> None:
        try:
            import prometheus_client.core as families
        except ImportError as error:
            raise ConfigurationError(
                "metrics need the package prometheus-client, which is not installed",
                hint="pip install 'splitlearn-core[metrics]'",
            ) from error
        self._families = families
        self._manager = manager
        self._lag = lag
        self._loop = _running_loop()

    def describe(self) -> Iterable[Metric]:
        """Return nothing: the metrics depend on the models, and registering must not read them."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the present value of every metric."""
        statistics, models = self._read()
        yield from self._counted(statistics)
        yield from self._memory(statistics)
        yield from self._states(statistics, models)
        yield from self._models(models)
        yield from self._progress(models)
        if self._lag is not None:
            buckets, total = self._lag.buckets()
            family = self._families.HistogramMetricFamily(
                f"{PREFIX}_event_loop_lag_seconds", "By how much the event loop was late"
            )
            family.add_metric([], buckets, total)
            yield family

    def _read(self) -> tuple[ManagerStatistics, tuple[ModelInfo, ...]]:
        """Read both snapshots in the manager's own thread, whichever thread scrapes."""
        if self._loop is None or self._loop.is_closed() or self._loop is _running_loop():
            return self._manager.get_statistics(), self._manager.list_models()
        both: Future[tuple[ManagerStatistics, tuple[ModelInfo, ...]]] = Future()
        self._loop.call_soon_threadsafe(
            lambda: both.set_result((self._manager.get_statistics(), self._manager.list_models()))
        )
        return both.result(_SCRAPE_TIMEOUT)

    def _counted(self, statistics: ManagerStatistics) -> Iterator[Metric]:
        yield self._counter("loads_started", "Loads that were requested", [((), statistics.loads_started)])
        yield self._counter(
            "loads",
            "Loads that ended, by how",
            [
                (("succeeded",), statistics.loads_succeeded),
                (("failed",), statistics.loads_failed),
                (("cancelled",), statistics.loads_cancelled),
            ],
            "outcome",
        )
        for name, text, value in (
            ("loads_joined", "Callers that joined a load on its way", statistics.joined),
            ("unloads", "Models that were unloaded", statistics.unloads),
            ("evictions", "Models that were unloaded to make room", statistics.evictions),
            ("expirations", "Models that were unloaded because they were idle", statistics.expirations),
            ("failures_forgotten", "Failed models that are no longer listed", statistics.failures_forgotten),
            ("hosts_died", "Processes of models that ended without a request", statistics.hosts_died),
            ("restarts", "Models that were started again because their process had died", statistics.restarts),
            ("leases_taken", "Leases that were taken", statistics.leases),
            ("calls", "Calls of models that were started", statistics.calls),
            ("calls_failed", "Calls of models that raised", statistics.calls_failed),
            ("calls_rejected", "Calls that were rejected because the queue was full", statistics.calls_rejected),
        ):
            yield self._counter(name, text, [((), value)])

    def _memory(self, statistics: ManagerStatistics) -> Iterator[Metric]:
        ledgers = statistics.ledgers.items()
        for name, text in (
            ("capacity", "Bytes that all models together may take"),
            ("charged", "Bytes of models that are loaded, or stuck"),
            ("reserved", "Bytes that are reserved for loads in progress"),
        ):
            samples = [((ledger,), getattr(values, name)) for ledger, values in ledgers]
            yield self._gauge(f"memory_{name}_bytes", text, samples, "ledger")

    def _states(self, statistics: ManagerStatistics, models: tuple[ModelInfo, ...]) -> Iterator[Metric]:
        states = [((str(status),), statistics.models.get(status, 0)) for status in ModelStatus]
        yield self._gauge("models", "Models by status", states, "status")
        stalled = sum(model.stalled_for is not None for model in models)
        yield self._gauge("loads_stalled", "Loads that make no progress", [((), stalled)])
        waiting = sum(model.status in (ModelStatus.QUEUED, ModelStatus.WAITING) for model in models)
        yield self._gauge("loads_waiting", "Loads that wait for a worker or for room", [((), waiting)])
        yield self._gauge("workers_stuck", "Workers that did not come back", [((), len(statistics.stuck))])
        yield self._gauge("uptime_seconds", "Seconds since the manager was made", [((), statistics.uptime)])

    def _models(self, models: tuple[ModelInfo, ...]) -> Iterator[Metric]:
        facts = [
            ((model.model_id, model.model_type, model.component or "", model.device, model.dtype), 1)
            for model in models
        ]
        yield self._gauge(
            "model_info", "What a model is; always 1", facts, "model_id", "model_type", "component", "device", "dtype"
        )
        ledgers = [((model.model_id, ledger), count) for model in models for ledger, count in model.predicted.items()]
        yield self._gauge(
            "model_memory_predicted_bytes", "Bytes that a model takes, by its plan", ledgers, "model_id", "ledger"
        )
        values: tuple[tuple[str, str, Callable[[ModelInfo], float | None]], ...] = (
            ("model_ready", "1 if a model can be leased", lambda model: model.ready),
            ("model_required", "1 if readiness needs the model", lambda model: model.required),
            ("model_leases", "Leases of a model that have not ended", lambda model: model.leases),
            ("model_waiters", "Callers that wait for a model", lambda model: model.waiters),
            ("model_memory_measured_bytes", "Anonymous bytes that loading took", lambda model: model.measured),
            ("model_load_duration_seconds", "Seconds from request to ready", lambda model: model.load_seconds),
            ("model_ready_timestamp_seconds", "When a model became ready", lambda model: model.ready_at),
            ("model_last_used_timestamp_seconds", "When a model was last used", lambda model: model.last_used_at),
            ("model_expires_timestamp_seconds", "When an idle model is unloaded", lambda model: model.expires_at),
            (
                "model_consecutive_failures",
                "Attempts in a row that failed",
                lambda model: model.error.consecutive if model.error else 0,
            ),
        )
        for name, text, value in values:
            yield self._per_model(name, text, models, value)

    def _progress(self, models: tuple[ModelInfo, ...]) -> Iterator[Metric]:
        loading = tuple(model for model in models if model.status.is_loading)
        yield self._per_model(
            "model_load_done_bytes", "Bytes of the stage that are done", loading, lambda model: model.bytes_done
        )
        yield self._per_model(
            "model_load_expected_bytes", "Bytes of the stage in all", loading, lambda model: model.bytes_total
        )
        yield self._per_model(
            "model_load_stalled_seconds", "Seconds without a byte", loading, lambda model: model.stalled_for
        )

    def _per_model(
        self, name: str, text: str, models: Iterable[ModelInfo], value: Callable[[ModelInfo], float | None]
    ) -> Metric:
        samples = [((model.model_id,), number) for model in models if (number := value(model)) is not None]
        return self._gauge(name, text, samples, "model_id")

    def _gauge(self, name: str, text: str, samples: Iterable[tuple[tuple[str, ...], float]], *labels: str) -> Metric:
        return _filled(self._families.GaugeMetricFamily(f"{PREFIX}_{name}", text, labels=labels), samples)

    def _counter(self, name: str, text: str, samples: Iterable[tuple[tuple[str, ...], float]], *labels: str) -> Metric:
        # The client appends _total.
        return _filled(self._families.CounterMetricFamily(f"{PREFIX}_{name}", text, labels=labels), samples)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _filled(
    family: GaugeMetricFamily | CounterMetricFamily, samples: Iterable[tuple[tuple[str, ...], float]]
) -> Metric:
    for labels, value in samples:
        family.add_metric(labels, float(value))
    return family
