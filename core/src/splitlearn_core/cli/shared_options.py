"""Arguments and options that several commands share."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import click

from splitlearn_core.errors import ConfigurationError

if TYPE_CHECKING:
    from splitlearn_core.loading.opening import OpenModel
    from splitlearn_core.loading.options import LoadOptions

_Command = TypeVar("_Command", bound=Callable[..., Any])
_NUMBER = re.compile(r"[+-]?[0-9]+")


def _numbers(ctx: click.Context, parameter: click.Parameter, value: Sequence[str] | None) -> tuple[int, ...] | None:
    """Read what the option took; none is none."""
    if value is None:
        return None
    points = tuple(int(click.INT(each, parameter, ctx)) for each in value)
    if any(a >= b for a, b in pairwise((0, *points))):
        shown = " < ".join(map(str, (0, *points)))
        raise click.BadParameter(f"cuts are layers from 1 on, in increasing order; {shown} does not hold")
    return points


class _NumbersOption(click.Option):
    """An option that takes each number after it: ``--split 1 3 5``. click's own take as many values as they say."""

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Let the option take, once it is parsed, the numbers that follow its value."""
        super().add_to_parser(parser, ctx)
        option = parser._long_opt[self.opts[0]]  # noqa: SLF001  # as click's own documentation does it
        process = option.process

        def take(value: str, state: Any) -> None:
            numbers = [value]
            while state.rargs and _NUMBER.fullmatch(state.rargs[0]):
                numbers.append(state.rargs.pop(0))
            process(tuple(numbers), state)

        option.process = take


def split_option(text: str) -> Callable[[_Command], _Command]:
    """Return the option ``--split A B``, with this help."""
    return click.option(
        "--split",
        "split_points",
        cls=_NumbersOption,
        type=click.UNPROCESSED,
        callback=_numbers,
        # Other options name components, and these say which there are.
        is_eager=True,
        metavar="A B",
        help=text,
    )


def model_options(command: _Command) -> _Command:
    """Add MODEL, where it is found, and how it is cut."""
    for option in reversed(
        (
            click.argument("model"),
            split_option("Layers of the cuts, one or more; without it, even thirds are proposed."),
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
    """Add the options of a load."""
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


def _check_dtype(ctx: click.Context, _: click.Parameter, value: str) -> str | dict[str, str]:
    from splitlearn_core.plan.placement import parse_dtypes
    from splitlearn_core.plan.split_points import names_of_parts

    given, there = _for_each_part(value), names_of_parts(ctx.params.get("split_points"))
    with usage_errors():
        parse_dtypes(given, there, there)
    return given


def _check_device(ctx: click.Context, _: click.Parameter, value: str) -> str | dict[str, str]:
    from splitlearn_core.plan.placement import parse_device_map
    from splitlearn_core.plan.split_points import names_of_parts

    given, there = _for_each_part(value), names_of_parts(ctx.params.get("split_points"))
    with usage_errors():
        parse_device_map(given if isinstance(given, dict) else None, there, there)
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
    if not all(name and equals and text for name, equals, text in pairs):
        raise click.BadParameter(f"{value!r} is not NAME=VALUE,NAME=VALUE")
    return {name: text for name, _, text in pairs}


def check_shard_size(_: click.Context, __: click.Parameter, value: str) -> str:
    """Refuse what is no size, as a callback of an option."""
    from splitlearn_core.storage.weight_layout import parse_size

    with usage_errors():
        parse_size(value)
    return value


def load_options_of(options: dict[str, Any], split_points: Sequence[int] | None) -> LoadOptions:
    """Take what :func:`load_options` added out of a command's options; split points say which components there are."""
    from splitlearn_core.loading.options import LoadOptions
    from splitlearn_core.plan.placement import AUTO, parse_device_map
    from splitlearn_core.plan.split_points import names_of_parts

    there = names_of_parts(split_points)
    device = options.pop("device")
    device_map = device if isinstance(device, dict) or device == AUTO else None
    return LoadOptions(
        "cpu" if device_map is not None else device,
        options.pop("strategy"),
        options.pop("attn_implementation"),
        parse_device_map(device_map, there, there),
        options.pop("max_memory"),
        strict=options.pop("strict"),
    )


def split_points_of(model: OpenModel, requested: tuple[int, ...] | None) -> tuple[int, ...]:
    """Return the split points requested, or by default even thirds of the model, which are printed on stderr."""
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
