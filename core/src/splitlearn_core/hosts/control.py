"""JSON messages, with open descriptors, between a process, its zygote and its children."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Sequence
from typing import Any

_LENGTH_BYTES = 4
#: The environment variables may take megabytes; nothing else is large.
_MAX_BYTES = 64 * 2**20
_MAX_DESCRIPTORS = 4
#: Processes that other threads start must not inherit the descriptors; without the flag there is a short race.
_CLOSE_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)


def send_message(stream: socket.socket, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
    """Send a message; the receiver gets its own descriptors of the same open files.

    Raises:
        OSError: The other side has ended.
    """
    data = json.dumps(message).encode()
    length = len(data).to_bytes(_LENGTH_BYTES, "little")
    if descriptors:
        socket.send_fds(stream, [length], list(descriptors))
        stream.sendall(data)
    else:
        stream.sendall(length + data)


def receive_message(stream: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Receive a message and its descriptors; None if the other side has ended."""
    head, descriptors, _, _ = socket.recv_fds(stream, _LENGTH_BYTES, _MAX_DESCRIPTORS, _CLOSE_ON_EXEC)
    try:
        head += _exactly(stream, _LENGTH_BYTES - len(head))
        length = int.from_bytes(head, "little")
        if length > _MAX_BYTES:
            raise ConnectionError(f"a control message announces {length:,} bytes")
        message = json.loads(_exactly(stream, length))
    except ConnectionResetError:
        close_all(descriptors)
        return None
    except BaseException:
        close_all(descriptors)
        raise
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)
    return message, descriptors


def close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)


def _exactly(stream: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = stream.recv(count - len(data))
        if not part:
            raise ConnectionResetError("the other side has ended")
        data += part
    return bytes(data)
