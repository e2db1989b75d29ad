"""``splitlearn ps``: the models of a running ``splitlearn serve``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from splitlearn_core.cli import json_option, print_json, table
from splitlearn_core.extension import human_bytes
from splitlearn_serve.server_client import ServerClient, plain, server_options

_COLUMNS = ("model", "status", "stage", "progress", "memory", "leases", "expires", "sessions", "error")
_ERROR_WIDTH = 60


@click.command("ps", short_help="Show the models of a running `serve`.")
@server_options
@json_option
def command(url: str, token_file: Path | None, ca_file: Path | None, as_json: bool) -> None:
    """Show the models of a running `splitlearn serve`: status, progress, memory, leases, sessions and errors."""
    overview = fetch_overview(url, token_file, ca_file)
    if as_json:
        print_json(overview)
    else:
        click.echo(render_overview(overview))


def fetch_overview(url: str, token_file: Path | None = None, ca_file: Path | None = None) -> dict[str, Any]:
    """Fetch the models and statistics of a running server.

    Raises:
        ConfigurationError: The URL is invalid.
        SplitLearnError: Nothing answers there, or not a ``splitlearn serve``.
    """
    return ServerClient(url, token_file, ca_file).overview()


def render_overview(overview: Mapping[str, Any]) -> str:
    """Render the overview as a table, with the details of each model below it."""
    now = overview.get("now", time.time())
    models = [*overview["models"], *overview.get("not_loaded", ())]
    if not models:
        return "no model is configured or loaded"
    rows = [_row(model, now) for model in sorted(models, key=lambda model: str(model["model_id"]))]
    lines = [table(_COLUMNS, rows)]
    for model in models:
        lines += [f"{plain(model['model_id'])}: {plain(line)}" for line in _details(model, now)]
    return "\n".join(lines)


def _details(model: Mapping[str, Any], now: float) -> Iterator[str]:
    """Yield what has no column: why a model waits, where it runs, and what its sessions cost."""
    if model.get("waiting_for"):
        yield model["waiting_for"]
    place = [f"host {model['host']}"] if model.get("host", "inline") != "inline" else []
    if model.get("pid") is not None:
        place.append(f"pid {model['pid']}")
    if place and model.get("location"):
        place.append(str(model["location"]))
    if place and model.get("measured") is not None:
        place.append(f"{human_bytes(model['measured'])} of its own")
    if model.get("restarts"):
        place.append(f"restarts in a row: {model['restarts']}")
    if model.get("restarts_at") is not None:
        place.append(f"starts again in {max(0.0, model['restarts_at'] - now):.0f} s")
    if place:
        yield ", ".join(place)
    sessions = model.get("sessions")
    if sessions and (sessions["opened"] or sessions["steps"] or sessions["refused"]):
        costs = [
            f"computed for {sessions['computing_seconds']:.1f} s, waited for {sessions['waiting_seconds']:.1f} s",
            f"{human_bytes(sessions['bytes_received'])} received, {human_bytes(sessions['bytes_sent'])} sent",
            *([f"{human_bytes(sessions['cache_bytes'])} of caches reserved"] if sessions["cache_bytes"] else []),
            *(f"refused as {code}: {count}" for code, count in sorted(sessions["refused"].items())),
        ]
        yield f"sessions {'; '.join(costs)}"


def _row(model: Mapping[str, Any], now: float) -> tuple[str, ...]:
    error = model.get("error")
    text = f"{error['type']}: {error['message']}" if error else ""
    return (
        plain(model["model_id"]),
        plain(model.get("status", "not loaded")),
        plain(model.get("stage") or "-"),
        _progress(model),
        human_bytes(sum(model["predicted"].values())) if model.get("predicted") else "-",
        str(model.get("leases", 0)),
        _expires(model, now),
        _sessions(model),
        _shortened(plain(text)) or "-",
    )


def _progress(model: Mapping[str, Any]) -> str:
    total = model.get("bytes_total", 0)
    if not model.get("stage") or not total:
        return "-"
    parts = [f"{100 * model['bytes_done'] // total}% of {human_bytes(total)}"]
    if model.get("rate"):
        parts.append(f"{human_bytes(model['rate'])}/s")
    if model.get("eta") is not None:
        parts.append(f"{model['eta']:.0f} s left")
    if model.get("stalled_for") is not None:
        parts.append(f"stalled for {model['stalled_for']:.0f} s")
    return ", ".join(parts)


def _expires(model: Mapping[str, Any], now: float) -> str:
    at = model.get("expires_at")
    if at is not None:
        return f"in {max(0.0, at - now):.0f} s"
    return "pinned" if model.get("pinned") else "-"


def _sessions(model: Mapping[str, Any]) -> str:
    sessions = model.get("sessions")
    if not sessions:
        return "-"
    steps = f"{sessions['steps']:,} step{'s' * (sessions['steps'] != 1)}"
    rate = f", {sessions['steps_per_second']:g}/s" if sessions["steps_per_second"] else ""
    return f"{sessions['open']} open, {steps}{rate}"


def _shortened(text: str) -> str:
    return text if len(text) <= _ERROR_WIDTH else text[: _ERROR_WIDTH - 1] + "…"
