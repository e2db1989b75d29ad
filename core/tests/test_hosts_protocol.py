"""Frames: what is encoded is decoded, and anything else is refused in words, before memory is taken for it."""

from __future__ import annotations

import contextlib
import json
import random
import struct
import tracemalloc
import zlib
from typing import Any

import pytest

from splitlearn_core.errors import ProtocolError
from splitlearn_core.hosts.protocol import (
    HEADER_BYTES,
    MAGIC,
    MAX_META_BYTES,
    VERSION,
    Frame,
    Kind,
    TensorSpec,
    decode,
    decode_header,
    encode,
)
from support.long import cases

FRAMES = cases(100_000, 5_000)
_HEADER = struct.Struct("<4sBBHQQIQI4x")


def frame(**changes: Any) -> Frame:
    payload = memoryview(bytes(range(24)))
    values: dict[str, Any] = {
        "kind": Kind.STEP,
        "session": 2**62,
        "step": 7,
        "meta": {"secret": "abc", "changes": [["reorder", [1, 0]]]},
        "tensors": (TensorSpec("hidden_states", "F32", (1, 2, 2)), TensorSpec("attention_mask", "I64", (1, 1))),
        "buffers": [payload[:16], payload[16:]],
    }
    return Frame(**{**values, **changes})


def raw(
    meta: bytes, payload: bytes = b"", *, kind: int = Kind.STEP, version: int = VERSION, magic: bytes = MAGIC
) -> bytes:
    """Return a frame with a valid checksum and any content."""
    return _HEADER.pack(magic, version, kind, 0, 0, 0, len(meta), len(payload), zlib.crc32(meta)) + meta + payload


def test_a_frame_comes_back_as_it_was() -> None:
    """Header, meta, and the bytes of each tensor."""
    sent = frame()
    received = decode(b"".join(encode(sent)))
    assert (received.kind, received.session, received.step) == (sent.kind, sent.session, sent.step)
    assert dict(received.meta) == dict(sent.meta)
    assert received.tensors == sent.tensors
    assert [bytes(buffer) for buffer in received.buffers] == [bytes(buffer) for buffer in sent.buffers]


@pytest.mark.parametrize(
    ("data", "code", "words"),
    [
        (b"GET / HTTP/1.1\r\n" + bytes(64), "malformed", "not a message of splitlearn"),
        (raw(b"{}", version=2), "version", "version 2; this side speaks version 1"),
        (raw(b"{}", kind=99), "malformed", "kind 99"),
        (raw(b"{"), "malformed", "not JSON"),
        (raw(b"[]"), "malformed", "not a JSON object"),
        (raw(b"{}{}"), "malformed", "not JSON"),
        (raw(b'{,"tensors":[]}'), "malformed", "not JSON"),
        (raw(b'{"a":1"tensors":[]}'), "malformed", "not JSON"),
        (raw(b'{"a":{"b":1,"tensors":[]}'), "malformed", "not JSON"),
        (raw(b'{"a,"tensors":[]}'), "malformed", "not JSON"),
        (raw(b'{"tensors":[]]'), "malformed", "not JSON"),
        (raw(b'{"tensors":' + b"[" * 1_000 + b"}"), "malformed", "not JSON"),
        (raw(b'{"tensors":[1' + b"0" * 900 + b"]}"), "malformed", "not a name, dtype and shape"),
        (raw(b'{"a":NaN}'), "malformed", "NaN is not JSON"),
        (raw(b'{"a":' + b"[" * 60_000 + b"]" * 60_000 + b"}"), "malformed", "not JSON"),
        (raw(b'{"a":1' + b"0" * 5_000 + b"}"), "malformed", "not JSON"),
        (raw(b'{"tensors":[["x","F32",[2]]]}', bytes(4)), "malformed", "do not add up"),
        (raw(b'{"tensors":[["x","F32",[-1]]]}'), "malformed", "not a name, dtype and shape"),
        (raw(b'{"tensors":[["x","F4",[0]]]}'), "malformed", "not a name, dtype and shape"),
        (raw(b'{"tensors":[["x","F32",[0]],["x","F32",[0]]]}'), "malformed", "the same name"),
        (raw(b'{"tensors":{}}'), "malformed", "not a list"),
        (raw(b"{}")[:-1], "malformed", "announced"),
        (raw(b"{}") + b"x", "malformed", "announced"),
        (raw(b"{}")[:20], "malformed", "no header"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_invalid_frames_are_refused(data: bytes, code: str, words: str) -> None:
    """With a code for programs, and words for people."""
    with pytest.raises(ProtocolError, match=words) as caught:
        decode(data)
    assert caught.value.code == code


@pytest.mark.parametrize(
    "text",
    [
        '{"tensors":[["x","F32",[2]]]}',
        '{"a":[1,{"b":2}],"tensors":[["x","F32",[2]]]}',
        '{"tensors":[["x","F32",[2]]],"a":1}',
        ' {"a":1, "tensors" : [["x","F32",[2]]] }\n',
        '{"tensors":[["y","F32",[1]]],"tensors":[["x","F32",[2]]]}',
        '{"a":{"tensors":[["y","F32",[1]]]},"tensors":[["x","F32",[2]]]}',
        '{"tensors":[["x","F32",[2]]],"a":{"tensors":[["y","F32",[1]]]}}',
        '{"tensors":[["x","F32",[2]]],"a":{"b":1,"tensors":[]}}',
        r'{"tensors":[["x","F32",[2]]],"\"tensors":[["y","F32",[1]]]}',
        r'{"tensors":[["x","F32",[2]]],"a":",\"tensors\":[]}"}',
    ],
)
def test_meta_is_json_however_it_is_written(text: str) -> None:
    """In any order and with white space, twice: the list of tensors of the first frame is kept."""
    expected = json.loads(text)
    tensors = tuple(TensorSpec(name, dtype, tuple(shape)) for name, dtype, shape in expected.pop("tensors"))
    for _ in range(2):
        received = decode(raw(text.encode(), bytes(8)))
        assert (received.meta, received.tensors) == (expected, tensors)
        assert [len(buffer) for buffer in received.buffers] == [8]


def test_damage_on_the_way_is_noticed() -> None:
    """The description of a frame has a checksum."""
    data = bytearray(b"".join(encode(frame())))
    data[HEADER_BYTES + 5] ^= 1
    with pytest.raises(ProtocolError, match="damaged"):
        decode(data)


@pytest.mark.parametrize(("meta", "payload"), [(MAX_META_BYTES + 1, 0), (2, 1001), (2**32 - 1, 2**63)])
def test_too_large_a_frame_is_refused_by_its_header(meta: int, payload: int) -> None:
    """Nothing that follows was needed for that."""
    header = _HEADER.pack(MAGIC, VERSION, Kind.STEP, 0, 0, 0, meta, payload, 0)
    with pytest.raises(ProtocolError, match="are allowed") as caught:
        decode_header(header, max_payload=1000)
    assert caught.value.code == "too_large"


def test_too_large_a_description_is_not_sent() -> None:
    """The sender says so, and not its peer."""
    with pytest.raises(ProtocolError, match="description"):
        encode(frame(meta={"secret": "x" * MAX_META_BYTES}))


def test_hostile_frames_do_no_harm() -> None:
    """Any bytes: a frame or a refusal, and no memory out of proportion to what was sent."""
    chance = random.Random(14)
    good = b"".join(encode(frame()))
    accepted = 0
    tracemalloc.start()
    try:
        for _ in range(FRAMES):
            data = spoiled(chance, good)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            with contextlib.suppress(ProtocolError):
                received = decode(data, max_payload=2**40)
                accepted += 1
                assert sum(map(len, received.buffers)) + HEADER_BYTES <= len(data)
            assert tracemalloc.get_traced_memory()[1] - before < 100_000 + 40 * len(data)
    finally:
        tracemalloc.stop()
    assert 0 < accepted < FRAMES


def spoiled(chance: random.Random, good: bytes) -> bytes:
    """Return bytes that are nearly a frame: cut, flipped, or with another description."""
    way = chance.randrange(4)
    if way == 0:
        return bytes(chance.randrange(256) for _ in range(chance.randrange(80)))
    if way == 1:
        data = bytearray(good[: chance.randrange(len(good) + 1)] if chance.random() < 0.5 else good)
        for _ in range(chance.randrange(3)):
            if data:
                data[chance.randrange(len(data))] = chance.randrange(256)
        return bytes(data)
    values: list[Any] = [0, -1, 2**63, 1e308, None, True, "F32", "x" * 200, [], {}, [[]], ["a", "F32", [2**62, 2**62]]]
    if way == 2:
        meta = json.dumps({"tensors": [chance.choice(values) for _ in range(chance.randrange(4))]}).encode()
        return raw(meta, bytes(chance.randrange(8)), kind=chance.randrange(16))
    tensor = ["x", chance.choice(["F32", "BOOL", "F8_E4M3"]), [chance.choice([0, 1, 2, 2**40]) for _ in range(3)]]
    return raw(json.dumps({"tensors": [tensor]}).encode(), bytes(chance.randrange(40)))
