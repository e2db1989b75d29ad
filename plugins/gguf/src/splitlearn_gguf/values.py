"""Read and dequantise tensors, a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from io import FileIO
from typing import TYPE_CHECKING, Any

from splitlearn_core import InvalidCheckpointError
from splitlearn_gguf.architectures import Change, Join
from splitlearn_gguf.header import StoredTensor

if TYPE_CHECKING:
    import torch

#: Elements that are dequantised at a time.
CHUNK_ELEMENTS = 2**20
#: Bytes that dequantising takes for each element of a chunk: blocks, float32 values, and numpy's
#: intermediate arrays, the most for types with a table of values.
WORKING_BYTES = 32
#: Steps from a logarithm to its neighbours, one of which has the very exponential that is wanted.
_STEPS = (1, -1, 2, -2)


@dataclass(frozen=True, slots=True)
class Exchange:
    """Rows, or columns, that are counted by two dimensions, of which a file has the other first."""

    #: The sizes of what is before the two, of both as Hugging Face has them, and of what is after them.
    sizes: tuple[int, int, int, int]
    #: The first of these rows; those before it are in order.
    start: int = 0
    columns: bool = False

    def order(self) -> torch.Tensor:
        """Return the place in Hugging Face's order of each stored row."""
        import torch

        exchanged = torch.arange(math.prod(self.sizes)).view(self.sizes).transpose(1, 2).flatten()
        return torch.cat((torch.arange(self.start), exchanged + self.start))


def can_dequantise(number: int) -> bool:
    """Return whether the gguf library can dequantise a type; there are some that it can only store."""
    import numpy as np
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType(number)
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def read_tensor(
    file: FileIO,
    stored: StoredTensor,
    change: Change,
    exchange: Exchange | None,
    *,
    dtype: torch.dtype,
    device: str,
    on_bytes: Callable[[int], None],
) -> torch.Tensor:
    """Read one tensor, dequantise it, and undo what the converter did to it.

    Values are dequantised and changed in float32 and converted last, as transformers does.

    Args:
        file: The open file.
        stored: Its place in the file.
        change: The change to undo.
        exchange: What goes back to Hugging Face's order; None for nothing.
        dtype, device: The dtype and device of the result.
        on_bytes: Called with the number of bytes just read; it may raise to stop.

    Raises:
        InvalidCheckpointError: The file ends too early, or its values are not what the converter makes.
    """
    import torch

    tensor = torch.empty(stored.shape, dtype=dtype, device=device)
    target = tensor.view(-1, stored.shape[-1])
    order = None if exchange is None else exchange.order().to(device)
    # A vector is read as a row.
    columns = exchange is not None and (exchange.columns or len(stored.shape) == 1)
    rows, row_bytes = target.shape[0], stored.nbytes // target.shape[0]
    step = max(1, CHUNK_ELEMENTS // target.shape[1])
    file.seek(stored.begin)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        values = torch.from_numpy(_dequantised(file, stored, count, row_bytes))
        if change is Change.SUBTRACT_ONE:
            values = values - 1
        if change in (Change.LOGARITHM, Change.EXPONENT):
            values = _logarithms(values, change, f"{file.name}: {stored.name!r}")
        if order is None:
            target[start : start + count].copy_(values)
        elif columns:
            target[start : start + count, order] = values.to(device=device, dtype=dtype)
        else:
            target[order[start : start + count]] = values.to(device=device, dtype=dtype)
        on_bytes(count * row_bytes)
    if change is Change.ROW and tensor.ndim == 1:
        return tensor[None]
    if change is Change.CHANNELS and tensor.ndim == 2:  # noqa: PLR2004  # channels and width
        return tensor.unsqueeze(1)
    # A view, as in transformers: with another layout in memory, products differ in the last bit.
    return tensor.T if change is Change.TRANSPOSE else tensor


def join(
    pieces: Iterable[torch.Tensor], count: int, how: Join, shape: tuple[int, ...], groups: int = 1
) -> torch.Tensor:
    """Make one tensor of several, each of which is freed before the next is read.

    Args:
        pieces: The tensors, read one after the other.
        count: The number of them.
        how: The way in which they are parts of the whole.
        shape: The shape of the whole, which is contiguous.
        groups: The number of key heads, by which the rows of linear attention are divided.
    """
    import torch

    whole: torch.Tensor | None = None
    start = 0
    for number, piece in enumerate(pieces):
        if whole is None:
            whole = torch.empty(shape, dtype=piece.dtype, device=piece.device)
        if how is Join.KEY_HEADS:
            _place_heads(whole.view(groups, -1, shape[1]), piece, shape[0], is_gate=number > 0)
            continue
        part, rows = piece, whole
        if how is Join.HEADS:
            part = piece.transpose(1, 2) if number == 0 else piece
            rows = whole.view(part.shape[0], -1, part.shape[2])
        elif how is not Join.ROWS and len(shape) == piece.ndim > 2:  # noqa: PLR2004  # experts, and a matrix of each
            rows = whole.transpose(1, 2)
        if how is Join.IN_TURN:
            rows[:, number::count] = part
        else:
            rows[:, start : start + part.shape[1]] = part
            start += part.shape[1]
    if whole is None:
        raise ValueError("there are no pieces")
    return whole


def _dequantised(file: FileIO, stored: StoredTensor, rows: int, row_bytes: int) -> Any:
    import numpy as np
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    blocks = np.empty((rows, row_bytes), np.uint8)
    # Not mapped: a file that is truncated meanwhile is then an error, and does not kill the process.
    rest = blocks.data.cast("B")
    while rest and (taken := file.readinto(rest)):
        rest = rest[taken:]
    if rest:
        raise InvalidCheckpointError(
            f"{file.name} ends in {stored.name!r}, {len(rest)} bytes too early",
            hint="is it still being written or downloaded?",
        )
    return dequantize(blocks, GGMLQuantizationType(stored.type))


def _place_heads(heads: torch.Tensor, piece: torch.Tensor, rows: int, *, is_gate: bool) -> None:
    """Put the rows of queries, keys and values, or of the gates, where each key head has them.

    Args:
        heads: The whole, ``[key heads, rows of a head, columns]``.
        piece: ``[rows, columns]``, first of all queries, then of all keys, then of all values; or of all gates.
        rows: Of the whole; it has as many of gates as of values.
        is_gate: Whether it is the piece with the gates.
    """
    groups, _, columns = heads.shape
    gates = piece.shape[0] if is_gate else rows - piece.shape[0]
    first, last = (rows - 2 * gates) // 2 // groups, gates // groups
    if is_gate:
        heads[:, 2 * first + last :] = piece.view(groups, last, columns)
        return
    begin = 0
    for place, size in ((0, first), (first, first), (2 * first, last)):
        heads[:, place : place + size] = piece[begin : begin + groups * size].view(groups, size, columns)
        begin += groups * size


def _logarithms(stored: torch.Tensor, change: Change, where: str) -> torch.Tensor:
    """Return numbers whose exponentials are the negative of these.

    The converter has computed ``-exp(number)`` in float32, and so does the model. A logarithm in float32 may have
    another exponential. For ``Change.EXPONENT``, it is the shortest number that has this one, if there is any: of a
    checkpoint in bfloat16 the one that was there.

    Raises:
        InvalidCheckpointError: Not all of these are below 0.
    """
    import torch

    if not bool((stored < 0).all()) or not bool(stored.isfinite().all()):
        raise InvalidCheckpointError(
            f"{where} has values that are no negative exponentials", hint="fetch or convert the file again"
        )
    wanted = -stored
    if change is Change.LOGARITHM:
        return wanted.log()
    exact = wanted.double().log().float()
    next_one = torch.nextafter(exact, torch.full_like(exact, math.inf))
    # The exponentials of closer neighbours are the same.
    step = (next_one - exact).clamp(min=2**-25)
    result, found = exact.clone(), torch.zeros_like(exact, dtype=torch.bool)
    for number in (exact.bfloat16().float(), exact.half().float(), exact, *(exact + n * step for n in _STEPS)):
        fits = ~found & (number.exp() == wanted)
        result[fits] = number[fits]
        found |= fits
    return result
