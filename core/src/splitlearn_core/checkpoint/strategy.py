"""Loading strategies: how planned bytes become tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from splitlearn_core.errors import BrokenPluginError, ConfigurationError, InvalidCheckpointError, SplitLearnError
from splitlearn_core.plan.splitplan import PlannedTensor, loaded_nbytes
from splitlearn_core.types import FLOAT_DTYPES

if TYPE_CHECKING:
    import torch

AUTO = "auto"

#: Bytes of a large tensor that are copied at a time, so that a load can say how far it is, and be
#: stopped, in the middle of one.
CHUNK_BYTES = 8 * 2**20


def _untold(_: int) -> None:
    """Count nothing."""


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """What is to be read: tensors, the files they are in, and how they are wanted."""

    tensors: tuple[PlannedTensor, ...]
    #: Shard -> path of the file on this machine.
    paths: Mapping[str, Path]
    #: torch's name of the device.
    device: str
    #: torch's name of the dtype that floating tensors take on.
    dtype: str
    #: Told how many more bytes of a tensor were read, while that takes long; whole tensors are
    #: counted when they are yielded. It raises where the load is to stop: let that through.
    on_bytes: Callable[[int], None] = field(default=_untold, compare=False, repr=False)

    @property
    def nbytes(self) -> int:
        return sum(tensor.info.nbytes for tensor in self.tensors)

    def needs_conversion(self, tensor: PlannedTensor) -> bool:
        """Say whether a tensor is stored in another floating dtype than the wanted one."""
        return tensor.info.dtype in FLOAT_DTYPES.values() and tensor.info.dtype != FLOAT_DTYPES[self.dtype]

    def by_shard(self) -> dict[str, list[PlannedTensor]]:
        shards: dict[str, list[PlannedTensor]] = {}
        for tensor in self.tensors:
            shards.setdefault(tensor.info.shard, []).append(tensor)
        return shards


@runtime_checkable
class LoadingStrategy(Protocol):
    """One way of turning planned bytes into tensors. Plugins may add others."""

    #: The name under which a caller asks for it.
    name: str

    def refusal(self, plan: ReadPlan) -> str:
        """Say why this plan cannot be read this way, or nothing."""

    def anonymous_bytes(self, plan: ReadPlan) -> int:
        """Predict the memory of this machine that the read takes and keeps, file pages left out."""

    def read(self, plan: ReadPlan) -> Iterator[tuple[PlannedTensor, torch.Tensor]]:
        """Yield every planned tensor once, on the plan's device and in its dtype."""


class MappedStrategy:
    """Views of the mapped file: nothing is copied, pages are shared between processes.

    Tensors that are stored in another dtype are converted, and only those take memory.
    """

    name = "mapped"

    def refusal(self, plan: ReadPlan) -> str:
        return "" if plan.device == "cpu" else f"file pages cannot be tensors on {plan.device}"

    def anonymous_bytes(self, plan: ReadPlan) -> int:
        return sum(loaded_nbytes(t, plan.dtype) for t in plan.tensors if plan.needs_conversion(t))

    def read(self, plan: ReadPlan) -> Iterator[tuple[PlannedTensor, torch.Tensor]]:
        for planned, view in _views(plan):
            yield planned, _copy(plan, view, _torch_dtype(plan.dtype)) if plan.needs_conversion(planned) else view


class CopiedStrategy:
    """Tensors in memory of their own, on any device and in any dtype."""

    name = "copied"

    def refusal(self, plan: ReadPlan) -> str:
        return ""

    def anonymous_bytes(self, plan: ReadPlan) -> int:
        kept = sum(loaded_nbytes(tensor, plan.dtype) for tensor in plan.tensors)
        return kept if plan.device == "cpu" else 0

    def read(self, plan: ReadPlan) -> Iterator[tuple[PlannedTensor, torch.Tensor]]:
        for planned, view in _views(plan):
            floating = planned.info.dtype in FLOAT_DTYPES.values()
            dtype = _torch_dtype(plan.dtype) if floating else view.dtype
            yield planned, _copy(plan, view, dtype)


#: Core's own, in the order in which ``auto`` tries them.
BUILT_IN: tuple[LoadingStrategy, ...] = (MappedStrategy(), CopiedStrategy())


def reserved_names() -> tuple[str, ...]:
    """Return the names that no added strategy may take."""
    return (AUTO, *(strategy.name for strategy in BUILT_IN))


def check_strategy(asked: str, added: Iterable[LoadingStrategy] = ()) -> dict[str, LoadingStrategy]:
    """Return the known strategies by name, refusing a name that is none of them.

    Raises:
        ConfigurationError: No strategy of that name.
    """
    known = {strategy.name: strategy for strategy in (*BUILT_IN, *added)}
    if asked not in (AUTO, *known):
        raise ConfigurationError(
            f"there is no loading strategy {asked!r}", hint=f"choose from {', '.join((AUTO, *known))}"
        )
    return known


def choose_strategy(
    asked: str, plans: Sequence[ReadPlan], added: Iterable[LoadingStrategy] = (), preferred: str = ""
) -> LoadingStrategy:
    """Choose how to read: what the caller asked, else what the family prefers, else the cheapest.

    Raises:
        ConfigurationError: No strategy of that name, or it refuses the plan; the reason is given.
    """
    known = check_strategy(asked, added)
    if asked != AUTO:
        refusal = next(filter(None, map(known[asked].refusal, plans)), "")
        if refusal:
            raise ConfigurationError(f"loading strategy {asked!r} cannot do this: {refusal}", hint=f"try {AUTO!r}")
        return known[asked]
    candidates = [known[preferred]] if preferred in known else []
    for strategy in (*candidates, *BUILT_IN):
        if not any(strategy.refusal(plan) for plan in plans):
            return strategy
    raise ConfigurationError("no loading strategy can read this plan")


def predicted_bytes(strategy: LoadingStrategy, plan: ReadPlan) -> int:
    """Ask a strategy for the memory it takes; raises BrokenPluginError where it cannot say."""
    with _blaming(strategy):
        return int(strategy.anonymous_bytes(plan))


def read_checked(strategy: LoadingStrategy, plan: ReadPlan) -> Iterator[tuple[PlannedTensor, torch.Tensor]]:
    """Read by a strategy, and hold what it yields against the plan.

    Raises:
        BrokenPluginError: It raised, or yielded other tensors than were planned.
        CheckpointError: A file is not what it has to be.
    """
    import torch

    wanted = {planned.module_key: planned for planned in plan.tensors}
    target, device = _torch_dtype(plan.dtype), torch.device(plan.device).type
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
        if strategy in BUILT_IN:
            raise
        raise _broken(strategy, f"it raised {type(error).__name__}: {error}") from error


def _broken(strategy: LoadingStrategy, why: str) -> BrokenPluginError:
    return BrokenPluginError(
        f"loading strategy {strategy.name!r} ({type(strategy).__module__}) is broken: {why}",
        hint="report it to its authors; strategy='mapped' or 'copied' does without it",
    )


def _views(plan: ReadPlan) -> Iterator[tuple[PlannedTensor, torch.Tensor]]:
    """Yield each planned tensor as a view of its mapped file; one file is open at a time."""
    from safetensors import SafetensorError, safe_open

    for shard, tensors in plan.by_shard().items():
        # safetensors opens a file without letting go of the interpreter: where the disk or the network
        # hangs, every thread of the process would hang with it. Here only this one does.
        with plan.paths[shard].open("rb", buffering=0) as plain:
            try:
                with safe_open(plan.paths[shard], framework="pt", device="cpu") as file:
                    for planned in tensors:
                        # Nor does it where it looks at a tensor's first page; from the cache that takes no time.
                        plain.seek(planned.info.begin)
                        plain.read(1)
                        yield planned, file.get_tensor(planned.info.key)
            except SafetensorError as error:
                raise InvalidCheckpointError(
                    f"{plan.paths[shard]} is no sound safetensors file: {error}", hint="fetch or write the file anew"
                ) from error


def _copy(plan: ReadPlan, view: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Copy a view of a file to the plan's device, and convert it."""
    import torch

    if view.nbytes <= CHUNK_BYTES:
        return view.to(device=plan.device, dtype=dtype, copy=True)
    copied = torch.empty(view.shape, dtype=dtype, device=plan.device)
    source, target = view.view(-1), copied.view(-1)
    elements = CHUNK_BYTES // view.element_size()
    for start in range(0, source.numel(), elements):
        chunk = source[start : start + elements]
        target[start : start + elements].copy_(chunk)
        plan.on_bytes(chunk.nbytes)
    return copied


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype
