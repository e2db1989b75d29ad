"""Small worlds for tests: tiny checkpoints, a Hub on loopback, and the checks every family passes.

Importing this package imports neither torch nor pytest; :class:`FamilyConformance` is found when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from splitlearn_core.testing.conformance import FamilyConformance as FamilyConformance

__all__ = ["FamilyConformance"]  # found by __getattr__


def __getattr__(name: str) -> Any:
    if name != "FamilyConformance":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from splitlearn_core.testing.conformance import FamilyConformance

    return FamilyConformance
