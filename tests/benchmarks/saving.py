"""How fast a checkpoint is saved as components, against the disk's own writing of the same bytes."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

from checkpoints import Checkpoint, gemma, gpt2
from measuring import MeasurementError, Session, in_fresh_process, interleave, read_through, sample
from report import Row

NAME = "saving"
_SHARE = 0.8
_CHUNK = 8 * 2**20


def run(session: Session) -> None:
    for checkpoint in session.models((gpt2, gemma)):
        read_through(checkpoint.files)
        out = session.cache_dir / "saving"
        job = {"source": str(checkpoint.directory), "cut": checkpoint.recipe.cut, "out": str(out)}
        measures = {how: _measurement(job | {"how": how}, out) for how in ("ours", "disk")}
        what = f"{checkpoint.recipe.name}, all three components"
        try:
            answers, failures = interleave(session.runs, measures, discarded=1)
        finally:
            shutil.rmtree(out, ignore_errors=True)
        if failures:
            session.add(Row(NAME, what, note="; ".join(failures.values())))
            continue
        session.add(_row(what, checkpoint, answers))


def _row(what: str, checkpoint: Checkpoint, answers: dict[str, list[dict[str, Any]]]) -> Row:
    ours, disk = (sample(answers[how], "mb_per_second", "MB/s") for how in ("ours", "disk"))
    ratio = ours.median / disk.median
    note = f"{answers['ours'][0]['mb']:.0f} MB from the page cache to the disk, hashed; {checkpoint.recipe.dtype}"
    target = f">= {_SHARE:g} of it"
    return Row(NAME, what, ours, "write + fsync of the same bytes", disk, ratio, target, ratio >= _SHARE, note)


def _measurement(job: dict[str, Any], out: Path) -> Any:
    def measure() -> dict[str, Any]:
        shutil.rmtree(out, ignore_errors=True)
        os.sync()
        return in_fresh_process("saving", job)

    return measure


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Save a checkpoint, or write as many bytes of it; from the first byte until all is on the disk."""
    from splitlearn_core import plan_split, save_split

    out, source = Path(job["out"]), Path(job["source"])
    sizes = [part.nbytes for part in plan_split(source, job["cut"]).components]
    if job["how"] == "ours":
        begin = time.perf_counter()
        save_split(source, out, job["cut"], progress=False)
    else:
        # Real weights, read before: what is measured is the writing.
        with next(iter(sorted(source.glob("*.safetensors")))).open("rb") as file:
            chunk = file.read(_CHUNK)
        out.mkdir()
        begin = time.perf_counter()
        for number, size in enumerate(sizes):
            _write(out / str(number), chunk, size)
    seconds = time.perf_counter() - begin
    written = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    if written < sum(sizes):
        raise MeasurementError(f"{written} bytes were written instead of {sum(sizes)}")
    return {"seconds": seconds, "mb": written / 1e6, "mb_per_second": written / 1e6 / seconds}


def _write(path: Path, chunk: bytes, size: int) -> None:
    with path.open("wb", buffering=0) as file:
        for start in range(0, size, len(chunk)):
            file.write(memoryview(chunk)[: size - start])
        os.fsync(file.fileno())
