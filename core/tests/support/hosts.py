"""Hosts for tests: one component, reached over each carrier, or over one whose messages can be made to fail."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from splitlearn_core.errors import ConnectionLostError, ProtocolError
from splitlearn_core.hosts.client import JOURNAL_BYTES, Host, Patience
from splitlearn_core.hosts.protocol import SUBPROTOCOL, Frame, Kind, decode, encode
from splitlearn_core.hosts.remote import RemoteComponent, connect
from splitlearn_core.hosts.sessions import SessionLimits, SessionTable, error_frame
from splitlearn_core.hosts.worker import Worker

#: Names of carriers that :func:`hosting` knows.
CARRIERS = ("memory", "unix", "websocket")
#: A plugin that does in a child, at its import and in each step, what a file says.
BEHAVING_PLUGIN = """
import os, pathlib
from splitlearn_core import ModelFamily, hookimpl

HERE = pathlib.Path(__file__).parent


def behave(moment):
    path = HERE / f"{moment}.py"
    if path.exists():
        exec(path.read_text(), {"HERE": HERE})


if os.environ["TEST_PARENT"] != str(os.getpid()):
    behave("load")
    from transformers.models.llama import modeling_llama
    original = modeling_llama.LlamaMLP.forward

    def forward(self, *args):
        behave("step")
        return original(self, *args)

    modeling_llama.LlamaMLP.forward = forward


@hookimpl
def splitlearn_model_families():
    return [ModelFamily(model_type="llama", architecture="LlamaForCausalLM")]
"""


class MemoryEndpoint:
    """A host in this process. Frames are encoded and decoded as everywhere; each may be made to fail.

    Attributes:
        table: The sessions, which a restart replaces.
        owner, limits: Who asks, and what is allowed.
        before, after: Called with the number of each request, and the request, before and after it is carried out.
    """

    url = "memory://trunk"
    max_payload = 2**32

    def __init__(self, make: Callable[[], SessionTable]) -> None:
        self._make = make
        self.table = make()
        self.owner = ""
        self.limits: SessionLimits | None = None
        self.count = 0
        self.frames: list[Frame] = []
        self.before: Callable[[int, Frame], None] = lambda number, frame: None
        self.after: Callable[[int, Frame], None] = lambda number, frame: None

    def check(self) -> None:
        """Do nothing: the address is right."""

    def open(self) -> MemoryEndpoint:
        return self

    def close(self) -> None:
        """Do nothing: there is no connection."""

    def restart(self) -> None:
        """Lose all sessions."""
        self.table = self._make()

    def exchange(self, request: Frame) -> Frame:
        request = decode(b"".join(encode(request)))
        if request.kind is Kind.HELLO:
            return self.answered(request)
        self.count += 1
        number = self.count
        self.frames.append(request)
        self.before(number, request)
        reply = self.answered(request)
        self.after(number, request)
        return reply

    def answered(self, request: Frame) -> Frame:
        """Carry a request out."""
        return decode(b"".join(encode(self.table.handle(request, self.owner, self.limits))))


def lost() -> ConnectionLostError:
    """Return the error of a connection that broke."""
    return ConnectionLostError("the connection broke", code="connection")


def remote(
    endpoint: MemoryEndpoint, *, wait: float = 5.0, journal_bytes: int = JOURNAL_BYTES, wire: str = "raw"
) -> RemoteComponent:
    """Use the component of a host in this process."""
    made: Any = endpoint
    return RemoteComponent(Host(made, Patience(wait, journal_bytes), wire), max_tokens=256)


@contextmanager
def hosting(
    carrier: str, component: Any, folder: Path, limits: SessionLimits | None = None
) -> Iterator[RemoteComponent]:
    """Host a component, and use it over one of :data:`CARRIERS`."""
    if carrier == "memory":
        yield remote(MemoryEndpoint(lambda: SessionTable(component, limits)))
        return
    table = SessionTable(component, limits)
    with unix_host(table, folder / "trunk.sock") if carrier == "unix" else websocket_host(table) as url:
        used = connect(url, wait=5)
        try:
            yield used
        finally:
            used.close()


@contextmanager
def unix_host(table: SessionTable, path: Path) -> Iterator[str]:
    """Serve sessions on a Unix socket; yields the URL."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    worker = Worker(table, listener)
    worker.start()
    try:
        yield f"unix://{path}"
    finally:
        worker.close()


@contextmanager
def websocket_host(table: SessionTable) -> Iterator[str]:
    """Serve sessions as ``splitlearn serve`` does, with the server of the WebSocket library; yields the URL."""
    from websockets.sync.server import serve
    from websockets.typing import Subprotocol

    def answer(connection: Any) -> None:
        for message in connection:
            try:
                request = decode(message)
            except ProtocolError as error:
                connection.send(b"".join(encode(error_frame(error))))
                return
            connection.send(b"".join(encode(table.handle(request))))

    with serve(
        answer, "127.0.0.1", 0, subprotocols=[Subprotocol(SUBPROTOCOL)], compression=None, max_size=None
    ) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.socket.getsockname()[1]}/trunk"
        finally:
            server.shutdown()
            thread.join()
