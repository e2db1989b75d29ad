"""Fetch byte ranges of one file into a partial file: several at once, resumed, checked, recorded."""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, BinaryIO

from splitlearn_core.checkpoint.hub.fetch_plan import (
    REQUEST_BYTES,
    Span,
    count,
    parse_content_range,
    pieces,
    to_request,
)
from splitlearn_core.checkpoint.hub.partial_file import PartialFile
from splitlearn_core.errors import CheckpointError, InvalidCheckpointError

#: Seconds that the Hub may stay silent.
TIMEOUT = 20.0

#: Seconds between two attempts to connect.
_PAUSE = 1.0
_OK, _PARTIAL = 200, 206


@dataclass(frozen=True, slots=True)
class Served:
    """What a server says of the bytes that follow."""

    #: The bytes, and the size of the whole file; None where it sends the file from its start, whatever was asked.
    span: Span | None
    size: int | None
    #: The version of the file; empty where it does not say.
    etag: str
    #: The commit; empty where it does not say.
    commit: str


@contextmanager
def opened(
    repo: str, name: str, commit: str | None, token: Any, span: Span
) -> Iterator[tuple[Served, Iterator[bytes]]]:
    """Ask for a range of a file, and yield what comes and its chunks as they come.

    Redirects are followed, proxies and ``HF_ENDPOINT`` honoured, as by the client itself.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = hf_hub_url(repo, name, revision=commit)
    # Compressed bytes would be others than those that were asked for.
    asked = {"Range": f"bytes={span[0]}-{span[1] - 1}", "Accept-Encoding": "identity"}
    headers = {**build_hf_headers(token=token), **asked}
    with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT, follow_redirects=True) as response:
        if response.is_error:
            response.read()
        hf_raise_for_status(response)
        yield _served(response), response.iter_raw()


def _served(response: Any) -> Served:
    # The Hub answers with a redirect, which says what the file is; the store behind it knows bytes alone.
    chain = [*response.history, response]
    etag = next((e for r in chain if (e := r.headers.get("X-Linked-Etag"))), "") or next(
        (e for r in chain if (e := r.headers.get("ETag"))), ""
    )
    commit = next((c for r in chain if (c := r.headers.get("X-Repo-Commit"))), "")
    found = parse_content_range(response.headers.get("Content-Range")) if response.status_code == _PARTIAL else None
    if response.headers.get("Content-Encoding", "identity") != "identity":
        found = None
    span, size = found or (None, None)
    return Served(span, size, str(etag).removeprefix("W/").strip('"'), str(commit))


def connection_failure() -> Exception | None:
    """Ask once, and a second time a moment later, whether anything answers where the Hub should be.

    The client itself goes on trying for half a minute, which is right for a download that has begun, and a long
    time for a name that was misspelt.

    Returns:
        Why there is no connection; None where something answers, whatever it says.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    failures = transport()
    for pause in (_PAUSE, 0.0):
        try:
            get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            return None
        except (failures.ConnectError, failures.ConnectTimeout) as error:
            failure: Exception = error
            time.sleep(pause)
        except (failures.HTTPError, OSError):
            return None  # The download asks again, and says what is wrong.
    return failure


def transport() -> ModuleType:
    """Return the client's HTTP library, which differs between its versions; its session knows which one it is."""
    from huggingface_hub.utils import get_session

    return sys.modules[type(get_session()).__module__.partition(".")[0]]


#: Connections at once.
_CONNECTIONS = 4

#: Bytes after which what came is flushed to the disk and recorded: what a killed process may lose of a connection.
_RECORD_BYTES = 16 * 2**20

#: Rounds in a row that may bring less than this before it is given up.
_ROUNDS, _GAIN = 5, 2**20

#: Seconds to wait before the second, third, ... attempt; at most what a server that is too busy asks for.
_WAITS, _LONGEST_WAIT = (0.0, 1.0, 2.0, 4.0), 30.0

#: Seconds between two calls of the progress callback, which may want to stop, while nothing comes.
_HEARTBEAT = 0.2
_TOO_MANY, _UNAVAILABLE, _UNSATISFIABLE = 429, 500, 416


class RangesNotServedError(Exception):
    """The server sends whole files, or ranges that cannot be trusted."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """Where the ranges come from."""

    repo: str
    name: str
    commit: str
    token: Any

    def __str__(self) -> str:
        return f"{self.name} of {self.repo!r}"


def fetch_ranges(
    remote: RemoteFile, partial: PartialFile, wanted: Sequence[Span], head: bytes, told: Callable[[int], None]
) -> None:
    """Fetch what is not held of the wanted ranges.

    Args:
        remote: Where from.
        partial: Where to.
        wanted: The ranges.
        head: The first bytes of the file, where they are known already.
        told: Called with the bytes that came since the last call, and often with 0; it may raise to
            stop, and what came is kept.

    Raises:
        RangesNotServedError: The server does not serve them.
        InvalidCheckpointError: The file is another one than when it was begun; nothing of it is kept.
        CheckpointError: The connection broke again and again; what came is kept.
    """
    with partial.locked(lambda: told(0)):
        partial.prepare(remote.commit)
        _keep_head(partial, head)
        fruitless = 0
        while missing := to_request(wanted, partial.coverage().spans):
            before = count(partial.coverage().spans)
            failures = _Round(remote, partial, told).run(missing)
            _raise_fatal(remote, partial, failures)
            gained = count(partial.coverage().spans) - before
            fruitless = 0 if gained >= _GAIN else fruitless + 1
            if failures and fruitless >= _ROUNDS:
                raise _given_up(remote, partial, missing, failures[0]) from failures[0]
            if failures:
                _wait(_pause(fruitless, failures), told)


def _raise_fatal(remote: RemoteFile, partial: PartialFile, failures: Sequence[Exception]) -> None:
    """Raise what no further attempt can mend; that the file has changed before all else."""
    fatal = [failure for failure in failures if not _may_pass(failure)]
    for failure in fatal:
        if _status(failure) == _UNSATISFIABLE:
            partial.discard()
            raise _changed(remote, f"it had {partial.size} bytes, and now has fewer") from failure
        if isinstance(failure, InvalidCheckpointError):
            partial.discard()
            raise failure
    if fatal:
        raise fatal[0]


def _keep_head(partial: PartialFile, head: bytes) -> None:
    if to_request([(0, len(head))], partial.coverage().spans):
        with partial.path.open("r+b") as file:
            file.write(head)
            _keep(partial, file, (0, len(head)))


def _keep(partial: PartialFile, file: BinaryIO, span: Span) -> None:
    """Bring bytes to the disk, and then record them: a record must never claim what is not there."""
    file.flush()
    os.fsync(file.fileno())
    partial.record(span)


class _Round:
    """One attempt at all the ranges that are missing."""

    def __init__(self, remote: RemoteFile, partial: PartialFile, told: Callable[[int], None]) -> None:
        self._remote = remote
        self._partial = partial
        self._told = told
        self._stop = threading.Event()
        #: What the connections say: bytes that came, or that one has ended, and of what.
        self._said: queue.SimpleQueue[int | _Ended] = queue.SimpleQueue()

    def run(self, spans: Sequence[Span]) -> list[Exception]:
        """Fetch, and return what went wrong; the callback is called in this thread alone."""
        cut = list(pieces(spans, REQUEST_BYTES))
        failures: list[Exception] = []
        left = len(cut)
        with ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="splitlearn-fetch") as pool:
            try:
                for span in cut:
                    pool.submit(self._attempt, span)
                while left:
                    said = self._listen()
                    if isinstance(said, int):
                        self._told(said)
                        continue
                    left -= 1
                    if said.failure is not None:
                        failures.append(said.failure)
                        if not _may_pass(said.failure):
                            self._stop.set()
            finally:
                # The pool waits for its threads, also where the callback has raised.
                self._stop.set()
        return failures

    def _listen(self) -> int | _Ended:
        try:
            return self._said.get(timeout=_HEARTBEAT)
        except queue.Empty:
            return 0

    def _attempt(self, span: Span) -> None:
        failure: Exception | None = None
        try:
            if not self._stop.is_set():
                self._fetch(span)
        except Exception as error:  # noqa: BLE001  # carried to the thread that asked, which raises it
            failure = error
        self._said.put(_Ended(failure))

    def _fetch(self, span: Span) -> None:
        remote, (begin, end) = self._remote, span
        with (
            opened(remote.repo, remote.name, remote.commit, remote.token, span) as (served, chunks),
            self._partial.path.open("r+b") as file,
        ):
            self._check(served, span)
            file.seek(begin)
            kept = at = begin
            try:
                for chunk in chunks:
                    # Never beyond what was asked for, whatever comes.
                    piece = chunk[: end - at]
                    file.write(piece)
                    at += len(piece)
                    self._said.put(len(piece))
                    if at - kept >= _RECORD_BYTES:
                        _keep(self._partial, file, (kept, at))
                        kept = at
                    if at >= end or self._stop.is_set():
                        break
            finally:
                _keep(self._partial, file, (kept, at))
        if at < end and not self._stop.is_set():
            raise ConnectionError(f"{end - at} of {end - begin} bytes did not come")

    def _check(self, served: Served, span: Span) -> None:
        partial, remote = self._partial, self._remote
        said = {"version": (served.etag, partial.etag), "commit": (served.commit, remote.commit)}
        if served.size is not None:
            said["size"] = (str(served.size), str(partial.size))
        changed = [f"its {what} was {was}, now {now}" for what, (now, was) in said.items() if now and now != was]
        if changed:
            raise _changed(remote, "; ".join(changed))
        if served.span != span:
            raise RangesNotServedError(f"asked for {span}, offered {served.span}")


@dataclass(frozen=True, slots=True)
class _Ended:
    failure: Exception | None


def _changed(remote: RemoteFile, how: str) -> InvalidCheckpointError:
    return InvalidCheckpointError(
        f"{remote} changed on the Hub while it was being fetched: {how}; nothing of it is kept",
        hint="run it again to fetch it as it is now",
    )


def _may_pass(error: Exception) -> bool:
    """Say whether another attempt may fare better."""
    status = _status(error)
    if status is not None:
        return status == _TOO_MANY or status >= _UNAVAILABLE
    if isinstance(error, transport().HTTPError):
        return True
    if isinstance(error, OSError):
        # The disk's errors have a file, or a number that no connection has.
        return isinstance(error, ConnectionError | TimeoutError)
    # A session that another thread closed says so in a RuntimeError of no kind of its own.
    return type(error) is RuntimeError


def _status(error: Exception) -> int | None:
    response = getattr(error, "response", None)
    return int(response.status_code) if response is not None else None


def _pause(fruitless: int, failures: Sequence[Exception]) -> float:
    """Return the seconds to wait before the next round."""
    asked = [_asked_for(failure) for failure in failures]
    return min(_LONGEST_WAIT, max(_WAITS[min(max(fruitless - 1, 0), len(_WAITS) - 1)], *asked))


def _asked_for(error: Exception) -> float:
    """Return the seconds that a server which is too busy asks to be left alone."""
    response = getattr(error, "response", None)
    text = response.headers.get("Retry-After", "") if response is not None else ""
    return float(text) if text.isascii() and text.isdigit() else 0.0


def _wait(seconds: float, told: Callable[[int], None]) -> None:
    for _ in range(round(seconds / _HEARTBEAT)):
        told(0)
        time.sleep(_HEARTBEAT)


def _given_up(remote: RemoteFile, partial: PartialFile, missing: Sequence[Span], failure: Exception) -> CheckpointError:
    left = count(to_request(missing, partial.coverage().spans))
    return CheckpointError(
        f"{remote}: the connection to the Hub was lost {_ROUNDS} times in a row: {failure}; {left} bytes are missing, "
        f"what came of the others is kept in {partial.path}",
        hint="run it again: only what is missing is fetched",
    )
