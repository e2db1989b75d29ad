"""Tokenizers that transformers makes of a weight file, remembered on disk: making one takes many seconds.

An entry belongs to a file by its size, its time and the hash of its beginning, where the vocabulary is,
and to a version of transformers and tokenizers. It appears whole or not at all, and one that is damaged
is made again; processes beside each other do not disturb each other.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from splitlearn_core.types import Progress, ProgressCallback

log = logging.getLogger(__name__)

_DIGESTS = "digests.json"
#: Bytes of a file that are hashed: its header, with the vocabulary.
_HEAD_BYTES = 16 * 2**20
#: Entries that are kept, the newest.
_MAX_ENTRIES = 32
_CONFIG = "config.json"


def cache_folder() -> Path:
    """Return the folder of remembered tokenizers, below that of Hugging Face's own caches."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or Path(base) / "huggingface"
    return Path(home).expanduser() / "splitlearn" / "tokenizers"


def load_converted(file: Path, arguments: dict[str, Any], progress: ProgressCallback) -> Any:
    """Return the tokenizer that transformers makes of a weight file, from the cache where it is there.

    Args:
        file: The weight file.
        arguments: What ``from_pretrained`` is told besides the folder.
        progress: Told where the tokenizer has to be made.
    """
    from transformers import AutoTokenizer

    kept = _kept(file)
    if kept is not None:
        try:
            return AutoTokenizer.from_pretrained(kept, local_files_only=True)
        # Its files are whole, but of no use to this transformers, which may raise anything.
        except Exception as error:  # noqa: BLE001
            log.warning("The tokenizer kept in %s is made again: %s: %s", kept, type(error).__name__, str(error)[:200])
            shutil.rmtree(kept, ignore_errors=True)
    progress(Progress("converting", file=file.name))
    log.info("Converting the tokenizer of %s, which is remembered", file)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, local_files_only=True, **arguments)
    _keep(file, tokenizer)
    return tokenizer


def converted_files(file: Path, arguments: dict[str, Any], progress: ProgressCallback) -> dict[str, Path]:
    """Return the files of the tokenizer that transformers makes of a weight file, by name; none where it cannot."""
    if _kept(file) is None:
        try:
            load_converted(file, arguments, progress)
        # transformers rebuilds it from what the file says, and raises whatever comes of that.
        except Exception as error:  # noqa: BLE001
            log.warning("%s holds no tokenizer that can be saved: %s: %s", file, type(error).__name__, str(error)[:200])
            return {}
    kept = _kept(file)
    if kept is None:
        return {}
    return {path.name: path for path in sorted(kept.iterdir()) if path.name not in (_DIGESTS, _CONFIG)}


def _entry(file: Path) -> Path:
    import tokenizers
    import transformers

    with file.open("rb") as opened:
        known = os.fstat(opened.fileno())
        head = hashlib.sha256(opened.read(_HEAD_BYTES))
    identity = (known.st_size, known.st_mtime_ns, head.hexdigest(), transformers.__version__, tokenizers.__version__)
    return cache_folder() / hashlib.sha256(repr(identity).encode()).hexdigest()


def _kept(file: Path) -> Path | None:
    """Return the entry of a file if all of it is as it was written."""
    try:
        entry = _entry(file)
        digests = json.loads((entry / _DIGESTS).read_bytes())
        if isinstance(digests, dict) and digests and digests == _digests(entry):
            return entry
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        log.warning("A remembered tokenizer cannot be read, and is made again: %s", error)
        return None
    log.warning("The tokenizer kept in %s is damaged, and is made again", entry)
    return None


def _digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != _DIGESTS
    }


def _keep(file: Path, tokenizer: Any) -> None:
    """Write an entry beside its place and move it there; a cache that cannot be written is no error."""
    try:
        entry = _entry(file)
        entry.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=entry.parent, prefix=".making-"))
        try:
            tokenizer.save_pretrained(work)
            (work / _DIGESTS).write_text(json.dumps(_digests(work)))
            if entry.exists() and _kept(file) is None:
                entry.rename(work / "damaged")
            # Another process may have been faster: then its entry stays.
            if not entry.exists():
                shutil.rmtree(work / "damaged", ignore_errors=True)
                work.rename(entry)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        _prune(entry.parent)
    except OSError as error:
        log.warning("The tokenizer of %s is not remembered: %s", file, error)


def _prune(folder: Path) -> None:
    entries = sorted(
        (path for path in folder.iterdir() if not path.name.startswith(".")), key=lambda path: path.stat().st_mtime
    )
    for path in entries[:-_MAX_ENTRIES]:
        shutil.rmtree(path, ignore_errors=True)
