"""``splitlearn bench``: a split checkpoint and ``from_pretrained``, measured in processes that take turns."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from splitlearn_core import ConfigurationError, benchmark
from splitlearn_core.benchmark import METRICS, Benchmark, Comparison, Failure, Run, Sample, run_benchmark
from splitlearn_core.cli.bench import render_benchmark
from splitlearn_core.loading.opening import open_model
from splitlearn_core.loading.options import LoadOptions
from splitlearn_core.types import Component

CUTS = ("--split", "2", "4")


@pytest.mark.usefixtures("warm_processes")
def test_a_checkpoint_is_measured(llama: Any, single: Path, cli: Callable[..., Any]) -> None:
    """Each side has its own process; JSON is on stdout, the next measurement on stderr."""
    code, out, err = cli("bench", single, *CUTS, "--parts", "bottom,top", "--runs", "1", "--dtype", "float32", "--json")

    result = json.loads(out)
    assert code == 0, err
    assert err.splitlines() == [
        "warm-up: from_pretrained",
        "run 1 of 1: bottom,top",
        "run 1 of 1: all",
        "run 1 of 1: from_pretrained",
    ]
    assert result["equal_tokens"] is True
    assert result["failures"] == {}
    assert (result["model"], result["split_points"], result["dtype"], result["device"], result["runs"]) == (
        str(single), [2, 4], "float32", "cpu", 1,
    )  # fmt: skip
    rows = {(row["parts"], row["metric"]): row for row in result["comparisons"]}
    memory = ["peak memory"] if sys.platform == "linux" else []
    assert list(rows) == [
        *(("bottom,top", metric) for metric in ("load", "load + first forward", *memory)),
        *(("all", metric) for metric in ("load", "load + first forward", "generation", *memory)),
    ]
    for (_, metric), row in rows.items():
        if metric != "peak memory":
            (ours,), (theirs,) = row["splitlearn"]["values"], row["from_pretrained"]["values"]
            assert row["splitlearn"]["median"] == ours > 0
            expected = ours / theirs if metric == "generation" else theirs / ours
            assert row["ratio"] == {"median": expected, "values": [expected]}
    for parts in ("bottom,top", "all"):
        assert rows[parts, "load"]["splitlearn"]["median"] < rows[parts, "load + first forward"]["splitlearn"]["median"]


#: A plugin that ends only the process that measures ``from_pretrained``.
ENDING = """
import sys
if sys.argv[0] == "-c":
    from splitlearn_core import benchmark
    benchmark.load_unsplit = lambda *_: sys.exit(7)
"""


@pytest.mark.usefixtures("warm_processes")
def test_a_side_that_fails_is_reported(world: Any, single: Path, cli: Callable[..., Any]) -> None:
    """The other sides are measured; exit code 1, with the error of the process and its hint."""
    world.install("llama", world.source("llama") + ENDING)

    code, out, _ = cli("bench", single, *CUTS, "--runs", "1")

    assert code == 1
    assert "trunk: load" in out
    assert "from_pretrained could not be measured: ended its process with exit code 7" in out


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--runs", "0"], 2, "0 is not in the range"),
        (["--parts", "middle"], 2, "parts names 'middle'"),
        (["--split", "4", "2"], 2, "in increasing order"),
        (["--dtype", "bottom=float32,trunk=bfloat16,top=float32"], 1, "has one dtype and one device"),
        (["--strategy", "teleport"], 1, "teleport"),
        (["--surely-not"], 2, "No such option"),
    ],
)
def test_wrong_arguments_measure_nothing(
    llama: Any, single: Path, cli: Callable[..., Any], arguments: list[str], code: int, expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """They are refused before a process is started."""
    monkeypatch.setattr(benchmark, "_measure", pytest.fail)

    returned, out, err = cli("bench", single, *CUTS, *arguments)

    assert (returned, out) == (code, "")
    assert expected in err


def test_a_dry_run_measures_nothing(
    llama: Any, single: Path, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It shows what would be fetched, like other commands."""
    monkeypatch.setattr(benchmark, "_measure", pytest.fail)

    code, out, _ = cli("bench", single, *CUTS, "--dry-run", "--json")

    assert (code, json.loads(out)["fetched"]) == (0, 0)


def run_of(seconds: float, tokens: tuple[int, ...] = (1, 2)) -> Run:
    return Run(seconds, 2 * seconds, 1 / seconds if tokens else None, 0, None, tokens)


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the measurements by fixed durations; return the sides in the order of their turns."""
    turns: list[str] = []

    def measure(_: Any, name: str) -> Run | Failure:
        turns.append(name)
        if name == "all":
            return run_of(2.0)
        return run_of(float(len(turns)), (1, 2) if name == "from_pretrained" else ())

    monkeypatch.setattr(benchmark, "_measure", measure)
    return turns


def test_the_sides_take_turns(llama: Any, single: Path, order: list[str]) -> None:
    """The order alternates, the first measurement does not count, and a ratio is of one round."""
    result = run_benchmark(open_model(single), (2, 4), "auto", LoadOptions(), runs=2)

    assert order == ["from_pretrained", "trunk", "all", "from_pretrained", "from_pretrained", "all", "trunk"]
    load = next(row for row in result.comparisons if (row.parts, row.metric.name) == ("trunk", "load"))
    assert load.split.values == (2.0, 7.0)
    assert load.unsplit == Sample((4.0, 5.0))
    assert load.ratio == Sample((4 / 2, 5 / 7))
    assert result.equal_tokens is True
    peak = next(row for row in result.comparisons if row.metric.name == "peak memory")
    assert peak.ratio is None


def test_all_parts_are_measured_once(llama: Any, single: Path, order: list[str]) -> None:
    """If the chosen parts are all components, they are not measured twice."""
    result = run_benchmark(open_model(single), (2, 4), "auto", LoadOptions(), tuple(Component), runs=1)

    assert order == ["from_pretrained", "all", "from_pretrained"]
    assert {row.parts for row in result.comparisons} == {"all"}


def test_different_tokens_are_a_failure(
    llama: Any, single: Path, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The speed of a model that computes something else means nothing."""
    monkeypatch.setattr(benchmark, "_measure", lambda _, name: run_of(1.0, (1, 2) if name == "all" else (1, 3)))

    result = run_benchmark(open_model(single), (2, 4), "auto", LoadOptions(), runs=1)

    assert result.equal_tokens is False
    assert not result.succeeded
    assert "different tokens" in render_benchmark(result)


def test_no_runs_are_refused(llama: Any, single: Path) -> None:
    with pytest.raises(ConfigurationError, match="0 runs measure nothing") as caught:
        run_benchmark(open_model(single), (2, 4), "auto", LoadOptions(), runs=0)
    assert caught.value.hint


def test_the_text_has_medians_and_spread() -> None:
    """It uses readable units, and no brackets for a single run."""
    load, _, speed, memory, _ = METRICS
    rows = (
        Comparison("trunk", load, Sample((0.03, 0.01, 0.02)), Sample((0.2, 0.2, 0.2)), Sample((20 / 3, 20.0, 10.0))),
        Comparison("all", speed, Sample((12.34,)), Sample((12.0,)), Sample((12.34 / 12,))),
        Comparison("all", memory, Sample((0,)), None, None),
    )

    text = render_benchmark(
        Benchmark("m", (2, 4), "float32", "cpu", 3, rows, {"from_pretrained": Failure("it broke", "mind it")}, None)
    )

    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0] == "m cut at 2 and 4, float32, cpu; runs: 3"
    assert "trunk: load 20.0 ms (10.0 to 30.0) 200.0 ms (200.0 to 200.0) 10x (6.67 to 20)" in lines
    assert "all: generation 12.3 tokens/s 12.0 tokens/s 1.03x" in lines
    assert "all: peak memory 0.0 MiB" in lines
    assert lines[-2:] == ["from_pretrained could not be measured: it broke", "hint: mind it"]
