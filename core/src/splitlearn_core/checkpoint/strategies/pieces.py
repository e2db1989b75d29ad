"""Cutting planned bytes into pieces, each of which is read with one call."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from splitlearn_core.plan.splitplan import PlannedTensor
from splitlearn_core.types import DTYPE_BYTES

#: Stretches of one piece; the system reads into 1024 places at once.
MAX_SPANS = 512


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of one tensor, of whole elements."""

    planned: PlannedTensor
    #: First byte, counted from the beginning of the tensor.
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes that lie together in one file, of one tensor or of several neighbours."""

    shard: str
    #: First byte, counted from the beginning of the file.
    begin: int
    spans: tuple[Span, ...]

    @property
    def nbytes(self) -> int:
        return sum(span.nbytes for span in self.spans)


def cut(tensors: Iterable[PlannedTensor], size: int) -> list[Piece]:
    """Cut the bytes of tensors into pieces of at most a size, in the order of the files.

    Args:
        tensors: Of safetensors files.
        size: In bytes; a piece is larger only where one element is.
    """
    pieces: list[Piece] = []
    spans: list[Span] = []
    room, expected = 0, ("", -1)
    for planned in sorted(tensors, key=lambda tensor: (tensor.info.shard, tensor.info.begin)):
        info, start = planned.info, 0
        item = DTYPE_BYTES[info.dtype]
        while start < info.nbytes:
            here = (info.shard, info.begin + start)
            if here != expected or room < item or len(spans) == MAX_SPANS:
                _close(pieces, spans)
                room = max(size, item)
            nbytes = min(info.nbytes - start, room - room % item)
            spans.append(Span(planned, start, nbytes))
            start, room = start + nbytes, room - nbytes
            expected = (info.shard, info.begin + start)
    _close(pieces, spans)
    return pieces


def _close(pieces: list[Piece], spans: list[Span]) -> None:
    if spans:
        first = spans[0]
        pieces.append(Piece(first.planned.info.shard, first.planned.info.begin + first.start, tuple(spans)))
        spans.clear()
