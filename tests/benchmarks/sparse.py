"""Two layers out of a checkpoint of over 100 GB: its size must not be felt."""

from __future__ import annotations

import shutil

from checkpoints import sparse
from measuring import Session, interleave, sample
from report import Row, at_most
from trunk import measurement

NAME = "sparse"
_SHARE = 1.5
_DEEP, _SHALLOW = 80, 4


def run(session: Session) -> None:
    large, small = (session.make(sparse(layers, quick=session.quick)) for layers in (_DEEP, _SHALLOW))
    measures = {
        "large": measurement(large, "ours", cut=(_DEEP // 2, _DEEP // 2 + 2), forward=False),
        "small": measurement(small, "ours", cut=(1, 3), forward=False),
    }
    answers, failures = interleave(session.runs, measures, discarded=1)
    what = f"2 of {_DEEP} layers, {large.recipe.nbytes / 1e9:.1f} GB"
    if failures:
        session.add(Row(NAME, what, note="; ".join(failures.values())))
    else:
        ours, other = (sample(answers[name], "load", "ms", 1000) for name in ("large", "small"))
        peer = f"2 of {_SHALLOW} layers, {small.recipe.nbytes / 1e9:.1f} GB"
        session.add(at_most(NAME, what, ours, peer, other, share=_SHARE))
    # The pages of holes take memory too, once they were read.
    for checkpoint in (large, small):
        shutil.rmtree(checkpoint.directory)
