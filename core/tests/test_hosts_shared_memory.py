"""Frames through a socket and shared memory: whole, in memory of their own, and refused where they are no frames."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from splitlearn_core.errors import ProtocolError
from splitlearn_core.hosts.protocol import Frame, Kind, TensorSpec, encode
from splitlearn_core.hosts.shared_memory import ARENA_FROM, Channel, pair

pytestmark = [
    pytest.mark.light,
    pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="without memory files, all goes through the socket"),
]

LIMIT = 2**26
SIZES = (0, 1, ARENA_FROM - 1, ARENA_FROM, 2**20, 2**20 + 1, 5 * 2**20)


def frame(kind: Kind, payload: bytes) -> Frame:
    return Frame(kind, 3, 4, {"a": "é"}, (TensorSpec("x", "U8", (len(payload),)),), (memoryview(payload),))


def payload(size: int, seed: int) -> bytes:
    return bytes((seed + number * number) % 251 for number in range(251)) * (size // 251 + 1)


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    """Return a channel for requests, and one for replies."""
    near, far = pair(LIMIT)
    end = Channel(far, LIMIT)
    yield near, end
    near.close()
    end.close()


def exchange(ends: tuple[Channel, Channel], size: int, seed: int, answer_size: int | None = None) -> Frame:
    """Send a request, check it at the other end, and return the reply."""
    near, end = ends
    there = payload(size, seed)[:size]
    back = payload(answer_size or size, seed + 1)[: size if answer_size is None else answer_size]

    def serve() -> None:
        request = end.receive()
        assert request is not None
        received.append(bytes(request.buffers[0]))
        end.send(frame(Kind.RESULT, back))

    received: list[bytes] = []
    server = threading.Thread(target=serve)
    server.start()
    near.send(frame(Kind.STEP, there))
    reply = near.receive()
    server.join()
    assert received == [there]
    assert reply is not None
    assert (reply.kind, reply.session, reply.step, dict(reply.meta)) == (Kind.RESULT, 3, 4, {"a": "é"})
    assert bytes(reply.buffers[0]) == back
    return reply


@pytest.mark.parametrize("first", SIZES)
@pytest.mark.parametrize("second", SIZES)
def test_frames_of_any_size_come_whole(ends: tuple[Channel, Channel], first: int, second: int) -> None:
    """One after the other on one connection, and replies of another size than their requests."""
    exchange(ends, first, 1)
    exchange(ends, second, 2)
    exchange(ends, first, 3, second)


@pytest.mark.parametrize("later", SIZES)
def test_a_reply_outlives_later_ones(ends: tuple[Channel, Channel], later: int) -> None:
    """Its buffers are not written again while somebody has them."""
    kept = exchange(ends, 2**20, 1)
    before = bytes(kept.buffers[0])
    for seed in (5, 7):
        exchange(ends, later, seed, 2**20)
    assert bytes(kept.buffers[0]) == before
    ends[0].close()
    assert bytes(kept.buffers[0]) == before


def test_memory_is_used_again(ends: tuple[Channel, Channel]) -> None:
    """A connection has one memory file, however many frames go through it."""
    inodes = set()
    for seed in range(5):
        exchange(ends, 2**20, seed)
        maps = Path("/proc/self/maps").read_text().splitlines()
        inodes.add(frozenset(line.split()[4] for line in maps if "memfd:splitlearn" in line))
    assert len(inodes) == 1
    assert len(next(iter(inodes))) == 1


def test_the_end_of_the_other_side_is_seen(ends: tuple[Channel, Channel]) -> None:
    """Between frames it is the end; within one the connection is broken."""
    near, end = ends
    near.close()
    assert end.receive() is None
    raw, far = socket.socketpair()
    with raw:
        raw.sendall(struct.pack("<I4xQ", 0, 0) + encode(frame(Kind.STEP, b"x"))[0])
    with pytest.raises(ConnectionResetError):
        Channel(far, LIMIT).receive()
    far.close()


def _short() -> int:
    return os.memfd_create("x", os.MFD_ALLOW_SEALING)


def _unsealed() -> int:
    descriptor = os.memfd_create("x", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, 2**21)
    return descriptor


def _pipe() -> int:
    reader, writer = os.pipe()
    os.close(writer)
    return reader


@pytest.mark.parametrize("make", [_short, _unsealed, _pipe, None])
def test_what_is_no_arena_is_refused(make: Callable[[], int] | None) -> None:
    """Reading memory that becomes shorter would end the process."""
    raw, far = socket.socketpair()
    large = frame(Kind.STEP, bytes(ARENA_FROM))
    head = struct.pack("<I4xQ", 1, 2**21) + encode(large)[0]
    with ExitStack() as stack:
        end: Any = Channel(far, LIMIT)
        stack.callback(end.close)
        stack.enter_context(raw)
        descriptors = [make()] if make else []
        socket.send_fds(raw, [head], descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        with pytest.raises(ProtocolError):
            end.receive()


def test_limits_hold_for_what_is_in_shared_memory(ends: tuple[Channel, Channel]) -> None:
    """A payload beyond the limit of the receiver is refused by its announcement."""
    near, far = pair(LIMIT)
    end = Channel(far, 2**20)
    near.send(frame(Kind.STEP, bytes(2**21)))
    with pytest.raises(ProtocolError, match="announces"):
        end.receive()
    near.close()
    end.close()
