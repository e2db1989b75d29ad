"""``splitlearn plugins``: what is installed; its further commands are one file each."""

from __future__ import annotations

import click

from splitlearn_core.cli.command_group import CommandGroup
from splitlearn_core.cli.plugins.listing import list_options, print_plugins

#: Command -> its module in this package.
_COMMANDS = {"list": "listing", "test": "testing"}


@click.group(
    "plugins",
    cls=CommandGroup,
    prefix="plugins",
    modules={name: f"{__name__}.{module}" for name, module in _COMMANDS.items()},
    invoke_without_command=True,
    short_help="List, test and write plugins.",
)
@list_options
@click.pass_context
def command(ctx: click.Context, check: bool, strategies: bool, as_json: bool) -> None:
    """List the installed plugins, from metadata alone: none is imported."""
    if ctx.invoked_subcommand is None:
        ctx.exit(print_plugins(check=check, strategies=strategies, as_json=as_json))
