"""JSON of a checkpoint, read in one way: in UTF-8, which editors may have begun with a byte order mark."""

from __future__ import annotations

import codecs
import json
import shlex
from pathlib import Path
from typing import Any

from splitlearn_core.checkpoint.regular import open_regular
from splitlearn_core.errors import InvalidCheckpointError
from splitlearn_core.quoting import reason

#: How a file begins that is in another encoding, with a byte order mark and without; the longer ones first.
_OTHERS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    b"{\0\0\0": "utf-32-le",
    b"\0\0\0{": "utf-32-be",
    b"{\0": "utf-16-le",
    b"\0{": "utf-16-be",
}
_ANEW = "fetch or write the file anew"


def read_object(path: Path, max_bytes: int) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: The file.
        max_bytes: What is longer is none of its kind.

    Raises:
        InvalidCheckpointError: It is too long, in another encoding, or no JSON object.
    """
    with open_regular(path) as file:
        return parse_object(file.read(max_bytes + 1), str(path), max_bytes)


def parse_object(
    content: bytes, where: str, max_bytes: int, *, kind: str = "file of its kind", hint: str = _ANEW
) -> dict[str, Any]:
    """Parse a JSON object; ``content`` may be one byte longer than it should be. Raises as :func:`read_object`."""
    if len(content) > max_bytes:
        raise InvalidCheckpointError(f"{where} is over {max_bytes} bytes long, which no {kind} is", hint=hint)
    encoding = next((name for beginning, name in _OTHERS.items() if content.startswith(beginning)), "")
    if encoding:
        raise InvalidCheckpointError(
            f"{where} is no JSON in UTF-8, but in {encoding}; transformers, too, reads UTF-8 alone",
            hint=_recode(where, encoding),
        )
    try:
        found = json.loads(content.decode("utf-8-sig"))
    # A number of thousands of digits is a ValueError, too.
    except (ValueError, RecursionError) as error:
        raise InvalidCheckpointError(f"{where} is no JSON: {reason(error)}", hint=hint) from error
    if not isinstance(found, dict):
        raise InvalidCheckpointError(f"{where} holds a JSON {type(found).__name__}, not an object", hint=hint)
    return found


def _recode(where: str, encoding: str) -> str:
    code = f"import sys, pathlib; p = pathlib.Path(sys.argv[1]); p.write_bytes(p.read_text('{encoding}').encode())"
    return f'write it in UTF-8: python -c "{code}" {shlex.quote(where)}'
