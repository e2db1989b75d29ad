"""Whether models from the Hub can be kept: the folder of the cache, and the room on its disk."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from splitlearn_core.doctor.findings import Finding, Level
from splitlearn_core.units import human_bytes

_NAME = "cache"
_LITTLE_ROOM = 5 * 2**30


def check_cache() -> list[Finding]:
    """Look at the folder in which ``huggingface_hub`` keeps models."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return folder(Path(HF_HUB_CACHE).expanduser())


def folder(path: Path) -> list[Finding]:
    """Judge a cache: can files be written, and is there room for them? Nothing is left behind."""
    other = "set HF_HOME to a folder of yours"
    nearest = path
    try:
        # Below a folder that may not be searched, even this question is refused.
        while not nearest.exists():
            nearest = nearest.parent
        if not nearest.is_dir():
            return [
                Finding(_NAME, Level.WRONG, f"the cache of models cannot be: {nearest} is a file", str(path), other)
            ]
        with tempfile.TemporaryFile(dir=nearest):
            pass
        free = shutil.disk_usage(nearest).free
    except OSError as error:
        what = f"the cache of models cannot be written: {error.strerror or error}"
        return [Finding(_NAME, Level.WRONG, what, str(path), f"{other}, or: chmod u+rwx {nearest}")]
    state = "is writable" if nearest == path else "is not there yet, and can be made"
    what = f"the cache of models {state}; {human_bytes(free)} of its disk are free"
    if free < _LITTLE_ROOM:
        return [Finding(_NAME, Level.NOTE, what, str(path), f"hf cache ls shows what it holds; or {other}")]
    return [Finding(_NAME, Level.OK, what, str(path))]
