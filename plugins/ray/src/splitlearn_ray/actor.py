"""The actor: loads one trunk, and serves it where it is. Runs on a machine of the cluster; imports no Ray."""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import socket
import stat
import tempfile
import threading
import traceback
from collections.abc import Mapping
from http import HTTPStatus
from importlib.metadata import version
from pathlib import Path
from typing import Any

from splitlearn_core import Progress, ProtocolError, SplitLearnError
from splitlearn_core.extension import (
    HEADER_BYTES,
    MAX_META_BYTES,
    SUBPROTOCOL,
    Channel,
    ComponentServer,
    Kind,
    decode,
    encode,
    error_frame,
)

log = logging.getLogger(__name__)

#: The longest path of a Unix socket is 108 bytes, with a zero at its end.
_LONGEST_FOLDER = 90


class TrunkActor:
    """One trunk. Its methods are called by Ray, each in a thread of its own."""

    def __init__(self) -> None:
        self._progress: list[Any] = ["importing", None, 0, 0, ""]
        self._importing = threading.Lock()

    def about(self) -> dict[str, Any]:
        """Return what is installed here, and the process id."""
        return {"pid": os.getpid(), "versions": versions()}

    def prepare(self, model_type: str) -> None:
        """Import what a load needs; an error of it is the load's."""
        with self._importing:
            from splitlearn_core import preload

            preload({model_type})

    def load(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Load the trunk and listen for connections.

        Returns:
            ``{"ready": {...}}`` with where it listens, or ``{"error": {...}}``.
        """
        try:
            with self._importing:  # a spare may be busy with it
                server = self._loaded(request)
            listens = _on_network(server, **request["network"]) if request["network"] else _on_machine(server)
        except Exception as error:  # noqa: BLE001  # raised where the load was asked for
            return {"error": described(error)}
        return {"ready": listens}

    def progress(self) -> list[Any]:
        """Return how far the load is: the fields of a ``Progress``."""
        return self._progress

    def memory(self) -> int:
        """Return the bytes that would be freed if this process ended now; 0 where that is unknown."""
        try:
            lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
        except OSError:
            return 0
        values = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
        return values["Private_Clean"] + values["Private_Dirty"]

    def watch(self) -> None:
        """Never return: the call ends with the process, and so tells of its end."""
        threading.Event().wait()

    def _loaded(self, request: Mapping[str, Any]) -> ComponentServer:
        os.environ.update(request["environment"])
        import torch

        from splitlearn_core import load_split_model

        torch.set_num_threads(request["threads"])
        torch.set_float32_matmul_precision(request["matmul_precision"])
        torch.set_deterministic_debug_mode(request["deterministic"])

        def report(step: Progress) -> None:
            self._progress = [step.stage, step.component, step.bytes_done, step.bytes_total, step.file]

        parts = load_split_model(progress=report, **request["load"])
        return ComponentServer(next(part for part in parts if part is not None))


def versions() -> dict[str, str]:
    """Return the versions of what both ends must have alike."""
    return {name: version(name) for name in ("splitlearn-ray", "splitlearn-core")}


def described(error: Exception) -> dict[str, str]:
    """Return an error as plain values, for another process that may not have its class."""
    if isinstance(error, SplitLearnError):
        known = next(cls for cls in type(error).__mro__ if cls.__module__ == SplitLearnError.__module__)
        return {"type": known.__name__, "message": error.message, "hint": error.hint}
    log.error("An actor failed:\n%s", "".join(traceback.format_exception(error)))
    return {"type": "", "message": f"{type(error).__name__}: {error}", "hint": ""}


def _on_machine(server: ComponentServer) -> dict[str, Any]:
    """Listen on a Unix socket that only this user can reach; payloads then go through shared memory."""
    default = tempfile.gettempdir()
    folder = tempfile.mkdtemp(prefix="splitlearn-ray-", dir=default if len(default) < _LONGEST_FOLDER else "/tmp")  # noqa: S108
    path = f"{folder}/trunk"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    Path(path).chmod(stat.S_IRUSR | stat.S_IWUSR)
    listener.listen()

    def accept() -> None:
        while True:
            stream, _ = listener.accept()
            channel = Channel(stream, server.limits.max_payload)
            threading.Thread(target=_answer, args=(channel, server), name="serve a connection", daemon=True).start()

    threading.Thread(target=accept, name="accept connections", daemon=True).start()
    return {"path": path}


def _answer(channel: Channel, server: ComponentServer) -> None:
    with contextlib.closing(channel), contextlib.suppress(OSError):  # the other side closed it
        while True:
            try:
                request = channel.receive()
            except ProtocolError as error:
                channel.send(error_frame(error))
                return
            if request is None:
                return
            channel.send(server.handle(request))


def _on_network(server: ComponentServer, host: str, token: str) -> dict[str, Any]:
    """Listen for WebSockets that bring the token."""
    from websockets.exceptions import ConnectionClosed
    from websockets.sync.server import ServerConnection, serve
    from websockets.typing import Subprotocol

    max_payload = server.limits.max_payload

    def refuse_strangers(connection: ServerConnection, request: Any) -> Any:
        given = request.headers.get("Authorization", "")
        if hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            return None
        return connection.respond(HTTPStatus.UNAUTHORIZED, "the token is missing or wrong\n")

    def answer(connection: ServerConnection) -> None:
        with contextlib.suppress(ConnectionClosed):
            for message in connection:
                try:
                    reply = server.handle(decode(bytearray(_binary(message)), max_payload))
                except ProtocolError as error:
                    reply = error_frame(error)
                connection.send(b"".join(encode(reply)))
                if reply.kind is Kind.ERROR and reply.meta.get("code") == "malformed":
                    return

    listening = serve(
        answer,
        host,
        0,
        process_request=refuse_strangers,
        subprotocols=[Subprotocol(SUBPROTOCOL)],
        compression=None,
        max_size=HEADER_BYTES + MAX_META_BYTES + max_payload,
        # A forward may take longer than any limit for a pong.
        ping_timeout=None,
    )
    threading.Thread(target=listening.serve_forever, name="accept connections", daemon=True).start()
    port = listening.socket.getsockname()[1]
    return {"url": f"ws://{f'[{host}]' if ':' in host else host}:{port}/trunk"}


def _binary(message: str | bytes) -> bytes:
    if isinstance(message, str):
        raise ProtocolError("a text message arrived; frames are binary", code="malformed")
    return message
