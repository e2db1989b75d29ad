"""The manager's numbers for Prometheus."""

from __future__ import annotations

import asyncio
import sys
import threading
from typing import Any

import pytest

pytest.importorskip("prometheus_client", reason="needs splitlearn-core[metrics]")

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from splitlearn_core.errors import ConfigurationError
from splitlearn_core.manager.metrics import LoopLag, ManagerCollector
from splitlearn_core.manager.status import FailureInfo, LedgerInfo, ManagerStatistics, ModelInfo, ModelStatus

pytestmark = pytest.mark.light

#: An id that a careless writer of the text format would break on.
ODD = 'a"b\\c\nd{}'

MODELS = (
    ModelInfo(
        "trunk", ModelStatus.READY, 1, "llama", "trunk", leases=2, device="cpu", dtype="float32", required=True,
        predicted={"mapped": 3000, "host": 40}, measured=50, requested_at=100.0, ready_at=101.5, last_used_at=102.0,
        expires_at=402.0, load_seconds=1.5,
    ),
    ModelInfo(
        ODD, ModelStatus.LOADING, 2, "llama", "bottom", stage="reading", bytes_done=10, bytes_total=100, waiters=3,
        stalled_for=12.0,
    ),
    ModelInfo(
        "top", ModelStatus.FAILED, 3, "llama", "top",
        error=FailureInfo("MemoryError", "no", "", "reading", retryable=True, consecutive=4),
    ),
)  # fmt: skip
STATISTICS = ManagerStatistics(
    models={"ready": 1, "loading": 1, "failed": 1},
    ledgers={"host": LedgerInfo(1000, 40, 7)},
    loads_started=9, loads_succeeded=5, loads_failed=3, loads_cancelled=1, joined=2, unloads=4, evictions=1,
    expirations=2, leases=20, calls=30, calls_failed=6, calls_rejected=8, stuck={"x": "stack"}, uptime=12.5,
    failures_forgotten=9,
)  # fmt: skip


class Fixed:
    """A manager in which nothing happens."""

    def list_models(self) -> tuple[ModelInfo, ...]:
        return MODELS

    def get_statistics(self) -> ManagerStatistics:
        return STATISTICS


def scrape(collector: ManagerCollector) -> tuple[dict[tuple[str, frozenset[tuple[str, str]]], float], Any]:
    registry = CollectorRegistry()
    registry.register(collector)
    families = list(text_string_to_metric_families(generate_latest(registry).decode()))
    samples = [sample for family in families for sample in family.samples]
    values = {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}
    assert len(values) == len(samples)
    return values, families


def test_every_number_is_there_under_its_name() -> None:
    """Each count, ledger and state of the snapshot, as the client's own parser reads it."""
    values, _ = scrape(ManagerCollector(Fixed()))

    def value(name: str, **labels: str) -> float:
        return values[f"splitlearn_{name}", frozenset(labels.items())]

    assert value("loads_started_total") == 9
    assert [value("loads_total", outcome=outcome) for outcome in ("succeeded", "failed", "cancelled")] == [5, 3, 1]
    assert value("loads_joined_total") == 2
    assert value("unloads_total") == 4
    assert value("evictions_total") == 1
    assert value("expirations_total") == 2
    assert value("failures_forgotten_total") == 9
    assert value("leases_taken_total") == 20
    assert [value(f"calls{end}_total") for end in ("", "_failed", "_rejected")] == [30, 6, 8]
    assert [value(f"memory_{name}_bytes", ledger="host") for name in ("capacity", "charged", "reserved")] == [
        1000,
        40,
        7,
    ]
    assert value("workers_stuck") == 1
    assert value("loads_stalled") == 1
    assert value("loads_waiting") == 0
    assert value("uptime_seconds") == 12.5
    states = {status: value("models", status=str(status)) for status in ModelStatus}
    assert {status for status, count in states.items() if count} == {
        ModelStatus.READY, ModelStatus.LOADING, ModelStatus.FAILED
    }  # fmt: skip


def test_every_model_is_there_whatever_its_name() -> None:
    """Labels are escaped, and what is not known has no sample rather than a made-up one."""
    values, _ = scrape(ManagerCollector(Fixed()))

    def value(name: str, model_id: str, **labels: str) -> float | None:
        return values.get((f"splitlearn_model_{name}", frozenset({"model_id": model_id, **labels}.items())))

    assert [value("ready", name) for name in ("trunk", ODD, "top")] == [1, 0, 0]
    assert [value("required", name) for name in ("trunk", ODD, "top")] == [1, 0, 0]
    assert (value("leases", "trunk"), value("waiters", ODD)) == (2, 3)
    assert value("memory_predicted_bytes", "trunk", ledger="mapped") == 3000
    assert (value("memory_measured_bytes", "trunk"), value("memory_measured_bytes", ODD)) == (50, None)
    assert (value("load_duration_seconds", "trunk"), value("load_duration_seconds", "top")) == (1.5, None)
    assert value("ready_timestamp_seconds", "trunk") == 101.5
    assert value("last_used_timestamp_seconds", "trunk") == 102
    assert value("expires_timestamp_seconds", "trunk") == 402
    assert [value("consecutive_failures", name) for name in ("trunk", ODD, "top")] == [0, 0, 4]
    assert (value("load_done_bytes", ODD), value("load_expected_bytes", ODD)) == (10, 100)
    assert (value("load_stalled_seconds", ODD), value("load_done_bytes", "trunk")) == (12, None)
    facts = {"model_type": "llama", "component": "trunk", "device": "cpu", "dtype": "float32"}
    assert value("info", "trunk", **facts) == 1


def test_names_follow_the_conventions() -> None:
    """Every metric has help, base units, our prefix; counters and only they end in _total."""
    _, families = scrape(ManagerCollector(Fixed(), LoopLag()))

    for family in families:
        assert family.name.startswith("splitlearn_")
        assert family.documentation
        assert not family.name.endswith(("_ms", "_milliseconds", "_mb", "_kb", "_count"))
        ends = {sample.name.endswith("_total") for sample in family.samples}
        assert ends <= {family.type == "counter"}


def test_the_loops_lag_is_a_histogram() -> None:
    """Buckets are cumulative, and the sum is that of what was observed."""
    lag = LoopLag()
    for seconds in (0.0, 0.001, 0.004, 0.3, 7.0):
        lag.observe(seconds)

    values, _ = scrape(ManagerCollector(Fixed(), lag))

    def bucket(bound: str) -> float:
        return values["splitlearn_event_loop_lag_seconds_bucket", frozenset({("le", bound)})]

    assert [bucket(bound) for bound in ("0.001", "0.005", "0.25", "0.5", "2.5", "+Inf")] == [2, 3, 3, 4, 4, 5]
    assert values["splitlearn_event_loop_lag_seconds_sum", frozenset()] == pytest.approx(7.305)
    assert values["splitlearn_event_loop_lag_seconds_count", frozenset()] == 5


def test_the_lag_is_measured() -> None:
    """A callback that blocks the loop is seen as lag of that length."""
    times = iter([0.0, 0.05, 0.05, 0.30])
    lag = LoopLag(interval=0, clock=lambda: next(times))

    with pytest.raises(RuntimeError, match="StopIteration"):
        asyncio.run(lag.run())

    assert lag.buckets()[1] == pytest.approx(0.30)


def test_any_thread_may_scrape() -> None:
    """The snapshots are taken in the manager's own thread, for they are its loop's."""
    seen: list[threading.Thread] = []

    class Watching(Fixed):
        def list_models(self) -> tuple[ModelInfo, ...]:
            seen.append(threading.current_thread())
            return super().list_models()

    async def main() -> None:
        collector = ManagerCollector(Watching())
        scrape(collector)
        values, _ = await asyncio.to_thread(scrape, collector)
        assert values["splitlearn_unloads_total", frozenset()] == 4

    asyncio.run(main())

    assert seen == [threading.current_thread()] * 2


def test_without_the_client_the_way_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not an ImportError from deep inside, but which package is missing and how to get it."""
    monkeypatch.setitem(sys.modules, "prometheus_client.core", None)

    with pytest.raises(ConfigurationError, match="prometheus-client") as caught:
        ManagerCollector(Fixed())

    assert "pip install 'splitlearn-core[metrics]'" in caught.value.hint
