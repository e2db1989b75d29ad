"""One plugin alone: whatever else is installed, broken or not, changes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from splitlearn_core.plugins.host import BLOCK_VARIABLE
from splitlearn_core.plugins.metadata import FAMILY, PluginEntry, discover
from splitlearn_core.plugins.registry import ALLOW_VARIABLE, reset_registry
from splitlearn_core.testing.conformance.findings import ConformanceError

_LIMIT = 120
#: Lines of a process's last words.
_LINES = 15


def claims(model_type: str, distribution: str = "") -> list[PluginEntry]:
    """Return the entry points that claim a model type; those of one distribution where one is named."""
    named = [entry for entry in discover() if entry.kind == FAMILY and entry.name == model_type]
    return [entry for entry in named if not distribution or entry.distribution == distribution]


@contextmanager
def alone(model_type: str, distribution: str = "") -> Iterator[None]:
    """Let this process, and those that it starts, see the plugins of one distribution and no other.

    Args:
        model_type: What its entry point is named after.
        distribution: Its name; by default that of the only one that claims the model type.
    """
    found = {entry.distribution for entry in claims(model_type, distribution)}
    with pytest.MonkeyPatch.context() as patch:
        # Two claimants are told apart by nobody but the author: the registry then says so.
        patch.setenv(ALLOW_VARIABLE, found.pop() if len(found) == 1 else distribution or model_type)
        patch.delenv(BLOCK_VARIABLE, raising=False)
        reset_registry()
        yield
    reset_registry()


def fresh_process(*arguments: str, **environment: str) -> str:
    """Run Python in a process that has imported nothing, with this one's path, and return what it prints.

    Raises:
        ConformanceError: It failed; its last words are told.
    """
    path = os.pathsep.join(entry for entry in sys.path if entry)
    done = subprocess.run(  # noqa: S603  # this interpreter and a module of ours
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=_LIMIT,
        check=False,
    )
    if done.returncode:
        words = "\n".join(done.stderr.strip().splitlines()[-_LINES:])
        raise ConformanceError(f"in a fresh process: exit code {done.returncode}\n{words}")
    return done.stdout
