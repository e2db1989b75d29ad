"""Quantised tensors: a file holds them as numbers of few bits, and a scale for each block of numbers. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from splitlearn_core.errors import ConfigurationError
from splitlearn_core.quoting import quote
from splitlearn_core.types import TensorInfo

FP8, MXFP4, COMPRESSED = "fp8", "mxfp4", "compressed-tensors"
#: The quantisation methods whose tensors are dequantised one by one; of the last, only 8-bit floats.
METHODS = (FP8, MXFP4, COMPRESSED)
#: Method -> suffixes of keys: of plain tensors, of numbers, and of their scales.
_SUFFIXES = {
    FP8: ("", "", "_scale_inv"),
    MXFP4: ("", "_blocks", "_scales"),
    COMPRESSED: (".weight", ".weight", ".weight_scale"),
}
#: The formats of compressed-tensors that store 8-bit floats as such.
_PLAIN_FORMATS = ("float-quantized", "naive-quantized", None)
#: Scales of inputs, which dequantised weights do not need.
_OF_INPUTS = (".activation_scale", ".input_scale")
_FLOAT8 = ("F8_E4M3", "F8_E5M2")
#: Dtypes of scales; the first two hold exponents of two.
_EXPONENTS = ("F8_E8M0", "U8")
_SCALES = ("F32", "BF16", "F16", *_EXPONENTS)
#: Dimensions of packed experts: expert, row, block, byte.
_PACKED_DIMENSIONS = 4


@dataclass(frozen=True, slots=True)
class QuantisedTensor:
    """A tensor that is computed from numbers of few bits and their scales."""

    #: The key that it has in plain weights.
    key: str
    #: ``fp8``, ``compressed-tensors``: 8-bit floats; ``mxfp4``: two 4-bit floats in a byte, the experts of a layer
    #: in one tensor.
    method: str
    #: The checkpoint keys of the numbers and of the scales.
    numbers: str
    scales: str
    #: The rows and columns that have a scale in common, as the configuration states them; empty if it does not.
    block: tuple[int, ...] = ()
    #: Whether values are rounded to the dtype of the scales before they are converted.
    rounds: bool = False
    #: Its shape, once the headers are read.
    shape: tuple[int, ...] = ()

    @property
    def keys(self) -> tuple[str, str]:
        return self.numbers, self.scales


def quantised_tensors(stated: object, keys: Iterable[str]) -> dict[str, QuantisedTensor]:
    """Return the quantised tensors of a checkpoint by their keys in plain weights; empty for other methods.

    Args:
        stated: ``quantization_config`` of ``config.json``.
        keys: The checkpoint keys.

    Raises:
        ConfigurationError: The stated size of a block is invalid.
        ValueError: Numbers or scales are missing.
    """
    method = stated.get("quant_method") if isinstance(stated, Mapping) else None
    if not isinstance(stated, Mapping) or method not in _SUFFIXES:
        return {}
    if method == COMPRESSED and not _are_eight_bit_floats(stated):
        return {}
    plain, numbers, scales = _SUFFIXES[str(method)]
    present = set(keys)
    names = [key.removesuffix(scales) for key in present if key.endswith(scales)]
    if not names:
        return {}
    if numbers != plain:
        names += [key.removesuffix(numbers) for key in present if key.endswith(numbers)]
    absent = {name + suffix for name in names for suffix in (numbers, scales)} - present
    if absent:
        raise ValueError(
            f"{len(absent)} of its quantised tensors lack numbers or scales: {', '.join(sorted(absent)[:3])}"
        )
    block = _stated_block(stated.get("weight_block_size"))
    tensors = (QuantisedTensor(name + plain, str(method), name + numbers, name + scales, block) for name in set(names))
    return {tensor.key: tensor for tensor in tensors}


def _are_eight_bit_floats(stated: Mapping[str, object]) -> bool:
    """Return whether compressed-tensors stores all weights as 8-bit floats with scales, and no zero points."""
    groups = stated.get("config_groups")
    schemes = list(groups.values()) if isinstance(groups, Mapping) else []
    weights = [scheme.get("weights") for scheme in schemes if isinstance(scheme, Mapping)]
    formats = [stated.get("format"), *(scheme.get("format") for scheme in schemes if isinstance(scheme, Mapping))]
    return (
        bool(schemes)
        and len(weights) == len(schemes)
        and all(each in _PLAIN_FORMATS for each in formats)
        and all(
            isinstance(each, Mapping)
            and (each.get("type"), each.get("num_bits"), each.get("symmetric", True)) == ("float", 8, True)
            for each in weights
        )
    )


def _stated_block(value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    if isinstance(value, list | tuple) and len(value) == 2 and all(type(size) is int and size > 0 for size in value):  # noqa: PLR2004  # rows, columns
        return tuple(value)
    raise ConfigurationError(
        f"weight_block_size of quantization_config is {quote(value)}", hint="it is two integers: rows and columns"
    )


def plain_keys(keys: Iterable[str], quantised: Mapping[str, QuantisedTensor]) -> list[str]:
    """Return the keys that plain weights would have, in order."""
    if not quantised:
        return list(keys)
    stored = {key for tensor in quantised.values() for key in tensor.keys}
    others = {key for key in keys if key not in stored and not key.endswith(_OF_INPUTS)}
    return sorted(others | quantised.keys())


def resolved(quantised: QuantisedTensor, tensors: Mapping[str, TensorInfo]) -> QuantisedTensor:
    """Return a quantised tensor with its shape and the size of its blocks, by the headers.

    Raises:
        ValueError: Numbers and scales do not fit together.
    """
    numbers, scales = (tensors[key] for key in quantised.keys)
    if quantised.method == MXFP4:
        if (numbers.dtype, scales.dtype) != ("U8", "U8"):
            raise ValueError(f"{numbers.key} is {numbers.dtype} and {scales.key} {scales.dtype}, not bytes")
        if len(numbers.shape) != _PACKED_DIMENSIONS or scales.shape != numbers.shape[:-1] or 0 in numbers.shape:
            raise ValueError(_misfit(numbers, scales))
        experts, rows, blocks, size = numbers.shape
        return replace(quantised, shape=(experts, rows, 2 * blocks * size), block=(1, 2 * size))
    if numbers.dtype not in _FLOAT8 or scales.dtype not in _SCALES:
        raise ValueError(f"{numbers.key} is {numbers.dtype}, and {scales.key} {scales.dtype}")
    if quantised.method == COMPRESSED and scales.dtype in _EXPONENTS:
        # Values are rounded to the dtype of the scales.
        raise ValueError(f"{scales.key} is {scales.dtype}: exponents, and compressed-tensors has floats for scales")
    if len(numbers.shape) < 2 or 0 in numbers.shape:  # noqa: PLR2004  # rows, columns
        raise ValueError(f"{numbers.key} {list(numbers.shape)} is not a matrix")
    sizes = numbers.shape[-2:]
    if math.prod(scales.shape) == 1:
        return replace(quantised, shape=numbers.shape, block=sizes)
    if len(scales.shape) < 2 or scales.shape[:-2] != numbers.shape[:-2] or 0 in scales.shape:  # noqa: PLR2004  # a matrix
        raise ValueError(_misfit(numbers, scales))
    grid = scales.shape[-2:]
    if quantised.block and grid == tuple(-(-size // step) for size, step in zip(sizes, quantised.block, strict=True)):
        # No larger than the matrix: the scales of a row are repeated for the columns of whole blocks.
        return replace(quantised, shape=numbers.shape, block=tuple(map(min, quantised.block, sizes)))
    if any(size % count for size, count in zip(sizes, grid, strict=True)):
        raise ValueError(f"{_misfit(numbers, scales)} in blocks of {list(quantised.block) or 'any size'}")
    # As transformers, which takes the size of blocks from the number of scales.
    block = tuple(size // count for size, count in zip(sizes, grid, strict=True))
    return replace(quantised, shape=numbers.shape, block=block)


def _misfit(numbers: TensorInfo, scales: TensorInfo) -> str:
    return f"the scales {scales.key} {list(scales.shape)} do not fit {numbers.key} {list(numbers.shape)}"
