"""``config.json`` and the index, read as data: importing a configuration class takes over a second."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from splitlearn_core.errors import InvalidCheckpointError

CONFIG = "config.json"
#: Ends of weight files that a package of their own reads: what they are, the package, its folder in a checkout.
_READ_BY_OTHERS = {".gguf": ("GGUF", "splitlearn-gguf", "./plugins/gguf")}
#: Of an adapter that PEFT saved.
ADAPTER_CONFIG = "adapter_config.json"

#: The largest index in use is a few megabytes; nobody reads a gigabyte to find that it is none.
_MAX_JSON_BYTES = 100_000_000
#: Characters of a name from a file that a message repeats.
_MAX_NAME = 200


def read_config(path: Path) -> dict[str, Any]:
    """Read ``config.json``.

    Raises:
        InvalidCheckpointError: It is no JSON object, or names no model type.
    """
    return check_config(_read_object(path), str(path))


def check_config(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a configuration that names its model type; raises InvalidCheckpointError, naming ``where``."""
    if not isinstance(config.get("model_type"), str):
        raise InvalidCheckpointError(
            f'{where} has no "model_type", so nothing says which family the model belongs to',
            hint='add "model_type": "gpt2" (or what it is) to the file',
        )
    return config


def read_weight_map(path: Path, suffix: str = ".safetensors") -> dict[str, str]:
    """Read an index file: tensor name -> name of the shard beside it.

    Args:
        path: The index.
        suffix: How the names of its shards end.

    Raises:
        InvalidCheckpointError: It is no index, or it names a shard outside its own folder.
    """
    weight_map = _read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidCheckpointError(f'{path} has no "weight_map" of tensors', hint="fetch or write the index anew")
    # Each name is judged once: an index has a thousand tensors and a few dozen shards.
    sound = {shard for shard in {str(shard) for shard in weight_map.values()} if _is_shard_name(shard, suffix)}
    wrong = [
        f"{key!r} -> {shard!r}" for key, shard in weight_map.items() if not isinstance(shard, str) or shard not in sound
    ]
    if wrong:
        raise InvalidCheckpointError(
            f"{path} names shards that are no {suffix} files in its own folder: {'; '.join(sorted(wrong)[:8])}",
            hint="an index may only name files beside it; do not use this checkpoint unless you know why it does",
        )
    return weight_map


def read_index_dtype(path: Path) -> str:
    """Return the dtype that an index file states in its metadata; empty where it states none."""
    metadata = _read_object(path).get("metadata")
    stated = metadata.get("dtype") if isinstance(metadata, dict) else None
    return stated if isinstance(stated, str) else ""


def needed_reader(names: Iterable[str]) -> tuple[str, str, str] | None:
    """Return the first file that a package of its own reads, what it is, and the way to have that package; or None."""
    for name in sorted(names):
        for suffix, (format_name, package, folder) in _READ_BY_OTHERS.items():
            if name.lower().endswith(suffix):
                install = f"pip install {package} (from a checkout: pip install {folder})"
                return name, format_name, f"{install}; where it is there, splitlearn plugins says why it is not used"
    return None


def base_of(path: Path) -> str:
    """Return the model that an adapter's configuration names; a word for it where it names none."""
    try:
        stated = _read_object(path).get("base_model_name_or_path")
    except InvalidCheckpointError:
        stated = None
    return stated[:_MAX_NAME] if isinstance(stated, str) and stated else "its base model"


def _is_shard_name(shard: str, suffix: str) -> bool:
    # One plain name under the rules of both systems, whatever this one is.
    return (
        shard.endswith(suffix)
        and "\0" not in shard
        and PurePosixPath(shard).parts == PureWindowsPath(shard).parts == (shard,)
    )


def _read_object(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        read = file.read(_MAX_JSON_BYTES + 1)
    if len(read) > _MAX_JSON_BYTES:
        raise InvalidCheckpointError(
            f"{path} is over {_MAX_JSON_BYTES} bytes long, which no file of its kind is", hint="fetch it anew"
        )
    try:
        content = json.loads(read)
    except (ValueError, RecursionError) as error:
        raise InvalidCheckpointError(f"{path} is no JSON: {error}", hint="fetch or write the file anew") from error
    if not isinstance(content, dict):
        raise InvalidCheckpointError(
            f"{path} holds a JSON {type(content).__name__}, not an object", hint="fetch or write the file anew"
        )
    return content
