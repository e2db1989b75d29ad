"""Saving the local components of a split model, whose other components run elsewhere, for resuming a training."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from splitlearn_core.checkpoint.files import INDEX
from splitlearn_core.checkpoint.safetensors_header import read_header
from splitlearn_core.errors import ConfigurationError
from splitlearn_core.storage.directory import as_path
from splitlearn_core.storage.saving import save_split

#: The folder of the components, inside the one that was named.
COMPONENTS = "components"


def save_local_parts(parts: Sequence[Any], directory: str | os.PathLike[str]) -> Path:
    """Save components as ``directory/components/NAME``, and then an index over their files.

    The index is what a ``Trainer`` resumes from. There is no ``config.json`` next to it: transformers would take the
    folder for a whole model, and make up the layers that are missing.

    Args:
        parts: The local components.
        directory: A folder, which may hold other files of a trainer's.

    Returns:
        The directory.

    Raises:
        ConfigurationError: It is not a directory, or holds a whole model.
    """
    target = as_path(directory, "save_directory")
    if target.exists() and not target.is_dir():
        raise ConfigurationError(f"{target} is not a folder to save components to", hint="give another one")
    if (target / "config.json").exists():
        raise ConfigurationError(
            f"{target} holds a whole model, which the local components of this one would overwrite in part",
            hint="give a new folder",
        )
    target.mkdir(parents=True, exist_ok=True)
    # Without the index, an interrupted save cannot be resumed from.
    (target / INDEX).unlink(missing_ok=True)
    folder = target / COMPONENTS
    save_split(list(parts), folder, overwrite=True, progress=False)
    files = [path for part in parts for path in sorted((folder / str(part.component)).glob("*.safetensors"))]
    weight_map = {key: path.relative_to(target).as_posix() for path in files for key in read_header(path)}
    index = {"metadata": {"total_size": sum(path.stat().st_size for path in files)}, "weight_map": weight_map}
    written = target / f".{INDEX}"
    written.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    written.replace(target / INDEX)
    return target
