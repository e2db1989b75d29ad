"""Showing a load: to a callback, or as a bar on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from splitlearn_core.types import Progress, ProgressCallback


@contextmanager
def reporting(progress: ProgressCallback | Literal[False] | None) -> Iterator[ProgressCallback]:
    """Yield where progress goes: the caller's callback, a bar on a terminal, or nowhere."""
    if callable(progress):
        yield progress
    elif progress is False or not sys.stderr.isatty():
        yield lambda _: None
    else:
        bar = _Bar()
        try:
            yield bar.show
        finally:
            bar.close()


class _Bar:
    """A byte bar that appears with the first byte."""

    def __init__(self) -> None:
        self._bar: Any = None

    def show(self, progress: Progress) -> None:
        # The Hub's client draws its own bars while it downloads.
        if progress.stage != "reading":
            return
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(total=progress.bytes_total, unit="B", unit_scale=True, unit_divisor=1024)
        self._bar.set_description(f"Loading {progress.component}", refresh=False)
        self._bar.update(progress.bytes_done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
