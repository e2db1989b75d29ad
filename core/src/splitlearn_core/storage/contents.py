"""The contents of the folder of a saved component: tensors, copied files, written files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitlearn_core.checkpoint.manifest import is_plain_name
from splitlearn_core.checkpoint.names import CONFIG, GENERATION_CONFIG, TOKENIZER_PREFIXES
from splitlearn_core.checkpoint.origin import Origin
from splitlearn_core.loading.opening import OpenModel
from splitlearn_core.storage.weight_layout import Tensor
from splitlearn_core.tokenization import converted_files
from splitlearn_core.types import (
    Component,
    ProgressCallback,
)


@dataclass(frozen=True, slots=True)
class Part:
    """A component to be saved."""

    origin: Origin
    own_values: bool
    tensors: tuple[Tensor, ...]
    #: Small files to copy: name in the folder -> source.
    copied: Mapping[str, Path]
    #: Small files to write: name -> text.
    written: Mapping[str, str]


def companion_files(model: OpenModel, kind: Component, progress: ProgressCallback) -> dict[str, Path]:
    """Return the small files that go with a component; the trunk needs no tokenizer.

    A tokenizer that is part of a weight file is converted into files.
    """
    names = [CONFIG] if model.checkpoint.source.has_config else []
    if kind is not Component.TRUNK:
        available = sorted(model.checkpoint.source.files())
        names += [
            name
            for name in available
            if name == GENERATION_CONFIG or (name.startswith(TOKENIZER_PREFIXES) and is_plain_name(name))
        ]
    # A name like tokenizer.safetensors is that of a weight file all the same.
    files = {name: model.checkpoint.source.path(name) for name in names if not name.endswith((".safetensors", ".bin"))}
    arguments = model.checkpoint.pretrained_arguments()
    if arguments is None or kind is Component.TRUNK or any(name.startswith(TOKENIZER_PREFIXES) for name in files):
        return files
    file = model.checkpoint.source.path(model.checkpoint.weight_files()[0])
    return files | converted_files(file, dict(arguments), progress)


def config_text(config: Mapping[str, Any]) -> str:
    """Write a ``config.json``."""
    return json.dumps(config, indent=2) + "\n"
