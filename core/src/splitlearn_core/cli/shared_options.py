"""Arguments, options and output that several commands share."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from splitlearn_core.errors import ConfigurationError
from splitlearn_core.types import Component, human_bytes, is_component_name, kind_of

if TYPE_CHECKING:
    from splitlearn_core.checkpoint.hub.fetch_plan import FetchPlan
    from splitlearn_core.hosts.remote import RemoteComponent
    from splitlearn_core.loading.opening import OpenModel
    from splitlearn_core.loading.options import LoadOptions

_Command = TypeVar("_Command", bound=Callable[..., Any])
_NUMBER = re.compile(r"[+-]?[0-9]+")


def _split_points(ctx: click.Context, parameter: click.Parameter, value: Any) -> Any:
    """Convert the values of the option: None if it is omitted, several if it is repeated."""
    if value is None:
        return None
    if parameter.multiple:
        return tuple(_increasing(ctx, parameter, each) for each in value)
    return _increasing(ctx, parameter, value)


def _increasing(ctx: click.Context, parameter: click.Parameter, value: Sequence[str]) -> tuple[int, ...]:
    points = tuple(int(click.INT(each, parameter, ctx)) for each in value)
    if any(a >= b for a, b in pairwise((0, *points))):
        shown = " < ".join(map(str, (0, *points)))
        raise click.BadParameter(f"cuts are layers from 1 on, in increasing order; {shown} does not hold")
    return points


class _NumbersOption(click.Option):
    """An option that takes all numbers that follow it, ``--split 1 3 5``; click's own take a fixed number of values."""

    def add_to_parser(self, parser: Any, ctx: click.Context) -> None:
        """Let the parsed option also consume the numbers that follow its value."""
        super().add_to_parser(parser, ctx)
        option = parser._long_opt[self.opts[0]]  # noqa: SLF001  # click has no public way
        process = option.process

        def take(value: str, state: Any) -> None:
            numbers = [value]
            while state.rargs and _NUMBER.fullmatch(state.rargs[0]):
                numbers.append(state.rargs.pop(0))
            process(tuple(numbers), state)

        option.process = take


def split_option(
    text: str, option: str = "--split", name: str = "split_points", *, multiple: bool = False
) -> Callable[[_Command], _Command]:
    """Return the option ``--split A B``, or another option with such values."""
    return click.option(
        option,
        name,
        cls=_NumbersOption,
        multiple=multiple,
        type=click.UNPROCESSED,
        callback=_split_points,
        # Processed first: the split points decide which components other options may name.
        is_eager=True,
        metavar="A B",
        help=text,
    )


def model_options(command: _Command) -> _Command:
    """Add MODEL and the options that say where it is and how it is cut."""
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
                help="Device of the components; or bottom=cpu,trunk=cuda:0,...; or auto.",
            ),
            click.option(
                "--max-memory", callback=_parse_max_memory, help="Memory to use of each device: 0=10GiB,cpu=30GiB."
            ),
            click.option("--strategy", default="auto", show_default=True, help="How the weights are read."),
            click.option("--attn-implementation", help="eager, sdpa, ...; by default what transformers chooses."),
            click.option(
                "--strict", is_flag=True, help="Refuse checkpoints with tensors that the model does not have."
            ),
        )
    ):
        command = option(command)
    return command


def remote_options(command: _Command) -> _Command:
    """Add the options for components that run elsewhere."""
    for option in reversed(
        (
            click.option(
                "--at",
                "remote",
                multiple=True,
                metavar="PART=URL",
                callback=_parse_remote,
                help="Use a component on a server: trunk=http://HOST:8710/trunk. Repeatable.",
            ),
            click.option(
                "--token-file", metavar="FILE", help="The token for these servers; otherwise SPLITLEARN_TOKEN is used."
            ),
            click.option("--ca-file", metavar="FILE", help="Certificates to trust for these servers."),
        )
    ):
        command = option(command)
    return command


def connect_all(options: dict[str, Any]) -> dict[str, RemoteComponent]:
    """Remove what :func:`remote_options` added from a command's options, and connect to each component."""
    urls, token_file, ca_file = options.pop("remote"), options.pop("token_file"), options.pop("ca_file")
    if not urls:
        if token_file or ca_file:
            raise click.UsageError("--token-file and --ca-file need --at PART=URL")
        return {}
    token = None if token_file is None else read_token(token_file)
    from splitlearn_core.hosts.remote import connect

    remote = {name: connect(url, token=token, ca_file=ca_file) for name, url in urls.items()}
    for component in remote.values():
        # Also after an error: the server would keep an unused session until its time limit.
        click.get_current_context().call_on_close(component.close)
    for name, component in remote.items():
        if component.component != name:
            raise ConfigurationError(
                f"{component.url} runs {component.component}, and was given as {name}",
                hint=f"--at {component.component}={component.url}, or the address of another component",
            )
    return remote


def read_token(name: str) -> str:
    """Read a token from a file.

    Raises:
        ConfigurationError: The file cannot be read, or holds no token.
    """
    try:
        token = Path(name).expanduser().read_text().strip()
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"the token cannot be read: {error}", hint="check --token-file") from error
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigurationError(
            f"{name} does not hold one token", hint="write the token into it, in one line without spaces"
        )
    return token


def _parse_remote(_: click.Context, __: click.Parameter, values: Sequence[str]) -> dict[str, str]:
    from splitlearn_core.hosts.carriers import Endpoint

    urls: dict[str, str] = {}
    for value in values:
        name, equals, url = value.partition("=")
        if not equals or not is_component_name(name):
            raise click.BadParameter(f"{value!r} is not PART=URL, as in trunk=http://127.0.0.1:8710/trunk")
        if kind_of(name) is not Component.TRUNK:
            raise click.BadParameter(f"the {name} stays with the data: only trunks can be used remotely")
        if name in urls:
            raise click.BadParameter(f"two addresses are given for {name}")
        with usage_errors():
            Endpoint(url).check()
        urls[name] = url
    return urls


@contextmanager
def usage_errors() -> Iterator[None]:
    """Report a ConfigurationError as wrong usage, since only the command line has been checked."""
    try:
        yield
    except ConfigurationError as error:
        raise click.BadParameter(f"{error.message}\n{error.hint}") from error


def _check_dtype(ctx: click.Context, _: click.Parameter, value: str) -> str | dict[str, str]:
    from splitlearn_core.plan.placement import parse_dtypes
    from splitlearn_core.plan.split_points import names_of_parts

    dtype, names = _per_part(value), names_of_parts(ctx.params.get("split_points"))
    with usage_errors():
        parse_dtypes(dtype, names, names)
    return dtype


def _check_device(ctx: click.Context, _: click.Parameter, value: str) -> str | dict[str, str]:
    from splitlearn_core.plan.placement import parse_device_map
    from splitlearn_core.plan.split_points import names_of_parts

    device, names = _per_part(value), names_of_parts(ctx.params.get("split_points"))
    with usage_errors():
        parse_device_map(device if isinstance(device, dict) else None, names, names)
    return device


def _parse_max_memory(_: click.Context, __: click.Parameter, value: str | None) -> dict[str, int]:
    from splitlearn_core.plan.placement import parse_max_memory

    limits = _pairs(value) if value else {}
    with usage_errors():
        return parse_max_memory({int(name) if name.isdecimal() else name: size for name, size in limits.items()})


def _per_part(value: str) -> str | dict[str, str]:
    """Read one value for all components, or NAME=VALUE for each."""
    return _pairs(value) if "=" in value else value


def _pairs(value: str) -> dict[str, str]:
    """Read NAME=VALUE,NAME=VALUE."""
    pairs = [pair.partition("=") for pair in value.split(",")]
    if not all(name and equals and text for name, equals, text in pairs):
        raise click.BadParameter(f"{value!r} is not NAME=VALUE,NAME=VALUE")
    return {name: text for name, _, text in pairs}


def load_options_of(options: dict[str, Any], split_points: Sequence[int] | None) -> LoadOptions:
    """Remove what :func:`load_options` added from a command's options, and return it as a value.

    Args:
        options: The options of the command by name; those of a load are removed.
        split_points: Their number decides which components the options may name.
    """
    from splitlearn_core.loading.options import LoadOptions
    from splitlearn_core.plan.placement import AUTO, parse_device_map
    from splitlearn_core.plan.split_points import names_of_parts

    names = names_of_parts(split_points)
    device = options.pop("device")
    device_map = device if isinstance(device, dict) or device == AUTO else None
    return LoadOptions(
        "cpu" if device_map is not None else device,
        options.pop("strategy"),
        options.pop("attn_implementation"),
        parse_device_map(device_map, names, names),
        options.pop("max_memory"),
        strict=options.pop("strict"),
    )


def split_points_of(
    model: OpenModel, requested: tuple[int, ...] | None, remote: Mapping[str, RemoteComponent] = {}
) -> tuple[int, ...]:
    """Return the requested split points, or those of a remote component; else even thirds, after a note on stderr."""
    if requested is not None:
        return requested
    for origin in [component.origin for component in remote.values()]:
        if origin is not None:
            return origin.split_points
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
    rows = []
    for file in plan.files:
        sizes = map(human_bytes, (file.size, file.needed, file.cached, file.fetched))
        how = f"in ranges ({len(file.spans)})" if file.is_partial else "whole"
        rows.append((file.name, *sizes, "" if file.is_here else how))
    return "\n".join(
        (
            plan.model + (f" at {plan.commit[:12]}" if plan.commit else ""),
            "",
            table(("file", "size", "needed", "here", "to fetch", ""), rows),
            "",
            f"{human_bytes(plan.fetched)} ({plan.fetched:,} bytes) would be fetched",
        )
    )
