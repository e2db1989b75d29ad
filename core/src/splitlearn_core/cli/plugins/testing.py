"""``splitlearn plugins test``: the conformance kit on an installed plugin that brings no test file."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from splitlearn_core.cli.options import json_option, print_json, table

if TYPE_CHECKING:
    from splitlearn_core.testing.results import Case, Check, FamilyReport


@click.command("test", short_help="Run the conformance kit on an installed plugin.")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option("--quick", is_flag=True, help="One dtype, one attention implementation and one cut.")
@click.option("-k", "expressions", multiple=True, metavar="EXPR", help="Only checks that pytest's -k would select.")
@json_option
@click.pass_context
def command(
    ctx: click.Context, names: tuple[str, ...], quick: bool, expressions: tuple[str, ...], as_json: bool
) -> None:
    """Run every check of the conformance kit on the plugin NAME, which needs no test file of its own.

    NAME is a model type, or a distribution for all of its model types. Each is tested on tiny random
    models, tied and untied, as if it were the only plugin. Needs pytest: splitlearn-core[testing].
    Exit code 1 where a check fails.
    """
    from splitlearn_core.testing.choosing import choose_families

    entries = choose_families(names)
    from splitlearn_core.testing.running import run_kit

    reports = run_kit(entries, quick=quick, expressions=expressions, on_case=_Progress())
    if as_json:
        print_json([report.to_dict() for report in reports])
    else:
        click.echo("\n\n".join(map(render_report, reports)))
    ctx.exit(0 if all(report.passed for report in reports) else 1)


class _Progress:
    """Tells on stderr which check is at work: in one line on a terminal, a line for each check elsewhere."""

    def __init__(self) -> None:
        self._last = ("", "")
        # As it is now: while pytest runs, sys.stderr is another.
        self._stream = sys.stderr
        self._terminal = self._stream.isatty()

    def __call__(self, case: Case) -> None:
        if (case.model_type, case.check) != self._last:
            self._last = (case.model_type, case.check)
            words = f"{case.model_type}: {case.check.removeprefix('test_')}"
            click.echo(f"\r\x1b[K{words}" if self._terminal else words, nl=not self._terminal, file=self._stream)


def render_report(report: FamilyReport) -> str:
    """Show to people what was found of a family."""
    rows = [(check.name, check.outcome, *_counts(check), f"{check.seconds:.2f} s") for check in report.checks]
    failed = [check for check in report.checks if check.outcome == "failed"]
    head = f"{report.model_type} of {report.distribution} {report.version}"
    verdict = f"{len(failed)} of {len(rows)} checks FAILED" if failed else f"all {len(rows)} checks hold"
    lines = [head, "", table(("check", "result", "passed", "failed", "skipped", "expected", "time"), rows)]
    for outcome, title in (("skipped", "skipped"), ("expected failure", "expected failures")):
        reasons = _reasons(report, outcome)
        lines += ["", f"{title}:", *reasons] if reasons else []
    for check in failed:
        lines += ["", *_failures(check)]
    return "\n".join([*lines, "", verdict])


def _counts(check: Check) -> tuple[str, ...]:
    return tuple(str(len(check.of(outcome))) for outcome in ("passed", "failed", "skipped", "expected failure"))


def _reasons(report: FamilyReport, outcome: str) -> list[str]:
    """Return a line for each check and reason, however many cases it is of."""
    found = [(check.name, case.message) for check in report.checks for case in check.of(outcome)]
    return [f"  {name}: {message}" for name, message in dict.fromkeys(found)]


def _failures(check: Check) -> list[str]:
    """Return what failed, the same message once, with the cases that it is of."""
    same: dict[tuple[str, tuple[tuple[str, str], ...]], list[str]] = {}
    for case in check.of("failed"):
        same.setdefault((case.message, case.look_at), []).append(case.parameters)
    lines = [f"{check.name} failed"]
    for (message, look_at), parameters in same.items():
        named = ", ".join(filter(None, parameters[:3])) + (f" and {len(parameters) - 3} more" if parameters[3:] else "")
        lines += [f"  [{named}]"] if named else []
        lines += [f"  {line}" for line in message.splitlines()]
        lines += [f"  look at {field}: {why}" for field, why in look_at]
    return lines
