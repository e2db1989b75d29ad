"""Fetch byte ranges of one file into a partial file: in parallel, resumable, checked and recorded."""

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

#: Seconds without a response from the Hub before a request fails.
TIMEOUT = 20.0

#: Seconds between two attempts to connect.
_RECONNECT_S = 1.0
_OK, _PARTIAL = 200, 206


@dataclass(frozen=True, slots=True)
class Served:
    """What a response states about its body."""

    #: The range of the body, and the size of the whole file; None if the server ignored the requested range.
    span: Span | None
    size: int | None
    #: The version of the file; empty if not stated.
    etag: str
    #: The commit; empty if not stated.
    commit: str


@contextmanager
def opened(
    repo: str, name: str, commit: str | None, token: Any, span: Span
) -> Iterator[tuple[Served, Iterator[bytes]]]:
    """Request a range of a file; yield what the response states, and an iterator over the chunks of its body.

    Redirects are followed, and proxies and ``HF_ENDPOINT`` respected, as by the client itself.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = hf_hub_url(repo, name, revision=commit)
    # A compressed body would not be the requested bytes.
    ranged = {"Range": f"bytes={span[0]}-{span[1] - 1}", "Accept-Encoding": "identity"}
    headers = {**build_hf_headers(token=token), **ranged}
    with get_session().stream("GET", url, headers=headers, timeout=TIMEOUT, follow_redirects=True) as response:
        if response.is_error:
            response.read()
        hf_raise_for_status(response)
        yield _served(response), response.iter_raw()


def _served(response: Any) -> Served:
    # The Hub answers with a redirect, which states version and commit; the storage server does not.
    chain = [*response.history, response]
    etag = next((e for r in chain if (e := r.headers.get("X-Linked-Etag"))), "") or next(
        (e for r in chain if (e := r.headers.get("ETag"))), ""
    )
    commit = next((c for r in chain if (c := r.headers.get("X-Repo-Commit"))), "")
    content_range = (
        parse_content_range(response.headers.get("Content-Range")) if response.status_code == _PARTIAL else None
    )
    if response.headers.get("Content-Encoding", "identity") != "identity":
        content_range = None
    span, size = content_range or (None, None)
    return Served(span, size, str(etag).removeprefix("W/").strip('"'), str(commit))


def connection_failure() -> Exception | None:
    """Try to connect to the Hub, and once more a moment later.

    The client itself retries for half a minute, which is right for a download that has begun, but long for a
    misspelt name.

    Returns:
        Why there is no connection; None if there is any response.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    failures = transport()
    for pause in (_RECONNECT_S, 0.0):
        try:
            get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            return None
        except (failures.ConnectError, failures.ConnectTimeout) as error:
            failure: Exception = error
            time.sleep(pause)
        except (failures.HTTPError, OSError):
            return None  # The download tries again, and reports what is wrong.
    return failure


def transport() -> ModuleType:
    """Return the HTTP library of ``huggingface_hub``, which depends on its version: the module of its session class."""
    from huggingface_hub.utils import get_session

    return sys.modules[type(get_session()).__module__.partition(".")[0]]


#: Connections at once.
_CONNECTIONS = 4

#: Bytes after which received data is flushed and recorded: the most that a killed process loses per connection.
_RECORD_BYTES = 16 * 2**20

#: Rounds in a row that may gain fewer bytes than this before the fetch fails.
_ROUNDS, _GAIN = 5, 2**20

#: Seconds to wait before the second, third, ... attempt, and the longest wait that ``Retry-After`` can cause.
_WAITS, _LONGEST_WAIT = (0.0, 1.0, 2.0, 4.0), 30.0

#: Seconds between two calls of the progress callback, which may raise to stop, while no bytes arrive.
_HEARTBEAT = 0.2
_TOO_MANY, _UNAVAILABLE, _UNSATISFIABLE = 429, 500, 416


class RangesNotServedError(Exception):
    """The server sends whole files, or ranges that cannot be trusted."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """The file that ranges are fetched from."""

    repo: str
    name: str
    commit: str
    token: Any

    def __str__(self) -> str:
        return f"{self.name} of {self.repo!r}"


def fetch_ranges(
    remote: RemoteFile, partial: PartialFile, wanted: Sequence[Span], head: bytes, report: Callable[[int], None]
) -> None:
    """Fetch the wanted ranges that are not present yet.

    Args:
        remote: The file on the Hub.
        partial: The local file.
        wanted: The ranges.
        head: The first bytes of the file if they are known already, else empty.
        report: Called with the bytes received since the last call, and often with 0; it may raise to
            stop, and what was received is kept.

    Raises:
        RangesNotServedError: The server does not serve ranges.
        InvalidCheckpointError: The file changed since the first range was fetched; nothing of it is kept.
        CheckpointError: The connection broke repeatedly; what was received is kept.
    """
    with partial.locked(lambda: report(0)):
        partial.prepare(remote.commit)
        if to_request([(0, len(head))], partial.coverage().spans):
            with partial.path.open("r+b") as file:
                file.write(head)
                _keep(partial, file, (0, len(head)))
        fruitless = 0
        while missing := to_request(wanted, partial.coverage().spans):
            before = count(partial.coverage().spans)
            failures = _Round(remote, partial, report).run(missing)
            _raise_fatal(remote, partial, failures)
            gained = count(partial.coverage().spans) - before
            fruitless = 0 if gained >= _GAIN else fruitless + 1
            if failures and fruitless >= _ROUNDS:
                raise _given_up(remote, partial, missing, failures[0]) from failures[0]
            if failures:
                _wait(_pause(fruitless, failures), report)


def _raise_fatal(remote: RemoteFile, partial: PartialFile, failures: Sequence[Exception]) -> None:
    """Raise an error that no retry can fix, if there is one; a changed file takes precedence."""
    fatal = [failure for failure in failures if not _is_transient(failure)]
    for failure in fatal:
        if _status(failure) == _UNSATISFIABLE:
            partial.discard()
            raise _changed(remote, f"it had {partial.size} bytes, and now has fewer") from failure
        if isinstance(failure, InvalidCheckpointError):
            partial.discard()
            raise failure
    if fatal:
        raise fatal[0]


def _keep(partial: PartialFile, file: BinaryIO, span: Span) -> None:
    """Flush bytes to the disk, then record them: a record must never claim bytes that are not on the disk."""
    file.flush()
    os.fsync(file.fileno())
    partial.record(span)


class _Round:
    """One attempt to fetch all missing ranges."""

    def __init__(self, remote: RemoteFile, partial: PartialFile, report: Callable[[int], None]) -> None:
        self._remote = remote
        self._partial = partial
        self._report = report
        self._stop = threading.Event()
        #: From the connections: a number of bytes received, or the end of an attempt.
        self._events: queue.SimpleQueue[int | _Ended] = queue.SimpleQueue()

    def run(self, spans: Sequence[Span]) -> list[Exception]:
        """Fetch, and return the failures; the callback is called only in this thread."""
        requests = list(pieces(spans, REQUEST_BYTES))
        failures: list[Exception] = []
        left = len(requests)
        with ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="splitlearn-fetch") as pool:
            try:
                for span in requests:
                    pool.submit(self._attempt, span)
                while left:
                    try:
                        event: int | _Ended = self._events.get(timeout=_HEARTBEAT)
                    except queue.Empty:
                        event = 0
                    if isinstance(event, int):
                        self._report(event)
                        continue
                    left -= 1
                    if event.failure is not None:
                        failures.append(event.failure)
                        if not _is_transient(event.failure):
                            self._stop.set()
            finally:
                # The pool waits for its threads, also if the callback has raised.
                self._stop.set()
        return failures

    def _attempt(self, span: Span) -> None:
        failure: Exception | None = None
        try:
            if not self._stop.is_set():
                self._fetch(span)
        except Exception as error:  # noqa: BLE001  # handed to the calling thread, which raises it
            failure = error
        self._events.put(_Ended(failure))

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
                    # Never beyond the requested range, whatever the server sends.
                    piece = chunk[: end - at]
                    file.write(piece)
                    at += len(piece)
                    self._events.put(len(piece))
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
        stated = {"version": (served.etag, partial.etag), "commit": (served.commit, remote.commit)}
        if served.size is not None:
            stated["size"] = (str(served.size), str(partial.size))
        changed = [f"its {what} was {was}, now {now}" for what, (now, was) in stated.items() if now and now != was]
        if changed:
            raise _changed(remote, "; ".join(changed))
        if served.span != span:
            raise RangesNotServedError(f"requested {span}, served {served.span}")


@dataclass(frozen=True, slots=True)
class _Ended:
    failure: Exception | None


def _changed(remote: RemoteFile, how: str) -> InvalidCheckpointError:
    return InvalidCheckpointError(
        f"{remote} changed on the Hub while it was being fetched: {how}; nothing of it is kept",
        hint="run it again to fetch it as it is now",
    )


def _is_transient(error: Exception) -> bool:
    """Return whether another attempt may succeed."""
    status = _status(error)
    if status is not None:
        return status == _TOO_MANY or status >= _UNAVAILABLE
    if isinstance(error, transport().HTTPError):
        return True
    if isinstance(error, OSError):
        # Errors of the disk are of other classes.
        return isinstance(error, ConnectionError | TimeoutError)
    # The client raises a plain RuntimeError on a session that another thread closed.
    return type(error) is RuntimeError


def _status(error: Exception) -> int | None:
    response = getattr(error, "response", None)
    return int(response.status_code) if response is not None else None


def _pause(fruitless: int, failures: Sequence[Exception]) -> float:
    """Return the seconds to wait before the next round."""
    responses = [response for failure in failures if (response := getattr(failure, "response", None)) is not None]
    stated = [response.headers.get("Retry-After", "") for response in responses]
    retry_after = [float(text) for text in stated if text.isascii() and text.isdigit()]
    return min(_LONGEST_WAIT, max(_WAITS[min(max(fruitless - 1, 0), len(_WAITS) - 1)], *retry_after, 0.0))


def _wait(seconds: float, report: Callable[[int], None]) -> None:
    for _ in range(round(seconds / _HEARTBEAT)):
        report(0)
        time.sleep(_HEARTBEAT)


def _given_up(remote: RemoteFile, partial: PartialFile, missing: Sequence[Span], failure: Exception) -> CheckpointError:
    left = count(to_request(missing, partial.coverage().spans))
    return CheckpointError(
        f"{remote}: the connection to the Hub was lost {_ROUNDS} times in a row: {failure}; {left} bytes are missing, "
        f"what was received of the others is kept in {partial.path}",
        hint="run it again: only what is missing is fetched",
    )
