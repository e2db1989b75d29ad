"""Tensors of the module that are made of others in the file: of which, by what, and where each value lies.

The operations only rearrange values. So each part of a tensor in the file has a place in the tensor that is made,
which is known before anything is read. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, count
from operator import mul

from splitlearn_core.errors import ConfigurationError
from splitlearn_core.plan.quantised import COMPRESSED, MXFP4, QuantisedTensor
from splitlearn_core.quoting import listed

#: Operation -> how many dimensions it takes.
_OPERATIONS = {"stack": 1, "concatenate": 1, "chunk": 1, "split": 1, "transpose": 2}


@dataclass(frozen=True, slots=True)
class WeightOperation:
    """A rearrangement of the values of tensors."""

    #: ``stack`` each group of sources along a new dimension, ``concatenate`` all along a dimension, ``chunk`` one
    #: into as many equal pieces as there are targets, ``split`` one into pieces of given sizes, or ``transpose`` each:
    #: exchange two dimensions.
    name: str
    #: The dimension; two for ``transpose``.
    dims: tuple[int, ...]
    #: The shape of tensors that are not transposed, because they already are; None for none.
    unless: tuple[int, ...] | None = None
    #: Of the pieces of ``split``, in order, along the dimension.
    sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse an unknown operation, and dimensions that it does not take."""
        wanted = _OPERATIONS.get(self.name) if isinstance(self.name, str) else None
        sound = all(
            isinstance(numbers, tuple) and all(type(number) is int and number >= 0 for number in numbers)
            for numbers in (self.dims, self.sizes)
        )
        if wanted is None or not sound or len(self.dims) != wanted or (self.name == "split") != bool(self.sizes):
            raise ConfigurationError(
                f"there is no operation {self.name!r} with the dimensions {self.dims!r}",
                hint="stack, concatenate, chunk and split take one dimension, and transpose two; each counts from 0. "
                "Only split takes sizes",
            )


@dataclass(frozen=True, slots=True)
class WeightConversion:
    """Tensors of the module that are made of others in the file.

    All experts of a layer in one tensor, for example, the first half of whose rows are those of the gates::

        WeightConversion(
            sources=(("experts.0.gate", "experts.1.gate"), ("experts.0.up", "experts.1.up")),
            targets=("experts.gate_up",),
            operations=(WeightOperation("stack", (0,)), WeightOperation("concatenate", (1,))),
        )
    """

    #: Checkpoint keys, in order; in groups where they are stacked, and otherwise each in a group of its own.
    sources: tuple[tuple[str, ...], ...]
    #: The module keys of the tensors that are made; several only after ``chunk``.
    targets: tuple[str, ...]
    #: Applied one after the other.
    operations: tuple[WeightOperation, ...]
    #: The sources that the file holds as numbers and scales; they are dequantised first.
    quantised: tuple[QuantisedTensor, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what is not made of plain values, or of nothing."""
        groups = self.sources
        sound = (
            isinstance(groups, tuple)
            and all(isinstance(group, tuple) and group for group in groups)
            and all(isinstance(key, str) for group in groups for key in group)
            and isinstance(self.targets, tuple)
            and all(isinstance(target, str) for target in self.targets)
            and isinstance(self.operations, tuple)
            and all(isinstance(operation, WeightOperation) for operation in self.operations)
        )
        if not (sound and groups and self.targets and (self.operations or self.quantised)):
            raise ConfigurationError(
                f"a conversion is described wrongly: {self.sources!r} to {self.targets!r} by {self.operations!r}"[:300],
                hint="give tuples: sources of tuples of names, targets of names, operations of WeightOperation",
            )

    @property
    def source_keys(self) -> tuple[str, ...]:
        """The keys of all sources in plain weights."""
        return tuple(key for group in self.sources for key in group)

    @property
    def keys(self) -> tuple[str, ...]:
        """The checkpoint keys of all sources."""
        stored = {tensor.key: tensor.keys for tensor in self.quantised}
        return tuple(key for source in self.source_keys for key in stored.get(source, (source,)))


@dataclass(frozen=True, slots=True)
class Place:
    """A part of a tensor of the file, and where its values lie in a tensor that is made.

    Both as strides over the elements of contiguous tensors.
    """

    target: str
    sizes: tuple[int, ...]
    source_offset: int
    source_strides: tuple[int, ...]
    target_offset: int
    target_strides: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.sizes)

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements follow one another in the file and in the tensor that is made."""
        packed = contiguous_strides(self.sizes)
        return all(
            size == 1 or source == target == step
            for size, source, target, step in zip(
                self.sizes, self.source_strides, self.target_strides, packed, strict=True
            )
        )


def part_of_slab(place: Place, first: int, count: int, step: int) -> Place | None:
    """Return the part of a place whose source lies in a slab; its source offset is counted from there.

    Args:
        place: A place.
        first: The first index of the slab along the first dimension of the source.
        count: How many there are.
        step: The elements of the source between two of them.
    """
    begin, inside = divmod(place.source_offset, step)
    sizes = enumerate(zip(place.sizes, place.source_strides, strict=True))
    dim = next((dim for dim, (size, stride) in sizes if size > 1 and stride == step), None)
    low, high = max(begin, first), min(begin + (1 if dim is None else place.sizes[dim]), first + count)
    if low >= high:
        return None
    return replace(
        place,
        sizes=place.sizes if dim is None else _set(place.sizes, dim, high - low),
        source_offset=(low - first) * step + inside,
        target_offset=place.target_offset + (0 if dim is None else (low - begin) * place.target_strides[dim]),
    )


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the number of elements between neighbours in each dimension of a contiguous tensor."""
    return tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))


@dataclass(frozen=True, slots=True)
class _Box:
    """A part of a source at its position in an array."""

    #: The number of the source, counted over all groups.
    source: int
    start: tuple[int, ...]
    sizes: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Array:
    shape: tuple[int, ...]
    boxes: tuple[_Box, ...]


def places_of(
    conversion: WeightConversion, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, tuple[int, ...]], dict[str, list[Place]]]:
    """Return the shape of each target, and the places of each source.

    Args:
        conversion: What is made of what.
        shapes: Of the sources, by their keys in plain weights.

    Raises:
        ValueError: The operations do not fit the number or the shapes of the tensors, and why.
    """
    if absent := [name for group in conversion.sources for name in _left_out(group)]:
        raise ValueError(f"there is no {listed(absent, most=3)}")
    keys = conversion.source_keys
    results = _layout(
        tuple(tuple(shapes[key] for key in group) for group in conversion.sources),
        conversion.operations,
        len(conversion.targets),
    )
    if len(results) != len(conversion.targets):
        raise ValueError(f"{len(results)} tensors come of {_count(keys)}, not {len(conversion.targets)}")
    places: dict[str, list[Place]] = {key: [] for key in keys}
    for target, (shape, parts) in zip(conversion.targets, results, strict=True):
        strides = contiguous_strides(shape)
        for box, begin in parts:
            places[keys[box.source]].append(Place(target, box.sizes, box.offset, box.strides, begin, strides))
    return {target: shape for target, (shape, _) in zip(conversion.targets, results, strict=True)}, places


# The layers of a model are alike, and each may have hundreds of experts.
@lru_cache(maxsize=16)
def _layout(
    shapes: tuple[tuple[tuple[int, ...], ...], ...], operations: tuple[WeightOperation, ...], pieces: int
) -> list[tuple[tuple[int, ...], list[tuple[_Box, int]]]]:
    """Return the shape of each tensor that is made, its parts, and the first element of each in it.

    Args:
        shapes: Of the sources, in groups.
        operations: Applied one after the other.
        pieces: The number of targets.
    """
    numbers = count()
    groups = [[_whole(next(numbers), shape) for shape in group] for group in shapes]
    for operation in operations:
        groups = _applied(operation, groups, pieces)
    return [
        (array.shape, [(box, sum(map(mul, box.start, contiguous_strides(array.shape)))) for box in array.boxes])
        for group in groups
        for array in group
    ]


def _left_out(group: Sequence[str]) -> list[str]:
    """Return the names that a group of numbered tensors leaves out between its first and its last."""
    split = [key.split(".") for key in group]
    varying = [part for part, texts in enumerate(zip(*split, strict=False)) if len(set(texts)) > 1]
    if len(varying) != 1 or len({len(parts) for parts in split}) > 1:
        return []
    (part,) = varying
    texts = [parts[part] for parts in split]
    if not all(text.isdecimal() for text in texts):
        return []
    numbers = {int(text) for text in texts}
    return [
        ".".join((*split[0][:part], str(number), *split[0][part + 1 :]))
        # Not further than there are tensors: a number in a file may be of any size.
        for number in range(min(max(numbers), len(numbers)))
        if number not in numbers
    ]


def _whole(source: int, shape: tuple[int, ...]) -> _Array:
    return _Array(shape, (_Box(source, (0,) * len(shape), shape, 0, contiguous_strides(shape)),))


def _applied(operation: WeightOperation, groups: list[list[_Array]], pieces: int) -> list[list[_Array]]:
    dim = operation.dims[0]
    arrays = [array for group in groups for array in group]
    if not arrays or any(max(operation.dims) >= len(array.shape) + (operation.name == "stack") for array in arrays):
        raise ValueError(f"{operation.name} along {operation.dims} does not fit {_shapes(arrays)}")
    if operation.name == "stack":
        return [[_joined([_inserted(array, dim) for array in group], dim)] for group in groups]
    if operation.name == "concatenate":
        return [[_joined(arrays, dim)]]
    if operation.name == "transpose":
        return [
            [array if array.shape == operation.unless else _exchanged(array, *operation.dims) for array in group]
            for group in groups
        ]
    if len(arrays) != 1 or (not operation.sizes and arrays[0].shape[dim] % pieces):
        raise ValueError(f"{_shapes(arrays)} cannot be cut into {pieces} along dimension {dim}")
    sizes = operation.sizes or (arrays[0].shape[dim] // pieces,) * pieces
    if sum(sizes) != arrays[0].shape[dim]:
        raise ValueError(f"{_shapes(arrays)} cannot be cut into {list(sizes)} along dimension {dim}")
    return [
        [_narrowed(arrays[0], dim, begin, size)]
        for begin, size in zip(accumulate(sizes, initial=0), sizes, strict=False)
    ]


def _inserted(array: _Array, dim: int) -> _Array:
    """Add a dimension of one element."""

    def with_item(values: tuple[int, ...], item: int) -> tuple[int, ...]:
        return (*values[:dim], item, *values[dim:])

    boxes = tuple(
        replace(box, start=with_item(box.start, 0), sizes=with_item(box.sizes, 1), strides=with_item(box.strides, 0))
        for box in array.boxes
    )
    return _Array(with_item(array.shape, 1), boxes)


def _joined(arrays: list[_Array], dim: int) -> _Array:
    others = {(*array.shape[:dim], *array.shape[dim + 1 :]) for array in arrays}
    if len(others) > 1:
        raise ValueError(f"{_shapes(arrays)} differ in more than dimension {dim}, along which they are joined")
    boxes, position = [], 0
    for array in arrays:
        boxes += [replace(box, start=_set(box.start, dim, box.start[dim] + position)) for box in array.boxes]
        position += array.shape[dim]
    return _Array(_set(arrays[0].shape, dim, position), tuple(boxes))


def _exchanged(array: _Array, first: int, second: int) -> _Array:
    def exchange(values: tuple[int, ...]) -> tuple[int, ...]:
        return _set(_set(values, first, values[second]), second, values[first])

    boxes = tuple(
        replace(box, start=exchange(box.start), sizes=exchange(box.sizes), strides=exchange(box.strides))
        for box in array.boxes
    )
    return _Array(exchange(array.shape), boxes)


def _narrowed(array: _Array, dim: int, begin: int, length: int) -> _Array:
    boxes = []
    for box in array.boxes:
        first, last = max(box.start[dim], begin), min(box.start[dim] + box.sizes[dim], begin + length)
        if first < last:
            boxes.append(
                replace(
                    box,
                    start=_set(box.start, dim, first - begin),
                    sizes=_set(box.sizes, dim, last - first),
                    offset=box.offset + (first - box.start[dim]) * box.strides[dim],
                )
            )
    return _Array(_set(array.shape, dim, length), tuple(boxes))


def _set(values: tuple[int, ...], position: int, value: int) -> tuple[int, ...]:
    return (*values[:position], value, *values[position + 1 :])


def _shapes(arrays: list[_Array]) -> str:
    counts: dict[tuple[int, ...], int] = {}
    for array in arrays:
        counts[array.shape] = counts.get(array.shape, 0) + 1
    return ", ".join(f"{count} of {list(shape)}" for shape, count in counts.items()) or "no tensors"


def _count(keys: Sequence[str]) -> str:
    return f"{len(keys)} tensors ({', '.join(keys[:2])}{', ...' if len(keys) > 2 else ''})"  # noqa: PLR2004  # those that are named


def stored_targets(
    mapping: Mapping[str, str | WeightConversion | None], quantised: Mapping[str, QuantisedTensor]
) -> dict[str, str | WeightConversion | None]:
    """Return where the keys of a quantised checkpoint go, by where those of plain weights go."""
    targets: dict[str, str | WeightConversion | None] = {}
    extended: dict[int, WeightConversion] = {}
    for key, target in mapping.items():
        tensor = quantised.get(key)
        if tensor is None and not isinstance(target, WeightConversion):
            targets[key] = target
            continue
        result = target
        if isinstance(target, WeightConversion):
            result = extended.setdefault(id(target), _of_quantised(target, quantised))
        elif target is not None and tensor is not None:
            # As transformers does, but for experts, which conversions of their own make.
            own = replace(tensor, rounds=tensor.method == COMPRESSED)
            result = _of_quantised(WeightConversion(((key,),), (target,), (), (own,)), {key: own})
        targets |= dict.fromkeys((key,) if tensor is None else tensor.keys, result)
    return targets


def _of_quantised(conversion: WeightConversion, quantised: Mapping[str, QuantisedTensor]) -> WeightConversion:
    tensors = tuple(quantised[key] for key in conversion.source_keys if key in quantised)
    # The rows of packed experts are the columns of the module.
    packed = any(tensor.method == MXFP4 for tensor in tensors)
    first = (WeightOperation("transpose", (1, 2)),) if packed else ()
    return replace(conversion, operations=(*first, *conversion.operations), quantised=tensors)
