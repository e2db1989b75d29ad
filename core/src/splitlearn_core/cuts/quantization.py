"""The encodings of ``wire_formats``, in plain torch on the CPU: equal bits for equal input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from splitlearn_core.wire_formats import BLOCK, ENCODINGS, section_bytes

_HALF_BYTE = 16


def encode(tensor: torch.Tensor, encoding: str) -> torch.Tensor:
    """Return the encoded bytes of a floating tensor, on the CPU."""
    blocks = _blocks(tensor.detach().cpu().contiguous())
    most = 2 ** (ENCODINGS[encoding] - 1) - 1
    places = blocks.abs().argmax(-1, keepdim=True)
    largest = blocks.gather(-1, places)
    rest = blocks.scatter(-1, places, 0).float()
    # Rounded up, so that no value exceeds the largest multiple.
    scales = (rest.abs().amax(-1, keepdim=True) / most * (1 + 2**-8)).to(torch.bfloat16)
    multiples = torch.where(scales > 0, rest / scales.float(), 0).round().clamp(-most, most).nan_to_num()
    codes = multiples.to(torch.int8)
    if encoding == "int4":
        pairs = (codes + _HALF_BYTE // 2).to(torch.uint8).reshape(-1, BLOCK // 2, 2)
        codes = (pairs[..., 0] + _HALF_BYTE * pairs[..., 1]).to(torch.uint8)
    return torch.cat([_bytes(part) for part in (codes, scales, places.to(torch.uint8), largest)])


def decode(data: torch.Tensor, encoding: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return the tensor of encoded bytes, whose length is that of ``wire_formats.encoded_bytes``."""
    sections = torch.split(data, list(section_bytes(encoding, shape, dtype.itemsize)))
    codes, scales, places, largest = (section.clone() for section in sections)
    if encoding == "int4":
        codes = torch.stack((codes % _HALF_BYTE, codes // _HALF_BYTE), -1).to(torch.int8) - _HALF_BYTE // 2
    multiples = codes.view(torch.int8).reshape(-1, BLOCK).float()
    values = (multiples * scales.view(torch.bfloat16).float()[:, None]).to(dtype)
    # A corrupt position must not point outside its block.
    values.scatter_(-1, (places.long() % BLOCK)[:, None], largest.view(dtype)[:, None])
    width = shape[-1] if shape else 1
    rows = values.reshape(-1, -(-width // BLOCK) * BLOCK) if width else values.reshape(-1, 0)
    values = rows[:, :width].reshape(tuple(shape))
    return values.contiguous()


def quantized(tensor: torch.Tensor, encoding: str) -> torch.Tensor:
    """Return the values that a receiver decodes from a tensor sent in this encoding."""
    return decode(encode(tensor, encoding), encoding, tensor.shape, tensor.dtype).to(tensor.device)


def _blocks(tensor: torch.Tensor) -> torch.Tensor:
    rows = tensor.reshape(-1, tensor.shape[-1] if tensor.dim() else 1)
    return pad(rows, (0, -rows.shape[1] % BLOCK)).reshape(-1, BLOCK)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
