"""The plan and the result of a load, the check for changed files, and errors of the system."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

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
    from concurrent.futures import Future

    import torch


#: Called by a loader, often, in the thread in which it works. It may raise, for example
#: LoadCancelledError: the loader then frees everything and lets the error pass.
ReportProgress = ProgressCallback

#: The ledger of this machine's anonymous memory.
HOST = "host"

#: The ledger of weights that are pages of their file: they can be dropped and read again.
MAPPED = "mapped"


class ModelHost(Protocol):
    """The host of one model outside this process, as its ``ComponentHost`` returns it."""

    @property
    def pid(self) -> int | None:
        """The process id, if the process is on this machine."""

    @property
    def ended(self) -> Future[Any]:
        """A future that is done once the host has ended, in whatever way; its ``cancel`` has no effect."""
        ...

    @property
    def has_sessions(self) -> bool:
        """Whether caches of it are in use here: it is then restarted when it dies."""
        ...

    def death(self) -> SplitLearnError:
        """Return the error that describes how it ended."""
        ...

    def private_memory(self) -> int:
        """Return the bytes that would be freed if it ended now."""
        ...

    def end(self) -> None:
        """End it now, and wait until it has ended; also allowed when it has already ended."""
        ...


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
    #: The host of an earlier generation that has died; its sessions continue in the loaded model.
    after: ModelHost | None = None
    #: Bytes at the peak of loading on the machine of a host that is elsewhere; ``needs`` and ``keeps`` are then empty.
    elsewhere: int = 0


@dataclass(slots=True)
class LoadedModel:
    """A model in memory."""

    module: torch.nn.Module
    location: str
    dtype: str
    device: str
    #: Where it runs; None for this process.
    host: ModelHost | None = None


_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_SMALLER = "load a smaller dtype or fewer layers, unload another model, or map the file: dtype='auto' on the CPU"

#: Messages of torch's allocators when memory runs out; on the CPU it is a plain RuntimeError.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "out of memory")


def system_error(model: str, error: BaseException) -> SplitLearnError | None:
    """Translate an error of the system, or of memory, while a model is read; None for any other error.

    Args:
        model: The file, folder or repository, as the configuration names it.
        error: The error.
    """
    text = str(error)
    number = error.errno if isinstance(error, OSError) else None
    of_torch = isinstance(error, RuntimeError) and any(words in text for words in _NO_MEMORY)
    if isinstance(error, MemoryError) or of_torch or number == errno.ENOMEM:
        reason = text.splitlines()[0][:300] if text else type(error).__name__
        return InsufficientMemoryError(f"memory ran out while {model} was loaded: {reason}", hint=_SMALLER)
    if not isinstance(error, OSError):
        return None
    where = str(error.filename) if error.filename is not None else model
    reason = error.strerror or text
    if number in _DISK_FULL:
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
