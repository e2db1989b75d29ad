"""The plugin for every model type that no package provides: examined and proven once, and remembered.

Imports neither torch nor transformers: the examination runs in a process of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from splitlearn_auto.answers import Answer
from splitlearn_auto.examination import ExaminationError, examine_apart
from splitlearn_auto.memory import recall, remember
from splitlearn_core import ModelFamily, Progress, UnknownModelTypeError, hookimpl

#: Model type -> held while it is examined, so that loads at the same time examine it once.
_turns: dict[str, threading.Lock] = {}
#: Seconds between two calls of the callback of a load that waits for another's examination.
_CALL_EVERY = 0.1


@hookimpl
def splitlearn_family_for(model_type: str, progress: Callable[[Progress], None]) -> ModelFamily:
    """Return the family of a model type, from the disk or from an examination, which takes seconds."""
    answer = recall(model_type) or _examined(model_type, lambda: progress(Progress("examining", file=model_type)))
    if answer.refusal:
        raise UnknownModelTypeError(answer.refusal, hint=answer.hint)
    return answer.family


def _examined(model_type: str, waiting: Callable[[], None]) -> Answer:
    with _turn(model_type, waiting):
        # Another thread may have had its turn.
        known = recall(model_type)
        if known is not None:
            return known
        try:
            answer, lasts = examine_apart(model_type, waiting)
        except ExaminationError as error:
            raise UnknownModelTypeError(
                f"examining it failed: {error}", hint=f"for more: splitlearn plugins new {model_type} --dry-run"
            ) from error
        if lasts:
            remember(model_type, answer)
        return answer


@contextmanager
def _turn(model_type: str, waiting: Callable[[], None]) -> Iterator[None]:
    lock = _turns.setdefault(model_type, threading.Lock())
    while not lock.acquire(timeout=_CALL_EVERY):
        waiting()
    try:
        yield
    finally:
        lock.release()
