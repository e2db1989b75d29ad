"""Experts that lie apart in the file and together in the module: size, speed and memory of converting reads."""

from __future__ import annotations

import sparse
from checkpoints import Checkpoint, experts, qwen2, sparse_experts
from measuring import Session, interleave, is_installed, read_through, sample
from report import Row, Sample, at_most, faster
from trunk import measurement

NAME = "experts"
_DEEP, _SHALLOW = 60, 3
_SIZE_SHARE, _BANDWIDTH_SHARE, _WHOLE_TIMES, _PEAK_SHARE = 1.5, 0.7, 3.0, 1.1


def run(session: Session) -> None:
    if not is_installed("splitlearn_auto"):
        session.add(Row(NAME, "qwen3_moe", note="splitlearn-auto is not installed"))
        return
    sparse.compare(session, NAME, sparse_experts, (_DEEP, _SHALLOW), 1, _SIZE_SHARE)
    (checkpoint,) = session.models((experts,))
    read_through(checkpoint.files)
    _whole(session, checkpoint)
    _bandwidth(session, checkpoint)


def _whole(session: Session, checkpoint: Checkpoint) -> None:
    """A trunk, against ``from_pretrained`` of the whole model, which converts as well."""
    room = checkpoint.recipe.nbytes
    measures = {name: measurement(checkpoint, name, watch=True, room=room) for name in ("ours", "whole")}
    answers, failures = interleave(session.runs, measures, discarded=1)
    megabytes = _trunk_mb(checkpoint)
    what = f"trunk of {megabytes / 1000:.1f} GB"
    if failures:
        session.add(Row(NAME, what, note="; ".join(failures.values())))
        return
    same = {answer["digest"] for answer in answers["ours"]} == {answer["digest"] for answer in answers["whole"]}
    note = "" if same else "its trunk computes other numbers than ours"
    for key, title, times in (("load", "load", _WHOLE_TIMES), ("first", "load + first forward", None)):
        ours, theirs = (sample(answers[name], key, "ms", 1000) for name in ("ours", "whole"))
        session.add(faster(NAME, f"{what}, {title}", ours, "from_pretrained", theirs, times=times, note=note))
    peak, size = sample(answers["ours"], "peak_mb", "MB"), Sample.of([megabytes], "MB")
    session.add(at_most(NAME, f"{what}, peak", peak, "the component itself", size, share=_PEAK_SHARE))


def _bandwidth(session: Session, checkpoint: Checkpoint) -> None:
    """Bytes a second of converting reads, against those of ``copied`` that convert nothing."""
    (plain,) = session.models((qwen2,))
    read_through(plain.files)
    measures = {
        "experts": measurement(checkpoint, "ours", strategy="copied", forward=False, room=checkpoint.recipe.nbytes),
        "plain": measurement(plain, "ours", strategy="copied", forward=False, room=checkpoint.recipe.nbytes),
    }
    answers, failures = interleave(session.runs, measures, discarded=1)
    what = "bytes a second of converting reads"
    if failures:
        session.add(Row(NAME, what, note="; ".join(failures.values())))
        return
    ours, theirs = (
        Sample.of((_trunk_mb(model) / answer["load"] for answer in answers[name]), "MB/s")
        for name, model in (("experts", checkpoint), ("plain", plain))
    )
    ratio, target = ours.median / theirs.median, f">= {_BANDWIDTH_SHARE:g} of it"
    session.add(Row(NAME, what, ours, "copied, qwen2", theirs, ratio, target, ratio >= _BANDWIDTH_SHARE))


def _trunk_mb(checkpoint: Checkpoint) -> float:
    from splitlearn_core import plan_split

    plan = plan_split(checkpoint.directory, checkpoint.recipe.cut, parts=["trunk"])
    return plan.component("trunk").loaded_bytes(plan.dtype) / 1e6
