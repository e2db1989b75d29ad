"""The header of a GGUF file, checked before anything relies on it.

Format (versions 2 and 3, little-endian): the magic ``GGUF``, the version, how many tensors and how
many metadata entries; then each entry (key, type, value), then each tensor (name, sizes, type, offset
from the start of the data). The data begins at the next multiple of ``general.alignment``.

The reader of the ``gguf`` library trusts the file, and 2**63 stated elements keep it busy for ever; here
every count is compared with the bytes that are left before it is used.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from splitlearn_core import InvalidCheckpointError, open_regular

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = "general.alignment"
_DEFAULT_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
#: Number of a metadata type of fixed size -> struct's letter for it.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
#: The limits of ggml: dimensions of a tensor, and a size that a signed number holds.
_MAX_DIMENSIONS, _MAX_ELEMENTS = 4, 2**63 - 1
#: Bytes of a key or name; the specification has 65535 for keys, and ggml 64 for names.
_MAX_NAME = 65_535
#: Bytes of any other text: the longest are templates of chats and descriptions of tokenizers.
_MAX_TEXT = 2**26
#: Bytes of the smallest metadata entry (key, type, value) and of the smallest tensor entry.
_MIN_ENTRY, _MIN_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8
#: Elements of an array that are kept; longer ones are vocabularies, and only counted.
_MAX_KEPT = 1024
_MAX_SHOWN, _MAX_WORD = 8, 80


@dataclass(frozen=True, slots=True)
class Array:
    """An array of the metadata of which only the length is kept: strings, or many numbers."""

    length: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """The place of a tensor in the file, and how it is stored."""

    name: str
    #: In torch's order: the size that varies fastest comes last.
    shape: tuple[int, ...]
    #: ggml's number of the type.
    type: int
    #: First byte, counted from the start of the file, and one past the last.
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Header:
    """The metadata and the tensors of a GGUF file; no weights are read."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    #: The first byte of the data.
    data: int

    @property
    def architecture(self) -> str:
        """The architecture of the model; empty in a file that is a part of one, but not the first."""
        return str(self.metadata.get("general.architecture", ""))


def read_header(path: Path) -> Header:
    """Read and check the header of a GGUF file.

    Raises:
        InvalidCheckpointError: It is not a GGUF file, it is truncated, or it contradicts itself; all
            contradictions of its tensors are listed.
    """
    with open_regular(path) as file:
        return _Reader(path, file).header()


def header_length(path: Path, present: int) -> int | None:
    """Return the first byte of the data; None if the bytes that are present at the beginning do not say it.

    Raises:
        InvalidCheckpointError: As :func:`read_header`.
    """
    with open_regular(path) as file:
        try:
            return _Reader(path, file, present).header().data
        except _AbsentError:
            return None


class _AbsentError(Exception):
    """A byte of the header is not present yet."""


def type_name(number: int) -> str:
    """Return ggml's name of a tensor type, ``Q4_0``."""
    from gguf.constants import GGMLQuantizationType

    return str(GGMLQuantizationType(number).name)


class _Reader:
    """Reads a header from its first byte to its last."""

    def __init__(self, path: Path, file: BinaryIO, present: int | None = None) -> None:
        self._path = path
        self._file = file
        self._size = os.fstat(file.fileno()).st_size
        self._present = self._size if present is None else present
        self._position = 0

    def header(self) -> Header:
        if self._take(len(MAGIC), "the magic") != MAGIC:
            self._refuse("it does not begin like a GGUF file", "is it one, and is the download complete?")
        (version,) = self._numbers("I", "the version")
        if version & 0xFFFF == 0:
            self._refuse("it is written for big-endian machines", "convert it: gguf-convert-endian FILE little")
        if version not in _VERSIONS:
            self._refuse(f"it is of GGUF version {version}; versions 2 and 3 are read", "convert the model again")
        tensors, entries = self._numbers("QQ", "the counts")
        self._expect(entries, _MIN_ENTRY, "metadata entries")
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self._text("a metadata key", _MAX_NAME)
            if key in metadata:
                self._refuse(f"metadata key {_short(key)} occurs twice")
            metadata[key] = self._value(key)
        self._check_metadata(metadata)
        self._expect(tensors, _MIN_TENSOR, "tensors")
        described = [self._tensor() for _ in range(tensors)]
        alignment = metadata.get(_ALIGNMENT, _DEFAULT_ALIGNMENT)
        start = -(-self._position // alignment) * alignment
        return Header(self._path, metadata, self._placed(described, start, alignment), start)

    def _check_metadata(self, metadata: Mapping[str, Any]) -> None:
        number, parts = metadata.get("split.no", 0), metadata.get("split.count", 0)
        if parts not in (0, 1):
            whole = type(number) is type(parts) is int
            if not whole or not self._path.name.endswith(f"-{number + 1:05}-of-{parts:05}.gguf"):
                self._refuse(
                    f"by its metadata it is part {number + 1 if whole else number!r} of {parts!r} of a model, and "
                    "another by its name",
                    "name each as it was, STEM-00001-of-00002.gguf; or join them: "
                    "llama-gguf-split --merge FIRST_PART FILE",
                )
        # All other metadata is in the first part.
        is_first = parts in (0, 1) or number == 0
        if is_first and not isinstance(metadata.get("general.architecture"), str):
            self._refuse("its metadata has no general.architecture", "convert the model again with a current converter")
        alignment = metadata.get(_ALIGNMENT, _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            self._refuse(f"{_ALIGNMENT} is {alignment!r}, not a power of two")

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Read one tensor's entry: name, shape, type, offset."""
        name = self._text("a tensor's name", _MAX_NAME)
        (dimensions,) = self._numbers("I", "a tensor's entry")
        if dimensions > _MAX_DIMENSIONS:
            self._refuse(f"{_short(name)} has {dimensions} dimensions; {_MAX_DIMENSIONS} is the limit")
        sizes = self._numbers("Q" * dimensions, "a tensor's entry")
        number, offset = self._numbers("IQ", "a tensor's entry")
        return name, tuple(reversed(sizes)), number, offset

    def _placed(
        self, described: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int
    ) -> dict[str, StoredTensor]:
        """Check the entries against the file and each other."""
        tensors: dict[str, StoredTensor] = {}
        problems = []
        for name, shape, number, offset in described:
            nbytes, problem = _stored_nbytes(shape, number)
            begin = start + offset
            if name in tensors:
                problem = "it occurs twice"
            elif not problem and offset % alignment:
                problem = f"its offset {offset} is not a multiple of {alignment}"
            elif not problem and begin + nbytes > self._size:
                problem = f"it ends at byte {begin + nbytes} of a file of {self._size}"
            if problem:
                problems.append(f"{_short(name)}: {problem}")
            else:
                tensors[name] = StoredTensor(name, shape, number, begin, begin + nbytes)
        ordered = sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.end))
        problems += [
            f"{_short(before.name)} and {_short(after.name)} overlap"
            for before, after in pairwise(ordered)
            if after.begin < before.end
        ]
        if problems:
            more = [f"and {len(problems) - _MAX_SHOWN} more"] if len(problems) > _MAX_SHOWN else []
            self._refuse("; ".join(problems[:_MAX_SHOWN] + more), "is the download complete?")
        return tensors

    def _value(self, key: str) -> Any:
        where = f"metadata {_short(key)}"
        (kind,) = self._numbers("I", where)
        if kind == _STRING:
            return self._text(where)
        if kind != _ARRAY:
            return self._numbers(self._scalar(kind, key), where)[0]
        kind, length = self._numbers("IQ", where)
        if kind == _STRING:
            self._expect(length, 8, f"strings in {_short(key)}")
            for _ in range(length):
                (size,) = self._numbers("Q", where)
                self._skip(size, where)
            return Array(length)
        letter = self._scalar(kind, key)
        self._expect(length, struct.calcsize(f"<{letter}"), f"numbers in {_short(key)}")
        if length > _MAX_KEPT:
            self._skip(length * struct.calcsize(f"<{letter}"), where)
            return Array(length)
        return list(self._numbers(letter * length, where))

    def _scalar(self, kind: int, key: str) -> str:
        if kind not in _SCALARS:
            self._refuse(f"metadata {_short(key)} has a value of the unknown type {kind}")
        return _SCALARS[kind]

    def _text(self, what: str, limit: int = _MAX_TEXT) -> str:
        (length,) = self._numbers("Q", what)
        if length > limit:
            self._refuse(f"{what} is {length} bytes long; {limit} is the limit")
        try:
            return self._take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            self._refuse(f"{what} is not UTF-8: {error}")

    def _numbers(self, letters: str, what: str) -> tuple[Any, ...]:
        layout = f"<{letters}"
        return struct.unpack(layout, self._take(struct.calcsize(layout), what))

    def _take(self, length: int, what: str) -> bytes:
        self._expect(length, 1, what)
        self._require(length)
        taken = self._file.read(length)
        if len(taken) < length:
            self._refuse(f"it ended at byte {self._position + len(taken)} while it was read")
        self._position += length
        return taken

    def _skip(self, length: int, what: str) -> None:
        self._expect(length, 1, what)
        self._require(length)
        self._file.seek(length, os.SEEK_CUR)
        self._position += length

    def _require(self, length: int) -> None:
        if self._position + length > self._present:
            raise _AbsentError

    def _expect(self, count: int, least: int, what: str) -> None:
        """Refuse a count of items, each of at least so many bytes, for which the rest of the file is too short."""
        if count > (self._size - self._position) // least:
            self._refuse(f"it ends too early for {what}: {count} from byte {self._position} of {self._size}")

    def _refuse(self, why: str, hint: str = "fetch or convert the file again") -> NoReturn:
        raise InvalidCheckpointError(f"{self._path} is not a valid GGUF file: {why}", hint=hint)


def _short(name: str) -> str:
    """Quote a name from a file, shortened for a message."""
    return repr(name if len(name) <= _MAX_WORD else f"{name[:_MAX_WORD]}...")


def _stored_nbytes(shape: tuple[int, ...], number: int) -> tuple[int, str]:
    """Return the bytes of a stored tensor, and what is wrong with it; empty if nothing is."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(number)]
    except (ValueError, KeyError):
        return 0, f"its type has the unknown number {number}"
    elements = math.prod(shape)
    if not shape or elements < 1 or elements > _MAX_ELEMENTS:
        return 0, f"its shape {list(shape)} is invalid"
    if shape[-1] % block:
        return 0, f"its rows of {shape[-1]} cannot be divided into blocks of {block}"
    return elements // block * size, ""
