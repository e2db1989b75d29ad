"""``config.json`` and the index, read as plain JSON: importing a configuration class takes over a second."""

from __future__ import annotations

import codecs
import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from splitlearn_core.checkpoint.files import open_regular
from splitlearn_core.errors import InvalidCheckpointError
from splitlearn_core.plan.bounds import check_numbers
from splitlearn_core.quoting import SENTENCE, listed, plain, quote, reason
from splitlearn_core.types import DTYPE_FIELDS, FLOAT_DTYPES, STATED_DTYPES

#: First bytes of JSON in another encoding, with and without a byte order mark; the longer ones first.
_OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    b"{\0\0\0": "utf-32-le",
    b"\0\0\0{": "utf-32-be",
    b"{\0": "utf-16-le",
    b"\0{": "utf-16-be",
}
_AGAIN = "fetch or write the file again"


def read_object(path: Path, max_bytes: int) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: The file.
        max_bytes: A longer file is refused.

    Raises:
        InvalidCheckpointError: It is too long, in another encoding, or not a JSON object.
    """
    with open_regular(path) as file:
        return parse_object(file.read(max_bytes + 1), str(path), max_bytes)


def parse_object(
    content: bytes, where: str, max_bytes: int, *, kind: str = "file of its kind", hint: str = _AGAIN
) -> dict[str, Any]:
    """Parse a JSON object; ``content`` may be one byte longer than it should be. Raises as :func:`read_object`."""
    if len(content) > max_bytes:
        raise InvalidCheckpointError(f"{where} is longer than {max_bytes} bytes, the limit for a {kind}", hint=hint)
    encoding = next((name for beginning, name in _OTHER_ENCODINGS.items() if content.startswith(beginning)), "")
    if encoding:
        code = f"import sys, pathlib; p = pathlib.Path(sys.argv[1]); p.write_bytes(p.read_text('{encoding}').encode())"
        raise InvalidCheckpointError(
            f"{where} is not in UTF-8 but in {encoding}; transformers reads JSON in UTF-8 only",
            hint=f'write it in UTF-8: python -c "{code}" {shlex.quote(where)}',
        )
    try:
        values = json.loads(content.decode("utf-8-sig"))
    # A number of thousands of digits is a ValueError, too.
    except (ValueError, RecursionError) as error:
        raise InvalidCheckpointError(f"{where} is not valid JSON: {reason(error)}", hint=hint) from error
    if not isinstance(values, dict):
        raise InvalidCheckpointError(f"{where} holds a JSON {type(values).__name__}, not an object", hint=hint)
    return values


#: Suffixes of weight files that a separate package reads: the format, the package, its folder in a checkout.
_READ_BY_OTHERS = {".gguf": ("GGUF", "splitlearn-gguf", "./plugins/gguf")}

#: Values that readers of a configuration rely on: name -> type, and its name in messages.
_TYPES: Mapping[str, tuple[type, str]] = {
    "model_type": (str, "a string"),
    "layer_types": (list, "a list with a string for each layer"),
    "tie_word_embeddings": (bool, "true or false"),
}

#: The largest configuration in use, with a label for each of many classes, is a few megabytes, and the largest index
#: a dozen; what is parsed takes twenty times as much.
MAX_CONFIG_BYTES, _MAX_INDEX_BYTES = 10_000_000, 50_000_000


def read_config(path: Path) -> dict[str, Any]:
    """Read ``config.json``.

    Raises:
        InvalidCheckpointError: It is not a JSON object, or names no model type.
        ConfigurationError: Numbers in it are out of bounds.
    """
    return check_config(read_object(path, MAX_CONFIG_BYTES), str(path))


def check_config(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Return a configuration that names its model type; raises as :func:`read_config`, naming ``where``."""
    if config.get("model_type") is None:
        raise InvalidCheckpointError(
            f'{where} has no "model_type", which determines the family of the model',
            hint='add "model_type": "gpt2" (or what it is) to the file',
        )
    problems = list(_wrong_types(config))
    if problems:
        raise InvalidCheckpointError(
            f"{where} has invalid values: {'; '.join(problems)}",
            hint="correct them, or fetch the file again from where the model comes from",
        )
    check_numbers(config, where)
    return config


def _wrong_types(config: Mapping[str, Any]) -> Iterator[str]:
    """Describe the values of a wrong type; numbers are checked by ``check_numbers``."""
    for name, (kind, words) in _TYPES.items():
        value = config.get(name)
        if value is not None and not isinstance(value, kind):
            yield f"{name} is {quote(value)}, not {words}"
    for name in DTYPE_FIELDS:
        value = config.get(name)
        if value is not None and (not isinstance(value, str) or value.removeprefix("torch.") not in STATED_DTYPES):
            yield f"{name} is {quote(value)}, none of {', '.join(FLOAT_DTYPES)}"


def read_weight_map(path: Path, suffix: str = ".safetensors") -> dict[str, str]:
    """Read an index file: tensor name -> name of the shard in the same folder.

    Args:
        path: The index.
        suffix: Suffix of the names of its shards.

    Raises:
        InvalidCheckpointError: It is not an index, or it names a shard outside its own folder.
    """
    weight_map = read_object(path, _MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InvalidCheckpointError(f'{path} has no "weight_map" of tensors', hint="fetch or write the index again")
    # Each name is checked once: an index has a thousand tensors and a few dozen shards.
    # A valid one has no folder, under the rules of POSIX and of Windows.
    valid = {
        shard
        for shard in {str(shard) for shard in weight_map.values()}
        if shard.endswith(suffix)
        and "\0" not in shard
        and PurePosixPath(shard).parts == PureWindowsPath(shard).parts == (shard,)
    }
    wrong = [
        f"{quote(key)} -> {quote(shard)}"
        for key, shard in weight_map.items()
        if not isinstance(shard, str) or shard not in valid
    ]
    if wrong:
        shown = listed(sorted(wrong), "; ", limit=SENTENCE)
        raise InvalidCheckpointError(
            f"{path} names shards that are not {suffix} files in its own folder: {shown}",
            hint="an index may only name files next to it; do not use this checkpoint unless you know why it does",
        )
    return weight_map


def read_index_dtype(path: Path) -> str:
    """Return the dtype that an index file states in its metadata; empty if it states none."""
    metadata = read_object(path, _MAX_INDEX_BYTES).get("metadata")
    stated = metadata.get("dtype") if isinstance(metadata, dict) else None
    return stated if isinstance(stated, str) else ""


def needed_reader(names: Iterable[str]) -> tuple[str, str, str] | None:
    """Return the first file that a separate package reads, its format, and how to install the package; or None."""
    for name in sorted(names):
        for suffix, (format_name, package, folder) in _READ_BY_OTHERS.items():
            if name.lower().endswith(suffix):
                install = f"pip install {package} (from a checkout: pip install {folder})"
                return name, format_name, f"{install}; if it is installed, splitlearn plugins says why it is not used"
    return None


def base_of(path: Path) -> str:
    """Return the model that an adapter's configuration names, or a phrase for it if it names none."""
    try:
        stated = read_object(path, MAX_CONFIG_BYTES).get("base_model_name_or_path")
    except InvalidCheckpointError:
        stated = None
    return plain(stated) if isinstance(stated, str) and stated else "its base model"
