"""Write files durably: hashed while they are written, and flushed to the disk when the call returns."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from splitlearn_core.checkpoint.files import open_regular
from splitlearn_core.checkpoint.manifest import FileRecord
from splitlearn_core.errors import InsufficientDiskError, InvalidCheckpointError
from splitlearn_core.storage.contents import WeightFile
from splitlearn_core.types import CHUNK_BYTES, human_bytes

#: Bytes after which written data is flushed to the disk in the background.
_FLUSH_BYTES = 64 * 2**20


class Buffers:
    """Two alternating buffers: one is filled while the other is written and hashed.

    All reads for one writer share them: newly allocated memory costs a page fault for each page, which for
    a checkpoint of many tensors takes half as long as writing them.

    Args:
        size: Bytes of each.
    """

    def __init__(self, size: int = CHUNK_BYTES) -> None:
        self._size = size
        self._made: deque[memoryview] = deque()

    def next(self) -> memoryview:
        """Return the buffer to fill next; its previous contents may be overwritten from now on."""
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
        buffers: The buffers to read into, if several ranges are read one after another.
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
                        f"{path} was truncated while it was being read: {left} bytes before {end} are missing",
                        hint="try again once the file is written completely",
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
            hint="try again once the source is written completely",
        )
    return record


def write_durably(path: Path, content: Iterable[memoryview], on_bytes: Callable[[int], None]) -> FileRecord:
    """Write a new file from pieces, and return its size and hash once it is on the disk.

    Threads write, hash and flush a piece while the caller's thread produces the next one.

    Args:
        path: The file, which must not exist.
        content: Its bytes, in pieces; each stays valid until the next but one is requested.
        on_bytes: Called with the size of each piece; it may raise to stop.
    """
    digest, size, unflushed = hashlib.sha256(), 0, 0
    pending: list[Future[None]] = []
    flushing: Future[None] | None = None
    with path.open("xb", buffering=0) as file, ThreadPoolExecutor(3, thread_name_prefix="splitlearn-write") as threads:

        def write(piece: memoryview) -> None:
            written = 0
            while written < len(piece):
                written += file.write(piece[written:])

        for piece in content:
            for future in pending:
                future.result()
            pending = [threads.submit(write, piece), threads.submit(digest.update, piece)]
            size, unflushed = size + len(piece), unflushed + len(piece)
            if unflushed >= _FLUSH_BYTES and (flushing is None or flushing.done()):
                if flushing is not None:
                    flushing.result()
                flushing, unflushed = threads.submit(os.fdatasync, file.fileno()), 0
            on_bytes(len(piece))
        for future in [*pending, *([] if flushing is None else [flushing])]:
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
    """Create a hard link to a file, or copy it if the file system has no hard links."""
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
    """Refuse to write more than fits on the disk.

    Raises:
        InsufficientDiskError: The file system of the folder has less than ``needed`` bytes free.
    """
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise InsufficientDiskError(
            f"{folder} needs {human_bytes(needed)}, and {human_bytes(free)} are free",
            hint="save fewer parts, or choose another disk",
        )
