"""Environment problems behind an exception: missing libraries, file permissions."""

from __future__ import annotations

import os
import shlex
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from splitlearn_core.quoting import said

#: Libraries that core imports lazily: module -> distribution.
_LIBRARIES = {
    "huggingface_hub": "huggingface-hub",
    "importlib_metadata": "importlib-metadata",
    "packaging": "packaging",
    "pluggy": "pluggy",
    "psutil": "psutil",
    "safetensors": "safetensors",
    "torch": "torch",
    "tqdm": "tqdm",
    "transformers": "transformers",
    "websockets": "websockets",
    "yaml": "pyyaml",
}


@dataclass(frozen=True, slots=True)
class Cause:
    """The problem behind an error, and what fixes it."""

    message: str
    hint: str
    #: The module that cannot be imported; empty if the problem is another.
    library: str = ""


def cause_of(error: BaseException) -> Cause | None:
    """Return the environment problem that caused an error; None if it has another cause."""
    errors = list(_chain(error))
    for link in reversed(errors):
        if (cause := _library(link)) is not None:
            return cause
    return next((denied_path(link) for link in errors if isinstance(link, PermissionError) and link.filename), None)


def denied_path(error: OSError) -> Cause:
    """Return which path may not be accessed, and the command that permits it."""
    path = Path(os.fsdecode(error.filename))
    # Below a folder without search permission nothing is visible.
    denied = next((folder for folder in reversed(path.absolute().parents) if not os.access(folder, os.X_OK)), path)
    while not os.path.lexists(denied):
        denied = denied.parent  # a new file is created in its parent
    status = denied.lstat()
    name, is_folder = shlex.quote(str(denied)), stat.S_ISDIR(status.st_mode)
    if sys.platform != "win32" and os.geteuid() not in (0, status.st_uid):
        command = f"ask its owner to run: chmod a+{'rx' if is_folder else 'r'} {name}"
    else:
        command = f"chmod u+{'rwx' if is_folder else 'r'} {name}"
    return Cause(f"{error.strerror or error}: {path}", command)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its explicit causes, without the errors during whose handling it was raised."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__


def _library(error: BaseException) -> Cause | None:
    """Return the library whose import failed with an error; None if no import failed."""
    if isinstance(error, MemoryError):
        return None
    if isinstance(error, ModuleNotFoundError) and error.name in _LIBRARIES:
        from splitlearn_core.plugins.metadata import version_of

        library, problem = error.name, "is installed, but its files are missing"
        if version_of(_LIBRARIES[library]) is None:
            return Cause(f"{library} is not installed", f"pip install {_LIBRARIES[library]}", library)
    else:
        library, problem = _importing(error.__traceback__), f"cannot be imported: {said(error)}"
        if not library:
            return None
    return Cause(f"{library} {problem}", f"pip install --force-reinstall {_LIBRARIES[library]}", library)


def _importing(trace: TracebackType | None) -> str:
    """Return the library whose import raised an error; empty if none did."""
    library = ""
    while trace is not None:
        frame, trace = trace.tb_frame, trace.tb_next
        if frame.f_code.co_name == "<module>":
            package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
            if package in _LIBRARIES:
                library = package
            elif package.startswith("splitlearn"):
                library = ""
    return library
