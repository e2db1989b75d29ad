"""What transformers knows about a model type, before any model of it is created."""

from __future__ import annotations

import difflib
from typing import Any

from splitlearn_auto.findings import CannotSplitError
from splitlearn_core import ConfigurationError
from splitlearn_core.extension import registry, text_model


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
        raise CannotSplitError(
            f"{model_type} is no causal language model: transformers has {_kinds(model_type) or 'no model'} for it",
            hint="only decoders that predict the next token can be split",
        )
    return class_names if isinstance(class_names, str) else str(class_names[0])


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
            f"{model_type} is an encoder-decoder: its layers are two stacks, and the second looks into the first",
            hint="only decoders that predict the next token can be split",
        )
    text = known.get_text_config(decoder=True)
    if text is not known:
        raise CannotSplitError(
            f"{model_type} is made of several models ({', '.join(known.sub_configs)})",
            hint=text_model(model_type, registry().model_types())
            or f"its language model is of type {text.model_type}: save that alone as a checkpoint of its own",
        )
    if type(getattr(known, "num_hidden_layers", None)) is not int:
        raise CannotSplitError(f"the configuration of {model_type} has no number of layers (num_hidden_layers)")
