"""Support for tests of plugins: tiny checkpoints, and the conformance kit that every family passes.

Importing this package imports neither torch nor pytest; :class:`FamilyConformance` is imported on first access.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from splitlearn_core.testing.conformance import FamilyConformance as FamilyConformance

__all__ = ["FamilyConformance"]  # provided by __getattr__


def __getattr__(name: str) -> Any:
    if name != "FamilyConformance":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from splitlearn_core.testing.conformance import FamilyConformance

    return FamilyConformance
