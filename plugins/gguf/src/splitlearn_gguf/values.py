"""Read and dequantise tensors, a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
    heads: int,
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
        heads: The number of heads whose rows are reordered; 0 for none.
        dtype, device: The dtype and device of the result.
        on_bytes: Called with the number of bytes just read; it may raise to stop.

    Raises:
        InvalidCheckpointError: The file ends too early, or the rows do not belong to the heads.
    """
    import torch

    tensor = torch.empty(stored.shape, dtype=dtype, device=device)
    target = tensor.view(-1, stored.shape[-1])
    order = _order(str(file.name), stored, heads) if change in (Change.ORDER_QUERIES, Change.ORDER_KEYS) else None
    if order is not None and len(stored.shape) == 1:
        target = tensor.view(-1, 1)
    rows, row_bytes = target.shape[0], stored.nbytes // target.shape[0]
    step = max(1, CHUNK_ELEMENTS // target.shape[1])
    file.seek(stored.begin)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        values = torch.from_numpy(_dequantised(file, stored, count, row_bytes))
        if change is Change.SUBTRACT_ONE:
            values = values - 1
        if order is None:
            target[start : start + count].copy_(values)
        else:
            target[order[start : start + count].to(device)] = values.to(device=device, dtype=dtype)
        on_bytes(count * row_bytes)
    if change is Change.ROW and tensor.ndim == 1:
        return tensor[None]
    # A view, as in transformers: with another layout in memory, products differ in the last bit.
    return tensor.T if change is Change.TRANSPOSE else tensor


def join(pieces: Iterable[torch.Tensor], count: int, how: Join, shape: tuple[int, ...]) -> torch.Tensor:
    """Make one tensor of several, each of which is freed before the next is read.

    Args:
        pieces: The tensors, read one after the other.
        count: The number of them.
        how: The way in which they are parts of the whole.
        shape: The shape of the whole, which is contiguous.
    """
    import torch

    whole: torch.Tensor | None = None
    start = 0
    for number, piece in enumerate(pieces):
        if whole is None:
            whole = torch.empty(shape, dtype=piece.dtype, device=piece.device)
        if how is Join.IN_TURN:
            rows = whole.transpose(1, 2) if len(shape) == piece.ndim > 2 else whole  # noqa: PLR2004
            rows[:, number::count] = piece
            continue
        if how is Join.HEADS:
            part = piece.transpose(1, 2) if number == 0 else piece
            rows = whole.view(part.shape[0], -1, part.shape[2])
        else:
            part, rows = piece, whole
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


def _order(where: str, stored: StoredTensor, heads: int) -> torch.Tensor:
    """Return the row in Hugging Face's order for each stored row of queries or keys.

    llama.cpp rotates neighbouring rows of a head, Hugging Face row ``i`` with row ``i + half``.
    """
    import torch

    rows = stored.shape[0]
    if heads < 1 or rows % (2 * heads):
        raise InvalidCheckpointError(
            f"{where}: the {rows} rows of {stored.name!r} are not those of {heads} heads",
            hint="fetch or convert the file again",
        )
    half = rows // heads // 2
    # Where row (head, pair, side) of the file goes: (head, side, pair).
    return torch.arange(rows).view(heads, 2, half).transpose(1, 2).reshape(rows)
