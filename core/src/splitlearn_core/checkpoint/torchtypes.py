"""torch's dtypes by the names that the safetensors format has for them."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@cache
def dtype_names() -> dict[torch.dtype, str]:
    """Return the safetensors format's name of each dtype that it knows."""
    import torch

    return {
        torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8",
        torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e8m0fnu: "F8_E8M0",
        torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
        torch.int16: "I16", torch.uint16: "U16", torch.float16: "F16", torch.bfloat16: "BF16",
        torch.int32: "I32", torch.uint32: "U32", torch.float32: "F32",
        torch.complex64: "C64", torch.float64: "F64", torch.int64: "I64", torch.uint64: "U64",
    }  # fmt: skip


@cache
def stored_dtype(name: str) -> torch.dtype:
    """Return torch's dtype of the safetensors format's name."""
    return next(dtype for dtype, known in dtype_names().items() if known == name)
