"""The whole model through ``from_pretrained``, checked; and a model's tensors from its configuration alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from splitlearn_core.build.configuration import architecture_class, blaming_config, hf_config
from splitlearn_core.build.pruning import BUILD_LOCK
from splitlearn_core.errors import CheckpointError, InvalidCheckpointError, SplitLearnError, TensorMismatchError
from splitlearn_core.family import ModelFamily
from splitlearn_core.quoting import SENTENCE, listed, said
from splitlearn_core.types import DTYPE_BYTES, FLOAT_DTYPES, TensorInfo

log = logging.getLogger(__name__)

#: Seconds between two looks at whether the load is still wanted.
_PATIENCE = 0.05


def load_whole(
    family: ModelFamily,
    name: str,
    directory: str,
    dtype: str,
    *,
    values: Mapping[str, Any],
    safetensors: bool,
    waiting: Callable[[], None],
) -> dict[str, torch.Tensor]:
    """Load a whole model as ``from_pretrained`` does, and return its tensors, dequantised.

    Args:
        family: The family.
        name: The model, as the caller named it.
        directory: Where its ``config.json`` and all of its weight files lie.
        dtype: torch's name of the dtype that its tensors take on.
        values: Those of its ``config.json``, which is not read a second time.
        safetensors: Whether the weight files are such.
        waiting: Called while another load has the turn; it may raise.

    Raises:
        CheckpointError: transformers cannot load it, or not all of it.
    """
    log.info("Loading the whole of %s in %s", name, directory)
    with alone(waiting), blaming(name):
        model, info = architecture_class(family).from_pretrained(
            directory,
            config=hf_config(family, values, name, dtype),
            dtype=getattr(torch, dtype),
            local_files_only=True,
            use_safetensors=safetensors,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        if getattr(model, "hf_quantizer", None) is not None and getattr(model, "is_quantized", True):
            model = model.dequantize()
    refuse_incomplete(name, model, info)
    return {key: tensor.detach() for key, tensor in model.state_dict().items()}


def check_quantization(name: str, quantization: str, stated: Any) -> None:
    """Ask transformers whether it can read weights that are quantised so, before any of them is fetched.

    Raises:
        CheckpointError: It cannot: it does not know the method, or a package is missing.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    hint = "install what it asks for, or use the original, unquantised checkpoint"
    try:
        with BUILD_LOCK:
            AutoHfQuantizer.from_config(stated, pre_quantized=True).validate_environment(device_map=None)
    # Each quantiser raises what it likes of what it misses.
    except Exception as error:
        raise CheckpointError(
            f"{name} is quantised ({quantization}), and transformers cannot read it here: {said(error)}",
            hint=hint,
        ) from error


@contextmanager
def alone(waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock under which modules are built.

    from_pretrained puts functions and defaults of torch in place of others while it works: twice at
    once, it returns models that are not whole, and says nothing.
    """
    waiting()
    while not BUILD_LOCK.acquire(timeout=_PATIENCE):
        waiting()
    try:
        yield
    finally:
        BUILD_LOCK.release()


@contextmanager
def blaming(name: str) -> Iterator[None]:
    """Say that it was transformers that could not load a model."""
    try:
        yield
    except (SplitLearnError, MemoryError):
        raise
    # The model's own code, and that of quantisers, raises what it likes.
    except Exception as error:
        # One of the system's has a number; transformers raises others of this class for what it cannot read.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise CheckpointError(
            f"transformers cannot load {name}: {said(error)}",
            hint="do config.json and the weights belong together?",
        ) from error


def refuse_incomplete(name: str, module: Any, info: Mapping[str, Any]) -> None:
    """Refuse a model that was filled up with random weights, or that is not wholly there."""
    problems = [f"missing: {key}" for key in sorted(info.get("missing_keys") or ())]
    problems += [f"mis-shaped: {entry}" for entry in sorted(map(str, info.get("mismatched_keys") or ()))]
    if problems:
        raise TensorMismatchError(
            f"the tensors of {name} are not those of its model; {len(problems)} are wrong:\n  "
            + listed(problems, "\n  ", limit=SENTENCE),
            hint='do config.json and the weights belong together, and is it a causal model (see its "architectures")?',
        )
    empty = [key for key, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    if empty:
        raise InvalidCheckpointError(
            f"{name}: transformers left tensors without memory: {listed(empty)}",
            hint="another version of transformers may do better",
        )


def describe_tensors(
    family: ModelFamily, values: dict[str, Any], name_or_path: str, dtype: str
) -> dict[str, TensorInfo]:
    """Build the whole model on the meta device, and describe its tensors as a file would hold them.

    A tied head is left out, as ``save_pretrained`` does.
    """
    config = hf_config(family, values, name_or_path, dtype)
    stored = FLOAT_DTYPES[dtype]
    with BUILD_LOCK, blaming_config(family, name_or_path), torch.device("meta"):
        model = architecture_class(family)(config)
    head = f"{family.head}.weight"
    tied = bool(family.config_value(values, "tie_word_embeddings"))
    infos, position = {}, 0
    for key, tensor in model.state_dict().items():
        if tied and key == head:
            continue
        size = tensor.numel() * DTYPE_BYTES[stored]
        infos[key] = TensorInfo(key, stored, tuple(tensor.shape), "", position, position + size)
        position += size
    return infos
