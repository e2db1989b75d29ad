"""The console script: groups of commands, which packages can add to, and exit codes.

Each command is a module of this package, or an installed package's, and is imported when it is used.
"""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, cast

import click

from splitlearn_core.errors import BrokenPluginError, PluginConflictError, SplitLearnError, translate
from splitlearn_core.plugins.host import (
    ANY_ERROR,
    import_object,
    install_hint,
    plugin_output,
    repair_of,
    stdout_for_data,
    trace_to_stderr,
)
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
            modules: The group's own commands: name -> ``module:attribute``, or the module whose ``command`` it is.
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
            return cast("click.Command", import_object(self._modules[cmd_name], "command"))
        path = f"{self._prefix}{cmd_name}"
        entries = tuple(entry for entry in self._added(ctx) if entry.name == path)
        if entries:
            return PackageCommand(cmd_name, entries)
        # A package may add a command of two words to a group that does not exist yet.
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
        """List the commands of packages that the group's own commands hide."""
        super().format_epilog(ctx, formatter)
        for entry in self._added(ctx):
            first, _, rest = entry.name.removeprefix(self._prefix).partition(".")
            if first not in self._modules or (rest and isinstance(self.get_command(ctx, first), CommandGroup)):
                continue
            formatter.write_paragraph()
            formatter.write_text(f"The {entry.what} of {entry.label} is ignored: splitlearn-core has one of that name.")

    def _added(self, ctx: click.Context) -> Sequence[PluginEntry]:
        """Return the commands below this group; the installed metadata is read once in each run."""
        if _DISCOVERED not in ctx.meta:
            # Names with an empty word cannot be typed.
            ctx.meta[_DISCOVERED] = [entry for entry in discover_commands() if all(entry.name.split("."))]
        return [entry for entry in ctx.meta[_DISCOVERED] if entry.name.startswith(self._prefix)]


class PackageCommand(click.Command):
    """A command of an installed package: known from its metadata, and imported when it is used.

    Args:
        name: Its name.
        entries: The entry points that offer it; more than one are refused when it is used.
    """

    def __init__(self, name: str, entries: tuple[PluginEntry, ...]) -> None:
        entry, *others = entries
        package, line = COMMANDS.get(entry.name, ("", ""))
        if others:
            short_help = f"Cannot be used: offered by {_labels(entries)}."
        else:
            short_help = line if package == entry.distribution else f"{entry.label}: {summary(entry.distribution)}"
        super().__init__(name, short_help=short_help)
        self._entries = entries

    def load(self) -> click.Command:
        """Import the command.

        Raises:
            PluginConflictError: Several packages offer it.
            BrokenPluginError: It cannot be imported, or is not a click command.
        """
        entry, *others = self._entries
        if others:
            raise PluginConflictError(
                f"the {entry.what} is offered by {_labels(self._entries)}",
                hint=f"keep one of them: pip uninstall {' or '.join(each.distribution for each in self._entries)}",
            )

        def failure(error: BaseException) -> BrokenPluginError:
            return _broken(entry, f"importing {entry.module!r} failed: {said(error)}", install_hint(error, entry))

        with translate(failure, ANY_ERROR, unchanged=()), plugin_output():
            command = import_object(entry.module, "command")
        if not isinstance(command, click.Command):
            raise _broken(entry, f"{entry.module!r} is of type {type(command).__name__}, not a click command")
        return command

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Make the context of the command itself, which click then runs."""
        return self.load().make_context(info_name, args, parent, **extra)


def _labels(entries: tuple[PluginEntry, ...]) -> str:
    return " and ".join(entry.label for entry in entries)


def _broken(entry: PluginEntry, why: str, hint: str = "") -> BrokenPluginError:
    return BrokenPluginError(
        f"the {entry.what} of {entry.label} is broken: {why}",
        hint=f"{hint or repair_of(entry)}; or remove it: pip uninstall {entry.distribution}",
    )


#: The commands of core, each a module of this package or an attribute of one; other packages add theirs.
_COMMANDS = {
    "demo": "demo",
    "plugins": "plugins",
    "plan": "plan",
    "generate": "generate",
    "verify": "verify",
    "split": "split",
    "merge": "split:merge_command",
    "bench": "bench",
    "leak": "leak",
    "doctor": "doctor",
}


@click.group(
    cls=CommandGroup,
    modules={name: f"splitlearn_core.cli.{path}" for name, path in _COMMANDS.items()},
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="splitlearn-core", prog_name="splitlearn")
@click.option("-v", "--verbose", is_flag=True, help="Log the stages of a load to stderr.")
@click.option("--trace", is_flag=True, help="Print each plugin's import and each hook call to stderr.")
def cli(verbose: bool, trace: bool) -> None:
    """Cut a causal language model into bottom, trunk and top, and load only the piece you want.

    MODEL is a directory, a Hub repository (owner/name), or bundled:gpt2 for the small model in
    splitlearn-gpt2. Data goes to stdout, progress to stderr.
    """
    if verbose:
        logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
        logging.getLogger("splitlearn_core").setLevel(logging.INFO)
    if trace:
        # In the format that SPLITLEARN_TRACE chooses.
        trace_to_stderr()


def main() -> None:
    """Run the command line. Exit codes: 0 success, 1 failure, 2 wrong usage."""
    for stream in (sys.stdout, sys.stderr):
        # Escape characters that a terminal cannot show, rather than stop in the middle of a text.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with stdout_for_data():
            code = cli.main(prog_name="splitlearn", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except BrokenPipeError:
        # The reader of a pipe is gone (`| head`); without this, the flush at exit would print an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        from splitlearn_core.environment_errors import cause_of

        cause = cause_of(error)
        if isinstance(error, SplitLearnError) and not (cause and cause.library):
            message, hint = error.message, error.hint
        elif cause is not None:
            message, hint = cause.message, cause.hint
        elif isinstance(error, OSError):
            message, hint = str(error), ""  # a full disk or a closed output
        else:
            raise  # a bug
        click.echo(f"error: {message}", err=True)
        if hint:
            click.echo(f"hint: {hint}", err=True)
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)
