"""``splitlearn bench``: compare the split model with ``from_pretrained``, on the user's own checkpoint."""

from __future__ import annotations

from typing import Any

import click

from splitlearn_core.benchmark import Benchmark, run_benchmark
from splitlearn_core.cli.shared_options import (
    dry_run_option,
    json_option,
    load_options,
    load_options_of,
    model_options,
    print_fetch,
    print_json,
    split_points_of,
    table,
    usage_errors,
)
from splitlearn_core.types import Component, kind_of

_NOTE = (
    "from_pretrained loads and runs the whole model. Medians, with minimum and maximum in brackets;\n"
    "ratio: how many times faster, or smaller, the split side is. Memory: without pages of the weight files."
)

#: Unit of a metric -> what its values are multiplied by, and the unit that is shown.
_SHOWN = {"s": (1000, "ms"), "B": (1 / 2**20, "MiB")}


@click.command("bench", short_help="Compare speed and memory with from_pretrained.")
@model_options
@load_options
@click.option("--parts", metavar="NAME,...", help="The components to measure on their own; by default the trunks.")
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

    Each measurement is a new process, and the two sides take turns. Before the clock starts everything is
    imported, and the weights are in the page cache if they fit. Exit code 1 if a side cannot be measured,
    or if the two generate different tokens.
    """
    from splitlearn_core.loading.opening import open_model
    from splitlearn_core.plan.split_points import names_of_parts
    from splitlearn_core.plan.splitplan import parse_parts
    from splitlearn_core.progress import reporting

    names = names_of_parts(split_points)
    # With one cut there is no trunk; the data owner then runs the bottom.
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
    """Format measurements as text."""
    points = " and ".join(map(str, result.split_points))
    rows = []
    for row in result.comparisons:
        scale, unit = _SHOWN.get(row.metric.unit, (1, row.metric.unit))
        split, unsplit = (
            _median([f"{value * scale:.1f}" for value in sample.summary], f" {unit}") if sample else ""
            for sample in (row.split, row.unsplit)
        )
        ratio = _median([f"{value:.3g}" for value in row.ratio.summary], "x") if row.ratio else ""
        rows.append((f"{row.parts}: {row.metric.name}", split, unsplit, ratio))
    lines = [f"{result.model} cut at {points}, {result.dtype}, {result.device}; runs: {result.runs}", ""]
    if rows:
        lines += [table(("what", "splitlearn", "from_pretrained", "ratio"), rows), "", _NOTE]
    for name, failure in result.failures.items():
        lines.append(f"{name} could not be measured: {failure.message}")
        lines += [f"hint: {failure.hint}"] if failure.hint else []
    if result.equal_tokens is False:
        lines.append("the split model generates different tokens than the unsplit one: see splitlearn verify")
    return "\n".join(lines)


def _median(summary: list[str], unit: str) -> str:
    """Format a median, with the minimum and the maximum in brackets."""
    middle, *ends = summary
    return f"{middle}{unit}" + (f" ({' to '.join(ends)})" if ends else "")
