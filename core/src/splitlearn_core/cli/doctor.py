"""``splitlearn doctor``: find out why a plugin is not found, or why a model does not load."""

from __future__ import annotations

import click

from splitlearn_core.cli.shared_options import json_option, print_json, styled
from splitlearn_core.doctor.report import Finding, Level, Report

_COLOURS = {Level.OK: "green", Level.NOTE: "yellow", Level.WRONG: "red"}
_WIDTH = len("transformers")


@click.command("doctor", short_help="Find out why a plugin or a model does not work.")
@click.argument("model", required=False)
@click.option("--quick", is_flag=True, help="Skip checks that import torch and transformers, and load no model.")
@json_option
@click.pass_context
def command(ctx: click.Context, model: str | None, quick: bool, as_json: bool) -> None:
    """Find what is wrong with plugins, libraries, machine and cache, and with MODEL if it is given.

    Each finding is followed by its fix. Exit code 1 if something is wrong; notes do not count.
    """
    from splitlearn_core.doctor.runner import examine

    result = examine(model, quick=quick, report=lambda subject: click.echo(f"still {subject} ...", err=True))
    if as_json:
        print_json(result.to_dict())
    else:
        click.echo(render_report(result))
    ctx.exit(0 if result.healthy else 1)


def render_report(report: Report) -> str:
    """Format findings as text."""
    counts = ", ".join(f"{report.count(level)} {level}" for level in reversed(Level))
    return "\n".join([*map(_lines, report.findings), "", counts])


def _lines(finding: Finding) -> str:
    level = styled(f"{finding.level:<5}", fg=_COLOURS[finding.level])
    first, *more = finding.what.splitlines() or [""]
    indent = " " * (len("wrong") + _WIDTH + 4)
    lines = [f"{level}  {finding.check:<{_WIDTH}}  {first}", *(indent + line.strip() for line in more)]
    # The place matters only if there is something to do.
    if finding.where and finding.level is not Level.OK:
        lines.append(f"{indent}at: {finding.where}")
    if finding.fix:
        lines.append(f"{indent}fix: {finding.fix}")
    return "\n".join(lines)
