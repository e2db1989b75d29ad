"""Arguments and options that several commands share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

_Command = TypeVar("_Command", bound=Callable[..., Any])


def model_options(command: _Command) -> _Command:
    """Add MODEL, where to find it, and how to cut it."""
    for option in reversed(
        (
            click.argument("model"),
            click.option(
                "--split",
                "split_points",
                nargs=2,
                type=int,
                required=True,
                metavar="A B",
                help="Layers of the two cuts.",
            ),
            click.option(
                "--dtype", default="auto", show_default=True, help="float32, bfloat16, float16, float64 or auto."
            ),
            click.option("--revision", help="Branch, tag or commit on the Hub."),
            click.option("--cache-dir", help="Where the Hub's files are kept."),
            click.option("--local-files-only", is_flag=True, help="Do not look on the Hub."),
        )
    ):
        command = option(command)
    return command


def load_options(command: _Command) -> _Command:
    """Add how the components are loaded."""
    for option in reversed(
        (
            click.option("--device", default="cpu", show_default=True, help="Where the components go."),
            click.option("--strategy", default="auto", show_default=True, help="How the weights are read."),
            click.option("--attn-implementation", help="eager, sdpa, ...; by default what transformers chooses."),
        )
    ):
        command = option(command)
    return command


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2))


def styled(text: str, **style: Any) -> str:
    """Colour text, unless NO_COLOR asks for none; click leaves it out where there is no terminal."""
    return text if os.environ.get("NO_COLOR") else click.style(text, **style)


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Align columns of text; the first is flush left, numbers flush right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def cell(value: str, column: int) -> str:
        numeric = all(row[column][:1].isdigit() for row in rows) if rows else False
        return value.rjust(widths[column]) if numeric else value.ljust(widths[column])

    return "\n".join("  ".join(cell(value, column) for column, value in enumerate(line)).rstrip() for line in lines)
