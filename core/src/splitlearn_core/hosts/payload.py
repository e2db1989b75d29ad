"""Tensors as the payload of frames, and the versions of the libraries that compute with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
import transformers

from splitlearn_core.hosts.protocol import Frame, TensorSpec
from splitlearn_core.plugins.metadata import core_version
from splitlearn_core.types import dtype_names, stored_dtype


def pack(tensors: Mapping[str, torch.Tensor]) -> tuple[tuple[TensorSpec, ...], list[memoryview]]:
    """Return the specs of tensors and views of their bytes; tensors on other devices are copied to the CPU."""
    specs, buffers = [], []
    for name, tensor in tensors.items():
        specs.append(TensorSpec(name, dtype_names()[tensor.dtype], tuple(tensor.shape)))
        buffers.append(_bytes_of(tensor.detach().cpu().contiguous()))
    return tuple(specs), buffers


def unpack(frame: Frame) -> dict[str, torch.Tensor]:
    """Return the tensors of a frame, in memory of their own.

    A kernel's last bit may depend on the alignment of its input, so a view into the message would not be safe.
    """
    tensors = {}
    for spec, buffer in zip(frame.tensors, frame.buffers, strict=True):
        tensor = torch.empty(spec.shape, dtype=stored_dtype(spec.dtype))
        if spec.nbytes:
            _bytes_of(tensor)[:] = buffer
        tensors[spec.name] = tensor
    return tensors


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that decide the last bit of a result."""
    return {
        "splitlearn-core": core_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return cast("memoryview", memoryview(cast("Any", tensor.reshape(-1).view(torch.uint8).numpy())))
