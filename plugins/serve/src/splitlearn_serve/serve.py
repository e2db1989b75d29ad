"""``splitlearn serve``: a manager that keeps running, with a page, an API, metrics and health."""

from __future__ import annotations

import logging
from pathlib import Path

import click


@click.command("serve", short_help="Keep models loaded, with a status page.")
@click.option(
    "--config",
    "config_file",
    required=True,
    type=click.Path(path_type=Path),
    help="The models to load: a YAML, TOML or JSON file.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to serve at.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8710,
    show_default=True,
    help="0 for any free one, which is printed.",
)
@click.option(
    "--allow-remote", is_flag=True, help="Serve at an address that others can reach: they may load and unload, too."
)
@click.option(
    "--allow-host", "names", multiple=True, metavar="NAME", help="A name under which others reach it. Repeatable."
)
def command(config_file: Path, host: str, port: int, allow_remote: bool, names: tuple[str, ...]) -> None:
    """Load the models of a file and keep them, with a page, JSON, metrics and health on loopback.

    Ends with SIGINT or SIGTERM. There is no password: whoever can reach the address can load and
    unload models, so any other address than loopback needs --allow-remote.
    """
    from splitlearn_serve.signals import exit_at_once

    with exit_at_once():
        _serve(config_file, host, port, allow_remote, names)


def _serve(config_file: Path, host: str, port: int, allow_remote: bool, names: tuple[str, ...]) -> None:
    # The import takes a second, in which a signal may arrive.
    from splitlearn_serve.run import Address, run_server

    address = Address(host, port, names)
    if not allow_remote and not address.is_loopback:
        raise click.UsageError(
            f"{host} can be reached from other machines, and whoever reaches it can load and unload models; "
            "say --allow-remote if that is meant"
        )
    _log_to_stderr()
    run_server(config_file, address, lambda url: click.echo(f"Serving at {url}", err=True))


def _log_to_stderr() -> None:
    """Log a line for each change of a model's status."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    for package in ("splitlearn_core", "splitlearn_serve"):
        logging.getLogger(package).setLevel(logging.INFO)
