"""Arguments and options that several commands share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import click

from splitlearn_core.errors import ConfigurationError
from splitlearn_core.types import Component

if TYPE_CHECKING:
    from splitlearn_core.loading.opening import OpenModel
    from splitlearn_core.loading.options import LoadOptions

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
                metavar="A B",
                callback=_check_split,
                help="Layers of the two cuts; without it, even thirds are proposed.",
            ),
            click.option(
                "--dtype",
                default="auto",
                show_default=True,
                callback=_check_dtype,
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
    """Add how the components are loaded."""
    for option in reversed(
        (
            click.option(
                "--device",
                default="cpu",
                show_default=True,
                callback=_check_device,
                help="Where the components go; or bottom=cpu,trunk=cuda:0,...; or auto.",
            ),
            click.option(
                "--max-memory", callback=_parse_max_memory, help="What may be used of each device: 0=10GiB,cpu=30GiB."
            ),
            click.option("--strategy", default="auto", show_default=True, help="How the weights are read."),
            click.option("--attn-implementation", help="eager, sdpa, ...; by default what transformers chooses."),
            click.option("--strict", is_flag=True, help="Refuse tensors that the model has no place for."),
        )
    ):
        command = option(command)
    return command


@contextmanager
def usage_errors() -> Iterator[None]:
    """Make an error about arguments one of usage, where nothing but the command line was looked at."""
    try:
        yield
    except ConfigurationError as error:
        raise click.BadParameter(f"{error.message}\n{error.hint}") from error


def _check_split(_: click.Context, __: click.Parameter, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
    if value is not None and any(a >= b for a, b in pairwise((0, *value))):
        shown = " < ".join(map(str, (0, *value)))
        raise click.BadParameter(f"cuts are layers from 1 on, in increasing order; {shown} does not hold")
    return value


def _check_dtype(_: click.Context, __: click.Parameter, value: str) -> str | dict[str, str]:
    from splitlearn_core.plan.placement import parse_dtypes

    given = _for_each_part(value)
    with usage_errors():
        parse_dtypes(given, tuple(Component))
    return given


def _check_device(_: click.Context, __: click.Parameter, value: str) -> str | dict[str, str]:
    from splitlearn_core.plan.placement import parse_device_map

    given = _for_each_part(value)
    with usage_errors():
        parse_device_map(given if isinstance(given, dict) else None, tuple(Component))
    return given


def _parse_max_memory(_: click.Context, __: click.Parameter, value: str | None) -> dict[str, int]:
    from splitlearn_core.plan.placement import parse_max_memory

    given = _pairs(value) if value else {}
    with usage_errors():
        return parse_max_memory({int(name) if name.isdecimal() else name: size for name, size in given.items()})


def _for_each_part(value: str) -> str | dict[str, str]:
    return _pairs(value) if "=" in value else value


def _pairs(value: str) -> dict[str, str]:
    """Read NAME=VALUE,NAME=VALUE."""
    pairs = [pair.partition("=") for pair in value.split(",")]
    if not all(name and equals and said for name, equals, said in pairs):
        raise click.BadParameter(f"{value!r} is not NAME=VALUE,NAME=VALUE")
    return {name: said for name, _, said in pairs}


def check_shard_size(_: click.Context, __: click.Parameter, value: str) -> str:
    """Refuse what is no size, as a callback of an option."""
    from splitlearn_core.storage.weight_layout import parse_size

    with usage_errors():
        parse_size(value)
    return value


def load_options_of(options: dict[str, Any]) -> LoadOptions:
    """Take what :func:`load_options` added out of a command's options."""
    from splitlearn_core.loading.options import LoadOptions
    from splitlearn_core.plan.placement import AUTO, parse_device_map

    device = options.pop("device")
    device_map = device if isinstance(device, dict) or device == AUTO else None
    return LoadOptions(
        "cpu" if device_map is not None else device,
        options.pop("strategy"),
        options.pop("attn_implementation"),
        parse_device_map(device_map, tuple(Component)),
        options.pop("max_memory"),
        strict=options.pop("strict"),
    )


def split_points_of(model: OpenModel, given: tuple[int, int] | None) -> tuple[int, int]:
    """Return the split points that were given, or even thirds of the model, and say then on stderr which these are."""
    if given is not None:
        return given
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
