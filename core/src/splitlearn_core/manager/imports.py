"""The earlier place of :mod:`splitlearn_core.manager.preload`."""

from splitlearn_core.manager.preload import preload

__all__ = ["preload"]
