"""A trunk in another dtype than the stored one, which nobody can do without a copy."""

from __future__ import annotations

from loaders import LOADERS
from measuring import Session, interleave, read_through, sample
from report import Row, at_most
from trunk import measurement

NAME = "dtype"
_WANTED = {"gpt2": "bfloat16", "qwen2": "float32", "gemma": "float16"}
#: Dtype -> how many times as many bytes as stored the whole model takes in it at most.
_TIMES = {"bfloat16": 1, "float16": 1, "float32": 2}
_TIME_SHARE, _PEAK_SHARE = 0.5, 0.6


def run(session: Session) -> None:
    title = LOADERS["whole"].title
    for checkpoint in session.models():
        read_through(checkpoint.files)
        model, dtype = checkpoint.recipe.name, _WANTED[checkpoint.recipe.name]
        # As much as the whole model takes in the other dtype, and more than either side needs.
        room = checkpoint.recipe.nbytes * _TIMES[dtype]
        measures = {
            name: measurement(checkpoint, name, dtype=dtype, watch=True, room=room) for name in ("ours", "whole")
        }
        answers, failures = interleave(session.runs, measures)
        if failures:
            session.add(Row(NAME, f"{model} as {dtype}", note="; ".join(failures.values())))
            continue
        ours, theirs = answers["ours"], answers["whole"]
        same = {answer["digest"] for answer in ours} == {answer["digest"] for answer in theirs}
        note = "" if same else "its trunk computes other numbers than ours"
        time = sample(ours, "load", "ms", 1000), title, sample(theirs, "load", "ms", 1000)
        peak = sample(ours, "peak_mb", "MB"), title, sample(theirs, "peak_mb", "MB")
        session.add(
            at_most(NAME, f"{model} as {dtype}, load", *time, share=_TIME_SHARE, note=note),
            at_most(NAME, f"{model} as {dtype}, peak", *peak, share=_PEAK_SHARE),
        )
