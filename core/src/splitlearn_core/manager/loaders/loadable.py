"""What a loader says before it loads, what it hands out afterwards, and how its errors read."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from splitlearn_core.checkpoint.hub.partial_file import grows
from splitlearn_core.errors import (
    CheckpointError,
    InsufficientDiskError,
    InsufficientMemoryError,
    InvalidCheckpointError,
    MissingFileError,
    SplitLearnError,
)
from splitlearn_core.types import ProgressCallback

if TYPE_CHECKING:
    import torch


#: Where a loader reports, often, from the thread that it works in. It may raise, LoadCancelledError
#: for one: the loader then lets go of everything and lets the error through.
ReportProgress = ProgressCallback

#: The ledger of this machine's memory that no file stands behind.
HOST = "host"

#: The ledger of weights that are pages of their file: they can be dropped and read again.
MAPPED = "mapped"


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What a load will take, known before it takes it."""

    #: Ledger (``host``, ``mapped``, ``cuda:0``, ...) -> bytes, while loading: the peak.
    needs: Mapping[str, int]
    #: The same once loaded.
    keeps: Mapping[str, int]
    #: The folder or file on this machine.
    location: str
    #: torch's name of the dtype that the weights will have; ``auto`` where only reading them tells.
    dtype: str
    device: str
    #: The loader's own; nobody else looks into it.
    details: Any = None


@dataclass(slots=True)
class LoadedModel:
    """A model in memory."""

    module: torch.nn.Module
    location: str
    dtype: str
    device: str


_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_SMALLER = "load a smaller dtype or fewer layers, unload another model, or map the file: dtype='auto' on the CPU"

#: How torch's allocators say that they have no more; on the CPU it is a plain RuntimeError.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "out of memory")


@contextmanager
def explaining(model: str) -> Iterator[None]:
    """Turn what reading a model raises into our own errors, each with its way out.

    Args:
        model: The file, folder or repository, as the configuration names it.
    """
    try:
        yield
    except SplitLearnError:
        raise
    except MemoryError as error:
        raise _no_memory(model, error) from error
    except OSError as error:
        raise _of_system(model, error) from error
    except RuntimeError as error:
        if any(words in str(error) for words in _NO_MEMORY):
            raise _no_memory(model, error) from error
        raise


def _no_memory(model: str, error: Exception) -> InsufficientMemoryError:
    reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
    return InsufficientMemoryError(f"memory ran out while {model} was loaded: {reason}", hint=_SMALLER)


def _of_system(model: str, error: OSError) -> SplitLearnError:
    where = str(error.filename) if error.filename is not None else model
    reason = error.strerror or str(error)
    if error.errno == errno.ENOMEM:
        return _no_memory(model, error)
    if error.errno in _DISK_FULL:
        return InsufficientDiskError(
            f"{where}: the disk is full: {reason}", hint="free some space, or choose another disk with cache_dir"
        )
    if isinstance(error, FileNotFoundError):
        return MissingFileError(f"{where} is not there (any more): {reason}", hint="check model_path, or fetch it anew")
    if isinstance(error, PermissionError):
        return CheckpointError(f"{where} may not be read: {reason}", hint=f"make it readable for {_user()}")
    return CheckpointError(f"{where} cannot be read: {reason}", hint="check the file and the disk, then try again")


def _user() -> str:
    return f"the user of this process ({os.getuid()})" if sys.platform != "win32" else "the user of this process"


#: What tells one version of a file from another: its place, its size, and when it was written.
Version = tuple[int, int, int, int]


def versions(paths: Iterable[Path]) -> dict[Path, Version]:
    """Remember which files these are."""
    return {path: _version(path) for path in paths}


def refuse_changes(seen: Mapping[Path, Version]) -> None:
    """Refuse files that are not those any more that were looked at before.

    Raises:
        MissingFileError: One is gone.
        InvalidCheckpointError: One was replaced, written to or cut.
    """
    for path, version in seen.items():
        now = _version(path)
        if now != version:
            size = f": it had {version[2]} bytes, now {now[2]}" if now[2] != version[2] else ""
            raise InvalidCheckpointError(
                f"{path} was changed while it was being loaded{size}",
                hint="load it again once it is written completely",
            )


def _version(path: Path) -> Version:
    found = path.stat()
    # More of a file that came in ranges may come while this load goes on; what is there stays as it is.
    written = 0 if grows(path) else found.st_mtime_ns
    return found.st_dev, found.st_ino, found.st_size, written
