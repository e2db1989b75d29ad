"""Small frozen values that flow between the packages of core, and the table of dtypes."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


#: Bytes of one element, by the safetensors format's name of the dtype.
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "C64": 8, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip

#: torch's name of a floating dtype -> the safetensors format's.
FLOAT_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}

#: Common other names of floating dtypes -> torch's.
DTYPE_ALIASES = {
    "float": "float32", "fp32": "float32", "f32": "float32", "single": "float32",
    "half": "float16", "fp16": "float16", "f16": "float16",
    "bf16": "bfloat16",
    "double": "float64", "fp64": "float64", "f64": "float64",
}  # fmt: skip

#: The fields of ``config.json`` for the dtype of the weights; the first that exists is used.
DTYPE_FIELDS = ("dtype", "torch_dtype")

#: The dtype names allowed there, which are attributes of torch -> the canonical name.
STATED_DTYPES = {**{name: name for name in FLOAT_DTYPES}, "float": "float32", "half": "float16", "double": "float64"}

#: The dtype of the checkpoint.
AUTO_DTYPE = "auto"

#: The formats of weight files that core reads.
SAFETENSORS, PYTORCH = "safetensors", "pytorch"

#: The format of quantised weights: transformers computes the tensors from the files, so that only the configuration
#: describes them.
OPAQUE = "quantised"


class Component(StrEnum):
    """The kinds of components, in the order in which hidden states pass through them.

    They are also the names of the components of a model that is cut in two places; see ``component_names``.
    """

    BOTTOM = "bottom"
    TRUNK = "trunk"
    TOP = "top"


#: The names of the components of a model that is cut in two places.
THREE: tuple[str, ...] = tuple(Component)

#: Default of ``parts``: all components, also of a model that has not three. It is recognised by identity, because a
#: caller who passes the same names means these three.
ALL_PARTS: tuple[str, ...] = ("bottom", "trunk", "top")

#: The name of a trunk, alone or numbered.
_TRUNK_NAME = re.compile(r"trunk([1-9][0-9]{0,4})?")


def component_names(count: int) -> tuple[str, ...]:
    """Return the names of the components of a model that is cut into ``count`` components, in order.

    The first is the bottom and the last the top. A single trunk is ``trunk``; several are numbered from ``trunk1``.
    """
    if count == len(THREE):
        return THREE
    return (Component.BOTTOM, *(f"{Component.TRUNK}{number}" for number in range(1, count - 1)), Component.TOP)


def is_component_name(name: object) -> bool:
    """Return whether the name can be that of a component."""
    return name in (Component.BOTTOM, Component.TOP) or (
        isinstance(name, str) and _TRUNK_NAME.fullmatch(name) is not None
    )


def kind_of(name: str) -> Component:
    """Return the kind of the component with a name."""
    return Component(name) if name in (Component.BOTTOM, Component.TOP) else Component.TRUNK


def place_of(name: str) -> tuple[int, int]:
    """Return the sort key that puts names of components into the order of the model."""
    number = _TRUNK_NAME.fullmatch(name)
    return list(Component).index(kind_of(name)), int(number[1] or 0) if number else 0


def dtype_name(dtype: object) -> str:
    """Return torch's name of a floating dtype in any spelling, or ``auto``; anything else is returned as text.

    ``torch.float16``, ``"fp16"``, ``"half"`` and ``numpy.float16`` are the same; None, as in transformers, is ``auto``.
    """
    if dtype is None:
        return AUTO_DTYPE
    text = dtype if isinstance(dtype, str) else dtype.__name__ if isinstance(dtype, type) else str(dtype)
    name = text.strip().lower().removeprefix("torch.")
    name = DTYPE_ALIASES.get(name, name)
    return name if name in (AUTO_DTYPE, *FLOAT_DTYPES) else text


def nearest_dtype(name: str) -> str:
    """Return the dtype whose name is most similar to an unknown name."""
    names = [*FLOAT_DTYPES, *DTYPE_ALIASES]
    close = difflib.get_close_matches(name.strip().lower().removeprefix("torch."), names, n=1, cutoff=0)[0]
    return DTYPE_ALIASES.get(close, close)


@dataclass(frozen=True, slots=True)
class LayerRange:
    """The layers ``[start, end)`` out of ``total``, numbered as in the whole model."""

    start: int
    end: int
    total: int

    @property
    def is_first(self) -> bool:
        return self.start == 0

    @property
    def is_last(self) -> bool:
        return self.end == self.total

    def __len__(self) -> int:
        return self.end - self.start

    def __contains__(self, layer: object) -> bool:
        return isinstance(layer, int) and self.start <= layer < self.end

    def __str__(self) -> str:
        return f"[{self.start}, {self.end}) of {self.total}"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor in a file, known from the file's header alone."""

    key: str
    #: The safetensors format's name of the dtype: ``F32``, ``BF16``, ...
    dtype: str
    shape: tuple[int, ...]
    #: Name of the shard that holds it; empty if there are no weights yet.
    shard: str
    #: First byte, from the start of the shard; 0 if it is unknown, which it is only in other formats than safetensors.
    begin: int
    #: One past the last byte; the number of bytes if the first is unknown.
    end: int
    #: Format of the shard: ``safetensors``, ``pytorch``, or that of a plugin's weight reader.
    format: str = SAFETENSORS

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a load. Bytes are those of the stage; 0 of 0 if it counts none."""

    #: ``resolving``, ``examining`` (a model type, in ``file``), ``downloading``, ``planning``, ``importing``,
    #: ``building``, ``reading``, ``converting``, ``verifying``,
    #: ``warming up`` or ``ready``; ``saving``, ``merging`` or ``hashing`` of files.
    stage: str
    #: The name of the current component, or None if the stage concerns all of them.
    component: str | None = None
    bytes_done: int = 0
    bytes_total: int = 0
    #: The current file, if there is one.
    file: str = ""


ProgressCallback = Callable[[Progress], None]


_STEP = 1024

#: Bytes of the unit of settings in megabytes.
MEGABYTE = 2**20

#: Bytes of a file or a large tensor that are read, copied, hashed or written at a time, so that progress is reported
#: and work can be stopped in the middle of one.
CHUNK_BYTES = 8 * 2**20


def human_bytes(count: float) -> str:
    """Return a number of bytes with a binary unit: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < _STEP:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= _STEP
    return f"{count:.1f} TiB"


@cache
def dtype_names() -> dict[torch.dtype, str]:
    """Return the safetensors format's name of each dtype that it knows."""
    import torch

    return {
        torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8",
        torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e8m0fnu: "F8_E8M0",
        torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
        torch.int16: "I16", torch.uint16: "U16", torch.float16: "F16", torch.bfloat16: "BF16",
        torch.int32: "I32", torch.uint32: "U32", torch.float32: "F32",
        torch.complex64: "C64", torch.float64: "F64", torch.int64: "I64", torch.uint64: "U64",
    }  # fmt: skip


@cache
def stored_dtype(name: str) -> torch.dtype:
    """Return torch's dtype of the safetensors format's name."""
    return next(dtype for dtype, known in dtype_names().items() if known == name)
