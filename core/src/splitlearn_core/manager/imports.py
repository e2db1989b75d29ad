"""The former module of :func:`splitlearn_core.preload`."""

from splitlearn_core.manager.loaders.loader import preload

__all__ = ["preload"]
