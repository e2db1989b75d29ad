"""Where an actor listens: on a socket of its machine, or on the network for those with the token."""

from __future__ import annotations

import contextlib
import hmac
import socket
import stat
import tempfile
import threading
from http import HTTPStatus
from pathlib import Path
from typing import Any

from splitlearn_core import ProtocolError
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

#: The longest path of a Unix socket is 108 bytes, with a zero at its end.
_LONGEST_FOLDER = 90


def on_machine(server: ComponentServer) -> dict[str, Any]:
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
            threading.Thread(target=server.serve, args=(channel,), name="serve a connection", daemon=True).start()

    threading.Thread(target=accept, name="accept connections", daemon=True).start()
    return {"path": path}


def on_network(server: ComponentServer, host: str, token: str) -> dict[str, Any]:
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
