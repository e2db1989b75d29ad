"""A model hub on loopback that the real ``huggingface_hub`` client can talk to, for tests.

Folders are published as model repositories and read anew at every request. Every answer is
recorded, and faults can be asked for: cut connections, refusals, ignored or wrong ranges, held
downloads, and a store of bytes at another address, as behind the real Hub.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler
from io import BufferedReader
from pathlib import Path, PurePosixPath
from typing import Any, Self
from urllib.parse import parse_qs, quote, unquote, urlsplit

LFS_SUFFIXES = frozenset({".bin", ".gguf", ".h5", ".msgpack", ".onnx", ".pt", ".pth", ".safetensors"})
LFS_BYTES = 10 * 1024 * 1024
_REPO = r"(?P<repo>[^/]+(?:/[^/]+)??)"
_REVISION = r"(?P<verb>revision|tree|paths-info)/(?P<revision>[^/]+)(?:/(?P<name>.+))?"
_API = re.compile(rf"/api/models/{_REPO}(?:/{_REVISION})?")
_RESOLVE = re.compile(rf"/{_REPO}/(?P<verb>resolve|store)/(?P<revision>[^/]+)/(?P<name>.+)")
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass(frozen=True)
class RequestRecord:
    """One answered request; ``sent`` counts the body bytes sent so far out of the ``length`` announced."""

    method: str
    path: str
    range: str | None
    status: int
    length: int
    repo: str | None = None
    filename: str | None = None
    sent: int = 0
    authorization: str | None = None


@dataclass
class Faults:
    """What the hub does wrong on purpose. ``before_file`` may replace the file that is about to be served."""

    ignore_range: bool = False
    redirect: bool = False  # answer for large files with a redirect to the store, which knows bytes alone
    content_range: Callable[[str], str] | None = None  # what to say in place of the truth
    surplus: bytes = b""  # sent after what a range asks for
    before_file: Callable[[str, str, str], None] | None = None  # method, repository, file name
    breaks: dict[str, list[int]] = field(default_factory=dict)
    refusals: dict[str, list[int]] = field(default_factory=dict)

    def break_connection(self, filename: str, after: int, times: int = 1) -> None:
        """Cut the next ``times`` downloads of ``filename`` that are longer than ``after`` body bytes."""
        self.breaks[filename] = [after] * times

    def refuse(self, filename: str, status: int, times: int = 1) -> None:
        """Answer the next ``times`` requests for ``filename`` with a status, and no time to wait."""
        self.refusals[filename] = [status] * times


@dataclass
class Hold:
    """Stops every download of one file after some body bytes, until ``released`` is set."""

    filename: str
    after: int
    reached: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)


class _RefusalError(Exception):
    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {key.replace("_", "-"): value for key, value in headers.items()}


def _git_oid(kind: str, data: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(data)}\0".encode() + data, usedforsecurity=False).hexdigest()


def _entry(file: BufferedReader, name: str) -> dict[str, Any]:
    """What the tree listing says of a file; like in git, the id of a file in LFS is that of its pointer."""
    size = os.fstat(file.fileno()).st_size
    entry = {"type": "file", "path": name, "size": size}
    if size < LFS_BYTES and PurePosixPath(name).suffix not in LFS_SUFFIXES:
        return entry | {"oid": _git_oid("blob", file.read())}
    sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
    lfs = {"oid": sha256, "size": size, "pointerSize": len(pointer)}
    return entry | {"oid": _git_oid("blob", pointer), "lfs": lfs}


def _etag(entry: dict[str, Any]) -> str:
    return str(entry.get("lfs", entry)["oid"])


def _sibling(entry: dict[str, Any]) -> dict[str, Any]:
    lfs = {"lfs": {**entry["lfs"], "sha256": _etag(entry)}} if "lfs" in entry else {}
    return {"rfilename": entry["path"], "size": entry["size"], "blobId": entry["oid"], **lfs}


def _files(directory: Path) -> dict[str, Path]:
    """Regular files by name; links that lead out of the directory are left out."""
    found = (path for path in directory.rglob("*") if path.is_file())
    inside = (path for path in found if path.resolve().is_relative_to(directory))
    return {path.relative_to(directory).as_posix(): path for path in sorted(inside)}


def _tree(directory: Path) -> dict[str, dict[str, Any]]:
    """Files and the folders above them, by path."""
    entries = {}
    for name, path in _files(directory).items():
        for folder in map(str, reversed(PurePosixPath(name).parents[:-1])):
            oid = _git_oid("tree", folder.encode())
            entries[folder] = {"type": "directory", "path": folder, "size": 0, "oid": oid}
        with path.open("rb") as file:
            entries[name] = _entry(file, name)
    return entries


@dataclass(frozen=True)
class _Snapshot:
    """One commit of one repository, with who may read it."""

    repo: str
    directory: Path
    commit: str
    private: bool
    gated: bool
    token: str | None

    def check(self, authorization: str | None, for_file: bool) -> None:
        """Like on the Hub, a private repository is hidden, while of a gated one only the files are."""
        guarded = self.private or (self.gated and for_file)
        if guarded and authorization != f"Bearer {self.token}":
            code = "RepoNotFound" if self.private else "GatedRepo"
            status = 403 if authorization else 401
            raise _RefusalError(status, f"Access to {self.repo} is restricted", X_Error_Code=code)

    def missing(self, name: str) -> _RefusalError:
        message = f"{quote(name)} does not exist"
        return _RefusalError(404, message, X_Error_Code="EntryNotFound", X_Repo_Commit=self.commit)

    def info(self, blobs: bool) -> dict[str, Any]:
        siblings = [_sibling(e) for e in _tree(self.directory).values() if e["type"] == "file"]
        if not blobs:
            siblings = [{"rfilename": sibling["rfilename"]} for sibling in siblings]
        state = {"private": self.private, "gated": "manual" if self.gated else False, "disabled": False}
        names = {"id": self.repo, "modelId": self.repo, "sha": self.commit}
        return {**names, **state, "tags": [], "siblings": siblings}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 10  # bounds how long a client that stopped reading can delay the closing of the hub
    server: _Server
    repo: str | None = None
    filename: str | None = None
    record: RequestRecord
    sent = 0

    def do_GET(self) -> None:
        form = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        try:
            self._route(form)
        except _RefusalError as error:
            headers = {**error.headers, "X-Error-Message": str(error)}
            self._send_json({"error": str(error)}, error.status, headers)
        except (ConnectionError, TimeoutError):
            self.close_connection = True  # the client went away, as tests of cancelling make it do

    do_HEAD = do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _route(self, form: str) -> None:
        url = urlsplit(self.path)
        match = _API.fullmatch(url.path) or _RESOLVE.fullmatch(url.path)
        if match is None or (self.command == "POST") != (match["verb"] == "paths-info"):
            raise _RefusalError(404, "Not found")
        verb, name = match["verb"], unquote(match["name"] or "")
        self.repo = unquote(match["repo"])
        self.filename = name if verb in ("resolve", "store") else None
        snapshot = self.server.hub._find(self.repo, unquote(match["revision"] or "main"))
        # The address of the store is a secret that lets in, and whoever has it needs no token.
        if verb != "store":
            snapshot.check(self.headers.get("Authorization"), for_file=verb == "resolve")
        fields = parse_qs(form or url.query)
        if verb in ("resolve", "store"):
            self._send_file(snapshot, name, is_store=verb == "store")
        elif verb == "tree":
            self._send_tree(snapshot, name, recursive=fields.get("recursive") == ["true"])
        elif verb == "paths-info":
            tree = _tree(snapshot.directory)
            self._send_json([tree[path] for path in fields.get("paths", []) if path in tree])
        else:
            self._send_json(snapshot.info(blobs=fields.get("blobs") == ["true"]))

    def _start(self, status: int, headers: dict[str, str], length: int) -> None:
        asked, names = self.headers.get("Range"), (self.repo, self.filename)
        self.record = RequestRecord(
            self.command, self.path, asked, status, length, *names, authorization=self.headers.get("Authorization")
        )
        with self.server.hub._lock:
            self.server.hub._answers.append(self)
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(length), "Connection": "close"}.items():
            self.send_header(key, value)
        self.end_headers()

    def _send(self, data: bytes) -> None:
        # Counted first, so that a client which has read a byte finds it in the records.
        self.sent += len(data)
        self.wfile.write(data)

    def _send_json(self, answer: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(answer).encode()
        self._start(status, {"Content-Type": "application/json", **(headers or {})}, len(data))
        if self.command != "HEAD":
            self._send(data)

    def _send_tree(self, snapshot: _Snapshot, name: str, recursive: bool) -> None:
        tree, top = _tree(snapshot.directory), PurePosixPath(name)
        if name and tree.get(name, {}).get("type") != "directory":
            raise snapshot.missing(name)
        parents = {path: PurePosixPath(path).parents for path in tree}
        below = [p for p, above in parents.items() if (top in above if recursive else top == above[0])]
        self._send_json([tree[path] for path in below])

    def _send_file(self, snapshot: _Snapshot, name: str, is_store: bool) -> None:
        faults = self.server.hub.faults
        if faults.before_file is not None:
            faults.before_file(self.command, snapshot.repo, name)
        if refusals := faults.refusals.get(name):
            raise _RefusalError(refusals.pop(0), "Not now", Retry_After="0")
        path = _files(snapshot.directory).get(name)
        if path is None:
            raise snapshot.missing(name)
        with path.open("rb") as file:
            entry = _entry(file, name)
            size, etag = entry["size"], f'"{_etag(entry)}"'
            start, stop, partial = (0, size, False) if faults.ignore_range else self._span(size)
            headers = {"ETag": etag, "X-Repo-Commit": snapshot.commit, "Accept-Ranges": "bytes"}
            if "lfs" in entry:
                headers |= {"X-Linked-ETag": etag, "X-Linked-Size": str(size)}
            if is_store:
                headers = {"ETag": f'"stored-{etag[1:]}', "Accept-Ranges": "bytes"}
            elif "lfs" in entry and faults.redirect:
                location = self.server.hub.endpoint + self.path.replace("/resolve/", "/store/")
                self._start(302, {**headers, "Location": location}, 0)
                return
            if partial:
                told = f"bytes {start}-{stop - 1}/{size}"
                headers["Content-Range"] = faults.content_range(told) if faults.content_range else told
            surplus = faults.surplus if partial else b""
            self._start(206 if partial else 200, headers, stop - start + len(surplus))
            if self.command == "GET":
                file.seek(start)
                self._send_body(file, name, stop - start)
                self._send(surplus)

    def _span(self, size: int) -> tuple[int, int, bool]:
        """First byte, end, and whether that is a part; all but a single valid range means the whole file."""
        match = _RANGE.fullmatch(self.headers.get("Range") or "")
        first, last = match.groups() if match else ("", "")
        inverted = bool(first and last) and int(first) > int(last)
        if self.command != "GET" or inverted or not (first or last):
            return 0, size, False
        start = int(first) if first else max(size - int(last), 0)
        stop = min(int(last) + 1, size) if first and last else size
        if start >= stop:
            raise _RefusalError(416, "Range not satisfiable", Content_Range=f"bytes */{size}")
        return start, stop, True

    def _send_body(self, file: BufferedReader, name: str, length: int) -> None:
        stop, hold = self.server.hub._stops(name, length)
        for end in (min(hold.after, stop) if hold else stop, stop):
            while self.sent < end and (block := file.read(min(65536, end - self.sent))):
                self._send(block)
            if hold is not None and self.sent < stop:
                hold.reached.set()
                hold.released.wait()


# Not an HTTPServer, which looks up the name of the machine when it binds and so may ask a name server.
class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = False  # closing joins the handlers, so that no answer outlives the hub
    request_queue_size = 64
    hub: LoopbackHub


class LoopbackHub:
    """A context manager: while it is open, ``endpoint`` is what ``HF_ENDPOINT`` should be set to."""

    def __init__(self) -> None:
        self.faults = Faults()
        self._lock = threading.Lock()
        self._repos: dict[str, dict[str, _Snapshot]] = {}
        self._answers: list[_Handler] = []
        self._holds: list[Hold] = []

    def __enter__(self) -> Self:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        for hold in self._holds:
            hold.released.set()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    @property
    def requests(self) -> list[RequestRecord]:
        with self._lock:
            return [replace(answer.record, sent=answer.sent) for answer in self._answers]

    def add_repo(
        self,
        name: str,
        directory: Path,
        commit: str | None = None,
        *,
        private: bool = False,
        gated: bool = False,
        token: str | None = None,
        revision: str = "main",
    ) -> str:
        """Publish ``directory`` and return its commit, by default a digest of its present content.

        A further call with the same name moves ``revision``; earlier commits stay available by hash.
        """
        if (private or gated) != (token is not None):
            raise ValueError("a token goes with a private or gated repository, and only with one")
        directory = directory.resolve(strict=True)
        content = "\n".join(f"{name} {_etag(entry)}" for name, entry in _tree(directory).items())
        commit = commit or _git_oid("commit", content.encode())
        snapshot = _Snapshot(name, directory, commit, private, gated, token)
        with self._lock:
            self._repos.setdefault(name, {}).update({revision: snapshot, commit: snapshot})
        return commit

    def downloaded(self, name: str) -> set[str]:
        """Names of the files of a repository of which at least a part of the body was sent."""
        gets = (r for r in self.requests if r.method == "GET" and r.repo == name and r.status in (200, 206))
        return {r.filename for r in gets if r.filename is not None and (r.sent or not r.length)}

    @contextmanager
    def hold(self, filename: str, after: int = 0) -> Iterator[Hold]:
        """Block downloads of ``filename`` after that many body bytes, until released or until closing."""
        hold = Hold(filename, after)
        with self._lock:
            self._holds.append(hold)
        try:
            yield hold
        finally:
            hold.released.set()

    def _find(self, name: str, revision: str) -> _Snapshot:
        with self._lock:
            revisions = self._repos.get(name)
            if revisions is None:
                raise _RefusalError(404, "Repository not found", X_Error_Code="RepoNotFound")
            if revision not in revisions:
                raise _RefusalError(404, "Invalid rev id", X_Error_Code="RevisionNotFound")
            return revisions[revision]

    def _stops(self, filename: str, length: int) -> tuple[int, Hold | None]:
        """How many of ``length`` body bytes to send before cutting the connection, and what holds them."""
        with self._lock:
            held = (h for h in self._holds if h.filename == filename and not h.released.is_set())
            breaks = self.faults.breaks.get(filename)
            return breaks.pop(0) if breaks and breaks[0] < length else length, next(held, None)
