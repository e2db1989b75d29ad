"""Bars: on a terminal, in a notebook, and nowhere else."""

from __future__ import annotations

import subprocess
import sys

#: What tqdm and we know a notebook's kernel by, and a load that is shown in it.
NOTEBOOK = """
import sys, types
sys.modules["ipykernel.zmqshell"] = types.ModuleType("ipykernel.zmqshell")
ipython = sys.modules["IPython"] = types.ModuleType("IPython")
ipython.get_ipython = object
"""
SHOWN = """
from splitlearn_core.progress import reporting
from splitlearn_core.types import Progress
with reporting({progress}) as report:
    report(Progress("reading", None, 5, 10))
    report(Progress("reading", None, 10, 10))
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    return done.stderr


def test_a_notebook_has_a_bar() -> None:
    """Without ipywidgets it is one of text, and nothing warns of that."""
    shown = run(NOTEBOOK + SHOWN.format(progress="None"))
    assert "Loading" in shown
    assert "100%" in shown
    assert "Warning" not in shown


def test_no_bar_where_none_is_wanted() -> None:
    """A pipe has none; neither has a notebook that was told so."""
    assert run(SHOWN.format(progress="None")) == ""
    assert run(NOTEBOOK + SHOWN.format(progress="False")) == ""


def test_the_bars_are_those_of_the_place() -> None:
    """``tqdm.auto`` chooses, and is imported where a bar is to be shown and nowhere else."""
    assert run(NOTEBOOK + SHOWN.format(progress="None") + "assert 'tqdm.auto' in sys.modules").count("Error") == 0
    light = "import sys, splitlearn_core.progress\nassert not [name for name in sys.modules if name.startswith('tqdm')]"
    assert run(light) == ""
