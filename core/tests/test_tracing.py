"""A trace says who was asked what, who answered, and how long it took."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Iterator
from typing import Any

import pytest

from splitlearn_core import BrokenPluginError
from splitlearn_core.plugins import tracing
from splitlearn_core.plugins.registry import registry, reset_registry
from splitlearn_core.plugins.tracing import Trace, trace_to_stderr

pytestmark = pytest.mark.light

HEAD = "from splitlearn_core import ModelFamily, hookimpl\n"
SOUND = "@hookimpl\ndef splitlearn_model_families():\n    return [ModelFamily(model_type='alpha', architecture='X')]\n"
MAP = "@hookimpl\ndef splitlearn_map_weight_keys(checkpoint_keys):\n    {body}\n"
KEYS = ["a.weight", "b.weight", "c.weight"]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Leave the logger as it was found."""
    log = tracing.log
    before = (list(log.handlers), log.level, log.propagate)
    yield
    log.handlers[:], log.propagate = before[0], before[2]
    log.setLevel(before[1])


def steps(caplog: pytest.LogCaptureFixture) -> list[Trace]:
    return [record.trace for record in caplog.records if record.name == "splitlearn_core.trace"]


@pytest.fixture
def listening(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Listen as a server would: through logging."""
    caplog.set_level(logging.DEBUG, logger="splitlearn_core.trace")
    return caplog


def test_each_step_of_a_plugins_use_is_a_record(world: Any, listening: pytest.LogCaptureFixture) -> None:
    """The import, both questions, and who was passed over and why; in order, with times."""
    world.install("alpha", HEAD + SOUND, version="3.1")
    world.install("beta")

    registry().family("alpha")

    seen = [(step.event, step.plugin, step.what, step.answer) for step in steps(listening)]
    assert seen[-3:] == [
        ("import", "splitlearn-alpha 3.1", "splitlearn_alpha", None),
        ("hook", "splitlearn-alpha 3.1", "splitlearn_model_families", "[ModelFamily('alpha')]"),
        ("hook", "splitlearn-alpha 3.1", "splitlearn_loading_strategies", "not implemented"),
    ]
    assert ("skipped", "splitlearn-beta 1.0", "model type 'beta'", "model type 'alpha' was asked for") in seen
    assert all((step.milliseconds is None) == (step.event == "skipped") for step in steps(listening))
    assert all(step.error is None for step in steps(listening))


def test_arguments_and_answers_are_shortened(world: Any, listening: pytest.LogCaptureFixture) -> None:
    """A mapping of many keys is the first of them and their number; the owner alone answers."""
    body = "return {key: 'model.' + key for key in checkpoint_keys}"
    world.install("alpha", HEAD + SOUND + MAP.format(body=body))
    family = registry().family("alpha")

    registry().map_weight_keys(family, {"hidden_size": 8}, KEYS)

    step = steps(listening)[-1]
    assert step.arguments == {
        "family": "ModelFamily('alpha')",
        "config": "{'hidden_size': 8}",
        "checkpoint_keys": "['a.weight', 'b.weight', ...] (3)",
    }
    assert step.answer == "{'a.weight': 'model.a.weight', 'b.weight': 'model.b.weight', ...} (3)"


def test_what_is_raised_is_traced(world: Any, listening: pytest.LogCaptureFixture) -> None:
    """By the import of a plugin, and by a hook; and what a generator raises in the middle."""
    world.install("alpha", "raise OSError('disk on fire')")
    world.install("beta", HEAD + "@hookimpl\ndef splitlearn_model_families():\n    yield 1\n    raise SystemExit(3)\n")

    for name in ("alpha", "beta"):
        with pytest.raises(BrokenPluginError):
            registry().family(name)

    failed = [(step.event, step.plugin, step.error) for step in steps(listening) if step.error]
    assert failed == [
        ("import", "splitlearn-alpha 1.0", "OSError: disk on fire"),
        ("hook", "splitlearn-beta 1.0", "SystemExit: 3"),
    ]


def test_a_blocked_plugin_is_said_to_be(
    world: Any, monkeypatch: pytest.MonkeyPatch, listening: pytest.LogCaptureFixture
) -> None:
    """With the variable, and once however often others are asked."""
    world.install("alpha")
    world.install("beta")
    monkeypatch.setenv("SPLITLEARN_DISABLE_PLUGINS", "beta")

    for _ in range(3):
        registry().family("alpha")

    why = [step.answer for step in steps(listening) if step.plugin == "splitlearn-beta 1.0"]
    assert why == ["blocked by SPLITLEARN_DISABLE_PLUGINS"]


def test_an_answer_that_cannot_be_shown_is_no_failure(world: Any, listening: pytest.LogCaptureFixture) -> None:
    """A ``repr`` that raises costs the trace its text, and nobody anything else."""
    strategies = (
        "from splitlearn_core.readers.copied import CopiedStrategy\n"
        "class Shy(CopiedStrategy):\n"
        "    name = 'shy'\n"
        "    def __getattribute__(self, key):\n"
        "        if key == 'name' and __import__('sys')._getframe(1).f_code.co_name == 'repr_instance':\n"
        "            raise OSError('no picture, please')\n"
        "        return object.__getattribute__(self, key)\n"
        "@hookimpl\ndef splitlearn_loading_strategies():\n    return [Shy()]\n"
    )
    world.install("alpha", HEAD + SOUND + strategies)

    loaded = registry().plugin("alpha")

    assert loaded.strategy("shy") is not None
    assert steps(listening)[-1].answer == "<list that cannot be shown: OSError>"


def test_nobody_listens_and_nothing_is_collected(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a listener no value is shortened and no record made."""
    monkeypatch.setattr(tracing, "_short", pytest.fail)
    monkeypatch.setattr(tracing, "_report", pytest.fail)
    tracing.log.setLevel(logging.INFO)
    world.install("alpha")
    world.install("beta")

    assert registry().family("alpha").model_type == "alpha"


@pytest.mark.parametrize(("value", "lines"), [("", False), ("0", False), ("1", True), ("json", True), ("JSON", True)])
def test_the_variable_turns_it_on(
    world: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str, lines: bool
) -> None:
    """Lines or JSON lines on stderr, nothing on stdout, and each step once though registries are made anew."""
    monkeypatch.setenv("SPLITLEARN_TRACE", value)
    world.install("alpha", HEAD + SOUND)
    registry()
    reset_registry()

    registry().family("alpha")

    shown = capsys.readouterr()
    assert shown.out == ""
    found = [line for line in shown.err.splitlines() if "splitlearn_model_families" in line]
    assert len(found) == int(lines)
    if value.lower() == "json":
        step = json.loads(found[0])
        assert (step["event"], step["plugin"], step["answer"]) == (
            "hook",
            "splitlearn-alpha 1.0",
            "[ModelFamily('alpha')]",
        )
        assert step["milliseconds"] >= 0
    elif lines:
        assert found[0].startswith(
            "trace hook     splitlearn-alpha 1.0  splitlearn_model_families() -> [ModelFamily('alpha')]  ["
        )


@pytest.mark.heavy
def test_the_option_traces_one_command(llama: Any, single: Any, cli: Any) -> None:
    """Before the command; what it prints on stdout is what it prints without."""
    plain = cli("plan", single, "--split", 2, 4)
    code, out, err = cli("--trace", "plan", single, "--split", 2, 4)

    assert (code, out) == plain[:2]
    assert "trace hook     splitlearn-llama" in err
    assert "splitlearn_map_weight_keys(family=ModelFamily('llama')" in err


@pytest.mark.heavy
def test_the_option_leaves_the_form_to_the_variable(
    llama: Any, single: Any, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who asks for JSON gets it, with the option too."""
    monkeypatch.setenv("SPLITLEARN_TRACE", "json")

    _, _, err = cli("--trace", "plan", single, "--split", 2, 4)

    steps = [json.loads(line) for line in err.splitlines()]
    assert {step["event"] for step in steps if step["what"] == "splitlearn_map_weight_keys"} == {"hook"}


def test_the_doctor_traces_plugins_in_their_own_process(world: Any) -> None:
    """In the form that the variable asks for; stdout is its report."""
    world.install("alpha")

    done = world.python("-m", "splitlearn_core", "--trace", "doctor", "--quick", "--json", SPLITLEARN_TRACE="json")

    steps = [json.loads(line) for line in done.stderr.splitlines()]
    assert [step["event"] for step in steps if step["plugin"] == "splitlearn-alpha 1.0"][:2] == ["import", "hook"]
    assert json.loads(done.stdout)["counts"]


def test_a_closed_stderr_disturbs_nobody(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace that cannot be written is lost; what is traced goes on."""
    import io

    closed = io.StringIO()
    closed.close()
    world.install("alpha")
    trace_to_stderr()
    monkeypatch.setattr("sys.stderr", closed)

    assert registry().family("alpha").model_type == "alpha"


def test_a_step_is_a_plain_value() -> None:
    """It can be sent to another process, and written as JSON."""
    step = Trace("hook", "a 1", "splitlearn_model_families", {"family": "x"}, "y", 1.5)

    assert json.loads(json.dumps(step.to_dict()))["arguments"] == {"family": "x"}
    assert pickle.loads(pickle.dumps(step)) == step
    assert str(step) == "hook     a 1  splitlearn_model_families(family=x) -> y  [1.5 ms]"
