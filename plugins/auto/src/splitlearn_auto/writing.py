"""A new folder that is there as a whole, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from splitlearn_core import ConfigurationError
from splitlearn_core.extension import reason


def check_free(folder: Path) -> None:
    """Refuse a place that is taken; an empty folder is free.

    Raises:
        ConfigurationError: Something is there, or the way there is no folder.
    """
    try:
        taken = folder.exists() or folder.is_symlink()
        if taken and not (folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())):
            raise ConfigurationError(
                f"{folder} is there already, and nothing is overwritten", hint="name a folder that is new or empty"
            )
        ancestor = next((parent for parent in folder.absolute().parents if parent.exists()), None)
        if ancestor is not None and not ancestor.is_dir():
            raise ConfigurationError(f"{ancestor} is no folder", hint="name another place with --out")
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(
            f"{str(folder)!r} is no place for a folder: {reason(error)}", hint="check --out"
        ) from error


def write_folder(folder: Path, files: Mapping[str, str]) -> None:
    """Write files into a new folder: beside it first, and under its name when all are there.

    Raises:
        ConfigurationError: The folder was made by somebody else meanwhile.
    """
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.absolute().parent))
    try:
        for name, text in files.items():
            path = unfinished / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
        # Temporary folders are for their owner alone; this one is to be as any other.
        unfinished.chmod(0o777 & ~_umask())
        # Takes the place of an empty folder, and of nothing else.
        unfinished.replace(folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            check_free(folder)
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
