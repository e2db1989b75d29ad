"""Replace a directory atomically: after a crash it is either the old one or the new one."""

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

from splitlearn_core.errors import ConfigurationError

log = logging.getLogger(__name__)

_NOREPLACE, _EXCHANGE, _AT_FDCWD = 1, 2, -100
_MARK = ".splitlearn-"
_OLD = "old-"

#: What a directory holds: relative path -> inode, size and time of change. None where nothing is there.
Snapshot = dict[str, tuple[int, int, int]] | None


def snapshot(target: Path) -> Snapshot:
    """Note what is at a place, so that it can be told from whatever comes there later."""
    if not os.path.lexists(target):
        return None
    found = {}
    for path in (target, *(target.rglob("*") if target.is_dir() and not target.is_symlink() else ())):
        with suppress(FileNotFoundError):
            about = path.lstat()
            plain = not path.is_dir() or path.is_symlink()
            found[str(path.relative_to(target))] = (
                about.st_ino, about.st_size if plain else 0, about.st_mtime_ns if plain else 0,
            )  # fmt: skip
    return found


@contextmanager
def replacing(target: Path, earlier: Snapshot) -> Iterator[Path]:
    """Yield an empty directory that takes the place of ``target`` when the block ends well.

    What killed runs left beside it is removed.

    Args:
        target: The place.
        earlier: What was there when the caller decided that it may be replaced; nothing else ever is.

    Raises:
        ConfigurationError: Somebody else is writing to the same place, or something else came there.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.parent / f".{target.name}{_MARK}{secrets.token_hex(8)}"
    # Whoever comes second finds the first; nobody is between looking and locking.
    with _alone(target.parent):
        if recover(target):
            raise ConfigurationError(
                f"somebody else is writing to {target} just now",
                hint="wait until it is done, or choose another directory",
            )
        fresh.mkdir()
        # Held while we live: who finds the directory unlocked knows that its writer is gone.
        lock = _locked(fresh)
    try:
        yield fresh
        _sync_tree(fresh)
        _put(fresh, target, earlier)
        _sync(target.parent)
    finally:
        if lock is not None:
            os.close(lock)
        _remove(fresh)


def recover(target: Path) -> bool:
    """Put an old directory back that a killed run had moved away, and remove what others left.

    Returns:
        Whether somebody is writing there.
    """
    target = target.absolute()
    if not target.parent.is_dir():
        return False
    busy = False
    for entry in sorted(target.parent.glob(f".{_literal(target.name)}{_MARK}*")):
        if not entry.is_dir() or entry.is_symlink():
            continue
        lock = _locked(entry)
        if lock is None:
            busy = busy or entry.exists()
            continue
        try:
            if entry.name.startswith(f".{target.name}{_MARK}{_OLD}") and not target.exists():
                entry.rename(target)
            else:
                log.info("Removing %s, which a run that ended early left behind", entry)
                _remove(entry)
        finally:
            os.close(lock)
    return busy


def _put(fresh: Path, target: Path, earlier: Snapshot) -> None:
    """Let a directory take its place, where nothing is but what was there at the start."""
    there = snapshot(target)
    if there is None:
        _move(fresh, target)
        return
    if there != earlier:
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
    """Rename a directory to where nothing is; raises ConfigurationError where something is."""
    try:
        if not _rename(folder, target, _NOREPLACE):
            # An ordinary rename takes the place of an empty directory, and of nothing else.
            folder.rename(target)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise _changed(target) from error
        raise


def _changed(target: Path) -> ConfigurationError:
    return ConfigurationError(
        f"{target} is not what it was when the writing began: somebody else changed it, and it is left as it is",
        hint="choose another directory, or look at what is there and do it again",
    )


def _exchange(one: Path, other: Path) -> bool:
    """Let two directories change places in one step; False where the system cannot."""
    return _rename(one, other, _EXCHANGE)


def _rename(one: Path, other: Path, flag: int) -> bool:
    """Call ``renameat2``; False where the system has none, or not with this flag."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), flag) == 0:
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


@contextmanager
def _alone(parent: Path) -> Iterator[None]:
    """Hold a directory for a moment, against others who do the same."""
    import fcntl

    descriptor = os.open(parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # Some network file systems lock no directories.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


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
