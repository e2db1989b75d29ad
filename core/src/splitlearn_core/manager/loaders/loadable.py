"""The plan and the result of a load, the check for changed files, and the errors of the system."""

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


#: Called by a loader, often, in the thread in which it works. It may raise, for example
#: LoadCancelledError: the loader then frees everything and lets the error pass.
ReportProgress = ProgressCallback

#: The ledger of this machine's anonymous memory.
HOST = "host"

#: The ledger of weights that are pages of their file: they can be dropped and read again.
MAPPED = "mapped"


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """What a load will take, known before it starts."""

    #: Ledger (``host``, ``mapped``, ``cuda:0``, ...) -> bytes at the peak of loading.
    needs: Mapping[str, int]
    #: The same once it is loaded.
    keeps: Mapping[str, int]
    #: The folder or file on this machine.
    location: str
    #: torch's name of the weights' dtype; ``auto`` if it is only known after reading them.
    dtype: str
    device: str
    #: Private to the loader.
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

#: Messages of torch's allocators when memory runs out; on the CPU it is a plain RuntimeError.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "out of memory")


@contextmanager
def explaining(model: str) -> Iterator[None]:
    """Translate errors of the system and of memory while a model is read.

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
        return MissingFileError(f"{where} does not exist: {reason}", hint="check model_path, or download it again")
    if isinstance(error, PermissionError):
        user = f"the user of this process ({os.getuid()})" if sys.platform != "win32" else "the user of this process"
        return CheckpointError(f"{where} may not be read: {reason}", hint=f"make it readable for {user}")
    return CheckpointError(f"{where} cannot be read: {reason}", hint="check the file and the disk, then try again")


#: Identifies one version of a file: device, inode, size and modification time.
Version = tuple[int, int, int, int]


def versions(paths: Iterable[Path]) -> dict[Path, Version]:
    """Return the present version of each file."""
    return {path: _version(path) for path in paths}


def refuse_changes(planned: Mapping[Path, Version]) -> None:
    """Refuse files that have changed since they were planned.

    Raises:
        FileNotFoundError: A file is gone.
        InvalidCheckpointError: A file was replaced, written to or truncated.
    """
    for path, version in planned.items():
        now = _version(path)
        if now != version:
            size = f": it had {version[2]} bytes, now {now[2]}" if now[2] != version[2] else ""
            raise InvalidCheckpointError(
                f"{path} was changed while it was being loaded{size}",
                hint="load it again once it is written completely",
            )


def _version(path: Path) -> Version:
    status = path.stat()
    # A file downloaded by ranges may grow while it is loaded; the bytes that are present do not change.
    written = 0 if grows(path) else status.st_mtime_ns
    return status.st_dev, status.st_ino, status.st_size, written
