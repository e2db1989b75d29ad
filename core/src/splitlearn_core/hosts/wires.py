"""Hidden states and gradients with fewer bits on their way: frames are encoded when they leave a side, and decoded when
they arrive, so that what makes and reads them does not know.

An encoded tensor is one of bytes in the frame, and ``encoded`` in meta says of it: name -> [dtype, shape]. ``wire`` is
the encoding of the request, and of its reply.
"""

from __future__ import annotations

import math
from typing import Any

from splitlearn_core.cuts.quantization import decode, encode
from splitlearn_core.errors import RemoteStepError
from splitlearn_core.hosts.payload import pack, unpack
from splitlearn_core.hosts.protocol import MAX_DIMENSIONS, Frame, TensorSpec
from splitlearn_core.types import DTYPE_BYTES, FLOAT_DTYPES, stored_dtype
from splitlearn_core.wire_formats import RAW, WIRES, encoded_bytes

#: The tensors that are encoded; others are masks, positions, states of generators and adapters.
_ENCODED = frozenset({"hidden_states", "output", "gradient", "gradient.hidden_states"})
_BYTE = "U8"
_FLOATS = frozenset(FLOAT_DTYPES.values())


def compressed(frame: Frame, wire: str) -> Frame:
    """Encode the hidden states and gradients of a frame."""
    chosen = [spec for spec in frame.tensors if spec.name in _ENCODED and spec.dtype in _FLOATS]
    if wire == RAW or not chosen:
        return frame
    tensors = unpack(frame)
    for spec in chosen:
        tensors[spec.name] = encode(tensors[spec.name], wire)
    specs, buffers = pack(tensors)
    meta = {**frame.meta, "wire": wire, "encoded": {spec.name: [spec.dtype, list(spec.shape)] for spec in chosen}}
    return Frame(frame.kind, frame.session, frame.step, meta, specs, buffers)


def expanded(frame: Frame, max_payload: int) -> Frame:
    """Decode the tensors of a frame.

    Args:
        frame: What arrived.
        max_payload: The most bytes that the tensors may take.

    Raises:
        RemoteStepError: What is said of them does not fit.
    """
    described, wire = frame.meta.get("encoded"), wire_of(frame)
    if described is None:
        return frame
    sizes = {spec.name: spec for spec in frame.tensors}
    if wire == RAW or not isinstance(described, dict) or not described.keys() <= sizes.keys() & _ENCODED:
        raise _unfit("names other tensors than the frame has")
    formats = {name: _checked(item, wire, sizes[name]) for name, item in described.items()}
    total = sum(math.prod(shape) * DTYPE_BYTES[dtype] for dtype, shape in formats.values())
    if total > max_payload:
        raise RemoteStepError(
            f"tensors of {total:,} bytes were sent with fewer bits, and {max_payload:,} are allowed",
            code="too_large",
            hint="send fewer tokens in one step, or raise the limit of the other side",
        )
    tensors = unpack(frame)
    for name, (dtype, shape) in formats.items():
        tensors[name] = decode(tensors[name], wire, shape, stored_dtype(dtype))
    specs, buffers = pack(tensors)
    meta = {name: value for name, value in frame.meta.items() if name != "encoded"}
    return Frame(frame.kind, frame.session, frame.step, meta, specs, buffers)


def shape_of(frame: Frame, name: str) -> tuple[int, ...]:
    """Return the shape that a tensor has once it is decoded; empty without such a tensor.

    Raises:
        RemoteStepError: What is said of it does not fit.
    """
    spec = next((spec for spec in frame.tensors if spec.name == name), None)
    described = frame.meta.get("encoded")
    if spec is None or not isinstance(described, dict) or name not in described:
        return () if spec is None else spec.shape
    return _checked(described[name], wire_of(frame), spec)[1]


def wire_of(frame: Frame) -> str:
    """Return the encoding of a frame.

    Raises:
        RemoteStepError: There is no such encoding.
    """
    wire = frame.meta.get("wire", RAW)
    if not isinstance(wire, str) or wire not in WIRES:
        raise _unfit(f"is {str(wire)[:50]!r}; there are {', '.join(WIRES)}")
    return wire


def _checked(item: Any, wire: str, spec: TensorSpec) -> tuple[str, tuple[int, ...]]:
    dtype, shape = item if isinstance(item, list) and len(item) == 2 else (None, None)  # noqa: PLR2004  # dtype and shape
    if (
        not isinstance(dtype, str)
        or dtype not in _FLOATS
        or not isinstance(shape, list)
        or not 0 < len(shape) <= MAX_DIMENSIONS
        or not all(type(size) is int and 0 < size < 2**40 for size in shape)
        or (spec.dtype, spec.shape) != (_BYTE, (encoded_bytes(wire, shape, DTYPE_BYTES[dtype]),))
    ):
        raise _unfit(f"has not the bytes of {spec.name} that it announces")
    return dtype, tuple(shape)


def _unfit(why: str) -> RemoteStepError:
    return RemoteStepError(f"the encoding of a frame {why}", code="bad_input")
