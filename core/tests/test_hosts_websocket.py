"""Binary messages of a WebSocket, as ``websockets`` reads and writes them, however the stream is cut into pieces."""

from __future__ import annotations

import random
from typing import Any

import pytest
from websockets.client import ClientProtocol
from websockets.exceptions import PayloadTooBig
from websockets.exceptions import ProtocolError as WebSocketError
from websockets.frames import Frame, Opcode
from websockets.http11 import Request
from websockets.protocol import Protocol, State
from websockets.server import ServerProtocol
from websockets.uri import parse_uri

from splitlearn_core.hosts.websocket import PIECE_BYTES, MessageStream, message_head

pytestmark = pytest.mark.light

LIMIT = 2**20
SIZES = (0, 1, 125, 126, 65_535, 65_536, PIECE_BYTES, PIECE_BYTES + 3, 3 * PIECE_BYTES + 1)


def peers() -> tuple[ClientProtocol, ServerProtocol]:
    """Return both ends of a connection whose handshake is done."""
    client, server = ClientProtocol(parse_uri("ws://host/"), max_size=LIMIT), ServerProtocol(max_size=LIMIT)
    client.send_request(client.connect())
    server.receive_data(b"".join(client.data_to_send()))
    (request,) = server.events_received()
    assert isinstance(request, Request)
    server.send_response(server.accept(request))
    client.receive_data(b"".join(server.data_to_send()))
    client.events_received()
    return client, server


class Received:
    """What a stream has separated: whole messages, and the frames that ``websockets`` read from the rest."""

    def __init__(self, protocol: Protocol) -> None:
        self.protocol = protocol
        self.all: list[Any] = []
        self.stream = MessageStream(protocol, LIMIT, lambda message: self.all.append(bytes(message)), self._other)

    def _other(self, data: bytes) -> None:
        self.protocol.receive_data(data)
        self.all += [(frame.opcode, bytes(frame.data)) for frame in self.protocol.events_received()]  # type: ignore[union-attr]

    def feed(self, data: bytes, cuts: list[int]) -> list[Any]:
        for begin, end in zip([0, *cuts], [*cuts, len(data)], strict=True):
            piece = bytearray(data[begin:end])
            self.stream.feed(memoryview(piece))
            # The memory is used again.
            piece[:] = bytes(len(piece))
        return self.all


def content(size: int) -> bytes:
    return random.Random(size).randbytes(size)


@pytest.mark.parametrize("size", SIZES)
def test_websockets_reads_what_is_written(size: int) -> None:
    """Masked by a client, in one buffer and in several; and plain by a server."""
    client, server = peers()
    data = content(size)
    stream = Received(client).stream
    for buffers in ([data], [data[:5], memoryview(data)[5:7], data[7:]]):
        server.receive_data(b"".join(stream.masked(buffers)))
        (frame,) = server.events_received()
        assert isinstance(frame, Frame)
        assert (frame.opcode, frame.fin, bytes(frame.data)) == (Opcode.BINARY, True, data)
    client.receive_data(message_head(size) + data)
    (frame,) = client.events_received()
    assert isinstance(frame, Frame)
    assert (frame.opcode, bytes(frame.data)) == (Opcode.BINARY, data)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("is_server", [True, False])
def test_what_websockets_writes_is_read(is_server: bool, size: int) -> None:
    """Other frames between messages reach ``websockets``, and so do messages in fragments; in order."""
    sender, receiver = peers() if is_server else peers()[::-1]
    data = content(size)
    sender.send_binary(data)
    sender.send_ping(b"there?")
    sender.send_binary(b"one")
    sender.send_binary(b"begin", fin=False)
    sender.send_pong(b"")
    sender.send_continuation(data, fin=True)
    sender.send_text(b"text")
    sender.send_binary(data)
    written = b"".join(sender.data_to_send())
    expected = [
        data,
        (Opcode.PING, b"there?"),
        b"one",
        (Opcode.BINARY, b"begin"),
        (Opcode.PONG, b""),
        (Opcode.CONT, data),
        (Opcode.TEXT, b"text"),
        data,
    ]
    generator = random.Random(size)
    for count in (0, 1, 7, 40):
        received = Received(peers()[is_server])
        assert received.feed(written, sorted(generator.choices(range(len(written)), k=count))) == expected
    if size < 1000:  # each byte by itself
        received = Received(peers()[is_server])
        assert received.feed(written, list(range(1, len(written)))) == expected
    assert receiver.state is State.OPEN


@pytest.mark.parametrize(
    ("frame", "error"),
    [
        (b"\x82\x05plain", WebSocketError),  # a client masks
        (b"\x83\x80mask", WebSocketError),
        (b"\xc2\x80mask", WebSocketError),  # a reserved bit
        (b"\x82\xff" + (LIMIT + 1).to_bytes(8, "big") + b"mask", PayloadTooBig),
        (b"\x80\x80mask", WebSocketError),  # the end of a message that has not begun
        (b"\x02\x80mask\x82\x80mask", WebSocketError),  # a message within another one
    ],
)
def test_what_is_not_valid_is_left_to_websockets(frame: bytes, error: type[Exception]) -> None:
    """It fails the connection, and no message is taken after that."""
    after = message_head(3, b"mask") + b"abc"
    for cuts in ([], list(range(1, len(frame + after)))):
        received = Received(peers()[1])
        assert all(isinstance(one, tuple) for one in received.feed(frame + after, cuts))
        assert isinstance(received.protocol.parser_exc, error)


def test_nothing_is_written_after_the_end() -> None:
    client, _ = peers()
    client.send_close()
    with pytest.raises(ConnectionResetError):
        list(Received(client).stream.masked([b"x"]))


def test_a_message_takes_no_memory_before_it_comes() -> None:
    """An announcement alone is not believed."""
    received = Received(peers()[1])
    received.feed(message_head(LIMIT, b"mask") + b"1", [])
    held = received.stream._message  # what grows
    assert held is not None
    assert len(held) == 1
