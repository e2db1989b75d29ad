"""Planned bytes become the tensors of built components."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from splitlearn_core.checkpoint.strategy import (
    LoadingStrategy,
    ReadPlan,
    read_checked,
)
from splitlearn_core.plan.splitplan import (
    SplitPlan,
)
from splitlearn_core.types import Component, Progress, ProgressCallback, TensorInfo
from splitlearn_core.units import human_bytes

if TYPE_CHECKING:
    from splitlearn_core.build.component import ComponentModel

log = logging.getLogger(__name__)


def read_all(
    plan: SplitPlan,
    reads: Mapping[Component, ReadPlan],
    built: Mapping[Component, ComponentModel],
    strategies: Mapping[Component, LoadingStrategy],
    progress: ProgressCallback,
) -> None:
    from splitlearn_core.build.assemble import assign_tensor, finish

    count = _Count(progress, sum(read.nbytes for read in reads.values()))
    held: dict[tuple[str, str, str], Any] = {}
    for part in plan.components:
        component, read, strategy = part.component, reads[part.component], strategies[part.component]
        own = {planned.module_key for planned in read.tensors}
        where = ", ".join(sorted({str(path.parent) for path in read.paths.values()}))
        files, size = len(read.by_shard()), human_bytes(read.nbytes)
        log.info("Loading weights of %s: %s of %d files in %s (%s)", component, size, files, where, strategy.name)
        modules = dict(built[component].named_modules())
        count.begin(component, read)
        for planned, tensor in read_checked(strategy, replace(read, on_bytes=count.chunk)):
            held[planned.info.key, read.device, read.dtype] = assign_tensor(modules, planned.module_key, tensor)
            count.tensor(planned.info)
        for planned in part.tensors:
            if planned.module_key not in own:
                assign_tensor(modules, planned.module_key, held[planned.info.key, read.device, read.dtype])
        finish(built[component], read.device)


class _Count:
    """Bytes read so far, told by tensors and, within large ones, by chunks. It never goes back."""

    def __init__(self, progress: ProgressCallback, total: int) -> None:
        self._progress = progress
        self._total = total
        self._component: Component | None = None
        #: Shards of the tensors that are still to come, in the order of the files.
        self._coming: Iterator[str] = iter(())
        self._shard = ""
        #: Bytes of whole tensors, bytes of the one at work, and what was told last.
        self._whole = self._part = self._told = 0

    def begin(self, component: Component, read: ReadPlan) -> None:
        self._component = component
        self._coming = iter([shard for shard, tensors in read.by_shard().items() for _ in tensors])
        self._shard = next(self._coming, "")

    def chunk(self, nbytes: int) -> None:
        self._part += nbytes
        self._tell(self._shard)

    def tensor(self, info: TensorInfo) -> None:
        # Chunks of tensors that are still to come stay counted.
        self._whole, self._part = self._whole + info.nbytes, max(0, self._part - info.nbytes)
        self._shard = next(self._coming, info.shard)
        self._tell(info.shard)

    def _tell(self, shard: str) -> None:
        # A strategy that reads ahead counts chunks of tensors to come.
        self._told = max(self._told, min(self._whole + self._part, self._total))
        self._progress(Progress("reading", self._component, self._told, self._total, shard))
