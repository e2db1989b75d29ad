"""``splitlearn plan``: the components of a split, from file headers alone."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import click

from splitlearn_core.cli.shared_options import json_option, model_options, print_json, split_points_of, styled, table
from splitlearn_core.errors import ConfigurationError
from splitlearn_core.plan.machines import Proposal, parse_machines, pieces_of, propose
from splitlearn_core.plan.mismatch import unread_keys_message
from splitlearn_core.plan.splitplan import MIXED, SplitPlan
from splitlearn_core.types import Component, human_bytes, kind_of

#: Characters of the bar, and how many it may have at most to show the names of all components.
_BAR_WIDTH, _MAX_WIDTH = 64, 78
#: Fill and colour of each kind of component.
_LOOKS = {"bottom": ("▓", "cyan"), "trunk": ("█", "yellow"), "top": ("▒", "magenta")}
#: Fill of every other trunk, so that neighbours differ.
_OTHER_TRUNK = "▞"
#: Tokens in the caches of a proposal, unless it is said.
_TOKENS = 4096


@click.command("plan", short_help="Show the components of a split, from headers alone.")
@model_options
@click.option(
    "--over",
    "machines",
    multiple=True,
    metavar="NAME=MEMORY:SPEED/s[:DELAYms]",
    help="Propose split points for machines: first the data owner's, then one for each trunk. SPEED is the bytes of "
    "weights that a machine reads per second, DELAY the time of a message there and back. Repeatable.",
)
@click.option(
    "--tokens",
    type=click.IntRange(0),
    show_default=str(_TOKENS),
    help="With --over: tokens in the caches, of all texts together.",
)
@json_option
def command(
    model: str,
    split_points: tuple[int, ...] | None,
    dtype: str | dict[str, str],
    machines: tuple[str, ...],
    tokens: int | None,
    as_json: bool,
    **hub: Any,
) -> None:
    """Show the components of MODEL once it is cut: their layers, bytes and shards.

    Reads config.json and the headers of the weight files, and no weights.
    """
    from splitlearn_core.api import plan_opened
    from splitlearn_core.loading.opening import open_model
    from splitlearn_core.plan.split_points import even_thirds, names_of_parts, possible_points

    if machines and split_points is not None:
        raise click.UsageError("--over chooses the split points; leave --split out")
    if tokens is not None and not machines:
        raise click.UsageError("--tokens is for --over: it counts the caches on its machines")
    try:
        over = parse_machines(machines) if machines else ()
    except ConfigurationError as error:
        raise click.UsageError(f"{error.message}; {error.hint}") from error
    opened = open_model(model, **hub)
    opened.checkpoint.require_weights()
    if over:
        points = possible_points(opened.family, opened.config)
        if not points:
            # Raises, with the reason.
            even_thirds(opened.family, opened.config)
        finest = plan_opened(opened, points, names_of_parts(points), dtype)
        proposal = propose(pieces_of(finest, opened.family, _TOKENS if tokens is None else tokens), over)
        if as_json:
            print_json(proposal.to_dict())
        else:
            click.echo(render_proposal(proposal, finest))
        return
    split_points = split_points_of(opened, split_points)
    plan = plan_opened(opened, split_points, names_of_parts(split_points), dtype)
    if as_json:
        print_json(plan.to_dict())
    else:
        click.echo(render_plan(plan))


def render_plan(plan: SplitPlan) -> str:
    """Format a plan as text."""
    commit = f" at {plan.commit[:12]}" if plan.commit else ""
    rows = [
        (
            str(part.component),
            f"[{part.layers.start}, {part.layers.end})",
            f"{part.parameters:,}",
            human_bytes(part.nbytes),
            human_bytes(part.kv_bytes_per_token),
            f"{len(part.shards)} of {len(plan.shards)}" if plan.shards else "none yet",
        )
        for part in plan.components
    ]
    dtypes = plan.dtype
    if dtypes == MIXED:
        dtypes = " and ".join(f"{part.dtype} ({part.component})" for part in plan.components)
    lines = [
        f"{plan.model}{commit}",
        ", ".join(
            (
                plan.model_type,
                f"{plan.num_layers} layers",
                f"{plan.parameters:,} parameters",
                human_bytes(plan.nbytes),
                f"loads as {dtypes} (read from {plan.source})",
            )
        ),
        "",
        _bar(plan),
        "",
        table(("component", "layers", "parameters", "stored", "cache/token", "shards"), rows),
        "",
        f"across each cut: {human_bytes(plan.cut_bytes_per_token)} per token",
    ]
    states = {part.component: part.state_bytes_per_sequence for part in plan.components}
    if any(states.values()):
        amounts = ", ".join(f"{human_bytes(count)} ({component})" for component, count in states.items())
        lines.append(f"running states: {amounts} for each sequence, whatever its length")
    lines += [f"tied: {key} is in more than one component, and counted in each" for key in plan.tied]
    lines += [f"warning: {text}: the file may be incomplete" for text in plan.warnings]
    if plan.unexpected:
        lines.append(f"warning: {unread_keys_message(plan.model, plan.model_type, plan.unexpected)}")
    return "\n".join(lines)


def render_proposal(proposal: Proposal, plan: SplitPlan) -> str:
    """Format split points for machines as text."""
    rows = [
        (
            stage.machine.name,
            " and ".join(stage.components),
            str(stage.layers),
            f"{human_bytes(stage.memory)} of {human_bytes(stage.machine.memory)}",
            f"{1000 * stage.seconds:.1f} ms",
            f"{1000 * stage.machine.delay:g} ms",
        )
        for stage in proposal.stages
    ]
    seconds = proposal.seconds_per_token
    return "\n".join(
        [
            f"{plan.model}: --split {' '.join(map(str, proposal.split_points))}",
            "",
            table(("machine", "components", "layers", "memory", "per token", "delay"), rows),
            "",
            f"one text: {1000 * seconds:.1f} ms for each token, {1 / seconds:.1f} tokens per second",
            f"many texts: at most {proposal.tokens_per_second:.1f} tokens per second, those of the slowest trunk",
            f"across each cut: {human_bytes(plan.cut_bytes_per_token)} per token",
        ]
    )


def _bar(plan: SplitPlan) -> str:
    sizes = [part.nbytes for part in plan.components]
    total = sum(sizes) or 1
    widths = [max(len(part.component) + 1, round(_BAR_WIDTH * part.nbytes / total)) for part in plan.components]
    if sum(widths) > _MAX_WIDTH:
        # Too many components to show all names.
        edges = [round(_BAR_WIDTH * bytes_before / total) for bytes_before in accumulate(sizes, initial=0)]
        widths = [max(1, end - start) for start, end in pairwise(edges)]
    bar, labels = "", ""
    for number, (part, width) in enumerate(zip(plan.components, widths, strict=True)):
        kind = kind_of(part.component)
        fill, colour = _LOOKS[kind]
        if kind is Component.TRUNK and number % 2 == 0:
            fill = _OTHER_TRUNK
        bar += styled(fill * width, fg=colour)
        labels += (part.component if len(part.component) < width else "").ljust(width)
    return f"{bar}\n{labels.rstrip()}"
