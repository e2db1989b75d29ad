"""How the names of a type's tensors on disk become those in the module."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from splitlearn_core.checkpoint.header import read_header
from splitlearn_core.scaffold.findings import CannotSplit

_ROTARY = "rotary_emb.inv_freq"
_LITERAL = re.compile(r"[A-Za-z0-9_]+(?:\\?\.[A-Za-z0-9_]+)+")


def ignored_suffixes(model: Any) -> tuple[str, ...]:
    """Return what old checkpoints carry and no module wants, by what transformers passes over."""
    patterns = [str(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]  # noqa: SLF001
    literal = [pattern.replace("\\", "") for pattern in patterns if _LITERAL.fullmatch(pattern)]
    if any(name.endswith(_ROTARY) for name, _ in model.named_buffers()):
        literal.append(_ROTARY)
    keys = [f".{key}" for key in model.state_dict()]
    return tuple(f".{suffix}" for suffix in literal if not any(key.endswith(f".{suffix}") for key in keys))


def check_saved_keys(model: Any) -> None:
    """Refuse a type whose tensors are others on disk than in the module.

    Raises:
        CannotSplit: transformers merges or renames tensors when it loads a checkpoint of the type.
    """
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = {key for file in Path(folder).glob("*.safetensors") for key in read_header(file)}
    foreign = sorted(saved - model.state_dict().keys())
    if foreign:
        missing = sorted(model.state_dict().keys() - saved)
        raise CannotSplit(
            f"its checkpoints hold {len(foreign)} tensors that are none of the module's ({foreign[0]}, ...): "
            f"transformers makes others of them when it loads ({missing[0]}, ...), "
            "and components are made of tensors as they lie in the file",
        )
