"""What tensors a model has, by its configuration alone: for plans of checkpoints without weights."""

from __future__ import annotations

from typing import Any

import torch

from splitlearn_core.build.component import architecture_class, blaming_config, hf_config
from splitlearn_core.build.skeleton import BUILD_LOCK
from splitlearn_core.family import ModelFamily
from splitlearn_core.types import DTYPE_BYTES, FLOAT_DTYPES, TensorInfo


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
