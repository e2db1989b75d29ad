"""Statistics of the sessions on each model, for the page, JSON and metrics."""

from __future__ import annotations

import bisect
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

#: Upper bounds of the seconds of a step.
BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, math.inf)
#: Seconds over which steps per second are counted, and the maximum number of remembered steps.
_WINDOW, _REMEMBERED = 10.0, 8192


@dataclass(slots=True, eq=False)
class Traffic:
    """The counts of one model."""

    clock: Callable[[], float] = time.monotonic
    #: Sessions and connections that are open, and bytes of caches that are reserved for the sessions.
    open: int = 0
    connections: int = 0
    cache_bytes: int = 0
    opened: int = 0
    expired: int = 0
    steps: int = 0
    waiting_seconds: float = 0.0
    computing_seconds: float = 0.0
    bytes_received: int = 0
    bytes_sent: int = 0
    #: Code -> number of errors that were answered.
    refused: Counter[str] = field(default_factory=Counter)
    counts: list[int] = field(default_factory=lambda: [0] * len(BOUNDS))
    _recent: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))

    def stepped(self, waited: float, computed: float) -> None:
        """Count a step."""
        self.steps += 1
        self.waiting_seconds += waited
        self.computing_seconds += computed
        self.counts[bisect.bisect_left(BOUNDS, computed)] += 1
        self._recent.append(self.clock())

    @property
    def steps_per_second(self) -> float:
        """Steps per second in the last seconds."""
        since = self.clock() - _WINDOW
        while self._recent and self._recent[0] < since:
            self._recent.popleft()
        return len(self._recent) / _WINDOW

    def to_dict(self) -> dict[str, Any]:
        """Return the counts as plain values."""
        return {
            "open": self.open,
            "connections": self.connections,
            "cache_bytes": self.cache_bytes,
            "opened": self.opened,
            "expired": self.expired,
            "steps": self.steps,
            "steps_per_second": round(self.steps_per_second, 1),
            "waiting_seconds": round(self.waiting_seconds, 3),
            "computing_seconds": round(self.computing_seconds, 3),
            "bytes_received": self.bytes_received,
            "bytes_sent": self.bytes_sent,
            "refused": dict(self.refused),
        }


class TrafficTable:
    """The traffic of each model that was ever used; its ids are those of configurations."""

    def __init__(self) -> None:
        self._of: dict[str, Traffic] = {}

    def of(self, model_id: str) -> Traffic:
        """Return the traffic of one model."""
        return self._of.setdefault(model_id, Traffic())

    def get(self, model_id: str) -> dict[str, Any] | None:
        """Return the counts of a model as plain values; None if it was never used."""
        traffic = self._of.get(model_id)
        return None if traffic is None else traffic.to_dict()

    def forget(self, model_id: str) -> None:
        """Drop the counts of a model that is no longer known, unless it is in use."""
        traffic = self._of.get(model_id)
        if traffic is not None and not traffic.connections:
            del self._of[model_id]

    def items(self) -> list[tuple[str, Traffic]]:
        return sorted(self._of.items())


class TrafficCollector:
    """A prometheus_client collector of a table of traffic; scraped in the event loop."""

    def __init__(self, table: TrafficTable) -> None:
        self._table = table

    def describe(self) -> Iterable[Metric]:
        """Return nothing: the metrics depend on the models."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the present value of every metric."""
        models = self._table.items()
        gauges: tuple[tuple[str, str, Callable[[Traffic], float]], ...] = (
            ("sessions_open", "Sessions that are open", lambda traffic: traffic.open),
            ("session_connections", "WebSocket connections", lambda traffic: traffic.connections),
            ("session_cache_bytes", "Bytes of caches that open sessions may grow to", lambda t: t.cache_bytes),
        )
        for name, text, value in gauges:
            gauge = GaugeMetricFamily(f"splitlearn_{name}", text, labels=("model_id",))
            for model_id, traffic in models:
                gauge.add_metric((model_id,), value(traffic))
            yield gauge
        counters: tuple[tuple[str, str, Callable[[Traffic], float]], ...] = (
            ("sessions_opened", "Sessions that were opened", lambda traffic: traffic.opened),
            ("sessions_expired", "Sessions that ended because they were idle", lambda traffic: traffic.expired),
            ("session_waiting_seconds", "Seconds that steps waited for their turn", lambda t: t.waiting_seconds),
            ("session_received_bytes", "Bytes of messages from clients", lambda traffic: traffic.bytes_received),
            ("session_sent_bytes", "Bytes of messages to clients", lambda traffic: traffic.bytes_sent),
        )
        for name, text, value in counters:
            counter = CounterMetricFamily(f"splitlearn_{name}", text, labels=("model_id",))
            for model_id, traffic in models:
                counter.add_metric((model_id,), value(traffic))
            yield counter
        refused = CounterMetricFamily(
            "splitlearn_session_refusals", "Errors that were answered", labels=("model_id", "code")
        )
        for model_id, traffic in models:
            for code, count in sorted(traffic.refused.items()):
                refused.add_metric((model_id, code), count)
        yield refused
        steps = HistogramMetricFamily(
            "splitlearn_session_step_seconds", "Seconds that steps computed, without waiting", labels=("model_id",)
        )
        for model_id, traffic in models:
            total, buckets = 0, []
            for bound, count in zip(BOUNDS, traffic.counts, strict=True):
                total += count
                buckets.append(("+Inf" if bound == math.inf else repr(bound), float(total)))
            steps.add_metric((model_id,), buckets, traffic.computing_seconds)
        yield steps
