"""The unsplit model of a family: its Hugging Face class and configuration, its tensors, and loading it as a whole."""

from __future__ import annotations

import difflib
import importlib
import inspect
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from splitlearn_core.build.torch_state import BUILD_LOCK, build_turn
from splitlearn_core.environment_errors import cause_of
from splitlearn_core.errors import (
    BrokenPluginError,
    CheckpointError,
    ConfigurationError,
    InvalidCheckpointError,
    SplitLearnError,
    TensorMismatchError,
    translate,
)
from splitlearn_core.family import ModelFamily
from splitlearn_core.plan.keys import in_model, shared_prefixes
from splitlearn_core.quoting import SENTENCE, listed, reason, said
from splitlearn_core.types import DTYPE_BYTES, FLOAT_DTYPES, TensorInfo

log = logging.getLogger(__name__)

_LAYERS = "num_hidden_layers"
#: How transformers writes the floats that JSON has no literal for.
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
            raise AttributeError(f"it is not a model class but {model_class!r}")
        return cast("type[PreTrainedModel]", model_class)
    except (ImportError, AttributeError, ValueError) as error:
        if cause_of(error) is not None:
            raise  # a library that cannot be imported is not a mistake of the family
        library = sys.modules.get(module or "transformers")
        # For transformers, dir() is a list of names: none of its models is imported.
        close = difflib.get_close_matches(name, dir(library) if library else (), n=1)
        meant = f"did you mean {close[0]!r}? Otherwise " if close else ""
        raise BrokenPluginError(
            f"family {family.model_type!r} names the architecture {family.architecture!r}, "
            f"which does not exist: {reason(error)}",
            hint=f"{meant}a newer transformers may have it: pip install --upgrade transformers",
        ) from error


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
    config_class = config_class_of(family)
    with BUILD_LOCK, config_errors(family, name_or_path):
        if family.text_config and family.text_config not in config_class.sub_configs:
            # A class of the decoder alone, which the whole model ties.
            tied = family.config_value(values, "tie_word_embeddings")
            values = {**family.decoder_values(values), "tie_word_embeddings": bool(tied)}
        own = {name: _plain(value) for name, value in values.items() if name != "torch_dtype"}
        # Components access results by name, so return_dict is always set. Not with from_dict, which also
        # serializes the whole configuration for a debug log.
        config = config_class(**{**own, "dtype": dtype, "return_dict": True, "name_or_path": name_or_path})
        set_dtype(config, config.dtype)
        set_depth(family, config)
        if attn_implementation is not None:
            config._attn_implementation = attn_implementation  # noqa: SLF001  # the name from_pretrained uses
    return config


def set_dtype(config: Any, dtype: Any) -> None:
    """Set the dtype of a configuration and, as ``from_pretrained`` does, of those in it."""
    config.dtype = dtype
    for name in config.sub_configs:
        if (inner := getattr(config, name, None)) is not None:
            inner.dtype = dtype


def set_depth(family: ModelFamily, config: Any) -> None:
    """Set the number of layers by its common name, which in a configuration of encoder and decoder is the encoder's."""
    inner = decoder_config(family, config)
    depth = getattr(inner, family.config_names.get(_LAYERS, _LAYERS), None)
    if type(depth) is int and inner.num_hidden_layers != depth:
        inner.num_hidden_layers = depth


def decoder_config(family: ModelFamily, config: Any) -> Any:
    """Return the configuration of the decoder in that of the whole model."""
    return getattr(config, family.text_config, config) if family.text_config else config


def with_decoder_values(config: Mapping[str, Any], text_config: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values of a whole model's configuration with others of its decoder.

    Args:
        config: The values.
        text_config: The name of the decoder's in them; empty if it is the whole model.
        values: Values of the decoder. Whether head and embedding are tied is one of the whole model, and a mapping that
            has the name of another model's configuration is of that.
    """
    if not text_config:
        return {**config, **values}
    changed = {**config, text_config: {**(config.get(text_config) or {})}}
    for name, value in values.items():
        if name == "tie_word_embeddings":
            changed[name] = value
        elif isinstance(value, Mapping) and (name == text_config or isinstance(config.get(name), Mapping)):
            changed[name] = {**(changed.get(name) or {}), **value}
        else:
            changed[text_config][name] = value
    return changed


def config_class_of(family: ModelFamily) -> Any:
    """Return the configuration class of a family's model type.

    Some types (EXAONE) use another type's model with a configuration, and names of tensors, of their own.
    """
    own = architecture_class(family).config_class
    if getattr(own, "model_type", "") != family.model_type and ":" not in family.architecture:
        from transformers import CONFIG_MAPPING

        # Not get(), which sees only what was imported already.
        stated = CONFIG_MAPPING[family.model_type] if family.model_type in CONFIG_MAPPING else own  # noqa: SIM401
        # That of a composite model is not the one of its text model.
        return own if stated.sub_configs and not own.sub_configs else stated
    return own


def _plain(value: Any) -> Any:
    """Replace ``{"__float__": "Infinity"}`` and the like with the floats that they stand for."""
    if isinstance(value, Mapping):
        if value.keys() == {_FLOAT_TAG} and value[_FLOAT_TAG] in _FLOATS:
            return float(value[_FLOAT_TAG])
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


@contextmanager
def config_errors(family: ModelFamily, name_or_path: str) -> Iterator[None]:
    """Raise any error of the model's own code as an error of its configuration."""

    def translated(error: BaseException) -> SplitLearnError:
        return ConfigurationError(
            f"transformers cannot make a {family.model_type} model of {name_or_path}: {said(error)}",
            hint="check the values of config.json, and attn_implementation where it was given",
        )

    with translate(translated):
        yield


@contextmanager
def layer_count_set(family: ModelFamily, config: Any, layers: int) -> Iterator[None]:
    """Set the decoder's number of layers while modules are made; one that follows from other values stays."""
    # Not through the configuration's own setter, which validates all of it each time.
    inner = decoder_config(family, config)
    values, names = vars(inner), {inner.attribute_map.get(_LAYERS, _LAYERS), family.config_names.get(_LAYERS, _LAYERS)}
    totals = {name: values[name] for name in names if type(values.get(name)) is int}
    values.update(dict.fromkeys(totals, layers))
    try:
        yield
    finally:
        values.update(totals)


def load_whole(
    family: ModelFamily,
    name: str,
    directory: str,
    dtype: str,
    *,
    values: Mapping[str, Any],
    safetensors: bool,
    waiting: Callable[[], None],
) -> dict[str, torch.Tensor]:
    """Load a whole model as ``from_pretrained`` does, and return its tensors, dequantised.

    Args:
        family: The family.
        name: The model, as the caller named it.
        directory: The folder of its ``config.json`` and all of its weight files.
        dtype: torch's name of the dtype to convert its tensors to.
        values: The values of its ``config.json``, which is not read a second time.
        safetensors: Whether the weights are in safetensors files.
        waiting: Called while another load holds the build lock; it may raise.

    Raises:
        CheckpointError: transformers cannot load it, or not all of it.
    """

    def translated(error: BaseException) -> SplitLearnError | None:
        # An error of the system has a number; transformers raises others of this class for what it cannot read.
        if isinstance(error, OSError) and error.errno is not None:
            return None
        hint = "do config.json and the weights belong together?"
        return CheckpointError(f"transformers cannot load {name}: {said(error)}", hint=hint)

    log.info("Loading the whole of %s in %s", name, directory)
    with build_turn(waiting), translate(translated, unchanged=(SplitLearnError, MemoryError)):
        if stated := values.get("quantization_config"):
            values = {**values, "quantization_config": _to_plain_weights(stated)}
        model, info = architecture_class(family).from_pretrained(
            directory,
            config=hf_config(family, values, name, dtype),
            dtype=getattr(torch, dtype),
            local_files_only=True,
            use_safetensors=safetensors,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        quantizer = getattr(model, "hf_quantizer", None)
        if quantizer is not None and getattr(model, "is_quantized", True) and _dequantises(type(quantizer)):
            model = model.dequantize()
    missing = [key for key in info.get("missing_keys") or () if in_model(family, key)]
    refuse_incomplete(name, model, {**info, "missing_keys": missing})
    return {key: tensor.detach() for key, tensor in model.state_dict().items()}


def check_quantization(name: str, quantization: str, stated: Any) -> None:
    """Check, before any weights are fetched, that transformers can make plain weights of this quantisation.

    Raises:
        CheckpointError: It cannot: it does not know the method, or only computes with such weights, or a package is
            missing.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, AutoHfQuantizer

    def translated(error: BaseException) -> SplitLearnError:
        return CheckpointError(
            f"{name} is quantised ({quantization}), and transformers cannot read it here: {said(error)}",
            hint="install what it asks for, or use the original, unquantised checkpoint",
        )

    with translate(translated, unchanged=(CheckpointError,)), BUILD_LOCK:
        wanted = _to_plain_weights(stated)
        # Before it asks for packages, which would not help.
        quantizer = AUTO_QUANTIZER_MAPPING.get(quantization)
        if wanted == stated and quantizer is not None and not _dequantises(quantizer):
            raise CheckpointError(
                f"{name} is quantised ({quantization}), and transformers only computes with such weights: it does not "
                "make plain ones of them, which components have",
                hint="use the original, unquantised checkpoint",
            )
        AutoHfQuantizer.from_config(wanted, pre_quantized=True).validate_environment(device_map=None)


def _to_plain_weights(stated: Any) -> Any:
    """Return a ``quantization_config`` with which weights are dequantised as they are read, if the method can do it."""
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    method = stated.get("quant_method") if isinstance(stated, Mapping) else None
    if method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        return stated
    arguments = inspect.signature(AUTO_QUANTIZATION_CONFIG_MAPPING[method]).parameters
    if "dequantize" in arguments:
        return {**stated, "dequantize": True}
    # The name in older versions.
    return {**stated, "run_compressed": False} if "run_compressed" in arguments else stated


def _dequantises(quantizer: type[Any]) -> bool:
    """Return whether a quantizer of transformers can make plain weights of a model that was loaded."""
    from transformers.quantizers.base import HfQuantizer

    return quantizer._dequantize is not HfQuantizer._dequantize  # noqa: SLF001  # nothing public says it


def refuse_incomplete(name: str, module: Any, info: Mapping[str, Any]) -> None:
    """Refuse a model in which tensors have random values or no memory.

    Args:
        name: The model, as the caller named it.
        module: What ``from_pretrained`` returned.
        info: The loading info that it returned.
    """
    problems = [f"missing: {key}" for key in sorted(info.get("missing_keys") or ())]
    problems += [f"mis-shaped: {entry}" for entry in sorted(map(str, info.get("mismatched_keys") or ()))]
    if problems:
        raise TensorMismatchError(
            f"the tensors of {name} are not those of its model; {len(problems)} are wrong:\n  "
            + listed(problems, "\n  ", limit=SENTENCE),
            hint='do config.json and the weights belong together, and is it a causal model (see its "architectures")?',
        )
    empty = [key for key, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    if empty:
        raise InvalidCheckpointError(
            f"{name}: transformers left tensors without memory: {listed(empty)}",
            hint="another version of transformers may do better",
        )


def describe_tensors(
    family: ModelFamily, values: dict[str, Any], name_or_path: str, dtype: str
) -> dict[str, TensorInfo]:
    """Build the whole model on the meta device, and describe its tensors as a file would hold them.

    A tied head is left out, as ``save_pretrained`` does, and so is what layers share with an earlier one.
    """
    config = hf_config(family, values, name_or_path, dtype)
    stored = FLOAT_DTYPES[dtype]
    with BUILD_LOCK, config_errors(family, name_or_path), torch.device("meta"):
        model = architecture_class(family)(config)
    state = {key: tensor for key, tensor in model.state_dict().items() if in_model(family, key)}
    if family.config_value(values, "tie_word_embeddings"):
        state.pop(f"{family.head}.weight", None)
        # Without that, transformers ties nothing else either.
        copies = tuple(prefix for prefixes in shared_prefixes(family, values) for prefix in prefixes[1:])
        state = {key: tensor for key, tensor in state.items() if not key.startswith(copies)}
    infos, position = {}, 0
    for key, tensor in state.items():
        end = position + tensor.numel() * DTYPE_BYTES[stored]
        infos[key] = TensorInfo(key, stored, tuple(tensor.shape), "", position, end)
        position = end
    return infos
