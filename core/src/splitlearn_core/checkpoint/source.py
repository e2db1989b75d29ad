"""Where the files of a checkpoint come from: a directory, or a repository on the Hub."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from splitlearn_core.checkpoint.header import LENGTH_BYTES, header_length, parse_header, read_header
from splitlearn_core.errors import (
    CheckpointError,
    ConfigurationError,
    InsufficientDiskError,
    MissingFileError,
    SplitLearnError,
)
from splitlearn_core.progress import passing_through
from splitlearn_core.types import Progress, ProgressCallback, TensorInfo

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CONFIG = "config.json"

_T = TypeVar("_T")

#: Most headers are shorter, so that one request is enough.
_HEADER_GUESS = 100_000
#: Seconds that the Hub may stay silent.
_TIMEOUT = 20.0


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

    def fetch(self, names: Iterable[str], progress: ProgressCallback) -> None:
        """Make sure that large files are there, fetching what is not."""

    def header(self, name: str) -> dict[str, TensorInfo]:
        """Read the header of a safetensors file without fetching its data."""


class DirectorySource:
    """A checkpoint in a local directory.

    Args:
        directory: The directory.
        only: The one weight file of it that counts; None for all that is there.
    """

    commit: str | None = None
    hint_for_missing = "copy or download the missing files into the folder"

    def __init__(self, directory: Path, only: str | None = None) -> None:
        self.model = str(directory / only) if only else str(directory)
        self._directory = directory
        self._only = only
        self.has_config = (directory / CONFIG).is_file()

    def files(self) -> dict[str, int]:
        found = {entry.name: entry.stat().st_size for entry in self._directory.iterdir() if entry.is_file()}
        if self._only is None:
            return found
        return {name: size for name, size in found.items() if name == self._only or _is_setting(name)}

    def path(self, name: str) -> Path:
        if name == CONFIG and not self.has_config:
            beside = ", ".join(sorted(entry.name for entry in self._directory.iterdir())[:8]) or "nothing"
            raise MissingFileError(
                f"{self._directory} has no {CONFIG} (it holds: {beside})",
                hint="give the folder that save_pretrained wrote or that the Hub repository was cloned into",
            )
        return self._directory / name

    def is_here(self, name: str) -> bool:
        return (self._directory / name).is_file()

    def require(self, names: Iterable[str]) -> None:
        missing = [name for name in names if not (self._directory / name).is_file()]
        if missing:
            raise MissingFileError(
                f"{self._directory} lacks {', '.join(missing)}, which its index names and the asked parts need",
                hint=self.hint_for_missing,
            )

    def fetch(self, names: Iterable[str], progress: ProgressCallback) -> None:
        self.require(names)

    def header(self, name: str) -> dict[str, TensorInfo]:
        return read_header(self._directory / name)


def _is_setting(name: str) -> bool:
    return name.endswith(".json") and not name.endswith(".index.json")


class HubSource:
    """A checkpoint in a repository on the Hub, through ``huggingface_hub`` and its cache.

    Raises:
        MissingFileError: No such repository or revision, or no access, or nothing cached offline.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        cache_dir: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> None:
        self.model = repo_id
        self.has_config = True
        self._options: dict[str, Any] = {"cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        self._revision = revision
        # Everything after the first file is asked for by commit: a push in between changes nothing.
        config = self._guarded(lambda: self._download(CONFIG, revision), CONFIG)
        self._snapshot = config.parent
        self.commit: str | None = self._snapshot.name
        self._files: dict[str, int] | None = None

    def files(self) -> dict[str, int]:
        if self._files is None:
            self._files = self._guarded(self._list_files)
        return self._files

    def path(self, name: str) -> Path:
        return self._guarded(lambda: self._download(name, self.commit), name)

    @property
    def hint_for_missing(self) -> str:
        if self._offline():
            return "drop local_files_only or unset HF_HUB_OFFLINE to download it"
        return "the repository is incomplete: try another revision"

    def require(self, names: Iterable[str]) -> None:
        absent = [name for name in names if name not in self.files()]
        if absent:
            where = "the cache of " if self._offline() else ""
            raise MissingFileError(
                f"{where}{self.model}@{self.commit} lacks {', '.join(absent)}, which the asked parts need",
                hint=self.hint_for_missing,
            )

    def is_here(self, name: str) -> bool:
        return (self._snapshot / name).exists()

    def fetch(self, names: Iterable[str], progress: ProgressCallback) -> None:
        wanted = list(names)
        self.require(wanted)
        missing = {name: self.files()[name] for name in wanted if not (self._snapshot / name).exists()}
        if not missing:
            return
        self._check_disk(sum(missing.values()))
        done, total = 0, sum(missing.values())
        with passing_through(progress) as tell:
            for name, size in missing.items():
                tell(Progress("downloading", None, done, total, name))
                bar = _telling_bar(tell, name, size, done, total)
                self._guarded(partial(self._download, name, self.commit, tqdm_class=bar), name)
                done += size
            tell(Progress("downloading", None, done, total))

    def header(self, name: str) -> dict[str, TensorInfo]:
        if (self._snapshot / name).exists():
            return read_header(self._snapshot / name)
        if self._offline():
            return read_header(self.path(name))
        return self._guarded(lambda: self._remote_header(name), name)

    def _remote_header(self, name: str) -> dict[str, TensorInfo]:
        size = self.files().get(name) or None
        where = f"{self.model}/{name}"
        content = self._first_bytes(name, _HEADER_GUESS)
        needed = LENGTH_BYTES + header_length(where, content, size)
        if needed > len(content):
            content = self._first_bytes(name, needed)
        return parse_header(where, content, size)

    def _first_bytes(self, name: str, count: int) -> bytes:
        """Fetch the beginning of a file, and no more even where the server ignores ranges."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(self.model, name, revision=self.commit)
        headers = {**build_hf_headers(token=self._options["token"]), "Range": f"bytes=0-{count - 1}"}
        content = bytearray()
        with get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT, follow_redirects=True) as response:
            if response.is_error:
                response.read()
            hf_raise_for_status(response)
            for chunk in response.iter_raw():
                content += chunk
                if len(content) >= count:
                    break
        return bytes(content[:count])

    def _download(self, name: str, revision: str | None, **options: Any) -> Path:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(self.model, name, revision=revision, **self._options, **options))

    def _list_files(self) -> dict[str, int]:
        if self._offline():
            return {entry.name: entry.stat().st_size for entry in self._snapshot.iterdir() if entry.is_file()}
        info = _api().model_info(self.model, revision=self.commit, files_metadata=True, token=self._options["token"])
        return {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}

    def _offline(self) -> bool:
        from huggingface_hub.constants import is_offline_mode

        return bool(self._options["local_files_only"]) or is_offline_mode()

    def _check_disk(self, needed: int) -> None:
        free = shutil.disk_usage(self._snapshot).free
        if needed > free:
            raise InsufficientDiskError(
                f"{needed / 2**30:.2f} GiB of {self.model} are to be downloaded; "
                f"{free / 2**30:.2f} GiB are free in {self._snapshot}",
                hint="free some space (hf cache rm), or choose another disk with cache_dir= or HF_HOME",
            )

    def _guarded(self, action: Callable[[], _T], name: str = "") -> _T:
        """Turn the Hub client's errors into ours, each with its way out."""
        from huggingface_hub import errors
        from huggingface_hub.utils import get_session

        where = f"{self.model!r}" + (f" at revision {self._revision!r}" if self._revision else "")
        what = f"{name} of {where}" if name else where
        # The client's HTTP library differs between its versions; its session knows which one it is.
        transport = sys.modules[type(get_session()).__module__.partition(".")[0]]
        try:
            return action()
        except SplitLearnError:
            raise
        except errors.GatedRepoError as error:
            raise MissingFileError(
                f"{where} on the Hub is gated and this token may not read it",
                hint="accept its terms on its page, then log in (hf auth login) or pass token=",
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise MissingFileError(
                f"{where} is neither a directory here nor a repository on the Hub that this token can see",
                hint="check the spelling; a private repository needs hf auth login or token=",
            ) from error
        except errors.RevisionNotFoundError as error:
            raise MissingFileError(
                f"{self.model!r} has no revision {self._revision!r}", hint="name a branch, a tag or a full commit hash"
            ) from error
        except errors.LocalEntryNotFoundError as error:
            if self._offline():
                raise MissingFileError(
                    f"{what} is not in the cache, and looking on the Hub is off", hint=self.hint_for_missing
                ) from error
            raise _unreachable(what) from error
        except errors.EntryNotFoundError as error:
            raise MissingFileError(f"{where} has no {name}", hint="is it a transformers checkpoint?") from error
        except errors.HFValidationError as error:
            raise MissingFileError(
                f"{where} is neither a directory here nor a name that a repository can have",
                hint="check the path, or give owner/name",
            ) from error
        except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled) as error:
            raise CheckpointError(f"{what}: the Hub answered with an error: {error}", hint="try again later") from error
        except RuntimeError as error:
            # huggingface_hub 1.x, when nothing answers, retries on a session that it has closed.
            raise _unreachable(what) from error
        except (transport.HTTPError, OSError) as error:
            raise self._broken_transfer(what, error) from error

    def _broken_transfer(self, what: str, error: Exception) -> SplitLearnError:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return InsufficientDiskError(
                f"{what}: the disk is full: {error}", hint="free some space, or choose another disk with cache_dir="
            )
        if isinstance(error, PermissionError):
            return CheckpointError(
                f"{what}: the cache cannot be written: {error}", hint="choose another folder with cache_dir= or HF_HOME"
            )
        return CheckpointError(
            f"{what}: the connection to the Hub was lost: {error}",
            hint="run it again: what was downloaded is kept; what is cached loads with local_files_only=True",
        )


def _telling_bar(tell: ProgressCallback, name: str, size: int, before: int, total: int) -> type[Any]:
    """Return a class of the Hub client's bars that also tells of the bytes of one file.

    Args:
        tell: Where to tell; if it raises, the client stops, and keeps what it would keep of any
            download that was cut off.
        name: The file.
        size: Its size.
        before: Bytes of the files before it.
        total: Bytes of all of them.
    """
    from huggingface_hub.utils import tqdm

    told = 0

    class TellingBar(tqdm):
        # The thread that redraws bars would be one for each class, and stay.
        monitor_interval = 0

        def __init__(self, *args: Any, **options: Any) -> None:
            # Counted here, because a bar that is not shown does not count.
            self._bytes = int(options.get("initial") or 0)
            super().__init__(*args, **options)

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal told
            drawn: bool | None = super().update(n)
            self._bytes += int(n or 0)
            # Some transfers have two bars, what was received and what was put together from it; and
            # one that begins anew counts back.
            if told < min(self._bytes, size):
                told = min(self._bytes, size)
                tell(Progress("downloading", None, before + told, total, name))
            return drawn

    return TellingBar


def _unreachable(what: str) -> MissingFileError:
    return MissingFileError(
        f"{what}: there is no such directory, the Hub cannot be reached, and the cache has no copy",
        hint="check the spelling, the network and HF_ENDPOINT",
    )


def open_source(
    model_name_or_path: str | os.PathLike[str],
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    readable_suffixes: Callable[[], tuple[str, ...]] = tuple,
) -> Source:
    """Find a checkpoint: a directory wins over a repository of the same name.

    Args:
        model_name_or_path: A directory, a repository, or a weight file that an added reader knows.
        cache_dir: As in Hugging Face's own functions, and so the next three.
        revision: See there.
        token: See there.
        local_files_only: See there.
        readable_suffixes: Asked, where a file is named, how the names end of those that can be read.

    Raises:
        MissingFileError: Neither is there, or it has no ``config.json``.
    """
    if not isinstance(model_name_or_path, str | os.PathLike) or not os.fspath(model_name_or_path):
        raise ConfigurationError(
            f"model_name_or_path is {model_name_or_path!r}", hint="give a directory or a Hub repository"
        )
    name = os.fspath(model_name_or_path)
    try:
        path = Path(model_name_or_path).expanduser()
        is_directory, is_there = path.is_dir(), path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        # Too long for a path, a home of nobody, or a NUL byte: no directory, and no repository either.
        raise MissingFileError(f"{name!r} names no directory: {error}", hint="check the path") from error
    if is_directory:
        return DirectorySource(path)
    if is_there:
        if path.name.endswith(readable_suffixes()):
            return DirectorySource(path.parent, path.name)
        raise MissingFileError(f"{name} is a file", hint=f"give its folder: {path.parent}")
    if isinstance(model_name_or_path, os.PathLike) or path.is_absolute() or name.startswith((".", "~")):
        raise MissingFileError(f"there is no directory {name}", hint="check the path")
    return HubSource(name, cache_dir=cache_dir, revision=revision, token=token, local_files_only=local_files_only)


def _api() -> HfApi:
    from huggingface_hub import HfApi

    return HfApi()
