"""``splitlearn plugins``: list the installed plugins, and run the conformance kit on one."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

import click

from splitlearn_core.cli.main import CommandGroup
from splitlearn_core.cli.shared_options import json_option, print_json, table
from splitlearn_core.plugins.metadata import CORE, FAMILY, HOST, STAGE, STRATEGY, core_version, summary
from splitlearn_core.plugins.registry import PluginStatus, registry

if TYPE_CHECKING:
    from splitlearn_core.testing.results import Case, Check, FamilyReport

_WIDTH = 100


def list_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options of `splitlearn plugins` and `splitlearn plugins list`."""
    check = click.option(
        "--check", is_flag=True, help="Import each plugin and call its hooks, which finds more problems."
    )
    strategies = click.option("--strategies", is_flag=True, help="List the loading strategies and what they can read.")
    return check(strategies(json_option(function)))


@click.group(
    "plugins",
    cls=CommandGroup,
    prefix="plugins",
    modules={name: f"{__name__}:{name}_command" for name in ("list", "test")},
    invoke_without_command=True,
    short_help="List, test and write plugins.",
)
@list_options
@click.pass_context
def command(ctx: click.Context, check: bool, strategies: bool, as_json: bool) -> None:
    """List the installed plugins, from metadata alone: none is imported."""
    if ctx.invoked_subcommand is None:
        ctx.exit(print_plugins(check=check, strategies=strategies, as_json=as_json))


@click.command("list")
@list_options
@click.pass_context
def list_command(ctx: click.Context, check: bool, strategies: bool, as_json: bool) -> None:
    """List the installed plugins, as `splitlearn plugins` does."""
    options = {"check": check, "strategies": strategies, "as_json": as_json}
    before = ctx.parent.params if ctx.parent else {}
    ctx.exit(print_plugins(**{name: value or before.get(name, False) for name, value in options.items()}))


def print_plugins(*, check: bool, strategies: bool, as_json: bool) -> int:
    """Print the plugins, or what each loading strategy reads; return 1 if a check finds a problem."""
    statuses = registry().statuses(check=check)
    if strategies:
        statuses = tuple(status for status in statuses if status.entry.kind == STRATEGY)
        _print_strategies(statuses, check, as_json)
    else:
        _print_plugins(statuses, as_json)
    return int(check and any(status.status not in ("ready", "blocked") for status in statuses))


def _print_strategies(statuses: tuple[PluginStatus, ...], check: bool, as_json: bool) -> None:
    from splitlearn_core.readers.selection import BUILT_IN

    added = {strategy.name: strategy for strategy in registry().strategies()} if check else {}
    own = f"{CORE} {core_version()}"
    rows = [(strategy.name, own, "ready", str(getattr(strategy, "reads", ""))) for strategy in BUILT_IN]
    for status in statuses:
        # Without --check nothing is imported: the summary of the package is shown instead.
        reads = getattr(added.get(status.entry.name), "reads", "") or summary(status.entry.distribution)
        rows.append((status.entry.name, status.entry.label, status.status, str(reads)))
    if as_json:
        print_json([dict(zip(("name", "from", "status", "reads"), row, strict=True)) for row in rows])
    else:
        click.echo(table(("strategy", "from", "status", "reads"), rows))


def _print_plugins(statuses: tuple[PluginStatus, ...], as_json: bool) -> None:
    for variable, names in registry().unknown_names().items():
        click.echo(f"{variable} names {', '.join(names)}: no such plugin is installed", err=True)
    if as_json:
        print_json([status.to_dict() for status in statuses])
    elif not statuses:
        click.echo("no plugins are installed; try: pip install splitlearn-gpt2")
    else:
        # A table for each kind, because users mostly look for families.
        tables = [
            _table(title, [status for status in statuses if status.entry.kind == kind])
            for kind, title in (
                (FAMILY, "model type"),
                (STRATEGY, "strategy"),
                (HOST, "host"),
                (STAGE, "cut stage"),
            )
        ]
        click.echo("\n\n".join(filter(None, tables)))
        for status in statuses:
            if status.error:
                click.echo(f"\n{status.entry.name}: {status.error}\n  hint: {status.hint}")


def _table(title: str, statuses: list[PluginStatus]) -> str:
    rows = [
        (
            status.entry.name,
            status.entry.distribution,
            status.entry.version,
            status.status,
            status.entry.provenance,
            ", ".join(hook.removeprefix("splitlearn_") for hook in status.hooks) or "-",
        )
        for status in statuses
    ]
    return table((title, "distribution", "version", "status", "from", "hooks"), rows) if rows else ""


@click.command("test", short_help="Run the conformance kit on an installed plugin.")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option("--quick", is_flag=True, help="One dtype, one attention implementation and one cut.")
@click.option("-k", "expressions", multiple=True, metavar="EXPR", help="Run only checks that pytest's -k would select.")
@json_option
@click.pass_context
def test_command(
    ctx: click.Context, names: tuple[str, ...], quick: bool, expressions: tuple[str, ...], as_json: bool
) -> None:
    """Run every check of the conformance kit on the plugin NAME, which needs no test file of its own.

    NAME is a model type, or a distribution for all of its model types. Each is tested on tiny random
    models, tied and untied, as if it were the only plugin. Needs pytest: splitlearn-core[testing].
    Exit code 1 if a check fails.
    """
    from splitlearn_core.testing.choosing import choose_families

    entries = choose_families(names)
    from splitlearn_core.testing.running import run_kit

    with _Progress() as progress:
        reports = run_kit(entries, quick=quick, expressions=expressions, on_case=progress)
    if as_json:
        print_json([report.to_dict() for report in reports])
    else:
        click.echo("\n\n".join(map(render_report, reports)))
    ctx.exit(0 if all(report.passed for report in reports) else 1)


class _Progress:
    """Reports the running check on stderr: in one line on a terminal, a line for each check elsewhere."""

    def __init__(self) -> None:
        self._last = ("", "")
        # While pytest runs, sys.stderr is replaced.
        self._stream = sys.stderr
        self._terminal = self._stream.isatty()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Clear the line."""
        if self._terminal:
            click.echo("\r\x1b[K", nl=False, file=self._stream)

    def __call__(self, case: Case) -> None:
        if case.outcome != "skipped" and (case.model_type, case.check) != self._last:
            self._last = (case.model_type, case.check)
            words = f"{case.model_type}: {case.check.removeprefix('test_')}"
            click.echo(f"\r\x1b[K{words}" if self._terminal else words, nl=not self._terminal, file=self._stream)


def render_report(report: FamilyReport) -> str:
    """Return the report as text; if checks failed, without those that were skipped."""
    failed = [check for check in report.checks if check.outcome == "failed"]
    shown = [check for check in report.checks if not failed or check.outcome != "skipped"]
    rows = [(check.name, check.outcome, *_counts(check), f"{check.seconds:.2f} s") for check in shown]
    head = f"{report.model_type} of {report.distribution} {report.version}"
    lines = [head, "", table(("check", "result", "passed", "failed", "skipped", "expected", "time"), rows)]
    for outcome, title in (("skipped", "skipped"), ("expected failure", "expected failures")):
        reasons = _reasons(report, outcome)
        lines += ["", f"{title}:", *reasons] if reasons else []
    for check in failed:
        lines += ["", *_failures(check)]
    verdict = f"all {len(report.checks)} checks pass"
    if failed:
        skipped = sum(check.outcome == "skipped" for check in report.checks)
        verdict = f"{len(failed)} of {len(report.checks)} checks FAILED" + (
            f", {skipped} were skipped" if skipped else ""
        )
    return "\n".join([*lines, "", verdict])


def _counts(check: Check) -> tuple[str, ...]:
    return tuple(str(len(check.of(outcome))) for outcome in ("passed", "failed", "skipped", "expected failure"))


def _reasons(report: FamilyReport, outcome: str) -> list[str]:
    """Return each reason, followed by the checks that it applies to."""
    checks_by_reason: dict[str, dict[str, None]] = {}
    for check in report.checks:
        for case in check.of(outcome):
            checks_by_reason.setdefault(case.message, {})[check.name] = None
    lines = []
    for message, names in checks_by_reason.items():
        wrapped = textwrap.wrap(", ".join(names), _WIDTH, initial_indent="    ", subsequent_indent="    ")
        lines += [f"  {message}", *wrapped]
    return lines


def _failures(check: Check) -> list[str]:
    """Return the messages of the failed cases, equal ones once, each with its cases."""
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
