"""A directory that appears as a whole: whoever is killed leaves the old one or the new one, never half.

It is written under a hidden name beside its place, brought to the disk, and renamed. Where there is
an old one, the two change places in one step (``renameat2`` of Linux). Where the system has no such
step, the old one is moved away first: killed just then, it lies beside, and the next save puts it back.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

log = logging.getLogger(__name__)

_EXCHANGE, _AT_FDCWD = 2, -100
_MARK = ".splitlearn-"
_OLD = "old-"


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield an empty directory that takes the place of ``target`` when the block ends well.

    What killed runs left beside it is removed.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    recover(target)
    fresh = target.parent / f".{target.name}{_MARK}{secrets.token_hex(8)}"
    fresh.mkdir()
    # Held while we live: who finds the directory unlocked knows that its writer is gone.
    lock = _locked(fresh)
    try:
        yield fresh
        _sync_tree(fresh)
        _put(fresh, target)
        _sync(target.parent)
    finally:
        if lock is not None:
            os.close(lock)
        _remove(fresh)


def recover(target: Path) -> None:
    """Put an old directory back that a killed run had moved away, and remove what others left."""
    target = target.absolute()
    if not target.parent.is_dir():
        return
    for entry in sorted(target.parent.glob(f".{_literal(target.name)}{_MARK}*")):
        lock = _locked(entry) if entry.is_dir() and not entry.is_symlink() else None
        if lock is None:
            continue  # somebody is writing there
        try:
            if entry.name.startswith(f".{target.name}{_MARK}{_OLD}") and not target.exists():
                entry.rename(target)
            else:
                log.info("Removing %s, which a run that ended early left behind", entry)
                _remove(entry)
        finally:
            os.close(lock)


def _put(fresh: Path, target: Path) -> None:
    if not os.path.lexists(target):
        fresh.rename(target)
    elif not _exchange(fresh, target):
        old = target.parent / f".{target.name}{_MARK}{_OLD}{secrets.token_hex(8)}"
        target.rename(old)
        fresh.rename(target)
        _remove(old)


def _exchange(one: Path, other: Path) -> bool:
    """Let two directories change places in one step; False where the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir():
            _sync(path)
    _sync(folder)


def _sync(folder: Path) -> None:
    """Bring the names in a directory to the disk; the files themselves are there already."""
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
        log.warning("%s cannot be removed, and may be: %s", folder, error)


def _locked(folder: Path) -> int | None:
    """Lock a directory for this process and return the descriptor; None where somebody else has it."""
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


def _literal(name: str) -> str:
    """Take the meaning out of the signs that a search by pattern knows."""
    return "".join(f"[{sign}]" if sign in "*?[" else sign for sign in name)
