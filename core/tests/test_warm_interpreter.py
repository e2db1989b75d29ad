"""The warm interpreter of the tests is an interpreter: what is run has all that a process has, and torch is there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.warm import WarmInterpreter

pytestmark = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="a real interpreter is run here")

LOADED = "import sys; print('torch' in sys.modules, 'splitlearn_core' in sys.modules)"


@pytest.fixture
def python(warm: WarmInterpreter, tmp_path: Path) -> Any:
    """Run it in an empty folder."""

    def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        command = [str(warm.path), *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("variables", {})}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100, check=False, **options
        )

    return run


def test_libraries_are_there_and_this_repository_is_not(python: Any) -> None:
    """So that what a test changes, and what is imported of ours, is as in a process of its own."""
    assert python("-c", LOADED).stdout == "True False\n"


def test_a_command_has_arguments_streams_and_a_folder(python: Any, tmp_path: Path) -> None:
    """A text, a module and a file see their arguments, standard input, variables and the working directory."""
    code = "import os, sys; print(sys.argv, sys.stdin.read(), os.getcwd(), os.environ['OWN'], sys.path[0])"
    (tmp_path / "script.py").write_text(code)
    folder = os.path.realpath(tmp_path)
    for arguments, first, path in (
        (("-c", code), "-c", ""),
        (("-m", "script"), f"{folder}/script.py", folder),
        (("script.py",), "script.py", folder),
    ):
        done = python(*arguments, "a b", input="text", variables={"OWN": "1"})
        assert done.stdout == f"{[first, 'a b']} text {folder} 1 {path}\n", done.stderr


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("pass", 0),
        ("import sys; sys.exit(3)", 3),
        ("import sys; sys.exit('words')", 1),
        ("1 / 0", 1),
        ("import os; os._exit(4)", 4),
        ("import os; os.kill(os.getpid(), 9)", -9),
        ("raise KeyboardInterrupt", -signal.SIGINT),
        ("import atexit; atexit.register(print, 'end'); import sys; sys.exit(5)", 5),
        ("import sys, weakref; weakref.finalize(sys, print, 'end')", 0),
    ],
)
def test_a_command_ends_as_a_process_ends(python: Any, code: str, expected: int) -> None:
    """With the exit code, the words and the functions of its end that the real interpreter gives it."""
    done = python("-c", code)
    real = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (expected, real.stdout, real.stderr)


def test_signals_reach_the_command_and_its_end_is_seen(warm: WarmInterpreter, tmp_path: Path) -> None:
    """A signal is passed on; where the client is killed, the command is."""
    code = (
        "import os, signal; signal.signal(15, lambda *_: os._exit(7)); print(os.getpid(), flush=True); signal.pause()"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for end, expected in ((signal.SIGTERM, 7), (signal.SIGKILL, -9)):
        command = [str(warm.path), "-c", code]
        with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            watch = os.pidfd_open(int(process.stdout.readline()))
            process.send_signal(end)
            assert process.wait(60) == expected
            # Its pipe ends with the command.
            assert process.stdout.read() == ""
            os.close(watch)


def test_variables_that_libraries_read_at_their_import_count(python: Any) -> None:
    """The Hub's client has them in a module of constants, which other modules have copied from."""
    code = "from huggingface_hub import constants; print(constants.HF_HUB_OFFLINE, constants.HF_HOME)"
    variables = {"HF_HUB_OFFLINE": "1", "HF_HOME": "/own/home"}
    assert python("-c", code, variables=variables).stdout == "True /own/home\n"


@pytest.mark.parametrize("where", ["folder", "path"])
def test_a_library_that_is_another_one_is_imported(python: Any, tmp_path: Path, where: str) -> None:
    """Beside the command or on its path: a real interpreter is run."""
    folder = tmp_path if where == "folder" else tmp_path / "site"
    folder.mkdir(exist_ok=True)
    (folder / "torch.py").write_text("own = 1\n")
    done = python("-c", "import torch; print(torch.own)", variables={"PYTHONPATH": str(folder)})
    assert done.stdout == "1\n", done.stderr


def test_warnings_are_errors_if_requested(python: Any) -> None:
    """The option of the interpreter is followed."""
    done = python("-W", "error", "-c", "import warnings; warnings.warn('so')")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (1, "UserWarning: so")
