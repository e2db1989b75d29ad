"""Ways of reading: how fast copies are made, and whether each way takes the memory that its plan says."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from checkpoints import Checkpoint, gemma, qwen2
from loaders import Job, wanted_files, wanted_keys
from measuring import (
    MeasurementError,
    Session,
    drop,
    huge,
    in_fresh_process,
    interleave,
    is_installed,
    read_through,
    sample,
    touch,
)
from report import Row, Sample, at_most, faster
from trunk import measurement

NAME = "strategies"
_PREADV, _DD = "preadv into huge pages", "dd of the same bytes"
_CHUNK = 8 * 2**20
_PEERS = {"fastsafetensors": "fastsafetensors", "runai": "runai_model_streamer"}
_SHARDS = 4
#: Memory of a load that is no weights: modules, plans, what the libraries keep.
_SLACK_MB = 24


def run(session: Session) -> None:
    (large,) = session.models((gemma,))
    _warm(session, large)
    _cold(session, large)
    (small,) = session.models((qwen2,))
    _memory(session, small)
    session.add(_device(large))


def _warm(session: Session, checkpoint: Checkpoint) -> None:
    """Tensors in memory, nothing built: ours, the system call alone, and peers, on the same keys."""
    read_through(checkpoint.files)
    readers = ["ours", "preadv", *(name for name, package in _PEERS.items() if is_installed(package))]
    answers, failures = interleave(session.runs, {name: partial(_read, checkpoint, name) for name in readers})
    what = f"{checkpoint.recipe.name}, copied, warm"
    for name, times in (("preadv", 0.8), *dict.fromkeys(_PEERS, 2.0).items()):
        if name in answers:
            mine, theirs = sample(answers["ours"], "seconds", "ms", 1000), sample(answers[name], "seconds", "ms", 1000)
            session.add(faster(NAME, what, mine, _PREADV if name == "preadv" else name, theirs, times=times))
        else:
            session.add(Row(NAME, what, peer=name, note=failures.get(name, "not installed")))


def _cold(session: Session, checkpoint: Checkpoint) -> None:
    """The same from the disk, against reading those bytes one after the other."""
    held: list[float] = []

    def cold(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        held.append(drop(checkpoint.files))
        return measure()

    answers, failures = interleave(
        min(session.runs, 3),
        {
            "ours": lambda: cold(partial(_read, checkpoint, "ours", cold=True)),
            "dd": lambda: cold(partial(_dd, checkpoint)),
        },
    )
    what = f"{checkpoint.recipe.name}, copied, cold"
    if failures:
        session.add(Row(NAME, what, note="; ".join(failures.values())))
        return
    note = f"{max(held):.0%} of the files stayed in the page cache" if max(held) > 0.01 else ""  # a rest
    mine, theirs = sample(answers["ours"], "seconds", "ms", 1000), sample(answers["dd"], "seconds", "ms", 1000)
    session.add(at_most(NAME, what, mine, _DD, theirs, share=1.1, note=note))


def _memory(session: Session, checkpoint: Checkpoint) -> None:
    """The highest anonymous memory of a load, against what the plan says."""
    read_through(checkpoint.files)
    for strategy, dtype in (("mapped", "auto"), ("copied", "auto"), ("copied", "float32"), ("incremental", "float32")):
        _peak(session, checkpoint, strategy, dtype)
    _peak(session, checkpoint, "whole", "auto", whole=True)
    with _as_bin(session, checkpoint) as binary:
        _peak(session, binary, "incremental", "auto")
        shard = max(path.stat().st_size for path in binary.directory.glob("*.bin")) / 1e6
        grown = _grown(session, binary, "incremental", "auto")
        limit = Sample.of([_predicted_mb(binary, "incremental", "auto") + shard], "MB")
        what = f"{checkpoint.recipe.name}, .bin shards, peak"
        session.add(at_most(NAME, what, grown, "the component and a shard", limit, share=1.0))


def _peak(session: Session, checkpoint: Checkpoint, strategy: str, dtype: str, *, whole: bool = False) -> None:
    what = f"{checkpoint.recipe.name}, {strategy}{'' if dtype == 'auto' else f' as {dtype}'}, peak"
    try:
        grown = _grown(session, checkpoint, strategy, dtype)
    except MeasurementError as error:
        session.add(Row(NAME, what, note=str(error)))
        return
    predicted = Sample.of([_predicted_mb(checkpoint, strategy, dtype, whole=whole) + _SLACK_MB], "MB")
    session.add(at_most(NAME, what, grown, f"what the plan says, and {_SLACK_MB} MB", predicted, share=1.0))


def _grown(session: Session, checkpoint: Checkpoint, strategy: str, dtype: str) -> Sample:
    measure = measurement(checkpoint, "ours", dtype=dtype, strategy=strategy, forward=False, watch=True)
    return sample([measure() for _ in range(min(session.runs, 2))], "peak_mb", "MB")


def _predicted_mb(checkpoint: Checkpoint, strategy: str, dtype: str, *, whole: bool = False) -> float:
    from splitlearn_core import plan_split

    plan = partial(plan_split, checkpoint.directory, checkpoint.recipe.cut, dtype=dtype)
    trunk = plan(parts=["trunk"])
    if not whole:
        return trunk.memory[strategy].peak / 1e6
    # Nothing of the whole model is kept but the trunk.
    everything = plan().memory[strategy]
    return (everything.peak - everything.kept + trunk.memory["copied"].kept) / 1e6


@contextmanager
def _as_bin(session: Session, checkpoint: Checkpoint) -> Iterator[Checkpoint]:
    """Hold a checkpoint's weights in a few ``.bin`` shards, for as long as they are needed."""
    directory = session.cache_dir / f"{checkpoint.directory.name}-bin"
    directory.mkdir(exist_ok=True)
    try:
        job = {"action": "convert", "from": str(checkpoint.directory), "to": str(directory)}
        in_fresh_process("strategies", job)
        yield Checkpoint(checkpoint.recipe, directory)
    finally:
        shutil.rmtree(directory)


def _device(checkpoint: Checkpoint) -> Row:
    """From the page cache to a GPU, against one copy of as many pinned bytes."""
    import torch

    what = f"{checkpoint.recipe.name}, copied to a GPU"
    if not torch.cuda.is_available():
        return Row(NAME, what, note="NOT measured: there is no CUDA device")
    read_through(checkpoint.files)
    mine, pinned = (
        Sample.of([in_fresh_process("strategies", _job(checkpoint, name))["seconds"] * 1000], "ms")
        for name in ("cuda", "pinned")
    )
    return faster(NAME, what, mine, "a pinned copy", pinned, times=0.8)


def _job(checkpoint: Checkpoint, reader: str, *, cold: bool = False) -> dict[str, Any]:
    target = {"directory": str(checkpoint.directory), "cut": checkpoint.recipe.cut}
    return {"action": "read", "reader": reader, "cold": cold, **target}


def _read(checkpoint: Checkpoint, reader: str, *, cold: bool = False) -> dict[str, Any]:
    return in_fresh_process("strategies", _job(checkpoint, reader, cold=cold))


def _dd(checkpoint: Checkpoint) -> dict[str, Any]:
    """Let ``dd`` read the trunk's bytes, stretch by stretch."""
    stretches = list(_stretches(Job(str(checkpoint.directory), checkpoint.recipe.cut)))
    touch(sum(count for _, _, count in stretches))
    begin = time.monotonic()
    for path, start, count in stretches:
        flags = ["bs=8M", "iflag=skip_bytes,count_bytes", f"skip={start}", f"count={count}", "status=none"]
        subprocess.run(["dd", f"if={path}", "of=/dev/null", *flags], check=True)
    return {"seconds": time.monotonic() - begin}


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Read, or convert, in a fresh process."""
    if job["action"] == "convert":
        _convert(Path(job["from"]), Path(job["to"]))
        return {}
    target = Job(job["directory"], tuple(job["cut"]))
    read = {
        "ours": partial(_ours, "cpu"),
        "cuda": partial(_ours, "cuda:0"),
        "pinned": _pinned,
        "preadv": _preadv,
        "fastsafetensors": _fastsafetensors,
        "runai": _runai,
    }[job["reader"]](target)
    # What is not in the page cache takes memory there, too.
    touch(sum(count for _, _, count in _stretches(target)) * (2 if job["cold"] else 1))
    begin = time.monotonic()
    kept = read()
    seconds = time.monotonic() - begin
    del kept
    return {"seconds": seconds}


def _stretches(job: Job) -> Iterator[tuple[str, int, int]]:
    """Yield file, first byte and length of what lies together of the trunk."""
    from splitlearn_core import plan_split

    plan = plan_split(job.directory, job.cut, parts=["trunk"])
    path, start, end = "", 0, 0
    for tensor in plan.component("trunk").tensors:
        info = tensor.info
        if (path, end) != (info.shard, info.begin):
            if end:
                yield str(Path(job.directory) / path), start, end - start
            path, start = info.shard, info.begin
        end = info.end
    yield str(Path(job.directory) / path), start, end - start


def _ours(device: str, job: Job) -> Callable[[], Any]:
    import torch

    from splitlearn_core import plan_split
    from splitlearn_core.loading_strategy import ReadPlan
    from splitlearn_core.readers.copied import CopiedStrategy

    part = plan_split(job.directory, job.cut, parts=["trunk"]).component("trunk")
    paths = {shard: Path(job.directory) / shard for shard in part.shards}
    if device != "cpu":
        torch.empty(1, device=device)

    def read() -> Any:
        tensors = list(CopiedStrategy().read(ReadPlan(part.tensors, paths, device, part.dtype)))
        if device != "cpu":
            torch.cuda.synchronize()
        return tensors

    return read


def _pinned(job: Job) -> Callable[[], Any]:
    import torch

    source = torch.zeros(sum(count for _, _, count in _stretches(job)), dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device="cuda:0")

    def read() -> Any:
        target.copy_(source)
        torch.cuda.synchronize()
        return target

    return read


def _preadv(job: Job) -> Callable[[], Any]:
    """The system call alone, with as many threads as ours has."""
    from splitlearn_core.readers.copied import reader_count

    chunks, position = [], 0
    for path, start, count in _stretches(job):
        pieces = range(0, count, _CHUNK)
        chunks += [(path, start + at, position + at, min(_CHUNK, count - at)) for at in pieces]
        position += count

    def read() -> Any:
        memory = huge(position)
        view, coming = memoryview(memory), iter(chunks)

        def fill() -> None:
            opened: dict[str, int] = {}
            for path, start, at, count in coming:
                if path not in opened:
                    opened[path] = os.open(path, os.O_RDONLY)
                os.preadv(opened[path], [view[at : at + count]], start)

        threads = [threading.Thread(target=fill) for _ in range(reader_count())]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return memory

    return read


def _fastsafetensors(job: Job) -> Callable[[], Any]:
    import torch  # noqa: F401  # imported before the clock starts
    from fastsafetensors import SafeTensorsFileLoader

    wanted = wanted_keys(job)

    def read() -> Any:
        loader = SafeTensorsFileLoader(None, "cpu", nogds=True, set_numa=False)
        loader.set_tensor_filter(lambda key: key in wanted)
        loader.add_filenames({0: wanted_files(job, wanted)})
        buffers = loader.copy_files_to_device()
        return loader, [buffers.get_tensor(key) for key in wanted]

    return read


def _runai(job: Job) -> Callable[[], Any]:
    import torch  # noqa: F401  # imported before the clock starts
    from runai_model_streamer import SafetensorsStreamer

    wanted = wanted_keys(job)

    def read() -> Any:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files(wanted_files(job, wanted), tensor_names=wanted.keys())
            return list(streamer.get_tensors())

    return read


def _convert(source: Path, target: Path) -> None:
    """Write the weights of a checkpoint of one file as ``.bin`` shards of about the same size."""
    import json

    import torch
    from safetensors.torch import load_file

    state = load_file(source / "model.safetensors")
    total, shards, filled = sum(tensor.nbytes for tensor in state.values()), [{}], 0
    for key, tensor in state.items():
        if filled + tensor.nbytes > total * len(shards) / _SHARDS and len(shards) < _SHARDS and shards[-1]:
            shards.append({})
        shards[-1][key] = tensor.clone()
        filled += tensor.nbytes
    weight_map = {}
    for number, shard in enumerate(shards):
        torch.save(shard, target / f"pytorch_model-{number}.bin")
        weight_map |= dict.fromkeys(shard, f"pytorch_model-{number}.bin")
    (target / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    shutil.copy(source / "config.json", target)
