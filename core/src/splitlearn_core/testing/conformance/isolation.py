"""Isolate the plugin under test from all other installed plugins, broken or not."""

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
#: Lines of stderr in a message.
_LINES = 15


def claims(model_type: str, distribution: str = "") -> list[PluginEntry]:
    """Return the entry points that claim a model type, or else any; only those of a distribution if one is given."""
    families = [entry for entry in discover() if entry.kind == FAMILY]
    claimants = [entry for entry in families if entry.model_type == model_type]
    claimants = claimants or [entry for entry in families if entry.is_for_any_type]
    return [entry for entry in claimants if not distribution or entry.distribution == distribution]


@contextmanager
def alone(model_type: str, distribution: str = "") -> Iterator[None]:
    """Hide the plugins of all other distributions from this process and its children.

    Args:
        model_type: The name of the entry point.
        distribution: Its distribution; by default the only one that claims the model type.
    """
    distributions = {entry.distribution for entry in claims(model_type, distribution)}
    with pytest.MonkeyPatch.context() as patch:
        # Of several claimants only the author can choose; the registry reports the conflict.
        allowed = distributions.pop() if len(distributions) == 1 else distribution or model_type
        patch.setenv(ALLOW_VARIABLE, allowed)
        patch.delenv(BLOCK_VARIABLE, raising=False)
        reset_registry()
        yield
    reset_registry()


def fresh_process(*arguments: str, **environment: str) -> str:
    """Run Python in a new process with the path of this one, and return its output.

    Raises:
        ConformanceError: It failed; the message has the end of its stderr.
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
        stderr = "\n".join(done.stderr.strip().splitlines()[-_LINES:])
        raise ConformanceError(f"in a fresh process: exit code {done.returncode}\n{stderr}")
    return done.stdout
