"""A checkpoint in a repository on the Hub."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from splitlearn_core.checkpoint.files import CONFIG, of_one_model, open_regular, parts_of
from splitlearn_core.checkpoint.hub.fetch_plan import (
    FileFetch,
    Span,
    Wanted,
    count,
    here,
    merged,
    pays,
    to_request,
    without,
)
from splitlearn_core.checkpoint.hub.hub_errors import HubRequest, guarded, unreachable
from splitlearn_core.checkpoint.hub.partial_file import PartialFile, partial_files
from splitlearn_core.checkpoint.hub.transfer import (
    RangesNotServedError,
    RemoteFile,
    connection_failure,
    fetch_ranges,
    opened,
)
from splitlearn_core.checkpoint.safetensors_header import LENGTH_BYTES, header_length, parse_header, read_header
from splitlearn_core.errors import (
    CheckpointError,
    InsufficientDiskError,
    InternalError,
    InvalidCheckpointError,
    MissingFileError,
)
from splitlearn_core.loading_strategy import HeaderLength
from splitlearn_core.progress import passing_through
from splitlearn_core.quoting import listed, reason
from splitlearn_core.types import Progress, ProgressCallback, TensorInfo

log = logging.getLogger(__name__)
_T = TypeVar("_T")

#: Most headers are shorter, so that one request is enough.
_HEADER_GUESS = 100_000
#: Of other formats, whose headers have the vocabulary in them.
_LARGE_HEADER = 2**20
#: Longer than any header: a file may say that its own is as long as the file.
_MAX_HEADER = 2**28


class _Head(NamedTuple):
    """The first bytes of a file on the Hub, and the version that they belong to."""

    content: bytes
    #: Empty if the server states none, or serves no ranges: then the file is fetched whole.
    etag: str
    size: int


@dataclass(slots=True)
class _Tally:
    """Bytes received, and the total, over all files of a fetch."""

    total: int
    done: int = 0


class HubSource:
    """A checkpoint in a repository on the Hub, through ``huggingface_hub`` and its cache.

    Whole files are stored in that cache; files of which only ranges are needed are stored next to it, see
    :mod:`splitlearn_core.checkpoint.hub.partial_file`.

    Args:
        repo_id: The repository.
        entrance: The small file that every such repository has; it is fetched first.
        only: A weight file, if that alone is the model: the repository may have no ``config.json``.
        cache_dir, revision, token, local_files_only: As in ``huggingface_hub``.

    Raises:
        MissingFileError: No such repository or revision, or no access, or nothing cached offline.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        entrance: str = CONFIG,
        only: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> None:
        self.model = repo_id
        self._only = only
        self._options: dict[str, Any] = {"cache_dir": cache_dir, "token": token, "local_files_only": local_files_only}
        self._revision = revision
        self._files: dict[str, int] | None = None
        self._heads: dict[str, _Head] = {}
        # Everything after the first file is requested by commit: a push in between changes nothing.
        if only is None:
            self._snapshot = self._guarded(lambda: self._first(entrance), entrance).parent
        else:
            self._snapshot = self._guarded(self._resolve, only)
        self._repo_folder = self._snapshot.parent.parent
        self._commit = self._snapshot.name
        self.commit: str | None = self._commit
        self.has_config = entrance == CONFIG and (only is None or CONFIG in self.files())
        if only is not None and only not in self.files():
            raise MissingFileError(
                f"{self._request(only).where} has no {only}", hint="check the spelling; the name has its folder in it"
            )

    def files(self) -> dict[str, int]:
        if self._files is None:
            listed = self._guarded(self._list_files)
            self._files = listed if self._only is None else of_one_model(listed, self._only)
        return self._files

    def path(self, name: str) -> Path:
        return self._guarded(lambda: self._download(name, self._commit), name)

    @property
    def hint_for_missing(self) -> str:
        if self._offline():
            return "drop local_files_only or unset HF_HUB_OFFLINE to download it"
        return "the repository is incomplete: try another revision"

    def require(self, names: Iterable[str]) -> None:
        missing = [name for name in names if name not in self.files()]
        if missing:
            where = "the cache of " if self._offline() else ""
            raise MissingFileError(
                f"{where}{self.model}@{self.commit} lacks {listed(missing)}, which the requested parts need",
                hint=self.hint_for_missing,
            )

    def is_here(self, name: str) -> bool:
        return (self._snapshot / name).exists()

    def plan_fetch(self, wanted: Wanted) -> tuple[FileFetch, ...]:
        self.require(wanted)
        return tuple(self._plan_file(name, spans) for name, spans in wanted.items())

    def fetch(self, wanted: Wanted, progress: ProgressCallback) -> dict[str, Path]:
        missing = [plan for plan in self.plan_fetch(wanted) if not plan.is_here]
        if missing and self._offline():
            lacking = ", ".join(
                f"{plan.needed - plan.cached} of the {plan.needed} bytes of {plan.name}" for plan in missing
            )
            raise MissingFileError(
                f"the cache of {self.model}@{self.commit} lacks {lacking} that the requested parts need",
                hint=self.hint_for_missing,
            )
        if missing:
            tally = _Tally(sum(plan.fetched for plan in missing))
            self._check_disk(tally.total)
            with passing_through(progress) as report:
                for plan in missing:
                    report(Progress("downloading", None, tally.done, tally.total, plan.name))
                    self._fetch_file(plan, wanted[plan.name] or (), tally, report)
                report(Progress("downloading", None, tally.total, tally.total))
        return {name: self._place(name) for name in wanted}

    def header(self, name: str) -> dict[str, TensorInfo]:
        if self.is_here(name):
            return read_header(self._snapshot / name)
        partial_file = self._partial_file(name)
        if partial_file is not None and _holds_header(partial_file):
            return read_header(partial_file.path)
        if self._offline():
            return read_header(self.path(name))
        return self._guarded(lambda: self._remote_header(name), name)

    def path_with_header(self, name: str, header_length: HeaderLength) -> Path:
        self.require([name])
        if self.is_here(name):
            return self._snapshot / name
        size = self.files()[name]
        if not size:
            # Not listed: the ranges of a file of unknown size cannot be planned.
            return self.fetch({name: None}, lambda _: None)[name]
        if self._partial_file(name) is None and not self._offline():
            # For the version: what follows goes straight into the partial file.
            self._heads[name] = self._guarded(lambda: self._first_bytes(name, LENGTH_BYTES), name)
        partial_file = self._partial_file(name)
        spans = partial_file.coverage().spans if partial_file is not None else ()
        present = next((end for begin, end in spans if begin == 0), 0)
        path = partial_file.path if partial_file is not None else self._snapshot / name
        while not present or (present < size and header_length(path, present) is None):
            if present >= _MAX_HEADER:
                raise InvalidCheckpointError(
                    f"the header of {self.model}/{name} is longer than {_MAX_HEADER} bytes",
                    hint="no model has such a header: use another file; one that is on this machine has no such limit",
                )
            present = min(max(4 * present, _LARGE_HEADER), _MAX_HEADER, size)
            path = self.fetch({name: [(0, present)]}, lambda _: None)[name]
        return path

    def _plan_file(self, name: str, spans: Iterable[Span] | None) -> FileFetch:
        size = self.files()[name]
        wanted = None if spans is None else merged(spans)
        if self.is_here(name):
            return here(name, size, wanted)
        if wanted is None:
            return FileFetch(name, size, size, 0, size, is_here=False)
        partial_file, head = self._partial_file(name), self._heads.get(name)
        coverage = partial_file.coverage().spans if partial_file is not None else ()
        needed, missing = count(wanted), without(wanted, coverage)
        if partial_file is not None and not missing:
            return here(name, size, wanted)
        known = coverage if head is None else (*coverage, (0, len(head.content)))
        requested = missing if self._offline() else to_request(wanted, known)
        whole = partial_file is None or not (self._offline() or pays(requested, size))
        fetched = size if whole else count(requested)
        return FileFetch(
            name, size, needed, needed - count(missing), fetched, () if whole else requested, is_here=False
        )

    def _fetch_file(self, plan: FileFetch, wanted: Sequence[Span], tally: _Tally, report: ProgressCallback) -> None:
        before = tally.done
        partial_file = self._partial_file(plan.name) if plan.is_partial else None
        if partial_file is not None:
            try:
                self._guarded(partial(self._fetch_ranges, plan, partial_file, wanted, tally, report), plan.name)
                return
            except RangesNotServedError:
                log.info("%s of %s is fetched whole: no ranges of it are served", plan.name, self.model)
                tally.total += plan.size - plan.fetched + tally.done - before
                self._check_disk(plan.size)
                before = tally.done
        bar = reporting_bar(report, plan.name, plan.size, before, tally.total)
        self._guarded(partial(self._download, plan.name, self._commit, tqdm_class=bar), plan.name)
        tally.done = before + plan.size

    def _fetch_ranges(
        self, plan: FileFetch, file: PartialFile, wanted: Sequence[Span], tally: _Tally, report: ProgressCallback
    ) -> None:
        head = self._heads.get(plan.name)
        remote = RemoteFile(self.model, plan.name, self._commit, self._options["token"])
        with closing(byte_bar(plan.name, plan.fetched)) as bar:

            def received(count: int) -> None:
                tally.done += count
                bar.update(count)
                report(Progress("downloading", None, min(tally.done, tally.total), tally.total, plan.name))

            fetch_ranges(remote, file, wanted, head.content if head is not None else b"", received)

    def _place(self, name: str) -> Path:
        """Return the path of a file whose requested bytes are all on this machine."""
        if self.is_here(name):
            return self._snapshot / name
        partial_file = self._partial_file(name)
        if partial_file is None:
            raise InternalError(f"{name} of {self.model} was fetched and is not here")
        # It may have been found by its version: recorded, it is found by the commit next time, offline too.
        with partial_file.locked(lambda: None):
            partial_file.note_commit(self._commit)
        return partial_file.path

    def _partial_file(self, name: str) -> PartialFile | None:
        """Return the partial file of this version, which may be empty yet; None if the version is unknown."""
        head = self._heads.get(name)
        if head is not None and head.etag:
            return PartialFile(self._repo_folder, _flat(name), head.etag, head.size)
        return partial_files(self._repo_folder, self._commit).get(_flat(name))

    def _remote_header(self, name: str) -> dict[str, TensorInfo]:
        where = f"{self.model}/{name}"
        head = self._first_bytes(name, _HEADER_GUESS)
        needed = LENGTH_BYTES + header_length(where, head.content, head.size or None)
        if needed > len(head.content):
            longer = self._first_bytes(name, needed)
            if longer[1:] != head[1:]:
                raise InvalidCheckpointError(
                    f"{where} changed on the Hub while its header was read", hint="run it again to read it as it is now"
                )
            head = longer
        self._heads[name] = head
        return parse_header(where, head.content, head.size or None)

    def _first_bytes(self, name: str, count: int) -> _Head:
        """Fetch the first bytes of a file, and no more even if the server ignores ranges."""
        content = bytearray()
        listed = self.files().get(name) or 0
        with opened(self.model, name, self._commit, self._options["token"], (0, count)) as (served, chunks):
            if served.span is not None and served.span[0] != 0:
                raise CheckpointError(
                    f"{self.model}/{name}: the first bytes were requested, and the Hub sent others",
                    hint="try another mirror (HF_ENDPOINT)",
                )
            for chunk in chunks:
                content += chunk
                if len(content) >= count:
                    break
        if served.size is None or not served.etag:
            return _Head(bytes(content[:count]), "", listed)
        if listed and served.size != listed:
            raise InvalidCheckpointError(
                f"{self.model}/{name} has {served.size} bytes on the Hub, which lists it with {listed}",
                hint="it changed, or the upload is not complete: run it again later",
            )
        return _Head(bytes(content[: min(count, served.size)]), served.etag, served.size)

    def _first(self, name: str) -> Path:
        """Fetch the first file; fail soon if it is not cached and the Hub does not answer."""
        from huggingface_hub import try_to_load_from_cache

        if not self._offline():
            cached = try_to_load_from_cache(self.model, name, self._options["cache_dir"], self._revision)
            failure = None if isinstance(cached, str) else connection_failure()
            if failure is not None:
                raise unreachable(self._request(name), reason(failure)) from failure
        return self._download(name, self._revision)

    def _resolve(self) -> Path:
        """Return the folder of the snapshot in the cache, without a file of it."""
        from huggingface_hub import HfApi, errors
        from huggingface_hub.constants import HF_HUB_CACHE
        from huggingface_hub.file_download import repo_folder_name

        cache = Path(self._options["cache_dir"] or HF_HUB_CACHE).expanduser()
        folder = cache / str(repo_folder_name(repo_id=self.model, repo_type="model"))
        revision = self._revision or "main"
        reference = folder / "refs" / revision
        if self._offline():
            commit = reference.read_text() if reference.is_file() else revision
            if not (folder / "snapshots" / commit).is_dir():
                raise errors.LocalEntryNotFoundError(f"{self.model} is not in the cache")
            return folder / "snapshots" / commit
        failure = connection_failure()
        if failure is not None:
            raise unreachable(self._request(""), reason(failure)) from failure
        commit = str(HfApi().model_info(self.model, revision=self._revision, token=self._options["token"]).sha)
        (folder / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
        if commit != revision:
            # As the client does, so that it is found offline.
            reference.parent.mkdir(parents=True, exist_ok=True)
            reference.write_text(commit)
        return folder / "snapshots" / commit

    def _download(self, name: str, revision: str | None, **options: Any) -> Path:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(self.model, name, revision=revision, **self._options, **options))

    def _list_files(self) -> dict[str, int]:
        if self._offline():
            partials = partial_files(self._repo_folder, self._commit)
            cached = {entry.name: entry.stat().st_size for entry in self._snapshot.iterdir() if entry.is_file()}
            named = () if self._only is None else parts_of(self._only)
            inside = {name: (self._snapshot / name).stat().st_size for name in named if self.is_here(name)}
            return {**{_with_folders(name): file.size for name, file in partials.items()}, **cached, **inside}
        from huggingface_hub import HfApi

        info = HfApi().model_info(self.model, revision=self._commit, files_metadata=True, token=self._options["token"])
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
        return guarded(action, self._request(name))

    def _request(self, name: str) -> HubRequest:
        return HubRequest(
            self.model,
            self._revision,
            name,
            self._offline(),
            self.hint_for_missing,
            self._options["cache_dir"],
        )


def _flat(name: str) -> str:
    """Return the name of a file without folders: those of partial files are not in folders of their own."""
    return name.replace("%", "%25").replace("/", "%2F")


def _with_folders(flat: str) -> str:
    """Undo :func:`_flat`."""
    return flat.replace("%2F", "/").replace("%25", "%")


def _holds_header(partial_file: PartialFile) -> bool:
    """Return whether the whole header of a partial file is present."""
    spans = partial_file.coverage().spans
    if without([(0, LENGTH_BYTES)], spans):
        return False
    with open_regular(partial_file.path) as file:
        length = header_length(str(partial_file.path), file.read(LENGTH_BYTES), partial_file.size)
    return not without([(0, LENGTH_BYTES + length)], spans)


def reporting_bar(report: ProgressCallback, name: str, size: int, before: int, total: int) -> type[Any]:
    """Return a progress bar class for the Hub client that also reports the bytes of one file.

    Args:
        report: Called with the progress; if it raises, the client stops, and keeps what it keeps of any
            interrupted download.
        name: The file.
        size: Its size.
        before: Bytes of the files before it.
        total: Bytes of all of them.
    """
    from huggingface_hub.utils import tqdm

    reported = 0

    class ReportingBar(tqdm):
        # Otherwise each class starts a monitor thread, which never ends.
        monitor_interval = 0

        def __init__(self, *args: Any, **options: Any) -> None:
            # Counted here, because a disabled bar does not count.
            self._bytes = int(options.get("initial") or 0)
            super().__init__(*args, **options)

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal reported
            drawn: bool | None = super().update(n)
            self._bytes += int(n or 0)
            # Some transfers have two bars, for received and for reconstructed bytes; and one that is
            # restarted counts down.
            if reported < min(self._bytes, size):
                reported = min(self._bytes, size)
                report(Progress("downloading", None, before + reported, total, name))
            return drawn

    return ReportingBar


def byte_bar(name: str, total: int) -> Any:
    """Return a progress bar of the Hub client for our own transfer; shown only where the client would show one."""
    from huggingface_hub.utils import tqdm

    class ByteBar(tqdm):
        monitor_interval = 0

    # disable=None: shown only on a terminal.
    return ByteBar(total=total, desc=name, unit="B", unit_scale=True, name="huggingface_hub.http_get", disable=None)
