"""Ask the kernel for planned bytes before they are needed, so that the disk works while modules are imported."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path

from splitlearn_core.types import Progress, ProgressCallback, TensorInfo

_CHUNK = 8 * 2**20
#: Places of a range that are looked at to tell whether it is in the page cache already.
_PROBES = 16


def read_ahead(tensors: Iterable[TensorInfo], paths: Mapping[str, Path]) -> None:
    """Start reading the byte ranges of tensors into the page cache, and return at once.

    Does nothing where the system has no such call. What cannot be read is left to the reader that
    comes later and says so.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    # Asking for what is there already would only take time from whoever loads it.
    ranges = [(shard, begin, end) for shard, begin, end in _ranges(tensors) if not is_cached(paths[shard], begin, end)]
    if ranges:
        threading.Thread(target=_advise, args=(ranges, paths), name="splitlearn-read-ahead", daemon=True).start()


def read_in(paths: Iterable[Path], progress: ProgressCallback) -> None:
    """Read whole files into the page cache now, and say how far that is.

    For readers that tell nobody how far they are and cannot be stopped: with the bytes in memory
    they are soon done.
    """
    sizes = {path: path.stat().st_size for path in paths}
    done, total = 0, sum(sizes.values())
    buffer = bytearray(_CHUNK)
    for path, size in sizes.items():
        progress(Progress("reading", None, min(done, total), total, path.name))
        if is_cached(path, 0, size):
            done += size
            continue
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                done += count
                progress(Progress("reading", None, min(done, total), total, path.name))
    progress(Progress("reading", None, total, total))


def _ranges(tensors: Iterable[TensorInfo]) -> list[tuple[str, int, int]]:
    """Join neighbouring tensors: shard, first byte, one past the last."""
    joined: list[tuple[str, int, int]] = []
    for info in sorted(tensors, key=lambda info: (info.shard, info.begin)):
        if joined and joined[-1][0] == info.shard and info.begin <= joined[-1][2]:
            joined[-1] = (info.shard, joined[-1][1], max(joined[-1][2], info.end))
        else:
            joined.append((info.shard, info.begin, info.end))
    return joined


def is_cached(path: Path, begin: int, end: int) -> bool:
    """Tell by a few probes that do not wait for the disk whether a range is in memory; in doubt, say no."""
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    try:
        with path.open("rb", buffering=0) as file:
            for number in range(_PROBES):
                position = begin + (end - 1 - begin) * number // (_PROBES - 1)
                os.preadv(file.fileno(), [bytearray(1)], position, os.RWF_NOWAIT)
    except OSError:
        return False  # not cached, or a file system that cannot tell
    return True


def _advise(ranges: list[tuple[str, int, int]], paths: Mapping[str, Path]) -> None:
    for shard, begin, end in ranges:
        try:
            descriptor = os.open(paths[shard], os.O_RDONLY)
        except OSError:
            continue  # the reader that follows opens it too, and reports it
        try:
            for position in range(begin, end, _CHUNK):
                os.posix_fadvise(descriptor, position, min(_CHUNK, end - position), os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)
