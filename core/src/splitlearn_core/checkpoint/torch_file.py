"""Files that ``torch.save`` wrote: opened without running code, and described without reading weights."""

from __future__ import annotations

import errno
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from splitlearn_core.checkpoint.files import open_regular, path_of
from splitlearn_core.errors import CheckpointError, InvalidCheckpointError, SplitLearnError
from splitlearn_core.quoting import listed
from splitlearn_core.types import PYTORCH, TensorInfo, dtype_names

if TYPE_CHECKING:
    import torch

#: The first bytes of what torch.save writes since 1.6; only that can be mapped.
_ZIP = b"PK\x03\x04"
#: torch's messages for a pickle that names anything but tensors and plain values. (It reports an
#: unsupported operand in a file that is not a pickle.)
_MORE_THAN_TENSORS = re.compile(r"Unsupported (?!operand)|unsupported GLOBAL")
#: The reason follows this in torch's message; before it stands how to run the code of the file after all.
_REASON_PREFIX = "WeightsUnpickler error: "


def is_mappable(path: Path) -> bool:
    """Return whether the file can be mapped: files of older versions of torch have to be read whole."""
    with open_regular(path) as file:
        return _is_zip(file)


def _is_zip(file: BinaryIO) -> bool:
    return file.read(len(_ZIP)) == _ZIP


def open_torch_file(path: Path, *, hint: str, allow_pickle: bool = False) -> Any:
    """Return what ``torch.save`` wrote, on the CPU, mapped if possible.

    Args:
        path: The file.
        hint: Hint for a file that holds more than tensors and plain values.
        allow_pickle: Run the code that such a file names.

    Raises:
        CheckpointError: The file holds more than tensors, and opening it could run code.
        InvalidCheckpointError: It is damaged, or not such a file.
    """
    import torch

    try:
        with open_regular(path) as file:
            same_file, mappable = path_of(file, path), _is_zip(file)
            return torch.load(same_file, map_location="cpu", mmap=mappable, weights_only=not allow_pickle)
    except (MemoryError, SplitLearnError):
        raise
    except OSError as error:
        # torch seeks before the start of a file that is too short for an archive.
        if error.errno == errno.EINVAL:
            raise _damaged(path, error) from error
        raise
    except pickle.UnpicklingError as error:
        if not allow_pickle and _MORE_THAN_TENSORS.search(str(error)):
            # Torch goes on with advice on how to trust the file.
            reason = _line(error, _MORE_THAN_TENSORS).partition(" Please use ")[0]
            raise CheckpointError(
                f"{path} holds more than tensors, and opening it could run code: {reason}", hint=hint
            ) from error
        raise _damaged(path, error) from error
    # Unpickling calls what the file names, which may raise anything.
    except Exception as error:
        raise _damaged(path, error) from error


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of one ``.bin`` file by checkpoint key; those of a mappable file are views of it.

    Raises:
        CheckpointError: The file holds more than tensors, and opening it could run code.
        InvalidCheckpointError: It is damaged, or not a state dict.
    """
    import torch

    saved = open_torch_file(
        path, hint="use a checkpoint in safetensors, or save a plain state dict: model.save_pretrained(DIR)"
    )
    if not isinstance(saved, Mapping) or not saved:
        what = "an empty mapping" if isinstance(saved, Mapping) else f"a {type(saved).__name__}"
        raise InvalidCheckpointError(
            f"{path} holds {what}, not a state dict", hint="is it the file that save_pretrained or torch.save wrote?"
        )
    plain = {key: value for key, value in saved.items() if isinstance(key, str) and _is_plain(value, torch)}
    if len(plain) < len(saved):
        wrong = [f"{key!r} ({_description(value, torch)})" for key, value in saved.items() if key not in plain]
        raise InvalidCheckpointError(
            f"{path} holds entries that are not plain tensors: {listed(wrong)}",
            hint="save the state dict alone, on the CPU, without quantised or sparse tensors",
        )
    return {key: value.detach() for key, value in plain.items()}


def describe_torch_file(path: Path) -> dict[str, TensorInfo]:
    """Describe the tensors of a ``.bin`` file; raises like :func:`read_state_dict`."""
    names = dtype_names()
    return {
        key: TensorInfo(key, names[tensor.dtype], tuple(tensor.shape), path.name, 0, tensor.nbytes, PYTORCH)
        for key, tensor in read_state_dict(path).items()
    }


def _is_plain(value: Any, torch: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and value.dtype in dtype_names()
    )


def _description(value: Any, torch: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of {value.dtype}, {value.layout}, on {value.device}"
    return type(value).__name__


def _damaged(path: Path, error: Exception) -> InvalidCheckpointError:
    return InvalidCheckpointError(
        f"{path} cannot be read as a PyTorch file: {type(error).__name__}: {_line(error)}",
        hint="is it complete, and was it written by torch.save?",
    )


def _line(error: Exception, pattern: re.Pattern[str] = re.compile("")) -> str:
    """Return the first line of a message that matches a pattern; empty if none does."""
    text = str(error)
    lines = text[text.find(_REASON_PREFIX) + len(_REASON_PREFIX) if _REASON_PREFIX in text else 0 :].splitlines()
    return next((line.strip()[:300] for line in lines if line.strip() and pattern.search(line)), "")
