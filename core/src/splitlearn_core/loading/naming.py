"""Which argument names the model: what people give first may be its type, or the model itself."""

from __future__ import annotations

import os
from pathlib import Path

from splitlearn_core.checkpoint.config import CONFIG
from splitlearn_core.errors import ConfigurationError, UnknownModelTypeError
from splitlearn_core.loading.opening import BUNDLED
from splitlearn_core.plugins.registry import registry

_Path = str | os.PathLike[str]


def type_and_model(model_type: _Path | None, model_name_or_path: _Path | None) -> tuple[str | None, _Path | None]:
    """Return the model type and the model, where the model may stand in the type's place.

    A path, a repository of the Hub (``owner/name``) or ``bundled:TYPE`` is no model type.

    Raises:
        ConfigurationError: It cannot be told what is meant.
        UnknownModelTypeError: A name stands alone, and is neither a path nor a type.
    """
    if model_type is None or model_type == "":
        return None, model_name_or_path
    if not isinstance(model_type, str | os.PathLike):
        raise ConfigurationError(
            f"model_type is a {type(model_type).__name__}, where a model type or a model is named",
            hint="give the model as model_name_or_path, and the cuts as split_points=(a, b)",
        )
    name = os.fspath(model_type)
    if _is_model(model_type):
        if model_name_or_path is None:
            return None, model_type
        raise ConfigurationError(
            f"two models are named: model_type={name!r}, which is no model type, and "
            f"model_name_or_path={os.fspath(model_name_or_path)!r}",
            hint=f"give the model as model_name_or_path, and its type, or None, as model_type: "
            f"model_type=None, model_name_or_path={name!r}",
        )
    if model_name_or_path is None and _is_checkpoint(name):
        if name not in registry().model_types():
            return None, name
        raise ConfigurationError(
            f"{name!r} is a model type, and there is a directory {name} with a {CONFIG}",
            hint=f"say which is meant: model_name_or_path='./{name}' for the directory, or model_type={name!r} with "
            f"model_name_or_path={registry().family(name).default_model or 'the model'!r}",
        )
    if model_name_or_path is None:
        try:
            registry().family(name)
        except UnknownModelTypeError as error:
            raise UnknownModelTypeError(
                error.message,
                hint=f"if that is a model and no type, give model_name_or_path={name!r}; otherwise {error.hint}",
            ) from error
    return name, model_name_or_path


def _is_model(given: _Path) -> bool:
    if isinstance(given, os.PathLike):
        return True
    separators = ("/", os.sep, *((os.altsep,) if os.altsep else ()))
    return given.startswith((BUNDLED, ".", "~")) or any(mark in given for mark in (*separators, ":"))


def _is_checkpoint(name: str) -> bool:
    try:
        return (Path(name) / CONFIG).is_file()
    except (OSError, ValueError):
        return False  # too long for a path, or a NUL byte
