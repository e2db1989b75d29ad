"""A partially downloaded file: sparse, full length, with a sidecar of the byte ranges present."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from splitlearn_core.checkpoint.hub.fetch_plan import Coverage, Span, parse_coverage

FOLDER = "splitlearn-ranges"
_RECORD_SUFFIX = ".ranges.json"
_SAFE_VERSION = re.compile(r"[0-9a-f]{32,128}")
#: Seconds between two attempts to take a lock that another process holds.
_LOCK_RETRY_S = 0.2


def grows(path: Path) -> bool:
    """Return whether more ranges may be written to a file while it is in use."""
    return FOLDER in path.parts


class PartialFile:
    """One version of one file, of which byte ranges are present.

    Args:
        folder: The repository's folder in the Hub's cache.
        name: The file's name, without folders.
        etag: The server's identifier of this version.
        size: Bytes of the whole file.
    """

    def __init__(self, folder: Path, name: str, etag: str, size: int) -> None:
        version = etag if _SAFE_VERSION.fullmatch(etag) else hashlib.sha256(etag.encode()).hexdigest()
        self.path = folder / FOLDER / version / name
        self.etag = etag
        self.size = size
        self._record = self.path.with_name(name + _RECORD_SUFFIX)
        self._writing = threading.Lock()

    def coverage(self) -> Coverage:
        """Return the ranges present; none if there is no file, or its record does not match it."""
        coverage = _read_record(self._record)
        if coverage is None or (coverage.etag, coverage.size) != (self.etag, self.size):
            return Coverage(self.etag, self.size)
        return coverage if _size_of(self.path) == self.size else Coverage(self.etag, self.size)

    @contextmanager
    def locked(self, waiting: Callable[[], None]) -> Iterator[None]:
        """Lock this file against other processes and threads; ``waiting`` is called while one of them holds it."""
        from huggingface_hub.utils import WeakFileLock

        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = self.path.with_name(self.path.name + ".lock")
        with ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(WeakFileLock(lock, timeout=_LOCK_RETRY_S))
                    break
                except TimeoutError:
                    waiting()
            yield

    def prepare(self, commit: str) -> None:
        """Create the file if it is missing, and record that it belongs to a commit. Needs the lock."""
        coverage = self.coverage()
        if _size_of(self.path) != self.size:
            # A stale record must not describe the new file, should the process end in between.
            self._record.unlink(missing_ok=True)
            self.path.unlink(missing_ok=True)
            with self.path.open("wb") as file:
                file.truncate(self.size)
        self._write(coverage.seen_at(commit))

    def record(self, span: Span) -> None:
        """Record that a range is present. Its bytes must be on the disk by now. Needs the lock."""
        if span[0] < span[1]:
            with self._writing:
                self._write(self.coverage().holding(span))

    def note_commit(self, commit: str) -> None:
        """Record that the file belongs to a commit, if any of its ranges is present. Needs the lock."""
        coverage = self.coverage()
        if coverage.spans and commit not in coverage.commits:
            self._write(coverage.seen_at(commit))

    def discard(self) -> None:
        """Remove the file and its record. Needs the lock."""
        self._record.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def _write(self, coverage: Coverage) -> None:
        new = self._record.with_name(self._record.name + ".new")
        with new.open("w", encoding="utf-8") as file:
            file.write(coverage.to_json())
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._record)


def partial_files(folder: Path, commit: str) -> dict[str, PartialFile]:
    """Return the files of a commit of which ranges are present, by name."""
    files = {}
    for record in sorted((folder / FOLDER).glob(f"*/*{_RECORD_SUFFIX}")):
        coverage = _read_record(record)
        if coverage is None or commit not in coverage.commits:
            continue
        name = record.name.removesuffix(_RECORD_SUFFIX)
        partial = PartialFile(folder, name, coverage.etag, coverage.size)
        if partial.coverage().spans:
            files[name] = partial
    return files


def _read_record(path: Path) -> Coverage | None:
    try:
        return parse_coverage(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError):
        return None


def _size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
