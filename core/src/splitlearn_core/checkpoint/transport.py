"""Bytes of files on the Hub over HTTP, by the Hub client's own session."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from splitlearn_core.checkpoint.ranges import Span, parse_content_range

#: Seconds that the Hub may stay silent.
TIMEOUT = 20.0
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


def transport() -> ModuleType:
    """Return the client's HTTP library, which differs between its versions; its session knows which one it is."""
    from huggingface_hub.utils import get_session

    return sys.modules[type(get_session()).__module__.partition(".")[0]]
