"""The commands as the command line runs them, with core and this package alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from splitlearn_serve.ps import render_overview


def splitlearn(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "splitlearn_core", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("name", ["serve", "ps", "load", "unload"])
def test_the_commands_are_found(name: str) -> None:
    """Through the package's entry points; the list has the line of the command itself."""
    shown, listed = splitlearn(name, "--help"), splitlearn("--help")

    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith(f"Usage: splitlearn {name} [OPTIONS]")
    line = {
        "serve": "Run trunks for others, and keep models loaded.",
        "ps": "Show the models of a running `serve`.",
        "load": "Have a running `serve` load a model.",
        "unload": "Have a running `serve` unload a model.",
    }[name]
    assert f"  {name:<8}  {line}\n" in listed.stdout


def test_a_file_with_a_mistake_is_refused(tmp_path: Path) -> None:
    """Before anything is loaded or served."""
    (tmp_path / "models.yaml").write_text("manager: {max_modles: 3}\nmodels: []\n")

    result = splitlearn("serve", "--config", tmp_path / "models.yaml")

    assert (result.returncode, result.stdout) == (1, "")
    assert "did you mean 'max_models'?" in result.stderr
    assert "Traceback" not in result.stderr


def test_nothing_answers() -> None:
    """Without a server, `ps` says so."""
    result = splitlearn("ps", "--url", "http://127.0.0.1:9")

    assert (result.returncode, result.stdout) == (1, "")
    assert "is `splitlearn serve` running" in result.stderr


def test_the_table_is_plain_text() -> None:
    """Ids and errors are foreign text: what would move the cursor or break a row is escaped."""
    error = {"type": "Error", "message": "two\nlines \x1b[2J and " + "much " * 40}
    model = {"model_id": "a\x07b", "status": "loading", "stage": "reading", "bytes_done": 512, "bytes_total": 1024,
             "rate": 256.0, "eta": 2.0, "predicted": {"host": 100, "mapped": 924}, "leases": 0, "error": error,
             "waiting_for": "needs\x9b 3 GiB"}  # fmt: skip

    text = render_overview({"now": 1.0, "models": [model], "not_loaded": [{"model_id": "idle"}]})

    assert text.replace("\n", "").isprintable()
    lines = text.splitlines()
    assert len(lines) == 4
    assert r"a\x07b  loading" in lines[1]
    assert "50% of 1.0 KiB, 256 B/s, 2 s left  1.0 KiB" in lines[1]
    assert "…" in lines[1]
    assert "not loaded" in lines[2]
    assert lines[3] == r"a\x07b: needs\x9b 3 GiB"


def test_the_details_are_below_the_table() -> None:
    """Where a model runs that is not in the server's process, how often it died, and what its sessions cost."""
    sessions = {"open": 1, "opened": 2, "steps": 40, "steps_per_second": 2.5, "waiting_seconds": 0.26,
                "computing_seconds": 12.3456, "bytes_received": 2048, "bytes_sent": 4096, "cache_bytes": 1024,
                "refused": {"full": 3}}  # fmt: skip
    model = {"model_id": "trunk", "status": "failed", "host": "process", "pid": 7, "location": "/srv/model",
             "measured": 1024, "restarts": 2, "restarts_at": 5.0, "sessions": sessions}  # fmt: skip
    idle = {"model_id": "idle", "status": "ready", "host": "inline", "location": "/srv/model", "measured": 1024}

    lines = render_overview({"now": 1.0, "models": [model, idle]}).splitlines()

    assert "1 open, 40 steps, 2.5/s" in lines[2]
    assert "\n".join(lines[3:]) == (
        "trunk: host process, pid 7, /srv/model, 1.0 KiB of its own, restarts in a row: 2, starts again in 4 s\n"
        "trunk: sessions computed for 12.3 s, waited for 0.3 s; 2.0 KiB received, 4.0 KiB sent; "
        "1.0 KiB of caches reserved; refused as full: 3"
    )
