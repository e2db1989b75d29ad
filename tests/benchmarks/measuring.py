"""Fresh processes, one for each measurement, and what can be seen of them from outside."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints import Checkpoint, Recipe, gemma, gpt2, make, qwen2
from report import Row, Sample

HERE = Path(__file__).parent
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "RUNAI_STREAMER_LOG_LEVEL": "ERROR",
}
_TIMEOUT = 900.0
#: A candidate that was measured so many times, and for so many seconds in all, is not measured again.
_ENOUGH_RUNS, _ENOUGH_SECONDS = 3, 30.0
_WATCH_INTERVAL = 0.002


class MeasurementError(Exception):
    """A measurement did not come to an end; the message is the last line that it wrote."""


@dataclass
class Session:
    """What all benchmarks of one run share."""

    runs: int
    quick: bool
    cache_dir: Path
    #: How long many sessions run at once.
    minutes: float
    rows: list[Row] = field(default_factory=list)

    def models(self, recipes: Iterable[Callable[..., Recipe]] = (gpt2, qwen2, gemma)) -> Iterator[Checkpoint]:
        """Make the checkpoints of real models, each when it is needed."""
        return (self.make(recipe(quick=self.quick)) for recipe in recipes)

    def make(self, recipe: Recipe) -> Checkpoint:
        say(f"checkpoint {recipe.name}: {recipe.nbytes / 1e9:.2f} GB{' (sparse)' if recipe.sparse else ''}")
        return make(recipe, self.cache_dir)

    def add(self, *rows: Row) -> None:
        self.rows += rows


def say(text: str) -> None:
    """Tell whoever waits what is going on; the table goes to stdout alone."""
    print(text, file=sys.stderr, flush=True)


def touch(nbytes: int) -> None:
    """Have the machine underneath provide memory now: a virtual one takes it back from a guest that does not use it.

    As much as what is measured takes, in its own memory and in the page cache.
    """
    memory = huge(nbytes)
    for position in range(0, nbytes, 2**12):
        memory[position] = 1
    memory.close()


def huge(nbytes: int) -> mmap.mmap:
    """Map anonymous memory in large pages."""
    memory = mmap.mmap(-1, max(1, -(-nbytes // 2**21)) * 2**21, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def in_fresh_process(module: str, job: Mapping[str, Any], *, watch: bool = False) -> dict[str, Any]:
    """Let ``module.work(job)`` run in a fresh process, and return what it answers.

    With ``watch``, the answer's ``peak_mb`` is how far its anonymous memory rose above ``before_mb``
    between its ``begin`` and ``end``, as seen from outside.

    Raises:
        MeasurementError: The process failed.
    """
    process = start([str(HERE / "worker.py"), module, json.dumps(job)])
    samples: list[tuple[float, float]] = []
    if watch:
        watcher = threading.Thread(target=_watch, args=(process.pid, samples), daemon=True)
        watcher.start()
    answer = last_line(process)
    if watch:
        during = [size for moment, size in samples if answer["begin"] <= moment <= answer["end"]]
        answer["peak_mb"] = max([*during, answer["before_mb"] + answer["grown_mb"]]) - answer["before_mb"]
    return answer


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """Start this interpreter with arguments, in a session of its own."""
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | _ENVIRONMENT,
        start_new_session=True,
    )


def last_line(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for a process, and return the JSON object on the last line it wrote."""
    try:
        output, errors = process.communicate(timeout=_TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise MeasurementError(f"no answer within {_TIMEOUT:.0f} s") from error
    finally:
        # With what it has started: servers and proxies.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if process.returncode:
        lines = [line for line in errors.splitlines() if line.strip()]
        raise MeasurementError(f"exit code {process.returncode}: {lines[-1].strip() if lines else ''}")
    answer: dict[str, Any] = json.loads(output.splitlines()[-1])
    return answer


def interleave(
    runs: int, candidates: Mapping[str, Callable[[], dict[str, Any]]], *, discarded: int = 0
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """Measure A B C A B C, so that a drift of the machine hits all of them alike.

    What takes long is measured less often.

    Returns:
        The answers of each candidate, and why candidates have none.
    """
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in candidates}
    failures: dict[str, str] = {}
    seconds = dict.fromkeys(candidates, 0.0)
    for number in range(runs + discarded):
        for name, measure in candidates.items():
            is_enough = len(answers[name]) >= _ENOUGH_RUNS and seconds[name] > _ENOUGH_SECONDS
            if name in failures or is_enough:
                continue
            begin = time.monotonic()
            try:
                answer = measure()
            except MeasurementError as error:
                failures[name] = str(error)
                continue
            if number >= discarded:
                answers[name].append(answer)
                seconds[name] += time.monotonic() - begin
    return {name: found for name, found in answers.items() if name not in failures}, failures


def sample(answers: Iterable[Mapping[str, Any]], key: str, unit: str, factor: float = 1.0) -> Sample:
    """Collect one number of all answers."""
    return Sample.of((answer[key] * factor for answer in answers), unit)


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def read_through(files: Iterable[Path]) -> None:
    """Bring files into the page cache as whoever reads them from the disk leaves them there.

    They are dropped first: how pages came into the cache decides how large the pieces are in which
    they lie there, and so what mapping them costs (80 ms a GB after posix_fadvise, 8 after reading).
    """
    files = list(files)
    drop(files)
    buffer = bytearray(2**20)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def drop(files: Iterable[Path]) -> float:
    """Ask the kernel to forget files, and return the share of their pages that it still holds."""
    held = total = 0
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            resident, pages = _residency(file.fileno())
        held, total = held + resident, total + pages
    return held / total


def _residency(descriptor: int) -> tuple[int, int]:
    """Count the pages of a file, and those of them in the page cache; mapping alone reads none."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    size = os.fstat(descriptor).st_size
    pages = -(-size // os.sysconf("SC_PAGESIZE"))
    address = libc.mmap(None, size, 1, 1, descriptor, 0)
    vector = ctypes.create_string_buffer(pages)
    failed = libc.mincore(address, size, vector)
    libc.munmap(address, size)
    if failed:
        raise MeasurementError(f"mincore: {os.strerror(ctypes.get_errno())}")
    return sum(byte & 1 for byte in vector.raw[:pages]), pages


def anonymous_mb(pid: int | str = "self") -> float:
    """Read how much anonymous memory a process holds."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise MeasurementError("this system does not tell anonymous memory")


def _watch(pid: int, samples: list[tuple[float, float]]) -> None:
    while True:
        try:
            samples.append((time.monotonic(), anonymous_mb(pid)))
        except (OSError, MeasurementError):
            return  # the process has ended
        time.sleep(_WATCH_INTERVAL)
