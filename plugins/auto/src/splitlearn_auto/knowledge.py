"""What is known about a model type before any model of it is created: its classes and its configuration."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from splitlearn_auto.findings import CannotSplitError
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

#: The values of ``config.json`` that a plan needs, by their common names.
COMMON = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
_LAYERS = COMMON[0]
#: Their names in configurations of an encoder and a decoder, where the common ones are the encoder's.
_OF_A_DECODER = {
    _LAYERS: ("decoder_layers", "num_decoder_layers"),
    "num_attention_heads": ("decoder_attention_heads", "num_decoder_attention_heads"),
}
#: What makes a decoder of an encoder, where its configuration has such values; sparse attention is an encoder's.
_AS_A_DECODER = {"is_decoder": True, "add_cross_attention": False, "attention_type": "original_full"}
_TIED = "tie_word_embeddings"
#: Hidden states cross cuts in float32.
WIDE = "residual_in_fp32"
#: transformers' tables of classes that predict tokens of text, of composite models.
_OF_SEVERAL = ("MULTIMODAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM")
#: Tables that an error names as evidence of what another type is.
_KINDS = ("SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MASKED_LM", "IMAGE_CLASSIFICATION", "SPEECH_SEQ_2_SEQ")


def model_class_name(model_type: str) -> str:
    """Return the name of the class of transformers that predicts the next token, for a model type.

    Of a type whose models are made of several, that of the whole model: it alone has all that text passes through.

    Raises:
        ConfigurationError: transformers knows no such type; the nearest is named.
        CannotSplitError: It knows the type, but no class of it that predicts the next token.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if model_type not in CONFIG_MAPPING_NAMES:
        raise _unknown(model_type, sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
    tables = [*(_OF_SEVERAL if _is_of_several(model_type) else ()), "CAUSAL_LM"]
    class_name = _class_in(tables, model_type)
    if not class_name:
        kind = _class_in(_KINDS, model_type) or _class_in(["MAPPING"], model_type) or "no model"
        raise CannotSplitError(
            f"{model_type} is not a causal language model: transformers has {kind} for it",
            hint="only decoders that predict the next token can be split",
        )
    return class_name


def _class_in(tables: Sequence[str], model_type: str) -> str:
    """Return the class of a type in the first of transformers' tables that has one; empty if none has."""
    from transformers.models.auto import modeling_auto

    for table in tables:
        name = "MODEL_MAPPING_NAMES" if table == "MAPPING" else f"MODEL_FOR_{table}_MAPPING_NAMES"
        # Old versions do not have all tables.
        classes = getattr(modeling_auto, name, {}).get(model_type)
        if classes is not None:
            return str(classes) if isinstance(classes, str) else ", ".join(classes)
    return ""


def _is_of_several(model_type: str) -> bool:
    from transformers import AutoConfig

    # Classes of transformers raise any exception for their own defaults.
    try:
        known = AutoConfig.for_model(model_type)
        return not known.is_encoder_decoder and bool(decoder_name(known))
    except Exception:  # noqa: BLE001
        return False


def decoder_name(known: Any) -> str:
    """Return the name of the decoder's configuration in that of a composite model; empty if it is the whole.

    Raises:
        CannotSplitError: It is deeper inside.
    """
    # Of an encoder and a decoder, that is a copy of the whole by other names.
    text = known if known.is_encoder_decoder else known.get_text_config(decoder=True)
    if text is known:
        return ""
    for name in known.sub_configs:
        if getattr(known, name, None) is text:
            return str(name)
    raise CannotSplitError(
        f"{known.model_type} is made of several models ({', '.join(known.sub_configs)}), "
        "and its decoder is a part of one of them",
        hint="save that model alone with transformers: its own type may be split",
    )


def decoder_of(known: Any) -> Any:
    """Return the decoder's configuration in that of a composite model, or the whole."""
    name = decoder_name(known)
    return getattr(known, name) if name else known


def has_any_decoder(known: Any) -> bool:
    """Return whether models of a type of several may have decoders of different types, which say so themselves."""
    from transformers import AutoConfig

    name = decoder_name(known)
    return bool(name) and known.sub_configs[name] is AutoConfig


def _unknown(model_type: str, known: list[str]) -> ConfigurationError:
    import transformers

    close = difflib.get_close_matches(model_type.lower().replace("-", "_"), known, n=3)
    other = 'give the "model_type" of config.json; a newer transformers may know it: pip install --upgrade transformers'
    return ConfigurationError(
        f"transformers {transformers.__version__} knows no model type {model_type!r}",
        hint=f"did you mean {' or '.join(map(repr, close))}?" if close else other,
    )


def check_config(model_type: str, known: Any) -> None:
    """Refuse a type whose configuration shows that it is no decoder.

    Args:
        model_type: The type.
        known: A configuration of it.

    Raises:
        CannotSplitError: It is an encoder-decoder, or has no number of layers.
    """
    if known.is_encoder_decoder and known.sub_configs:
        raise CannotSplitError(
            f"{model_type} is an encoder-decoder: its layers are two stacks, and the second attends to the first",
            hint="only decoders that predict the next token can be split",
        )
    if type(getattr(decoder_of(known), "num_hidden_layers", None)) is not int:
        raise CannotSplitError(f"the configuration of {model_type} has no number of layers (num_hidden_layers)")


def decoder_switches(known: Any) -> Iterator[dict[str, Any]]:
    """Yield switches of a configuration with which a model may be a causal decoder: first as few as possible."""
    alone = {"is_encoder_decoder": False} if known.is_encoder_decoder else {}
    yield alone
    if getattr(known, "is_decoder", None) is False:
        yield {**alone, **{name: value for name, value in _AS_A_DECODER.items() if hasattr(known, name)}}


def decoder_names(known: Any) -> dict[str, str]:
    """Return the decoder's own names of values in a configuration of an encoder and a decoder, by common name."""
    candidates = _OF_A_DECODER.items() if known.is_encoder_decoder else ()
    return {common: own for common, names in candidates for own in names if hasattr(known, own)}


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
    known = decoder_of(known)
    written = known.to_dict()
    names = {common: known.attribute_map.get(common, common) for common in COMMON} | decoder_names(known)
    if _LAYERS not in written and names[_LAYERS] not in written:
        # Computed: a list with one item for each layer is written instead.
        depth = value_of(known, _LAYERS)
        lists = [name for name, value in written.items() if isinstance(value, list) and len(value) == depth]
        names[_LAYERS] = next(iter(lists), _LAYERS)
    return {common: own for common, own in names.items() if own != common and own in written}


def config_defaults(known: Any) -> dict[str, Any]:
    """Return the defaults of the configuration class, by common name.

    A default that depends on another value (as many key heads as heads) is left out.
    """
    # Of its own class, and not those of the whole model for a decoder that a file says nothing about.
    defaults, decoder = {}, type(decoder_of(known))()
    for name in COMMON:
        value = value_of(decoder, name)
        if type(value) is int and not _follows(decoder, name, value):
            defaults[name] = value
    wide = {WIDE: True} if value_of(decoder, WIDE) is True else {}
    return {**defaults, _TIED: bool(value_of(known, _TIED)), **wide}


def value_of(config: Any, name: str) -> Any:
    """Return a value of a configuration; None if it has none, or different ones for different layers."""
    # Some configurations raise an error for the latter.
    try:
        return getattr(config, name, None)
    except Exception:  # noqa: BLE001  # classes of transformers raise any exception
        return None


def _follows(known: Any, name: str, value: int) -> bool:
    """Return whether a value is computed from others: whether it changes if they do."""
    for other in ("num_attention_heads", "hidden_size"):
        base = value_of(known, other)
        if other == name or type(base) is not int:
            continue
        try:
            changed = type(known)(**{other: base * 2})
        except Exception:  # noqa: BLE001, S112  # a class may refuse such sizes in any way: the value shows nothing
            continue
        if value_of(changed, name) != value:
            return True
    return False
