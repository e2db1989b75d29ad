"""The source of the files of a checkpoint: a directory, or a repository on the Hub."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from splitlearn_core.arguments import user_path
from splitlearn_core.checkpoint.config_json import base_of, needed_reader
from splitlearn_core.checkpoint.files import ADAPTER_CONFIG, CONFIG, of_one_model
from splitlearn_core.checkpoint.hub.fetch_plan import FileFetch, Wanted, here
from splitlearn_core.checkpoint.hub.repository import HubSource
from splitlearn_core.checkpoint.safetensors_header import read_header
from splitlearn_core.errors import ConfigurationError, MissingFileError
from splitlearn_core.loading_strategy import HeaderLength
from splitlearn_core.quoting import listed, reason
from splitlearn_core.types import ProgressCallback, TensorInfo


class DirectorySource:
    """A checkpoint in a local directory.

    Args:
        directory: The directory.
        only: The one weight file that is used; None for all.
    """

    commit: str | None = None
    hint_for_missing = "copy or download the missing files into the folder"

    def __init__(self, directory: Path, only: str | None = None) -> None:
        self.model = str(directory / only) if only else str(directory)
        self._directory = directory
        self._only = only
        self.has_config = (directory / CONFIG).is_file()

    def files(self) -> dict[str, int]:
        sizes = {entry.name: entry.stat().st_size for entry in self._directory.iterdir() if entry.is_file()}
        return sizes if self._only is None else of_one_model(sizes, self._only)

    def path(self, name: str) -> Path:
        if name == CONFIG and not self.has_config:
            if (self._directory / ADAPTER_CONFIG).is_file():
                raise MissingFileError(
                    f"{self._directory} holds an adapter ({ADAPTER_CONFIG}) and no model ({CONFIG})",
                    hint=f"load the model that it was made for, {base_of(self._directory / ADAPTER_CONFIG)}, "
                    "and put the adapter onto its components: load_adapter(parts, DIR)",
                )
            needed = needed_reader(entry.name for entry in self._directory.iterdir() if entry.is_file())
            if needed is not None:
                raise MissingFileError(
                    f"{self._directory} has no {CONFIG}; {needed[0]} is a {needed[1]} file, which nothing reads here",
                    hint=needed[2],
                )
            present = ", ".join(sorted(entry.name for entry in self._directory.iterdir())[:8]) or "nothing"
            raise MissingFileError(
                f"{self._directory} has no {CONFIG} (it holds: {present})",
                hint="give the folder that save_pretrained wrote or that the Hub repository was cloned into",
            )
        return self._directory / name

    def is_here(self, name: str) -> bool:
        return (self._directory / name).is_file()

    def require(self, names: Iterable[str]) -> None:
        missing = [name for name in names if not (self._directory / name).is_file()]
        if missing:
            raise MissingFileError(
                f"{self._directory} lacks {listed(missing)}, which the requested parts need",
                hint=self.hint_for_missing,
            )

    def plan_fetch(self, wanted: Wanted) -> tuple[FileFetch, ...]:
        self.require(wanted)
        sizes = {name: self.path(name).stat().st_size for name in wanted}
        return tuple(here(name, sizes[name], spans) for name, spans in wanted.items())

    def fetch(self, wanted: Wanted, progress: ProgressCallback) -> dict[str, Path]:
        self.require(wanted)
        return {name: self.path(name) for name in wanted}

    def header(self, name: str) -> dict[str, TensorInfo]:
        return read_header(self._directory / name)

    def path_with_header(self, name: str, header_length: HeaderLength) -> Path:
        self.require([name])
        return self._directory / name


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
        """What to do if files are missing."""

    def require(self, names: Iterable[str]) -> None:
        """Raise MissingFileError, which names all files that are not available."""

    def files(self) -> Mapping[str, int]:
        """Return the names of the available files, with their sizes in bytes (0: unknown)."""

    def path(self, name: str) -> Path:
        """Return the local path of a small file, fetching it first if necessary."""

    def is_here(self, name: str) -> bool:
        """Return whether a file is on this machine already."""

    def plan_fetch(self, wanted: Wanted) -> tuple[FileFetch, ...]:
        """Return what :meth:`fetch` would transfer; raises MissingFileError like :meth:`require`."""

    def fetch(self, wanted: Wanted, progress: ProgressCallback) -> dict[str, Path]:
        """Fetch large files, whole or in ranges, that are not on this machine; return the paths of all by name.

        A file has its original size, so that offsets are those of its header; one that was fetched in
        ranges holds only those that were fetched so far.

        Args:
            wanted: File -> ranges of bytes, or None for all of it.
            progress: Called several times a second with the bytes received; it may raise to stop, and
                what was received is kept.
        """

    def header(self, name: str) -> dict[str, TensorInfo]:
        """Read the header of a safetensors file without fetching its data."""

    def path_with_header(self, name: str, header_length: HeaderLength) -> Path:
        """Return the path of a file of another format, of which at least the header is on this machine.

        Args:
            name: The file.
            header_length: As :meth:`RangedReader.header_length`.
        """


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
    """Open a checkpoint: a directory takes precedence over a repository of the same name.

    Args:
        model_name_or_path: A directory, a repository, or a weight file that an added reader knows;
            ``hub:`` before a name means the repository, even if there is such a directory. Of a repository,
            ``REPO:FILE`` names a weight file.
        cache_dir, revision, token, local_files_only: As in Hugging Face's own functions.
        readable_suffixes: Returns the suffixes of readable weight files; called if a file is named.
        entrance: The small file that every repository of this kind has.

    Raises:
        MissingFileError: There is neither, or it has no ``config.json``.
    """
    if not isinstance(model_name_or_path, str | os.PathLike) or not os.fspath(model_name_or_path):
        raise ConfigurationError(
            f"model_name_or_path is {model_name_or_path!r}", hint="give a directory or a Hub repository"
        )
    name = os.fspath(model_name_or_path)
    hub: dict[str, Any] = {"cache_dir": cache_dir and user_path(cache_dir), "revision": revision, "token": token}
    hub["local_files_only"] = local_files_only
    if name.startswith(HUB):
        return _on_hub(name.removeprefix(HUB), entrance, readable_suffixes, hub)
    try:
        path = user_path(model_name_or_path)
        is_directory, is_there = path.is_dir(), path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        # Too long for a path, the home of an unknown user, or a NUL byte: no directory, and no repository either.
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
    return _on_hub(name, entrance, readable_suffixes, hub)


def _on_hub(
    name: str, entrance: str, readable_suffixes: Callable[[], tuple[str, ...]], options: Mapping[str, Any]
) -> HubSource:
    """Open a repository, or a weight file of it that is named after a colon."""
    if "://" in name:
        raise MissingFileError(
            f"{name} is an address, and neither a directory nor a repository",
            hint="give owner/name, or owner/name:FILE.gguf",
        )
    repo, _, file = name.partition(":")
    if not file:
        return HubSource(name, entrance=entrance, **options)
    if not file.endswith(readable_suffixes()):
        needed = needed_reader([file])
        if needed is not None:
            raise MissingFileError(f"{file} is a {needed[1]} file, and nothing here reads those", hint=needed[2])
        raise MissingFileError(f"{file} of {repo} cannot be loaded alone", hint=f"give the repository: {repo}")
    return HubSource(repo, only=file, **options)
