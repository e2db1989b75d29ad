"""Create a folder atomically: it is complete, or does not exist."""

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
    """Refuse a path that is in use; an empty folder is free.

    Raises:
        ConfigurationError: The path exists, or lies below something that is not a folder.
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
    """Write files into a temporary folder next to the target, and rename it once all are written.

    Raises:
        ConfigurationError: Another process has created the folder in the meantime.
    """
    folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.absolute().parent))
    try:
        for name, text in files.items():
            path = unfinished / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
        # mkdtemp creates folders for their owner only.
        umask = os.umask(0)
        os.umask(umask)
        unfinished.chmod(0o777 & ~umask)
        # Replaces at most an empty folder.
        unfinished.replace(folder)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            check_free(folder)
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
