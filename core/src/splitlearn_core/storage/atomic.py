"""Replace a directory atomically: after a crash it is either the old one or the new one.

The exchange in one step (``renameat2``, Linux) is what keeps the directory complete at every moment, also for
readers that do not know this module, such as ``from_pretrained``. Elsewhere two renames and :func:`recover` do.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from splitlearn_core.errors import ConfigurationError

log = logging.getLogger(__name__)

_NOREPLACE, _EXCHANGE, _AT_FDCWD = 1, 2, -100
_MARK = ".splitlearn-"
_OLD = "old-"

#: Contents of a directory: relative path -> inode, size and modification time. None if it does not exist.
Snapshot = dict[str, tuple[int, int, int]] | None


def snapshot(target: Path) -> Snapshot:
    """Record the contents of a path, to detect later changes."""
    if not os.path.lexists(target):
        return None
    entries = {}
    for path in (target, *(target.rglob("*") if target.is_dir() and not target.is_symlink() else ())):
        with suppress(FileNotFoundError):
            status = path.lstat()
            is_file = not path.is_dir() or path.is_symlink()
            entries[str(path.relative_to(target))] = (
                status.st_ino, status.st_size if is_file else 0, status.st_mtime_ns if is_file else 0,
            )  # fmt: skip
    return entries


@contextmanager
def replacing(target: Path, earlier: Snapshot) -> Iterator[Path]:
    """Yield an empty directory that replaces ``target`` if the block succeeds.

    Leftovers of killed runs next to it are removed.

    Args:
        target: The directory to create or replace.
        earlier: Its contents when the caller decided that it may be replaced; nothing else is ever replaced.

    Raises:
        ConfigurationError: Another process is writing to ``target``, or changed it.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.parent / f".{target.name}{_MARK}{secrets.token_hex(8)}"
    # Under the lock of the parent: no second writer gets between the check and our own lock.
    with _locked_parent(target.parent):
        if recover(target):
            raise ConfigurationError(
                f"another process is writing to {target}",
                hint="wait until it is done, or choose another directory",
            )
        fresh.mkdir()
        # Held until the process ends: an unlocked directory is the leftover of a dead writer.
        lock = _try_lock(fresh)
    try:
        yield fresh
        for path in (*fresh.rglob("*"), fresh):
            if path.is_dir():
                _sync(path)
        _install(fresh, target, earlier)
        _sync(target.parent)
    finally:
        if lock is not None:
            os.close(lock)
        _remove(fresh)


def recover(target: Path) -> bool:
    """Restore a directory that a killed run had moved aside, and remove other leftovers.

    Returns:
        Whether another process is writing to ``target``.
    """
    target = target.absolute()
    if not target.parent.is_dir():
        return False
    busy = False
    for entry in sorted(target.parent.glob(f".{glob.escape(target.name)}{_MARK}*")):
        if not entry.is_dir() or entry.is_symlink():
            continue
        lock = _try_lock(entry)
        if lock is None:
            busy = busy or entry.exists()
            continue
        try:
            if entry.name.startswith(f".{target.name}{_MARK}{_OLD}") and not target.exists():
                entry.rename(target)
            else:
                log.info("Removing %s, left behind by an interrupted run", entry)
                _remove(entry)
        finally:
            os.close(lock)
    return busy


def _install(fresh: Path, target: Path, earlier: Snapshot) -> None:
    """Move a directory to its target, provided that the target has not changed."""
    current = snapshot(target)
    if current is None:
        _move(fresh, target)
        return
    if current != earlier:
        raise _changed(target)
    if _exchange(fresh, target):
        if snapshot(fresh) != earlier:
            _exchange(fresh, target)
            raise _changed(target)
        return
    old = target.parent / f".{target.name}{_MARK}{_OLD}{secrets.token_hex(8)}"
    target.rename(old)
    if snapshot(old) != earlier:
        _move(old, target)
        raise _changed(target)
    _move(fresh, target)
    _remove(old)


def _move(folder: Path, target: Path) -> None:
    """Rename a directory to an unused path; raises ConfigurationError if it is in use."""
    try:
        if not _rename(folder, target, _NOREPLACE):
            # An ordinary rename of a directory replaces at most an empty directory.
            folder.rename(target)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise _changed(target) from error
        raise


def _changed(target: Path) -> ConfigurationError:
    return ConfigurationError(
        f"{target} was changed by another process during the write; it is left as it is",
        hint="choose another directory, or check its contents and repeat the call",
    )


def _exchange(source: Path, target: Path) -> bool:
    """Exchange two directories in one step; False if the system cannot."""
    return _rename(source, target, _EXCHANGE)


def _rename(source: Path, target: Path, flag: int) -> bool:
    """Call ``renameat2``; False if the system does not have it, or not with this flag."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(code, os.strerror(code), str(target))


def _sync(folder: Path) -> None:
    """Flush the entries of a directory to the disk; its files are flushed as they are written."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        log.warning("%s could not be removed; it can be deleted by hand: %s", folder, error)


@contextmanager
def _locked_parent(parent: Path) -> Iterator[None]:
    """Hold an exclusive lock on a directory, if its file system has such locks."""
    import fcntl

    descriptor = os.open(parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # Some network file systems cannot lock directories.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _try_lock(folder: Path) -> int | None:
    """Lock a directory and return the descriptor; None if another process holds the lock."""
    import fcntl

    with suppress(FileNotFoundError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
        else:
            return descriptor
    return None
