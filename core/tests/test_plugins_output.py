"""The output of plugins is not mixed with the data of a command; a library leaves stdout alone."""

from __future__ import annotations

import io
import json
import sys
import threading
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

import pytest

from splitlearn_core.plugins.host import plugin_output, stdout_for_data
from splitlearn_core.plugins.registry import registry

pytestmark = pytest.mark.light

#: Prints when it is imported and in each hook.
TALKING = """
import sys
from splitlearn_core import ModelFamily, hookimpl

print("said at import")


@hookimpl
def splitlearn_model_families():
    print("said in a hook")
    sys.stdout.write("written in a hook\\n")
    return [ModelFamily(model_type="llama", architecture="LlamaForCausalLM")]
"""


@pytest.mark.heavy
def test_json_is_json_whatever_a_plugin_prints(world: Any, single: Any, cli: Any) -> None:
    """Only data is on stdout, whether one plugin is used or all are."""
    world.install("llama", TALKING)

    (_, listed, _), (_, planned, _) = (
        cli("plugins", "--check", "--json"),
        cli("plan", single, "--split", "2", "4", "--json"),
    )

    assert "llama" in [row["name"] for row in json.loads(listed)]
    assert json.loads(planned)["model_type"] == "llama"


@pytest.mark.heavy
def test_what_a_plugin_prints_is_on_stderr(world: Any, single: Any, cli: Any) -> None:
    """Its author sees the output of the import and of the hook."""
    world.install("llama", TALKING)

    _, out, err = cli("plan", single, "--split", "2", "4", "--json")

    assert err.splitlines()[:3] == ["said at import", "said in a hook", "written in a hook"]
    assert json.loads(out)["model_type"] == "llama"


@pytest.mark.heavy
def test_real_streams_are_separate(world: Any, single: Any) -> None:
    """The streams of a new process are separate, too."""
    world.install("llama", TALKING)

    done = world.python("-m", "splitlearn_core", "plan", str(single), "--split", "2", "4", "--json")

    assert json.loads(done.stdout)["model_type"] == "llama"
    assert "said at import" in done.stderr


def test_a_library_leaves_stdout_alone(world: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """Outside the command line stdout is not replaced: plugins print as usual."""
    world.install("llama", TALKING)
    before = sys.stdout

    registry().family("llama")

    assert sys.stdout is before
    assert "said at import" in capsys.readouterr().out


def test_other_threads_print_to_stdout_meanwhile() -> None:
    """While one thread runs a plugin, the output of another is data; the stream is restored at the end."""
    out, err = io.StringIO(), io.StringIO()
    inside, printed = threading.Event(), threading.Event()

    def plugin() -> None:
        with plugin_output():
            inside.set()
            assert printed.wait(10)
            print("noise")

    with redirect_stdout(out), redirect_stderr(err):
        before = sys.stdout
        with stdout_for_data():
            thread = threading.Thread(target=plugin)
            thread.start()
            assert inside.wait(10)
            print("data")
            printed.set()
            thread.join(10)
            print("more data")
        assert sys.stdout is before

    assert out.getvalue() == "data\nmore data\n"
    assert err.getvalue() == "noise\n"


def test_a_closed_stdout_or_stderr_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Python a closed stream is None, and printing to it does nothing."""
    monkeypatch.setattr(sys, "stdout", None)
    with stdout_for_data(), plugin_output():
        print("nowhere")
    assert sys.stdout is None

    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", None)
    with stdout_for_data(), plugin_output():
        print("somewhere")
    assert out.getvalue() == "somewhere\n"
