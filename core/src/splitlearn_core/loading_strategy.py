"""The read plan, and the protocols of loading strategies and of readers of other formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from splitlearn_core.plan.splitplan import PlannedTensor
from splitlearn_core.types import FLOAT_DTYPES, OPAQUE, TensorInfo

if TYPE_CHECKING:
    import torch


#: Bytes of a large tensor that are copied at a time, so that a load can say how far it is, and be
#: stopped, in the middle of one.
CHUNK_BYTES = 8 * 2**20


class WholeModel:
    """The whole model, as transformers loads it: once for all components of a load, and only if it is asked for.

    Args:
        measure: Says how many bytes of this machine's memory it takes.
        load: Loads it, and returns its tensors by module key, on the CPU.
        missing: Says why there is no whole model to load; empty where there is one.
    """

    def __init__(
        self,
        measure: Callable[[], int],
        load: Callable[[], Mapping[str, torch.Tensor]],
        missing: Callable[[], str] = lambda: "",
    ) -> None:
        self._measure, self._load, self._missing = measure, load, missing

    @cached_property
    def missing(self) -> str:
        return self._missing()

    @cached_property
    def nbytes(self) -> int:
        return self._measure()

    @cached_property
    def tensors(self) -> Mapping[str, torch.Tensor]:
        return self._load()


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
    #: Where the whole model can be had, for those who read no files themselves.
    whole: WholeModel | None = field(default=None, compare=False, repr=False)
    #: Told how many more bytes of a tensor were read, while that takes long; whole tensors are
    #: counted when they are yielded. It raises where the load is to stop: let that through.
    on_bytes: Callable[[int], None] = field(default=_untold, compare=False, repr=False)

    @property
    def nbytes(self) -> int:
        return sum(tensor.info.nbytes for tensor in self.tensors)

    def is_floating(self, tensor: PlannedTensor) -> bool:
        """Say whether a tensor takes on the wanted dtype; integers keep theirs."""
        return tensor.info.dtype in FLOAT_DTYPES.values()

    def needs_conversion(self, tensor: PlannedTensor) -> bool:
        """Say whether a tensor is stored in another floating dtype than the wanted one."""
        return self.is_floating(tensor) and tensor.info.dtype != FLOAT_DTYPES[self.dtype]

    def formats(self) -> set[str]:
        """Return the formats of the files that hold the tensors."""
        return {tensor.info.format for tensor in self.tensors}

    def by_shard(self) -> dict[str, list[PlannedTensor]]:
        shards: dict[str, list[PlannedTensor]] = {}
        for tensor in self.tensors:
            shards.setdefault(tensor.info.shard, []).append(tensor)
        return shards


def refused_formats(plan: ReadPlan, *known: str) -> str:
    """Say which of the plan's files are of another format than the known ones, or nothing."""
    others = sorted(plan.formats() - set(known))
    if OPAQUE in others:
        return "the weights are quantised, and it reads plain ones"
    return f"it reads {' and '.join(known)} files, not {', '.join(others)}" if others else ""


@runtime_checkable
class LoadingStrategy(Protocol):
    """One way of turning planned bytes into tensors. Plugins may add others.

    A strategy may have another attribute, ``reads``: a line for people that says what it can read.
    """

    #: The name under which a caller asks for it.
    name: str

    def refusal(self, plan: ReadPlan) -> str:
        """Say why this plan cannot be read this way, or nothing."""

    def anonymous_bytes(self, plan: ReadPlan) -> int:
        """Predict the memory of this machine that the read takes at most, file pages left out.

        Most of it is kept. A strategy that gives some back when the read is over, buffers for
        example, says how much in another method, ``passing_bytes(plan)``.
        """

    def read(self, plan: ReadPlan) -> Iterator[tuple[PlannedTensor, torch.Tensor]]:
        """Yield every planned tensor once, on the plan's device and in its dtype."""


@runtime_checkable
class WeightReader(Protocol):
    """What a strategy adds that reads files which core cannot describe; optional.

    Its files are looked for only where a checkpoint has no weights that core knows. A model may
    then be named by the file itself, or by a directory with exactly one such file.
    """

    #: The name of the format, as :attr:`TensorInfo.format` has it.
    format: str
    #: How the names of such files end: ``(".gguf",)``.
    suffixes: tuple[str, ...]

    def config(self, path: Path) -> Mapping[str, Any]:
        """Read a Hugging Face ``config.json`` out of the file; asked only where the directory has none."""

    def tensors(self, path: Path, config: Mapping[str, Any]) -> Mapping[str, TensorInfo]:
        """Describe the tensors by their Hugging Face checkpoint keys, reading no weights.

        ``shard`` is the file's name, ``format`` this reader's, ``begin`` is 0 and ``end`` the bytes
        that the tensor takes in the file; ``dtype`` is what its values have once they are read.
        """


@runtime_checkable
class PretrainedReader(Protocol):
    """What a weight reader adds whose files transformers reads too; optional, for ``verify`` and tokenizers."""

    def pretrained_arguments(self, path: Path) -> Mapping[str, Any]:
        """Return what ``from_pretrained`` has to be told besides the folder: ``{"gguf_file": path.name}``."""


def torch_dtype(name: str) -> torch.dtype:
    """Return a dtype by torch's name."""
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


AUTO = "auto"
#: Core's own strategies, in the order in which ``auto`` tries them; the classes are in ``readers``.
BUILT_IN_NAMES = ("mapped", "copied", "incremental", "whole")


def reserved_names() -> tuple[str, ...]:
    """Return the names that no added strategy may take."""
    return (AUTO, *BUILT_IN_NAMES)
