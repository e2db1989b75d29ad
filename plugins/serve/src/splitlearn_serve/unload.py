"""``splitlearn unload``: have a running ``splitlearn serve`` unload a model."""

from __future__ import annotations

from pathlib import Path

import click

from splitlearn_core.cli import json_option, print_json
from splitlearn_core.extension import human_bytes
from splitlearn_serve.server_client import ServerClient, plain, server_options

#: Seconds for the answer, in addition to those for the unload itself.
_PATIENCE = 60.0


@click.command("unload", short_help="Have a running `serve` unload a model.")
@click.argument("model_id", metavar="ID")
@server_options
@click.option("--force", is_flag=True, help="End sessions and leases rather than wait for them.")
@click.option(
    "--timeout",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    help="Seconds to wait for sessions, leases and calls to end.",
)
@json_option
def command(
    model_id: str,
    url: str,
    token_file: Path | None,
    ca_file: Path | None,
    force: bool,
    timeout: float,
    as_json: bool,
) -> None:
    """Have a running `splitlearn serve` unload the model ID once no session is open on it and it has no leases.

    The next request for it loads it again. With --force, that includes open sessions, which are then rebuilt.
    """
    server = ServerClient(url, token_file, ca_file)
    if not force:
        click.echo(f"{plain(model_id)}: waiting up to {timeout:g} s for its sessions and leases to end", err=True)
    path = f"{server.model_path(model_id)}?timeout={timeout:g}" + "&force=true" * force
    report = server.request("DELETE", path, timeout + _PATIENCE)
    if as_json:
        print_json(report)
    else:
        released = human_bytes(sum(report["released"].values()))
        click.echo(f"{plain(model_id)} is unloaded: {released} released")
