"""Progress bars are shown on a terminal and in a notebook; elsewhere one line while a type is examined."""

from __future__ import annotations

import subprocess
import sys

#: The modules by which tqdm and splitlearn recognise a notebook, and a load in it.
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
    """Without ipywidgets it is a text bar, without a warning."""
    shown = run(NOTEBOOK + SHOWN.format(progress="None"))
    assert "Loading" in shown
    assert "100%" in shown
    assert "Warning" not in shown


def test_no_bar_without_a_terminal_or_if_turned_off() -> None:
    """A pipe has none; neither has a notebook with progress=False."""
    assert run(SHOWN.format(progress="None")) == ""
    assert run(NOTEBOOK + SHOWN.format(progress="False")) == ""


def test_an_examination_is_one_line_without_a_terminal() -> None:
    """It takes many seconds, and is reported several times."""
    examining = SHOWN.replace('"reading", None, 5, 10', '"examining", file="opt"').replace(
        '"reading", None, 10, 10', '"examining", file="opt"'
    )
    assert run(examining.format(progress="None")) == "Examining model type opt on a small model; the result is kept\n"
    assert run(examining.format(progress="False")) == ""


def test_tqdm_chooses_the_kind_of_bar() -> None:
    """``tqdm.auto`` is imported only if a bar is shown."""
    assert run(NOTEBOOK + SHOWN.format(progress="None") + "assert 'tqdm.auto' in sys.modules").count("Error") == 0
    light = "import sys, splitlearn_core.progress\nassert not [name for name in sys.modules if name.startswith('tqdm')]"
    assert run(light) == ""
