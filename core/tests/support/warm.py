"""A pytest plugin with a warm interpreter: a file that is run like Python, and has imported torch already.

Most of what a short process does is importing torch and transformers, some seconds of it. A server imports them once
and forks for each command; what is run has an environment, a folder, streams, signals and an exit code of its own, as a
process has. Where what is imported, or when, is itself the subject, take ``sys.executable``. The packages of this
repository are imported by each command itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support import warm_client

_HERE = Path(__file__).parent
_CLIENT = """#!{interpreter} -IS
import sys
sys.path.insert(0, {folder!r})
from warm_client import main
main({server!r}, {interpreter!r}, {imported!r}, {path!r}, {variables!r}, sys.argv[1:])
"""


@pytest.fixture(scope="session")
def warm() -> Iterator[WarmInterpreter]:
    """Return the warm interpreter of this worker, started by the first test that takes it."""
    with warm_interpreter() as interpreter:
        yield interpreter


@pytest.fixture
def warm_processes(warm: WarmInterpreter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let processes that the tested code starts be warm ones, where the import of torch does not matter."""
    monkeypatch.setattr(sys, "executable", str(warm.path))


class WarmInterpreter:
    """A server, and the files that stand for its interpreters."""

    def __init__(self, folder: Path, imported: list[str], path: list[str], variables: dict[str, str]) -> None:
        self._folder, self._imported, self._path, self._variables = folder, imported, path, variables
        #: What is run in the place of ``sys.executable``.
        self.path = self.write(folder / "python", Path(sys.executable))

    def write(self, path: Path, interpreter: Path) -> Path:
        """Write a file that stands for an interpreter, which may be that of a virtual environment."""
        script = _CLIENT.format(
            interpreter=str(interpreter),
            folder=str(_HERE),
            server=str(self._folder / "server"),
            imported=self._imported,
            path=self._path,
            variables=self._variables,
        )
        path.write_text(script)
        path.chmod(0o755)
        return path


@contextmanager
def warm_interpreter() -> Iterator[WarmInterpreter]:
    """Start a server; where processes cannot be forked and waited for so, the files run a real interpreter."""
    # A socket's path may have some hundred characters, which folders of tests exceed.
    with tempfile.TemporaryDirectory(prefix="warm-") as name:
        folder = Path(name)
        if not hasattr(os, "pidfd_open"):
            yield WarmInterpreter(folder, [], [], {"PYTHON": "never equal to what is there"})
            return
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
            "OMP_NUM_THREADS": "1"
        }
        server = subprocess.Popen(
            [sys.executable, str(_HERE / "warm_server.py"), str(folder / "server")],
            # Streams that can be sought in would be taken for such in every child.
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True,
        )  # fmt: skip
        assert server.stdin is not None
        assert server.stdout is not None
        with server.stdout, server.stdin:
            answer = server.stdout.readline()
            assert answer.startswith("{"), answer + server.stdout.read()
            found = json.loads(answer)
            variables = warm_client.read_once(environment)
            try:
                yield WarmInterpreter(folder, found["imported"], found["path"], variables)
            finally:
                server.stdin.close()
                server.wait(60)
