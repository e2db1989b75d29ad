"""Bounds of the numbers in a configuration, by name: of those in proportion to which transformers allocates or loops.

They are far above those of every model, and far below what exhausts a machine. Pure; see :data:`BOUNDS`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from splitlearn_core.errors import ConfigurationError
from splitlearn_core.quoting import SENTENCE, listed, plain, quote
from splitlearn_core.types import TensorInfo


@dataclass(frozen=True, slots=True)
class Bound:
    """The largest number that a configuration may give under certain names."""

    #: Matches a whole name, in lower case.
    names: re.Pattern[str]
    largest: int


def _bound(names: str, largest: int) -> Bound:
    return Bound(re.compile(names), largest)


#: The first that matches a name counts, in sub-configurations as well.
BOUNDS = (
    # Not sizes of modules: token ids, training statistics, seeds.
    _bound(
        r".*(token_ids?|token_index|_offset|seed|n_params|num_param\w*|\w*_params|\w*train\w*|\w*_tokens_seen)", 2**63
    ),
    _bound(r"model_max_length|.*(timescale|theta|_base|temperature|sampling_rate|sample_rate)", 2**63),
    # Two dictionaries with an entry for each.
    _bound(r"(num|n)_(\w+_)?(labels|classes)", 200_000),
    # A module for each, and lists with an entry for each.
    _bound(r"(\w+_)?(layers?|depth|blocks|stages|stacks|repeats|loops|recurrence|num_passes)", 10_000),
    _bound(r"(\w+_)?n_layers?\w*|num_layers?_per_\w+|\w+_layers_per_\w+", 10_000),
    _bound(r"(\w+_)?vocab\w*", 100_000_000),
    # A list of positions, at 8 bytes each, in models that are not rotary.
    _bound(r"(\w+_)?(positions?|position_embeddings|pos_emb\w*|n_ctx|\w*seq_len\w*|length|context_size)", 2**27),
    _bound(r"max_\w+|\w*window\w*|\w*chunk\w*|\w*_len", 2**31),
    _bound(r"(\w+_)?(n_head|heads?|experts?|groups|head_dim|experts_per_tok(en)?|topk|top_k)", 2**16),
    # Norms are computed, and take this times their number.
    _bound(r"(\w+_)?(hidden_size|n_embd|d_model|hidden_dim|embed_dim|embedding_size|emb_dim|dim)", 2**20),
    # Of generation: rows of a batch, for each prompt.
    _bound(r"num_beams|num_beam_groups|num_return_sequences|num_assistant_tokens|\w*lookup_num_tokens", 10_000),
    _bound(
        r"(num|n|d)_\w+|\w+_(size|dim|dims|rank|width|channels|kernel|buckets|queries|units|ratio|multiplier)", 2**26
    ),
)
#: Numbers that every model has, under all of their names: they must be integers.
_WHOLE = frozenset(
    {"num_hidden_layers", "n_layer", "hidden_size", "n_embd", "vocab_size", "num_attention_heads", "n_head"}
    | {"intermediate_size", "n_inner", "num_key_value_heads", "head_dim", "max_position_embeddings", "n_positions"}
    | {"num_labels"}
)
#: Entries of an object and of a list, of objects with an entry for each label, and levels of all.
MAX_ENTRIES, MAX_ITEMS, MAX_LABELS, MAX_LEVELS = 10_000, 100_000, 200_000, 32
_OF_LABELS = ("id2label", "label2id")
#: Types whose layers keep a mask of all pairs of positions, and what they call the number of positions.
_MASKS = {
    "gpt_neo": "max_position_embeddings",
    **dict.fromkeys(("clvp", "decision_transformer", "gpt2", "gpt_bigcode", "imagegpt"), "n_positions"),
    **dict.fromkeys(("codegen", "gptj"), "n_positions"),
}
#: Bytes of all masks, and numbers in all norms: of a gigabyte or two.
_MAX_MASKS, _MAX_NORMS = 2**32, 2**27
#: The same number under the names of different classes.
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_WIDTH = ("hidden_size", "n_embd", "d_model")
#: Sizes of which some tensor has as many rows or columns.
_STORED = ("vocab_size", *_WIDTH)


def check_numbers(config: Mapping[str, Any], where: str) -> None:
    """Refuse a configuration with numbers out of bounds, before it is given to transformers.

    Args:
        config: The content of the file.
        where: The file, for the message.

    Raises:
        ConfigurationError: Each number, list and object that is out of bounds, with the bound.
    """
    _refuse([*_problems(config, "", 0), *_products(config)], where)


def check_against_tensors(config: Mapping[str, Any], infos: Iterable[TensorInfo], where: str) -> None:
    """Refuse sizes that no tensor of a whole, plain model has; transformers would initialise what is missing.

    Args:
        config: The content of the file.
        infos: All tensors of the model.
        where: The model, for the message.

    Raises:
        ConfigurationError: A size is larger than every dimension of every tensor.
    """
    largest = max((size for info in infos for size in info.shape), default=0)
    stated = ((name, config.get(name)) for name in _STORED)
    _refuse(
        [
            f"{name} is {quote(value)}, and no tensor has a dimension over {largest:,}"
            for name, value in stated
            if type(value) is int and value > largest
        ],
        where,
    )


def bound_of(name: str) -> int | None:
    """Return the largest number that a configuration may give under a name; None if there is no bound."""
    return next((bound.largest for bound in BOUNDS if bound.names.fullmatch(name.lower())), None)


def _refuse(problems: list[str], where: str) -> None:
    if problems:
        raise ConfigurationError(
            f"{where} cannot be the configuration of a model: {listed(problems, '; ', limit=SENTENCE)}",
            hint="correct the values, or fetch the file again from where the model comes from",
        )


def _problems(values: Mapping[str, Any], path: str, level: int, most: int = MAX_ENTRIES) -> Iterator[str]:
    if level > MAX_LEVELS:
        yield f"{path} is nested more than {MAX_LEVELS} levels deep"
        return
    if len(values) > most:
        yield f"{path or 'it'} has {len(values):,} entries; {most:,} is the bound"
        return
    for name, value in values.items():
        where = f"{path}.{plain(name)}" if path else plain(name)
        is_integer = type(value) is int or (isinstance(value, float) and value.is_integer())
        if not path and name in _WHOLE and isinstance(value, bool | str | float) and not is_integer:
            yield f"{where} is {quote(value)}, not an integer"
        else:
            yield from _problems_of(str(name), value, where, level)


def _problems_of(name: str, value: Any, where: str, level: int) -> Iterator[str]:
    """Describe what is out of bounds in one value; the numbers of a list are checked under its name."""
    largest = bound_of(name)
    if isinstance(value, Mapping):
        yield from _problems(value, where, level + 1, MAX_LABELS if name in _OF_LABELS else MAX_ENTRIES)
    elif isinstance(value, list):
        if level >= MAX_LEVELS:
            yield f"{where} is nested more than {MAX_LEVELS} levels deep"
        elif len(value) > MAX_ITEMS:
            yield f"{where} has {len(value):,} entries; {MAX_ITEMS:,} is the bound"
        else:
            for number, item in enumerate(value):
                yield from _problems_of(name, item, f"{where}[{number}]", level + 1)
    # Ratios and factors may be infinite; those of _WHOLE were checked before.
    elif largest is not None and type(value) in (int, float) and math.inf > abs(value) > largest:
        yield f"{where} is {quote(value)}; {largest:,} is the bound"


def _products(config: Mapping[str, Any]) -> Iterator[str]:
    """Describe numbers that are within their bounds, and too large together."""
    layers, width = _number(config, _LAYERS), _number(config, _WIDTH)
    if layers * width > _MAX_NORMS:
        yield f"{layers:,} layers of a width of {width:,} are more than any model has"
    positions = _number(config, (_MASKS.get(str(config.get("model_type")), ""),))
    if positions**2 * max(layers, 1) > _MAX_MASKS:
        yield (
            f"{positions:,} positions in {layers:,} layers, each of which keeps a mask of all pairs, "
            f"take over {_MAX_MASKS // 2**30} GiB"
        )


def _number(config: Mapping[str, Any], names: Iterable[str]) -> int:
    values = (config.get(name) for name in names)
    return next((value for value in values if type(value) is int and value > 0), 0)
