"""Two layers out of a checkpoint of over 100 GB: its size must not be felt."""

from __future__ import annotations

import shutil
from collections.abc import Callable

from checkpoints import Recipe, sparse
from measuring import Session, interleave, sample
from report import Row, at_most
from trunk import measurement

NAME = "sparse"
_SHARE = 1.5
_DEEP, _SHALLOW = 80, 4


def run(session: Session) -> None:
    compare(session, NAME, sparse, (_DEEP, _SHALLOW), 2, _SHARE)


def compare(
    session: Session, name: str, recipe: Callable[..., Recipe], depths: tuple[int, int], count: int, share: float
) -> None:
    """Load layers out of a deep checkpoint, and as many out of a shallow one, whose first layer stays."""
    deep, shallow = depths
    large, small = (session.make(recipe(layers, quick=session.quick)) for layers in depths)
    measures = {
        "large": measurement(large, "ours", cut=(deep // 2, deep // 2 + count), forward=False),
        "small": measurement(small, "ours", cut=(1, 1 + count), forward=False),
    }
    answers, failures = interleave(session.runs, measures, discarded=1)
    what = f"{count} of {deep} layers, {large.recipe.nbytes / 1e9:.1f} GB"
    if failures:
        session.add(Row(name, what, note="; ".join(failures.values())))
    else:
        ours, other = (sample(answers[size], "load", "ms", 1000) for size in ("large", "small"))
        peer = f"{count} of {shallow} layers, {small.recipe.nbytes / 1e9:.1f} GB"
        session.add(at_most(name, what, ours, peer, other, share=share))
    # The pages of holes take memory too, once they were read.
    for checkpoint in (large, small):
        shutil.rmtree(checkpoint.directory)
