"""Derive how the tensor names on disk become those of the module."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from splitlearn_auto.findings import CannotSplitError

_ROTARY = "rotary_emb.inv_freq"
_LITERAL = re.compile(r"[A-Za-z0-9_]+(?:\\?\.[A-Za-z0-9_]+)+")


def ignored_suffixes(model: Any) -> tuple[str, ...]:
    """Return the suffixes of tensors of old checkpoints that transformers ignores."""
    patterns = [str(pattern) for pattern in sorted(model._keys_to_ignore_on_load_unexpected or ())]  # noqa: SLF001
    literal = [pattern.replace("\\", "") for pattern in patterns if _LITERAL.fullmatch(pattern)]
    if any(name.endswith(_ROTARY) for name, _ in model.named_buffers()):
        literal.append(_ROTARY)
    keys = [f".{key}" for key in model.state_dict()]
    return tuple(f".{suffix}" for suffix in literal if not any(key.endswith(f".{suffix}") for key in keys))


def renamed_keys(model: Any) -> tuple[tuple[str, str], ...]:
    """Return the parts of names that differ between disk and module, as pairs ``(on disk, in the module)``.

    Raises:
        CannotSplitError: transformers converts the tensors when it loads a checkpoint.
    """
    inside = model.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = {key: tensor for file in Path(folder).glob("*.safetensors") for key, tensor in load_file(file).items()}
    pairs: dict[tuple[str, str], None] = {}
    for key in sorted(saved.keys() - inside.keys()):
        origin = next((name for name, tensor in inside.items() if _same(tensor, saved[key])), None)
        if origin is not None:
            pairs[_difference(key, origin)] = None
    foreign = sorted({_replaced(key, pairs) for key in saved} - inside.keys())
    if foreign:
        missing = sorted(inside.keys() - saved.keys())
        raise CannotSplitError(
            f"its checkpoints hold {len(foreign)} tensors that are none of the module's ({foreign[0]}, ...): "
            f"transformers makes others of them when it loads ({missing[0]}, ...), "
            "and components are made of tensors as they lie in the file",
        )
    return tuple(pairs)


def _same(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.shape == second.shape and torch.equal(first, second)


def _difference(key: str, name: str) -> tuple[str, str]:
    """Return the different parts of two names of a tensor, cut at the dots."""
    on_disk, in_module = key.split("."), name.split(".")
    while len(on_disk) > 1 and len(in_module) > 1 and on_disk[-1] == in_module[-1]:
        on_disk, in_module = on_disk[:-1], in_module[:-1]
    after = "." if on_disk != key.split(".") else ""
    shared = 0
    while shared < min(len(on_disk), len(in_module)) - 1 and on_disk[shared] == in_module[shared]:
        shared += 1
    before = "." if shared else ""
    return tuple(f"{before}{'.'.join(names[shared:])}{after}" for names in (on_disk, in_module))  # type: ignore[return-value]


def _replaced(key: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        key = key.replace(old, new)
    return key
