"""``splitlearn plugins list``: the installed plugins and their problems."""

from __future__ import annotations

from collections.abc import Callable

import click

from splitlearn_core.cli.shared_options import json_option, print_json, table
from splitlearn_core.plugins.metadata import CORE, FAMILY, STRATEGY, core_version, summary
from splitlearn_core.plugins.registry import PluginStatus, registry


def list_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options that `splitlearn plugins` and `splitlearn plugins list` share."""
    check = click.option(
        "--check", is_flag=True, help="Import each plugin and call its hooks, to find what metadata cannot show."
    )
    strategies = click.option("--strategies", is_flag=True, help="List the loading strategies and what they can read.")
    return check(strategies(json_option(function)))


@click.command("list")
@list_options
@click.pass_context
def command(ctx: click.Context, check: bool, strategies: bool, as_json: bool) -> None:
    """List the installed plugins, as `splitlearn plugins` does."""
    before = ctx.parent.params if ctx.parent else {}
    check, as_json = check or before.get("check", False), as_json or before.get("as_json", False)
    strategies = strategies or before.get("strategies", False)
    ctx.exit(print_plugins(check=check, strategies=strategies, as_json=as_json))


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
        # Without --check nothing is imported: the description of the package must do.
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
        # Strategies have a table of their own: users look for families.
        tables = [
            _table(title, [status for status in statuses if status.entry.kind == kind])
            for kind, title in ((FAMILY, "model type"), (STRATEGY, "strategy"))
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
