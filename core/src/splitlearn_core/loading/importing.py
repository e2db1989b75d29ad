"""The imports of a load, which are most of the time of a short process."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from splitlearn_core.family import ModelFamily


def import_builders(family: ModelFamily) -> None:
    """Import torch, and of transformers what the family needs; takes seconds the first time."""
    with collection_paused():
        from splitlearn_core.build.component import architecture_class

        architecture_class(family)


@contextmanager
def collection_paused() -> Iterator[None]:
    """Import without looking for garbage: a tenth of the time of importing transformers goes there."""
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
