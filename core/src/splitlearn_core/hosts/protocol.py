"""The messages between the user of a component and its host: frames and their limits. Nothing here does I/O.

A frame is a header of fixed size, a JSON object (*meta*), and the raw little-endian bytes of tensors (*payload*) in the
order in which meta lists them::

    magic  version  kind  flags  session  step  meta length  payload length  CRC-32 of meta  reserved
     4s      B       B     H       Q       Q        I              Q                I            4x

Every request gets one reply, in order, with the step number of the request. Nothing is allocated for a frame before its
header is checked against the limits, and nothing of a frame is ever executed: there is no pickle, and dtypes are the
safetensors format's names.

=========  =========  ==========================================================================================
request    reply      meaning
=========  =========  ==========================================================================================
HELLO      WELCOME    what each side is; the first message of a connection
OPEN       OPENED     a new session, with its own key-value cache
COPY       OPENED     a new session with a copy of another one's cache, as it was after a numbered step
STEP       RESULT     changes of the cache, then a forward. Steps of a session are numbered from 1; a step that is
                      sent twice is executed once. Session 0: a forward without cache
BACKWARD   RESULT     repeats a forward without cache; returns gradients of its input and adapters for that of its
                      output
PUT        KEPT       a description of adapters, or their tensors; the reply has the hash by which calls name them
LINK       LINKED     asks whether the host sends on to another one; the reply has the name by which steps say so
COLLECT    RESULT     waits for a step that another host sends on, and returns its result
CLOSE      CLOSED     the end of a session; an unknown session counts as closed
PING       PONG       checks that the host answers
any        ERROR      a code, whether the same request can succeed later, and what became of the session
=========  =========  ==========================================================================================
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from enum import IntEnum
from functools import lru_cache
from itertools import accumulate, pairwise, starmap
from types import MappingProxyType
from typing import Any, NamedTuple

from splitlearn_core.errors import ProtocolError
from splitlearn_core.types import DTYPE_BYTES

MAGIC, VERSION = b"SPLF", 1
#: The WebSocket subprotocol, which names the version too.
SUBPROTOCOL = f"splitlearn.v{VERSION}"
#: The environment variable that holds the token, at both ends.
TOKEN_VARIABLE = "SPLITLEARN_TOKEN"  # noqa: S105  # the name of a variable
_HEADER = struct.Struct("<4sBBHQQIQI4x")
HEADER_BYTES = _HEADER.size

#: The largest meta of a frame. A reordering of 4,096 rows takes 20 kB of it.
MAX_META_BYTES = 256 * 1024
#: The largest payload unless a side sets another limit: 8,192 positions of width 8,192 in float32.
MAX_PAYLOAD_BYTES = 256 * 2**20
#: Tensors of one frame, their dimensions and the length of their names.
MAX_TENSORS, MAX_DIMENSIONS, MAX_NAME = 4_096, 8, 256
#: The largest session and step number.
_MAX_NUMBER = 2**63 - 1


class Kind(IntEnum):
    """The kinds of frames."""

    HELLO = 1
    WELCOME = 2
    OPEN = 3
    OPENED = 4
    COPY = 5
    STEP = 6
    RESULT = 7
    CLOSE = 8
    CLOSED = 9
    PING = 10
    PONG = 11
    ERROR = 12
    BACKWARD = 13
    PUT = 14
    KEPT = 15
    LINK = 16
    LINKED = 17
    COLLECT = 18


#: A look-up in a dict takes a tenth of the time of Kind(number).
_KINDS = {int(kind): kind for kind in Kind}
#: The name of the list of tensors in meta, and the longest list, in bytes, that is kept for later frames.
_TENSORS, _SHORT_LIST = b'"tensors":', 1024
_NO_META: Mapping[str, Any] = MappingProxyType({})


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


# Made once: json.dumps and json.loads would make one for each frame. NaN is not JSON.
_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


class TensorSpec(NamedTuple):
    """A tensor of a frame: its name, the safetensors format's name of its dtype, and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


class Frame(NamedTuple):
    """One message. Its payload is a list of buffers, one for each tensor, in the order of ``tensors``."""

    kind: Kind
    session: int = 0
    step: int = 0
    meta: Mapping[str, Any] = _NO_META
    tensors: tuple[TensorSpec, ...] = ()
    buffers: Sequence[memoryview] = ()

    @property
    def payload_bytes(self) -> int:
        return sum(spec.nbytes for spec in self.tensors)


class Header(NamedTuple):
    """The checked header of a frame."""

    kind: Kind
    session: int
    step: int
    meta_length: int
    payload_length: int
    meta_crc: int

    @property
    def rest(self) -> int:
        """The bytes that follow the header."""
        return self.meta_length + self.payload_length


def encode(frame: Frame) -> list[bytes | memoryview]:
    """Return a frame as buffers to send one after the other: header and meta, then a buffer for each tensor."""
    content, size = _ENCODER.encode(dict(frame.meta)) if frame.meta else "{}", 0
    if frame.tensors:
        listed, size = _listed(frame.tensors)
        content = f'{content[:-1]}{"," if frame.meta else ""}"tensors":{listed}}}'
    meta = content.encode()
    if len(meta) > MAX_META_BYTES:
        raise ProtocolError(
            f"the description of a {frame.kind.name} takes {len(meta):,} bytes, and {MAX_META_BYTES:,} are allowed",
            code="too_large",
        )
    header = _HEADER.pack(MAGIC, VERSION, frame.kind, 0, frame.session, frame.step, len(meta), size, zlib.crc32(meta))
    return [header + meta, *frame.buffers]


@lru_cache(maxsize=256)
def _listed(tensors: tuple[TensorSpec, ...]) -> tuple[str, int]:
    """Describe tensors in JSON, and count their bytes; most steps have the tensors of the one before."""
    return _ENCODER.encode(tensors), sum(spec.nbytes for spec in tensors)


def decode_header(data: bytes | bytearray | memoryview, max_payload: int = MAX_PAYLOAD_BYTES) -> Header:
    """Check the header of a frame, before anything is allocated for what follows it.

    Raises:
        ProtocolError: It is of another protocol or version, or announces more than is allowed.
    """
    if len(data) < HEADER_BYTES:
        raise ProtocolError(f"a frame of {len(data)} bytes has no header", code="malformed")
    magic, version, kind, flags, session, step, meta_length, payload_length, crc = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise ProtocolError(
            "this is not a message of splitlearn",
            code="malformed",
            hint="is the address that of `splitlearn serve`, with the name of the model at its end?",
        )
    if version != VERSION:
        raise ProtocolError(
            f"a frame of protocol version {version}; this side speaks version {VERSION}",
            code="version",
            hint="install the same version of splitlearn-core on both sides",
        )
    known = _KINDS.get(kind)
    if known is None or flags or session > _MAX_NUMBER or step > _MAX_NUMBER:
        raise ProtocolError(f"a frame of kind {kind} with flags {flags:#x} is unknown", code="malformed")
    if meta_length > MAX_META_BYTES or payload_length > max_payload:
        raise ProtocolError(
            f"a frame announces {meta_length:,} + {payload_length:,} bytes, and {MAX_META_BYTES:,} + "
            f"{max_payload:,} are allowed",
            code="too_large",
            hint="send fewer tokens in one step, or raise the limit of the other side",
        )
    return Header(known, session, step, meta_length, payload_length, crc)


def decode_body(header: Header, body: memoryview, payload: memoryview | None = None) -> Frame:
    """Check what follows a header, and return the frame; its buffers are views of ``body``.

    Args:
        header: The checked header.
        body: Meta and payload; or meta alone, if the payload arrived separately.
        payload: The payload that arrived separately.

    Raises:
        ProtocolError: Meta is damaged, or does not describe the payload.
    """
    if payload is None:
        body, payload = body[: header.meta_length], body[header.meta_length :]
    if len(body) != header.meta_length or len(payload) != header.payload_length:
        count = len(body) + len(payload)
        raise ProtocolError(f"a frame of {count:,} bytes announced {header.rest:,}", code="malformed")
    if zlib.crc32(body) != header.meta_crc:
        raise ProtocolError("the description of a frame was damaged in transit", code="malformed")
    meta, listed = _parse_meta(bytes(body))
    if listed.nbytes != header.payload_length:
        raise ProtocolError("the sizes of a frame's tensors do not add up to its payload", code="malformed")
    buffers = [payload[place] for place in listed.places]
    return Frame(header.kind, header.session, header.step, meta, listed.tensors, buffers)


def decode(data: bytes | bytearray | memoryview, max_payload: int = MAX_PAYLOAD_BYTES) -> Frame:
    """Decode a complete frame; raises like :func:`decode_header` and :func:`decode_body`."""
    view = memoryview(data)
    return decode_body(decode_header(view, max_payload), view[HEADER_BYTES:])


class _Listed(NamedTuple):
    """The tensors of a frame, the place of each in the payload, and their bytes."""

    tensors: tuple[TensorSpec, ...]
    places: tuple[slice, ...]
    nbytes: int


def _parse_meta(raw: bytes) -> tuple[dict[str, Any], _Listed]:
    """Return meta without its list of tensors, and that list.

    :func:`encode` puts the list last, and it is mostly that of an earlier frame. The value of a name may be replaced:
    with a number in its place, the rest is JSON if and only if the whole is.
    """
    others, name, listed = raw.rpartition(_TENSORS)
    # After one of these a quote is not an escaped one, within a string.
    if others[-1:] in (b"{", b",") and len(listed) <= _SHORT_LIST and listed.endswith(b"}"):
        try:
            known = _parse_list(listed[:-1])
        except (ValueError, RecursionError):
            pass  # not the last value of meta, or no JSON
        else:
            meta = _parse_object(others + name + b"0}")
            del meta["tensors"]
            return meta, known
    meta = _parse_object(raw)
    return meta, _checked_list(meta.pop("tensors", []))


def _parse_object(raw: bytes) -> dict[str, Any]:
    try:
        # White space may surround it. `decode` would look for that with regular expressions.
        text = raw.decode().strip(" \t\n\r")
        value, end = _DECODER.raw_decode(text)
        if end != len(text):
            raise ValueError(f"there is more after its end, at character {end}")
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the description of a frame is not JSON: {error}", code="malformed") from error
    if not isinstance(value, dict):
        raise ProtocolError("the description of a frame is not a JSON object", code="malformed")
    return value


@lru_cache(maxsize=256)
def _parse_list(raw: bytes) -> _Listed:
    return _checked_list(_DECODER.decode(raw.decode()))


def _checked_list(listed: Any) -> _Listed:
    if not isinstance(listed, list) or len(listed) > MAX_TENSORS:
        raise ProtocolError("the tensors of a frame are not a list, or are too many", code="malformed")
    tensors = tuple(map(_parse_tensor, listed))
    if len({spec.name for spec in tensors}) < len(tensors):
        raise ProtocolError("two tensors of a frame have the same name", code="malformed")
    ends = [0, *accumulate(spec.nbytes for spec in tensors)]
    return _Listed(tensors, tuple(starmap(slice, pairwise(ends))), ends[-1])


def _parse_tensor(item: Any) -> TensorSpec:
    name, dtype, shape = item if isinstance(item, list) and len(item) == 3 else (None, None, None)  # noqa: PLR2004  # name, dtype, shape
    if (
        not isinstance(name, str)
        or not 0 < len(name) <= MAX_NAME
        or not isinstance(dtype, str)
        or dtype not in DTYPE_BYTES
        or not isinstance(shape, list)
        or len(shape) > MAX_DIMENSIONS
        or not all(type(size) is int and 0 <= size <= _MAX_NUMBER for size in shape)
    ):
        raise ProtocolError("a frame lists something that is not a name, dtype and shape of a tensor", code="malformed")
    return TensorSpec(name, dtype, tuple(shape))
