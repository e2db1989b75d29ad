"""Prefetch planned bytes into the page cache, so that the disk works while modules are imported."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

from splitlearn_core.checkpoint.files import open_regular
from splitlearn_core.errors import InvalidCheckpointError
from splitlearn_core.types import CHUNK_BYTES, Progress, ProgressCallback, TensorInfo

#: Readers at once; the kernel reads a few megabytes ahead for each.
_READERS = 2
#: Linux's constant, since 5.14: populate the page tables, reading pages that are missing.
_MADV_POPULATE_READ = 22
#: Positions of a range that are probed to decide whether it is in the page cache already.
_PROBES = 16


def read_ahead(tensors: Iterable[TensorInfo], paths: Mapping[str, Path]) -> None:
    """Start reading the byte ranges of tensors into the page cache, and return at once.

    Does nothing on systems without such a call. Errors are ignored: the reader that follows reports them.
    """
    if not hasattr(os, "posix_fadvise"):
        return
    # Reading cached ranges again would only slow down the load itself.
    ranges = [(shard, begin, end) for shard, begin, end in _ranges(tensors) if not is_cached(paths[shard], begin, end)]
    chunks = iter(
        [
            (shard, at, min(at + CHUNK_BYTES, end))
            for shard, begin, end in ranges
            for at in range(begin, end, CHUNK_BYTES)
        ]
    )
    for _ in range(_READERS if ranges else 0):
        threading.Thread(target=_fill, args=(chunks, paths), name="splitlearn-read-ahead", daemon=True).start()


def read_in(paths: Iterable[Path], progress: ProgressCallback) -> None:
    """Read whole files into the page cache now, and report the progress.

    For readers that report no progress and cannot be stopped: with the bytes in memory they take little time.
    """
    sizes = {path: path.stat().st_size for path in paths}
    done, total = 0, sum(sizes.values())
    buffer = bytearray(CHUNK_BYTES)
    for path, size in sizes.items():
        progress(Progress("reading", None, min(done, total), total, path.name))
        if is_cached(path, 0, size):
            done += size
            continue
        with open_regular(path, buffering=0) as file:
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
    """Return whether a range is in the page cache, by a few probes that do not wait for the disk; False in doubt."""
    if not hasattr(os, "RWF_NOWAIT"):
        return False
    try:
        with open_regular(path, buffering=0) as file:
            for number in range(_PROBES):
                position = begin + (end - 1 - begin) * number // (_PROBES - 1)
                os.preadv(file.fileno(), [bytearray(1)], position, os.RWF_NOWAIT)
    except (OSError, InvalidCheckpointError):
        return False  # not cached, no file any longer, or a file system without such reads
    return True


def _fill(chunks: Iterator[tuple[str, int, int]], paths: Mapping[str, Path]) -> None:
    """Read chunks into the page cache until none are left; several threads take from one iterator."""
    with ExitStack() as files:
        # The kernel keeps its read-ahead state per open file: a file that is opened again for each chunk
        # would be read in small pieces.
        opened: dict[str, int] = {}
        for shard, begin, end in chunks:
            try:
                if shard not in opened:
                    opened[shard] = files.enter_context(open_regular(paths[shard], buffering=0)).fileno()
                if not _populate(opened[shard], begin, end):
                    os.posix_fadvise(opened[shard], begin, end - begin, os.POSIX_FADV_WILLNEED)
            except (OSError, ValueError, InvalidCheckpointError):
                continue  # missing, no file, or shorter by now: the reader that follows opens it too, and reports it


def _populate(descriptor: int, begin: int, end: int) -> bool:
    """Read a range by mapping it for a moment; return False if this system cannot.

    Bytes read for a mapping or by ``read`` are cached in folios of up to 2 MB, and a later mapping
    takes one fault for each. ``posix_fadvise`` leaves single pages: a fault every 64 KB, ten
    times the time (80 instead of 8 ms a GB, Linux 6.18).
    """
    if sys.platform != "linux":
        return False
    start = begin - begin % mmap.ALLOCATIONGRANULARITY
    # Private and writable, because ctypes needs a writable buffer to take an address; nothing is written.
    with mmap.mmap(descriptor, end - start, mmap.MAP_PRIVATE, offset=start) as mapping:
        address = (ctypes.c_char * len(mapping)).from_buffer(mapping)
        # Not Python's own madvise, which holds the GIL while the disk works.
        try:
            # Otherwise the kernel starts with small folios; a kernel without huge pages ignores it.
            _madvise(address, mmap.MADV_HUGEPAGE)
            return _madvise(address, _MADV_POPULATE_READ)
        finally:
            del address  # a mapping with exported buffers cannot be closed


def _madvise(mapped: ctypes.Array[ctypes.c_char], advice: int) -> bool:
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return bool(madvise(ctypes.addressof(mapped), len(mapped), advice) == 0)
