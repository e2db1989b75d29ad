"""GGUF files for splitlearn: a loading strategy in its own package, for the checkpoints of every family."""

from __future__ import annotations

from splitlearn_core import hookimpl
from splitlearn_gguf.strategy import GgufStrategy


@hookimpl
def splitlearn_loading_strategies() -> list[GgufStrategy]:
    return [GgufStrategy()]
