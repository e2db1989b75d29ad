"""Binary messages of a WebSocket, read and written with few copies.

``websockets`` does the handshake, and gets all but binary messages in one frame: control frames, text, fragments,
frames that are too large or invalid. It would copy a message four times, and the parts of a large message that have
left the processor's cache meanwhile take longest.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

from websockets.protocol import Protocol, Side, State

try:
    from websockets.speedups import apply_mask
except ImportError:  # an installation without a compiler
    from websockets.utils import apply_mask

#: Bytes of a message that are masked, sent and received at once: they stay in the cache.
PIECE_BYTES = 128 * 1024
#: The first byte of a binary message in one frame; the mask and length bits of the second, and special lengths.
_BINARY, _MASKED, _LENGTH, _TWO_BYTES, _EIGHT_BYTES = 0x82, 0x80, 0x7F, 126, 127
_FINAL, _OPCODE, _CONTROL = 0x80, 0x0F, 0x08
_LONGEST_HEAD, _MASK_BYTES = 14, 4


def message_head(size: int, mask: bytes = b"") -> bytes:
    """Return the frame header of a binary message; clients mask their messages, and servers do not."""
    masked = _MASKED if mask else 0
    if size < _TWO_BYTES:
        return bytes((_BINARY, masked | size)) + mask
    if size < 1 << 16:
        return bytes((_BINARY, masked | _TWO_BYTES)) + size.to_bytes(2, "big") + mask
    return bytes((_BINARY, masked | _EIGHT_BYTES)) + size.to_bytes(8, "big") + mask


def _after(mask: bytes, count: int) -> bytes:
    """Return the mask, rotated for what follows ``count`` bytes."""
    count %= _MASK_BYTES
    return mask[count:] + mask[:count]


class MessageStream:
    """The binary messages of a WebSocket connection, separated from the rest of what arrives.

    Args:
        protocol: The state machine of the connection.
        max_size: Bytes of the largest message; a larger one is left to ``protocol``, which refuses it.
        take_message: Called with each binary message that arrived in one frame.
        take_other: Called with the bytes of everything else, in order.
    """

    def __init__(
        self,
        protocol: Protocol,
        max_size: int,
        take_message: Callable[[bytes | bytearray], object],
        take_other: Callable[[bytes], object],
    ) -> None:
        self._protocol = protocol
        self._max_size = max_size
        self._take_message = take_message
        self._take_other = take_other
        self._is_server = protocol.side is Side.SERVER
        #: The received part of a frame's header; the number of missing bytes of its payload, and their mask.
        self._head = b""
        self._left = 0
        self._mask = b""
        self._message: bytearray | None = None
        self._is_in_fragments = False

    def masked(self, buffers: Sequence[bytes | memoryview]) -> Iterator[bytes]:
        """Return a binary message, as a client sends it, in pieces.

        Raises:
            ConnectionResetError: The other side has ended the connection.
        """
        if self._protocol.state is not State.OPEN:
            raise ConnectionResetError("the connection was closed")
        mask, size = os.urandom(_MASK_BYTES), sum(map(len, buffers))
        prefix = message_head(size, mask)
        if size <= PIECE_BYTES:
            yield prefix + apply_mask(b"".join(buffers), mask)
            return
        for buffer in buffers:
            view = memoryview(buffer)
            for begin in range(0, len(view), PIECE_BYTES):
                piece = view[begin : begin + PIECE_BYTES]
                yield prefix + apply_mask(piece, mask)
                prefix, mask = b"", _after(mask, len(piece))

    def feed(self, data: memoryview) -> None:
        """Process received bytes; they are not referenced afterwards."""
        while data:
            if not self._left:
                data = self._begin(data)
            piece, data = data[: self._left], data[self._left :]
            self._left -= len(piece)
            if self._message is None:
                if piece:
                    self._take_other(bytes(piece))
                continue
            part = apply_mask(piece, self._mask) if self._mask else piece
            if self._left:
                # The message grows as it arrives: no memory is allocated for a length that is only announced.
                self._message += part
                self._mask = _after(self._mask, len(piece))
            else:
                message, self._message = self._message, None
                self._take_message(message + part if message else bytes(part))

    def _begin(self, data: memoryview) -> memoryview:
        """Read the header of a frame as far as it has arrived, and return the rest of the data."""
        before = len(self._head)
        head = self._head + data[: _LONGEST_HEAD - before]
        first, second = head[:2] if len(head) > 1 else (0, 0)
        length, mask_at = second & _LENGTH, 2
        if length >= _TWO_BYTES:
            mask_at = 4 if length == _TWO_BYTES else 10
            length = int.from_bytes(head[2:mask_at], "big")
        size = mask_at + _MASK_BYTES if second & _MASKED else mask_at
        if len(head) < size:
            self._head = head
            return data[len(data) :]
        self._head, self._left, self._mask = b"", length, head[mask_at:size]
        if (
            first == _BINARY
            and not self._is_in_fragments
            and bool(self._mask) is self._is_server
            and length <= self._max_size
            and self._protocol.state is State.OPEN
        ):
            self._message = bytearray()
        else:
            if first & _OPCODE < _CONTROL:
                self._is_in_fragments = not first & _FINAL
            self._take_other(head[:size])
        return data[size - before :]
