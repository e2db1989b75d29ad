"""Debug records of plugin use: each import, each hook call, each plugin that was skipped."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from splitlearn_core import BrokenPluginError
from splitlearn_core.plugins import host
from splitlearn_core.plugins.host import trace_to_stderr
from splitlearn_core.plugins.registry import registry, reset_registry

pytestmark = pytest.mark.light

HEAD = "from splitlearn_core import ModelFamily, hookimpl\n"
VALID = "@hookimpl\ndef splitlearn_model_families():\n    return [ModelFamily(model_type='alpha', architecture='X')]\n"
MAP = "@hookimpl\ndef splitlearn_map_weight_keys(checkpoint_keys):\n    {body}\n"
KEYS = ["a.weight", "b.weight", "c.weight"]
FAMILY = "ModelFamily(model_type='alpha', architecture='X'"


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Leave the logger as it was."""
    log = host.trace_log
    before = (list(log.handlers), log.level, log.propagate)
    yield
    log.handlers[:], log.propagate = before[0], before[2]
    log.setLevel(before[1])


def steps(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [record.trace for record in caplog.records if record.name == "splitlearn_core.trace"]


@pytest.fixture
def listening(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Capture the records through logging, as a server would."""
    caplog.set_level(logging.DEBUG, logger="splitlearn_core.trace")
    return caplog


def test_each_step_of_a_plugins_use_is_a_record(world: Any, listening: pytest.LogCaptureFixture) -> None:
    """The import, the hook call, and which plugin was skipped and why; in order, with times."""
    world.install("alpha", HEAD + VALID, version="3.1")
    world.install("beta")

    registry().family("alpha")

    records = [(step["event"], step["plugin"], step["what"]) for step in steps(listening)]
    assert records[-2:] == [
        ("import", "splitlearn-alpha 3.1", "splitlearn_alpha"),
        ("hook", "splitlearn-alpha 3.1", "splitlearn_model_families"),
    ]
    assert steps(listening)[-1]["answer"].startswith(f"[{FAMILY}"[:30])
    (beta,) = [step for step in steps(listening) if step["plugin"] == "splitlearn-beta 1.0"]
    assert (beta["event"], beta["what"], beta["answer"]) == (
        "skipped",
        "model type 'beta'",
        "model type 'alpha' was requested",
    )
    assert all((step["milliseconds"] is None) == (step["event"] == "skipped") for step in steps(listening))
    assert all(step["error"] is None for step in steps(listening))


def test_arguments_and_answers_are_shortened(world: Any, listening: pytest.LogCaptureFixture) -> None:
    """The first items of a large mapping are shown."""
    body = "return {key: 'model.' + key for key in checkpoint_keys}"
    world.install("alpha", HEAD + VALID + MAP.format(body=body))
    family = registry().family("alpha")

    registry().map_weight_keys(family, {"hidden_size": 8}, KEYS)

    step = steps(listening)[-1]
    assert step["arguments"]["family"].startswith("ModelFamily(model_type='alpha'")
    assert step["arguments"]["config"] == "{'hidden_size': 8}"
    assert step["arguments"]["checkpoint_keys"] == "['a.weight', 'b.weight', ...]"
    assert step["answer"] == "{'a.weight': 'model.a.weight', 'b.weight': 'model.b.weight', ...}"


def test_an_exception_is_logged(world: Any, listening: pytest.LogCaptureFixture) -> None:
    """Exceptions of an import, of a hook, and of a generator are logged."""
    world.install("alpha", "raise OSError('disk on fire')")
    world.install("beta", HEAD + "@hookimpl\ndef splitlearn_model_families():\n    yield 1\n    raise SystemExit(3)\n")

    for name in ("alpha", "beta"):
        with pytest.raises(BrokenPluginError):
            registry().family(name)

    failed = [(step["event"], step["plugin"], step["error"]) for step in steps(listening) if step["error"]]
    assert failed == [
        ("import", "splitlearn-alpha 1.0", "OSError: disk on fire"),
        ("hook", "splitlearn-beta 1.0", "SystemExit: 3"),
    ]


def test_a_blocked_plugin_is_reported_once(
    world: Any, monkeypatch: pytest.MonkeyPatch, listening: pytest.LogCaptureFixture
) -> None:
    """The record names the variable; it is written once, however often other plugins are used."""
    world.install("alpha")
    world.install("beta")
    monkeypatch.setenv("SPLITLEARN_DISABLE_PLUGINS", "beta")

    for _ in range(3):
        registry().family("alpha")

    reasons = [step["answer"] for step in steps(listening) if step["plugin"] == "splitlearn-beta 1.0"]
    assert reasons == ["blocked by SPLITLEARN_DISABLE_PLUGINS"]


def test_a_repr_that_raises_is_no_failure(world: Any, listening: pytest.LogCaptureFixture) -> None:
    """The record shows the class instead."""
    strategies = (
        "from splitlearn_core.readers.copied import CopiedStrategy\n"
        "class Shy(CopiedStrategy):\n"
        "    name = 'shy'\n"
        "    def __repr__(self):\n        raise OSError('no picture, please')\n"
        "@hookimpl\ndef splitlearn_loading_strategies():\n    return [Shy()]\n"
    )
    world.install("alpha", HEAD + VALID + strategies)

    loaded = registry().plugin("alpha")

    assert loaded.strategy("shy") is not None
    assert steps(listening)[-1]["answer"].startswith("[<Shy instance at")


def test_without_a_listener_no_value_is_shortened(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ``repr`` of a large mapping costs time."""
    monkeypatch.setattr(host, "_shortened", pytest.fail)
    host.trace_log.setLevel(logging.INFO)
    world.install("alpha")
    world.install("beta")

    assert registry().family("alpha").model_type == "alpha"


@pytest.mark.parametrize(("value", "lines"), [("", False), ("0", False), ("1", True), ("json", True), ("JSON", True)])
def test_the_variable_turns_it_on(
    world: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str, lines: bool
) -> None:
    """Lines or JSON lines on stderr, nothing on stdout, and each step once, also with a new registry."""
    monkeypatch.setenv("SPLITLEARN_TRACE", value)
    world.install("alpha", HEAD + VALID)
    registry()
    reset_registry()

    registry().family("alpha")

    shown = capsys.readouterr()
    assert shown.out == ""
    printed = [line for line in shown.err.splitlines() if "splitlearn_model_families" in line]
    assert len(printed) == int(lines)
    if value.lower() == "json":
        step = json.loads(printed[0])
        assert (step["event"], step["plugin"]) == ("hook", "splitlearn-alpha 1.0")
        assert step["answer"].startswith("[ModelFamily(model_type='alpha'")
        assert step["milliseconds"] >= 0
    elif lines:
        assert printed[0].startswith(
            "trace hook     splitlearn-alpha 1.0  splitlearn_model_families() -> [ModelFamily(model_type='alpha'"
        )
        assert printed[0].endswith(" ms]")


MAPPED = """
@hookimpl
def splitlearn_map_weight_keys(family, checkpoint_keys):
    return None
"""


@pytest.mark.heavy
def test_the_option_traces_one_command(world: Any, single: Any, cli: Any) -> None:
    """The option comes before the command, whose stdout is unchanged."""
    world.install("llama", world.source("llama") + MAPPED)
    plain = cli("plan", single, "--split", 2, 4)
    code, out, err = cli("--trace", "plan", single, "--split", 2, 4)

    assert (code, out) == plain[:2]
    assert "trace hook     splitlearn-llama" in err
    assert "splitlearn_map_weight_keys(family=ModelFamily(model_type='llama'" in err


@pytest.mark.heavy
def test_the_option_leaves_the_form_to_the_variable(
    world: Any, single: Any, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JSON, if the variable requests it."""
    world.install("llama", world.source("llama") + MAPPED)
    monkeypatch.setenv("SPLITLEARN_TRACE", "json")

    _, _, err = cli("--trace", "plan", single, "--split", 2, 4)

    records = [json.loads(line) for line in err.splitlines()]
    assert {step["event"] for step in records if step["what"] == "splitlearn_map_weight_keys"} == {"hook"}


def test_the_doctor_traces_plugins_in_their_own_process(world: Any) -> None:
    """In the form that the variable requests; stdout is its report."""
    world.install("alpha")

    done = world.python("-m", "splitlearn_core", "--trace", "doctor", "--quick", "--json", SPLITLEARN_TRACE="json")

    records = [json.loads(line) for line in done.stderr.splitlines()]
    assert [step["event"] for step in records if step["plugin"] == "splitlearn-alpha 1.0"][:2] == ["import", "hook"]
    assert json.loads(done.stdout)["counts"]


def test_a_closed_stderr_is_no_failure(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record that cannot be written is lost; the load goes on."""
    closed = io.StringIO()
    closed.close()
    world.install("alpha")
    trace_to_stderr()
    monkeypatch.setattr("sys.stderr", closed)

    assert registry().family("alpha").model_type == "alpha"
