"""Reading under supervision: tensors are compared with the plan, files with what was planned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from splitlearn_core.checkpoint.safetensors_header import read_header
from splitlearn_core.errors import BrokenPluginError, InvalidCheckpointError, MissingFileError, SplitLearnError
from splitlearn_core.loading_strategy import BUILT_IN_NAMES, LoadingStrategy, ReadPlan, torch_dtype
from splitlearn_core.plan.splitplan import PlannedTensor
from splitlearn_core.quoting import said
from splitlearn_core.types import FLOAT_DTYPES, SAFETENSORS, TensorInfo

if TYPE_CHECKING:
    import torch


def predicted_bytes(strategy: LoadingStrategy, plan: ReadPlan) -> int:
    """Ask a strategy for the memory it takes; raises BrokenPluginError where it cannot say."""
    with _blaming(strategy):
        return int(strategy.anonymous_bytes(plan))


def passing_bytes(strategy: LoadingStrategy, plan: ReadPlan) -> int:
    """Ask a strategy how much of :func:`predicted_bytes` it gives back once the read is over.

    A strategy says so in a method ``passing_bytes(plan)``; one without it keeps all that it takes.
    """
    tell = getattr(strategy, "passing_bytes", None)
    if tell is None:
        return 0
    with _blaming(strategy):
        return int(tell(plan))


def read_checked(strategy: LoadingStrategy, plan: ReadPlan) -> Iterator[tuple[PlannedTensor, torch.Tensor]]:
    """Read by a strategy, and hold what it yields against the plan.

    Raises:
        BrokenPluginError: It raised, or yielded other tensors than were planned.
        CheckpointError: A file is not what it has to be.
    """
    import torch

    wanted = {planned.module_key: planned for planned in plan.tensors}
    target, device = torch_dtype(plan.dtype), torch.device(plan.device).type
    with _blaming(strategy):
        for planned, tensor in strategy.read(plan):
            if wanted.pop(planned.module_key, None) is None:
                raise _broken(strategy, f"it yielded {planned.module_key}, which is not or no longer wanted")
            if not isinstance(tensor, torch.Tensor):
                raise _broken(strategy, f"it yielded {type(tensor).__name__} for {planned.module_key}, no tensor")
            floating = planned.info.dtype in FLOAT_DTYPES.values()
            expected = (planned.info.shape, target if floating else tensor.dtype)
            if (tuple(tensor.shape), tensor.dtype) != expected:
                got = f"{tensor.dtype} of shape {list(tensor.shape)}"
                raise _broken(strategy, f"it yielded {got} for {planned.module_key}, not {plan.dtype} as planned")
            if tensor.device.type != device:
                raise _broken(strategy, f"it yielded {planned.module_key} on {tensor.device}, not on {plan.device}")
            yield planned, tensor
    if wanted:
        raise _broken(strategy, f"it left out {len(wanted)} tensors: {', '.join(sorted(wanted)[:5])}")


@contextmanager
def _blaming(strategy: LoadingStrategy) -> Iterator[None]:
    """Let what a plugin's strategy raises say whose it is; core's own raise as they do."""
    try:
        yield
    except SplitLearnError:
        raise
    # A strategy of a plugin is foreign code, and a broken one must be named.
    except Exception as error:
        if strategy.name in BUILT_IN_NAMES:
            raise
        raise _broken(strategy, f"it raised {said(error)}") from error


def _broken(strategy: LoadingStrategy, why: str) -> BrokenPluginError:
    return BrokenPluginError(
        f"loading strategy {strategy.name!r} ({type(strategy).__module__}) is broken: {why}",
        hint="report it to its authors; strategy='mapped' or 'copied' does without it",
    )


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
