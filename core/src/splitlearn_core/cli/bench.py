"""``splitlearn bench``: the split model beside ``from_pretrained``, on the user's own checkpoint."""

from __future__ import annotations

from typing import Any

import click

from splitlearn_core.benchmark import Benchmark, Metric, Sample, run_benchmark
from splitlearn_core.cli.dry_run import print_fetch
from splitlearn_core.cli.shared_options import (
    dry_run_option,
    json_option,
    load_options,
    load_options_of,
    model_options,
    print_json,
    split_points_of,
    table,
    usage_errors,
)
from splitlearn_core.types import Component, kind_of

_NOTE = (
    "from_pretrained loads and runs the whole model. Medians, the least and the most in brackets;\n"
    "ratio: how many times faster, or smaller, the split side is. Memory: beyond pages of the weight files."
)


@click.command("bench", short_help="Measure beside from_pretrained.")
@model_options
@load_options
@click.option("--parts", metavar="NAME,...", help="The components to measure by themselves; by default the trunks.")
@click.option("--runs", type=click.IntRange(min=1), default=3, show_default=True, help="Processes for each side.")
@dry_run_option
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    model: str,
    split_points: tuple[int, ...] | None,
    dtype: str | dict[str, str],
    parts: str | None,
    runs: int,
    dry_run: bool,
    as_json: bool,
    **others: Any,
) -> None:
    """Measure MODEL split and MODEL unsplit: load, first forward, tokens per second, memory.

    Each measurement is a fresh process, and the sides take turns. Before the clock starts everything is
    imported, and the weights are in the page cache where they fit. Exit code 1 where a side cannot be
    measured, or the two generate different tokens.
    """
    from splitlearn_core.loading.opening import open_model
    from splitlearn_core.plan.split_points import names_of_parts
    from splitlearn_core.plan.splitplan import parse_parts
    from splitlearn_core.progress import reporting

    names = names_of_parts(split_points)
    # With one cut there is no trunk, and the bottom is what a data owner runs.
    default = [name for name in names if kind_of(name) == Component.TRUNK] or [Component.BOTTOM]
    with usage_errors():
        components = parse_parts(default if parts is None else [part.strip() for part in parts.split(",")], names)
    options = load_options_of(others, split_points)
    opened = open_model(model, **others)
    split_points = split_points_of(opened, split_points)
    if dry_run:
        print_fetch(opened, split_points, dtype, whole=True, as_json=as_json)
        return
    with reporting(None) as progress:
        result = run_benchmark(
            opened,
            split_points,
            dtype,
            options,
            components,
            runs=runs,
            hub=others,
            progress=progress,
            report=lambda text: click.echo(text, err=True),
        )
    if as_json:
        print_json(result.to_dict())
    else:
        click.echo(render_benchmark(result))
    ctx.exit(0 if result.succeeded else 1)


def render_benchmark(result: Benchmark) -> str:
    """Show measurements to people."""
    points = " and ".join(map(str, result.split_points))
    rows = [
        (
            f"{row.parts}: {row.metric.name}",
            _show(row.split, row.metric),
            _show(row.unsplit, row.metric) if row.unsplit else "",
            _show_ratio(row.ratio) if row.ratio else "",
        )
        for row in result.comparisons
    ]
    lines = [f"{result.model} cut at {points}, {result.dtype}, {result.device}; runs: {result.runs}", ""]
    if rows:
        lines += [table(("what", "splitlearn", "from_pretrained", "ratio"), rows), "", _NOTE]
    for name, failure in result.failures.items():
        lines.append(f"{name} could not be measured: {failure.message}")
        lines += [f"hint: {failure.hint}"] if failure.hint else []
    if result.equal_tokens is False:
        lines.append("the split model generates other tokens than the unsplit one: see splitlearn verify")
    return "\n".join(lines)


#: Unit of a metric -> what its values are multiplied by, and the unit that is shown.
_SHOWN = {"s": (1000, "ms"), "B": (1 / 2**20, "MiB")}


def _show(sample: Sample, metric: Metric) -> str:
    scale, unit = _SHOWN.get(metric.unit, (1, metric.unit))
    return _spread([f"{value * scale:.1f}" for value in sample.summary], f" {unit}")


def _show_ratio(sample: Sample) -> str:
    return _spread([f"{value:.3g}" for value in sample.summary], "x")


def _spread(summary: list[str], unit: str = "") -> str:
    """Write a median, with the least and the most in brackets."""
    middle, *ends = summary
    return f"{middle}{unit}" + (f" ({' to '.join(ends)})" if ends else "")
