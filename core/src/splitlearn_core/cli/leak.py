"""``splitlearn leak``: attack the messages of a split model, and report what was recovered."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from splitlearn_core.cli.shared_options import (
    connect_all,
    json_option,
    load_options,
    load_options_of,
    model_options,
    print_json,
    remote_options,
    split_option,
    split_points_of,
    table,
    usage_errors,
)
from splitlearn_core.leak.measure import NO_DEFENCE, NO_MESSAGES, SHUFFLED, Leak, LeakSettings, Recovery, measure_leak
from splitlearn_core.leak.plot import recovery_plot
from splitlearn_core.plan.split_points import describe_cuts, split_layers

#: Factors of the noise in a plot.
_FACTORS = (0.25, 1.0, 4.0)
_POSITIVE = click.FloatRange(min=0, min_open=True)


class _Pair(click.ParamType):  # type: ignore[type-arg]  # older click has no such argument
    """``VALUE``, or ``VALUE,VALUE`` for hidden states and gradients; ``-`` for none."""

    name = "value"

    def __init__(self, kind: click.ParamType[Any]) -> None:
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        values = str(value).split(",")
        if len(values) > 2:  # noqa: PLR2004  # a pair
            self.fail(f"{value!r}: give one value, or one for hidden states and one for gradients", param, ctx)
        converted = tuple(None if item == "-" else self._kind.convert(item, param, ctx) for item in values)
        return converted if len(converted) > 1 else converted[0]


@click.command("leak", short_help="Attack what crosses the cuts.")
@model_options
@load_options
@remote_options
@click.option("--clip", type=_Pair(_POSITIVE), metavar="C[,C]", help="Largest norm of a window, at each cut.")
@click.option("--noise", type=_Pair(_POSITIVE), metavar="S[,S]", help="Standard deviation of noise, at each cut.")
@click.option(
    "--quantize", type=_Pair(click.Choice(("int8", "int4"))), metavar="E[,E]", help="int8 or int4, at each cut."
)
@click.option("--stage", "stages", multiple=True, metavar="NAME", help="A stage of a plugin, at each cut. Repeatable.")
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="The text: its second half is attacked, the first is the attacker's. By default letters made from the seed.",
)
@click.option("--windows", type=click.IntRange(min=2), default=8, show_default=True, help="Number of attacked windows.")
@click.option("--length", type=click.IntRange(min=4), default=24, show_default=True, help="Tokens per window.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of text and noise.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE",
    help="Measure with a quarter and four times the noise too, and draw recovery against loss, as SVG.",
)
@split_option("Plot these cuts too. Repeatable.", "--plot-split", "drawn_splits", multiple=True)
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    model: str,
    split_points: tuple[int, ...] | None,
    dtype: str | dict[str, str],
    clip: Any,
    noise: Any,
    quantize: Any,
    stages: tuple[str, ...],
    text: Path | None,
    plot: Path | None,
    drawn_splits: tuple[tuple[int, ...], ...],
    as_json: bool,
    **others: Any,
) -> None:
    """Attack the messages that training MODEL sends, and report how much of the text was recovered.

    The attacks run on this machine; with --at, they are on the messages that a trunk at that server
    gets. One value of --clip, --noise or --quantize is for hidden states and gradients; a pair, as in
    --clip 8,0.1, is one for each, and - is for none.
    """
    from splitlearn_core.cuts.cut import Cut
    from splitlearn_core.loading.opening import open_model
    from splitlearn_core.progress import reporting

    if plot is not None and noise is None:
        raise click.UsageError("--plot needs --noise, which it varies")
    if drawn_splits and plot is None:
        raise click.UsageError("--plot-split needs --plot")
    with usage_errors():
        cut = Cut(clip, noise, quantize, stages)
    numbers = {name: others.pop(name) for name in ("windows", "length", "seed")}
    options = load_options_of(others, split_points)
    elsewhere = {name: others.pop(name) for name in ("remote", "token_file", "ca_file")}
    opened = open_model(model, **others)
    remote = connect_all(elsewhere)
    if drawn_splits and remote:
        raise click.UsageError("--plot-split cannot be used with --at")
    splits = [split_points_of(opened, split_points, remote), *drawn_splits]
    settings = LeakSettings(text=text, **numbers)
    factors = _FACTORS if plot is not None else (1.0,)
    with reporting(None) as progress:
        # Check all of them before the first measurement, which takes minutes.
        for points in splits:
            split_layers(opened.family, opened.config, points)
        results = [
            [
                measure_leak(
                    opened,
                    points,
                    dtype,
                    options,
                    replace(cut, noise=_scaled(noise, factor)),
                    settings,
                    progress,
                    remote,
                    report=lambda line: click.echo(line, err=True),
                )
                for factor in factors
            ]
            for points in splits
        ]
    result = results[0][len(factors) // 2]
    if plot is not None:
        plot.write_text(recovery_plot(results), encoding="utf-8")
    if as_json:
        print_json(result.to_dict())
    else:
        click.echo(render_leak(result))


def _scaled(noise: Any, factor: float) -> Any:
    if isinstance(noise, tuple):
        return tuple(_scaled(each, factor) for each in noise)
    return None if noise is None else noise * factor


def render_leak(result: Leak) -> str:
    """Format what was recovered as text."""
    rows = []
    for attack in result.attacks:
        low, high = attack.recovery.interval
        rows.append(
            (
                attack.attack,
                attack.attacker,
                f"{attack.recovery.share:.1%} ({low:.0%} to {high:.0%})",
                f"{attack.recovery.exact_windows} of {result.windows}",
                f"{attack.recovery.secrets} of {result.secrets}",
                *(_share(attack.controls[name]) for name in (NO_DEFENCE, SHUFFLED, NO_MESSAGES)),
            )
        )
    header = ("attack", "attacker", "tokens", "windows", "secrets", NO_DEFENCE, SHUFFLED, NO_MESSAGES)
    statement = result.statement
    if statement.epsilon is None:
        budget = f"no epsilon is stated: {'; '.join(statement.reasons)}"
    else:
        budget = (
            f"epsilon {statement.epsilon:.1f} at delta {statement.delta:g} for one pass of training over a window, "
            f"with frozen ends: {statement.releases} messages, sensitivity 2C; unit: {statement.unit}"
        )
    sizes = ", ".join(f"{what} {size:,}" for what, size in result.bytes_per_token.items())
    where = f"{result.model} cut at {describe_cuts(result.split_points)}, {result.dtype}"
    return "\n".join(
        (
            f"{where}; {result.text}: {result.windows} windows of {result.length} tokens",
            result.cut,
            "",
            table(header, rows),
            f"{result.note}; intervals of 95 % over windows",
            "",
            f"loss {result.loss:.3f}, without this {result.loss_without_cuts:.3f}",
            f"bytes per token: {sizes}",
            budget,
        )
    )


def _share(recovery: Recovery) -> str:
    return f"{recovery.share:.1%}"
