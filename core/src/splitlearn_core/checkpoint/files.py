"""The files of a checkpoint: their names, and opening them, if they are regular files, without blocking.

A name that was a file when it was checked may be a pipe, a device, a socket or a folder when it is opened. Opening
a pipe blocks until there is a writer. So a file is opened first, without blocking, and then checked by its descriptor.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import sys
from collections.abc import Mapping
from io import BufferedReader, FileIO
from pathlib import Path
from typing import BinaryIO, Literal, overload

from splitlearn_core.errors import InvalidCheckpointError

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"

#: The weights in one file, and the index of several.
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TORCH_SINGLE, TORCH_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

#: Of an adapter that PEFT saved.
ADAPTER_CONFIG, ADAPTER_WEIGHTS, ADAPTER_PICKLE = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
)

#: Each holds the vocabulary of a tokenizer: without any of them there is none.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")

#: How the names of the files of a tokenizer begin.
TOKENIZER_PREFIXES = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "spiece", "chat_template")

#: One of the files of a model, by its name: ``STEM-00001-of-00003.gguf``.
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.[^.]+)")
#: Suffixes of the files that belong to a model whose weight file is named.
_SMALL = (".json", ".txt", ".model", ".jinja")


def parts_of(name: str) -> tuple[str, ...]:
    """Return the names of all files of a model that has one of this name: of all numbered parts, or itself alone."""
    match = _PART.fullmatch(name)
    if match is None or not 1 <= int(match["number"]) <= int(match["count"]):
        return (name,)
    numbers = range(1, int(match["count"]) + 1)
    return tuple(f"{match['stem']}-{number:05}-of-{match['count']}{match['suffix']}" for number in numbers)


def of_one_model(sizes: Mapping[str, int], name: str) -> dict[str, int]:
    """Return those of the files of a folder that belong to the model in a weight file, with their sizes.

    The configuration and the tokenizer's files do; weights other than the named file do not.
    """
    parts = set(parts_of(name))
    return {
        each: size
        for each, size in sizes.items()
        if each in parts or (each.endswith(_SMALL) and not each.endswith(".index.json"))
    }


#: Errors of opening a socket, or a device without a driver.
_NOT_OPENABLE = (errno.ENXIO, errno.ENODEV, errno.EOPNOTSUPP)
_KINDS = (
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


@overload
def open_regular(path: Path) -> BufferedReader: ...


@overload
def open_regular(path: Path, *, buffering: Literal[0]) -> FileIO: ...


def open_regular(path: Path, *, buffering: Literal[-1, 0] = -1) -> BufferedReader | FileIO:
    """Open a file to read it, without blocking; with ``buffering=0`` each read is one system call.

    Raises:
        InvalidCheckpointError: It is not a regular file.
        OSError: It does not exist, or may not be read.
    """
    descriptor = _open(path)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise _irregular(path, mode)
        file = FileIO(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise
    return file if buffering == 0 else BufferedReader(file)


def refuse_irregular(path: Path) -> None:
    """Refuse what is not a regular file, before a library opens it by its path; a later replacement is not seen.

    Raises:
        InvalidCheckpointError: It is not a regular file.
        OSError: It does not exist.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise _irregular(path, mode)


def path_of(file: BinaryIO, path: Path) -> str:
    """Return a path by which a library opens the same file again, even if ``path`` was replaced meanwhile.

    On systems without such paths it is ``path`` itself, and a file that replaced it meanwhile is opened instead.
    """
    descriptor_path = f"/proc/self/fd/{file.fileno()}"
    is_usable = sys.platform == "linux" and os.path.exists(descriptor_path)  # noqa: PTH110  # not resolved
    return descriptor_path if is_usable else str(path)


def _open(path: Path) -> int:
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
    try:
        return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    except BlockingIOError:
        # A regular file that another process has a lease on, which is released for a blocking open.
        if stat.S_ISREG(path.stat().st_mode):
            return os.open(path, flags)
        raise
    except OSError as error:
        if error.errno in _NOT_OPENABLE:
            raise _irregular(path, path.stat().st_mode) from error
        raise


def _irregular(path: Path, mode: int) -> InvalidCheckpointError:
    kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "something else")
    return InvalidCheckpointError(
        f"{path} is {kind}, where a regular file is needed", hint="put the file there, or a link to it"
    )
