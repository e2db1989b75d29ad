"""Create a tiny model of a model type, or of a given configuration: sizes, configuration, random weights."""

from __future__ import annotations

import importlib
import inspect
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from splitlearn_auto.findings import CannotSplitError
from splitlearn_auto.knowledge import decoder_name, decoder_names, model_class_name
from splitlearn_core.extension import (
    CACHE_FIELD,
    DEPTHS,
    OF_OTHERS,
    TINY,
    other_sizes,
    sizes_after_one_token,
    with_decoder_values,
)

#: Sizes that only some model types have, by their names in transformers.
_RARE: Mapping[str, int | str] = {
    # Feed-forward layers under other names.
    **dict.fromkeys(
        (
            "ffn_dim",
            "decoder_ffn_dim",
            "encoder_ffn_dim",
            "ffn_hidden_size",
            "dff",
            "dim_ff",
            "intermediate_size_mlp",
            "n_inner",
        ),
        48,
    ),
    **dict.fromkeys(("dense_intermediate_size", "shared_intermediate_size", "block_ff_dim"), 48),
    "word_embed_proj_dim": 16,
    # Attention under other names; rotary dimensions are an even part of a head's.
    "num_kv_heads": 2,
    "dim_head": 8,
    "kv_channels": 8,
    "rotary_dim": 4,
    "clip_qkv": 8,
    # Latent attention and its indexer.
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 64,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
    # Experts: few, so that each of them is used.
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    "shared_experts_intermediate_size": 16,
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "n_shared_experts"), 1),
    "router_hidden_size": 16,
    # Adapters for each language.
    "default_language": "en_XX",
    # Embeddings of tokens for each layer.
    "vocab_size_per_layer_input": 101,
    "hidden_size_per_layer_input": 8,
    # Linear attention and state spaces.
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    "linear_num_key_heads": 2,
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    "mamba_d_ssm": 64,
    "num_heads": 8,
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 8),
}

#: Values that models need and some classes (DeepSeek V2's) leave at None.
_NEVER_COMPUTED = ("num_experts_per_tok",)
#: What the modules of transformers import that have layers with a running state.
_RECURRENT = "create_recurrent_attention_mask"
#: Values that no class has, and the code of some models reads nevertheless.
_UNSTATED: Mapping[str, Any] = {"rope_theta": 10_000.0}
_UNSTATED_OF_WHOLE: Mapping[str, Any] = {"vocabulary_map": {"<image>": 3, "<|extra_200|>": 4}}
#: What heads of latent attention consist of: values without and with positions.
_PARTS_OF_HEADS = ("qk_nope_head_dim", "qk_rope_head_dim")
#: Rotary positions; and how many of them are of time, height and width.
_ROPE: Mapping[str, Any] = {"rope_type": "default", "rope_theta": 10_000.0}
_SECTIONS = "mrope_section"
_DEPTH = TINY["num_hidden_layers"]
#: Upper limit, because tests create the model many times.
_MAX_PARAMETERS = 20_000_000
#: Values about files or training alone. Layer dropout is among them: a skipped layer cannot be observed.
_NOT_OF_THE_MODEL = {
    *("architectures", "auto_map", "dtype", "torch_dtype", "model_type", "quantization_config"),
    *("transformers_version", "_name_or_path", "use_cache", "return_dict", "tie_word_embeddings"),
    *("layerdrop", "decoder_layerdrop"),
}


def tiny_sizes(known: Any) -> dict[str, Any]:
    """Return the values that make a model of a type small.

    Args:
        known: A configuration of the type, of any size.

    Returns:
        Values for its configuration class, by its own names.
    """
    # Some types have other values in some layers; these are those of the others.
    known.allow_global_per_layer_attribute_access = True
    sizes = {name: value for name, value in TINY.items() if hasattr(known, name) and not _is_computed(known, name)}
    if "num_key_value_heads" in sizes and hasattr(known, "kv_lora_rank"):
        # Latent attention has keys for each head.
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    sizes |= {own: TINY[name] for name, own in decoder_names(known).items()}
    own = {known.attribute_map.get(name, name) for name in sizes}
    for name, value in _RARE.items():
        current = getattr(known, name, None)
        # Values that are None by default are computed from others, with exceptions.
        small = current is None and name in _NEVER_COMPUTED and hasattr(known, name)
        larger = type(current) is type(value) is int and current > value
        mapped = known.attribute_map.get(name, name)
        if (small or larger) and mapped not in own and not _is_computed(known, mapped):
            sizes[name] = value
    return sizes


def _is_computed(known: Any, name: str) -> bool:
    return isinstance(getattr(type(known), name, None), property)


def tiny_config(model_type: str, known: Any, stated: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Create a small configuration, and return it with the values that it needs besides the usual small sizes.

    Args:
        model_type: The model type.
        known: A configuration of it with the defaults of the class.
        stated: The values of a given ``config.json``; empty for the defaults.

    Raises:
        CannotSplitError: No small model of the type can be created, with the message of transformers.
    """
    name = decoder_name(known)
    if not name:
        return _tiny_config(model_type, known, stated, partial(_config, model_type))
    inner, refusals = stated.get(name), []
    own = inner if isinstance(inner, Mapping) else stated
    # Text passes through none of the other models, so that their sizes need not fit together.
    for small in (OF_OTHERS, DEPTHS):
        others = other_sizes(known, name, small)
        whole = {**others, **_unstated_of(known), name: {"model_type": getattr(known, name).model_type}}
        try:
            config, needed = _tiny_config(
                model_type, getattr(known, name), own, partial(_config_of_several, model_type, name, whole)
            )
        except CannotSplitError as error:
            refusals.append(error)
            continue
        return config, with_decoder_values(whole, name, needed)
    raise refusals[0]


def _unstated_of(known: Any) -> dict[str, Any]:
    """Return values of a whole model that its class leaves at None, and its code reads nevertheless."""
    return {name: value for name, value in _UNSTATED_OF_WHOLE.items() if getattr(known, name, value) is None}


def _tiny_config(
    model_type: str, known: Any, stated: Mapping[str, Any], make: Callable[[Mapping[str, Any]], Any]
) -> tuple[Any, dict[str, Any]]:
    """Create a small configuration as :func:`tiny_config` does, of a decoder and the models around it.

    Args:
        model_type: The model type.
        known: A configuration of the decoder.
        stated: Its values in a given ``config.json``.
        make: Makes the configuration of the whole model from values of the decoder.
    """
    sizes = tiny_sizes(known)
    own = {name: value for name, value in sizes.items() if TINY.get(name) != value}
    problems = []
    attempts = deque(_attempts(known, sizes, {**own, **_own_values(known, sizes, stated)}))
    while attempts:
        needed = attempts.popleft()
        try:
            config = make({**sizes, **needed})
            parameters = _parameters(config)
            if parameters <= _MAX_PARAMETERS:
                needed = {**needed, **_both_kinds(config, {**sizes, **needed}, make)}
                _check_forward(make({**sizes, **needed}))
        except ImportError as error:
            raise CannotSplitError(
                f"a small model of type {model_type} needs a package that is not installed: "
                f"{str(error).strip().partition('. ')[0]}",
                hint="install it, and try again",
            ) from error
        # Classes of transformers raise any exception for values that do not fit.
        except Exception as error:  # noqa: BLE001
            problems.append(f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}")
            attempts.extendleft(_with_unstated(known, needed, error))
            continue
        if parameters <= _MAX_PARAMETERS:
            # Created again: a model may have changed its configuration.
            return make({**sizes, **needed}), needed
        problems.append(f"it still has {parameters:,} parameters")
    raise CannotSplitError(
        f"no small model of type {model_type} can be created: {problems[0] if problems else 'no sizes fit'}",
        hint="give the config.json of a small model of the type: --from FILE",
    )


def _attempts(known: Any, sizes: Mapping[str, Any], needed: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield values to add to the small sizes: first none, then those that some model types require."""
    yield needed
    # Values that some classes leave at None, and the class does not compute.
    yield {**needed, **_absent_sizes(known)}
    yield {**needed, **_shortened_lists(known, sizes)}
    if kinds := _kinds_of_layers(known):
        yield {**needed, "layer_types": [kinds[number % len(kinds)] for number in range(_DEPTH)]}
    if getattr(known, "layer_types", []) is None:
        # Not derived from other values.
        yield {**needed, "layer_types": ["full_attention"] * _DEPTH}
    if getattr(known, "num_kv_shared_layers", 0):
        yield {**needed, "num_kv_shared_layers": 0}
    if getattr(known, "is_heterogeneous", False):
        yield {**needed, "per_layer_config": _small_layers(known, {**sizes, **needed})}
    if known.sub_configs:
        yield {**needed, **{name: _all_sizes(getattr(known, name)) for name in known.sub_configs}}
    if _SECTIONS in inspect.getsource(_code_of(known)):
        rope = {**_ROPE, **(getattr(known, "rope_parameters", None) or {}), _SECTIONS: [2, 1, 1]}
        # The rotary dimensions are those of a head, or half of them.
        yield {**needed, "rope_parameters": rope}
        yield {**needed, "rope_parameters": rope, "head_dim": 2 * TINY["head_dim"]}
    # As many heads for keys as for queries.
    if "num_key_value_heads" in sizes and "num_attention_heads" in sizes:
        yield {**needed, "num_key_value_heads": sizes["num_attention_heads"]}
    # Where one layer of a kind is too few, because layers of a kind share modules.
    yield {**needed, **_shortened_lists(known, sizes, _in_turn)}
    if known.num_hidden_layers != _DEPTH:
        yield {**needed, "num_hidden_layers": known.num_hidden_layers}
    # Wide enough for sizes that are rounded up to a multiple of 64.
    if "hidden_size" in sizes:
        yield {**needed, "hidden_size": 4 * TINY["hidden_size"]}


def _small_layers(known: Any, values: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Return sizes for the layers that have others than the rest: twice as large."""
    layers = _config(known.model_type, values).to_dict()["per_layer_config"]
    small = {
        str(number): {name: 2 * values[name] for name in own if type(values.get(name)) is int}
        for number, own in layers.items()
    }
    for own in small.values():
        if own.keys() >= {"head_dim", *_PARTS_OF_HEADS}:
            own["head_dim"] = sum(own[name] for name in _PARTS_OF_HEADS)
    return small


def _both_kinds(config: Any, values: Mapping[str, Any], make: Callable[[Mapping[str, Any]], Any]) -> dict[str, Any]:
    """Return values with which a model has layers with keys and values and layers with running states.

    By the defaults of some classes, all layers are of one kind, and those of published models are not.

    Args:
        config: A small configuration.
        values: The values of the decoder.
        make: Makes a configuration from others.
    """
    decoder = config.get_text_config(decoder=True)
    if _RECURRENT not in vars(_code_of(decoder)) or _has_both_kinds(config):
        return {}
    depth = decoder.num_hidden_layers
    for name, mixed in (
        ("layer_types", ["conv", "full_attention"] * depth),
        ("layer_types", ["linear_attention", "full_attention"] * depth),
        ("attn_layer_indices", [*range(1, depth, 2)]),
    ):
        if not hasattr(decoder, name) or _is_computed(decoder, decoder.attribute_map.get(name, name)):
            continue
        # Classes of transformers raise any exception for values that do not fit.
        with suppress(Exception):
            if _has_both_kinds(make({**values, name: mixed[:depth]})):
                return {name: mixed[:depth]}
    return {}


def _has_both_kinds(config: Any) -> bool:
    """Return whether a model has layers that cache keys and values, and layers that keep a running state."""
    try:
        output = tiny_model(config)(input_ids=torch.ones(1, 1, dtype=torch.long), use_cache=True)
    # transformers has no mask for attention where there is no such layer.
    except ValueError:
        return False
    sizes = sizes_after_one_token(output.get(CACHE_FIELD))
    return any(size.per_token for size in sizes) and any(size.fixed for size in sizes)


def _absent_sizes(known: Any) -> dict[str, Any]:
    return {name: value for name, value in _RARE.items() if getattr(known, name, value) is None}


def _all_sizes(known: Any) -> dict[str, Any]:
    return {**tiny_sizes(known), **_absent_sizes(known)}


def _kinds_of_layers(known: Any) -> list[str]:
    """Return the kinds of layers that the code of a model tells apart, if its configuration says none."""
    from transformers import configuration_utils

    if getattr(known, "layer_types", ()) is not None:
        return []
    code = inspect.getsource(_code_of(known))
    kinds = getattr(configuration_utils, "ALLOWED_LAYER_TYPES", ())
    return [kind for kind in kinds if f'"{kind}"' in code]


def _code_of(known: Any) -> Any:
    """Return the module of the code of a decoder, by its configuration."""
    from transformers import AutoModel, AutoModelForCausalLM

    for table in (AutoModelForCausalLM._model_mapping, AutoModel._model_mapping):  # noqa: SLF001  # as from_config
        if type(known) in table:
            classes = table[type(known)]
            return sys.modules[(classes[0] if isinstance(classes, tuple) else classes).__module__]
    # A decoder that no automatic class makes alone.
    return importlib.import_module(type(known).__module__.replace(".configuration_", ".modeling_"))


def _created(config: Any, **options: Any) -> Any:
    """Create a model as ``from_config`` of transformers' automatic classes does; see :func:`decoder_alone`."""
    name = model_class_name(config.model_type)
    model = getattr(transformers, name)._from_config(config, **options)  # noqa: SLF001  # as AutoModel calls it
    return model.get_submodule(decoder_alone(model))


def decoder_alone(model: Any) -> str:
    """Return the path of the decoder in a composite model whose decoder has its own head; empty if it has none.

    Such a decoder is a model of its own class, of which components are made: the class of the whole may need images
    (Llama 4's).
    """
    config = model.config.get_text_config(decoder=True)
    for path, module in model.named_modules():
        if path and isinstance(module, PreTrainedModel) and module.config is config:
            return str(path) if module.get_output_embeddings() is not None else ""
    return ""


def path_of_decoder(config: Any) -> str:
    """Return :func:`decoder_alone` for a configuration."""
    with torch.device("meta"):
        return decoder_alone(getattr(transformers, model_class_name(config.model_type))(config))


def _with_unstated(known: Any, needed: Mapping[str, Any], error: Exception) -> Iterator[dict[str, Any]]:
    """Yield the values with one that the code of a model reads and its configuration does not have."""
    name, owner = str(getattr(error, "name", "")), getattr(error, "obj", None)
    if isinstance(error, KeyError) and error.args[0] in (getattr(known, "layer_types", None) or ()):
        # Rotary positions of each kind of layers, and how many of them are of each of three kinds of positions.
        rope = {**_ROPE, _SECTIONS: [2, 1, 1]}
        if "rope_parameters" not in needed:
            yield {**needed, "rope_parameters": dict.fromkeys(sorted(set(known.layer_types)), rope)}
    key = getattr(owner, "base_config_key", "")
    given = needed.get(key, {})
    if key and name in _UNSTATED and name not in given:
        yield {**needed, key: {**given, name: _UNSTATED[name]}}


def _own_values(known: Any, sizes: Mapping[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a given configuration that differ from the defaults and are not sizes."""
    own = known.to_dict()
    sized = {known.attribute_map.get(name, name) for name in sizes} | set(sizes)
    different = {
        name: value
        for name, value in stated.items()
        if name in own and own[name] != value and name not in sized and name not in _NOT_OF_THE_MODEL
    }
    kept: dict[str, Any] = {}
    for name, value in different.items():
        if isinstance(value, bool | str | float):
            kept[name] = value
        elif isinstance(value, list) and len(value) == stated.get("num_hidden_layers"):
            kept[name] = _shortened(value)
    return kept


def _shortened_lists(
    known: Any, sizes: Mapping[str, Any], shortened: Callable[[list[Any]], list[Any]] | None = None
) -> dict[str, Any]:
    return {
        name: (shortened or _shortened)(value)
        for name, value in known.to_dict().items()
        if isinstance(value, list) and len(value) == known.num_hidden_layers and name not in sizes
    }


def _shortened(kinds: list[Any]) -> list[Any]:
    """Shorten a list with one item per layer to a few layers, with every kind of item."""
    first = kinds[:_DEPTH]
    return first if all(kind in first for kind in kinds) else _in_turn(kinds)


def _in_turn(kinds: list[Any]) -> list[Any]:
    distinct = [kind for number, kind in enumerate(kinds) if kind not in kinds[:number]]
    return [distinct[number % len(distinct)] for number in range(_DEPTH)]


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings and progress bars of transformers, and restore its settings afterwards."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def with_values(config: Any, values: Mapping[str, Any]) -> Any:
    """Return a copy of a configuration with other values; raises the errors of its class."""
    name = decoder_name(config)
    own = with_decoder_values(config.to_dict(), name, values)
    if "layer_types" in values and "per_layer_config" not in values:
        # Sizes of single layers, which follow from their kinds.
        (own[name] if name else own).pop("per_layer_config", None)
    changed = type(config)(**own)
    changed.dtype = torch.float32
    return changed


def _config(model_type: str, values: Mapping[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[model_type]
    # By its own names: what it computes of them is computed before it knows others.
    config = config_class(**{config_class.attribute_map.get(name, name): value for name, value in values.items()})
    config.dtype = torch.float32
    return config


def _config_of_several(model_type: str, name: str, whole: Mapping[str, Any], values: Mapping[str, Any]) -> Any:
    return _config(model_type, with_decoder_values(whole, name, values))


def _parameters(config: Any) -> int:
    """Count the parameters of a model without allocating them."""
    with torch.device("meta"):
        model = _created(config)
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def _check_forward(config: Any) -> None:
    """Run a model: some values are missed by its code only then."""
    _created(config).eval()(input_ids=torch.ones(1, 3, dtype=torch.long))


def tiny_model(config: Any, attn_implementation: str | None = None) -> Any:
    """Create a model with random parameters: at the usual 1 and 0, a misplaced norm or bias would change nothing.

    Scales of hidden states are near 1: a small one in each layer would leave nothing of the tokens.
    """
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    model = _created(config, **options)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        usual = 1.0 if not name.endswith("weight") and bool((parameter == 1).all()) else 0.0
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15 + usual
    return model.eval()


def in_dtype(model: Any, dtype: str) -> Any:
    """Save and load a model, in another dtype maybe: computed buffers differ from converted ones."""
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        attention = model.config._attn_implementation  # noqa: SLF001  # the name in transformers
        loaded = type(model).from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()
        for tensor in (*loaded.parameters(), *loaded.buffers()):
            # In memory of its own, not in the file's: the last bit of a small product may depend on the alignment.
            tensor.data = tensor.data.clone()
        return loaded
