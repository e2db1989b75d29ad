"""The output of ``--dry-run``: what a load would fetch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

from splitlearn_core.cli.shared_options import print_json, table
from splitlearn_core.types import human_bytes

if TYPE_CHECKING:
    from splitlearn_core.checkpoint.hub.fetch_plan import FetchPlan, FileFetch
    from splitlearn_core.loading.opening import OpenModel


def print_fetch(
    model: OpenModel,
    split_points: Sequence[int],
    dtype: str | Mapping[str, str],
    *,
    parts: Sequence[str] | None = None,
    whole: bool = False,
    as_json: bool,
) -> None:
    """Print what a load would fetch; see :func:`splitlearn_core.api.plan_model_fetch`."""
    from splitlearn_core.api import plan_model_fetch
    from splitlearn_core.generation import tokenizer_files

    plan = plan_model_fetch(model, split_points, parts, dtype, whole=whole, others=tokenizer_files(model))
    if as_json:
        print_json(plan.to_dict())
    else:
        click.echo(render_fetch(plan))


def render_fetch(plan: FetchPlan) -> str:
    """Format files and bytes as text."""
    rows = [
        (
            file.name,
            human_bytes(file.size),
            human_bytes(file.needed),
            human_bytes(file.cached),
            human_bytes(file.fetched),
            _how(file),
        )
        for file in plan.files
    ]
    commit = f" at {plan.commit[:12]}" if plan.commit else ""
    return "\n".join(
        (
            f"{plan.model}{commit}",
            "",
            table(("file", "size", "needed", "here", "to fetch", ""), rows),
            "",
            f"{human_bytes(plan.fetched)} ({plan.fetched:,} bytes) would be fetched",
        )
    )


def _how(file: FileFetch) -> str:
    if file.is_here:
        return ""
    return f"in ranges ({len(file.spans)})" if file.is_partial else "whole"
