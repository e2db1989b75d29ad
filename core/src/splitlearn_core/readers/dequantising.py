"""Quantised tensors from their numbers and scales, by rows, with the arithmetic of transformers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from splitlearn_core.plan.quantised import MXFP4, QuantisedTensor
from splitlearn_core.plan.splitplan import PlannedTensor
from splitlearn_core.types import DTYPE_BYTES, FLOAT_DTYPES

if TYPE_CHECKING:
    import torch

#: Values that are computed at a time, and the most bytes that this takes for each.
_VALUES, _BYTES = 2**18, 32
#: The values of 4-bit floats: sign, two bits of exponent, one of mantissa.
_FOUR_BITS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
#: The bias of exponents that are stored as bytes.
_BIAS = 127


def slabs(tensor: QuantisedTensor) -> Iterator[tuple[int, int]]:
    """Yield the first index and the length of parts along the first dimension."""
    length, step = tensor.shape[0], _slab_length(tensor)
    for first in range(0, length, step):
        yield first, min(step, length - first)


def _slab_length(tensor: QuantisedTensor) -> int:
    return min(tensor.shape[0], max(1, _VALUES // math.prod(tensor.shape[1:])))


def dequantising_bytes(tensors: Iterable[PlannedTensor], dtype: str) -> int:
    """Return the memory in bytes that dequantising takes besides the results, in a dtype (torch's name)."""
    return max(
        (
            _slab_length(tensor) * math.prod(tensor.shape[1:]) * DTYPE_BYTES[FLOAT_DTYPES[planned.kept_dtype or dtype]]
            + max(_VALUES, tensor.shape[-1]) * _BYTES
            for planned in tensors
            if (tensor := planned.quantised) is not None
        ),
        default=0,
    )


def dequantise(
    tensor: QuantisedTensor,
    numbers: torch.Tensor,
    scales: torch.Tensor,
    slab: tuple[int, int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return a part of a quantised tensor, on the CPU.

    Args:
        tensor: What it is.
        numbers: As in the file.
        scales: As in the file.
        slab: The first index and the length of the part along the first dimension.
        dtype: Of the result.
    """
    import torch

    first, length = slab
    columns, inner = tensor.shape[-1], math.prod(tensor.shape[1:-1])
    result = torch.empty((length, *tensor.shape[1:]), dtype=dtype)
    rows, begin, step = result.view(-1, columns), first * inner, max(1, _VALUES // columns)
    compute = _four_bits if tensor.method == MXFP4 else _eight_bits
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        compute(tensor, numbers, scales, begin + start, part)
    return result


def _four_bits(
    tensor: QuantisedTensor, numbers: torch.Tensor, scales: torch.Tensor, first: int, out: torch.Tensor
) -> None:
    import torch

    count, blocks, size = len(out), *numbers.shape[-2:]
    part = numbers.view(-1, blocks * size)[first : first + count]
    exponents = scales.view(-1, blocks)[first : first + count].to(torch.int32) - _BIAS
    values = torch.tensor(_FOUR_BITS, dtype=torch.promote_types(out.dtype, torch.float32))
    whole = torch.empty(count, blocks * size, 2, dtype=values.dtype)
    whole[..., 0] = values[(part & 15).to(torch.int32)]
    whole[..., 1] = values[(part >> 4).to(torch.int32)]
    whole = whole.view(count, blocks, 2 * size)
    out.copy_(torch.ldexp(whole, exponents.unsqueeze(-1)).view(out.shape))


def _eight_bits(
    tensor: QuantisedTensor, numbers: torch.Tensor, scales: torch.Tensor, first: int, out: torch.Tensor
) -> None:
    import torch

    (rows, columns), (height, width) = tensor.shape[-2:], tensor.block
    down, across = -(-rows // height), -(-columns // width)
    # The number of each row among the rows of all matrices, and below, that of its scales among all rows of scales.
    number = torch.arange(first, first + len(out))
    flat = scales.reshape(-1, across)
    # One scale may be that of several matrices.
    grid = flat.expand(len(out), -1) if len(flat) == 1 else flat[number // rows * down + number % rows // height]
    # Scales that are bytes are exponents.
    grid = (grid.float() - _BIAS).exp2() if grid.dtype == torch.uint8 else grid.float()
    expanded = grid.repeat_interleave(width, dim=1)[:, :columns]
    values = numbers.view(-1, columns)[first : first + len(out)].float() * expanded
    out.copy_(values.to(scales.dtype) if tensor.rounds else values)
