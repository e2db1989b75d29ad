"""Read the ``config.json`` that a caller names."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from splitlearn_core import ConfigurationError, MissingFileError
from splitlearn_core.extension import (
    CONFIG,
    WRITTEN,
    open_source,
    quote,
    read_config,
    registry,
    unbundled,
    user_path,
    way_out,
)


def given_config(model_type: str, origin: str, **hub: Any) -> Mapping[str, Any]:
    """Read the ``config.json`` of a model.

    Args:
        model_type: The expected model type.
        origin: A directory, a ``config.json``, ``bundled:MODEL_TYPE``, or a Hub repository, of which nothing else is
            fetched.
        hub: ``cache_dir``, ``revision``, ``token`` and ``local_files_only``.

    Raises:
        MissingFileError: There is no such file.
        InvalidCheckpointError: It is not a configuration.
        ConfigurationError: It is of another model type.
    """
    path = user_path(origin)
    if not _is_file(path):
        if origin.endswith(".json"):
            raise MissingFileError(
                f"there is no file {origin}", hint="give a config.json, its folder, or a Hub repository: owner/name"
            )
        path = open_source(unbundled(origin), **hub).path(CONFIG)
    config = read_config(path)
    stated = config["model_type"]
    if stated != model_type:
        provided = registry().model_types()
        way = f"use its plugin, which is installed: splitlearn plan {shlex.quote(origin)} --split A B"
        if stated not in provided:
            way = way_out(stated, provided)
        if stated in WRITTEN and stated not in provided:
            way = f"splitlearn plugins new {stated} --from {shlex.quote(origin)} --out DIR"
        raise ConfigurationError(f"{origin} is a model of type {quote(stated)}, not {model_type!r}", hint=way)
    return config


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    # Too long for a path, or with a NUL byte.
    except (OSError, ValueError):
        return False
