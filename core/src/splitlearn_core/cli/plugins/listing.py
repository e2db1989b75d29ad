"""``splitlearn plugins list``: what is installed, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable

import click

from splitlearn_core.cli.shared_options import json_option, print_json, table
from splitlearn_core.plugins.metadata import CORE, core_version, summary
from splitlearn_core.plugins.registry import PluginStatus, registry

_check_option = click.option(
    "--check", is_flag=True, help="Import each plugin and call its hooks, to find what the source does not tell."
)


_strategies_option = click.option(
    "--strategies", is_flag=True, help="List the ways of loading, and what each of them can read."
)


def list_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options that `splitlearn plugins` and `splitlearn plugins list` share."""
    return _check_option(_strategies_option(json_option(function)))


@click.command("list")
@list_options
@click.pass_context
def command(ctx: click.Context, check: bool, strategies: bool, as_json: bool) -> None:
    """List the installed plugins (what `splitlearn plugins` does)."""
    before = ctx.parent.params if ctx.parent else {}
    check, as_json = check or before.get("check", False), as_json or before.get("as_json", False)
    strategies = strategies or before.get("strategies", False)
    ctx.exit(print_plugins(check=check, strategies=strategies, as_json=as_json))


def print_plugins(*, check: bool, strategies: bool, as_json: bool) -> int:
    """Print families and strategies, or how strategies read; return the exit code."""
    return _print_strategies(check, as_json) if strategies else _print(check, as_json)


def _print_strategies(check: bool, as_json: bool) -> int:
    """Print the loading strategies; return 1 where a check was asked for and found something wrong."""
    from splitlearn_core.readers.selection import BUILT_IN

    statuses = [status for status in registry().statuses(check=check) if status.entry.kind == "strategy"]
    added = {strategy.name: strategy for strategy in registry().strategies()} if check else {}
    own = f"{CORE} {core_version()}"
    rows = [(strategy.name, own, "ready", str(getattr(strategy, "reads", ""))) for strategy in BUILT_IN]
    for status in statuses:
        # What the package says of itself, unless it may be imported and asked.
        reads = getattr(added.get(status.entry.name), "reads", "") or summary(status.entry.distribution)
        rows.append((status.entry.name, status.entry.label, status.status, str(reads)))
    if as_json:
        print_json([dict(zip(("name", "from", "status", "reads"), row, strict=True)) for row in rows])
    else:
        click.echo(table(("strategy", "from", "status", "reads"), rows))
    return int(check and any(status.status not in ("ready", "blocked") for status in statuses))


def _print(check: bool, as_json: bool) -> int:
    """Print the list; return 1 where a check was asked for and found something wrong."""
    statuses = registry().statuses(check=check)
    for variable, names in registry().unknown_names().items():
        click.echo(f"{variable} names {', '.join(names)}: no such plugin is installed", err=True)
    if as_json:
        print_json([status.to_dict() for status in statuses])
    elif not statuses:
        click.echo("no plugins are installed; try: pip install splitlearn-gpt2")
    else:
        click.echo(_render(statuses))
    return int(check and any(status.status not in ("ready", "blocked") for status in statuses))


def _render(statuses: tuple[PluginStatus, ...]) -> str:
    # Strategies come in a table of their own: families are what a user looks for.
    tables = [
        _table(title, [status for status in statuses if status.entry.kind == kind])
        for kind, title in (("family", "model type"), ("strategy", "strategy"))
    ]
    lines = ["\n\n".join(filter(None, tables))]
    for status in statuses:
        if status.error:
            lines += ["", f"{status.entry.name}: {status.error}", f"  hint: {status.hint}"]
    return "\n".join(lines)


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
