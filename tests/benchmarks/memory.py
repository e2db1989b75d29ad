"""Anonymous memory that a load takes: next to nothing when mapped, the component when copied."""

from __future__ import annotations

from checkpoints import Checkpoint
from measuring import MeasurementError, Session, read_through, sample
from report import Row, Sample, at_most
from trunk import measurement

NAME = "memory"
_MAPPED_MB, _COPIED_SHARE = 10, 1.1
_OTHER = {"gpt2": "bfloat16", "qwen2": "float32", "gemma": "float16"}


def run(session: Session) -> None:
    for checkpoint in session.models():
        read_through(checkpoint.files)
        try:
            _mapped(session, checkpoint)
            _copied(session, checkpoint, "auto", "copied")
            _copied(session, checkpoint, _OTHER[checkpoint.recipe.name], "auto")
        except MeasurementError as error:
            session.add(Row(NAME, checkpoint.recipe.name, note=str(error)))


def _mapped(session: Session, checkpoint: Checkpoint) -> None:
    measure = measurement(checkpoint, "ours", watch=True)
    grown = sample([measure() for _ in range(session.runs)], "peak_mb", "MB")
    what = f"{checkpoint.recipe.name}, mapped, peak"
    session.add(Row(NAME, what, grown, target=f"<= {_MAPPED_MB} MB", reached=grown.median <= _MAPPED_MB))


def _copied(session: Session, checkpoint: Checkpoint, dtype: str, strategy: str) -> None:
    measure = measurement(checkpoint, "ours", dtype=dtype, strategy=strategy, watch=True)
    grown = sample([measure() for _ in range(session.runs)], "peak_mb", "MB")
    component = Sample.of([_component_mb(checkpoint, dtype)], "MB")
    how = "copied" if dtype == "auto" else f"as {dtype}"
    what = f"{checkpoint.recipe.name}, {how}, peak"
    session.add(at_most(NAME, what, grown, "the component itself", component, share=_COPIED_SHARE))


def _component_mb(checkpoint: Checkpoint, dtype: str) -> float:
    from splitlearn_core import plan_split

    plan = plan_split(checkpoint.directory, checkpoint.recipe.cut, parts=["trunk"], dtype=dtype)
    return plan.component("trunk").loaded_bytes(plan.dtype) / 1e6
