"""What a plugin says about a family of models: data, hardly ever code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

_NOTHING: Mapping[str, Any] = MappingProxyType({})


def _no_impossible_cuts(config: Mapping[str, Any]) -> Mapping[int, str]:
    return {}


# Compared by identity, so that a family can be a key although it holds mappings.
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ModelFamily:
    """How the modules and tensors of one model type are named, and what is peculiar about them.

    A component is Hugging Face's own model class with the modules of the other components made
    neutral, so a family says only *where things are*. Most decoders are one line::

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
    #: The final norm, relative to ``base``.
    norm: str = "norm"
    #: The language model head.
    head: str = "lm_head"
    #: Modules relative to ``base`` whose output is *added* to the embeddings even when hidden
    #: states come in from outside; they yield zero in every component but the bottom.
    zero_outside_bottom: tuple[str, ...] = ()
    #: Modules relative to ``base`` that the running state passes *through* before the first layer;
    #: they hand it on unchanged in every component but the bottom.
    skip_outside_bottom: tuple[str, ...] = ()
    #: Tensors that old checkpoints carry and no module wants, as suffixes of the checkpoint key.
    ignored_suffixes: tuple[str, ...] = ()
    #: Substrings of checkpoint keys that changed their name, ``(old, new)``, applied in order.
    renamed: tuple[tuple[str, str], ...] = ()
    #: Where this family's ``config.json`` departs from the common names, ``{common: own}``.
    config_names: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    #: Values that count when ``config.json`` leaves them out, by common name: what the family's
    #: Hugging Face configuration class would fill in.
    config_defaults: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    #: True where all layers are made by ``type(layers[0])(config, layer_idx)``. Then the layers of
    #: other components are never built; say False for a family that mixes classes of layers.
    uniform_layers: bool = True
    #: Given ``config.json``: cuts that this model does not bear, each with the reason
    #: (layers that share keys and values, say).
    impossible_cuts: Callable[[Mapping[str, Any]], Mapping[int, str]] = _no_impossible_cuts
    #: Name of the loading strategy to prefer over the automatic choice; empty for none.
    preferred_strategy: str = ""
    #: Hub repository to load when the caller names only the model type; empty for none.
    default_model: str = ""
    #: A checkpoint that the plugin carries, ``"package:folder"``; empty for none. It must work offline.
    bundled_checkpoint: str = ""

    def config_value(self, config: Mapping[str, Any], name: str) -> Any:
        """Return a value of ``config.json`` by its common name, or None where nothing says it."""
        for candidate in (self.config_names.get(name, name), name):
            if config.get(candidate) is not None:
                return config[candidate]
        return self.config_defaults.get(name)
