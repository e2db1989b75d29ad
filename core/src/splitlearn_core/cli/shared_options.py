"""Arguments and options that several commands share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from splitlearn_core.loading.opening import OpenModel
    from splitlearn_core.loading.options import LoadOptions

_Command = TypeVar("_Command", bound=Callable[..., Any])


def model_options(command: _Command) -> _Command:
    """Add MODEL, where it is found, and how it is cut."""
    for option in reversed(
        (
            click.argument("model"),
            click.option(
                "--split",
                "split_points",
                nargs=2,
                type=int,
                metavar="A B",
                help="Layers of the two cuts; without it, even thirds are proposed.",
            ),
            click.option(
                "--dtype",
                default="auto",
                show_default=True,
                callback=_for_each_part,
                help="float32, bfloat16, float16, float64 (or fp32, bf16, fp16, half, ...) or auto; "
                "or bottom=float32,trunk=bfloat16,...",
            ),
            click.option("--revision", help="Branch, tag or commit on the Hub."),
            click.option("--cache-dir", help="Where the Hub's files are kept."),
            click.option("--local-files-only", is_flag=True, help="Do not look on the Hub."),
        )
    ):
        command = option(command)
    return command


def load_options(command: _Command) -> _Command:
    """Add the options of a load."""
    for option in reversed(
        (
            click.option(
                "--device",
                default="cpu",
                show_default=True,
                callback=_for_each_part,
                help="Where the components go; or bottom=cpu,trunk=cuda:0,...; or auto.",
            ),
            click.option("--max-memory", help="What may be used of each device: 0=10GiB,cpu=30GiB."),
            click.option("--strategy", default="auto", show_default=True, help="How the weights are read."),
            click.option("--attn-implementation", help="eager, sdpa, ...; by default what transformers chooses."),
            click.option("--strict", is_flag=True, help="Refuse tensors that the model has no place for."),
        )
    ):
        command = option(command)
    return command


def _for_each_part(_: click.Context, parameter: click.Parameter, value: str) -> str | dict[str, str]:
    return _pairs(str(parameter.opts[0]), value) if "=" in value else value


def _pairs(option: str, value: str) -> dict[str, str]:
    """Read NAME=VALUE,NAME=VALUE."""
    pairs = [pair.partition("=") for pair in value.split(",")]
    if not all(name and equals and text for name, equals, text in pairs):
        raise click.BadParameter(f"{value!r} is not NAME=VALUE,NAME=VALUE", param_hint=option)
    return {name: text for name, _, text in pairs}


def load_options_of(options: dict[str, Any]) -> LoadOptions:
    """Remove what :func:`load_options` added from a command's options, and return it."""
    from splitlearn_core.loading.options import LoadOptions
    from splitlearn_core.plan.placement import AUTO, parse_device_map, parse_max_memory
    from splitlearn_core.types import Component

    device, max_memory = options.pop("device"), options.pop("max_memory")
    device_map = device if isinstance(device, dict) or device == AUTO else None
    limits = _pairs("--max-memory", max_memory) if max_memory else {}
    return LoadOptions(
        "cpu" if device_map is not None else device,
        options.pop("strategy"),
        options.pop("attn_implementation"),
        parse_device_map(device_map, tuple(Component)),
        parse_max_memory({int(name) if name.isdecimal() else name: size for name, size in limits.items()}),
        strict=options.pop("strict"),
    )


def split_points_of(model: OpenModel, requested: tuple[int, int] | None) -> tuple[int, int]:
    """Return the requested split points, or by default even thirds of the model, which are printed on stderr."""
    if requested is not None:
        return requested
    from splitlearn_core.plan.split_points import count_layers, even_thirds

    a, b = even_thirds(model.family, model.config)
    layers = count_layers(model.family, model.config)
    click.echo(f"no --split was given: taking --split {a} {b}, even thirds of {layers} layers", err=True)
    return a, b


dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Show which files and bytes would be fetched, fetch no weights, and stop."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def print_json(data: Any) -> None:
    click.echo(json.dumps(data, indent=2))


def styled(text: str, **style: Any) -> str:
    """Colour text unless NO_COLOR is set; click strips the colour where there is no terminal."""
    return text if os.environ.get("NO_COLOR") else click.style(text, **style)


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Align columns of text: numbers to the right, other text to the left."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def cell(value: str, column: int) -> str:
        numeric = all(row[column][:1].isdigit() for row in rows) if rows else False
        return value.rjust(widths[column]) if numeric else value.ljust(widths[column])

    return "\n".join("  ".join(cell(value, column) for column, value in enumerate(line)).rstrip() for line in lines)
