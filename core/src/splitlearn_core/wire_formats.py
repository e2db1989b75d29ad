"""The encodings of tensors with fewer bits than their dtype: their layout. Pure.

Values are taken in blocks of :data:`BLOCK` along the last dimension, the last block of a row filled up with zeros. The
largest value of each block is kept as it is, since a few channels, and all positions' first one, are often a hundred
times larger than the rest; the others are whole multiples of one scale. In this order: the multiples (one byte each,
or two of them in a byte), the scales (bfloat16), the place of the largest value in its block (one byte), and its value
in the tensor's own dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

#: Values that share a scale.
BLOCK = 64
#: Name -> bits of a value.
ENCODINGS = {"int8": 8, "int4": 4}
#: How hidden states and gradients may be sent: without loss, or encoded.
RAW = "raw"
WIRES = (RAW, *ENCODINGS)
#: Bytes of a scale and of a place.
_SCALE_BYTES, _PLACE_BYTES = 2, 1


def block_count(shape: Sequence[int]) -> int:
    """Return the number of blocks of a tensor."""
    return math.prod(shape[:-1]) * -(-shape[-1] // BLOCK) if shape else 1


def section_bytes(encoding: str, shape: Sequence[int], item_bytes: int) -> tuple[int, int, int, int]:
    """Return the bytes of multiples, scales, places and largest values."""
    blocks = block_count(shape)
    return blocks * BLOCK * ENCODINGS[encoding] // 8, blocks * _SCALE_BYTES, blocks * _PLACE_BYTES, blocks * item_bytes


def encoded_bytes(encoding: str, shape: Sequence[int], item_bytes: int) -> int:
    """Return the bytes that a tensor takes in an encoding, or raw."""
    if encoding == RAW:
        return math.prod(shape) * item_bytes
    return sum(section_bytes(encoding, shape, item_bytes))
