"""What is known about a model type before any model of it is created: its classes and its configuration."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from splitlearn_auto.findings import CannotSplitError
from splitlearn_core import ConfigurationError, MissingFileError
from splitlearn_core.extension import (
    CONFIG,
    PACKAGES,
    WRITTEN,
    open_source,
    quote,
    read_config,
    registry,
    unbundled,
    user_path,
    way_out,
)

#: The values of ``config.json`` that a plan needs, by their common names.
COMMON = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
_LAYERS = COMMON[0]
_TIED = "tie_word_embeddings"
#: Hidden states cross cuts in float32.
WIDE = "residual_in_fp32"


def causal_class(model_type: str) -> str:
    """Return the name of the causal language model class of transformers for a model type.

    Raises:
        ConfigurationError: transformers knows no such type; the nearest is named.
        CannotSplitError: It knows the type, but no causal language model of it.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if model_type not in CONFIG_MAPPING_NAMES:
        raise _unknown(model_type, sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    class_names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if class_names is None:
        _check_decoder_among_others(model_type)
        raise CannotSplitError(
            f"{model_type} is not a causal language model: transformers has {_kinds(model_type) or 'no model'} for it",
            hint="only decoders that predict the next token can be split",
        )
    return class_names if isinstance(class_names, str) else str(class_names[0])


def _check_decoder_among_others(model_type: str) -> None:
    """Refuse a type of several models, one of which is a decoder; raises CannotSplitError."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as SEEING

    # Classes of transformers raise any exception for their own defaults.
    try:
        known = AutoConfig.for_model(model_type)
        inner = known.get_text_config(decoder=True).model_type
    except Exception:  # noqa: BLE001
        return
    if inner != model_type and not known.is_encoder_decoder and (inner in CAUSAL or model_type in SEEING):
        _check_alone(model_type, known)


def _unknown(model_type: str, known: list[str]) -> ConfigurationError:
    import transformers

    close = difflib.get_close_matches(model_type.lower().replace("-", "_"), known, n=3)
    other = 'give the "model_type" of config.json; a newer transformers may know it: pip install --upgrade transformers'
    return ConfigurationError(
        f"transformers {transformers.__version__} knows no model type {model_type!r}",
        hint=f"did you mean {' or '.join(map(repr, close))}?" if close else other,
    )


def _kinds(model_type: str) -> str:
    """Return the classes that transformers has for a type, as evidence of its kind."""
    from transformers.models.auto import modeling_auto

    tables = ("SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MASKED_LM", "IMAGE_CLASSIFICATION", "SPEECH_SEQ_2_SEQ")
    names = [f"MODEL_FOR_{table}_MAPPING_NAMES" for table in tables] + ["MODEL_MAPPING_NAMES"]
    for name in names:
        classes = getattr(modeling_auto, name, {}).get(model_type)
        if classes is not None:
            return str(classes) if isinstance(classes, str) else ", ".join(classes)
    return ""


def check_config(model_type: str, known: Any) -> None:
    """Refuse a type whose configuration shows that it is not a plain decoder.

    Args:
        model_type: The type.
        known: A configuration of it.

    Raises:
        CannotSplitError: It is an encoder-decoder, or a model of several models.
    """
    if getattr(known, "is_encoder_decoder", False):
        raise CannotSplitError(
            f"{model_type} is an encoder-decoder: its layers are two stacks, and the second attends to the first",
            hint="only decoders that predict the next token can be split",
        )
    _check_alone(model_type, known)
    if type(getattr(known, "num_hidden_layers", None)) is not int:
        raise CannotSplitError(f"the configuration of {model_type} has no number of layers (num_hidden_layers)")


def _check_alone(model_type: str, known: Any) -> None:
    """Refuse a type whose models are made of several; raises CannotSplitError."""
    text = known.get_text_config(decoder=True)
    if text is not known:
        raise CannotSplitError(
            f"{model_type} is made of several models ({', '.join(known.sub_configs)})",
            hint=f"pip install {PACKAGES[model_type]}"
            if model_type in PACKAGES
            else f"its language model is of type {text.model_type}: describe it in a family of your own, with "
            "ModelFamily(..., text_config=...), as in docs/families.md",
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


def config_names(known: Any) -> dict[str, str]:
    """Return the names of a type's ``config.json`` that differ from the common ones, by common name."""
    written = known.to_dict()
    names = {common: known.attribute_map.get(common, common) for common in COMMON}
    if _LAYERS not in written and names[_LAYERS] not in written:
        # Computed: a list with one item for each layer is written instead.
        depth = _read(known, _LAYERS)
        lists = [name for name, value in written.items() if isinstance(value, list) and len(value) == depth]
        names[_LAYERS] = next(iter(lists), _LAYERS)
    return {common: own for common, own in names.items() if own != common and own in written}


def config_defaults(known: Any) -> dict[str, Any]:
    """Return the defaults of the configuration class, by common name.

    A default that depends on another value (as many key heads as heads) is left out.
    """
    defaults = {}
    for name in COMMON:
        value = _read(known, name)
        if type(value) is int and not _follows(known, name, value):
            defaults[name] = value
    wide = {WIDE: True} if _read(known, WIDE) is True else {}
    return {**defaults, _TIED: bool(_read(known, _TIED)), **wide}


def _read(config: Any, name: str) -> Any:
    # Some configurations have different values per layer, and raise an error.
    try:
        return getattr(config, name, None)
    except Exception:  # noqa: BLE001  # classes of transformers raise any exception
        return None


def _follows(known: Any, name: str, value: int) -> bool:
    """Return whether a value is computed from others: whether it changes if they do."""
    for other in ("num_attention_heads", "hidden_size"):
        base = _read(known, other)
        if other == name or type(base) is not int:
            continue
        # A class may refuse sizes that do not fit together; this value then shows nothing.
        try:
            changed = type(known)(**{other: base * 2})
        except Exception:  # noqa: BLE001, S112
            continue
        if _read(changed, name) != value:
            return True
    return False
