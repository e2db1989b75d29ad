"""Checks around a read: yielded tensors are compared with the plan, and files with the headers planned with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from splitlearn_core.checkpoint.safetensors_header import read_header
from splitlearn_core.errors import BrokenPluginError, InvalidCheckpointError, MissingFileError, translate
from splitlearn_core.loading_strategy import BUILT_IN_NAMES, LoadingStrategy, ReadPlan, torch_dtype
from splitlearn_core.plan.splitplan import PlannedTensor
from splitlearn_core.quoting import said
from splitlearn_core.types import FLOAT_DTYPES, SAFETENSORS, TensorInfo

if TYPE_CHECKING:
    import torch


def predicted_bytes(strategy: LoadingStrategy, plan: ReadPlan) -> int:
    """Return the memory in bytes that a strategy predicts for a read; raises BrokenPluginError if that fails."""
    with _strategy_errors(strategy):
        return int(strategy.anonymous_bytes(plan))


def passing_bytes(strategy: LoadingStrategy, plan: ReadPlan) -> int:
    """Return how many bytes of :func:`predicted_bytes` a strategy frees after the read.

    It is the result of its method ``passing_bytes(plan)``, or 0 without one.
    """
    method = getattr(strategy, "passing_bytes", None)
    if method is None:
        return 0
    with _strategy_errors(strategy):
        return int(method(plan))


def read_checked(strategy: LoadingStrategy, plan: ReadPlan) -> Iterator[tuple[PlannedTensor, torch.Tensor]]:
    """Read with a strategy, and compare each tensor that it yields with the plan.

    Raises:
        BrokenPluginError: It raised, or yielded other tensors than were planned.
        CheckpointError: A file is invalid, or was changed.
    """
    import torch

    wanted = {planned.module_key: planned for planned in plan.tensors}
    target, device = torch_dtype(plan.dtype), torch.device(plan.device).type
    with _strategy_errors(strategy):
        for planned, tensor in strategy.read(plan):
            if wanted.pop(planned.module_key, None) is None:
                raise _broken(strategy, f"it yielded {planned.module_key}, which is not or no longer wanted")
            if not isinstance(tensor, torch.Tensor):
                raise _broken(strategy, f"it yielded {type(tensor).__name__} for {planned.module_key}, no tensor")
            floating = planned.info.dtype in FLOAT_DTYPES.values()
            expected = (planned.info.shape, target if floating else tensor.dtype)
            if (tuple(tensor.shape), tensor.dtype) != expected:
                actual = f"{tensor.dtype} of shape {list(tensor.shape)}"
                raise _broken(strategy, f"it yielded {actual} for {planned.module_key}, not {plan.dtype} as planned")
            if tensor.device.type != device:
                raise _broken(strategy, f"it yielded {planned.module_key} on {tensor.device}, not on {plan.device}")
            yield planned, tensor
    if wanted:
        raise _broken(strategy, f"it left out {len(wanted)} tensors: {', '.join(sorted(wanted)[:5])}")


def _strategy_errors(strategy: LoadingStrategy) -> AbstractContextManager[None]:
    """Translate what a plugin's strategy raises into an error that names it; core's own raise their errors."""
    is_own = strategy.name in BUILT_IN_NAMES
    return translate(lambda error: None if is_own else _broken(strategy, f"it raised {said(error)}"))


def _broken(strategy: LoadingStrategy, why: str) -> BrokenPluginError:
    return BrokenPluginError(
        f"loading strategy {strategy.name!r} ({type(strategy).__module__}) is broken: {why}",
        hint="report it to its authors; strategy='mapped' or 'copied' does without it",
    )


def refuse_other_files(plan: ReadPlan) -> None:
    """Refuse safetensors files that do not hold the planned tensors at the planned offsets (any longer).

    Called before a file is read by offsets, and again afterwards.

    Raises:
        MissingFileError: A file is missing.
        InvalidCheckpointError: A file was truncated or replaced.
    """
    for shard, tensors in plan.by_shard().items():
        if tensors[0].info.format == SAFETENSORS:
            path = plan.paths[shard]
            if not path.exists():
                raise MissingFileError(f"{path} no longer exists", hint="fetch it again, then load again")
            refuse_changed(path, read_header(path), tensors)


def refuse_changed(path: Path, header: Mapping[str, TensorInfo], tensors: Iterable[PlannedTensor]) -> None:
    """Refuse a file whose header differs from the one that was planned with.

    Args:
        path: The file.
        header: The tensors that it holds now.
        tensors: The planned tensors of the file.
    """
    for planned in tensors:
        if header.get(planned.info.key) != planned.info:
            raise InvalidCheckpointError(
                f"{path} was changed while it was being loaded: {planned.info.key} has another dtype, shape or offset",
                hint="load it again once it is written completely",
            )


def refuse_cut(path: Path, size: int, last: TensorInfo) -> None:
    """Refuse a file that now ends before a tensor of it that was just mapped."""
    if size < last.end:
        raise InvalidCheckpointError(
            f"{path} was cut while it was being loaded: it ends at byte {size}, {last.key} at byte {last.end}",
            hint="load it again once it is written completely",
        )
