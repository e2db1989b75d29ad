"""``splitlearn load``: have a running ``splitlearn serve`` load a model, and wait until it is ready."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from splitlearn_core import SplitLearnError
from splitlearn_core.cli import json_option, print_json
from splitlearn_core.extension import human_bytes
from splitlearn_serve.server_client import ServerClient, plain, server_options

#: Seconds between two requests for the progress.
_INTERVAL = 0.3


@click.command("load", short_help="Have a running `serve` load a model.")
@click.argument("model_id", metavar="ID")
@server_options
@json_option
def command(model_id: str, url: str, token_file: Path | None, ca_file: Path | None, as_json: bool) -> None:
    """Have a running `splitlearn serve` load the model ID, for which it has a configuration, and wait for it.

    Its progress is printed on stderr. A model that is loaded already stays as it is.
    """
    server = ServerClient(url, token_file, ca_file)
    status = _status(server, model_id)
    if status != "ready":
        if status in ("failed", "not loaded"):
            server.request("POST", f"{server.model_path(model_id)}/load")
        _follow(server, model_id)
    model = server.request("GET", server.model_path(model_id))
    if as_json:
        print_json(model)
    else:
        memory = human_bytes(sum(model["predicted"].values()))
        click.echo(f"{plain(model_id)} is {'ready' if status != 'ready' else 'loaded already'}: {memory}")


def _status(server: ServerClient, model_id: str) -> str:
    return str((_entry(server, model_id) or {"status": "not loaded"}).get("status", "not loaded"))


def _entry(server: ServerClient, model_id: str) -> Mapping[str, Any] | None:
    overview = server.overview()
    for model in (*overview["models"], *overview.get("not_loaded", ())):
        if model["model_id"] == model_id:
            entry: Mapping[str, Any] = model
            return entry
    return None


def _follow(server: ServerClient, model_id: str) -> None:
    """Print the progress of a load until it has ended.

    Raises:
        SplitLearnError: It failed, or was cancelled.
    """
    printed = ""
    while True:
        model = _entry(server, model_id)
        status = "not loaded" if model is None else str(model.get("status", "not loaded"))
        if model is not None and status == "ready":
            return
        if model is None or status in ("failed", "not loaded", "stuck"):
            error = (model or {}).get("error")
            if not error:
                raise SplitLearnError(f"{plain(model_id)} was not loaded: its load was cancelled")
            raise SplitLearnError(
                f"{plain(model_id)} was not loaded: {plain(error['message'])}", hint=plain(error.get("hint", ""))
            )
        line = _progress(model, status)
        if line != printed:
            click.echo(line, err=True)
            printed = line
        threading.Event().wait(_INTERVAL)


def _progress(model: Mapping[str, Any], status: str) -> str:
    parts = [plain(model["model_id"]) + ": " + plain(model.get("stage") or status)]
    if model.get("bytes_total"):
        parts.append(f"{100 * model['bytes_done'] // model['bytes_total']}% of {human_bytes(model['bytes_total'])}")
    if model.get("waiting_for"):
        parts.append(plain(model["waiting_for"]))
    return ", ".join(parts)
