"""What can be typed after ``splitlearn``, as a text that is compared when it changes."""

from __future__ import annotations

from collections.abc import Iterator

import click

from splitlearn_core.cli.main import PackageCommand


def command_lines(path: str, command: click.Command) -> list[str]:
    """Return a command with its arguments and options, and those below it; what other packages add is theirs."""
    return list(_lines(path, command, click.Context(command)))


def _lines(path: str, command: click.Command, context: click.Context) -> Iterator[str]:
    arguments = [item for item in command.params if isinstance(item, click.Argument)]
    yield " ".join([path, *(argument.make_metavar(context) for argument in arguments)])
    yield from sorted(f"    {_option_line(item)}" for item in command.params if isinstance(item, click.Option))
    if isinstance(command, click.Group):
        for name in sorted(command.list_commands(context)):
            below = command.get_command(context, name)
            assert below is not None, name
            if not isinstance(below, PackageCommand):
                yield from _lines(f"{path} {name}", below, context)


def _option_line(item: click.Option) -> str:
    value = "" if item.is_flag else f" {item.type.name}" + (f" x{item.nargs}" if item.nargs != 1 else "")
    choices = f" {list(item.type.choices)}" if isinstance(item.type, click.Choice) else ""
    return (
        " / ".join([*item.opts, *item.secondary_opts])
        + value
        + choices
        + (" required" if item.required else "")
        + (" repeated" if item.multiple else "")
        + (f" ({item.envvar})" if item.envvar else "")
    )
