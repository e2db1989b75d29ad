"""A tiny model of a type, or of the type of a given checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import torch

from splitlearn_auto.findings import CannotSplitError
from splitlearn_auto.sizes import TINY, tiny_sizes

_DEPTH = TINY["num_hidden_layers"]
#: A model that tests make anew many times must be smaller than this.
_MAX_PARAMETERS = 20_000_000
#: What a configuration says of its files or of training alone, and not of the model: a layer that is left out now and
#: then cannot be watched.
_NOT_OF_THE_MODEL = {
    *("architectures", "auto_map", "dtype", "torch_dtype", "model_type", "quantization_config"),
    *("transformers_version", "_name_or_path", "use_cache", "return_dict", "tie_word_embeddings"),
    *("layerdrop", "decoder_layerdrop"),
}


def tiny_config(model_type: str, known: Any, said: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Make a small configuration, and say what it needs besides the usual small sizes.

    Args:
        model_type: The type.
        known: A configuration of it with the class's own values.
        said: What a given ``config.json`` says; empty for the class's own values.

    Raises:
        CannotSplitError: No small model of the type can be made, with what transformers says about it.
    """
    sizes = tiny_sizes(known)
    own = {name: value for name, value in sizes.items() if TINY.get(name) != value}
    problems = []
    for needed in _attempts(known, sizes, {**own, **_peculiar(known, sizes, said)}):
        try:
            config = _config(model_type, {**sizes, **needed})
            parameters = _parameters(config)
        # A class of transformers refuses what does not fit with an error of its own liking.
        except Exception as error:  # noqa: BLE001
            problems.append(f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}")
            continue
        if parameters <= _MAX_PARAMETERS:
            # Made anew: a model may have written into its configuration.
            return _config(model_type, {**sizes, **needed}), needed
        problems.append(f"it still has {parameters:,} parameters")
    raise CannotSplitError(
        f"no small model of type {model_type} can be made to look at: {problems[0] if problems else 'no sizes fit'}",
        hint="give the config.json of a small model of the type: --from FILE",
    )


def _attempts(known: Any, sizes: Mapping[str, Any], needed: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what to say besides the small sizes: first nothing, then what some types insist on."""
    yield needed
    yield {**needed, **_shortened_lists(known, sizes)}
    # As many heads for keys as for queries, and layers as many as the class has.
    if "num_key_value_heads" in sizes and "num_attention_heads" in sizes:
        yield {**needed, "num_key_value_heads": sizes["num_attention_heads"]}
    if known.num_hidden_layers != _DEPTH:
        yield {**needed, "num_hidden_layers": known.num_hidden_layers}


def _peculiar(known: Any, sizes: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a given configuration says otherwise than the class, and is no size."""
    own = known.to_dict()
    sized = {known.attribute_map.get(name, name) for name in sizes} | set(sizes)
    different = {
        name: value
        for name, value in said.items()
        if name in own and own[name] != value and name not in sized and name not in _NOT_OF_THE_MODEL
    }
    kept: dict[str, Any] = {}
    for name, value in different.items():
        if isinstance(value, bool | str | float):
            kept[name] = value
        elif isinstance(value, list) and len(value) == said.get("num_hidden_layers"):
            kept[name] = _shortened(value)
    return kept


def _shortened_lists(known: Any, sizes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: _shortened(value)
        for name, value in known.to_dict().items()
        if isinstance(value, list) and len(value) == known.num_hidden_layers and name not in sizes
    }


def _shortened(kinds: list[Any]) -> list[Any]:
    """Take what a few layers are of a list with an item for each layer, none of the kinds left out."""
    distinct = [kind for number, kind in enumerate(kinds) if kind not in kinds[:number]]
    first = kinds[:_DEPTH]
    if all(kind in first for kind in distinct):
        return first
    return [distinct[number % len(distinct)] for number in range(_DEPTH)]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from warning of random weights and from drawing bars; what it logged before counts after."""
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
    """Make the same configuration with other values; raises what the configuration class raises."""
    changed = type(config)(**{**config.to_dict(), **values})
    changed.dtype = torch.float32
    return changed


def _config(model_type: str, values: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.for_model(model_type, **values)
    config.dtype = torch.float32
    return config


def _parameters(config: Any) -> int:
    """Count the parameters of a model, without making them."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def tiny_model(config: Any, attn_implementation: str | None = None) -> Any:
    """Make a model whose every parameter is random: at their usual 1 and 0, a misplaced one would change nothing."""
    from transformers import AutoModelForCausalLM

    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    model = AutoModelForCausalLM.from_config(config, **options)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.15
    return model.eval()


def in_dtype(model: Any, dtype: str) -> Any:
    """Load a model anew in another dtype: buffers of no file are computed otherwise than a conversion has them."""
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder, dtype=dtype).eval()
