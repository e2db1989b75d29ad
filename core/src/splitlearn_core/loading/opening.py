"""Resolve the name of a model to a checkpoint whose family is known."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from splitlearn_core.checkpoint.checkpoint import Checkpoint
from splitlearn_core.checkpoint.files import CONFIG
from splitlearn_core.checkpoint.manifest import holds_components
from splitlearn_core.checkpoint.source import open_source
from splitlearn_core.errors import ConfigurationError, MissingFileError, UnknownModelTypeError
from splitlearn_core.family import ModelFamily
from splitlearn_core.loading_strategy import WeightReader
from splitlearn_core.plugins.known import is_known, way_out
from splitlearn_core.plugins.registry import registry
from splitlearn_core.progress import reporting
from splitlearn_core.quoting import plain, quote
from splitlearn_core.types import ProgressCallback

log = logging.getLogger(__name__)

#: Prefix of a model name that means the checkpoint which the plugin of a model type carries.
BUNDLED = "bundled:"

_Path = str | os.PathLike[str]


def type_and_model(model_type: _Path | None, model_name_or_path: _Path | None) -> tuple[str | None, _Path | None]:
    """Return the model type and the model; the model may be given in place of the type.

    A path, a repository on the Hub (``owner/name``) or ``bundled:TYPE`` is not a model type.

    Raises:
        ConfigurationError: It is ambiguous which model is meant.
        UnknownModelTypeError: Only one name is given, which is neither a path nor a type.
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
            f"two models are named: model_type={name!r}, which is not a model type, and "
            f"model_name_or_path={os.fspath(model_name_or_path)!r}",
            hint=f"give the model as model_name_or_path, and its type, or None, as model_type: "
            f"model_type=None, model_name_or_path={name!r}",
        )
    if model_name_or_path is None and name not in registry().model_types() and _is_there(name):
        return None, name
    if model_name_or_path is None and (_is_there(f"{name}/{CONFIG}") or (_is_there(name) and holds_components(name))):
        raise ConfigurationError(
            f"{name!r} is a model type, and there is a directory {name} that holds a model",
            hint=f"say which is meant: model_name_or_path='./{name}' for the directory, or model_type={name!r} with "
            f"model_name_or_path={registry().packaged_family(name).default_model or 'the model'!r}",
        )
    if model_name_or_path is None:
        try:
            registry().packaged_family(name)
        except UnknownModelTypeError as error:
            raise UnknownModelTypeError(
                error.message,
                hint=f"if that is a model and not a type, give model_name_or_path={name!r}; otherwise {error.hint}",
            ) from error
    return name, model_name_or_path


def _is_model(name: _Path) -> bool:
    if isinstance(name, os.PathLike):
        return True
    separators = ("/", os.sep, *((os.altsep,) if os.altsep else ()))
    return name.startswith((BUNDLED, ".", "~")) or any(mark in name for mark in (*separators, ":"))


def _is_there(name: str) -> bool:
    try:
        return Path(name).exists()
    except (OSError, ValueError):
        return False  # too long for a path, or a NUL byte


@dataclass(frozen=True, slots=True)
class OpenModel:
    """A checkpoint whose family is known; no weights are read yet."""

    #: The directory or repository, as the caller named it.
    name: str
    checkpoint: Checkpoint
    family: ModelFamily
    #: ``config.json`` without ``quantization_config``: components have plain weights.
    config: Mapping[str, Any]


def open_model(
    model_name_or_path: str | os.PathLike[str] | None,
    model_type: str | None = None,
    *,
    progress: ProgressCallback | Literal[False] | None = None,
    **hub: Any,
) -> OpenModel:
    """Find a checkpoint and the family that it belongs to.

    Args:
        model_name_or_path: A directory, a Hub repository, or ``bundled:MODEL_TYPE`` for the small
            model that a plugin carries; None for the family's default.
        model_type: The expected model type; None for that of ``config.json``.
        progress: Called while a plugin for any type finds out about this one; None for a line if stderr is a
            terminal.
        hub: ``cache_dir``, ``revision``, ``token`` and ``local_files_only``.

    Raises:
        ConfigurationError: No model is named, or ``config.json`` contradicts the model type.
        UnknownModelTypeError: No plugin provides the model type.
        MissingFileError: There is no such checkpoint.
    """
    if model_name_or_path is None:
        if model_type is None:
            raise ConfigurationError(
                "neither a model nor a model type was named", hint="give model_name_or_path: a directory or a Hub id"
            )
        model_name_or_path = registry().packaged_family(model_type).default_model
        if not model_name_or_path:
            raise ConfigurationError(
                f"the family {model_type!r} names no default model", hint="give model_name_or_path as well"
            )
    log.info("Resolving %s", model_name_or_path)
    source = open_source(unbundled(model_name_or_path), readable_suffixes=_readable_suffixes, **hub)
    if not source.has_config and source.commit is None and holds_components(source.model):
        raise MissingFileError(
            f"{source.model} is a saved split, not a model: it holds components, each in a folder",
            hint="use load_split_directory or load_component, or make a model of it: splitlearn merge DIR --out OUT",
        )
    checkpoint = Checkpoint(source, _readers)
    config = checkpoint.config
    stated = config["model_type"]
    if model_type is not None and model_type != stated:
        advice = f"pass model_type={stated!r}, or None to take what config.json says"
        raise ConfigurationError(
            f"model_type {quote(model_type)} was requested, but config.json of {model_name_or_path} "
            f"says {quote(stated)}",
            hint=advice if registry().may_provide(stated) else way_out(stated, registry().model_types()),
        )
    commit = checkpoint.source.commit
    log.info("Found a %s model in %s%s", plain(stated), checkpoint.source.model, f" at {commit}" if commit else "")
    unquantised = {name: value for name, value in config.items() if name != "quantization_config"}
    with reporting(progress) as report:
        family = _family(config, report)
    return OpenModel(os.fspath(model_name_or_path), checkpoint, family, unquantised)


def _family(config: Mapping[str, Any], progress: ProgressCallback) -> ModelFamily:
    """Return the family that a configuration names; raises UnknownModelTypeError."""
    stated = config["model_type"]
    try:
        return registry().family(stated, progress)
    except UnknownModelTypeError as error:
        if config.get("is_encoder_decoder") is True and not is_known(stated):
            raise UnknownModelTypeError(error.message, hint=way_out(stated, encodes=True)) from error
        raise


def bundled_checkpoint(family: ModelFamily) -> Path:
    """Return the folder of the checkpoint that a plugin carries.

    Raises:
        MissingFileError: The plugin carries none.
    """
    package, _, folder = family.bundled_checkpoint.partition(":")
    if not package:
        raise MissingFileError(
            f"the plugin of {family.model_type!r} carries no model", hint=f"splitlearn-gpt2 does: {BUNDLED}gpt2"
        )
    return Path(str(resources.files(package) / folder))


def _readers(model_type: str | None) -> list[WeightReader]:
    """Return the readers of files that core cannot read, including those of the model type's own plugin."""
    family = registry().family(model_type) if model_type is not None else None
    return [strategy for strategy in registry().strategies(family) if isinstance(strategy, WeightReader)]


def _readable_suffixes() -> tuple[str, ...]:
    return tuple(suffix for reader in _readers(None) for suffix in reader.suffixes)


def unbundled(model: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """Resolve ``bundled:MODEL_TYPE``, a name that no directory or repository usually has.

    Raises:
        UnknownModelTypeError: No plugin provides the model type.
        MissingFileError: Its plugin carries no checkpoint.
    """
    if isinstance(model, str) and model.startswith(BUNDLED):
        return bundled_checkpoint(registry().packaged_family(model.removeprefix(BUNDLED)))
    return model
