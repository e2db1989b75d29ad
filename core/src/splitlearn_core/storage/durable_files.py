"""Write files durably: hashed on the way, and on the disk when the call returns."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from splitlearn_core.checkpoint.manifest import FileRecord
from splitlearn_core.checkpoint.regular_files import open_regular
from splitlearn_core.errors import InsufficientDiskError, InvalidCheckpointError
from splitlearn_core.storage.weight_layout import WeightFile
from splitlearn_core.types import CHUNK_BYTES, human_bytes

#: Bytes after which the system is asked to put on the disk what was written, while more is coming.
_FLUSH_BYTES = 64 * 2**20


class Buffers:
    """Two buffers that take turns: one is filled while the other is written and hashed.

    All that is read for one writer shares them. Memory that is new to the process costs a fault for each
    page, which for a checkpoint of many tensors is half as much as writing them.

    Args:
        size: Bytes of each.
    """

    def __init__(self, size: int = CHUNK_BYTES) -> None:
        self._size = size
        self._made: deque[memoryview] = deque()

    def next(self) -> memoryview:
        """Return the one whose turn it is; what it held may be overwritten from now on."""
        if len(self._made) < 2:  # noqa: PLR2004  # one is filled, one is written
            self._made.append(memoryview(bytearray(self._size)))
            return self._made[-1]
        self._made.rotate()
        return self._made[-1]


def range_pieces(
    path: Path, begin: int, end: int, buffers: Buffers | None = None
) -> Callable[[], Iterator[memoryview]]:
    """Return a function that reads the bytes ``[begin, end)`` of a file, a chunk at a time.

    Args:
        path: The file.
        begin, end: Offsets in bytes.
        buffers: What to read into, where several ranges are read one after another.
    """

    def pieces() -> Iterator[memoryview]:
        own = buffers or Buffers(min(CHUNK_BYTES, end - begin))
        with open_regular(path, buffering=0) as file:
            file.seek(begin)
            left = end - begin
            while left:
                buffer = own.next()
                count = file.readinto(buffer[: min(left, len(buffer))])
                if not count:
                    raise InvalidCheckpointError(
                        f"{path} was cut short while it was being read: {left} bytes before {end} are missing",
                        hint="do it again once the file is written completely",
                    )
                left -= count
                yield buffer[:count]

    return pieces


def write_weights(folder: Path, file: WeightFile, on_bytes: Callable[[int], None]) -> FileRecord:
    """Write a safetensors file, and return its size and hash."""

    def content() -> Iterator[memoryview]:
        yield memoryview(file.header)
        for tensor in file.tensors:
            yield from tensor.pieces()

    record = write_durably(folder / file.name, content(), on_bytes)
    if record.size != file.nbytes:
        raise InvalidCheckpointError(
            f"{file.name} has {record.size} bytes instead of {file.nbytes}: its source was changed while it was read",
            hint="do it again once the source is written completely",
        )
    return record


def write_durably(path: Path, content: Iterable[memoryview], on_bytes: Callable[[int], None]) -> FileRecord:
    """Write a new file from pieces, and return its size and hash once it is on the disk.

    While threads write and hash a piece, and bring the file to the disk, this one makes the next piece.

    Args:
        path: The file, which must not be there.
        content: Its bytes, in pieces; each stays as it is until the next but one is asked for.
        on_bytes: Told of each piece; it may raise to stop.
    """
    digest, size, unflushed = hashlib.sha256(), 0, 0
    at_work: list[Future[None]] = []
    flushing: Future[None] | None = None
    with path.open("xb", buffering=0) as file, ThreadPoolExecutor(3, thread_name_prefix="splitlearn-write") as threads:

        def write(piece: memoryview) -> None:
            written = 0
            while written < len(piece):
                written += file.write(piece[written:])

        for piece in content:
            for future in at_work:
                future.result()
            at_work = [threads.submit(write, piece), threads.submit(digest.update, piece)]
            size, unflushed = size + len(piece), unflushed + len(piece)
            if unflushed >= _FLUSH_BYTES and (flushing is None or flushing.done()):
                if flushing is not None:
                    flushing.result()
                flushing, unflushed = threads.submit(os.fdatasync, file.fileno()), 0
            on_bytes(len(piece))
        for future in [*at_work, *([] if flushing is None else [flushing])]:
            future.result()
        os.fsync(file.fileno())
    return FileRecord(size, digest.hexdigest())


def write_text(path: Path, text: str) -> FileRecord:
    """Write a small new file durably."""
    return write_durably(path, [memoryview(text.encode())], lambda _: None)


def copy_durably(source: Path, target: Path) -> FileRecord:
    """Copy a file, and return its size and hash."""
    size = source.stat().st_size
    return write_durably(target, range_pieces(source, 0, size)(), lambda _: None)


def link_durably(source: Path, target: Path) -> None:
    """Give a file a second name, or copy it where the file system knows no links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        copy_durably(source, target)


def hash_file(path: Path, on_bytes: Callable[[int], None] = lambda _: None) -> FileRecord:
    """Hash a file in chunks."""
    digest, size = hashlib.sha256(), 0
    buffer = memoryview(bytearray(CHUNK_BYTES))
    with open_regular(path, buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            size += count
            on_bytes(count)
    return FileRecord(size, digest.hexdigest())


def check_room(folder: Path, needed: int) -> None:
    """Refuse to begin what does not fit on the disk.

    Raises:
        InsufficientDiskError: There is too little room where the folder is, or will be.
    """
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise InsufficientDiskError(
            f"{folder} needs {human_bytes(needed)}, and {human_bytes(free)} are free",
            hint="save fewer parts, or choose another disk",
        )
