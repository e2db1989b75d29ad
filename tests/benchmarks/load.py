"""A trunk in its stored dtype: the load alone, and the load with the first forward of 32 tokens.

Every way of loading must compute the same, to the last bit; the table says so where one does not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from checkpoints import Checkpoint
from loaders import LOADERS
from measuring import Session, interleave, is_installed, read_through, sample
from report import Row, Sample, faster
from trunk import measurement

NAME = "load"
_RECIPE_TIMES = {"gpt2": 40, "qwen2": 100, "gemma": 500}
_LOAD_TIMES = {"whole": dict.fromkeys(_RECIPE_TIMES, 4), "recipe": _RECIPE_TIMES, "kindly": _RECIPE_TIMES}
_FIRST_TIMES = {"whole": 1.3, "fastsafetensors": 3, "runai": 3, "accelerate": 15, "empty": 15}


def run(session: Session) -> None:
    for number, checkpoint in enumerate(session.models()):
        usable = [name for name, loader in LOADERS.items() if not loader.package or is_installed(loader.package)]
        measures = {name: _warm(checkpoint, name) for name in usable}
        # The first model's first round also reads libraries from the disk.
        answers, failures = interleave(session.runs, measures, discarded=int(number == 0))
        for name, loader in LOADERS.items():
            if name not in answers:
                failure = failures.get(name, "not installed")
                session.add(Row(NAME, checkpoint.recipe.name, peer=loader.title, note=f"{loader.title}: {failure}"))
            elif name != "ours" and "ours" in answers:
                session.add(*_rows(checkpoint, name, answers["ours"], answers[name]))


def _warm(checkpoint: Checkpoint, loader: str) -> Callable[[], dict[str, Any]]:
    measure = measurement(checkpoint, loader)

    def warm() -> dict[str, Any]:
        # Each time: a peer that took most of the memory has driven files out that the next one finds.
        read_through(checkpoint.files)
        return measure()

    return warm


def _rows(checkpoint: Checkpoint, peer: str, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[Row]:
    model, title = checkpoint.recipe.name, LOADERS[peer].title
    same = {answer["digest"] for answer in ours} == {answer["digest"] for answer in theirs}
    note = "" if same else "its trunk computes other numbers than ours"
    rows = []
    for key, what, times in (
        ("load", f"{model}, load", _LOAD_TIMES.get(peer, {}).get(model)),
        ("first", f"{model}, load + first forward", _FIRST_TIMES.get(peer)),
    ):
        mine, other = sample(ours, key, "ms", 1000), sample(theirs, key, "ms", 1000)
        row = faster(NAME, what, mine, title, other, times=times, note=note)
        missed = key == "first" and same and row.reached is False
        rows.append(replace(row, note=_bound(sample(ours, "again", "ms", 1000), other)) if missed else row)
    return rows


def _bound(forward: Sample, theirs: Sample) -> str:
    """Say what no way of loading can exceed: all of them run the same forward."""
    return f"a second forward takes {forward}: a load of no time would be {theirs.median / forward.median:.3g}x faster"
