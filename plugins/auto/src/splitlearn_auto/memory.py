"""Answers on disk: a file for each model type and set of versions. Imports neither torch nor transformers."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from splitlearn_auto.answers import Answer, answer_from
from splitlearn_core import SplitLearnError
from splitlearn_core.extension import read_object, reason, version_of

log = logging.getLogger(__name__)

#: Of the files; grows when an older version of this package would misread them.
_FORMAT = 1
#: The versions that an answer depends on.
_DECISIVE = ("transformers", "torch", "splitlearn-core", "splitlearn-auto")
_MAX_BYTES = 2**18
#: What was warned of, so that it is once.
_warned: set[str] = set()


def cache_folder() -> Path:
    """Return where answers are kept: ``XDG_CACHE_HOME``, or the platform's folder for caches."""
    if stated := os.environ.get("XDG_CACHE_HOME"):
        base = Path(stated)
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return base / "splitlearn" / "families"


def recall(model_type: str) -> Answer | None:
    """Return what was remembered with the installed versions; None if nothing is, or it is not valid."""
    try:
        path, key = _place(model_type)
        return _checked(read_object(path, _MAX_BYTES), key)
    except FileNotFoundError:
        return None
    # Path.home raises RuntimeError where there is no home.
    except (SplitLearnError, OSError, RuntimeError, ValueError) as error:
        _warn(f"what is kept about model type {model_type!r} is not used, and it is examined again: {reason(error)}")
        return None


def remember(model_type: str, answer: Answer) -> None:
    """Write an answer, completely or not at all; other processes read the one before, or this one."""
    try:
        path, key = _place(model_type)
        content: dict[str, Any] = {"format": _FORMAT, "key": key, "answer": answer.to_dict()}
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, unfinished = tempfile.mkstemp(prefix=".", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump({**content, "sha256": _digest(content)}, file, indent=1)
            Path(unfinished).replace(path)
        except BaseException:
            with suppress(FileNotFoundError):
                Path(unfinished).unlink()
            raise
    except (OSError, RuntimeError) as error:
        _warn(f"what was found out about model types cannot be kept, and is found out each time: {reason(error)}")


def _place(model_type: str) -> tuple[Path, dict[str, str]]:
    key = {"model_type": model_type, **{name: version_of(name) or "" for name in _DECISIVE}}
    return cache_folder() / f"{model_type}-{_digest(key)[:16]}.json", key


def _checked(content: Mapping[str, Any], key: Mapping[str, str]) -> Answer:
    stated = content.get("format")
    if stated != _FORMAT:
        raise ValueError(f"its format is {stated!r}, and this version of splitlearn-auto reads {_FORMAT}")
    if content.get("key") != key:
        raise ValueError("it is about other versions, or another type")
    if content.get("sha256") != _digest({name: content[name] for name in content if name != "sha256"}):
        raise ValueError("it is damaged: its checksum is wrong")
    return answer_from(content.get("answer", {}), key["model_type"])


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _warn(text: str) -> None:
    if text not in _warned:
        _warned.add(text)
        log.warning("%s", text)
