"""A process from its start to the end of its first forward, the weights in the page cache or on the disk."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from checkpoints import Checkpoint
from measuring import HERE, Session, drop, interleave, last_line, read_through, sample, say, start
from report import Row, faster
from trunk import TORCH_NAMES

NAME = "spawn"
#: Not slower; a noisy machine does not measure the same thing twice to more than this.
_WARM_TIMES = 1.0
_COLD_TIMES = 1 / 0.9
_STILL_COLD = 0.01


def run(session: Session) -> None:
    for checkpoint in session.models():
        read_through(checkpoint.files)
        _compare(session, checkpoint, cold=False, times=_WARM_TIMES)
        _compare(session, checkpoint, cold=True, times=_COLD_TIMES)


def _compare(session: Session, checkpoint: Checkpoint, *, cold: bool, times: float) -> None:
    what = f"{checkpoint.recipe.name}, {'cold' if cold else 'warm'}"
    measures = {name: _measurement(checkpoint, name, cold=cold) for name in ("ours", "whole")}
    answers, failures = interleave(session.runs, measures, discarded=0 if cold else 1)
    if failures:
        session.add(Row(NAME, what, note="; ".join(failures.values())))
        return
    ours, theirs = (sample(answers[name], "seconds", "s") for name in ("ours", "whole"))
    held = max(answer["held"] for found in answers.values() for answer in found)
    note = f"not cold: {held:.0%} of the pages stayed" if cold and held > _STILL_COLD else ""
    session.add(faster(NAME, what, ours, "from_pretrained", theirs, times=times, note=note))


def _measurement(checkpoint: Checkpoint, loader: str, *, cold: bool) -> Callable[[], dict[str, Any]]:
    recipe = checkpoint.recipe
    arguments = [loader, str(checkpoint.directory), *map(str, recipe.cut), str(recipe.hidden_size)]

    def measure() -> dict[str, Any]:
        held = drop(checkpoint.files) if cold else 1.0
        begin = time.monotonic()
        process = start([str(HERE / "first_forward.py"), *arguments, TORCH_NAMES[recipe.dtype]])
        seconds = last_line(process)["done"] - begin
        say(f"  {recipe.name}, {'cold' if cold else 'warm'}: {loader}: {seconds:.2f} s")
        return {"seconds": seconds, "held": held}

    return measure
