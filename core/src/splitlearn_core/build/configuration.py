"""A family's Hugging Face classes and configuration, and errors in config.json explained."""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from transformers import PreTrainedModel

from splitlearn_core.build.pruning import BUILD_LOCK
from splitlearn_core.environment_errors import cause_of
from splitlearn_core.errors import BrokenPluginError, ConfigurationError, SplitLearnError
from splitlearn_core.family import ModelFamily
from splitlearn_core.quoting import reason, said

#: How transformers marks the floats in ``config.json`` that JSON has no word for.
_FLOAT_TAG, _FLOATS = "__float__", ("Infinity", "-Infinity", "NaN")


def architecture_class(family: ModelFamily) -> type[PreTrainedModel]:
    """Import the Hugging Face class of a family, and only what that class needs.

    Raises:
        BrokenPluginError: There is no such class.
    """
    module, _, name = family.architecture.rpartition(":")
    try:
        model_class = getattr(importlib.import_module(module or "transformers"), name)
        if not (isinstance(model_class, type) and issubclass(model_class, PreTrainedModel)):
            raise AttributeError(f"it is no model class but {model_class!r}")
        return cast("type[PreTrainedModel]", model_class)
    except (ImportError, AttributeError, ValueError) as error:
        if cause_of(error) is not None:
            raise  # a library that cannot be imported is nothing that the family says wrongly
        raise BrokenPluginError(
            f"family {family.model_type!r} names the architecture {family.architecture!r}, "
            f"which is not there: {reason(error)}",
            hint=_nearest_class(module or "transformers", name),
        ) from error


def _nearest_class(module: str, name: str) -> str:
    # Of transformers that is a list of names, and none of its models is imported for it. It takes a fifth of a second.
    names = dir(sys.modules[module]) if module in sys.modules else []
    close = difflib.get_close_matches(name, names, n=1)
    meant = f"did you mean {close[0]!r}? Otherwise " if close else ""
    return f"{meant}a newer transformers may have it: pip install --upgrade transformers"


def hf_config(
    family: ModelFamily,
    values: Mapping[str, Any],
    name_or_path: str,
    dtype: str,
    attn_implementation: str | None = None,
) -> Any:
    """Make the Hugging Face configuration from the values of ``config.json``, for weights of a dtype.

    Raises:
        ConfigurationError: The configuration class refuses a value.
    """
    config_class = architecture_class(family).config_class
    with BUILD_LOCK, blaming_config(family, name_or_path):
        own = {name: _plain(value) for name, value in values.items() if name != "torch_dtype"}
        # Components pass results on by name, whatever the checkpoint prefers. As from_dict does it, which besides
        # serializes all of it for a debug log.
        config = config_class(**{**own, "dtype": dtype, "return_dict": True, "name_or_path": name_or_path})
        if attn_implementation is not None:
            config._attn_implementation = attn_implementation  # noqa: SLF001  # the name from_pretrained uses
    return config


def _plain(value: Any) -> Any:
    """Read the floats that JSON has no word for, as transformers writes them: ``{"__float__": "Infinity"}``."""
    if isinstance(value, Mapping):
        if value.keys() == {_FLOAT_TAG} and value[_FLOAT_TAG] in _FLOATS:
            return float(value[_FLOAT_TAG])
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


@contextmanager
def blaming_config(family: ModelFamily, name_or_path: str) -> Iterator[None]:
    """Say that a value of the configuration is wrong when the model's own code refuses it."""
    try:
        yield
    except SplitLearnError:
        raise
    # The model's code raises what comes of a wrong value: from a validator's own class to KeyError.
    except Exception as error:
        raise ConfigurationError(
            f"transformers cannot make a {family.model_type} model of {name_or_path}: {said(error)}",
            hint="check the values of config.json, and attn_implementation where it was given",
        ) from error


@contextmanager
def layer_count_set(config: Any, layers: int) -> Iterator[None]:
    """Let a configuration say that the model has so many layers, while its modules are made."""
    # Past the configuration's own setter, which validates the whole of it each time.
    values, name = vars(config), config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    total = values[name]
    values[name] = layers
    try:
        yield
    finally:
        values[name] = total
