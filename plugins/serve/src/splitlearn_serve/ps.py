"""``splitlearn ps``: the models of a running ``splitlearn serve``."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit

import click

from splitlearn_core import ConfigurationError, SplitLearnError
from splitlearn_core.cli import json_option, print_json, table, usage_errors
from splitlearn_core.extension import human_bytes, reason

_TIMEOUT = 10.0
#: Enough for thousands of models.
_ANSWER_LIMIT = 32 * 2**20
_COLUMNS = ("model", "status", "stage", "progress", "memory", "leases", "expires", "error")
_ERROR_WIDTH = 60


def _check_url(_: click.Context, __: click.Parameter, value: str) -> str:
    with usage_errors():
        return _address(value)


@click.command("ps", short_help="Show the models of a running `serve`.")
@click.option("--url", default="http://127.0.0.1:8710", show_default=True, callback=_check_url, help="Where it serves.")
@json_option
def command(url: str, as_json: bool) -> None:
    """Show the models of a running `splitlearn serve`: status, progress, memory, leases and errors."""
    overview = fetch_overview(url)
    if as_json:
        print_json(overview)
    else:
        click.echo(render_overview(overview))


def fetch_overview(url: str) -> dict[str, Any]:
    """Fetch the models and statistics of a running server.

    Raises:
        ConfigurationError: The URL is invalid.
        SplitLearnError: Nothing answers there, or not a ``splitlearn serve``.
    """
    address = _address(url)
    # No proxy for loopback, which would be the proxy's own. No redirects: the URL is explicit.
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
    ):
        opener.add_handler(handler)
    if not _is_loopback(address):
        opener.add_handler(urllib.request.ProxyHandler())
    opener.add_handler(urllib.request.HTTPErrorProcessor())
    request = urllib.request.Request(f"{address}/api/models", headers={"Accept": "application/json"})  # noqa: S310
    try:
        with opener.open(request, timeout=_TIMEOUT) as answer:
            overview = json.loads(answer.read(_ANSWER_LIMIT))
        if not isinstance(overview, dict) or not isinstance(overview["models"], list):
            raise TypeError("no list of models")
    except urllib.error.HTTPError as error:
        raise _foreign_server(address, _refusal(error)) from error
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise SplitLearnError(
            f"nothing answers at {address}: {reason}", hint="is `splitlearn serve` running, and at this --url?"
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _foreign_server(address, "its answer is not a list of models") from error
    return overview


def render_overview(overview: Mapping[str, Any]) -> str:
    """Render the overview as a table."""
    now = overview.get("now", time.time())
    models = [*overview["models"], *overview.get("not_loaded", ())]
    if not models:
        return "no model is configured or loaded"
    rows = [_row(model, now) for model in sorted(models, key=lambda model: str(model["model_id"]))]
    lines = [table(_COLUMNS, rows)]
    for model in models:
        awaited = model.get("waiting_for")
        if awaited:
            lines.append(f"{_plain(model['model_id'])}: {_plain(awaited)}")
    return "\n".join(lines)


def _row(model: Mapping[str, Any], now: float) -> tuple[str, ...]:
    error = model.get("error")
    text = f"{error['type']}: {error['message']}" if error else ""
    return (
        _plain(model["model_id"]),
        _plain(model.get("status", "not loaded")),
        _plain(model.get("stage") or "-"),
        _progress(model),
        human_bytes(sum(model["predicted"].values())) if model.get("predicted") else "-",
        str(model.get("leases", 0)),
        _expires(model, now),
        _shortened(_plain(text)) or "-",
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


def _plain(text: object) -> str:
    """Escape control characters and line breaks: ids and errors are foreign text."""
    line = " ".join(str(text).split())
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)


def _shortened(text: str) -> str:
    return text if len(text) <= _ERROR_WIDTH else text[: _ERROR_WIDTH - 1] + "…"


def _address(url: str) -> str:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018  # reading it is what checks it
    except ValueError as error:
        raise ConfigurationError(
            f"{url!r} is not a URL: {reason(error)}", hint="for example http://127.0.0.1:8710"
        ) from error
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigurationError(f"{url!r} is not an http or https URL", hint="for example http://127.0.0.1:8710")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def _is_loopback(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    return host in {"localhost", "::1"} or host.startswith("127.")


def _refusal(error: urllib.error.HTTPError) -> str:
    """Return status and message of a refusal, or the status and its reason phrase."""
    try:
        message = json.loads(error.read(_ANSWER_LIMIT))["error"]["message"]
    except (ValueError, KeyError, TypeError, OSError, HTTPException):
        message = error.reason
    return f"{error.code} {_plain(message)[:300]}"


def _foreign_server(address: str, evidence: str) -> SplitLearnError:
    return SplitLearnError(
        f"the server at {address} is not a `splitlearn serve`: {evidence}", hint="give its address with --url"
    )
