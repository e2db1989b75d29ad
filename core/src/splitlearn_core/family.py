"""The description of a model family that a plugin provides: almost only data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, cast

from splitlearn_core.errors import ConfigurationError

_PAIR_LENGTH, _TRIPLE = 2, 3
_TIED = "tie_word_embeddings"
_LAYERS = "num_hidden_layers"
_NOTHING: Mapping[str, Any] = MappingProxyType({})

#: In the dimensions of what crosses a cut: sequences, tokens, and a slice for each layer after the cut.
BATCH, SEQUENCE, LAYERS = "batch", "sequence", "layers"
#: The name of hidden states in what crosses a cut.
STATES = "hidden_states"


def _no_impossible_cuts(config: Mapping[str, Any]) -> Mapping[int, str]:
    return {}


# Compared by identity, so that a family can be a key although it holds mappings.
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelFamily:
    """The names of the modules and tensors of one model type, and its peculiarities.

    A component is Hugging Face's own model class with the modules of the other components made
    neutral, so a family only names *where things are*. Most decoders take one line::

        ModelFamily(model_type="llama", architecture="LlamaForCausalLM")

    Module names are those of the Hugging Face module tree. Paths are relative to the model for
    ``base`` and ``head``, and relative to ``base`` for everything else.
    """

    #: ``model_type`` in ``config.json``; equals the name of the entry point.
    model_type: str
    #: The causal language model: the name of a class in ``transformers``, or ``"module:Class"``.
    architecture: str
    #: The module that holds embedding, layers and final norm (``transformer`` in GPT-2).
    base: str = "model"
    #: The ModuleList of decoder layers, relative to ``base``.
    layers: str = "layers"
    #: The token embedding, relative to ``base``.
    embedding: str = "embed_tokens"
    #: The final norm, relative to ``base``; empty if the model has none.
    norm: str = "norm"
    #: The language model head.
    head: str = "lm_head"
    #: In a composite model (a decoder, and one for images, say), the name of the decoder's values in
    #: ``config.json``: ``text_config``. Components then have what is in ``base`` and ``head``, and nothing of the
    #: others is built, fetched or read. Empty if the whole model is the decoder.
    text_config: str = ""
    #: Modules relative to ``base`` whose output is *added* to the embeddings even when hidden
    #: states come in from outside; they yield zero in every component but the bottom.
    zero_outside_bottom: tuple[str, ...] = ()
    #: Modules relative to ``base`` that the running state passes *through* before the first layer;
    #: they hand it on unchanged in every component but the bottom.
    skip_outside_bottom: tuple[str, ...] = ()
    #: Modules relative to ``base``, besides the final norm, that the running state passes *through* after
    #: the last layer (OPT's ``project_out``); they hand it on unchanged in every component but the top.
    #: A module of the three tuples, or ``norm``, may be None in some models of the type.
    skip_outside_top: tuple[str, ...] = ()
    #: Modules relative to the model, besides the head, that hidden states pass *through* after the base module
    #: (ModernBERT's prediction head); the top alone has them.
    before_head: tuple[str, ...] = ()
    #: The second name of the head's bias, in a module around the head (BERT's ``cls.predictions.bias``); empty if there
    #: is none. Both names are one tensor in models that tie embedding and head.
    head_bias: str = ""
    #: Arguments of the model's forward that its embeddings use up, and that mean nothing to layers; the bottom
    #: alone takes them. If they matter to all layers (masks by type of token), set ``()``.
    bottom_arguments: tuple[str, ...] = ("token_type_ids",)
    #: True if the model does something to the embeddings outside any module (Granite multiplies them).
    #: Hidden states from outside then enter at the first layer, and skip that step.
    enter_at_layers: bool = False
    #: True if a module without parameters is called before the first layer and after the last (nanochat's norm).
    #: Hidden states then leave a bottom or trunk at its last layer, and what follows is not for them.
    leave_at_layers: bool = False
    #: True if a layer returns a tuple whose first item is the running state.
    layers_return_tuple: bool = False
    #: What crosses a cut, where that is more than hidden states ``[batch, sequence, hidden_size]``: the name of an
    #: argument of the layers -> its dimensions. A dimension is ``batch``, ``sequence``, ``layers``, the name of a value
    #: of ``config.json``, or a product of such values with ``*`` between their names; a tensor with one that is 0 does
    #: not cross. ``layers`` marks an argument of which each layer takes a slice of its own: the slices of the layers
    #: after a cut cross it. ``hidden_states``, the first argument, is listed if its dimensions are others. All tensors
    #: are floating. Hidden states then enter at the first layer and leave at the last, whatever the model does around
    #: them.
    crossing: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _NOTHING)
    #: The names in ``crossing`` of what a layer computes for the next one, in the order in which it returns them after
    #: its hidden states. The others are computed before the first layer.
    layer_results: tuple[str, ...] = ()
    #: Arguments of the model's forward that it computes from token ids, where they are not given, and hands to its
    #: layers -> the name in ``crossing`` of what a layer takes of each (Gemma 4's ``per_layer_inputs``). The bottom
    #: alone takes them; the others give a zero in their place, and their layers what crosses the cut.
    zero_arguments: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    #: Tensors that old checkpoints contain and no module uses, as suffixes of the checkpoint key.
    ignored_suffixes: tuple[str, ...] = ()
    #: Substrings of checkpoint keys that changed their name, ``(old, new)``, applied in order.
    renamed: tuple[tuple[str, str], ...] = ()
    #: True where transformers makes tensors of the module out of others in the file (all experts of a layer in one
    #: tensor), or keeps some in float32, by its own tables for the type. Those then decide, after ``renamed``, and
    #: planning imports transformers. Where a plugin maps the keys itself, they decide about float32 alone.
    transformers_tables: bool = False
    #: This family's own names of values in ``config.json``, where they differ: ``{common: own}``. Of a list with one
    #: item for each layer, the number of layers is its length.
    config_names: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    #: Defaults of values that ``config.json`` omits, by common name: what the family's
    #: Hugging Face configuration class would fill in.
    config_defaults: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    #: True if all layers are made by ``type(layers[0])(config, layer_idx)``. Then the layers of
    #: other components are never built; set False for a family that mixes classes of layers.
    uniform_layers: bool = True
    #: Where a layer caches something smaller than the keys and values of its heads (latent attention): the values of
    #: ``config.json`` whose sum is the number of values that it caches for each token.
    cached_values: tuple[str, ...] = ()
    #: True where no values of ``config.json`` say what a layer caches: running states (state spaces, linear attention),
    #: or layers that cache differently. A plan then measures it on a model without weights, and imports transformers.
    measured_cache: bool = False
    #: True if layers treat each token by itself, except in attention, by transformers' attention interface. Steps of
    #: several sessions can then share a forward (packed mode).
    packable: bool = False
    #: Returns, for a ``config.json`` (or the ``text_config`` in it), the cuts that are impossible, each with the reason
    #: (layers that share keys and values, say).
    impossible_cuts: Callable[[Mapping[str, Any]], Mapping[int, str]] = _no_impossible_cuts
    #: Lists of ``config.json`` with a kind for each layer -> the kinds that use what the layer before has computed
    #: besides hidden states (a selection of tokens); there is no cut before such a layer.
    joined_layers: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _NOTHING)
    #: The name of the value of ``config.json`` that says how many of the last layers use keys and values of earlier
    #: ones: each uses those of the last layer of its kind (``layer_types``) that has its own. No cut parts the two.
    sharing_layers: str = ""
    #: Modules that several layers have, and a file once: the name of the module in a layer -> the list of
    #: ``config.json`` with a kind for each layer, the kind of the layers that have it, and the name of the value that
    #: says how many different ones there are, which those layers have in turn; empty for one. Each component that has
    #: such a layer has the module.
    shared_modules: Mapping[str, tuple[str, str, str]] = field(default_factory=lambda: _NOTHING)
    #: Values that ``config.json`` must have, or else the model is refused: with others, layers would exchange what
    #: cannot cross a cut (embeddings of tokens for each layer, say), or the model is an encoder (``is_decoder``).
    required_values: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    #: Name of the loading strategy to prefer over the automatic choice; empty for none.
    preferred_strategy: str = ""
    #: Hub repository to load when the caller names only the model type; empty for none.
    default_model: str = ""
    #: A checkpoint that the plugin carries, ``"package:folder"``; empty for none. It must work offline.
    bundled_checkpoint: str = ""
    #: Values of ``config.json``, by the family's own names, that a tiny random model of this type needs
    #: besides the ordinary small sizes: a number of experts, a window that is shorter than a test's prompt.
    #: Only the conformance kit reads it, so that it can test a plugin without a test file.
    tiny_config: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)

    def __post_init__(self) -> None:
        """Refuse invalid values by field; otherwise they would fail later and elsewhere."""
        problems = [f"{name} must be {what}, not {getattr(self, name)!r}" for name, what in _wrong_fields(self)]
        if problems:
            raise ConfigurationError(
                f"the family {self.model_type!r} is described wrongly: {'; '.join(problems)}",
                hint="each field is documented in splitlearn_core.ModelFamily",
            )

    @property
    def inlets(self) -> tuple[str, ...]:
        """The modules of the bottom alone, relative to ``base``."""
        return (self.embedding, *self.zero_outside_bottom, *self.skip_outside_bottom)

    @property
    def outlets(self) -> tuple[str, ...]:
        """The modules of the top alone, other than the head, relative to ``base``."""
        return (*filter(None, (self.norm,)), *self.skip_outside_top)

    def decoder_values(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the decoder's values of a ``config.json``."""
        inner = config.get(self.text_config) if self.text_config else None
        # Files of older versions of transformers have them among the others.
        return inner if isinstance(inner, Mapping) else config

    def config_value(self, config: Mapping[str, Any], name: str) -> Any:
        """Return a value of ``config.json`` by its common name, or None if it is not set."""
        values = self.decoder_values(config)
        if name == _TIED and (config.get(name) is not None or not values.get(name)):
            # Of the whole model, and in files of older versions of transformers of the decoder.
            values = config
        for candidate in (self.config_names.get(name, name), name):
            value = values.get(candidate)
            if value is not None:
                # A list with an item for each layer, in a family that names one.
                counts = name == _LAYERS != candidate and isinstance(value, list)
                return len(value) if counts else value
        return self.config_defaults.get(name)


def _wrong_fields(family: ModelFamily) -> Iterator[tuple[str, str]]:
    for name in ("model_type", "architecture", "base", "layers", "embedding", "head"):
        if not (isinstance(getattr(family, name), str) and getattr(family, name)):
            yield name, "a name"
    for name in (
        "norm",
        "head_bias",
        "text_config",
        "sharing_layers",
        "preferred_strategy",
        "default_model",
        "bundled_checkpoint",
    ):
        if not isinstance(getattr(family, name), str):
            yield name, "a text"
    for name in (
        "zero_outside_bottom",
        "skip_outside_bottom",
        "skip_outside_top",
        "before_head",
        "bottom_arguments",
        "ignored_suffixes",
        "cached_values",
        "layer_results",
    ):
        if not _is_tuple_of_texts(getattr(family, name)):
            yield name, "a tuple of strings"
    pairs = family.renamed
    if not (isinstance(pairs, tuple) and all(_is_tuple_of_texts(pair) and len(pair) == _PAIR_LENGTH for pair in pairs)):
        yield "renamed", "a tuple of pairs of strings"
    for name in ("config_names", "config_defaults", "required_values", "joined_layers", "tiny_config"):
        if not isinstance(getattr(family, name), Mapping):
            yield name, "a mapping"
    yield from _wrong_between_layers(family)
    for name in (
        "enter_at_layers",
        "leave_at_layers",
        "layers_return_tuple",
        "uniform_layers",
        "transformers_tables",
        "measured_cache",
        "packable",
    ):
        if not isinstance(getattr(family, name), bool):
            yield name, "True or False"
    if not callable(family.impossible_cuts):
        yield "impossible_cuts", "a function"


def _wrong_between_layers(family: ModelFamily) -> Iterator[tuple[str, str]]:
    if not (isinstance(family.shared_modules, Mapping) and all(map(_is_triple, family.shared_modules.values()))):
        yield "shared_modules", "a mapping of names to the names of a list, a kind and a value"
    if not (isinstance(family.crossing, Mapping) and all(map(_are_dimensions, family.crossing.values()))):
        yield "crossing", f"a mapping of names to dimensions, {BATCH!r} and {SEQUENCE!r} among them"
    elif not {*family.layer_results} <= family.crossing.keys() - {STATES}:
        yield "layer_results", "names in crossing other than that of hidden states"
    elif family.layer_results and not family.layers_return_tuple:
        yield "layers_return_tuple", "True, because layers return layer_results"
    arguments = family.zero_arguments
    if not (isinstance(arguments, Mapping) and {*arguments.values()} <= {*family.crossing}):
        yield "zero_arguments", "a mapping of names to names in crossing"


def _are_dimensions(value: object) -> bool:
    return _is_tuple_of_texts(value) and all(cast("Any", value).count(name) == 1 for name in (BATCH, SEQUENCE))


def _is_triple(value: object) -> bool:
    return _is_tuple_of_texts(value) and len(cast("Any", value)) == _TRIPLE


def _is_tuple_of_texts(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
