"""Fresh memory for weights: in huge pages where the system has them, and given back tensor by tensor."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: Bytes of a huge page; what is smaller shares a block with its like.
HUGE = 2 * 2**20
#: Where a tensor begins by itself: at the beginning of a cache line, as torch's own do.
ALIGNMENT = 64


def aligned(nbytes: int) -> int:
    """Round up to where the next tensor may begin."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def fresh_memory(sizes: Iterable[int], phases: Iterable[int] = ()) -> list[torch.Tensor]:
    """Return memory of the wanted sizes in bytes, as flat tensors of bytes; nothing of it is touched yet.

    Each large one is a block of its own, so that the memory of a tensor that is replaced or
    converted goes back at once. The small ones share a block, which lives as long as any of them.
    Each has a storage of its own size nevertheless: what saves a tensor saves all of its storage.

    Args:
        sizes: The sizes.
        phases: How many bytes after the beginning of a cache line each begins; by default there. Products of one
            row differ in the last bit by it, and ``from_pretrained`` leaves tensors where they are in their file.
    """
    import torch

    wanted = list(sizes)
    begins = list(phases) or [0] * len(wanted)
    places = list(zip(wanted, begins, strict=True))
    small = [aligned(phase + nbytes) for nbytes, phase in places if nbytes < HUGE]
    shared, position = _block(sum(small)).untyped_storage(), 0
    found = []
    for nbytes, phase in places:
        if nbytes >= HUGE:
            block, start = _block(phase + nbytes).untyped_storage(), phase
        else:
            block, start = shared, position + phase
            position += aligned(phase + nbytes)
        found.append(torch.empty(0, dtype=torch.uint8).set_(block[start : start + nbytes]))
    return found


def _block(nbytes: int) -> torch.Tensor:
    import torch

    if sys.platform != "linux" or nbytes < HUGE:
        return torch.empty(nbytes, dtype=torch.uint8)
    # One huge page more than needed, to begin where one begins; what is not touched takes no memory.
    try:
        block = mmap.mmap(-1, nbytes + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{nbytes} bytes for a tensor: {error}") from error
    start = -ctypes.addressof(ctypes.c_char.from_buffer(block)) % HUGE
    # The end that does not fill a huge page is left out: half of one would be wasted there on average.
    with suppress(OSError):  # a kernel without them: ordinary pages do
        block.madvise(mmap.MADV_HUGEPAGE, start, nbytes - nbytes % HUGE)
    return torch.frombuffer(block, dtype=torch.uint8, count=nbytes, offset=start)
