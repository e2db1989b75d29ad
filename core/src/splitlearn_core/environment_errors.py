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

#: What core needs and imports where it needs it: module -> distribution.
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
    "yaml": "pyyaml",
}


@dataclass(frozen=True, slots=True)
class Cause:
    """What is behind an error, in our words."""

    message: str
    hint: str
    #: The module of the library that cannot be imported; empty where it is not about one.
    library: str = ""


def cause_of(error: BaseException) -> Cause | None:
    """Return what is wrong with this machine where an error says so; None for all other errors, ours among them."""
    errors = list(_chain(error))
    for one in reversed(errors):
        if (cause := _library(one)) is not None:
            return cause
    return next((refusal(one) for one in errors if isinstance(one, PermissionError) and one.filename), None)


def refusal(error: OSError) -> Cause:
    """Say which path may not be used, and how its owner lets it be."""
    path = Path(os.fsdecode(error.filename))
    # Below a folder that may not be searched, nothing can be said of what is in it.
    barred = next((one for one in reversed(path.absolute().parents) if not os.access(one, os.X_OK)), path)
    while not os.path.lexists(barred):
        barred = barred.parent  # what is not there yet is made in there
    return Cause(f"{error.strerror or error}: {path}", _chmod(barred))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what it was raised from; what it was merely raised after is another matter."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def _library(error: BaseException) -> Cause | None:
    """Return the library that cannot be imported, where that is what an error is about."""
    if isinstance(error, MemoryError):
        return None
    if isinstance(error, ModuleNotFoundError) and error.name in _LIBRARIES:
        return _missing(error.name)
    library = _importing(error.__traceback__)
    if not library:
        return None
    return Cause(
        f"{library} cannot be imported: {said(error)}", f"pip install --force-reinstall {_LIBRARIES[library]}", library
    )


def _missing(library: str) -> Cause:
    from splitlearn_core.plugins.metadata import version_of

    distribution = _LIBRARIES[library]
    if version_of(distribution) is None:
        return Cause(f"{library} is not installed", f"pip install {distribution}", library)
    hint = f"pip install --force-reinstall {distribution}"
    return Cause(f"{library} is installed, and its files are not there", hint, library)


def _importing(trace: TracebackType | None) -> str:
    """Return the library in the middle of whose import an error was raised; empty where there is none."""
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


def _chmod(path: Path) -> str:
    """Return the line that lets the owner of a path use it."""
    found = path.lstat()
    name, is_folder = shlex.quote(str(path)), stat.S_ISDIR(found.st_mode)
    if sys.platform != "win32" and os.geteuid() not in (0, found.st_uid):
        return f"have its owner do: chmod a+{'rx' if is_folder else 'r'} {name}"
    return f"chmod u+{'rwx' if is_folder else 'r'} {name}"
