"""``splitlearn verify``: the split model against the unsplit one."""

from __future__ import annotations

from typing import Any

import click

from splitlearn_core.cli.options import json_option, load_options, load_options_of, model_options, print_json, table
from splitlearn_core.units import human_bytes
from splitlearn_core.verification import Verification


@click.command("verify", short_help="Compare with the unsplit model.")
@model_options
@load_options
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    model: str,
    split_points: tuple[int, int],
    dtype: str | dict[str, str],
    as_json: bool,
    **others: Any,
) -> None:
    """Compare MODEL, cut in three, with MODEL unsplit. Exit code 1 where a bit differs."""
    from splitlearn_core.loading import open_model
    from splitlearn_core.progress import reporting
    from splitlearn_core.verification import verify_split

    with reporting(None) as report:
        options = load_options_of(others)
        result = verify_split(open_model(model, **others), split_points, dtype, options, report)
    if as_json:
        print_json(result.to_dict())
    else:
        click.echo(render_verification(result))
    ctx.exit(0 if result.equal else 1)


def render_verification(result: Verification) -> str:
    """Show a comparison to people."""
    rows = [
        (
            str(cost.component),
            f"[{cost.layers[0]}, {cost.layers[1]})",
            human_bytes(cost.bytes),
            human_bytes(cost.anonymous_bytes),
            f"{cost.load_seconds * 1000:.0f} ms",
            f"{cost.forward_seconds * 1000:.1f} ms",
        )
        for cost in result.components
    ]
    unsplit = (f"{result.unsplit_load_seconds * 1000:.0f} ms", f"{result.unsplit_forward_seconds * 1000:.1f} ms")
    rows.append(("unsplit", "", "", "", *unsplit))
    checks = [f"{'equal' if equal else 'DIFFERS':<8}{name}" for name, equal in result.checks.items()]
    first, second = result.split_points
    verdict = "equal to the last bit" if result.equal else "NOT equal"
    return "\n".join(
        [
            f"{result.model} cut at {first} and {second}, {result.dtype}, {result.input}",
            "",
            table(("component", "layers", "bytes", "memory taken", "load", "forward"), rows),
            "",
            *checks,
            f"{verdict}; maximum difference {result.max_difference:g}",
        ]
    )
