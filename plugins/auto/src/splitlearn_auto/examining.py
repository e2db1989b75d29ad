"""Examine a model type: from its name to the content of a family file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields
from itertools import chain
from typing import Any

import torch
import transformers
from transformers import AutoConfig, Cache

from splitlearn_auto.answers import UnprovenSetting
from splitlearn_auto.deriving import (
    Parts,
    check_causal,
    derive_parts,
    has_float32,
    ignored_suffixes,
    keeps_float32,
    layers_take,
    refuse_tokens_in_layers,
    renamed_keys,
    saved_tensors,
)
from splitlearn_auto.findings import CannotSplitError, Derived, Question
from splitlearn_auto.knowledge import (
    COMMON,
    WIDE,
    check_config,
    config_defaults,
    config_names,
    decoder_name,
    decoder_of,
    decoder_switches,
    has_any_decoder,
    model_class_name,
    value_of,
)
from splitlearn_auto.making import in_dtype, path_of_decoder, quiet, tiny_config, tiny_model, with_values
from splitlearn_auto.proving import cache_note, differences, is_packable, keeps_states
from splitlearn_core import ConfigurationError, ModelFamily, SplitLearnError
from splitlearn_core.extension import CACHE_FIELD, TINY, own_state, with_decoder_values

_TIED = "tie_word_embeddings"
#: Switches that do not affect the structure of a decoder.
_NO_SWITCHES = {
    *("use_cache", "return_dict", "output_attentions", "output_hidden_states", "torchscript", _TIED),
    *("is_encoder_decoder", "is_decoder", "add_cross_attention", "use_mambapy", "tie_encoder_decoder"),
}
_MULTIPLIERS = ("multiplier", "scale")
_ATTENTION = ("eager", "sdpa")
#: All other aspects are verified in the first one.
_DTYPES = ("float32", "bfloat16")
#: The dropout probability of a tiny model; and parts of names of other dropouts: of whole layers, or of another head.
_DROPOUT = 0.5
_DROPOUTS = "dropout"
_NO_DROPOUT = ("layer", "classifier", "summary")
#: Values with which layers of some types exchange more than hidden states, unless they are 0: embeddings of the
#: tokens for each layer, and layers that use the keys and values of others.
_MORE_CROSSES = {"hidden_size_per_layer_input": 8}
#: The number of last layers that use keys and values of earlier ones; and a small model, to be cut at 1 and 2.
_SHARING = "num_kv_shared_layers"
_WITH_SHARING = {
    _SHARING: 2,
    "layer_types": ["full_attention", *["sliding_attention"] * 2, *["full_attention", "sliding_attention"] * 2][:6],
}
#: Lists of kinds of layers -> the kinds that use what the layer before has computed; and a list for a small model.
_JOINED = {"indexer_types": (("shared",), ["full", "full", "full", "full", "shared", "full"])}
_SLIDING, _WINDOW = "sliding_window", 4
#: Decoders that published composite models have, where a type leaves the choice.
_DECODERS = ("llama", "mistral", "ministral3", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gpt_oss", "phi3")
#: What layers with latent attention cache, by the names in their configurations.
_LATENT = ("kv_lora_rank", "qk_rope_head_dim")


def examine(model_type: str, stated: Mapping[str, Any], *, settings: bool = True) -> Derived:
    """Run :func:`_examine` without the warnings of transformers, and with errors that name the model type."""
    with quiet(), own_state(gradients=True), _naming_model_type(model_type):
        return _examine(model_type, stated, settings)


def _examine(model_type: str, stated: Mapping[str, Any], settings: bool) -> Derived:
    """Derive how the models of a type are split, and verify it on a tiny one.

    Args:
        model_type: The model type.
        stated: The values of a given ``config.json``; empty for the defaults of the class.
        settings: Whether to examine and prove it with other settings, too; not needed to know whether it is split.

    Raises:
        ConfigurationError: There is no such type.
        CannotSplitError: Models of the type cannot be split, with the reason.
    """
    model_class_name(model_type)
    known = AutoConfig.for_model(model_type)
    check_config(model_type, known)
    text_config = decoder_name(known)
    config, needed, switches = _small_decoder(model_type, known, stated)
    required = {**switches, **_required_values(config)}
    joined = {name: kinds for name, (kinds, _) in _JOINED.items() if getattr(decoder_of(config), name, None)}
    added = {**required, **{name: _JOINED[name][1] for name in joined}}
    needed, config = with_decoder_values(needed, text_config, added), with_values(config, added)
    model = tiny_model(config)
    parts = derive_parts(model)
    crossing = _named_dimensions(config, parts.crossing)
    factors = {factor for dimensions in crossing.values() for name in dimensions for factor in name.split("*")}
    sizes = {name for name in factors - {*COMMON} if hasattr(decoder_of(known), name)}
    narrow = in_dtype(tiny_model(config), _DTYPES[1]) if crossing else model
    shared = _named_shares(config, parts.shared)
    sizes |= {count for _, _, count in shared.values() if count}
    wide = bool(crossing) and layers_take(narrow, parts) == torch.float32
    keeps_wide = keeps_float32(model) or (bool(crossing) and has_float32(narrow))
    # With layers that share nothing, of which switches are observed.
    variants = _Variants(config, parts)
    sharing = _SHARING if _can_share(decoder_of(config)) else ""
    if sharing:
        needed = with_decoder_values(needed, text_config, _WITH_SHARING)
        config = with_values(config, _WITH_SHARING)
        model = tiny_model(config)
    renamed = renamed_keys(model, saved_tensors(model))
    alone = path_of_decoder(config) if text_config else ""
    if settings:
        variants.sweep()
    derived = Derived(
        {
            "model_type": model_type,
            "architecture": type(model).__name__,
            **variants.fields(),
            # Masks of all layers may depend on which tokens belong to one image.
            **({"text_config": text_config, "bottom_arguments": ()} if text_config else {}),
            "crossing": crossing,
            "layer_results": parts.layer_results,
            "zero_arguments": parts.zero_arguments,
            "ignored_suffixes": ignored_suffixes(model),
            # transformers' tables know the names in older files of composite models, too.
            "renamed": (((f"{alone}.", ""),) if alone else ()) if text_config else renamed or (),
            "transformers_tables": bool(text_config) or renamed is None or keeps_wide,
            "measured_cache": keeps_states(model) or has_any_decoder(known),
            "config_names": config_names(known),
            "config_defaults": {
                **config_defaults(known),
                **{
                    name: getattr(decoder_of(known), name)
                    for name in (*required, *sorted(sizes), *filter(None, (sharing,)))
                },
                **({WIDE: True} if wide else {}),
            },
            "sharing_layers": sharing,
            "shared_modules": shared,
            "required_values": required,
            "joined_layers": joined,
            "tiny_config": needed,
        },
        reasons=dict(parts.reasons),
        questions=list(parts.questions),
        notes=variants.notes,
        unproven=variants.unproven,
        transformers=transformers.__version__,
    )
    _prove(derived, config, variants, settings)
    if settings and has_any_decoder(known) and not derived.questions:
        derived.decoders = tuple(_proven_decoders(derived, known))
        derived.notes.append(
            f"with a decoder of another type than {', '.join(derived.decoders)}: not tried, or different"
        )
    derived.fields = {name: value for name, value in derived.fields.items() if value != _DEFAULTS.get(name)}
    return derived


def _small_decoder(
    model_type: str, known: Any, stated: Mapping[str, Any]
) -> tuple[Any, dict[str, Any], Mapping[str, Any]]:
    """Return a small configuration, what it needs, and the switches without which its model is no causal decoder."""
    for switches in decoder_switches(known):
        try:
            config, needed = tiny_config(model_type, known, {**stated, **switches})
            check_causal(tiny_model(config))
        except CannotSplitError as error:
            refusal = error
        else:
            return config, needed, switches
    raise refusal


def _proven_decoders(derived: Derived, known: Any) -> Iterator[str]:
    """Yield the types of decoder with which a type of several models is split as with the usual one."""
    name, usual = derived.fields["text_config"], decoder_of(known).model_type
    yield usual
    for other in _DECODERS:
        # Not every class takes every decoder, and some are not in all versions of transformers.
        with suppress(Exception):
            whole = type(known)(**{name: {"model_type": other}})
            model = tiny_model(tiny_config(known.model_type, whole, {})[0])
            if other != usual and not differences(model, ModelFamily(**derived.fields)):
                yield other


def _required_values(config: Any) -> dict[str, Any]:
    """Return the values that a configuration must have so that only hidden states cross a cut."""
    required, decoder = {}, decoder_of(config)
    for name, other in _MORE_CROSSES.items():
        if getattr(decoder, name, None) is None:
            continue
        try:
            crossing = derive_parts(tiny_model(with_values(config, {name: other}))).crossing
        # The code of the model raises an exception, because it is given embeddings alone.
        except Exception:  # noqa: BLE001
            required[name] = 0
        else:
            if crossing and not getattr(decoder, name):
                required[name] = 0
    if getattr(decoder, _SHARING, None) is not None and not _can_share(decoder):
        required[_SHARING] = 0
    return required


def _without_more(config: Any) -> dict[str, Any]:
    """Return values with which nothing crosses besides hidden states, in a type of which more may; empty in others."""
    decoder = decoder_of(config)
    values: dict[str, Any] = {name: 0 for name in _MORE_CROSSES if getattr(decoder, name, None)}
    # transformers' own code has no layers that share without embeddings for each layer.
    return {**values, _SHARING: 0} if values and getattr(decoder, _SHARING, None) else values


def _can_share(config: Any) -> bool:
    """Return whether the last layers of a model may use keys and values of earlier ones, by their kinds."""
    if getattr(config, _SHARING, None) is None:
        return False
    # The class may refuse such values.
    try:
        model = tiny_model(with_values(config, _WITH_SHARING))
    except Exception:  # noqa: BLE001
        return False
    return isinstance(getattr(model.config, "layer_types", None), list)


def _named_dimensions(config: Any, crossing: Mapping[str, tuple[str | int, ...]]) -> dict[str, tuple[str, ...]]:
    """Return what crosses with the names of values of the configuration in place of sizes.

    Raises:
        CannotSplitError: No value is the size of a dimension.
    """
    return {
        name: tuple(
            size if isinstance(size, str) else _named_size(config, name, place, size)
            for place, size in enumerate(dimensions)
        )
        for name, dimensions in crossing.items()
    }


def _named_size(config: Any, name: str, place: int, size: int) -> str:
    """Return the value of the configuration that a dimension follows, or two whose product it is."""
    numbers: dict[str, int] = {key: value for key, value in decoder_of(config).to_dict().items() if type(value) is int}
    width = numbers[COMMON[1]]
    factors: list[tuple[int, str]] = [(1, "")]
    if size > width and size % width == 0:
        factors.append((width, f"{COMMON[1]}*"))
    for factor, times in factors:
        keys = [key for key, value in numbers.items() if value * factor == size]
        if len(keys) == 1:
            return f"{times}{keys[0]}"
        words = {*name.split("_")}
        for key in sorted(keys, key=lambda key: (-len(words & {*key.split("_")}), key in TINY, key)):
            try:
                other = derive_parts(tiny_model(with_values(config, {key: 2 * numbers[key]}))).crossing
            except Exception:  # noqa: BLE001, S112  # for sizes that do not fit together, a class may raise anything
                continue
            if other[name][place] == 2 * size:
                return f"{times}{key}"
    raise CannotSplitError(f"{name} crosses from layer to layer, and no value of the configuration is its size {size}")


def _named_shares(config: Any, shared: Mapping[str, list[list[int]]]) -> dict[str, tuple[str, str, str]]:
    """Return which layers share modules, by the names of values of the configuration.

    Raises:
        CannotSplitError: No values say so.
    """
    named: dict[str, tuple[str, str, str]] = {}
    values = decoder_of(config).to_dict()
    for module, groups in shared.items():
        numbers = sorted(chain.from_iterable(groups))
        lists = [
            name
            for name, kinds in values.items()
            if isinstance(kinds, list)
            and len(kinds) == decoder_of(config).num_hidden_layers
            and [number for number, kind in enumerate(kinds) if kind == kinds[numbers[0]]] == numbers
        ]
        if not lists or groups != [numbers[first :: len(groups)] for first in range(len(groups))]:
            text = "; ".join(", ".join(map(str, group)) for group in groups)
            raise CannotSplitError(f"layers share {module} ({text}), and no values of the configuration say which")
        counts = [name for name, value in values.items() if value == len(groups) and type(value) is int]
        count = next((name for name in counts if _counts_shares(config, name, module, len(groups))), "")
        named[module] = lists[0], values[lists[0]][numbers[0]], count
    return named


def _counts_shares(config: Any, name: str, module: str, count: int) -> bool:
    """Return whether a value says how many different modules of a name layers have."""
    try:
        groups = derive_parts(tiny_model(with_values(config, {name: count + 1}))).shared[module]
    except Exception:  # noqa: BLE001  # for values that do not fit together, the class may raise anything
        return False
    return len(groups) == count + 1


def _unproven(config: Any, values: Mapping[str, Any], why: str) -> tuple[str, UnprovenSetting]:
    """Return a note on values for which the family does not hold, in words and as data."""
    note = f"with {_setting(values)}: {why}"
    proven = {name: None if name == _SLIDING else getattr(decoder_of(config), name, None) for name in values}
    return note, UnprovenSetting(values, proven, note)


def _setting(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def _default(field: Any) -> Any:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default


_DEFAULTS = {field.name: _default(field) for field in fields(ModelFamily)}


@contextmanager
def _naming_model_type(model_type: str) -> Iterator[None]:
    """Name the model type in every refusal, and report errors of transformers as such."""
    try:
        yield
    except CannotSplitError as error:
        if model_type in error.message:
            raise
        raise CannotSplitError(f"{model_type} cannot be split: {error.message}", hint=error.hint) from error
    except SplitLearnError:
        raise
    # The code of the model may raise any exception.
    except Exception as error:
        raise CannotSplitError(
            f"transformers' own code fails on a small model of type {model_type}: "
            f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else error!r}",
            hint="give the config.json of a model that works: --from FILE",
        ) from error


class _Variants:
    """The switches of a configuration that change how a model is split.

    Args:
        config: The tiny configuration.
        parts: The parts derived with it.
    """

    def __init__(self, config: Any, parts: Parts) -> None:
        self._config = config
        self.parts = parts
        #: Every dropout of the configuration, turned on.
        self.dropouts = _dropouts(config)
        #: The switches that tests have to cover.
        self.variants: dict[str, dict[str, Any]] = {}
        #: Values that the family does not cover, with the reason.
        self.notes: list[str] = []
        self.unproven: list[UnprovenSetting] = []

    def sweep(self) -> None:
        """Change each switch, one at a time, and add the changes to the parts."""
        for name, values in self._switches():
            try:
                model = tiny_model(with_values(self._config, values))
                other = derive_parts(model)
            except CannotSplitError as refusal:
                self._leave_out(values, refusal.message)
                continue
            except Exception:  # noqa: BLE001, S112  # for values that do not fit together, a class may raise anything
                continue
            if self._merge(other, values):
                self.variants[name] = values

    def _switches(self) -> Iterator[tuple[str, dict[str, Any]]]:
        own = decoder_of(self._config).to_dict()
        for name, value in own.items():
            if isinstance(value, bool) and name not in _NO_SWITCHES:
                yield name.replace("_", " ").strip(), {name: not value}
        scaled = {
            name: 2.0
            for name, value in own.items()
            if isinstance(value, float) and value == 1.0 and name.endswith(_MULTIPLIERS)
        }
        if scaled:
            yield "scaled", scaled
        if self.dropouts:
            yield _DROPOUTS, self.dropouts

    def _leave_out(self, values: Mapping[str, Any], why: str) -> None:
        note, setting = _unproven(self._config, values, why)
        self.notes.append(note)
        self.unproven.append(setting)

    def _merge(self, other: Parts, values: Mapping[str, Any]) -> bool:
        """Add the parts found with other values; return whether there are new ones."""
        mine = self.parts
        changed = False
        for name in ("zero_outside_bottom", "skip_outside_bottom", "skip_outside_top"):
            more = [path for path in getattr(other, name) if path not in getattr(mine, name)]
            getattr(mine, name).extend(more)
            changed = changed or bool(more)
        if other.enter_at_layers and not mine.enter_at_layers:
            mine.enter_at_layers, changed = True, True
            why = other.reasons["enter_at_layers"].rstrip(".")
            mine.reasons["enter_at_layers"] = f"{why}, with {_setting(values)}."
        if other.norm != mine.norm:
            changed = True
            # A model without a norm may have another module after its layers.
            if mine.norm and other.norm and other.norm not in mine.skip_outside_top:
                self._leave_out(values, f"the final norm is {other.norm}, not {mine.norm}")
            mine.norm = mine.norm or other.norm
        if [*other.crossing] != [*mine.crossing]:
            self._leave_out(values, f"{', '.join(other.crossing) or 'nothing else'} crosses from layer to layer")
        for name in ("base", "layers", "embedding", "head", "layers_return_tuple"):
            if getattr(other, name) != getattr(mine, name):
                self._leave_out(values, f"{name} is {getattr(other, name)!r}, not {getattr(mine, name)!r}")
        return changed

    def fields(self) -> dict[str, Any]:
        parts = self.parts
        return {
            "base": parts.base,
            "layers": parts.layers,
            "embedding": parts.embedding,
            "norm": parts.norm,
            "head": parts.head,
            "zero_outside_bottom": tuple(parts.zero_outside_bottom),
            "skip_outside_bottom": tuple(parts.skip_outside_bottom),
            "skip_outside_top": tuple(parts.skip_outside_top),
            "before_head": tuple(parts.before_head),
            "head_bias": parts.head_bias,
            "enter_at_layers": parts.enter_at_layers,
            "leave_at_layers": parts.leave_at_layers,
            "layers_return_tuple": parts.layers_return_tuple,
        }


def _prove(derived: Derived, config: Any, swept: _Variants, settings: bool) -> None:
    """Split tiny models of all variants, and note where they differ from the unsplit models."""
    for uniform in (True, False):
        derived.fields["uniform_layers"] = uniform
        differing = _differences(derived, config)
        if not differing:
            break
    if differing:
        refuse_tokens_in_layers(tiny_model(with_values(config, {})))
        _check_cache(config)
        if derived.fields["transformers_tables"]:
            raise CannotSplitError(
                f"a split model of type {config.model_type}, with the tensors that transformers makes of those in "
                f"the file, is not equal: {differing[0]}"
            )
        derived.fields["uniform_layers"] = True
        derived.questions.append(
            Question("base", "what is missing for a split to equal the whole model?", differing[0])
        )
        derived.variants, derived.attention, derived.dtypes = {"plain": {}}, _ATTENTION, _DTYPES
        return
    _describe_cache(derived, config)
    if settings:
        _prove_settings(derived, config, swept)
    derived.dtypes = _DTYPES[:1]
    for dtype in _DTYPES[1:]:
        if differing := _differences(derived, config, dtype=dtype):
            derived.notes.append(f"in {dtype}: {differing[0]}")
        else:
            derived.dtypes = (*derived.dtypes, dtype)
    if settings:
        plain = _without_more(config)
        windows = [plain, *([{**plain, _SLIDING: _WINDOW}] if _has_window(config) else [])]
        derived.fields["packable"] = bool(derived.attention) and all(
            is_packable(
                in_dtype(tiny_model(with_values(config, values), attention), dtype), ModelFamily(**derived.fields)
            )
            for values in windows
            for attention in derived.attention
            for dtype in derived.dtypes
        )


def _prove_settings(derived: Derived, config: Any, swept: _Variants) -> None:
    """Split models with other settings, and note those that differ from the unsplit models."""
    tied = bool(config.tie_word_embeddings)
    candidates: dict[str, Mapping[str, Any]] = {
        "untied" if tied else "tied": {_TIED: not tied},
        **({"short window": {_SLIDING: _WINDOW}} if _has_window(config) else {}),
        **({"nothing more": _without_more(config)} if _without_more(config) else {}),
        **swept.variants,
    }
    derived.variants = {"plain": {}}
    # Verified even if they do not change the family, in which case the tests need not cover them.
    dropouts = {_DROPOUTS: swept.dropouts} if swept.dropouts else {}
    for name, values in {**dropouts, **candidates}.items():
        differing = _differences(derived, config, values)
        if differing:
            note, setting = _unproven(config, values, differing[0])
            derived.notes.append(note)
            derived.unproven.append(setting)
        elif name in candidates:
            derived.variants = {**derived.variants, name: values}
    derived.attention = tuple(name for name in _ATTENTION if not _differences(derived, config, attention=name))


def _describe_cache(derived: Derived, config: Any) -> None:
    """Say what layers cache instead of keys and values of all heads, or note that a plan is wrong about it."""
    model = tiny_model(with_values(config, {}))
    note = cache_note(model, ModelFamily(**derived.fields))
    if not note:
        return
    defaults = {name: value_of(type(decoder_of(config))(), name) for name in _LATENT}
    stated = {name: value for name, value in defaults.items() if type(value) is int}
    latent = {
        **derived.fields,
        "cached_values": _LATENT,
        "config_defaults": {**derived.fields["config_defaults"], **stated},
    }
    measured = {**derived.fields, "measured_cache": True}
    if all(value_of(decoder_of(config), name) for name in _LATENT) and not cache_note(model, ModelFamily(**latent)):
        derived.fields = latent
        return
    # The code of some models (DBRX's experts) does not run without values.
    with suppress(ConfigurationError):
        note = cache_note(model, ModelFamily(**measured))
        derived.fields = derived.fields if note else measured
    if note:
        derived.notes.append(note)


def _check_cache(config: Any) -> None:
    """Refuse a type that has no cache of transformers' own kind; called if a split is not equal.

    Raises:
        CannotSplitError: It has none.
    """
    model = tiny_model(with_values(config, {}))
    output = model(input_ids=torch.ones(1, 3, dtype=torch.long), use_cache=True)
    if isinstance(output.get(CACHE_FIELD), Cache):
        return
    others = [f"{name} ({type(value).__name__})" for name, value in output.items() if name != "logits"]
    held = [
        f"{path}.{name}"
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, torch.Tensor)
    ]
    why = "it computes the whole text again for each token"
    if others:
        why = f"what it keeps for the next token is {', '.join(others)}, of all layers together"
    elif held:
        why = f"its layers keep their states themselves ({held[0]}), where those of several texts would mix"
    raise CannotSplitError(
        f"{type(model).__name__} keeps no cache of transformers' own kind: {why}",
        hint="a newer transformers may keep one for it: pip install --upgrade transformers",
    )


def _dropouts(config: Any) -> dict[str, Any]:
    return {
        name: _DROPOUT
        for name, value in decoder_of(config).to_dict().items()
        if "drop" in name and not any(part in name for part in _NO_DROPOUT)
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _has_window(config: Any) -> bool:
    value = getattr(decoder_of(config), _SLIDING, None)
    return type(value) is int and value > _WINDOW


def _differences(
    derived: Derived,
    config: Any,
    values: Mapping[str, Any] | None = None,
    attention: str | None = None,
    dtype: str = _DTYPES[0],
) -> list[str]:
    # A model that cannot be created with these values counts as a difference.
    try:
        model = tiny_model(with_values(config, values or {}), attention)
        # Where a file is read, by transformers too: operations may round by where a tensor lies in memory.
        if dtype != _DTYPES[0] or derived.fields["transformers_tables"]:
            model = in_dtype(model, dtype)
        return differences(model, ModelFamily(**derived.fields))
    except Exception as error:  # noqa: BLE001
        return [f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"]
