"""A file that was planned may be cut or replaced before it is read: what is read must be what was planned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from splitlearn_core.checkpoint.header import read_header
from splitlearn_core.checkpoint.strategies.base import ReadPlan
from splitlearn_core.errors import InvalidCheckpointError, MissingFileError
from splitlearn_core.plan.splitplan import PlannedTensor
from splitlearn_core.types import SAFETENSORS, TensorInfo


def refuse_other_files(plan: ReadPlan) -> None:
    """Refuse safetensors files that do not hold the planned tensors in the planned places (any more).

    Asked before a file is read by offsets, and again after it.

    Raises:
        MissingFileError: One is gone.
        InvalidCheckpointError: One was cut, or replaced by another.
    """
    for shard, tensors in plan.by_shard().items():
        if tensors[0].info.format == SAFETENSORS:
            path = plan.paths[shard]
            if not path.exists():
                raise MissingFileError(f"{path} is not there any more", hint="fetch it anew, then load again")
            refuse_changed(path, read_header(path), tensors)


def refuse_changed(path: Path, found: Mapping[str, TensorInfo], tensors: Iterable[PlannedTensor]) -> None:
    """Refuse a file whose header is not the one that was planned with.

    Args:
        path: The file.
        found: The tensors that it holds by now.
        tensors: Those of it that are wanted.
    """
    for planned in tensors:
        if found.get(planned.info.key) != planned.info:
            raise InvalidCheckpointError(
                f"{path} was changed while it was being loaded: {planned.info.key} is not what and where it was",
                hint="load it again once it is written completely",
            )


def refuse_cut(path: Path, size: int, last: TensorInfo) -> None:
    """Refuse a file that ends by now before a tensor of it that was just mapped."""
    if size < last.end:
        raise InvalidCheckpointError(
            f"{path} was cut while it was being loaded: it ends at byte {size}, {last.key} at byte {last.end}",
            hint="load it again once it is written completely",
        )
