"""Frames between a process and its child: small ones on a Unix socket, payloads of large ones in shared memory.

A request and its reply take turns, so that one *arena* is enough for a connection: a memory file that holds the payload
of the request, and then that of its reply. The side that opened the connection makes it when a request is large enough,
makes a larger one when it is too small, and sends its descriptor along. It has no name, and is freed when both
processes have ended, in whatever way. Each frame is preceded by::

    place of the payload   bytes of the arena
             I                    4x Q
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import struct
import sys
import weakref
from typing import Any

from splitlearn_core.errors import ProtocolError
from splitlearn_core.hosts.control import close_all
from splitlearn_core.hosts.protocol import HEADER_BYTES, MAX_META_BYTES, Frame, decode_body, decode_header, encode

if sys.platform == "linux":
    import fcntl

_PREFIX = struct.Struct("<I4xQ")
_HEAD_BYTES = _PREFIX.size + HEADER_BYTES
#: Where a payload is.
_ON_SOCKET, _IN_ARENA = 0, 1
#: The payload size from which two copies are cheaper than passing it through the socket's buffer.
ARENA_FROM = 8 * 1024
#: The minimum and maximum size of an arena; a larger payload goes through the socket.
_LEAST_SIZE, _LARGEST_SIZE = 2**20, 2**30
#: The size of one read: a frame without a large payload takes one system call, and any description fits.
_SCRATCH = _HEAD_BYTES + MAX_META_BYTES
_CLOSE_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
_DESCRIPTOR = struct.Struct("i")
_ROOM_FOR_DESCRIPTOR = socket.CMSG_SPACE(_DESCRIPTOR.size) if hasattr(socket, "CMSG_SPACE") else 0


class Channel:
    """One end of a connection; used by one thread at a time.

    Args:
        stream: A Unix socket with a channel at its other end.
        max_payload: The largest payload to receive, in bytes.
        makes_arena: Whether this end sends requests; it then makes the arena.
    """

    def __init__(self, stream: socket.socket, max_payload: int, *, makes_arena: bool = False) -> None:
        self._stream = stream
        self._max_payload = max_payload
        self._makes_arena = makes_arena and hasattr(os, "memfd_create")
        self._is_first = makes_arena
        self._arena: mmap.mmap | None = None
        self._size = 0
        #: A reply whose buffers, views of the arena, may still be in use.
        self._lent: weakref.ref[Any] | None = None
        self._scratch = bytearray(_SCRATCH)
        self._view = memoryview(self._scratch)

    def send(self, frame: Frame) -> None:
        """Send a frame.

        Raises:
            OSError: The other side has ended.
        """
        head, *buffers = encode(frame)
        size, descriptor = sum(map(len, buffers)), -1
        is_lent = self._lent is not None and self._lent() is not None
        if self._makes_arena and ARENA_FROM <= size <= _LARGEST_SIZE and (is_lent or self._size < size):
            descriptor = self._make(size)
        elif is_lent:
            # The arena must not be overwritten while it still holds the last reply.
            self._arena, self._size = None, 0
        try:
            if ARENA_FROM <= size <= self._size and self._arena is not None:
                position = 0
                for buffer in buffers:
                    self._arena[position : position + len(buffer)] = buffer
                    position += len(buffer)
                self._write([_PREFIX.pack(_IN_ARENA, self._size) + head], descriptor)
            else:
                self._write([_PREFIX.pack(_ON_SOCKET, self._size) + head, *buffers], descriptor)
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def receive(self) -> Frame | None:
        """Receive a frame; None if the other side has ended between two frames.

        The buffers of a large request are views of the arena, which are valid until the reply is sent: the reply
        overwrites them. Those of a reply are valid as long as they exist.

        Raises:
            ProtocolError: It is not valid, or too large; the connection cannot be used any further.
            OSError: The connection broke.
        """
        descriptors: list[int] = []
        if self._is_first:
            # Only requests have descriptors.
            count = self._stream.recv_into(self._scratch)
        else:
            count, ancillary, _, _ = self._stream.recvmsg_into([self._scratch], _ROOM_FOR_DESCRIPTOR, _CLOSE_ON_EXEC)
            if ancillary:
                descriptors = [_DESCRIPTOR.unpack(data)[0] for _, _, data in ancillary]
        try:
            if count == 0:
                return None
            count = self._read_until(self._scratch, count, _HEAD_BYTES)
            place, size = _PREFIX.unpack_from(self._scratch)
            if descriptors:
                self._take(descriptors[0], size)
            elif not self._is_first and size != self._size:
                # The last reply in the arena is still in use.
                self._arena, self._size = None, 0
        finally:
            close_all(descriptors)
        header = decode_header(self._view[_PREFIX.size : _HEAD_BYTES], self._max_payload)
        if place == _IN_ARENA:
            end = _HEAD_BYTES + header.meta_length
            self._read_until(self._scratch, count, end)
            return decode_body(header, self._view[_HEAD_BYTES:end], self._payload(header.payload_length))
        # Its buffers may outlive this call, while the scratch memory is reused.
        present = self._view[_HEAD_BYTES:count]
        if len(present) >= header.rest:
            body = bytearray(present)
        else:
            body = bytearray(header.rest)
            body[: len(present)] = present
            self._read_until(body, len(present), header.rest)
        return decode_body(header, memoryview(body))

    def close(self) -> None:
        self._stream.close()
        # Views of a failed request may live as long as its traceback.
        self._arena = None

    def _write(self, buffers: list[bytes | memoryview], descriptor: int) -> None:
        if descriptor < 0:
            sent = self._stream.send(buffers[0]) if len(buffers) == 1 else self._stream.sendmsg(buffers)
        else:
            passed = (socket.SOL_SOCKET, socket.SCM_RIGHTS, _DESCRIPTOR.pack(descriptor))
            sent = self._stream.sendmsg(buffers, [passed])
        if sent == sum(map(len, buffers)):
            return
        for buffer in buffers:
            if sent < len(buffer):
                self._stream.sendall(memoryview(buffer)[sent:])
            sent = max(0, sent - len(buffer))

    def _read_until(self, memory: bytearray, count: int, minimum: int) -> int:
        """Read into memory that holds ``count`` bytes until it holds at least ``minimum``; return the new count."""
        if count >= minimum:
            return count
        with memoryview(memory) as view:
            while count < minimum:
                more = self._stream.recv_into(view[count:minimum])
                if more == 0:
                    raise ConnectionResetError("the connection ended within a frame")
                count += more
        return count

    def _make(self, size: int) -> int:
        """Make an arena for requests of this size, and return its descriptor."""
        size = max(_LEAST_SIZE, 1 << (size - 1).bit_length())
        descriptor = os.memfd_create("splitlearn", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, size)
            # If the file were truncated, the process that reads it would crash (SIGBUS).
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            self._arena, self._size = mmap.mmap(descriptor, size), size
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _take(self, descriptor: int, size: int) -> None:
        """Map an arena of the other side."""
        if self._is_first or size > _LARGEST_SIZE or os.fstat(descriptor).st_size != size:
            raise ProtocolError("an arena is not as large as announced", code="malformed")
        if not fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise ProtocolError("an arena is not sealed", code="malformed")
        self._arena, self._size = mmap.mmap(descriptor, size), size

    def _payload(self, length: int) -> memoryview:
        if self._arena is None or length > self._size:
            raise ProtocolError("a payload is in an arena that is missing or too small", code="malformed")
        if self._is_first:
            # Views of this memory keep it alive; once it is collected, the arena can be reused.
            reply = (ctypes.c_ubyte * length).from_buffer(self._arena)
            self._lent = weakref.ref(reply)
            return memoryview(reply).cast("B")
        return memoryview(self._arena)[:length]


def pair(max_payload: int) -> tuple[Channel, socket.socket]:
    """Return a channel for requests, and the socket for its other end."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return Channel(near, max_payload, makes_arena=True), far
