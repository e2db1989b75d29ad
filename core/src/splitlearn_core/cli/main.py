"""The console script: import a command, run it, and turn errors into exit codes."""

from __future__ import annotations

import io
import logging
import os
import sys

import click

from splitlearn_core.cli.command_group import CommandGroup
from splitlearn_core.errors import SplitLearnError
from splitlearn_core.plugins.host import stdout_for_data

#: The commands of core, each a module of this package; other packages add theirs.
_COMMANDS = ("demo", "plugins", "plan", "generate", "verify", "split", "merge", "bench", "doctor")


@click.group(
    cls=CommandGroup,
    modules={name: f"splitlearn_core.cli.{name}" for name in _COMMANDS},
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(package_name="splitlearn-core", prog_name="splitlearn")
@click.option("-v", "--verbose", is_flag=True, help="Log the stages of a load to stderr.")
@click.option("--trace", is_flag=True, help="Print each plugin's import and each hook call to stderr.")
def cli(verbose: bool, trace: bool) -> None:
    """Cut a causal language model into bottom, trunk and top, and load only the piece you want.

    MODEL is a directory, a Hub repository (owner/name), or bundled:gpt2 for the small model that
    splitlearn-gpt2 carries. Data goes to stdout, progress to stderr.
    """
    if verbose:
        logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
        logging.getLogger("splitlearn_core").setLevel(logging.INFO)
    if trace:
        from splitlearn_core.plugins.tracing import trace_to_stderr

        # In the format that SPLITLEARN_TRACE chooses.
        trace_to_stderr()


def main() -> None:
    """Run the command line. Exit code 0: done, 1: failed, 2: wrong usage."""
    for stream in (sys.stdout, sys.stderr):
        # Characters that a terminal cannot show are escaped: no reason to stop in the middle of a text.
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
        # The reader of a pipe has gone (`| head`); without this, flushing at exit would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        explanation = _explanation(error)
        if explanation is None:
            raise
        message, hint = explanation
        click.echo(f"error: {message}", err=True)
        if hint:
            click.echo(f"hint: {hint}", err=True)
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def _explanation(error: Exception) -> tuple[str, str] | None:
    """Return message and hint of an error that users can act on; None for a bug."""
    from splitlearn_core.environment_errors import cause_of

    cause = cause_of(error)
    if isinstance(error, SplitLearnError) and not (cause and cause.library):
        return error.message, error.hint
    if cause is not None:
        return cause.message, cause.hint
    # A full disk or a closed output is no bug.
    return (str(error), "") if isinstance(error, OSError) else None
