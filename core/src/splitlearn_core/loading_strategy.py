"""The read plan, and the protocols of loading strategies and of readers of other formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from splitlearn_core.plan.splitplan import PlannedTensor, loaded_nbytes
from splitlearn_core.types import FLOAT_DTYPES, OPAQUE, TensorInfo, stored_dtype

if TYPE_CHECKING:
    import torch


class WholeModel:
    """The whole model as transformers loads it: lazily, and once for all components of a load.

    Args:
        measure: Returns the bytes of this machine's memory that it takes.
        load: Loads it, and returns its tensors by module key, on the CPU.
        missing: Returns why there is no whole model to load; empty if there is one.
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


def _ignore(_: int) -> None:
    """Ignore the number of bytes."""


def _no_region(_: PlannedTensor) -> None:
    """Return no memory."""


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """The tensors to read, their files, and their target device and dtype."""

    tensors: tuple[PlannedTensor, ...]
    #: Shard -> path of the file on this machine.
    paths: Mapping[str, Path]
    #: torch's name of the device.
    device: str
    #: torch's name of the dtype that floating tensors are converted to.
    dtype: str
    #: The whole model, for strategies that do not read files themselves.
    whole: WholeModel | None = field(default=None, compare=False, repr=False)
    #: Called with the number of bytes just read of a large tensor; whole tensors are counted
    #: when they are yielded. It raises to stop the load: do not catch the exception.
    on_bytes: Callable[[int], None] = field(default=_ignore, compare=False, repr=False)
    #: Module key -> a tensor that is made of those with :attr:`PlannedTensor.places`. Core makes it: a strategy
    #: yields each of those as it is in the file, or in the plan's dtype.
    made: Mapping[str, TensorInfo] = field(default_factory=dict)
    #: Returns the memory in a tensor to be made into which all of a tensor with places may be read, in the plan's
    #: dtype and instead of memory of its own; None if its values lie there in another order.
    region: Callable[[PlannedTensor], torch.Tensor | None] = field(default=_no_region, compare=False, repr=False)

    @property
    def nbytes(self) -> int:
        return sum(tensor.info.nbytes for tensor in self.tensors)

    @property
    def host_bytes(self) -> int:
        """Bytes of this machine's memory that the loaded tensors take: none on another device."""
        return sum(loaded_nbytes(tensor, self.dtype) for tensor in self.tensors) if self.device == "cpu" else 0

    def is_floating(self, tensor: PlannedTensor) -> bool:
        """Return whether a tensor is converted to the plan's dtype; integers, numbers and scales are not."""
        return tensor.info.dtype in FLOAT_DTYPES.values() and tensor.quantised is None

    def needs_conversion(self, tensor: PlannedTensor) -> bool:
        """Return whether a tensor is stored in another floating dtype than it is loaded in."""
        return self.is_floating(tensor) and tensor.info.dtype != FLOAT_DTYPES[tensor.kept_dtype or self.dtype]

    def loaded_dtype(self, tensor: PlannedTensor) -> torch.dtype:
        """Return the dtype of a tensor once it is loaded: the plan's, unless it keeps one of its own."""
        if self.is_floating(tensor):
            return torch_dtype(tensor.kept_dtype or self.dtype)
        return stored_dtype(tensor.info.dtype)

    def formats(self) -> set[str]:
        """Return the formats of the files that hold the tensors."""
        return {tensor.info.format for tensor in self.tensors}

    def by_shard(self) -> dict[str, list[PlannedTensor]]:
        shards: dict[str, list[PlannedTensor]] = {}
        for tensor in self.tensors:
            shards.setdefault(tensor.info.shard, []).append(tensor)
        return shards


def refused_formats(plan: ReadPlan, *known: str) -> str:
    """Return why a strategy that reads the known formats refuses the plan's files; empty if it reads all."""
    others = sorted(plan.formats() - set(known))
    if OPAQUE in others:
        return "the weights are quantised, and it reads plain ones"
    return f"it reads {' and '.join(known)} files, not {', '.join(others)}" if others else ""


@runtime_checkable
class LoadingStrategy(Protocol):
    """One way of turning planned bytes into tensors. Plugins may add others.

    A strategy may have another attribute, ``reads``: a line for users that describes what it can read.
    """

    #: The name by which a caller requests it.
    name: str

    def refusal(self, plan: ReadPlan) -> str:
        """Return why this plan cannot be read this way; empty if it can."""

    def anonymous_bytes(self, plan: ReadPlan) -> int:
        """Predict the peak memory of this machine that the read takes, without file pages.

        Most of it stays in use. A strategy that frees some after the read, buffers for example,
        returns how much in another method, ``passing_bytes(plan)``.
        """

    def read(self, plan: ReadPlan) -> Iterator[tuple[PlannedTensor, torch.Tensor]]:
        """Yield every planned tensor once, on the plan's device and in its dtype."""


@runtime_checkable
class WeightReader(Protocol):
    """An optional part of a strategy, for files that core cannot describe.

    Its files are considered only if a checkpoint has no weights that core can read. A model may
    then be named by the file itself, or by a directory with exactly one such file.
    """

    #: The name of the format, as :attr:`TensorInfo.format` has it.
    format: str
    #: Suffixes of the names of such files: ``(".gguf",)``.
    suffixes: tuple[str, ...]

    def config(self, path: Path) -> Mapping[str, Any]:
        """Read a Hugging Face ``config.json`` from the file; called only if the directory has none."""

    def tensors(self, path: Path, config: Mapping[str, Any]) -> Mapping[str, TensorInfo]:
        """Describe the tensors by their Hugging Face checkpoint keys, reading no weights.

        ``shard`` is the file's name, ``format`` this reader's, ``begin`` is 0 (but see :class:`RangedReader`) and
        ``end`` the bytes that the tensor takes in the file; ``dtype`` is that of its values once they are read.
        """


@runtime_checkable
class PartsReader(Protocol):
    """An optional extension of a weight reader, for models in files ``STEM-00001-of-00003.SUFFIX`` and so on.

    Tensors are described file by file; the first file is always among the paths of a :class:`ReadPlan`.
    """

    def config_of_parts(self, paths: Sequence[Path]) -> Mapping[str, Any]:
        """Read a Hugging Face ``config.json`` from all files of a model, in order."""


#: See :meth:`RangedReader.header_length`.
HeaderLength = Callable[[Path, int], int | None]


@runtime_checkable
class RangedReader(Protocol):
    """An optional extension of a weight reader: of files on the Hub, only the planned ranges are fetched then.

    ``begin`` and ``end`` of the tensors that it describes are their places in the file.
    """

    def header_length(self, path: Path, present: int) -> int | None:
        """Return how many bytes from the beginning describe the tensors, or None if that is not known yet.

        Args:
            path: A file of the full size, of which only a beginning is present.
            present: The number of bytes that are.
        """


@runtime_checkable
class PretrainedReader(Protocol):
    """An optional part of a weight reader whose files transformers reads too, for ``verify`` and tokenizers."""

    def pretrained_arguments(self, path: Path) -> Mapping[str, Any]:
        """Return the arguments of ``from_pretrained`` other than the folder: ``{"gguf_file": path.name}``."""


def torch_dtype(name: str) -> torch.dtype:
    """Return a dtype by torch's name."""
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


AUTO = "auto"
#: Core's own strategies, in the order in which ``auto`` tries them; the classes are in ``readers``.
BUILT_IN_NAMES = ("mapped", "copied", "incremental", "whole")


def reserved_names() -> tuple[str, ...]:
    """Return the names that a plugin's strategy must not have."""
    return (AUTO, *BUILT_IN_NAMES)
