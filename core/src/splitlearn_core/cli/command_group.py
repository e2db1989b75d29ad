"""Groups of commands: each command is a module, or an installed package's, and is imported when it is used."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import click

from splitlearn_core.errors import BrokenPluginError, PluginConflictError
from splitlearn_core.plugins.host import plugin_output, repair_of
from splitlearn_core.plugins.known import COMMANDS
from splitlearn_core.plugins.metadata import PluginEntry, discover_commands, summary
from splitlearn_core.quoting import said

_DISCOVERED = f"{__name__}.discovered"


class CommandGroup(click.Group):
    """A group of commands that installed packages can add to, through the entry-point group ``splitlearn.commands``.

    The group's own commands cannot be replaced: what another package offers under such a name is ignored, and
    ``--help`` says so.
    """

    def __init__(self, *args: Any, modules: Mapping[str, str] | None = None, prefix: str = "", **kwargs: Any) -> None:
        """Make a group.

        Args:
            args: As of :class:`click.Group`.
            modules: The group's own commands: name -> full name of the module whose ``command`` it is.
            prefix: The words that lead to this group, joined by dots: ``plugins`` for ``splitlearn plugins``.
            kwargs: As of :class:`click.Group`.
        """
        super().__init__(*args, **kwargs)
        self._modules = dict(modules or {})
        self._prefix = f"{prefix}." if prefix else ""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the group's own commands in their order, then those of packages by name."""
        added = {entry.name.removeprefix(self._prefix).partition(".")[0] for entry in self._added(ctx)}
        return [*self._modules, *sorted(added - self._modules.keys())]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in self._modules:
            command: click.Command = importlib.import_module(self._modules[cmd_name]).command
            return command
        path = f"{self._prefix}{cmd_name}"
        entries = tuple(entry for entry in self._added(ctx) if entry.name == path)
        if entries:
            return PackageCommand(cmd_name, entries)
        # A package may add two words to a group that nobody else has: the first is then a group of its own.
        if any(entry.name.startswith(f"{path}.") for entry in self._added(ctx)):
            return CommandGroup(cmd_name, prefix=path)
        return None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0] if args else ""
        path = f"{self._prefix}{name}"
        package, _ = COMMANDS.get(path, ("", ""))
        if package and not ctx.resilient_parsing and self.get_command(ctx, name) is None:
            words = path.replace(".", " ")
            ctx.fail(f"{words!r} is a command of {package}, which is not installed; try: pip install {package}")
        return super().resolve_command(ctx, args)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Say which commands of packages are hidden by the group's own."""
        super().format_epilog(ctx, formatter)
        for entry in self._added(ctx):
            name = entry.name.removeprefix(self._prefix)
            if name.partition(".")[0] in self._modules and self._hides(ctx, name):
                formatter.write_paragraph()
                formatter.write_text(
                    f"The {entry.what} of {entry.label} is ignored: splitlearn-core has one of that name."
                )

    def _hides(self, ctx: click.Context, name: str) -> bool:
        first, _, rest = name.partition(".")
        return not rest or not isinstance(self.get_command(ctx, first), CommandGroup)

    def _added(self, ctx: click.Context) -> Sequence[PluginEntry]:
        """Return the commands below this group; installed metadata is read once for each run of the command line."""
        if _DISCOVERED not in ctx.meta:
            # An empty word could not be typed.
            ctx.meta[_DISCOVERED] = [entry for entry in discover_commands() if all(entry.name.split("."))]
        return [entry for entry in ctx.meta[_DISCOVERED] if entry.name.startswith(self._prefix)]


class PackageCommand(click.Command):
    """A command of an installed package: known from its metadata, and imported when it is used."""

    def __init__(self, name: str, entries: tuple[PluginEntry, ...]) -> None:
        """Make one of the entry points that offer it; more than one are refused when it is used."""
        super().__init__(name, short_help=_short_help(entries))
        self._entries = entries

    def load(self) -> click.Command:
        """Import the command.

        Raises:
            PluginConflictError: Several packages offer it.
            BrokenPluginError: It cannot be imported, or is no command.
        """
        entry, *others = self._entries
        if others:
            raise PluginConflictError(
                f"the {entry.what} is offered by {_labels(self._entries)}",
                hint=f"keep one of them: pip uninstall {' or '.join(each.distribution for each in self._entries)}",
            )
        module, _, attribute = entry.module.partition(":")
        try:
            with plugin_output():
                command: object = importlib.import_module(module)
                for part in (attribute or "command").split("."):
                    command = getattr(command, part)
        # The module is foreign code: whatever it does must not look like a fault of the command line.
        except (Exception, SystemExit) as error:
            missing = error.name.partition(".")[0] if isinstance(error, ModuleNotFoundError) and error.name else ""
            hint = f"pip install {missing}" if missing and missing != module.partition(".")[0] else ""
            raise _broken(entry, f"importing {entry.module!r} failed: {said(error)}", hint) from error
        if not isinstance(command, click.Command):
            raise _broken(entry, f"{entry.module!r} is of type {type(command).__name__}, not a click command")
        return command

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Make the context of the command itself, which click then runs."""
        return self.load().make_context(info_name, args, parent, **extra)


def _short_help(entries: tuple[PluginEntry, ...]) -> str:
    entry, *others = entries
    if others:
        return f"Cannot be used: offered by {_labels(entries)}."
    package, line = COMMANDS.get(entry.name, ("", ""))
    return line if package == entry.distribution else f"{entry.label}: {summary(entry.distribution)}"


def _labels(entries: tuple[PluginEntry, ...]) -> str:
    return " and ".join(entry.label for entry in entries)


def _broken(entry: PluginEntry, why: str, hint: str = "") -> BrokenPluginError:
    return BrokenPluginError(
        f"the {entry.what} of {entry.label} is broken: {why}",
        hint=f"{hint or repair_of(entry)}; or remove it: pip uninstall {entry.distribution}",
    )
