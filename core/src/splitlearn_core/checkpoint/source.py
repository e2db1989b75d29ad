"""Where the files of a checkpoint come from: a directory, or a repository on the Hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from splitlearn_core.checkpoint.config_json import needed_reader
from splitlearn_core.checkpoint.hub.fetch_plan import FileFetch, Wanted
from splitlearn_core.checkpoint.hub.repository import HubSource
from splitlearn_core.checkpoint.local_directory import DirectorySource
from splitlearn_core.checkpoint.names import CONFIG
from splitlearn_core.errors import ConfigurationError, MissingFileError
from splitlearn_core.quoting import reason
from splitlearn_core.types import ProgressCallback, TensorInfo
from splitlearn_core.user_paths import user_path

#: Prefix of a name that means a repository on the Hub, whatever folders there are here.
HUB = "hub:"


class Source(Protocol):
    """The files of one checkpoint."""

    #: The directory or repository, as the caller named it.
    model: str
    #: The commit a Hub revision was resolved to; None for a directory.
    commit: str | None
    #: Whether there is a ``config.json``.
    has_config: bool

    @property
    def hint_for_missing(self) -> str:
        """What to do where files are missing."""

    def require(self, names: Iterable[str]) -> None:
        """Raise MissingFileError, naming all, where files cannot be had."""

    def files(self) -> Mapping[str, int]:
        """Return the names of the files that can be had, with their sizes in bytes (0: unknown)."""

    def path(self, name: str) -> Path:
        """Return the local path of a small file, fetching it first where necessary."""

    def is_here(self, name: str) -> bool:
        """Say whether a file is on this machine already."""

    def plan_fetch(self, wanted: Wanted) -> tuple[FileFetch, ...]:
        """Say what :meth:`fetch` would transfer; raises MissingFileError as :meth:`require`."""

    def fetch(self, wanted: Wanted, progress: ProgressCallback) -> dict[str, Path]:
        """Make sure that parts of large files, or all of them, are on this machine; return where, by name.

        A file lies at its original size, so that offsets are those of its header; of one that was
        asked for in parts only these, and what else was fetched of it, are its bytes.

        Args:
            wanted: File -> ranges of bytes, or None for all of it.
            progress: Told of the bytes that come, several times a second; it may raise to stop, and
                what came is kept.
        """

    def header(self, name: str) -> dict[str, TensorInfo]:
        """Read the header of a safetensors file without fetching its data."""


def open_source(
    model_name_or_path: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    readable_suffixes: Callable[[], tuple[str, ...]] = tuple,
    entrance: str = CONFIG,
) -> Source:
    """Find a checkpoint: a directory wins over a repository of the same name.

    Args:
        model_name_or_path: A directory, a repository, or a weight file that an added reader knows;
            ``hub:`` before a name means the repository, even where there is such a directory.
        cache_dir: As in Hugging Face's own functions, and so the next three.
        revision: See there.
        token: See there.
        local_files_only: See there.
        readable_suffixes: Asked, where a file is named, how the names end of those that can be read.
        entrance: The small file that a repository of the kind has in any case.

    Raises:
        MissingFileError: Neither is there, or it has no ``config.json``.
    """
    if not isinstance(model_name_or_path, str | os.PathLike) or not os.fspath(model_name_or_path):
        raise ConfigurationError(
            f"model_name_or_path is {model_name_or_path!r}", hint="give a directory or a Hub repository"
        )
    name = os.fspath(model_name_or_path)
    hub: dict[str, Any] = {"cache_dir": cache_dir and user_path(cache_dir), "revision": revision, "token": token}
    if name.startswith(HUB):
        return HubSource(name.removeprefix(HUB), entrance=entrance, local_files_only=local_files_only, **hub)
    try:
        path = user_path(model_name_or_path)
        is_directory, is_there = path.is_dir(), path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        # Too long for a path, a home of nobody, or a NUL byte: no directory, and no repository either.
        raise MissingFileError(f"{name!r} names no directory: {reason(error)}", hint="check the path") from error
    if is_directory:
        return DirectorySource(path)
    if is_there:
        if path.name.endswith(readable_suffixes()):
            return DirectorySource(path.parent, path.name)
        needed = needed_reader([path.name])
        if needed is not None:
            raise MissingFileError(f"{name} is a {needed[1]} file, and nothing here reads those", hint=needed[2])
        raise MissingFileError(f"{name} is a file", hint=f"give its folder: {path.parent}")
    if isinstance(model_name_or_path, os.PathLike) or path.is_absolute() or name.startswith((".", "~")):
        raise MissingFileError(f"there is no directory {name}", hint="check the path")
    return HubSource(name, entrance=entrance, local_files_only=local_files_only, **hub)
