"""A disk cache of the tokenizers that transformers converts from weight files, which takes many seconds.

The key is the file's size, modification time and hash of its beginning, which contains the vocabulary, and the versions
of transformers and tokenizers. An entry is written atomically, and replaced if it is damaged; processes may share the
cache.
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

from splitlearn_core.checkpoint.files import CONFIG
from splitlearn_core.quoting import said
from splitlearn_core.types import Progress, ProgressCallback

log = logging.getLogger(__name__)

_DIGESTS = "digests.json"
#: Bytes of a file that are hashed: the header, with the vocabulary.
_HEAD_BYTES = 16 * 2**20
#: The newest entries are kept.
_MAX_ENTRIES = 32


def cache_folder() -> Path:
    """Return the folder of the cache, below that of Hugging Face's own caches."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or Path(base) / "huggingface"
    return Path(home).expanduser() / "splitlearn" / "tokenizers"


def load_converted(file: Path, arguments: dict[str, Any], progress: ProgressCallback) -> Any:
    """Return the tokenizer that transformers converts from a weight file, from the cache if it is there.

    Args:
        file: The weight file.
        arguments: Arguments of ``from_pretrained`` other than the folder.
        progress: Called if the tokenizer has to be converted.
    """
    from transformers import AutoTokenizer

    cached = _cached(file)
    if cached is not None:
        try:
            return AutoTokenizer.from_pretrained(cached, local_files_only=True)
        # The files are intact, but transformers may raise any error while it reads them.
        except Exception as error:  # noqa: BLE001
            log.warning("The tokenizer in %s is converted again: %s", cached, said(error))
            shutil.rmtree(cached, ignore_errors=True)
    progress(Progress("converting", file=file.name))
    log.info("Converting the tokenizer of %s; the result is cached", file)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, local_files_only=True, **arguments)
    _store(file, tokenizer)
    return tokenizer


def converted_files(file: Path, arguments: dict[str, Any], progress: ProgressCallback) -> dict[str, Path]:
    """Return the files of the tokenizer that transformers converts from a weight file, by name; none if that fails."""
    if _cached(file) is None:
        try:
            load_converted(file, arguments, progress)
        # transformers may raise anything for the contents of the file.
        except Exception as error:  # noqa: BLE001
            log.warning("The tokenizer in %s cannot be saved: %s", file, said(error))
            return {}
    cached = _cached(file)
    if cached is None:
        return {}
    return {path.name: path for path in sorted(cached.iterdir()) if path.name not in (_DIGESTS, CONFIG)}


def _entry(file: Path) -> Path:
    import tokenizers
    import transformers

    with file.open("rb") as opened:
        status = os.fstat(opened.fileno())
        head = hashlib.sha256(opened.read(_HEAD_BYTES))
    identity = (status.st_size, status.st_mtime_ns, head.hexdigest(), transformers.__version__, tokenizers.__version__)
    return cache_folder() / hashlib.sha256(repr(identity).encode()).hexdigest()


def _cached(file: Path) -> Path | None:
    """Return the entry of a file if it exists and is intact."""
    try:
        entry = _entry(file)
        digests = json.loads((entry / _DIGESTS).read_bytes())
        if isinstance(digests, dict) and digests and digests == _digests(entry):
            return entry
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        log.warning("A cached tokenizer cannot be read, and is converted again: %s", error)
        return None
    log.warning("The tokenizer in %s is damaged, and is converted again", entry)
    return None


def _digests(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != _DIGESTS
    }


def _store(file: Path, tokenizer: Any) -> None:
    """Write an entry to a temporary folder and rename it; a cache that cannot be written is not an error."""
    try:
        entry = _entry(file)
        entry.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=entry.parent, prefix=".making-"))
        try:
            tokenizer.save_pretrained(work)
            (work / _DIGESTS).write_text(json.dumps(_digests(work)))
            if entry.exists() and _cached(file) is None:
                entry.rename(work / "damaged")
            # Another process may have been faster; its entry stays.
            if not entry.exists():
                shutil.rmtree(work / "damaged", ignore_errors=True)
                work.rename(entry)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        entries = [path for path in entry.parent.iterdir() if not path.name.startswith(".")]
        for path in sorted(entries, key=lambda path: path.stat().st_mtime)[:-_MAX_ENTRIES]:
            shutil.rmtree(path, ignore_errors=True)
    except OSError as error:
        log.warning("The tokenizer of %s is not cached: %s", file, error)
