"""The host ``ray``, as the manager finds it. Listing plugins imports this module, so it is light."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from splitlearn_core import ModelConfig, Progress

if TYPE_CHECKING:
    from splitlearn_core.extension import LoadedModel

#: The weights take memory where the actor is, and not of the manager's machine.
is_elsewhere = True


def load(config: ModelConfig, plan: Any, report: Callable[[Progress], None], threads: int | None) -> LoadedModel:
    """Load a trunk in an actor; see ``ComponentHost.load``."""
    from splitlearn_ray.handle import load_in_actor

    return load_in_actor(config, plan, report, threads)
