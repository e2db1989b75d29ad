"""Fetch byte ranges of one file into a partial file: in parallel, resumable, checked and recorded."""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
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

#: Seconds before another attempt to connect, or to get the rest of a range.
_PAUSE_S = 1.0

#: Connections at once.
_CONNECTIONS = 4

#: Bytes after which received data is flushed and recorded: the most that a killed process loses per connection.
_RECORD_BYTES = 16 * 2**20

#: Requests in a row for the rest of a range that may gain fewer bytes than this before the fetch fails.
_ATTEMPTS, _GAIN = 5, 2**20

#: Seconds between two calls of the progress callback, which may raise to stop, while no bytes arrive.
_HEARTBEAT = 0.2
_PARTIAL, _UNSATISFIABLE = 206, 416


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

    The client of the Hub follows redirects, uses proxies and ``HF_ENDPOINT``, and retries until the server answers.
    A broken connection must not leave the block as an error: the client would send the request again.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    url = hf_hub_url(repo, name, revision=commit)
    # A compressed body would not be the requested bytes.
    ranged = {"Range": f"bytes={span[0]}-{span[1] - 1}", "Accept-Encoding": "identity"}
    headers = {**build_hf_headers(token=token), **ranged}
    with http_stream_backoff("GET", url, headers=headers, timeout=TIMEOUT, follow_redirects=True) as response:
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
    for pause in (_PAUSE_S, 0.0):
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
        try:
            _Transfer(remote, partial, to_request(wanted, partial.coverage().spans)).run(report)
        except InvalidCheckpointError:
            partial.discard()
            raise


def _keep(partial: PartialFile, file: BinaryIO, span: Span) -> None:
    """Flush bytes to the disk, then record them: a record must never claim bytes that are not on the disk."""
    file.flush()
    os.fsync(file.fileno())
    partial.record(span)


class _Transfer:
    """Requests in several threads.

    The client of the Hub retries a request until there is a response. It has nothing for a range whose body breaks off,
    and its pauses, which the server determines, cannot be interrupted: the first is done here, and threads that are in
    such a pause are left behind when a transfer ends early; they write nothing any more.
    """

    def __init__(self, remote: RemoteFile, partial: PartialFile, spans: Sequence[Span]) -> None:
        self._remote = remote
        self._partial = partial
        self._spans = spans
        self._stopped = threading.Event()
        #: Held by a thread while it may write.
        self._writing = threading.Semaphore(_CONNECTIONS)
        #: A number of bytes received, an error, or None from a thread that has nothing left to do.
        self._events: queue.SimpleQueue[int | Exception | None] = queue.SimpleQueue()

    def run(self, report: Callable[[int], None]) -> None:
        """Fetch the spans; the callback is called in this thread alone."""
        requests = list(pieces(self._spans, REQUEST_BYTES))
        left = iter(requests)
        threads = [
            threading.Thread(target=self._work, args=(left,), name="splitlearn-fetch", daemon=True)
            for _ in range(min(_CONNECTIONS, len(requests)))
        ]
        for thread in threads:
            thread.start()
        running = len(threads)
        try:
            while running:
                try:
                    event = self._events.get(timeout=_HEARTBEAT)
                except queue.Empty:
                    event = 0
                if isinstance(event, Exception):
                    raise event
                if event is None:
                    running -= 1
                else:
                    report(event)
        finally:
            self._stopped.set()
            for _ in range(_CONNECTIONS):
                self._writing.acquire()
            self._writing.release(_CONNECTIONS)
            for thread in threads:
                thread.join(_HEARTBEAT)

    def _work(self, left: Iterator[Span]) -> None:
        """Fetch one span after the other; several threads take from one iterator."""
        end: Exception | None = None
        try:
            for span in left:
                self._fetch(*span)
                if self._stopped.is_set():
                    break
        except Exception as error:  # noqa: BLE001  # handed to the calling thread, which raises it
            end = error
        self._events.put(end)

    def _fetch(self, begin: int, end: int) -> None:
        """Fetch a span; where its body breaks off, the rest is requested."""
        fruitless = 0
        while True:
            at, failure = self._request(begin, end)
            if at >= end or self._stopped.is_set():
                return
            fruitless = 0 if at - begin >= _GAIN else fruitless + 1
            begin = at
            if fruitless >= _ATTEMPTS:
                raise self._given_up(failure) from failure
            if fruitless > 1:
                self._stopped.wait(_PAUSE_S)

    def _request(self, begin: int, end: int) -> tuple[int, Exception]:
        """Request a span; return the position that was reached, and why it is not the end."""
        from huggingface_hub.errors import HfHubHTTPError

        remote = self._remote
        try:
            with opened(remote.repo, remote.name, remote.commit, remote.token, (begin, end)) as (served, chunks):
                self._check(served, (begin, end))
                with self._writing, self._partial.path.open("r+b") as file:
                    return self._receive(chunks, file, begin, end)
        except HfHubHTTPError as error:
            if error.response is not None and error.response.status_code == _UNSATISFIABLE:
                raise self._changed(f"it had {self._partial.size} bytes, and now has fewer") from error
            raise
        except RuntimeError as error:
            # huggingface_hub 1.x retries on a session that it has closed, and closes those of other threads.
            if type(error) is not RuntimeError:
                raise
            return begin, error

    def _receive(self, chunks: Iterator[bytes], file: BinaryIO, begin: int, end: int) -> tuple[int, Exception]:
        file.seek(begin)
        kept = at = begin
        failure: Exception = ConnectionError("the body ended early")
        try:
            for chunk in chunks:
                if self._stopped.is_set():
                    break
                # Never beyond the requested range, whatever the server sends.
                piece = chunk[: end - at]
                file.write(piece)
                at += len(piece)
                self._events.put(len(piece))
                if at - kept >= _RECORD_BYTES:
                    _keep(self._partial, file, (kept, at))
                    kept = at
                if at >= end:
                    break
        except (transport().HTTPError, ConnectionError, TimeoutError) as error:
            failure = error
        finally:
            _keep(self._partial, file, (kept, at))
        return at, failure

    def _check(self, served: Served, span: Span) -> None:
        partial, remote = self._partial, self._remote
        stated = {"version": (served.etag, partial.etag), "commit": (served.commit, remote.commit)}
        if served.size is not None:
            stated["size"] = (str(served.size), str(partial.size))
        changed = [f"its {what} was {was}, now {now}" for what, (now, was) in stated.items() if now and now != was]
        if changed:
            raise self._changed("; ".join(changed))
        if served.span != span:
            raise RangesNotServedError(f"requested {span}, served {served.span}")

    def _given_up(self, failure: Exception) -> CheckpointError:
        left = count(to_request(self._spans, self._partial.coverage().spans))
        return CheckpointError(
            f"{self._remote}: the connection to the Hub was lost {_ATTEMPTS} times in a row: {failure}; "
            f"{left} bytes are missing, what was received of the others is kept in {self._partial.path}",
            hint="run it again: only what is missing is fetched",
        )

    def _changed(self, how: str) -> InvalidCheckpointError:
        return InvalidCheckpointError(
            f"{self._remote} changed on the Hub while it was being fetched: {how}; nothing of it is kept",
            hint="run it again to fetch it as it is now",
        )
